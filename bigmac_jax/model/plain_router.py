"""A model whose router no longer trains, for exports and for decoding: what its network makes, made once."""

import dataclasses
from typing import Any

import jax
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.model.parameters import leaf_name, named_leaves
from bigmac_jax.model.router_weights import HyperRouter
from bigmac_jax.model.transformer import Transformer, init_model


def plain_router(config: Config, model: Transformer) -> tuple[Config, Transformer]:
    """The same function with router=affine in the place of router=hyper: the matrix and bias that each layer's network
    makes are parameters. Other models stay. Arrays are shared with `model`, which may be abstract."""
    if not config.model.is_moe or config.model.router != "hyper":
        return config, model
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, router="affine"))
    leaves: dict[str, Any] = named_leaves(model)
    layers: dict[str, Any] = {stack.name: getattr(model, stack.name) for stack in config.model.stacks if stack.experts}
    if model.mtp is not None and config.model.mtp_stack.experts:
        layers["mtp.layers"] = model.mtp.layers
    for stack, of_stack in layers.items():
        w, b = (f"{stack}.mlp.{name}" for name in ("router_DE", "router_logit_bias_E"))
        leaves[w], leaves[b] = _make(of_stack.mlp.hyper)
    abstract = jax.eval_shape(lambda: init_model(plain, jax.random.key(0)))
    return plain, jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], abstract)


@jax.jit
def _make(hypers: HyperRouter) -> tuple[Array, Array]:
    """W and b of stacked layers."""
    return jax.lax.map(lambda hyper: hyper.make(), hypers)
