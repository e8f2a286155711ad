"""Our own names, for any config: config.json holds the model's, and says of each tensor its shape and its dimensions.

A layer's tensors are x @ w, [inputs, outputs], as in the model; layers.3.attention.query.w_DF is the fourth layer's,
and mtp.0.projection.w_DF the first next-token module's.
"""

from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.interchange.layout import Leaves, Tensor, check_known, describe_config, read_description, split_leaf
from bigmac_jax.interchange.tensor_files import Checkpoint, Index

_DIMENSIONS = {
    "D": "inputs of a matrix or width of a norm; the hidden size of embeddings and the router",
    "F": "outputs of a matrix; an expert's hidden width",
    "E": "experts",
    "e": "experts",
    "R": "width of the rows that experts take",
    "V": "vocabulary",
    "L": "positions",
    "K": "taps of a convolution",
    "N": "heads",
    "1": "a single number",
}


def find_obstacles(config: ModelConfig) -> list[str]:
    return []


def tensors(config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
    for leaf in leaves:
        stack, name = split_leaf(config, leaf)
        if stack is None:
            yield Tensor(leaf, leaf)
            continue
        for place, layer in enumerate(stack.layers):
            of = f"mtp.{place}" if stack.name == "mtp" else f"layers.{layer}"
            yield Tensor(f"{of}.{name}", leaf, place)


def to_json(config: Config, leaves: Leaves) -> dict[str, Any]:
    return {
        "model_type": "bigmac_jax",
        "config": describe_config(config),
        "dimensions": _DIMENSIONS,
        "tensors": {
            tensor.name: {"dims": tensor.name.rpartition("_")[2], "shape": tensor.shape_in(leaves)}
            for tensor in tensors(config.model, leaves)
        },
    }


def from_json(values: dict[str, Any], checkpoint: Checkpoint) -> Config:
    check_known(checkpoint, values, ["config", "dimensions", "tensors"])
    return read_description(values["config"], checkpoint)


def split_stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    yield name, ()
