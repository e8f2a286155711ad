"""The cost model of a training step: one function per term, each in seconds, from counts and a machine's figures.

Nothing here is measured. A term is a function of a `Setting`; `step_time` puts them together.
"""

from dataclasses import dataclass
from typing import NamedTuple

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model import counts
from bigmac_jax.model.choose_exchange import choose_exchange
from bigmac_jax.model.counts import Parameters, Sizes, parameters
from bigmac_jax.model.exchange import Gather, Hierarchical
from bigmac_jax.model.mesh import ExpertGroup
from bigmac_jax.planning.cluster import Cluster, cluster, mesh_group
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape

# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient; clipping reads it once more.
OPTIMIZER_BYTES = 4 * (4 + 3 + 1)


@dataclass(frozen=True)
class Times:
    """Seconds of a training step by term, one after the other except for `hidden`."""

    matmul: float  # with recomputation and the padding of experts' rows
    exchange: float  # experts' rows and their metadata on the wire, as if nothing ran beside them
    gradients: float  # summed over the ranks that share parameters
    optimizer: float  # its passes over memory
    hidden: float  # the part of `exchange` that runs beside matmuls, at best
    tokens: int  # tokens of a step
    at_peak: float  # seconds of the step's useful FLOPs (`counts.flops`) at the machine's peak
    tensor: float = 0.0  # sequences gathered, and sums of them scattered, over mesh.tensor
    parameters: float = 0.0  # parameters gathered from their shards, with mesh.fsdp

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        sent = self.exchange - self.hidden + self.tensor + self.parameters + self.gradients
        return self.matmul + sent + self.optimizer

    @property
    def exchange_share(self) -> float:
        """Share of the step that waits for the exchange."""
        return (self.exchange - self.hidden) / self.total

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all ranks together."""
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the machine's peak that useful FLOPs reach."""
        return self.at_peak / self.total

    def as_dict(self) -> dict[str, float]:
        """All terms and what follows from them, for plan.py's JSON."""
        names = ("matmul", "exchange", "hidden", "tensor", "parameters", "gradients", "optimizer", "total",
                 "exchange_share", "tokens_per_s", "mfu")  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Setting:
    """What a term of the cost model depends on: a config on a mesh of a machine."""

    config: Config
    here: Cluster  # how the mesh's ranks lie on the machine
    group: ExpertGroup  # as the program sees it
    count: Parameters

    @property
    def peak(self) -> float:
        """FLOPs a second of all ranks, at the peak."""
        return self.here.ranks * self.here.hardware.flops_per_second(self.config.execution.dtype)


class SharedBytes(NamedTuple):
    """Bytes of the whole model's parameters, or of their gradients, by who shares them."""

    everyone: int  # what all ranks hold
    tensor: int  # what mesh.tensor splits
    experts: int  # what the expert group splits


def step_time(config: Config, sizes: Sizes, hardware: Hardware, topology: Shape | None = None) -> Times:
    """Predicts the seconds of a training step of `config` on a mesh of `sizes` (data, node, expert, tensor).

    Raises:
      ConfigError: as `cluster`.
    """
    here = cluster(sizes, hardware, topology)
    setting = Setting(config, here, mesh_group(sizes, hardware), parameters(config, sizes))
    matmul, exchange = matmul_seconds(setting), exchange_seconds(setting)
    return Times(
        matmul=sum(matmul.values()),
        exchange=exchange,
        hidden=hidden_seconds(setting, exchange, matmul.get("experts", 0.0)),
        tensor=tensor_seconds(setting),
        parameters=gather_seconds(setting),
        gradients=gradient_seconds(setting),
        optimizer=optimizer_seconds(setting),
        tokens=config.data.batch_size * config.data.sequence_length,
        at_peak=sum(counts.flops(config).values()) / setting.peak,
    )


def matmul_seconds(setting: Setting) -> dict[str, float]:
    """Seconds of the matrix products of each part of the model."""
    flops = matmul_flops(setting.config, setting.here.ranks, setting.group)
    reached = setting.peak * setting.here.hardware.matmul_efficiency
    return {part: count / reached for part, count in flops.items()}


def exchange_seconds(setting: Setting) -> float:
    """Seconds of a step's exchanges when nothing runs beside them."""
    config, here, group = setting.config, setting.here, setting.group
    m = config.model
    if not m.is_moe or here.group == 1:
        return 0.0
    exchange = choose_exchange(config, m.capacity_factor, counts.tokens_at_a_time(config, here.ranks), group)
    traffic = counts.exchange_traffic(config, here.ranks, group)
    payload, metadata = (sent.times(1 / here.ranks) for sent in (traffic.padded, traffic.metadata))
    if isinstance(exchange, Gather):
        # Half are gathers; the sums of the other half are gathers in reverse, or exchanges where rows are too small to
        # be added on the way (model/exchange/wire.py).
        adds_on_the_way = exchange.forward == exchange.backward == "float32"
        around = sum(payload) if adds_on_the_way else sum(payload) / 2
        flat = payload.times(1 - around / sum(payload)).plus(metadata)
        return here.around(around, here.group) + here.exchange(flat, traffic.exchanges)
    return here.exchange(payload.plus(metadata), traffic.exchanges, isinstance(exchange, Hierarchical))


