"""Models to and from safetensors that Hugging Face's transformers loads.

python convert.py export --workdir=DIR --output=OUT [--step=best] [--format=auto] [--dtype=float32]
python convert.py import --checkpoint=DIR --workdir=DIR [--config.mesh.… --config.data.… --config.train.…]
"""

import pathlib

from absl import flags

from bigmac_jax import cli, hosts, storage
from bigmac_jax.config import ConfigError, with_mesh
from bigmac_jax.data.chat import FILE as CHAT_TEMPLATE
from bigmac_jax.interchange import Trained, choose, export_model, import_run
from bigmac_jax.training.checkpoint import restore_parts
from bigmac_jax.training.workdir import read_config, run_folder, run_tokenizer
from bigmac_jax.tuning import restore_step
from bigmac_jax.tuning.peft import export_adapters

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run of train.py: what is exported, or what an import writes.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best (by eval/loss) or the number of a checkpoint.")
_OUTPUT = flags.DEFINE_string("output", "", "export: the directory to write.")
_FORMAT = flags.DEFINE_string("format", "auto", "export: auto, nemotron_h, qwen3_moe, bigmac or plain; peft: adapters.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "export: float32, bfloat16 or float16.")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "export: of one file.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "import: a directory with config.json and safetensors.")


def main() -> None:
    action = cli.ARGUMENTS[0] if len(cli.ARGUMENTS) == 1 else ""
    if action == "export" and _OUTPUT.value:
        _export(run_folder(_WORKDIR.value))
    elif action == "import" and _CHECKPOINT.value:
        _import(run_folder(_WORKDIR.value))
    else:
        raise ConfigError("give `export --workdir=DIR --output=OUT` or `import --checkpoint=DIR --workdir=DIR`")


def _export(workdir: pathlib.Path) -> None:
    with hosts.together():
        saved = read_config(workdir)
        meshed = with_mesh(saved, cli.OVERRIDES)
        peft = _FORMAT.value == "peft"
        choose(saved, "auto" if peft else _FORMAT.value)  # before the model is read
        storage.locate(_OUTPUT.value, "--output")
        tokenizer = run_tokenizer(workdir, saved)
    cli.agree(meshed, __name__)
    cli.enter_mesh(meshed, fit_batch=False)
    if peft:
        numbers = export_adapters(restore_parts(workdir, _STEP.value, meshed), _OUTPUT.value)
        hosts.say(f"{_OUTPUT.value}: {numbers:,} parameters of adapters, for peft.PeftModel.from_pretrained")
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
        trained=Trained(step, loss),
        chat_template=template.read_text() if (template := workdir / CHAT_TEMPLATE).is_file() else "",
    )
    how = "; transformers loads it with trust_remote_code=True" if kind == "bigmac" else ""
    hosts.say(f"{_OUTPUT.value}: {kind}, {_DTYPE.value}{how}")


def _import(workdir: pathlib.Path) -> None:
    cli.agree(None, __name__)
    with storage.local_folder(storage.locate(_CHECKPOINT.value, "--checkpoint")) as directory:
        config = import_run(directory, workdir, cli.OVERRIDES)
    hosts.say(f"{workdir}: {config.describe()}")


def run() -> None:
    cli.run(main, arguments=True, distributed=True)
