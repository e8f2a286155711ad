"""What a training step takes, from counts and a machine's figures: seconds by part, none of them measured."""

from dataclasses import dataclass

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model import counts
from bigmac_jax.model.choose_exchange import choose_exchange
from bigmac_jax.model.counts import Parameters, Sizes, parameters
from bigmac_jax.model.exchange import Gather, Hierarchical, Strategy
from bigmac_jax.model.mesh import ExpertGroup
from bigmac_jax.planning.cluster import Cluster, cluster, mesh_group
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape

# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient; clipping reads it once more.
OPTIMIZER_BYTES = 4 * (4 + 3 + 1)


@dataclass(frozen=True)
class Times:
    """Seconds of a training step by part, one after the other but for `hidden`.

    Attributes:
      matmul: recomputation and the padding of experts' rows included.
      exchange: of the experts' rows and what goes with them, as if nothing ran beside it.
      gradients: their sums over the ranks that share parameters.
      optimizer: its passes over memory.
      hidden: the part of `exchange` that runs beside matmuls, at best.
      tensor: sequences gathered, and sums of them scattered, over mesh.tensor.
      parameters: gathered from their shards, with mesh.fsdp.
      tokens: of a step.
      useful: the share of the machine's peak that a step of one second would use (`counts.flops`).
    """

    matmul: float
    exchange: float
    gradients: float
    optimizer: float
    hidden: float
    tokens: int
    useful: float
    tensor: float = 0.0
    parameters: float = 0.0

    @property
    def total(self) -> float:
        sent = self.exchange - self.hidden + self.tensor + self.parameters + self.gradients
        return self.matmul + sent + self.optimizer

    @property
    def exchange_share(self) -> float:
        """Of the step that waits for the exchange."""
        return (self.exchange - self.hidden) / self.total

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.useful / self.total

    def as_dict(self) -> dict[str, float]:
        """For plan.py's JSON."""
        names = ("matmul", "exchange", "hidden", "tensor", "parameters", "gradients", "optimizer", "total",
                 "exchange_share", "tokens_per_s", "mfu")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def step_time(config: Config, sizes: Sizes, hardware: Hardware, topology: Shape | None = None) -> Times:
    """A training step of `config` on a mesh of `sizes` (data, node, expert, tensor).

    Raises:
      ConfigError: as `cluster`.
    """
    here = cluster(sizes, hardware, topology)
    group, rate = mesh_group(sizes, hardware), hardware.flops_per_second(config.execution.dtype)
    flops = counts.flops(config)
    by_part = matmul_flops(config, here.ranks, group)
    seconds_a_flop = 1 / (here.ranks * rate * hardware.matmul_efficiency)

    exchange = exchange_time(config, here, group)
    chunks, experts = config.execution.overlap_chunks, by_part.get("experts", 0) * seconds_a_flop
    # Of n chunks the first is sent before there is anything to compute; the experts are all that runs beside the rest.
    hidden = (chunks - 1) / chunks * min(exchange, experts) if hardware.overlaps else 0.0

    count = parameters(config, sizes)
    gradients = summed(config, here, gradient_bytes(config, count))
    gathered = 0.0
    if config.mesh.fsdp:  # a sum that stays scattered is half of one that all have
        gradients /= 2
        # Gathered for each pass, forward and backward; a recomputed layer is gathered once for both.
        gathered = (counts.forward_passes(config) + 1) * summed(config, here, parameter_bytes(config, count)) / 2
    return Times(
        sum(by_part.values()) * seconds_a_flop,
        exchange,
        gradients * config.train.accumulate_steps,  # the gradients of every part are summed on their own
        count.of_a_rank * OPTIMIZER_BYTES / hardware.memory_bandwidth,
        hidden,
        config.data.batch_size * config.data.sequence_length,
        sum(flops.values()) / (here.ranks * rate),
        here.around(counts.tensor_bytes(config, sizes), here.tensor),
        gathered * config.train.accumulate_steps,
    )


