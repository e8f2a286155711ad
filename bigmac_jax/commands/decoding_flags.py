"""The flags that generate and serve share: which model, and how it decodes."""

import dataclasses
import pathlib

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, with_mesh, with_overrides
from bigmac_jax.config.reads import evaluation_notes
from bigmac_jax.config.section import all_field_types
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.inference import Generator
from bigmac_jax.inference.drafter import DRAFTERS, Speculation
from bigmac_jax.inference.kv_cache import WEIGHTS
from bigmac_jax.model.resident import check_resident, is_resident, with_resident
from bigmac_jax.model.transformer import check_length
from bigmac_jax.training.workdir import read_config
from bigmac_jax.tuning import restore

WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run: the --workdir of bigmac train.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best (by eval/loss) or the number of a checkpoint.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Prompt and completion, in tokens; 0 = the run's sequence length.", 0
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Completions at a time.", 1)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "", WEIGHTS, "What weights are kept in: float32, bfloat16 or int8; by default the run's execution.dtype."
)
_UNROLL = flags.DEFINE_bool(
    "unroll_layers", False, "On GPU: no loop over the layers, whose dense weights it copies; takes longer to compile."
)
_RESIDENT_LAYERS = flags.DEFINE_integer(
    "resident_layers", None, "Experts stand in host memory, of so many layers on the device; 0: all on the device.", 0
)
_RESIDENT_EXPERTS = flags.DEFINE_integer(
    "resident_experts", None, "Likewise, with so many experts of every layer on the device, the most used ones.", 0
)
_EXCHANGE = flags.DEFINE_enum(
    "exchange",
    "auto",
    all_field_types(Config)["execution.exchange"].choices,
    "Strategy of the MoE layers' exchange; auto is the fastest here.",
)
_SPECULATE = flags.DEFINE_integer("speculate", 0, "Tokens that are drafted, and verified at once; 0 drafts none.")
_DRAFT_WITH = flags.DEFINE_enum(
    "draft_with",
    Speculation.by,
    DRAFTERS,
    "What drafts: mtp, the model's next-token module; local, the experts of each rank; auto, mtp if there is one.",
)
_LOCAL_EXPERTS = flags.DEFINE_integer(
    "local_experts", 0, "Experts of each rank that local drafts use; 0 = all that it holds. Fewer are for study."
)
_LEAST_ACCEPTANCE = flags.DEFINE_float(
    "least_acceptance", Speculation.least, "Drafts pause while a smaller share of their tokens is accepted."
)


def speculation() -> Speculation:
    """How tokens are drafted; raises ConfigError for a value out of its range."""
    return Speculation(_SPECULATE.value, _LOCAL_EXPERTS.value, _LEAST_ACCEPTANCE.value, _DRAFT_WITH.value)


def read_run(workdir: pathlib.Path) -> Config:
    """The run's config with what the command line changes; raises ConfigError for what training alone would read."""
    for override in cli.OVERRIDES:
        if override.startswith(("execution.exchange=", "execution.overlap_chunks=", "execution.remat=")):
            raise ConfigError(f"--config.{override} is of training; completions take --exchange, drop it")
    return with_mesh(read_config(workdir), cli.OVERRIDES)


def max_length(config: Config) -> int:
    """Tokens of a prompt and its completion."""
    return _MAX_LENGTH.value or config.data.sequence_length


def enter_mesh(config: Config, speculate: Speculation) -> Config:
    """Makes the mesh of `config` the current one, and returns the config with what flags say of the experts; raises
    ConfigError for flags that the model cannot be decoded with, which is not read yet."""
    config = with_resident(config, _RESIDENT_LAYERS.value, _RESIDENT_EXPERTS.value)
    with_overrides(config, [f"execution.exchange={_EXCHANGE.value}"])  # which the run's other settings may not go with
    check_length("max_length", _MAX_LENGTH.value, config)
    check_resident(config, mesh := cli.enter_mesh(config, fit_batch=False))
    cli.warn(evaluation_notes(config, cli.given_fields(), mesh.shape["data"]))
    speculate.check(config)
    return config


def load_generator(workdir: pathlib.Path, config: Config, speculate: Speculation, tokenizer: Tokenizer) -> Generator:
    """A generator of the run's model, on the current mesh."""
    config, model = restore(workdir, _STEP.value, config, in_host=is_resident(config))
    if _UNROLL.value:
        execution = dataclasses.replace(config.execution, unroll_layers=config.model.depth)
        config = dataclasses.replace(config, execution=execution)
    return Generator(
        config, model, _MAX_LENGTH.value, BATCH_SIZE.value, tokenizer, _EXCHANGE.value, consume=True,
        weights=_WEIGHTS.value, speculate=speculate,
    )  # fmt: skip
