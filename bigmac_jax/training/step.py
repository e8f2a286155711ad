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
from bigmac_jax.config.compiler_options import parse_options
from bigmac_jax.data.batch import Batch
from bigmac_jax.model.adapters import attached, make_adapters, merged
from bigmac_jax.model.balance import update_bias
from bigmac_jax.model.mesh import batch_spec, current_group, placed, platform, replicated_spec
from bigmac_jax.model.moe import RouterBias
from bigmac_jax.model.parameters import leaf_name, map_declared
from bigmac_jax.model.traffic import sends_ragged
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.runtime import environment
from bigmac_jax.training.accumulation import accumulate
from bigmac_jax.training.choices import choices_at
from bigmac_jax.training.distillation import distilled_loss
from bigmac_jax.training.dpo import dpo_loss
from bigmac_jax.training.loss import LossParts, LossTerms, Share, loss_fn, token_nll
from bigmac_jax.training.offload import check_offload, in_host_memory, update_by_layers
from bigmac_jax.training.optimizer import learning_rate, make_optimizer, update_average
from bigmac_jax.training.replicas import gather_shards, split_replicas, sum_gradients, take_shards

RECENT_LOSSES = 32  # a spike is measured by the 17th smallest, nearly their median


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes. `rest` holds what no gradient updates: the router's balance biases, and frozen parts."""

    step: Array  # int32, steps done
    params: nnx.State
    rest: nnx.State
    opt_state: Any
    # Of the last good steps, oldest first, inf where there was none yet; None without train.spike_factor.
    losses: Array | None = None
    average: nnx.State | None = None  # of params over the steps; None without optimizer.average_decay
    base: nnx.State | None = None  # the model's own parameters, where params are its adapters; no step changes it
    teacher: Transformer | None = None  # the model that is learned from (tuning.teacher); no step changes it


class StepMetrics(NamedTuple):
    """Device scalars of one step, read one step later."""

    loss: Array
    parts: LossParts
    grad_norm: Array
    learning_rate: Array
    bad: Array  # bool: the loss or the gradient is not finite, or the loss is a spike
    choices: Array | None = None  # experts that a token was sent to; None without train.choices_from


class Trainer(NamedTuple):
    """The compiled pieces of a run. `graphdef` and a state's params and rest make a model again."""

    graphdef: Any
    init: Callable[[Array], TrainState]
    begin: Any  # jitted: (params, rest of a model, key) → the state of a run that begins with it; both are donated
    step: Any  # jitted: (state, Batch, learning rate) → (state, StepMetrics); the state is donated
    rate: Any  # jitted, a program of its own: steps done → the learning rate, on every device
    gradient: Any  # of a step, to be traced: (state, Batch) → ((loss, LossParts), gradients as the optimizer's state)
    abstract_state: TrainState  # shapes and shardings that a step takes
    config: Config

    def model(self, state: TrainState) -> Transformer:
        """The model that is evaluated: with the average of the parameters, if there is one."""
        return build_model(self.config, self.graphdef, evaluated_params(state), state)

    def plain_model(self, state: TrainState) -> Transformer:
        """The model that is evaluated, without adapters: a copy of the parameters to which these are added."""
        model = self.model(state)
        return model if state.base is None else merge_adapters(model)


@jax.jit
def merge_adapters(model: Transformer) -> Transformer:
    """Adds a model's adapters to its parameters."""
    graphdef, params, rest = split_model(model)
    return nnx.merge(graphdef, merged(params), rest)


def build_model(
    config: Config, graphdef: Any, params: nnx.State, state: TrainState, dropout_key: Array | None = None
) -> Transformer:
    """The model with `params` for what is trained, and the rest from the state. Of a run with adapters `params` are
    theirs, and the model's own are `state.base`."""
    if not config.tuning.train_router:
        params = map_declared(lambda of, w: jax.lax.stop_gradient(w) if of.part == "router" else w, params)
    if state.base is not None:
        params = attached(config, state.base, params, dropout_key)
    return nnx.merge(graphdef, params, state.rest)


