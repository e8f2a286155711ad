"""Converts a trained model to another structure without training: a narrow exchange, experts from a dense model, or
copies of its experts (docs/conversion.md)."""

from bigmac_jax.tuning.conversion.expert_copies import upcycle, upcycled, widen, widened
from bigmac_jax.tuning.conversion.latent import LayerError, narrow, narrowed

__all__ = ["LayerError", "narrow", "narrowed", "upcycle", "upcycled", "widen", "widened"]
