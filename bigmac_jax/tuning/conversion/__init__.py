"""From a trained model to one of another structure, without training: a narrow exchange, experts from a dense model,
more copies of the experts that there are (docs/conversion.md)."""

from bigmac_jax.tuning.conversion.expert_copies import upcycle, widen
from bigmac_jax.tuning.conversion.latent import LayerError, narrow

__all__ = ["LayerError", "narrow", "upcycle", "widen"]
