"""Training runs that others have published, and what the cost model predicts for them (docs/planning-truth.md).

`models.toml` has the shapes, each other file the runs of one source. What a source does not say is assumed, and each
run names what that is.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import tomllib
from dataclasses import dataclass
from typing import Any

from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.planning.cluster import Cluster, cluster
from bigmac_jax.planning.hardware import Hardware, load_hardware
from bigmac_jax.planning.job import Job, Times, predict
from bigmac_jax.planning.shapes import Attention, Dense, Experts, Mamba, Shape

_FOLDER = pathlib.Path(__file__).parent
# The busiest rank's rows over the mean where routing is not balanced by force: of three models Megatron-Bridge's
# verification cards measured with it and without, steps were 1.06, 1.5 and 2.7 times as long.
NATURAL = 1.5
ROW_BYTES = 2  # of a number that is exchanged, gathered or summed
_EXPERTS = ("router", "experts", "shared", "projections", "mlp", "passes")
_ATTENTION = ("attention", "mamba")
RECOMPUTED: dict[str, dict[str, float]] = {
    "none": {},
    "selective": {"passes": 0.5},  # norms and activations
    "half": dict.fromkeys((*_EXPERTS, *_ATTENTION), 0.5),  # every second product
    "mlp": dict.fromkeys(_EXPERTS, 1.0),
    "layer": dict.fromkeys((*_EXPERTS, *_ATTENTION, "scores"), 1.0),
}


@dataclass(frozen=True)
class Run:
    """A published training run; the fields are those of the TOML files, whose meaning models.toml's head gives.

    Attributes:
      row: model | machine | figure, as our notes spell the source's.
      tokens_per_s: of a device.
      tflops: of a device, of the model; `causal`: with half of attention's scores.
      differs: why its FLOPs a token and its shape's do not agree.
    """

    model: str
    row: str
    software: str
    machine: str
    devices: int
    batch: int
    length: int
    source: str
    assumed: str = ""
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    tflops: float = 0.0
    mfu: float = 0.0  # of the peak in 16 bits, as `peak` says it
    peak: str = ""
    causal: bool = True
    precision: str = "bf16"
    micro: float = 1
    tensor: int = 1
    stages: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    sharding: str = "zero1"
    remat: str = "none"
    offload: str = ""
    overlap: bool = False
    routing: str = "forced"
    capacity: float = 0.0
    mtp: bool = False
    dedup: bool = False  # a token is sent once to each rank, or machine, not once to each expert
    watts: float = 0.0  # of a device, where it is not the hardware file's
    memory_bandwidth: float = 0.0  # likewise
    network: float = 1.0  # of the hardware file's bandwidth between machines
    differs: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def set_aside(self) -> bool:
        """Whether no constant may be fitted to it: a third of the rows, by a hash of what they say."""
        return int(hashlib.sha256(self.row.encode()).hexdigest(), 16) % 3 == 0

    @property
    def imbalance(self) -> float:
        """The busiest rank's rows over the mean."""
        return NATURAL if self.routing == "natural" and self.expert > 1 and not self.capacity else 1.0

    @property
    def is_moe(self) -> bool:
        return load_shapes()[self.model].moe is not None

    def shape(self) -> Shape:
        """The model, without next-token modules that the run does not train."""
        shape = load_shapes()[self.model]
        return shape if self.mtp else dataclasses.replace(shape, mtp=0)

    def measured(self) -> float:
        """Tokens a second of a device, as published or from what is."""
        if self.tokens_per_s:
            return self.tokens_per_s
        if self.seconds:
            return self.tokens / self.seconds / self.devices
        flops = 3 * self.shape().flops(self.length, self.causal)
        if self.tflops:
            return self.tflops * 1e12 / flops
        return self.mfu * load_hardware(self.machine).peak_flops / flops


@functools.cache
def load_shapes() -> dict[str, Shape]:
    """The models of models.toml by name."""
    kinds = {"attention": Attention, "moe": Experts, "mlp": Dense, "mamba": Mamba}
    about = ("source", "parameters", "active")
    return {
        name: Shape(**{
            key: kinds[key](**value) if key in kinds else value for key, value in table.items() if key not in about
        })
        for name, table in tomllib.loads((_FOLDER / "models.toml").read_text()).items()
    }  # fmt: skip


@functools.cache
def load_runs() -> list[Run]:
    """All published runs, by file and in their order."""
    files = sorted(path for path in _FOLDER.glob("*.toml") if path.stem != "models")
    tables: list[dict[str, Any]] = [run for path in files for run in tomllib.loads(path.read_text())["run"]]
    return [Run(**table) for table in tables]


def machine_of(run: Run, efficiency: float = 0.0) -> Hardware:
    """The machine of a run: what its hardware file says, but for what the run says.

    Args:
      efficiency: `Hardware.matmul_efficiency`, instead of the file's.
    """
    hardware = load_hardware(run.machine)
    share = efficiency or hardware.matmul_efficiency
    slow = dataclasses.replace(hardware.slow, bandwidth=hardware.slow.bandwidth * run.network)
    return dataclasses.replace(
        hardware,
        matmul_efficiency=share * (run.watts / hardware.watts if run.watts and hardware.watts else 1),
        memory_bandwidth=run.memory_bandwidth or hardware.memory_bandwidth,
        slow=slow,
    )


