"""AdamW and Muon from Optax, learning rate schedules, and the average of the parameters.

Y layers, e experts of a rank; a matrix is X × Z.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.config.resuming import RATES_MAY_CHANGE
from bigmac_jax.config.section import flat_values
from bigmac_jax.model.mesh import AXES, INSIDE, axes_of, names, spec_of
from bigmac_jax.model.parameters import Declaration, map_declared

# An orthogonal matrix times this × √(the longer side) has entries as large as AdamW's updates, so that one learning
# rate does for both (Liu et al., arXiv 2502.16982, equation 4).
_MUON_RMS = 0.2


def learning_rate(config: Config) -> optax.Schedule:
    """The learning rate by steps done: learning_rate / (warmup_steps + 1) at first, learning_rate after the warm-up,
    then by optimizer.schedule down to final_learning_rate, which it keeps.

    cosine and linear decay for decay_steps from the end of the warm-up; wsd is constant, and decays linearly in the
    last decay_steps of train.steps.
    """
    optimizer, steps = config.optimizer, config.train.steps
    peak, final, warmup = optimizer.learning_rate, optimizer.final_learning_rate, optimizer.warmup_steps
    first = peak / (warmup + 1)  # a first step at 0 would be lost
    begins, decay = warmup, optimizer.decay_steps or max(1, steps - warmup)
    if optimizer.schedule == "cosine" and peak:
        return optax.schedules.warmup_cosine_decay_schedule(first, peak, warmup, warmup + decay, final)
    if optimizer.schedule == "wsd":
        begins = max(warmup, steps - (optimizer.decay_steps or max(1, steps // 5)))
        decay = max(1, steps - begins)
    warm, stay = optax.linear_schedule(first, peak, warmup), optax.constant_schedule(peak)
    fall = stay if optimizer.schedule == "constant" else optax.linear_schedule(peak, final, decay)
    if optimizer.schedule == "cosine":  # from 0, which Optax' takes for a decay without an end
        rest = optax.cosine_decay_schedule(final, decay)
        fall = lambda step: final - rest(step)  # noqa: E731
    return optax.join_schedules([warm, stay, fall], [warmup, begins])


def optimizer_notes(before: Config, after: Config, step: int) -> list[str]:
    """A line if a run goes on after `step` steps with other rates, weight decay or clipping than it had."""
    old, new = flat_values(before), flat_values(after)
    names = (*RATES_MAY_CHANGE, "optimizer.clip_norm")
    changed = [f"{name} {old[name]} → {new[name]}" for name in names if old[name] != new[name]]
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], ("one",))):  # one process alone asks
        was, now = (float(learning_rate(config)(step)) for config in (before, after))
    if was != now and before.train.steps != after.train.steps:
        changed.append(f"train.steps {before.train.steps} → {after.train.steps}")
    rate = f"has the learning rate {now:.3g}" + (f", not {was:.3g}" if was != now else " as before")
    return [f"{', '.join(changed)}: step {step + 1} {rate}"] if changed else []


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Builds the update rule: clip, AdamW or Muon, weight decay, learning rate, frozen parameters.

    The rate is given to each update as `rate`, so that a program knows neither the schedule nor its length; the norm of
    all gradients as `norm`, so that some parameters can be updated before others.
    """
    optimizer = config.optimizer
    scaled = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
    if optimizer.name == "muon":
        scaled = optax.partition({"muon": muon(optimizer.momentum), "adam": scaled}, _muon_labels)
    rule = optax.chain(
        _store_moments(scaled, optimizer.moment_dtype),
        optax.add_decayed_weights(optimizer.weight_decay, _decay_mask),
        _scale_by_rate(),
    )
    if config.projection_rate != 1:
        rule = optax.chain(rule, _scale_projections(config.projection_rate))
    if optimizer.clip_norm:
        rule = optax.chain(_clip(optimizer.clip_norm), rule)
    if config.tuning.train_router:
        return optax.with_extra_args_support(rule)
    return optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, _router_labels)  # nor does it decay


