"""Models in other formats: safetensors of transformers' classes, or under our own names."""

from bigmac_jax.interchange.exporting import choose, export_model
from bigmac_jax.interchange.importing import import_model, import_run

__all__ = ["choose", "export_model", "import_model", "import_run"]
