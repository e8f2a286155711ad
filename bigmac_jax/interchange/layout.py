"""What is known of a kind of checkpoint: what its tensors are called, and where each stands in our model.

Ours are stacked: layers.attention.query.w_DF is [layers, D, F]. A checkpoint has a tensor a layer, and one an expert.
"""

import json
import logging
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from bigmac_jax.config import (
    TOKENIZER_SIZES,
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    from_dict,
)
from bigmac_jax.config.blocks import Stack
from bigmac_jax.data.documents import log_once
from bigmac_jax.interchange.tensor_files import Checkpoint, Index
from bigmac_jax.interchange.tokenizer_files import TOKENIZER_FILES
from bigmac_jax.runtime import hosts

Leaves = dict[str, Any]  # our parameters, or their shapes, by name
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}  # ours is the tanh approximation
# Fields of any config.json that change nothing of what a model computes on a text: names and versions, how it is drawn
# and trained, and how text is generated.
_HARMLESS = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "do_sample",
    "dtype", "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "max_length", "min_length", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "repetition_penalty", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# What computes something wherever it is set: final_logit_softcapping, attention_multiplier (also one of 1, which stands
# for 1 / √H), quantization_config.
_COMPUTING = re.compile("soft_?cap|multiplier|logits?_scal|quantization")
_LONGEST = 4096  # tokens of a window in which an imported model is trained, whatever it could take


def split_leaf(config: ModelConfig, leaf: str) -> tuple[Stack | None, str]:
    """Splits the name of a parameter: its stack, None for one that is of no layer, and its name in a layer.
    Next-token modules are a stack of their own."""
    first, _, name = leaf.partition(".")
    stack = next((stack for stack in config.trained_stacks if stack.name == first), None)
    return (stack, name) if stack else (None, leaf)


def find_other_blocks(config: ModelConfig, *names: str) -> tuple[bool, str]:
    """For `find_violations`: whether all layers are attention with experts or an MLP behind it, in stacks of these
    names."""
    plain = {stack.name for stack in config.stacks} <= set(names)
    return plain or not config.blocks, "empty (attention and experts in turn)"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, or what it holds of one parameter (`rows`)."""

    name: str  # in the checkpoint
    leaf: str  # our parameter, such as layers.mlp.experts.w_in_eRF; "" for one of zeros that we don't have
    layer: int | None = None  # the part of the parameter; None where it has no such dimension
    expert: int | None = None
    transposed: bool = False  # ours is x @ w, [inputs, outputs]; torch's Linear stores [outputs, inputs]
    depthwise: bool = False  # ours is [taps, features]; torch's Conv1d stores [features, 1, taps]
    rows: slice | None = None  # those of the stored tensor, if it has several parameters, one behind the other
    scale: float = 1.0  # factor of the exported tensor
    exact: bool = False  # float32 whatever the checkpoint's dtype is
    shape: tuple[int, ...] = ()  # of a tensor that we don't have

    def shape_in(self, leaves: Leaves) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint; with `rows`, the shape of these."""
        if not self.leaf:
            return self.shape
        stacked = (self.layer is not None) + (self.expert is not None)
        own = tuple(leaves[self.leaf].shape[stacked:])
        if self.depthwise:
            return own[1], 1, own[0]
        return own[::-1] if self.transposed else own


