"""Tuning: runs that begin with a trained model, and reading the models that they make."""

from bigmac_jax.tuning.pretrained import restore, restore_step

__all__ = ["restore", "restore_step"]
