"""The training step: one jitted function from state and batch to state and metrics.

B batch, L length, Y layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from bigmac_jax.config import Config
from bigmac_jax.data.batch import Batch
from bigmac_jax.model.adapters import attached, make_adapters, merged
from bigmac_jax.model.balance import update_bias
from bigmac_jax.model.mesh import batch_spec, placed, platform
from bigmac_jax.model.parameters import map_declared
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.runtime import environment
from bigmac_jax.training.accumulation import accumulate
from bigmac_jax.training.distillation import distilled_loss
from bigmac_jax.training.dpo import dpo_loss
from bigmac_jax.training.loss import LossParts, Share, loss_fn, token_nll
from bigmac_jax.training.optimizer import averaged, learning_rate, make_optimizer

RECENT_LOSSES = 32  # whose median a spike is measured by


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes. `rest` holds what no gradient updates: the router's balance biases."""

    step: Array  # int32, steps done
    params: nnx.State
    rest: nnx.State
    opt_state: Any
    # Of the last good steps, oldest first, inf where there was none yet; None without train.spike_factor.
    losses: Array | None = None
    average: nnx.State | None = None  # of params over the steps; None without optimizer.average_decay
    base: nnx.State | None = None  # the model's own parameters, where params are its adapters; no step moves it
    teacher: Transformer | None = None  # whom the model learns from (tuning.teacher); no step moves it


class StepMetrics(NamedTuple):
    """Device scalars of one step, read one step later."""

    loss: Array
    parts: LossParts
    grad_norm: Array
    learning_rate: Array
    bad: Array  # bool: the loss or the gradient is not finite, or the loss is a spike


class Trainer(NamedTuple):
    """The compiled pieces of a run. `graphdef` and a state's params and rest make a model again."""

    graphdef: Any
    init: Callable[[Array], TrainState]
    begin: Any  # jitted: (params, rest of a model, key) → the state of a run that begins with it; both are donated
    step: Any  # jitted: (state, Batch) → (state, StepMetrics); the state is donated
    gradient: Any  # of a step, to be traced: (state, Batch) → ((loss, LossParts), gradients as params)
    abstract_state: TrainState  # shapes and shardings, of what a step is given
    config: Config

    def model(self, state: TrainState) -> Transformer:
        """What is evaluated: with the average of the parameters, if there is one."""
        return whole_model(self.config, self.graphdef, evaluated(state), state)

    def plain_model(self, state: TrainState) -> Transformer:
        """The same without adapters: what they add is added to the parameters, a copy of which this is then."""
        model = self.model(state)
        return model if state.base is None else plain(model)


@jax.jit
def plain(model: Transformer) -> Transformer:
    """A model with its adapters merged."""
    graphdef, params, rest = split(model)
    return nnx.merge(graphdef, merged(params), rest)


def whole_model(
    config: Config, graphdef: Any, params: nnx.State, state: TrainState, dropout_key: Array | None = None
) -> Transformer:
    """The model of a state with other `params`, which are its own or its adapters'."""
    if not config.tuning.train_router:
        params = map_declared(lambda of, w: jax.lax.stop_gradient(w) if of.part == "router" else w, params)
    if state.base is not None:
        params = attached(config, state.base, params, dropout_key)
    return nnx.merge(graphdef, params, state.rest)


def evaluated(state: TrainState) -> nnx.State:
    """The parameters that a run is judged by."""
    return state.params if state.average is None else state.average


