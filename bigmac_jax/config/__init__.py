"""The configuration: frozen dataclasses, resolved and validated once."""

from bigmac_jax.config.errors import ConfigError
from bigmac_jax.config.execution import ExecutionConfig, MeshConfig
from bigmac_jax.config.model import STRUCTURES, ModelConfig
from bigmac_jax.config.objects import parse_object, read_object, seal, strict_json, unseal
from bigmac_jax.config.places import check_place, missing_place_fix
from bigmac_jax.config.reading import load_config, with_mesh, with_overrides
from bigmac_jax.config.resuming import MAY_CHANGE, check_resume, resume_notes
from bigmac_jax.config.root import TOKENIZER_SIZES, Config, check_batch, from_dict
from bigmac_jax.config.training import DataConfig, OptimizerConfig, TrainConfig
from bigmac_jax.config.tuning import LORA_TARGETS, TuningConfig

__all__ = [
    "LORA_TARGETS",
    "MAY_CHANGE",
    "STRUCTURES",
    "TOKENIZER_SIZES",
    "Config",
    "ConfigError",
    "DataConfig",
    "ExecutionConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TuningConfig",
    "check_batch",
    "check_place",
    "check_resume",
    "from_dict",
    "load_config",
    "missing_place_fix",
    "parse_object",
    "read_object",
    "resume_notes",
    "seal",
    "strict_json",
    "unseal",
    "with_mesh",
    "with_overrides",
]
