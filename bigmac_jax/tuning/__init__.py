"""Tuning: a run that begins at a trained model, and the model that comes of it."""

from bigmac_jax.tuning.pretrained import restore, restore_step

__all__ = ["restore", "restore_step"]
