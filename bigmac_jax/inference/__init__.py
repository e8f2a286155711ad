"""Text from a trained model."""

from bigmac_jax.inference.generate import Completion, Generator, Request
from bigmac_jax.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Request", "Sampling"]
