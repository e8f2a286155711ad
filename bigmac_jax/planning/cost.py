"""What a training step takes, from counts and a machine's figures: seconds by part, none of them measured.

Collectives are reckoned as α + bytes / β: α for each message, β of the link that is filled first.
"""

import functools
import math
from dataclasses import dataclass, replace

from bigmac_jax import counts
from bigmac_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig
from bigmac_jax.counts import Parameters, Sizes
from bigmac_jax.mesh import ExpertGroup
from bigmac_jax.model.exchange import Gather, Hierarchical, Strategy
from bigmac_jax.model.exchange.strategies import Sent
from bigmac_jax.model.moe import strategy
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Block, Shape, parts

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


@dataclass(frozen=True)
class Cluster:
    """So many ranks of a machine, and how its expert groups lie on it.

    Attributes:
      slice: of a torus, the chips that ICI joins.
    """

    hardware: Hardware
    sizes: Sizes
    slice: Block | None = None

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def group(self) -> int:
        """Ranks that share one set of experts."""
        return self.sizes["node"] * self.sizes["expert"]

    @property
    def tensor(self) -> int:
        """Ranks that share a sequence, next to each other; each has an expert group of its own."""
        return self.sizes.get("tensor", 1)

    @property
    def machine(self) -> int:
        """Ranks that fast links join."""
        return self.slice.chips if self.slice else math.gcd(self.ranks, self.hardware.machine_ranks)

    @property
    def near(self) -> int:
        """Those of them that may be of one expert group."""
        return max(1, self.machine // self.tensor)

    def by_link(self, sent: Sent) -> Sent:
        """What is sent along the mesh's axes expert and node, on fast and slow links: they need not be the same.

        Along an axis every peer gets as much, so it is enough to know how many of them are in the machine.
        """
        node, expert = self.sizes["node"], self.sizes["expert"]
        inside = math.gcd(self.group, self.near)
        if inside % expert:  # a machine that cuts through the mesh's rows keeps at least this much of one
            inside = math.gcd(inside, expert)
        if inside >= expert:
            near = sent.slow * (inside / expert - 1) / (node - 1) if node > 1 else 0.0
            return Sent(sent.fast + near, sent.slow - near)
        near = sent.fast * (inside - 1) / (expert - 1)
        return Sent(near, sent.fast - near + sent.slow)

    def exchange(self, sent: Sent, exchanges: int, hierarchical: bool = False) -> float:
        """Seconds of `exchanges` in which one rank sends `sent` bytes along expert and node, in all of them together.

        A flat exchange fills fast and slow links side by side, so the longer one counts. The two hops of a hierarchical
        one follow each other.
        """
        node, expert = self.sizes["node"], self.sizes["expert"]
        if self.slice and self.group <= self.near:
            group = parts(parts(self.slice, self.tensor)[1], self.group)[0]
            if not hierarchical:
                return self._across(group, sum(sent), exchanges)
            inside, between = parts(group, expert)
            return self._across(inside, sent.fast, exchanges) + self._across(between, sent.slow, exchanges)
        messages = Sent(expert - 1, node - 1 if hierarchical else (node - 1) * expert).times(exchanges)
        (fast, slow), (fast_messages, slow_messages) = self.by_link(sent), self.by_link(messages)
        h = self.hardware
        across = slow_messages * h.slow.latency + slow / h.slow.bandwidth
        if self.slice:
            inside = parts(parts(self.slice, self.tensor)[1], math.gcd(self.group, self.near))[0]
            near = self._across(inside, fast, exchanges)
        else:
            near = fast_messages * h.fast.latency + fast / h.fast.bandwidth
        return near + across if hierarchical else max(near, across)

    def _across(self, block: Block, sent: float, exchanges: int) -> float:
        """Seconds of exchanges in which every chip of the block sends `sent` bytes to the others."""
        if block.chips == 1:
            return 0.0
        link = self.hardware.fast
        return exchanges * block.hops() * link.latency + block.busiest_link() * sent / link.bandwidth

    def around(self, sent: float, ranks: int, stride: int = 1) -> float:
        """Seconds in which each of `ranks`, every `stride`-th, passes `sent` bytes on to the next, around a ring.

        Between machines a ring leaves each of them once, so it has the share of all its ranks there to itself.
        """
        if ranks == 1:
            return 0.0
        h, inside = self.hardware, max(1, min(ranks, self.machine // stride))
        rate = math.inf
        if inside > 1:
            links = parts(self.slice, stride)[1].ring_links() if self.slice else 1
            rate = h.fast.bandwidth * links
        if ranks > inside:
            rate = min(rate, h.slow.bandwidth * inside)
        return sent / rate

    def all_reduce(self, size: float, ranks: int, stride: int = 1) -> float:
        """Seconds: a sum of `size` bytes, scattered and gathered."""
        return self.around(2 * size * (ranks - 1) / ranks, ranks, stride)


def cluster(sizes: Sizes, hardware: Hardware, topology: Shape | None = None) -> Cluster:
    """Ranks on the machine; on a torus on slices of `topology`, by default one that is nearly square.

    Raises:
      ConfigError: a topology that this machine doesn't have, or that the ranks or their groups don't fill.
    """
    if hardware.torus is None:
        if topology:
            raise ConfigError(f"topology={_x(topology)} is of a TPU, not of {hardware.device_kind}; leave it out")
        return Cluster(hardware, sizes)
    ranks, group = math.prod(sizes.values()), sizes["node"] * sizes["expert"] * sizes.get("tensor", 1)
    shape = topology or hardware.torus.near_cube(math.gcd(ranks, hardware.machine_ranks))
    chips = math.prod(shape)
    if len(shape) > hardware.torus.dimensions or min(shape) < 1:
        raise ConfigError(f"topology={_x(shape)} must have at most {hardware.torus.dimensions} axes, each at least 1")
    if chips > hardware.machine_ranks:
        raise ConfigError(f"topology={_x(shape)} must have at most the {hardware.machine_ranks} chips of a slice")
    if ranks % chips:
        raise ConfigError(f"the {ranks} ranks must be a multiple of the {chips} chips of topology={_x(shape)}")
    whole = hardware.torus.slice(shape)
    inside = math.gcd(group, chips)
    if inside != min(group, chips) or parts(whole, inside)[0].chips != inside:
        names = "mesh.node × mesh.expert" + " × mesh.tensor" * (sizes.get("tensor", 1) > 1)
        raise ConfigError(f"{names} = {group} ranks must make a block of topology={_x(shape)}")
    return Cluster(hardware, sizes, whole)


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))


def physical_group(sizes: Sizes, hardware: Hardware) -> ExpertGroup:
    """The group as its links see it: the machines it stands on, its ranks on each.

    mesh.expert = 32 on machines of 8 is 4 × 8 here. Only a hierarchical exchange depends on what the mesh itself says.
    """
    group = sizes["node"] * sizes["expert"]
    inside = math.gcd(group, max(1, hardware.machine_ranks // sizes.get("tensor", 1)))
    return ExpertGroup((group // inside, inside), hardware.platform, hardware.device_kind)


def mesh_group(sizes: Sizes, hardware: Hardware) -> ExpertGroup:
    """The group as the program sees it."""
    return ExpertGroup((sizes["node"], sizes["expert"]), hardware.platform, hardware.device_kind)


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
        recomputed |= {"experts": (matrices - 1) / matrices, "projections": 0.5 * ("pre_dispatch" in m.latent_norms)}
    done = {
        part: count * (1 + (first * (part != "output") + again * recomputed[part]) / 3) for part, count in flops.items()
    }
    if m.is_moe:
        tokens = counts.tokens_at_a_time(config, ranks)
        exchange = strategy(config, m.capacity_factor, tokens, group)
        done["experts"] *= counts.computed_rows(exchange, tokens, m.choices) / m.choices
    return done


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
    exchange = strategy(config, m.capacity_factor, counts.tokens_at_a_time(config, here.ranks), group)
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


def parameters(config: Config, sizes: Sizes) -> Parameters:
    """As `counts.parameters`, which it calls once for a model on a mesh."""
    mesh = replace(config.mesh, data=1, node=1, expert=1, tensor=1)  # how it is sharded; `sizes` say over what
    return _parameters(config.model, mesh, config.data.sequence_length, tuple(sizes.items()))


@functools.lru_cache(maxsize=256)
def _parameters(model: ModelConfig, mesh: MeshConfig, length: int, sizes: tuple[tuple[str, int], ...]) -> Parameters:
    config = Config(model=model, mesh=mesh, data=DataConfig(tokenizer="", sequence_length=length))
    return counts.parameters(config, dict(sizes))