def evaluated_params(state: TrainState) -> nnx.State:
    """The parameters that a run is judged by."""
    return state.params if state.average is None else state.average


def split_model(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """(graphdef, parameters, the rest): `nnx.merge` of the three is the model again."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, params, rest[0]


class _Programs:
    """The functions of a run that `make_trainer` jits."""

    def __init__(self, config: Config):
        self.config, self.optimizer = config, make_optimizer(config)
        self.graphdef = split_model(jax.eval_shape(lambda: init_model(config, jax.random.key(0))))[0]

    def init(self, key: Array) -> TrainState:
        return self.begin(*split_model(init_model(self.config, key))[1:], key)

    def begin(self, params: nnx.State, rest: nnx.State, key: Array) -> TrainState:
        config, base = self.config, None
        if config.tuning.lora_rank:
            base, params = params, make_adapters(config, params, key)
        losses = jnp.full(RECENT_LOSSES, jnp.inf) if config.train.spike_factor else None
        # A copy, or both would be one buffer that is donated twice.
        average = jax.tree.map(jnp.copy, params) if config.optimizer.average_decay else None
        opt_state = self.optimizer.init(take_shards(config, params))
        return TrainState(jnp.zeros((), jnp.int32), params, rest, opt_state, losses, average, base)

    def loss(
        self, state: TrainState, params: nnx.State, batch: Batch, key: Array, share: Share
    ) -> tuple[Array, LossTerms]:
        model = build_model(self.config, self.graphdef, params, state, key)
        share = share._replace(choices=choices_at(self.config, state.step))
        if state.teacher is not None:
            return distilled_loss(model, state.teacher, batch, key, share)
        if self.config.tuning.objective != "dpo":
            return loss_fn(model, batch, key, share)
        if state.base is not None:  # the model without its adapters is the reference
            reference_BL, _ = token_nll(nnx.merge(self.graphdef, state.base, state.rest), batch)
            batch = batch._replace(reference_BL=jax.sharding.reshard(reference_BL, batch_spec(2)))
        return dpo_loss(model, batch, key, share)

    def gradient(self, state: TrainState, batch: Batch) -> tuple[tuple[Array, LossParts], nnx.State]:
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        own = split_replicas(state.params)
        found, gradients = accumulate(self.config, functools.partial(self.loss, state), own, batch, key)
        return found, sum_gradients(self.config, gradients)

    def step(self, state: TrainState, batch: Batch, rate: Array) -> tuple[TrainState, StepMetrics]:
        (loss, parts), gradients = self.gradient(state, batch)  # summed over the parts of the batch
        grad_norm = optax.tree.norm(gradients)
        bad, losses = self._judge(loss, grad_norm, state.losses)
        skips = self.config.train.on_bad_step == "skip"

        def update(gradients: Any, opt_state: Any, shards: Any) -> tuple[Any, Any]:
            updates, after = self.optimizer.update(gradients, opt_state, shards, rate=rate, norm=grad_norm)
            after = optax.apply_updates(shards, updates), after
            return _unless(bad, after, (shards, opt_state)) if skips else after

        with jax.named_scope("optimizer"):  # which clips, too
            shards = take_shards(self.config, state.params)
            if self.config.execution.offload_optimizer:
                params, opt_state = update_by_layers(update, gradients, state.opt_state, shards)
            else:
                params, opt_state = update(gradients, state.opt_state, shards)
            params = gather_shards(params, state.params)
        average = state.average
        if average is not None:
            average = update_average(self.config, average, params, state.step + 1)
        rest, parts = self._balance(state.rest, parts)
        if skips:
            rest, average = _unless(bad, (rest, average), (state.rest, state.average))
        after = TrainState(state.step + 1, params, rest, opt_state, losses, average, state.base, state.teacher)
        return after, StepMetrics(loss, parts, grad_norm, rate, bad, choices_at(self.config, state.step))

    def _judge(self, loss: Array, grad_norm: Array, losses: Array | None) -> tuple[Array, Array | None]:
        """Whether a step is bad, and the recent losses after it."""
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        if losses is None:
            return bad, None
        bad |= loss > self.config.train.spike_factor * jnp.sort(losses)[RECENT_LOSSES // 2]
        return bad, jnp.where(bad, losses, jnp.append(losses[1:], loss))

    def _balance(self, rest: nnx.State, parts: LossParts) -> tuple[nnx.State, LossParts]:
        """Moves the router's biases by the loads of the step."""
        config, aux = self.config, parts.aux
        if not (config.model.is_moe and config.model.has_router_bias):
            return rest, parts

        experts = {stack.name: stack.experts for stack in config.model.trained_stacks}

        def update(path: Any, variable: nnx.Variable) -> nnx.Variable:
            layers = experts.get(leaf_name(path).partition(".")[0], range(0))
            # Of next-token modules that are not trained there is no load.
            if not isinstance(variable, RouterBias) or layers.stop > len(aux.load):
                return variable
            load, stats = (v[layers.start : layers.stop : layers.step] for v in (aux.load, aux.quantile_stats))
            return jax.tree.map(lambda bias_YE: update_bias(config, bias_YE, load, stats), variable)

        rest = jax.tree.map_with_path(update, rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return rest, parts._replace(aux=aux._replace(quantile_stats=aux.load[:, :0]))  # large, and read here alone


def _unless(bad: Array, new: Any, old: Any) -> Any:
    """`new`, or `old` after a bad step; the count of the learning rate's schedule is always new: it goes by steps."""

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(bad, old, new)

    return jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def make_trainer(config: Config, mesh: Mesh, teacher: Config | None = None) -> Trainer:
    """Builds the jitted initialisation and training step for the current mesh.

    Args:
      teacher: the config of tuning.teacher, if there is one.
    """
    check_offload(config, mesh)
    # No array is made here: the mesh may be of devices that are only compiled for.
    programs, execution = _Programs(config), config.execution
    begun = placed(jax.eval_shape(lambda: programs.init(jax.random.key(0))), mesh)
    if execution.offload_optimizer:
        begun = dataclasses.replace(begun, opt_state=in_host_memory(begun.opt_state))
    abstract = begun
    if teacher is not None:
        of_teacher = jax.eval_shape(lambda: init_model(teacher, jax.random.key(0)))
        abstract = dataclasses.replace(begun, teacher=placed(of_teacher, mesh))
    begun_shardings, state_shardings = (jax.tree.map(lambda leaf: leaf.sharding, of) for of in (begun, abstract))
    # Compiled for a single run: XLA:CPU's optimisations would take three times as long as it does without them.
    once = {"out_shardings": begun_shardings}
    if platform() == "cpu":
        once["compiler_options"] = {"xla_backend_optimization_level": 0}
    everywhere = jax.sharding.NamedSharding(mesh, replicated_spec(0))
    step = jax.jit(
        programs.step,
        donate_argnums=0,
        in_shardings=(state_shardings, jax.sharding.NamedSharding(mesh, batch_spec(2)), everywhere),
        out_shardings=(state_shardings, None),
        compiler_options=environment.compiler_options(
            mesh.devices.flat[0],
            overlap=execution.overlap_chunks > 1,
            ragged=sends_ragged(config, mesh.size, current_group())
            or (teacher is not None and sends_ragged(teacher, mesh.size, current_group(), teaches=True)),
            offload=execution.offload_optimizer,
            given=parse_options(execution.compiler_options),
        ),
    )
    init, begin = jax.jit(programs.init, **once), jax.jit(programs.begin, donate_argnums=(0, 1), **once)
    schedule = learning_rate(config)
    rate = jax.jit(lambda done: jnp.asarray(schedule(done), jnp.float32), out_shardings=everywhere)
    return Trainer(programs.graphdef, init, begin, step, rate, programs.gradient, abstract, config)
