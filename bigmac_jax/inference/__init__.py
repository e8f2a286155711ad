"""Text from a trained model."""

from bigmac_jax.decoding.draft import Speculation
from bigmac_jax.decoding.sampling import Sampling
from bigmac_jax.inference.generate import Completion, Generator, Request, Scored

__all__ = ["Completion", "Generator", "Request", "Sampling", "Scored", "Speculation"]
