"""Trains a model: bigmac train --config=configs/tiny.py --workdir=DIR [--config.model.structure=fine_grained …]."""

import pathlib
import shlex
import sys

import jax
from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, check_batch
from bigmac_jax.config.reading import as_base, load_with_base, retrained, saved_places
from bigmac_jax.config.reads import notes
from bigmac_jax.data.chat_files import TEMPLATE_FILE
from bigmac_jax.run.elastic import fit_replicas
from bigmac_jax.run.loop import train
from bigmac_jax.runtime import hosts
from bigmac_jax.training.bad_steps import RunError
from bigmac_jax.training.workdir import has_run, locate_workdir, read_config, read_run_json
from bigmac_jax.tuning.pretrained import inherit_config, open_pretrained

_CONFIG = flags.DEFINE_string(
    "config",
    "tiny",
    "A config file, or the name of one in configs/; FILE:ARGUMENT gives it one. Without it, a run "
    "that begins with a trained model (--config.train.init_from) has that model's.",
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Where the run is written, and resumed from.")
_PROFILE = flags.DEFINE_string("profile", "", "START:STOP, the steps of a profiler trace written to WORKDIR/profile.")
_STOPPED = flags.DEFINE_integer(
    "stopped_exit_code", 0, "Of a run that was stopped and saved: above 0 it counts as failed.", 0, 255
)


def main() -> int:
    with hosts.raise_together():
        workdir = locate_workdir(_WORKDIR.value)
        profile = _steps(_PROFILE.value)
    config, base, named_by = _config(workdir)
    cli.agree(config, __name__)
    asked = config
    if asked.mesh.replica > 1:
        saved, mesh_before = _read_saved(workdir)
        with hosts.raise_together():
            config, line = fit_replicas(asked, saved, mesh_before, jax.device_count())
        if line:
            hosts.say(line)
    mesh = cli.enter_mesh(config)
    cli.warn(notes(config, cli.given_fields(), mesh.shape["data"], base))
    try:
        places = saved_places(config, cli.OVERRIDES) if named_by else []
        reads = [f"reads {place}, which {named_by} names" for place in places]
        result = train(config, workdir, profile, reads, asked)
    except RunError as error:
        hosts.say(f"error: {error}", file=sys.stderr)
        return 1
    if not result.finished:
        hosts.say(f"stopped and saved at step {result.step} of {config.train.steps}; the same command resumes")
        return _STOPPED.value
    if result.first_step == result.step:
        hosts.say(_finished(config.train.steps, result.step))
    else:
        hosts.say(_done(result.step))
    return 0


def _config(workdir: pathlib.Path) -> tuple[Config, Config, str]:
    """Reads the config: --config's, or without it that of the model which the run begins with.

    Returns:
      the config, the same before the overrides, and the name of the saved config that it comes from, or "".
    """
    given = dict(override.partition("=")[::2] for override in cli.OVERRIDES)
    place = given.get("train.init_from")
    own = not place or bool(flags.FLAGS["config"].present)
    file = _CONFIG.value.partition(":")[0] if own else str(place)
    with hosts.raise_together():
        if own:
            loaded = *load_with_base(_CONFIG.value, cli.OVERRIDES), file if file.endswith(".json") else ""
    # Or some enter alone what reads the model.
    hosts.check_same({"--config": "FILE" if own else "none", "train.init_from": "" if own else place})
    if own:
        return loaded
    base, _ = _read_saved(workdir)
    if base:
        file = str(workdir)
    else:
        base = inherit_config(open_pretrained(str(place)), given)
    with hosts.raise_together():
        base = as_base(base, file, cli.OVERRIDES)
        config = retrained(base, cli.OVERRIDES)
        check_batch(config, max(1, config.mesh.data))
    return config, base, file


def _read_saved(workdir: pathlib.Path) -> tuple[Config | None, dict[str, int]]:
    """The config of the run that a workdir holds, None without one, and its mesh: as process 0 sees them, for others
    may see the folder later, or another one of the same name."""
    found = hosts.run_on_first(
        lambda: (read_config(workdir).to_json(), read_run_json(workdir)["mesh"]) if has_run(workdir) else ("", {})
    )
    return Config.from_json(found[0].encode()) if found[0] else None, found[1]


def _done(step: int) -> str:
    workdir = _WORKDIR.value
    pictures = f"{workdir}/report.png has its curves; " if (locate_workdir(workdir) / "report.png").exists() else ""
    return f"trained to step {step}, saved in {workdir}; {pictures}next: {_next(workdir)}"


def _next(workdir: str) -> str:
    chats = (locate_workdir(workdir) / TEMPLATE_FILE).exists()  # generate takes its prompt as it is
    run = f"--workdir={shlex.quote(workdir)}" + (f" --cpu_devices={n}" if (n := cli.CPU_DEVICES.value) else "")
    use = f"bigmac serve {run}" if chats else f"bigmac generate {run} --prompt=TEXT"
    return f"bigmac eval {run}, {use}"


def _finished(steps: int, step: int) -> str:
    workdir = _WORKDIR.value
    has = f"{step} of {steps} steps" if step <= steps else f"{step} steps, more than train.steps={steps}"
    return (
        f"{workdir} is finished: it has {has}, and nothing was trained; for more of them give "
        f"--config.train.steps={2 * step}, for another run another --workdir; to use it: "
        f"{_next(workdir)}"
    )


def _steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and 0 < int(start) <= int(stop)):
        raise ConfigError(f"--profile={text} must be START:STOP with 1 <= START <= STOP, as in --profile=10:12")
    return int(start), int(stop)
