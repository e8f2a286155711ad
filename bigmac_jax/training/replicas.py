"""Replicas: slices or racks that hold the parameters each, with slow links between (mesh.replica).

Inside a replica gradients are summed where they arise, layer by layer and part by part. Across, they are summed once a
step, by then shards: each replica has parameters of its own until its gradients are known, so that no rank adds those
of another replica before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.model.balance import QUANTILE_SUMS
from bigmac_jax.model.mesh import AXES, REPLICA, names, replicas, spec_of
from bigmac_jax.model.parameters import Declaration, map_declared, shard_spec, state_spec


def split_replicas(params: Any) -> Any:
    """Gives each replica parameters of its own, for now all the same: along a dimension before those that are declared
    (`parameters.weight`). Nothing is copied or sent."""
    if replicas() == 1:
        return params

    def split(of: Declaration, w: Array) -> Array:
        layers, entries = w.ndim - len(of.dims), [*spec_of(w)]
        shape = (*w.shape[:layers], replicas(), *w.shape[layers:])
        spec = P(*entries[:layers], REPLICA, *entries[layers:])
        return jnp.broadcast_to(jnp.expand_dims(w, layers), shape, out_sharding=spec)

    return map_declared(split, params)


def sum_gradients(config: Config, gradients: Any) -> Any:
    """Sums the replicas' gradients, in execution.reduce_dtype; they come to stand as the optimizer's state does."""
    if replicas() == 1:
        return gradients
    sizes = jax.sharding.get_abstract_mesh().shape

    def add(of: Declaration, dw: Array) -> Array:
        layers, entries = dw.ndim - 1 - len(of.dims), [*spec_of(dw)]
        shape, spec = (*dw.shape[:layers], *dw.shape[layers + 1 :]), P(*entries[:layers], *entries[layers + 1 :])
        shards, after = shard_spec(of, shape, spec, config.mesh.fsdp, sizes), _state_spec(config, of, shape, spec)
        scattered = next((dim for dim, entry in enumerate(after) if REPLICA in names(entry)), None)

        def on_rank(dw: Array) -> Array:
            dw = dw.squeeze(layers).astype(config.execution.reduce_dtype)
            if scattered is None:
                dw = jax.lax.psum(dw, REPLICA)
            else:
                dw = jax.lax.psum_scatter(dw, REPLICA, scatter_dimension=scattered, tiled=True)
            return dw.astype(jnp.float32)

        own = P(*shards[:layers], REPLICA, *shards[layers:])
        summed = jax.shard_map(
            on_rank, in_specs=own, out_specs=shards if scattered is None else after, axis_names=set(AXES)
        )(jax.sharding.reshard(dw, own))
        return jax.sharding.reshard(summed, after)

    return map_declared(add, gradients)


def take_shards(config: Config, params: Any) -> Any:
    """The parameters that a rank's optimizer updates: with mesh.replica_optimizer=sharded its replica's share."""
    return map_declared(lambda of, w: jax.sharding.reshard(w, _state_spec(config, of, w.shape, spec_of(w))), params)


def gather_shards(updated: Any, params: Any) -> Any:
    """Gathers parameters that were updated from the replicas, to stand as `params` do."""
    return jax.tree.map(lambda new, old: jax.sharding.reshard(new, spec_of(old)), updated, params)


def _state_spec(config: Config, of: Declaration, shape: tuple[int, ...], spec: P) -> P:
    sharded = config.mesh.replica_optimizer == "sharded"
    sizes, by_layers = jax.sharding.get_abstract_mesh().shape, config.execution.offload_optimizer
    return state_spec(of, shape, spec, sharded, sizes, by_layers)


def describe_crossing(config: Config, data: int, slices: int) -> list[str]:
    """Says what crosses slow links more often than once a step, where a field would keep it inside.

    Args:
      data: ranks along mesh.data.
      slices: of TPUs, that a replica lies on.
    """
    m, mesh, lines = config.model, config.mesh, []
    if slices > 1 and mesh.fsdp and data % slices == 0:
        fields = f"mesh.replica={slices * mesh.replica}" + (f" and mesh.data={data // slices}" if mesh.data else "")
        lines.append(f"parameters are gathered across {slices} slices in every pass: {fields} keep that inside a slice")
    if mesh.replica > 1 and m.is_moe and m.balance_step == "same":
        lines.append(
            f"model.balance_step=same counts the tokens of all replicas {QUANTILE_SUMS} times in each layer; "
            f"balance_step=next asks them once a step"
        )
    if mesh.replica > 1 and m.is_moe and m.balance == "aux_loss" and m.balance_scope == "part":
        parts = config.train.accumulate_steps
        lines += [f"model.balance_scope=part adds up the replicas' loads {parts} times a step"] if parts > 1 else []
    return lines
