"""Converts models to and from safetensors that Hugging Face's transformers loads, and to other structures.

bigmac convert export --workdir=DIR --output=OUT [--step=best] [--format=auto] [--dtype=float32]
bigmac convert import --checkpoint=DIR --workdir=DIR [--config.mesh.… --config.data.… --config.train.…]
bigmac convert latent --workdir=DIR --output=NEW [--ratio=0.25] [--latent_norm=none] [--config.train.…]
bigmac convert upcycle --workdir=DIR --output=NEW --experts=8 [--top_k=2] [--config.train.…]
bigmac convert widen --workdir=DIR --output=NEW [--copies=2] [--noise=0.01] [--config.train.…]
"""

import contextlib
import dataclasses
import pathlib

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, with_mesh
from bigmac_jax.config.names import nearest, question
from bigmac_jax.config.reads import context_notes
from bigmac_jax.data.chat_files import read_chat_folder
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.interchange import Trained, choose_format, export_model, import_run, tensor_files
from bigmac_jax.model.transformer import without_next_tokens
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training.history import history_before, history_with, model_name
from bigmac_jax.training.new_run import check_no_run
from bigmac_jax.training.restore import restore_parts
from bigmac_jax.training.run_data import open_run_stream, say_data_place
from bigmac_jax.training.workdir import load_run_tokenizer, locate_workdir, read_config
from bigmac_jax.tuning import conversion, restore_step
from bigmac_jax.tuning.conversion import converted_run
from bigmac_jax.tuning.peft import export_adapters
from bigmac_jax.tuning.pretrained import open_init_from, read_base

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run: what is converted, or what import writes.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best (by eval/loss) or the number of a checkpoint.")
_OUTPUT = flags.DEFINE_string("output", "", "The directory to write: an export, or the workdir of the converted model.")
_FORMAT = flags.DEFINE_string("format", "auto", "export: auto, nemotron_h, qwen3_moe, bigmac or plain; peft: adapters.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "export: float32, bfloat16 or float16.")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "export: the most bytes of one file.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "import: a directory with config.json and safetensors.")
_RATIO = flags.DEFINE_float("ratio", 0.25, "latent: the exchange's width over the model's.")
_LATENT_NORM = flags.DEFINE_string("latent_norm", "none", "latent: model.latent_norm of the result.")
_EXPERTS = flags.DEFINE_integer("experts", 8, "upcycle: experts of a layer.", lower_bound=1)
_TOP_K = flags.DEFINE_integer("top_k", 2, "upcycle: experts that a token is sent to.", lower_bound=1)
_COPIES = flags.DEFINE_integer("copies", 2, "widen: copies of each expert, and of each choice.", lower_bound=1)
_NOISE = flags.DEFINE_float("noise", 0.01, "widen: noise between copies, over a matrix's root mean square.", 0.0)
_TOKENS = flags.DEFINE_integer("tokens", 65536, "latent: tokens of training text that W↓ and W↑ are fitted to.", 1)
_MAKES = ("workdir", "step", "output")
_FLAGS = {  # of each action
    "export": (*_MAKES, "format", "dtype", "max_shard_size"),
    "import": ("workdir", "checkpoint"),
    "latent": (*_MAKES, "ratio", "latent_norm", "tokens"),
    "upcycle": (*_MAKES, "experts", "top_k", "tokens"),
    "widen": (*_MAKES, "copies", "noise", "tokens"),
}


def main() -> None:
    action = cli.ARGUMENTS[0] if len(cli.ARGUMENTS) == 1 else ""
    if action in _FLAGS:
        _check_used(action)
    if action == "export" and _OUTPUT.value:
        _export(_locate(_WORKDIR.value))
    elif action == "import" and _CHECKPOINT.value:
        _import(_locate(_WORKDIR.value))
    elif action in ("latent", "upcycle", "widen") and _OUTPUT.value:
        _convert(action, locate_workdir(_WORKDIR.value), locate_workdir(_OUTPUT.value))
    else:
        if action not in _FLAGS and (meant := question(nearest(action, list(_FLAGS)))):
            raise ConfigError(f"{action!r} is no conversion; {meant}")
        raise ConfigError(
            "give `import --checkpoint=DIR --workdir=DIR`, or one of export, latent, upcycle and widen with "
            "`--workdir=DIR --output=NEW`"
        )


def _locate(place: str) -> pathlib.Path:
    with hosts.raise_together():  # a folder that one of them may not enter
        return locate_workdir(place)


def _check_used(action: str) -> None:
    """Raises ConfigError for a flag that was given and is of other actions."""
    for name in dict.fromkeys(name for names in _FLAGS.values() for name in names):
        if name not in _FLAGS[action] and flags.FLAGS[name].present:
            value = flags.FLAGS[name].value
            others = ", ".join(other for other, names in _FLAGS.items() if name in names)
            fix = f"import writes --workdir={value}" if (action, name) == ("import", "output") else "leave it out"
            raise ConfigError(f"--{name}={value} is of {others}, and not of {action}; {fix}")


