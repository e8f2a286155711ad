r"""Says what a configuration costs before it runs: bigmac plan --config=PATH [--config.a.b=value …].

    bigmac plan --config=configs/paper/gpt3_xl.py --config.mesh.expert=32 --devices=32 --paper
    bigmac plan --config=configs/paper/gpt3_xl.py --config.mesh.expert=32 --topology=v6e:4x8 --compile
    bigmac plan --config=configs/paper/gpt3_xl.py --config.mesh.expert=32 --devices=32 --hardware=paper \
        --sweep structure=fine_grained,bigmac top_k=1,2,4,8
    bigmac plan --config=configs/large.py:258b --topology=h100:64x8 --search
"""

import jax
from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, strict_json
from bigmac_jax.config.reading import load_with_base
from bigmac_jax.config.reads import notes
from bigmac_jax.model.resident import with_resident
from bigmac_jax.planning import pictures, planner, report
from bigmac_jax.planning.candidates import HEADROOM
from bigmac_jax.planning.hardware import HARDWARE
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.topologies import GPUS, TPUS
from bigmac_jax.runtime import storage

_CONFIG = flags.DEFINE_string(
    "config", "tiny", "A config file, or the name of one in configs/; FILE:ARGUMENT gives it one."
)
_DEVICES = flags.DEFINE_integer("devices", 0, "Plan for so many devices; 0: as many as the mesh needs.", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"A slice, v5e:4x8 or v5p:2x4x4, or hosts × GPUs, h100:4x8; {', '.join((*TPUS, *GPUS))}."
)
_SLICES = flags.DEFINE_integer("slices", 1, "So many slices of --topology, with slow links between.", lower_bound=1)
_COMPILE = flags.DEFINE_bool("compile", False, "Compile init, step, evaluate, prefill, decode, and read them.")
_RESIDENT_LAYERS = flags.DEFINE_integer(
    "resident_layers", None, "Plan generate and serve with experts in host memory, of so many layers on the device.", 0
)
_RESIDENT_EXPERTS = flags.DEFINE_integer(
    "resident_experts", None, "Likewise, with so many experts of every layer on the device, the most used ones.", 0
)
_HARDWARE = flags.DEFINE_string("hardware", "", f"Predict times on {', '.join(HARDWARE)} or a .toml file.")
_OPTIONS = flags.DEFINE_bool("options", False, "Show the compiler's options of the training step, and why.")
_TERMS = flags.DEFINE_bool("terms", False, "Show each term of the predicted step, and what it is.")
_IMBALANCE = flags.DEFINE_string(
    "imbalance", "", "The busiest rank's rows over the mean: a number, or a run's workdir, whose metrics say it."
)
_PAPER = flags.DEFINE_bool("paper", False, "Show the paper's formulas beside the model's own counts.")
_SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=a,b,… more of them may follow: every combination, as a table.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the mesh and the settings that are fastest, and plan for them.")
_HEADROOM = flags.DEFINE_float("headroom", HEADROOM, "The share of memory that --search leaves free.", 0, 0.99)
_TOKENS = flags.DEFINE_string("tokens", "", "Predict the days that so many tokens take: 15T, 300B, 1.5e12.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare the structures' times to an equal loss (docs/quality.md).")
_SCALE = flags.DEFINE_string("scale", "", "How far each structure scales: 64..65536, or 64,256,1024.")
_PLOT = flags.DEFINE_string("plot", "", "Write a picture to this .png file.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # whatever is here, the plan is for something else
    if cli.ARGUMENTS and not _SWEEP.value:
        meant = cli.meant_argument(cli.ARGUMENTS[0], ["config", "sweep"])
        fix = (
            meant
            if "?" in meant and "," not in cli.ARGUMENTS[0]
            else "arguments follow --sweep, as in --sweep top_k=1,2"
        )
        raise ConfigError(f"{cli.ARGUMENTS[0]!r} belongs to no flag; {fix}")
    plot = storage.locate(_PLOT.value, "--plot")
    if _PLOT.value and plot.suffix != ".png":
        raise ConfigError(f"--plot={_PLOT.value} must end in .png")
    if not storage.is_store(plot) and not plot.parent.is_dir():
        raise ConfigError(f"--plot={_PLOT.value} must be in a folder that exists; mkdir -p {plot.parent} makes it")
    config, base = load_with_base(_CONFIG.value, cli.OVERRIDES)
    cli.warn(notes(config, cli.given_fields(), base=base))
    config = with_resident(config, _RESIDENT_LAYERS.value, _RESIDENT_EXPERTS.value)
    request = Request(
        devices=_DEVICES.value or cli.CPU_DEVICES.value,
        topology=_TOPOLOGY.value,
        slices=_SLICES.value,
        hardware=_HARDWARE.value,
        compile=_COMPILE.value,
        options=_OPTIONS.value,
        terms=_TERMS.value,
        imbalance=_IMBALANCE.value,
        paper=_PAPER.value,
        sweep=(*_SWEEP.value, *cli.ARGUMENTS),
        search=_SEARCH.value,
        headroom=_HEADROOM.value,
        tokens=_TOKENS.value,
        compare=_COMPARE.value,
        scale=_SCALE.value,
    )
    cli.warn(_unread(config, request))
    result = planner.make_plan(config, request)
    if _JSON.value:
        print(strict_json(result))
    else:
        report.show(result)
    if _PLOT.value:
        pictures.draw(result, plot)


def _unread(config: Config, request: Request) -> list[str]:
    """A line of each flag that changes nothing beside the others."""
    found = []
    varied = any("capacity_factor" in value for value in request.sweep)
    if request.imbalance and config.model.is_moe and not (config.dropless or varied):
        most = f"model.capacity_factor={config.model.capacity_factor:g} is the most that any expert computes"
        found.append(f"set, but not read: --imbalance ({most})")
    if request.headroom != HEADROOM and not (request.search or request.scale):
        found.append("set, but not read: --headroom (of --search and --scale)")
    return found
