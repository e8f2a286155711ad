"""Adapters of low rank (LoRA, arXiv 2106.09685): for each matrix w [..., X, Y] that is adapted, a [..., X, r] and
b [..., r, Y], so that the model computes with w + (alpha / r) a b. Of experts, each has its own.

The sum is formed where a parameter is taken to the ranks (`parameters.weight`), layer by layer: whatever a matrix goes
through afterwards, expert parallelism and splits over `tensor` too, its adapters' gradients come out of its own. a is
split as the rows of w are, and b as its columns.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.mesh import spec_of
from bigmac_jax.model.parameters import Adapted, Declaration, declared, pad_behind

Path = tuple[Any, ...]  # of a parameter in the model


def adapted(config: Config, params: nnx.State) -> dict[Path, nnx.Param]:
    """The matrices of a model that tuning.lora_targets names; empty without tuning.lora_rank.

    Raises:
      ConfigError: a part that the model does not have.
    """
    tuning = config.tuning
    if not tuning.lora_rank:
        return {}
    # The next-token modules of a pretrained model stay as they are.
    flat = [(path, param) for path, param in nnx.to_flat_state(params) if path[0] != "mtp"]
    found = {path: param for path, param in flat if is_adapted(declared(param), tuning.lora_targets)}
    if not found:
        parts = {declared(param).part for _, param in flat if declared(param).decays}
        raise ConfigError(f"tuning.lora_targets={tuning.lora_targets} are not in the model; it has {', '.join(parts)}")
    return found


def is_adapted(of: Declaration, targets: str) -> bool:
    """Whether a parameter gets adapters: it is a matrix that is trained, of a part that tuning.lora_targets names."""
    # Biases and norms, which do not decay either, are no matrices: experts' biases have two dimensions as well.
    return of.trained and of.decays and of.part in targets.split(",")


def make_adapters(config: Config, params: nnx.State, key: Array) -> nnx.State:
    """Those that a run begins with: b is zero, so that the model is what it was; a as PEFT draws it, with the variance
    1 / 3X."""
    rank = config.tuning.lora_rank
    made: dict[Path, Any] = {}
    for number, (path, param) in enumerate(sorted(adapted(config, params).items())):
        w, of = param.get_value(), declared(param)
        *leading, X, _ = of.unpadded(w.shape)
        *more, rows_of_w, columns_of_w = w.shape
        *before, rows, columns = spec_of(w)
        own = jax.random.fold_in(key, number)
        std = 1 / math.sqrt(3 * X)
        of_a, of_b = declare(of, std, rank)
        draw = functools.partial(jax.random.normal, own)
        a = std * pad_behind(draw, (*leading, X, rank), (*more, rows_of_w, rank), P(*before, rows, None))
        b = jnp.zeros((*more, rank, columns_of_w), jnp.float32, out_sharding=P(*before, None, columns))
        made[*path, "a"] = nnx.Param(a, declaration=of_a)
        made[*path, "b"] = nnx.Param(b, declaration=of_b)
    return nnx.from_flat_state(made)


def declare(of: Declaration, std: float, rank: int) -> tuple[Declaration, Declaration]:
    """What the adapters a and b of a matrix are; a starts with the deviation `std`."""
    (*leading, X, Y), exact = of.shape, of.exact
    a, b = of.dims[:-1] + "r", of.dims[:-2] + "r" + of.dims[-1]
    return (
        Declaration(a, of.part, std, exact=exact, shape=(*leading, X, rank)),
        Declaration(b, of.part, 0, True, exact=exact, shape=(*leading, rank, Y)),
    )


def attached(config: Config, base: nnx.State, adapters: nnx.State, dropout_key: Array | None = None) -> nnx.State:
    """The parameters of a model with adapters.

    Args:
      dropout_key: without one nothing is dropped. Otherwise each adapter loses a share of its inputs, the same ones for
        all tokens: x (m · a) = (x · m) a, so that no layer has to know of it.
    """
    tuning, pairs = config.tuning, dict(nnx.to_flat_state(adapters))
    flat = dict(nnx.to_flat_state(base))
    for number, path in enumerate(sorted(adapted(config, base))):
        w, (a, b) = flat[path].get_value(), (pairs[*path, name].get_value() for name in "ab")
        if dropout_key is not None and tuning.lora_dropout:
            # 2^16: these are other numbers than the model's own dropout draws.
            own, spec = jax.random.fold_in(jax.random.fold_in(dropout_key, 1 << 16), number), P(*spec_of(w)[:-1], None)
            shape = declared(flat[path]).unpadded(w.shape)
            keep = functools.partial(jax.random.bernoulli, own, 1 - tuning.lora_dropout)
            kept = pad_behind(keep, (*shape[:-1], 1), (*w.shape[:-1], 1), spec)
            if a.ndim > w.ndim:  # each replica has its own, and loses the same
                kept = jnp.expand_dims(kept, w.ndim - len(declared(flat[path]).dims))
            a = jnp.where(kept, a / (1 - tuning.lora_dropout), 0)
        scale = tuning.lora_alpha / tuning.lora_rank
        flat[path] = flat[path].replace(Adapted(w, a, scale * b))
    return nnx.from_flat_state(flat)


def merged(params: nnx.State) -> nnx.State:
    """The parameters of a plain model: each with an adapter, as `attached` gives it, becomes w + a b; others stay."""
    flat = {
        path: variable.replace(value.sum(exact=True)) if isinstance(value, Adapted) else variable
        for path, variable in nnx.to_flat_state(params)
        for value in [variable.get_value()]
    }
    return nnx.from_flat_state(flat)
