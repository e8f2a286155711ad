"""Text from a trained model."""

from bigmac_jax.inference.drafter import Speculation
from bigmac_jax.inference.generator import Completion, Generator, Request, Scored
from bigmac_jax.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Request", "Sampling", "Scored", "Speculation"]
