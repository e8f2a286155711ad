"""Gradient accumulation: the gradient of a batch in parts, where its activations don't fit at once.

B batch, L length, M parts of the batch, Y layers, E experts, U replicas.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.mesh import batch_spec, replicated_spec
from bigmac_jax.model.next_tokens import look_ahead
from bigmac_jax.training.dpo import count_pairs
from bigmac_jax.training.loss import WHOLE, LossTerms, Share

Loss = Callable[[Any, Batch, Array, Share], tuple[Array, LossTerms]]  # of parameters, rows, a key, and their share


def accumulate(config: Config, loss: Loss, params: Any, batch: Batch, key: Array) -> tuple[Any, Any]:
    """Computes ((loss, its terms), gradients) of a batch in train.accumulate_steps parts; the result is that of one."""
    gradient, parts = jax.grad(loss, has_aux=True), config.train.accumulate_steps
    if parts == 1:
        gradients, terms = gradient(params, batch, key, WHOLE)
        return terms.join(), gradients
    xs, share = (split_rows(batch, parts), jax.random.split(key, parts)), count_share(config, batch)
    if config.model.counts_loads_first:
        # The balance loss is a product of two means over the whole step, so its gradient in one part needs the load of
        # all parts: a first forward pass counts it.
        def load(_: None, xs: tuple[Batch, Array]) -> tuple[None, Array]:
            return None, loss(params, *xs, share)[1].stats.load

        share = share._replace(load_YE=jax.lax.scan(load, None, xs)[1].mean((0, 2)))

    def add(total: Any, xs: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *xs, share)), None

    first = jax.tree.map(lambda v_M: v_M[0], xs)
    zeros = jax.tree.map(_zeros, jax.eval_shape(gradient, params, *first, share))
    total = jax.lax.scan(add, zeros, xs)[0]
    gradients, terms = jax.tree.map(lambda total: total / parts, total)
    return terms.join(), gradients


def describe_first_pass(config: Config) -> str:
    """Says what counting the loads of all parts first costs, as a share of a step's passes; "" where nothing is."""
    if not (config.model.counts_loads_first and config.train.accumulate_steps > 1):
        return ""
    # A backward pass is two forward ones, and one more where layers are recomputed.
    passes = 1 + 3 + (config.execution.remat != "none")
    return (
        f"a forward pass over all {config.train.accumulate_steps} parts of the batch counts the experts' loads first, "
        f"about {100 / passes:.0f} % of a step; model.balance_scope=part, and balance=bias or quantile, need none"
    )


def split_rows(batch: Batch, parts: int) -> Batch:
    """Splits each array to [M, B/M, L]. Part m takes rows m, M + m, …: whatever rank a row is on, it stays there."""

    def split(v_BL: Array) -> Array:
        B, L = v_BL.shape
        # Without a word on it, axes of size 1 would stand on the dimension of the parts, which a scan goes through.
        rows_BML = v_BL.reshape(B // parts, parts, L, out_sharding=batch_spec(3))
        return rows_BML.swapaxes(0, 1)

    return jax.tree.map(split, batch)


def count_share(config: Config, batch: Batch) -> Share:
    """Counts the targets (with DPO, pairs) and tokens of a batch, over the number of its parts."""
    parts = config.train.accumulate_steps
    counted = count_pairs(batch) if config.tuning.objective == "dpo" else jnp.sum(batch.targets_BL != NO_TARGET)
    tokens = None if batch.segments_BL is None else jnp.sum(batch.segments_BL != PADDING) / parts
    modules = config.model.mtp_modules if config.trains_mtp else 0
    return Share(
        counted / parts, tokens, ahead=tuple(_count_ahead(batch, number + 1, parts) for number in range(modules))
    )


def _count_ahead(batch: Batch, by: int, parts: int) -> Share:
    ahead = look_ahead(batch, by)
    return Share(jnp.sum(ahead.targets_BL != NO_TARGET) / parts, jnp.sum(ahead.segments_BL != PADDING) / parts)


def _zeros(of: jax.ShapeDtypeStruct) -> Array:
    # What does not depend on an input has no sharding.
    spec = of.sharding.spec if of.sharding else replicated_spec(of.ndim)
    return jnp.zeros(of.shape, of.dtype, out_sharding=spec)