class Format(Protocol):
    """A kind of checkpoint, which is a module of this package."""

    def find_obstacles(self, config: ModelConfig) -> list[str]:
        """Why a model can't be written like this: a text for each field, with its value and what it must be."""
        ...

    def tensors(self, config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
        """All tensors of a checkpoint; those into which one layer of a parameter is split follow each other, and so do
        the parts of one tensor."""
        ...

    def to_json(self, config: Config, leaves: Leaves) -> dict[str, Any]:
        """The fields of config.json, without the tokens' ids and the dtype."""
        ...

    def from_json(self, values: dict[str, Any], checkpoint: Checkpoint) -> Config:
        """Makes our config from the values of config.json. Tensors of the checkpoint that these don't ask for are left
        out where other readers of the format leave them out, too.

        Raises:
          ConfigError: a value has no equivalent here.
        """
        ...

    def split_stored(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
        """The tensors of `tensors` that a stored one holds: (name, part of the stored one)."""
        ...


def one_behind_the_other(leaves: Leaves, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors of one name, as the parts of it."""
    first = 0
    for tensor in tensors:
        end = first + tensor.shape_in(leaves)[0]
        yield replace(tensor, rows=slice(first, end))
        first = end


def stored_shapes(tensors: Iterable[Tensor], leaves: Leaves) -> dict[str, tuple[int, ...]]:
    """The shapes of whole tensors of a checkpoint, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        shape = tensor.shape_in(leaves)
        shapes[tensor.name] = (tensor.rows.stop, *shape[1:]) if tensor.rows else shape
    return shapes


def find_violations(values: Mapping[str, Any], **wanted: Any) -> list[str]:
    """Describes the fields whose value is wrong: "norm=layernorm must be rmsnorm".

    Args:
      wanted: by field, its only right value; or whether it is right, and in words what it must be.
    """
    found = []
    for field, right in wanted.items():
        holds, words = right if isinstance(right, tuple) else (values[field] == right, right)
        if not holds:
            found.append(f"{field}={values[field]} must be {words}")
    return found


def check_json(checkpoint: Checkpoint, values: Mapping[str, Any], **wanted: Any) -> None:
    """Raises ConfigError if a field of a checkpoint's config.json is wrong; arguments as for `find_violations`."""
    if wrong := find_violations(values, **wanted):
        raise ConfigError(f"{checkpoint.directory / 'config.json'}: {wrong[0]}; bigmac_jax has no such model")


def fill_json(values: dict[str, Any], defaults: dict[str, Any], other_names: dict[str, str]) -> dict[str, Any]:
    """The fields of config.json by their present names, with the class's own defaults. Of a field that a file has under
    both names, the other one counts, as in the class; but dtype counts before torch_dtype."""
    given = {name: value for name, value in values.items() if value is not None}
    dtype = {"dtype": given["torch_dtype"]} if "torch_dtype" in given else {}
    others = {name: given[other] for other, name in other_names.items() if other in given}
    return defaults | dtype | given | others


def check_known(checkpoint: Checkpoint, values: Mapping[str, Any], *read: Iterable[str]) -> None:
    """Names the fields of a checkpoint's config.json in a line that are neither read nor known to change nothing.

    Args:
      read: those that are read, or that the format's other readers compute nothing by.

    Raises:
      ConfigError: one of them changes what a model computes.
    """
    file, known = checkpoint.directory / "config.json", _HARMLESS.union(*read)
    unknown = sorted(name for name in values if values[name] is not None and name not in known and name[:1] != "_")
    for name in unknown:
        if _COMPUTING.search(name) and values[name] not in (False, {}):
            raise ConfigError(
                f"{file}: {name}={str(values[name])[:60]} changes what a model computes, and bigmac_jax has no such "
                f"model; get one without it"
            )
    if unknown and hosts.is_first():
        names = " ".join(", ".join(unknown[:9]).split()) + (f" and {len(unknown) - 9} more" if unknown[9:] else "")
        log_once(logging.WARNING, f"{file}: nothing is known of {names}; no such field is read")


def leave_out_tied(checkpoint: Checkpoint, table: str, other: str) -> None:
    """Leaves out the output's table (`other`) where one table serves both, and a file has it under both names.

    Raises:
      ConfigError: they are two tables.
    """
    if other in checkpoint:
        if not same_tensors(checkpoint, table, other):
            raise ConfigError(
                f"{checkpoint.directory / 'config.json'}: tie_word_embeddings=True, and {other} of the tensors is not "
                f"{table}; get a good copy, or set it to false if the model has both"
            )
        checkpoint.leave_out(other)


def same_tensors(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether a checkpoint holds two tensors, and they are equal."""
    both = first in checkpoint and second in checkpoint
    return both and np.array_equal(checkpoint.read(first), checkpoint.read(second))


def common_json(config: Config) -> dict[str, Any]:
    """Fields of config.json that all classes of transformers have."""
    m = config.model
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_size,
        "max_position_embeddings": config.context_length,
    }


def attention_tensors(prefix: str, layer: int, branch: str = "layers.attention") -> Iterator[Tensor]:
    """The four matrices of attention, which every class of transformers calls q_proj, k_proj, v_proj and o_proj, under
    `prefix` there and `branch` here."""
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
        yield Tensor(f"{prefix}.{theirs}.weight", f"{branch}.{ours}.w_DF", layer, transposed=True)


def split_experts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    """`split_stored` where all experts' matrices may be one tensor, and gate_proj and up_proj one behind the other."""
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)", name)
    if not fused or len(shape) != 3 or 0 in shape:  # an empty tensor may claim any number of experts
        yield name, ()
        return
    half = shape[1] // 2
    for expert in range(shape[0]):
        if fused[2] == "gate_up_proj":
            yield f"{fused[1]}.{expert}.gate_proj.weight", (expert, slice(0, half))
            yield f"{fused[1]}.{expert}.up_proj.weight", (expert, slice(half, 2 * half))
        else:
            yield f"{fused[1]}.{expert}.{fused[2]}.weight", (expert,)


def expert_tensors(
    config: ModelConfig, prefix: str, layer: int, names: dict[str, str], branch: str = "layers.mlp"
) -> Iterator[Tensor]:
    """A tensor for each expert and matrix; `names`: ours → theirs."""
    for ours, theirs in names.items():
        for expert in range(config.expert_count):
            name = f"{prefix}.experts.{expert}.{theirs}.weight"
            yield Tensor(name, f"{branch}.experts.{ours}", layer, expert, transposed=True)


# Fields beside `model` that describe a model: the windows that it was trained on, and what it is computed in.
_DESCRIBING = {"data": ("sequence_length", "documents"), "execution": ("dtype",)}


def describe_config(config: Config) -> dict[str, Any]:
    """The part of a config that an export's config.json holds, for `read_description`."""
    values = json.loads(config.to_json())
    parts = {section: {name: values[section][name] for name in names} for section, names in _DESCRIBING.items()}
    if config.data.tokenizer in TOKENIZER_SIZES:  # which is no file
        parts["data"]["tokenizer"] = config.data.tokenizer
    return {"model": values["model"]} | parts


def read_description(values: Any, checkpoint: Checkpoint) -> Config:
    """The config of an export, with the tokenizer that lies beside it. Nothing else is taken from its config.json: the
    machine, the data and the paths of whoever wrote it."""
    parts: dict[str, Any] = {}
    for section, names in _DESCRIBING.items():
        parts[section] = {name: values[section][name] for name in names if name in values.get(section, {})}
    named, beside = values.get("data", {}).get("tokenizer"), find_tokenizer_file(checkpoint)
    parts["data"]["tokenizer"] = named if named in TOKENIZER_SIZES and not beside.is_file() else str(beside)
    return from_dict({"model": values["model"]} | parts)


def find_tokenizer_file(checkpoint: Checkpoint) -> pathlib.Path:
    """Where the tokenizer of a checkpoint lies, or should."""
    folder = checkpoint.directory.absolute()
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), folder / TOKENIZER_FILES[0])


def make_config(v: dict[str, Any], checkpoint: Checkpoint, **model: Any) -> Config:
    """The config of a checkpoint, from the fields that all classes have (`v`) and those of one class."""
    heads, size = v["num_attention_heads"], v["head_dim"]
    fields: dict[str, Any] = {
        "hidden_size": v["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": v["num_key_value_heads"],
        "head_dim": 0 if size * heads == v["hidden_size"] else size,
        "vocab_size": v["vocab_size"],
        "context_length": v["max_position_embeddings"],
        "scale_embedding": False,
    }
    if model["structure"] != "dense":
        fields |= {
            "top_k": v["num_experts_per_tok"],
            "expert_hidden_size": v["moe_intermediate_size"],
            "latent_norm": "none",
            "projection_init": "random",  # nor were they trained slowly
            "router_renormalize": v["norm_topk_prob"],
            "capacity_factor": math.inf,
        }
    execution = ExecutionConfig("bfloat16" if v["dtype"] == "bfloat16" else "float32")
    length = min(v["max_position_embeddings"], _LONGEST)
    data = DataConfig(tokenizer=str(find_tokenizer_file(checkpoint)), sequence_length=length)
    return Config(ModelConfig(**fields | model), execution, data=data)
