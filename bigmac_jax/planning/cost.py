"""What a training step of a config asks of each rank, and its predicted seconds; `planning.job` has the terms.

Nothing here is measured. What is sent is a function of a `Setting`.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.model import counts
from bigmac_jax.model.adapters import is_adapted
from bigmac_jax.model.choose_exchange import choose_exchange
from bigmac_jax.model.counts import Parameters, Sizes, parameters
from bigmac_jax.model.exchange import Gather, Hierarchical, Ragged
from bigmac_jax.model.kernels.flash_attention import attention_implementation
from bigmac_jax.model.memory import host_memory, moment_bytes
from bigmac_jax.model.mesh import AXES, TENSOR, ExpertGroup, axes_of
from bigmac_jax.model.parameters import stacked_spec, state_spec
from bigmac_jax.model.traffic import (
    computed_rows,
    exchange_traffic,
    exchanges_again,
    replica_bytes,
    tensor_bytes,
    tokens_at_a_time,
)
from bigmac_jax.planning.cluster import Cluster, cluster, mesh_group
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape as Torus
from bigmac_jax.planning.job import EXACT_PASSES, UPDATE_BYTES, Job, Times, passes_of, predict
from bigmac_jax.planning.load import EVEN, Load
from bigmac_jax.planning.shapes import Shape
from bigmac_jax.training.optimizer import plan_moves

# On GPU gathers and sums are asynchronous, and the latency-hiding scheduler puts computation beside them. On TPU the
# compiled steps wait for each (docs/planning.md).
HIDE_SUMS = ("gpu",)
NEWTON_SCHULZ_STEPS = 5  # optax.contrib.scale_by_muon's own number


@dataclass(frozen=True)
class Setting:
    """What a term of the cost model depends on: a config on a mesh of a machine."""

    config: Config
    here: Cluster  # how the mesh's ranks lie on the machine
    group: ExpertGroup  # as the program sees it
    count: Parameters


class SharedBytes(NamedTuple):
    """Bytes of the whole model's parameters, or of their gradients, by who shares them."""

    everyone: int  # what all ranks hold
    tensor: int  # what mesh.tensor splits
    experts: int  # what the expert group splits


def step_time(
    config: Config, sizes: Sizes, hardware: Hardware, topology: Torus | None = None, load: Load = EVEN
) -> Times:
    """Predicts the seconds of a training step of `config` on a mesh of `sizes` (ranks by axis).

    Raises:
      ConfigError: as `cluster`.
    """
    return predict(make_job(config, sizes, hardware, topology, load), hardware)


