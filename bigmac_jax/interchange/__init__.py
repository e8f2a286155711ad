"""Models in other formats: safetensors of transformers' classes, or under our own names."""

from bigmac_jax.interchange.exporting import choose_format, export_model
from bigmac_jax.interchange.importing import import_model, import_run, open_checkpoint
from bigmac_jax.interchange.model_card import Trained

__all__ = ["Trained", "choose_format", "export_model", "import_model", "import_run", "open_checkpoint"]
