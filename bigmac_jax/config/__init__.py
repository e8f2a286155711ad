"""The configuration: frozen dataclasses, resolved and validated once."""

from bigmac_jax.config.objects import parse_object, read_object, sealed, strict_json, unsealed
from bigmac_jax.config.reading import MAY_CHANGE, check_resume, load_config, resume_notes, with_mesh
from bigmac_jax.config.rules import STRUCTURES, TOKENIZER_SIZES, ConfigError, check_batch, check_place
from bigmac_jax.config.sections import (
    Config,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    second_edition,
)
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
    "parse_object",
    "read_object",
    "resume_notes",
    "sealed",
    "second_edition",
    "strict_json",
    "unsealed",
    "with_mesh",
]