def make_job(config: Config, sizes: Sizes, hardware: Hardware, topology: Torus | None = None, load: Load = EVEN) -> Job:
    """What a step asks of each rank; arguments and errors as for `step_time`."""
    here = cluster(sizes, hardware, topology)
    computed = parameters(replace(config, model=config.step_model), sizes)
    setting = Setting(config, here, mesh_group(sizes, hardware), computed)
    m, execution, chunks = config.model, config.execution, config.execution.overlap_chunks
    # Where experts have room for so many rows, the busiest computes and is sent no more than that.
    padding, imbalance = 1.0, load.over(here.group) if config.dropless else 1.0
    if m.is_moe:
        at_a_time = tokens_at_a_time(config, here.ranks)
        exchange = choose_exchange(config, m.capacity_factor, at_a_time, setting.group)
        padding = computed_rows(exchange, at_a_time, m.choices) / m.choices
    at_host = host_memory(config, here.ranks, setting.count, setting.group.platform)
    if sum(at_host.values()) and not hardware.host_bandwidth:
        raise ConfigError(
            f"execution.remat={execution.remat} and execution.offload_optimizer={execution.offload_optimizer} copy to "
            f"host memory, and the file of {hardware.device_kind} has no host_bandwidth; add it, as in h100.toml"
        )
    return Job(
        Shape.of(config),
        config.data.sequence_length,
        config.data.batch_size * config.data.sequence_length,
        here.ranks,
        dtype=execution.dtype,
        parts=config.train.accumulate_steps,
        tensor=here.tensor,
        experts_over=here.group,
        chunks=chunks if here.group > 1 else 1,
        split_experts=config.mesh.split_experts,
        ours=True,
        causal=attention_implementation(config, hardware.platform) != "xla",
        forward_passes=counts.forward_passes(config),
        to_logits=counts.passes_to_logits(config),
        again=recomputed(config),
        frozen=counts.frozen_parts(config),
        useful=tuple(sum(counts.flops(config, causal).values()) for causal in (False, True)),
        padding=padding,
        imbalance=imbalance,
        updated=setting.count.updated_of_a_rank,
        optimizer_bytes=optimizer_bytes(setting),
        orthogonal=orthogonal_flops(config, sizes),
        accumulated=setting.count.trained_of_a_rank,
        exchange=exchange_seconds(setting, imbalance),
        tensor_sent=tensor_seconds(setting),
        gathers=gather_seconds(setting),
        gradients=gradient_seconds(setting),
        replicas=replica_seconds(setting),
        hidden_exchange=hardware.hidden_share * (chunks - 1) / chunks if hardware.overlaps else 0.0,
        moments=at_host["optimizer"],
        entered=at_host["activations"] * config.train.accumulate_steps,
        hides_sums=hardware.platform in HIDE_SUMS,
    )


def optimizer_bytes(setting: Setting) -> float:
    """Bytes that the optimizer reads and writes for a parameter that it updates: moments and the average in theirs."""
    optimizer, count = setting.config.optimizer, setting.count
    moments = count.moments_of_a_rank / max(1, count.updated_of_a_rank)
    return UPDATE_BYTES + 2 * moments * moment_bytes(setting.config) + 2 * 4 * (optimizer.average_decay > 0)


def orthogonal_flops(config: Config, sizes: Sizes) -> float:
    """FLOPs of a rank that make Muon's updates orthogonal: five steps, each x xᵀ, its square, and that times x, of
    matrices [m, n] with m ≤ n. Ranks share those of an array as far as `plan_moves` can deal them out."""
    if config.optimizer.name != "muon" or config.tuning.lora_rank:  # which leaves matrices of a few columns
        return 0.0
    mesh, found = config.mesh, 0.0
    ranks, sharded = {axis: sizes.get(axis, 1) for axis in AXES}, mesh.replica_optimizer == "sharded"
    for of, shape in counts.declarations(config.step_model, mesh.split_experts, config.data.sequence_length):
        if of.trained and of.hidden_matrix:
            spec = stacked_spec(of, shape, mesh.fsdp, ranks)
            spec = state_spec(of, shape, spec, sharded, ranks, config.execution.offload_optimizer)
            *leading, m, n = *shape[:-2], *sorted(shape[-2:])
            over = [axis for dim in range(len(leading)) for axis in axes_of(spec[dim : dim + 1])]
            over += [move.axis for move in plan_moves(shape, spec, ranks) if move.then is not None]
            dealt = math.prod(leading) / math.prod(ranks[axis] for axis in over)
            found += dealt * NEWTON_SCHULZ_STEPS * 2 * m * m * (2 * n + m)
    return found


def recomputed(config: Config) -> dict[str, float]:
    """The share of each part's forward pass that runs again in the backward pass, for `Job.again`: what gradients need,
    which is not logits; and where what the experts gave is kept, neither that, nor all projections."""
    m = config.model
    if not counts.recomputes(config):
        return {}
    parts = "attention", "mamba", "scores", "passes", "router", "experts", "shared", "projections", "mlp"
    again = dict.fromkeys(parts, 1.0)
    if not exchanges_again(config):
        matrices = 3 if m.gated else 2
        again |= {"experts": (matrices - 1) / matrices, "projections": _recomputed_projections(m)}
    return again


