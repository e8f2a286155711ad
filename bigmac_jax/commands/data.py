"""Tokenises a corpus ahead: bigmac data prepare --config=… [--config.data.source=…], on as many hosts as there are.

No device is touched.
"""

import functools

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import ConfigError
from bigmac_jax.config.reading import as_base, load_with_base, retrained
from bigmac_jax.config.reads import notes
from bigmac_jax.data.pipeline import prepare
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.tuning.pretrained import choose_tokenizer, inherit_config, open_pretrained

_CONFIG = flags.DEFINE_string("config", "tiny", "A config file, or the name of one in configs/; as for `bigmac train`.")
_SPLITS = flags.DEFINE_list("splits", ["train", "validation"], "Of train, validation and test.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many tokenise at a time; 0 = as many as cores.", lower_bound=0)


def main() -> None:
    if cli.ARGUMENTS != ["prepare"]:
        raise ConfigError(f"{' '.join(cli.ARGUMENTS) or 'nothing'} is not what this does; use: prepare --config=…")
    given = dict(override.partition("=")[::2] for override in cli.OVERRIDES)
    place = given.get("train.init_from", "")
    origin = None
    if place and not flags.FLAGS["config"].present:  # that model's config, as for a run
        origin = open_pretrained(place)
        base = as_base(inherit_config(origin, given), place, cli.OVERRIDES)
        config = retrained(base, cli.OVERRIDES)
    else:
        config, base = load_with_base(_CONFIG.value, cli.OVERRIDES)
        if config.train.init_from:
            origin = open_pretrained(config.train.init_from)
    cli.warn(notes(config, cli.given_fields(), base=base))
    load = functools.partial(choose_tokenizer, origin) if origin else load_tokenizer
    for line in prepare(config, _SPLITS.value, _PROCESSES.value, load):
        print(line, flush=True)
