"""Generates and scores text with a trained model."""

from bigmac_jax.inference.drafter import Speculation
from bigmac_jax.inference.generator import Completion, Generator, Request, Score
from bigmac_jax.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Request", "Sampling", "Score", "Speculation"]
