"""Models in other formats: safetensors of transformers' classes, or under our own names."""

from bigmac_jax.interchange.card import Trained
from bigmac_jax.interchange.exporting import choose, export_model
from bigmac_jax.interchange.importing import import_model, import_run, open_checkpoint

__all__ = ["Trained", "choose", "export_model", "import_model", "import_run", "open_checkpoint"]