def _clip(longest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` with a norm that is given; without one, of what is updated."""

    def update(updates: Any, state: Any, params: Any = None, *, norm: Array | None = None, **_: Any) -> tuple[Any, Any]:
        length = optax.tree.norm(updates) if norm is None else norm
        kept = length < longest
        return jax.tree.map(lambda u: jnp.where(kept, u, (u / length.astype(u.dtype)) * longest), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Takes a step of the size `rate` downhill; its state counts steps, as that of `optax.scale_by_schedule`."""

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, rate: Array, **_: Any) -> tuple[Any, Any]:
        scaled = jax.tree.map(lambda u: jnp.array(-rate, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_projections(rate: float) -> optax.GradientTransformation:
    """Scales the updates of W↓ and W↑, decay included: every token's gradient is theirs, so that they would turn over
    while the experts behind them see a few tokens each."""
    return optax.stateless(lambda updates, _: map_declared(lambda of, u: rate * u if of.slow else u, updates))


def _decay_mask(params: Any) -> Any:
    return map_declared(lambda declaration, _: declaration.decays, params)


def _router_labels(params: Any) -> Any:
    return map_declared(lambda declaration, _: "frozen" if declaration.part == "router" else "trained", params)


def _muon_labels(params: Any) -> Any:
    return map_declared(lambda declaration, _: "muon" if declaration.hidden_matrix else "adam", params)


class Momentum(NamedTuple):
    """The state of Muon: steps done, and a momentum sharded as each parameter."""

    steps: Array
    mu: Any


def muon(momentum: float) -> optax.GradientTransformation:
    """Muon for matrices [Y, X, Z] or [Y, e, X, Z]: Nesterov momentum, made orthogonal (Jordan et al., 2024).

    It calls the Newton-Schulz iteration of `optax.contrib.scale_by_muon`, which takes no matrix whose rows or columns
    are split between ranks, and would have every rank compute all.
    """

    def init(params: Any) -> Momentum:
        return Momentum(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: Momentum, params: Any = None) -> tuple[Any, Momentum]:
        mu, count = optax.tree.update_moment(updates, state.mu, momentum, 1), state.steps + 1
        ahead = optax.tree.bias_correction(mu, momentum, count + 1)
        now = optax.tree.bias_correction(updates, momentum, count)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        return map_declared(_orthogonalize, nesterov), Momentum(count, mu)

    return optax.GradientTransformation(init, update)


class Move(NamedTuple):
    """An exchange over one mesh axis, from splitting the dimension `before` to splitting `then`; None is a copy on each
    rank."""

    axis: str
    before: int | None
    then: int | None


def _orthogonalize(of: Declaration, matrices: Array) -> Array:
    """Makes matrices orthogonal, with the entries' size of AdamW's updates, dealt out so that no two ranks compute the
    same one, as far as they divide. Zeros behind a matrix stay zeros."""
    scale = _MUON_RMS * math.sqrt(max(of.unpadded(matrices.shape)[-2:]))
    mesh, spec = jax.sharding.get_abstract_mesh(), spec_of(matrices)
    if mesh.empty:
        return scale * _newton_schulz(matrices)
    moves = plan_moves(matrices.shape, spec, mesh.shape)

    def on_rank(shard: Array) -> Array:
        for axis, before, then in moves:
            shard = _move(shard, axis, before, then)
        shard = _newton_schulz(shard)
        for axis, before, then in reversed(moves):
            shard = _move(shard, axis, then, before)
        return shard

    # Unchecked: that all ranks of an axis gather the same is not in an array's type.
    whole = jax.shard_map(on_rank, in_specs=spec, out_specs=spec, axis_names=set(AXES), check_vma=False)
    return scale * whole(matrices)


def plan_moves(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> list[Move]:
    """Plans exchanges that give each rank whole matrices of an array [Y, X, Z] or [Y, e, X, Z] sharded by `spec`."""
    entries = [names(entry) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    leading = range(len(shape) - 2)
    left = [shape[dim] // math.prod(sizes[axis] for axis in entries[dim]) for dim in leading]
    # Of axes that split one dimension the last goes first: the parts that it joins are neighbours.
    split = [(axis, dim) for dim in range(len(shape))[-2:] for axis in reversed(entries[dim])]
    copies = [(axis, None) for axis in INSIDE if axis not in axes_of(spec)]  # each replica computes all
    moves = []
    for axis, before in [*split, *copies]:
        then = next((dim for dim in leading if left[dim] % sizes[axis] == 0), None)
        if then is not None:
            left[then] //= sizes[axis]
        if sizes[axis] > 1 and (before, then) != (None, None):
            moves.append(Move(axis, before, then))
    return moves


def _move(shard: Array, axis: str, before: int | None, then: int | None) -> Array:
    """Moves an array's split over `axis` from one dimension to another."""
    if before is not None and then is not None:
        return jax.lax.all_to_all(shard, axis, split_axis=then, concat_axis=before, tiled=True)
    if before is not None:
        return jax.lax.all_gather(shard, axis, axis=before, tiled=True)
    assert then is not None
    size = shard.shape[then] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(shard, jax.lax.axis_index(axis) * size, size, axis=then)


def _newton_schulz(matrices: Array) -> Array:
    """Makes matrices orthogonal on one rank."""
    X, Z = matrices.shape[-2:]
    one = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )
    flat = matrices.reshape(-1, X, Z)
    orthogonal, _ = one.update(flat, one.init(flat))
    return orthogonal.reshape(matrices.shape)


def _store_moments(transformation: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Keeps the moments in `dtype`, and computes in float32."""
    if dtype == "float32":
        return transformation

    def cast(tree: Any, dtype: str) -> Any:
        return jax.tree.map(lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transformation.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(transformation.init(params), dtype), update)


def update_average(config: Config, average: Any, params: Any, steps: Array) -> Any:
    """Adds `params` to the exponential average of the parameters after `steps` steps.

    Its weights d^(t-i) sum to one at every t (Adam's correction of the first steps), so that it never holds what the
    parameters started as.
    """
    decay = config.optimizer.average_decay
    share = (1 - decay) / (1 - decay ** steps.astype(jnp.float32))
    return jax.tree.map(lambda before, now: before + share * (now - before), average, params)