def flops_outside_kernels(config: Config, platform: str) -> float:
    """FLOPs of a step's matrix products, but for those in kernels on TPU and GPU: of experts, whose rows stand as they
    come, and of attention's scores. `hlo_flops` finds as many in the compiled program (docs/hybrid.md).

    They are three forward passes, one more where loads are counted first and one of DPO's reference, and what
    gradients need again; beside what `recomputed` leaves out, that is not the last product of a layer, whose result is
    only added. A chunk of Mamba-2's scan computes both halves of its scores, of which `Shape.scan_flops` counts the one
    that is used. On GPUs the router's products are of several pieces.
    """
    shape, m, again = Shape.of(config), config.model, recomputed(config)
    forward, to_logits = counts.forward_passes(config), counts.passes_to_logits(config)
    frozen = counts.frozen_parts(config)
    found, last = 0.0, dict[str, float]()
    for part, X, Y, times, _ in shape.products():
        if part != "experts":
            in_pieces = part == "router" and platform == "gpu" and config.execution.dtype == "bfloat16"
            pieces = EXACT_PASSES["gpu"] if in_pieces else 1
            found += X * Y * times * pieces * passes_of(part, forward, to_logits, again, frozen)
            last[part] = X * Y if again.get(part) == 1.0 else 0
    if "gate" in m.latent_norms:  # a factor of what is added
        last["projections"] = 0
    for stack in m.trained_stacks:
        found -= len(stack.layers) * sum(last.get(part, 0) for part in _ADDED[stack.blocks[-1]])
    scan = 0.0
    if (b := shape.mamba) is not None:
        both_halves = shape.scan_flops() + b.layers * b.chunk * (b.groups * b.state + b.inner)
        scan = both_halves * passes_of("mamba", forward, to_logits, again)
    return (2 * found + scan) * config.data.batch_size * config.data.sequence_length


# Parts of the branches that a layer may end in, whose last products give what is added.
_ADDED = {"*": ("attention",), "M": ("mamba",), "-": ("mlp",), "E": ("shared", "projections")}


def exchange_seconds(setting: Setting, imbalance: float = 1.0) -> float:
    """Seconds of a step's exchanges when nothing runs beside them; `imbalance` as in `Job`."""
    config, here, group = setting.config, setting.here, setting.group
    m = config.model
    if not m.is_moe or here.group == 1:
        return 0.0
    at_a_time = tokens_at_a_time(config, here.ranks)
    exchange = choose_exchange(config, m.capacity_factor, at_a_time, group)
    traffic = exchange_traffic(config, here.ranks, group)
    payload, metadata = (sent.times(1 / here.ranks) for sent in (traffic.padded, traffic.metadata))
    if isinstance(exchange, Gather):
        # Half are gathers; the sums of the other half are gathers in reverse, or exchanges where rows are too small to
        # be added on the way (model/exchange/wire.py).
        adds_on_the_way = exchange.forward == exchange.backward == "float32"
        around = sum(payload) if adds_on_the_way else sum(payload) / 2
        flat = payload.times(1 - around / sum(payload)).plus(metadata)
        return here.around(around, here.group, here.tensor) + here.exchange(flat, traffic.exchanges)
    even = here.exchange(payload.plus(metadata), traffic.exchanges, isinstance(exchange, Hierarchical))
    if isinstance(exchange, Ragged):
        return imbalance * even
    # Buffers are as large whatever the routing is. What they have no room for takes further rounds, each as long as the
    # first; the backward pass goes through their forward pass again.
    rounds = min(exchange.most_rounds(at_a_time, m.choices), math.ceil(round(imbalance / exchange.buffer_factor, 6)))
    forward = counts.forward_passes(config) + exchanges_again(config)
    return even * (1 + max(0, rounds - 1) * (1 + 1 / (1 + forward)))


