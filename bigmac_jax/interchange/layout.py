"""What a checkpoint's tensors are called, and where each stands in our model.

Ours are stacked: layers.attention.query.w_DF is [layers, D, F]. A checkpoint has a tensor a layer, and one an expert.
"""

import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from bigmac_jax.config import (
    TOKENIZER_SIZES,
    Config,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    from_dict,
)
from bigmac_jax.interchange.tensor_files import Checkpoint, Index
from bigmac_jax.interchange.tokenizer_files import TOKENIZER_FILES

Leaves = dict[str, Any]  # our parameters, or their shapes, by name
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}  # ours is the tanh approximation
_LONGEST = 4096  # tokens of a window of an imported model, whatever it could take


STACKS = ("first.", "layers.")  # what our parameters of layers begin with: of those without experts, and the others


def split_leaf(config: ModelConfig, leaf: str) -> tuple[str, str, int, int]:
    """Of a parameter of layers: its stack, its name in a layer, how many layers come before, and how many it has."""
    stack, _, name = leaf.partition(".")
    first = config.first_dense_layers
    return (stack, name, 0, first) if stack == "first" else (stack, name, first, config.num_layers - first)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    name: in the checkpoint.
    leaf: our parameter, such as layers.mlp.experts.w_in_eRF; "" for one that we don't have, whose entries are zero.
    layer, expert: the part of it; None where there are none.
    transposed: ours is x @ w, [inputs, outputs]; torch's Linear stores [outputs, inputs].
    scale: what the exported tensor is multiplied by.
    exact: float32 whatever the checkpoint's dtype is.
    shape: of one that we don't have.
    """

    name: str
    leaf: str
    layer: int | None = None
    expert: int | None = None
    transposed: bool = False
    scale: float = 1.0
    exact: bool = False
    shape: tuple[int, ...] = ()

    def shape_in(self, leaves: Leaves) -> tuple[int, ...]:
        """In the checkpoint."""
        if not self.leaf:
            return self.shape
        stacked = (self.layer is not None) + (self.expert is not None)
        own = tuple(leaves[self.leaf].shape[stacked:])
        return own[::-1] if self.transposed else own


class Format(Protocol):
    """What is known of one kind of checkpoint: a module of this package."""

    def find_obstacles(self, config: ModelConfig) -> list[str]:
        """What stands against a config's being written like this, each with field, value and what it must be."""
        ...

    def tensors(self, config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
        """All tensors of a checkpoint; those that are parts of one parameter's layer stand together."""
        ...

    def to_json(self, config: Config, leaves: Leaves) -> dict[str, Any]:
        """config.json, but for the tokens' ids and the dtype."""
        ...

    def from_json(self, values: dict[str, Any], checkpoint: Checkpoint) -> Config:
        """The config of a checkpoint; raises ConfigError where we have no equivalent."""
        ...

    def split_stored(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
        """The tensors, as `tensors` names them, that a stored one holds, and where."""
        ...


def find_violations(**conditions: tuple[Any, bool, str]) -> list[str]:
    """The conditions, field=(value, holds, what it must be), that don't hold, as text."""
    return [f"{field}={value} must be {wanted}" for field, (value, holds, wanted) in conditions.items() if not holds]


def attention_tensors(prefix: str, layer: int) -> Iterator[Tensor]:
    """q_proj, k_proj, v_proj and o_proj, as every class calls them."""
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
        yield Tensor(f"{prefix}.{theirs}.weight", f"layers.attention.{ours}.w_DF", layer, transposed=True)


def expert_tensors(config: ModelConfig, prefix: str, layer: int, names: dict[str, str]) -> Iterator[Tensor]:
    """A tensor for each expert and matrix; `names`: ours → theirs."""
    for ours, theirs in names.items():
        for expert in range(config.expert_count):
            name = f"{prefix}.experts.{expert}.{theirs}.weight"
            yield Tensor(name, f"layers.mlp.experts.{ours}", layer, expert, transposed=True)


# What of a config describes a model, beside `model`: the windows that it was trained on, and what it is computed in.
_DESCRIBING = {"data": ("sequence_length", "documents"), "execution": ("dtype",)}
_NO_FILE = tuple(TOKENIZER_SIZES)  # of tokenizers that are no file


def describe_config(config: Config) -> dict[str, Any]:
    """What an export's config.json holds of a config, and `read_description` reads."""
    values = json.loads(config.to_json())
    parts = {section: {name: values[section][name] for name in names} for section, names in _DESCRIBING.items()}
    if config.data.tokenizer in _NO_FILE:
        parts["data"]["tokenizer"] = config.data.tokenizer
    return {"model": values["model"]} | parts


def read_description(values: Any, checkpoint: Checkpoint) -> Config:
    """The config of an export, with the tokenizer that lies beside it. What else its config.json may say, as those of
    earlier editions do, is of the machine, the data and the paths of whoever wrote it, and is left out."""
    parts = {section: {name: values[section][name] for name in names if name in values.get(section, {})}
             for section, names in _DESCRIBING.items()}  # fmt: skip
    named = values.get("data", {}).get("tokenizer")
    beside = find_tokenizer_file(checkpoint)
    parts["data"]["tokenizer"] = named if named in _NO_FILE and not beside.is_file() else str(beside)
    return from_dict({"model": values["model"]} | parts)


def find_tokenizer_file(checkpoint: Checkpoint) -> pathlib.Path:
    """Where the tokenizer of a checkpoint lies, or should."""
    folder = checkpoint.directory.absolute()
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), folder / TOKENIZER_FILES[0])


def make_config(v: dict[str, Any], checkpoint: Checkpoint, **model: Any) -> Config:
    """The config of a checkpoint, from fields that all classes have (`v`) and those of one class."""
    heads, size = v["num_attention_heads"], v["head_dim"]
    return Config(
        ModelConfig(
            hidden_size=v["hidden_size"],
            num_heads=heads,
            num_kv_heads=v["num_key_value_heads"],
            head_dim=0 if size * heads == v["hidden_size"] else size,
            vocab_size=v["vocab_size"],
            scale_embedding=False,
            top_k=v["num_experts_per_tok"],
            expert_hidden_size=v["moe_intermediate_size"],
            latent_norm="none",
            projection_init="random",  # nor were they trained slowly
            router_renormalize=v["norm_topk_prob"],
            capacity_factor=math.inf,
            **model,
        ),
        ExecutionConfig("bfloat16" if v["dtype"] == "bfloat16" else "float32"),
        data=DataConfig(
            tokenizer=str(find_tokenizer_file(checkpoint)), sequence_length=min(v["max_position_embeddings"], _LONGEST)
        ),
    )
