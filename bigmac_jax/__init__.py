"""BigMac (DCCA) Mixture-of-Experts language models in JAX/Flax."""

from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.mesh import make_mesh
from bigmac_jax.model import exchange
from bigmac_jax.model.transformer import init_model
from bigmac_jax.training.checkpoint import restore

__all__ = ["Config", "ConfigError", "exchange", "init_model", "load_config", "make_mesh", "restore"]