def tensor_seconds(setting: Setting) -> float:
    """Seconds of gathers and scatters over mesh.tensor."""
    here = setting.here
    return here.around(tensor_bytes(setting.config, here.sizes, setting.group), here.tensor)


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


def replica_seconds(setting: Setting) -> float:
    """Seconds of a step in which replicas sum their gradients; each rank sums those of its shard."""
    here = setting.here
    return here.around(replica_bytes(setting.config, here.sizes), here.replicas, here.inside)


def sum_seconds(setting: Setting, size: SharedBytes) -> float:
    """Seconds of an all-reduce of `size` over the ranks of a replica that share each part of it."""
    here, t = setting.here, setting.here.tensor
    experts = here.all_reduce(size.experts / here.group / t, here.sizes["data"], here.group * t)
    if not setting.config.mesh.split_experts:  # then the tensor ranks, too, hold all of a group's
        # First over them, which are neighbours, then each its part over the replicas.
        experts += here.all_reduce(size.experts / here.group, t)
    return here.all_reduce(size.everyone, here.inside) + here.all_reduce(size.tensor / t, here.inside // t, t) + experts


def _recomputed_projections(m: ModelConfig) -> float:
    """The share of the projections' forward pass that gradients need again where what the experts gave is kept: x W↓ if
    a norm stands on it or on a sum that it is part of, and both factors of a gated output."""
    sizes, gate = counts.projections(m), "gate" in m.latent_norms
    needed = {"down": bool({"pre_dispatch", "skip"} & set(m.latent_norms)), "up": gate, "gate": gate}
    return sum(size for name, size in sizes.items() if needed[name]) / max(1, sum(sizes.values()))


def gradient_bytes(config: Config, count: Parameters) -> SharedBytes:
    """Bytes of the gradients that are summed over ranks for one batch, in execution.reduce_dtype."""
    size = 2 if config.execution.reduce_dtype == "bfloat16" else 4
    numbers = _adapted_numbers(config) if config.tuning.lora_rank else _shared_numbers(config, count)
    return SharedBytes(*(size * each for each in numbers))


def parameter_bytes(config: Config, count: Parameters) -> SharedBytes:
    """Bytes of the parameters that mesh.fsdp gathers, in execution.gather_dtype; norms are never sharded."""
    size = 2 if "bfloat16" in (config.execution.gather_dtype, config.execution.dtype) else 4
    everyone, tensor, experts = _shared_numbers(config, count)
    return SharedBytes(size * (everyone - count.parts.get("norms", 0)), size * tensor, size * experts)


def _shared_numbers(config: Config, count: Parameters) -> tuple[int, int, int]:
    """Parameters that all ranks share, that mesh.tensor splits, of the experts. A table of tokens that is read and
    written with counts twice, as its gradient is summed once for each."""
    m, experts = config.step_model, count.parts.get("experts", 0)
    split = _split_numbers(m, config.data.sequence_length)
    twice = m.vocab_size * m.hidden_size if m.tie_embeddings else 0
    return count.computed - experts - split, split + twice, experts


def _adapted_numbers(config: Config) -> tuple[int, int, int]:
    """As `_shared_numbers`, of the matrices that have adapters: a matrix's gradient is summed in full, and its
    adapters' are made of it."""
    found = [0, 0, 0]
    for of, shape in counts.declarations(config.step_model, False, config.data.sequence_length):
        if is_adapted(of, config.tuning.lora_targets):
            found[2 if of.part == "experts" else 1 if TENSOR in of.split else 0] += math.prod(shape)
    everyone, tensor, experts = found
    return everyone, tensor, experts


@functools.lru_cache(maxsize=64)
def _split_numbers(m: ModelConfig, length: int) -> int:
    """Parameters that declare `tensor`, but for experts."""
    return sum(math.prod(shape) for of, shape in counts.declarations(m, False, length) if TENSOR in of.split)