def split(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """(graphdef, parameters, the rest): `nnx.merge` of the three is the model again."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, params, rest[0]


def _unless(bad: Array, new: Any, old: Any) -> Any:
    """`old` after a bad step, but for the count of the learning rate's schedule, which goes by steps."""

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(bad, old, new)

    return jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def make_trainer(config: Config, mesh: Mesh, teacher: Config | None = None) -> Trainer:
    """Builds the jitted initialisation and training step for the current mesh.

    Args:
      teacher: the config of tuning.teacher, if there is one.
    """
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    preferred = config.tuning.objective == "dpo"
    spike_factor, execution = config.train.spike_factor, config.execution

    def init(key: Array) -> TrainState:
        return begin(*split(init_model(config, key))[1:], key)

    def begin(params: nnx.State, rest: nnx.State, key: Array) -> TrainState:
        base = None
        if config.tuning.lora_rank:
            base, params = params, make_adapters(config, params, key)
        losses = jnp.full(RECENT_LOSSES, jnp.inf) if spike_factor else None
        # A copy, or both would be one buffer that is donated twice.
        average = jax.tree.map(jnp.copy, params) if config.optimizer.average_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params), losses, average, base)

    def gradient(state: TrainState, batch: Batch) -> tuple[tuple[Array, LossParts], nnx.State]:
        dropout_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        return accumulate(config, functools.partial(loss_of_params, state), state.params, batch, dropout_key)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (loss, parts), grads = gradient(state, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        rest = state.rest
        if config.model.is_moe and config.model.has_router_bias:
            aux = parts.aux
            rest = jax.tree.map(lambda bias_YE: update_bias(config, bias_YE, aux.load, aux.quantile_stats), rest)
            parts = parts._replace(aux=aux._replace(quantile_stats=aux.load[:, :0]))  # large, and not used again
        grad_norm, losses, average = optax.tree.norm(grads), state.losses, state.average
        if average is not None:
            average = averaged(config, average, params, state.step + 1)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        if losses is not None:
            bad |= loss > spike_factor * jnp.sort(losses)[RECENT_LOSSES // 2]
            losses = jnp.where(bad, losses, jnp.append(losses[1:], loss))
        if config.train.on_bad_step == "skip":
            before = (state.params, state.rest, state.opt_state, state.average)
            params, rest, opt_state, average = _unless(bad, (params, rest, opt_state, average), before)
        metrics = StepMetrics(loss, parts, grad_norm, jnp.asarray(schedule(state.step)), bad)
        return TrainState(state.step + 1, params, rest, opt_state, losses, average, state.base, state.teacher), metrics

    def loss_of_params(
        state: TrainState, params: nnx.State, batch: Batch, key: Array, share: Share
    ) -> tuple[Array, LossParts]:
        model = whole_model(config, graphdef, params, state, key)
        if state.teacher is not None:
            return distilled_loss(model, state.teacher, batch, key, share)
        if not preferred:
            return loss_fn(model, batch, key, share)
        if state.base is not None:  # the model without its adapters is the reference
            reference_BL, _ = token_nll(nnx.merge(graphdef, state.base, state.rest), batch)
            batch = batch._replace(reference_BL=jax.sharding.reshard(reference_BL, batch_spec(2)))
        return dpo_loss(model, batch, key, share)

    # No array is made here: the mesh may be of devices that are only compiled for.
    graphdef, _, _ = split(jax.eval_shape(lambda: init_model(config, jax.random.key(0))))
    begun = placed(jax.eval_shape(lambda: init(jax.random.key(0))), mesh)
    abstract = begun
    if teacher is not None:
        of_teacher = jax.eval_shape(lambda: init_model(teacher, jax.random.key(0)))
        abstract = dataclasses.replace(begun, teacher=placed(of_teacher, mesh))
    begun_shardings, state_shardings = (jax.tree.map(lambda leaf: leaf.sharding, of) for of in (begun, abstract))
    batch_sharding = jax.sharding.NamedSharding(mesh, batch_spec(2))
    unoptimised = {"xla_backend_optimization_level": 0} if platform() == "cpu" else None
    return Trainer(
        graphdef,
        # Compiled for a single run: XLA:CPU's optimisations would take three times as long as it does without them.
        jax.jit(init, out_shardings=begun_shardings, compiler_options=unoptimised),
        jax.jit(begin, out_shardings=begun_shardings, compiler_options=unoptimised, donate_argnums=(0, 1)),
        jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=(state_shardings, None),
            compiler_options=environment.compiler_options(
                mesh.devices.flat[0], execution.overlap_chunks > 1, execution.exchange == "ragged"
            ),
        ),
        gradient,
        abstract,
        config,
    )
