"""Tokenises a corpus ahead: bigmac data prepare --config=… [--config.data.source=…], on as many hosts as there are.

No device is touched.
"""

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.data.pipeline import prepare

_CONFIG = flags.DEFINE_string("config", "tiny", "A config file, or the name of one in configs/.")
_SPLITS = flags.DEFINE_list("splits", ["train", "validation"], "Of train, validation and test.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many tokenise at a time; 0 = as many as cores.", lower_bound=0)


def main() -> None:
    if cli.ARGUMENTS != ["prepare"]:
        raise ConfigError(f"{' '.join(cli.ARGUMENTS) or 'nothing'} is not what this does; use: prepare --config=…")
    for line in prepare(load_config(_CONFIG.value, cli.OVERRIDES), _SPLITS.value, _PROCESSES.value):
        print(line, flush=True)
