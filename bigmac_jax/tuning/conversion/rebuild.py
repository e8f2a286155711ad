"""Builds a model of another config from a trained one's parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.parameters import declared_leaves, leaf_name, with_padding
from bigmac_jax.model.transformer import Transformer, init_model


def rebuild_model(config: Config, source: Transformer, given: Mapping[str, np.ndarray]) -> Transformer:
    """Builds a model on the current mesh: of parameters `given` by name, those of `source` of the same name and shape,
    and for others the values that training starts with."""
    kept, made = declared_leaves(source), init_model(config, jax.random.key(config.train.seed))
    shapes = {name: leaf.shape for name, leaf in declared_leaves(made).items()}

    def value(path: Any, leaf: Array) -> Array:
        name = leaf_name(path)
        if name in given:
            assert given[name].shape == shapes[name], (name, given[name].shape, shapes[name])
            return with_padding(given[name].astype(leaf.dtype), leaf)
        same = name in kept and kept[name].shape == shapes[name]
        return with_padding(kept[name], leaf) if same else leaf

    return jax.tree_util.tree_map_with_path(value, made)


def with_model(config: Config, flags: Mapping[str, str], **fields: Any) -> Config:
    """The config with other fields of the model.

    Args:
      flags: of `bigmac convert`, by the fields that they give: a refusal names them.

    Raises:
      ConfigError: the fields don't fit.
    """
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    except ConfigError as error:
        line = str(error)
        for name, flag in flags.items():
            line = line.replace(f"model.{name}", flag)
        raise ConfigError(line) from None