def hidden_seconds(setting: Setting, exchange: float, experts: float) -> float:
    """Seconds of the exchange that run beside the experts: all chunks but the first, which has nothing to compute yet.

    Args:
      exchange, experts: seconds of each.
    """
    if not setting.here.hardware.overlaps:
        return 0.0
    chunks = setting.config.execution.overlap_chunks
    return (chunks - 1) / chunks * min(exchange, experts)


def tensor_seconds(setting: Setting) -> float:
    """Seconds of gathers and scatters over mesh.tensor."""
    here = setting.here
    return here.around(counts.tensor_bytes(setting.config, here.sizes), here.tensor)


def gather_seconds(setting: Setting) -> float:
    """Seconds of gathering parameters from their shards with mesh.fsdp."""
    config = setting.config
    if not config.mesh.fsdp:
        return 0.0
    # For each pass, forward and backward; a recomputed layer is gathered once for both. A gather is half of a sum.
    gathers = (counts.forward_passes(config) + 1) * config.train.accumulate_steps
    return gathers * sum_seconds(setting, parameter_bytes(config, setting.count)) / 2


def gradient_seconds(setting: Setting) -> float:
    """Seconds of summing gradients, those of every part of the batch on their own."""
    config = setting.config
    seconds = sum_seconds(setting, gradient_bytes(config, setting.count)) * config.train.accumulate_steps
    return seconds / 2 if config.mesh.fsdp else seconds  # a sum that stays scattered is half of one that all have


def optimizer_seconds(setting: Setting) -> float:
    """Seconds of the optimizer's passes over memory."""
    return setting.count.of_a_rank * OPTIMIZER_BYTES / setting.here.hardware.memory_bandwidth


def sum_seconds(setting: Setting, size: SharedBytes) -> float:
    """Seconds of an all-reduce of `size` over the ranks that share each part of it."""
    here, t = setting.here, setting.here.tensor
    replicas = here.sizes["data"]
    experts = here.all_reduce(size.experts / here.group / t, replicas, here.group * t)
    if not setting.config.mesh.split_experts:  # then the tensor ranks, too, hold all of a group's
        experts = here.all_reduce(size.experts / here.group, replicas * t, here.group if t == 1 else 1)
    return here.all_reduce(size.everyone, here.ranks) + here.all_reduce(size.tensor / t, here.ranks // t, t) + experts


def matmul_flops(config: Config, ranks: int, group: ExpertGroup) -> dict[str, float]:
    """FLOPs that are really computed, by part: `counts.flops`, recomputation, and experts' rows that hold no token."""
    m, flops = config.model, counts.flops(config)
    # A forward pass is a third of a step's FLOPs. What is recomputed is what gradients need: not logits; and where what
    # the experts gave is kept, neither that, nor projections.
    first, again = counts.forward_passes(config) - 1, counts.recomputes(config)
    recomputed = dict.fromkeys(flops, 1.0) | {"output": 0.0}
    if again and not counts.exchanges_again(config):
        matrices = 3 if m.gated else 2
        recomputed |= {"experts": (matrices - 1) / matrices, "projections": _recomputed_projections(m)}
    done = {
        part: count * (1 + (first * (part != "output") + again * recomputed[part]) / 3) for part, count in flops.items()
    }
    if m.is_moe:
        tokens = counts.tokens_at_a_time(config, ranks)
        exchange = choose_exchange(config, m.capacity_factor, tokens, group)
        done["experts"] *= counts.computed_rows(exchange, tokens, m.choices) / m.choices
    return done


def _recomputed_projections(m: ModelConfig) -> float:
    """The share of the projections' forward pass that gradients need again where what the experts gave is kept: x W↓ if
    a norm stands on it or on a sum that it is part of, and both factors of a gated output."""
    sizes, gate = counts.projections(m), "gate" in m.latent_norms
    needed = {"down": bool({"pre_dispatch", "skip"} & set(m.latent_norms)), "up": gate, "gate": gate}
    return sum(size for name, size in sizes.items() if needed[name]) / max(1, sum(sizes.values()))


def gradient_bytes(config: Config, count: Parameters) -> SharedBytes:
    """Bytes of the gradients that are summed over ranks for one batch, in execution.reduce_dtype."""
    size = 2 if config.execution.reduce_dtype == "bfloat16" else 4
    return SharedBytes(*(size * numbers for numbers in _shared_numbers(config, count)))


def parameter_bytes(config: Config, count: Parameters) -> SharedBytes:
    """Bytes of the parameters that mesh.fsdp gathers, in execution.gather_dtype; norms are never sharded."""
    size = 2 if "bfloat16" in (config.execution.gather_dtype, config.execution.dtype) else 4
    everyone, tensor, experts = _shared_numbers(config, count)
    return SharedBytes(size * (everyone - count.parts.get("norms", 0)), size * tensor, size * experts)


def _shared_numbers(config: Config, count: Parameters) -> tuple[int, int, int]:
    """Parameters that all ranks share, that mesh.tensor splits, of the experts. A table of tokens that is read and
    written with counts twice, as its gradient is summed once for each."""
    m, parts = config.model, count.parts
    table, experts = m.vocab_size * m.hidden_size, parts.get("experts", 0)
    split = sum(parts.get(part, 0) for part in ("attention", "mlp")) + 2 * table
    everyone = count.total - experts - split + (table if m.tie_embeddings else 0)
    return everyone, split, experts