def predict_run(run: Run, hardware: Hardware | None = None) -> Times:
    """The predicted seconds of a run's step, with other figures of its machine if they are given."""
    hardware = hardware or machine_of(run)
    return predict(make_run_job(run, hardware), hardware)


def make_run_job(run: Run, hardware: Hardware) -> Job:
    """What a step of the run asks of each of its devices."""
    devices = run.devices * hardware.cores
    shape, ranks = run.shape(), devices // run.stages  # of a stage
    if not hardware.torus:
        hardware = dataclasses.replace(hardware, machine_ranks=hardware.ranks_together(ranks))
    experts = shape.parameters("experts")
    dense = shape.parameters() - experts
    sums = cluster({"data": ranks, "node": 1, "expert": 1, "tensor": 1}, hardware)
    groups = ranks // run.expert
    parts = max(1, round(run.batch * run.tensor * run.stages * run.context / run.devices / run.micro))
    again = RECOMPUTED[run.remat]
    whole = run.sharding == "fsdp"

    def summed(size: float, split: int) -> float:
        """Seconds of scattering a sum of `size` numbers over the ranks that share it, every `split`-th of a stage."""
        return sums.all_reduce(ROW_BYTES * size / split / run.stages, ranks // split, split) / 2

    # Each rank holds experts / expert of a stage, and of the rest 1 / tensor.
    once = summed(dense, run.tensor) + (summed(experts, run.expert) if groups > 1 else 0.0)
    held = (dense / run.tensor + experts / run.expert) / run.stages
    times = parts if whole else (0 if run.sharding == "none" else 1)
    return Job(
        shape,
        run.length,
        run.tokens,
        devices,
        parts=parts,
        tensor=run.tensor,
        stages=run.stages,
        virtual=run.virtual,
        experts_over=run.expert if shape.moe else 1,
        eight_bit=run.precision != "bf16",
        again=again,
        padding=run.capacity or 1.0,
        imbalance=run.imbalance,
        grouped=not run.capacity,
        updated=shape.parameters() / devices,
        accumulated=shape.parameters() / devices if whole else held,
        exchange=exchange_seconds(run, shape, hardware),
        tensor_sent=tensor_seconds(run, shape, sums, parts),
        gathers=(2 if whole else 1) * times * once,
        gradients=max(1, times) * once * (2 if run.sharding == "none" else 1),
        hidden_exchange=hardware.hidden_share if run.overlap and hardware.overlaps else 0.0,
        hides_sums=True,
    )


def exchange_seconds(run: Run, shape: Shape, hardware: Hardware) -> float:
    """Seconds of the rows' exchanges of a step, at uniform routing."""
    if shape.moe is None or run.expert == 1:
        return 0.0
    S, K, devices = run.expert, shape.moe.top_k, run.devices * hardware.cores
    layers = (shape.moe.layers + shape.mtp) / run.stages
    passes = 2 * (2 + ("experts" in RECOMPUTED[run.remat]))  # there and back, forward and backward
    size = passes * layers * run.tokens * run.stages / devices * shape.row * ROW_BYTES * (run.capacity or run.imbalance)
    if hardware.torus:
        here = cluster({"data": devices // run.stages // S, "node": 1, "expert": S, "tensor": 1}, hardware)
        return here.exchange(Sent(size * K * (S - 1) / S, 0.0), round(passes * layers))
    near = math.gcd(S, hardware.machine_ranks)
    machines = S // near
    fast, slow = K * (near - 1) / S, K * (S - near) / S
    if run.dedup:  # across once to each machine, inside once to each rank
        fast = _distinct(S, K) * (near - 1) / near
        slow = _distinct(machines, K) * (machines - 1) / machines
    return max(size * fast / hardware.fast.bandwidth, size * slow / hardware.slow.bandwidth)


def tensor_seconds(run: Run, shape: Shape, here: Cluster, parts: int) -> float:
    """Seconds of gathers and scatters of sequences between tensor ranks: around attention and dense MLPs a gather and
    a scatter, in the backward pass two gathers and a scatter."""
    if run.tensor == 1:
        return 0.0
    a, again = shape.attention, "attention" in RECOMPUTED[run.remat]
    blocks = (a.layers + shape.mlp.layers + (shape.mamba.layers if shape.mamba else 0)) / run.stages
    at_a_time = run.tokens * run.tensor * run.stages / here.ranks / run.stages / parts
    size = ROW_BYTES * at_a_time * shape.hidden * (run.tensor - 1) / run.tensor
    return parts * blocks * (5 + 2 * again) * here.around(size, run.tensor)


def _distinct(places: int, choices: int) -> float:
    """How many of so many places a token reaches, if each choice is as likely to be at any."""
    return places * (1 - (1 - 1 / places) ** choices)