def summed(config: Config, here: Cluster, size: tuple[float, float, float]) -> float:
    """Seconds in which what belongs to parameters is summed over the ranks that share them.

    Args:
      size: bytes of what all share, of what `tensor` splits, of the experts; of the whole model.
    """
    everyones, split, experts = size
    t, replicas = here.tensor, here.sizes["data"]
    own = here.all_reduce(experts / here.group / t, replicas, here.group * t)
    if not config.mesh.split_experts:  # then the tensor ranks, too, hold all of a group's
        own = here.all_reduce(experts / here.group, replicas * t, here.group if t == 1 else 1)
    return here.all_reduce(everyones, here.ranks) + here.all_reduce(split / t, here.ranks // t, t) + own


def matmul_flops(config: Config, ranks: int, group: ExpertGroup) -> dict[str, float]:
    """`counts.flops` with what is done beside it: recomputation, and rows of experts that hold no token."""
    m, flops = config.model, counts.flops(config)
    # A forward pass is a third of a step's FLOPs. What is recomputed is what gradients need: not logits; and where what
    # the experts gave is kept, neither that, nor projections.
    first, again = counts.forward_passes(config) - 1, counts.recomputes(config)
    recomputed = dict.fromkeys(flops, 1.0) | {"output": 0.0}
    if again and not counts.exchanges_again(config):
        matrices = 3 if m.gated else 2
        recomputed |= {"experts": (matrices - 1) / matrices, "projections": _of_projections(m)}
    done = {
        part: count * (1 + (first * (part != "output") + again * recomputed[part]) / 3) for part, count in flops.items()
    }
    if m.is_moe:
        tokens = counts.tokens_at_a_time(config, ranks)
        exchange = choose_exchange(config, m.capacity_factor, tokens, group)
        done["experts"] *= counts.computed_rows(exchange, tokens, m.choices) / m.choices
    return done


def _of_projections(m: ModelConfig) -> float:
    """The share of the projections' forward pass that gradients need again where what the experts gave is kept: x W↓ if
    a norm stands on it or on a sum that it is part of, and both factors of a gated output."""
    sizes, gate = counts.projections(m), "gate" in m.latent_norms
    needed = {"down": bool({"pre_dispatch", "skip"} & set(m.latent_norms)), "up": gate, "gate": gate}
    return sum(size for name, size in sizes.items() if needed[name]) / max(1, sum(sizes.values()))


def gradient_bytes(config: Config, count: Parameters) -> tuple[int, int, int]:
    """(of what all ranks share, of what `tensor` splits, of the experts): bytes of the gradients that are summed over
    ranks, for one batch, in execution.reduce_dtype. A table that is read and written with is summed once for each."""
    size = 2 if config.execution.reduce_dtype == "bfloat16" else 4
    everyones, split, experts = _shared_sizes(config, count)
    return size * everyones, size * split, size * experts


def parameter_bytes(config: Config, count: Parameters) -> tuple[int, int, int]:
    """As `gradient_bytes`, of the parameters when they are gathered: in execution.gather_dtype, and without norms."""
    size = 2 if "bfloat16" in (config.execution.gather_dtype, config.execution.dtype) else 4
    everyones, split, experts = _shared_sizes(config, count)
    return size * (everyones - count.parts.get("norms", 0)), size * split, size * experts


def _shared_sizes(config: Config, count: Parameters) -> tuple[int, int, int]:
    """Numbers of what all ranks share, of what `tensor` splits, of the experts."""
    m, parts = config.model, count.parts
    table, experts = m.vocab_size * m.hidden_size, parts.get("experts", 0)
    tables = 2 * table  # tied or not
    split = sum(parts.get(part, 0) for part in ("attention", "mlp")) + tables
    everyones = count.total - experts - split + (table if m.tie_embeddings else 0)
    return everyones, split, experts


def exchange_time(config: Config, here: Cluster, group: ExpertGroup) -> float:
    """Seconds of a step's exchanges, nothing beside them."""
    m = config.model
    if not m.is_moe or here.group == 1:
        return 0.0
    exchange = choose_exchange(config, m.capacity_factor, counts.tokens_at_a_time(config, here.ranks), group)
    traffic = counts.exchange_traffic(config, here.ranks, group)
    payload, metadata = (sent.times(1 / here.ranks) for sent in (traffic.padded, traffic.metadata))
    if isinstance(exchange, Gather):
        # Half are gathers; the sums of the other half are gathers in reverse, or exchanges where rows are too small to
        # be added on the way (model/exchange/wire.py).
        around = sum(payload) if _adds_on_the_way(exchange) else sum(payload) / 2
        flat = payload.times(1 - around / sum(payload)).plus(metadata)
        return here.around(around, here.group) + here.exchange(flat, traffic.exchanges)
    return here.exchange(payload.plus(metadata), traffic.exchanges, isinstance(exchange, Hierarchical))


def _adds_on_the_way(exchange: Strategy) -> bool:
    return exchange.forward == exchange.backward == "float32"