def _export(workdir: pathlib.Path) -> None:
    with hosts.raise_together():
        saved = read_config(workdir)
        meshed = with_mesh(saved, cli.OVERRIDES)
        peft = _FORMAT.value == "peft"
        tensor_files.parse_dtype(_DTYPE.value)
        tensor_files.parse_size(_MAX_SHARD_SIZE.value)
        if peft and _MAX_SHARD_SIZE.value != _MAX_SHARD_SIZE.default:
            raise ConfigError("--max_shard_size: PEFT reads adapters from one file; drop it, or use --format=auto")
        choose_format(saved, "auto" if peft else _FORMAT.value)  # before the model is read
        output = storage.locate(_OUTPUT.value, "--output")
        if hosts.is_first():
            tensor_files.check_new(output)
        tokenizer = load_run_tokenizer(workdir, saved)
    cli.agree(meshed, __name__)
    cli.enter_mesh(meshed, fit_batch=False)
    if peft:
        run = restore_parts(workdir, _STEP.value, meshed)
        base = open_init_from(workdir, run.config).config
        numbers = export_adapters(run, _OUTPUT.value, base, lambda: read_base(workdir, run.config), _DTYPE.value)
        of = f"{numbers:,} parameters of adapters, {_DTYPE.value}"
        hosts.say(f"{_OUTPUT.value}: {of}, for peft.PeftModel.from_pretrained")
        return
    _, model, step, loss = restore_step(workdir, _STEP.value, meshed)
    kind = export_model(
        saved,
        model,
        _OUTPUT.value,
        format=_FORMAT.value,
        dtype=_DTYPE.value,
        max_shard_size=_MAX_SHARD_SIZE.value,
        tokenizer=tokenizer,
        trained=Trained(step, loss, history_before(workdir, saved)),
        chat=read_chat_folder(workdir),
    )
    how = "; transformers loads it with trust_remote_code=True" if kind == "bigmac" else ""
    hosts.say(f"{_OUTPUT.value}: {kind}, {_DTYPE.value}{how}")


def _import(workdir: pathlib.Path) -> None:
    cli.agree(None, __name__)
    with contextlib.ExitStack() as stack:
        with hosts.raise_together():
            place = storage.locate(_CHECKPOINT.value, "--checkpoint")
            directory = stack.enter_context(storage.local_folder(place))
        config = import_run(directory, workdir, cli.OVERRIDES, model_name(place), place)
    hosts.say(f"{workdir}: {config.describe()}")
    for line in context_notes(config):
        hosts.say(line)


def _convert(action: str, workdir: pathlib.Path, output: pathlib.Path) -> None:
    if hosts.is_distributed():
        raise ConfigError(f"{action} is done by one process, which may have many devices; start it alone")
    check_no_run(output, "--output")
    saved = with_mesh(
        read_config(workdir), [given for given in cli.OVERRIDES if given.startswith(("mesh.", "cache_dir="))]
    )
    source = _source_config(saved)
    _converted_config(action, source)  # before the work
    tokenizer = load_run_tokenizer(workdir, saved)
    train, validation = (open_run_stream(workdir, saved, split, tokenizer) for split in ("train", "validation"))
    if isinstance(train, Conversations) or isinstance(validation, Conversations):
        raise ConfigError(f"{workdir} was tuned on conversations and has no text; convert the model that it began with")
    cli.enter_mesh(saved, fit_batch=False)
    _, model, step, _ = restore_step(workdir, _STEP.value, saved)
    if saved.model.mtp_modules:
        hosts.say(
            f"{output} is without the next-token modules of {workdir} (model.mtp_modules={saved.model.mtp_modules})"
        )
        model = without_next_tokens(saved, model)[1]

    for split in ("train", "validation"):
        say_data_place(workdir, saved, split)
    layers: list[conversion.LayerError] = []
    if action == "latent":
        batches = converted_run.sample_windows(saved, train, _TOKENS.value)
        config, result, layers = conversion.narrow(source, model, batches, _RATIO.value, _LATENT_NORM.value)
    elif action == "upcycle":
        config, result = conversion.upcycle(source, model, _EXPERTS.value, _TOP_K.value)
    else:
        config, result = conversion.widen(source, model, _COPIES.value, _NOISE.value)
    report = converted_run.measure(
        action, model, result, layers, converted_run.sample_windows(saved, validation, _TOKENS.value)
    )
    history = history_with(workdir, saved, step)
    config = converted_run.write_converted_run(
        workdir, output, config, result, tokenizer, report, cli.OVERRIDES, history
    )
    hosts.say("\n".join(report.lines()))
    hosts.say(f"{output}: {config.describe()}")


def _source_config(saved: Config) -> Config:
    """What is converted: the saved model as it decodes, on its mesh and its text, trained as the new one is to be."""
    alone = dataclasses.replace(saved.model, mtp_modules=0, mtp_blocks="")
    fresh = converted_run.new_run_config(dataclasses.replace(saved, model=alone), cli.OVERRIDES)
    return dataclasses.replace(fresh, mesh=saved.mesh, execution=saved.execution, data=saved.data)


def _converted_config(action: str, source: Config) -> Config:
    """The config that a conversion makes; raises ConfigError where it can't be."""
    if action == "latent":
        return conversion.narrowed(source, _RATIO.value, _LATENT_NORM.value)
    if action == "upcycle":
        return conversion.upcycled(source, _EXPERTS.value, _TOP_K.value)
    return conversion.widened(source, _COPIES.value)
