"""BigMac (DCCA) Mixture-of-Experts language models in JAX/Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmac_jax.config import Config, ConfigError, load_config
    from bigmac_jax.inference import Generator, Sampling
    from bigmac_jax.interchange import export_model, import_model
    from bigmac_jax.model import exchange
    from bigmac_jax.model.mesh import make_mesh
    from bigmac_jax.model.transformer import init_model
    from bigmac_jax.run.python_api import metrics, plan, train
    from bigmac_jax.tuning import restore

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "Generator",
    "Sampling",
    "__version__",
    "exchange",
    "export_model",
    "import_model",
    "init_model",
    "load_config",
    "make_mesh",
    "metrics",
    "plan",
    "restore",
    "train",
]

# Imported when first asked for: `environment.prepare()` must be able to run before jax is loaded.
_HOME = {
    "Config": "config",
    "ConfigError": "config",
    "Generator": "inference",
    "Sampling": "inference",
    "exchange": "model.exchange",
    "export_model": "interchange",
    "import_model": "interchange",
    "init_model": "model.transformer",
    "load_config": "config",
    "make_mesh": "model.mesh",
    "metrics": "run.python_api",
    "plan": "run.python_api",
    "restore": "tuning",
    "train": "run.python_api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    return module if name == "exchange" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
