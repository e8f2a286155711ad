"""A model → a directory of safetensors, which transformers or `import_model` loads."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_template import FILE as CHAT_TEMPLATE
from bigmac_jax.data.chat_template import NO_CHAT, ChatFiles
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.interchange import bigmac, model_card, nemotron_h, plain, qwen3_moe, tensor_files, tokenizer_files
from bigmac_jax.interchange.layout import Format, Leaves, Tensor
from bigmac_jax.interchange.model_card import Trained
from bigmac_jax.model.mesh import replicated_spec
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import hosts, storage

FORMATS: dict[str, Format] = {
    "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe, "bigmac": bigmac, "bigmac_jax": plain,
}  # fmt: skip


def choose_format(config: Config, name: str = "auto") -> str:
    """The model_type under which a model is written.

    Args:
      name: auto (a class that transformers has if one fits, else our own), nemotron_h, qwen3_moe, bigmac or plain.

    Raises:
      ConfigError: the model cannot be written like that; the line names the fields.
    """
    classes = ["nemotron_h", "qwen3_moe", "bigmac"]
    if name not in ("auto", *classes, "plain"):
        raise ConfigError(f"--format={name} must be one of {', '.join(('auto', *classes, 'plain'))}")
    if name == "plain":
        return "bigmac_jax"
    for key in classes if name == "auto" else [name]:
        if not (obstacles := FORMATS[key].find_obstacles(config.model)):
            return key
    reason = ", ".join(f"model.{line}" for line in obstacles)
    raise ConfigError(f"--format={name}: {reason}; use --format={'plain' if name in ('auto', 'bigmac') else 'auto'}")


def export_model(
    config: Config,
    model: Transformer,
    output: str | pathlib.Path,
    *,
    format: str = "auto",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    tokenizer: Tokenizer | None = None,
    trained: Trained | None = None,
    chat: ChatFiles = NO_CHAT,
) -> str:
    """Writes a model as safetensors, whole or not at all → the model_type of its config.json.

    A layer's parameters leave the devices at a time, and a shard is written as soon as it is full: this is all that is
    in the host's memory. With several processes, all must call it; process 0 writes.

    Args:
      output: a new directory.
      format: auto, nemotron_h, qwen3_moe, bigmac or plain; auto takes the first that fits.
      dtype: float32, bfloat16 or float16, of the tensors; parameters are float32.
      max_shard_size: such as 5GB.
      tokenizer: is written beside the model.
      trained: what the model card says of the run.
      chat: its template and special tokens' names are written beside the tokenizer.

    Raises:
      ConfigError: no equivalent, or `output` is there already or cannot be written.
    """
    output = storage.absolute(storage.locate(output, "--output"))
    if dtype not in tensor_files.DTYPES:
        raise ConfigError(f"--dtype={dtype} must be one of {', '.join(tensor_files.DTYPES)}")
    size = tensor_files.parse_size(max_shard_size)
    name = choose_format(config, format)
    with hosts.raise_together():  # now: later the other processes would wait for this one
        if hosts.is_first():
            tensor_files.check_new(output)
    layout, leaves = FORMATS[name], named_leaves(model)
    tensors = list(layout.tensors(config.model, leaves))
    exact = tensor_files.DTYPES["float32"]
    specs = [
        tensor_files.Spec(t.name, t.shape_in(leaves), exact if t.exact else tensor_files.DTYPES[dtype]) for t in tensors
    ]
    values = _values(tensors, leaves)
    if not hosts.is_first():
        for _ in values:  # takes part in gathering
            pass
        return name
    with tensor_files.whole_or_nothing(output) as directory:
        tensor_files.write_shards(directory, tensor_files.split_shards(specs, size), values)
        ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id if tokenizer else None}
        head = layout.to_json(config, leaves) | {"dtype": dtype}
        _write(directory / "config.json", head if layout is plain else head | ids | {"pad_token_id": None})
        if tokenizer:
            tokenizer_files.write_tokenizer(directory, config, tokenizer, chat.special)
        if chat.template:
            (directory / CHAT_TEMPLATE).write_text(chat.template)
        if tokenizer and layout is not plain:
            ends = {"eos_token_id": tokenizer_files.end_ids(tokenizer, chat.special), "pad_token_id": tokenizer.eos_id}
            _write(directory / "generation_config.json", ids | ends)
        if layout is bigmac:
            for file in bigmac.CODE:
                shutil.copyfile(file, directory / file.name)
        (directory / "README.md").write_text(
            model_card.make_card(config, name, trained, output.name, tokenizer is not None)
        )
    return name


def _values(tensors: Iterable[Tensor], leaves: Leaves) -> Iterator[np.ndarray]:
    """The tensors' values, on process 0; the part of a parameter that several share is gathered once."""
    held: tuple[str, int | None] | None = None
    part = np.zeros(())
    for tensor in tensors:
        if not tensor.leaf:
            yield np.zeros(tensor.shape, np.float32)
            continue
        if held != (tensor.leaf, tensor.layer):
            part = np.zeros(())  # the last one goes before the next one comes
            held, part = (tensor.leaf, tensor.layer), _on_host(leaves[tensor.leaf], tensor.layer)
        yield _as_stored(tensor, part)


def _as_stored(tensor: Tensor, part: np.ndarray) -> np.ndarray:
    value = part if tensor.expert is None else part[tensor.expert]
    value = value.T if tensor.transposed else value
    # In float32, as the model multiplies: the product is the same to the last bit.
    return value if tensor.scale == 1 else value * np.float32(tensor.scale)


def _on_host(leaf: Array, layer: int | None) -> np.ndarray:
    part = leaf if layer is None else _layer(leaf, layer)
    if not part.is_fully_addressable:
        part = jax.sharding.reshard(part, replicated_spec(part.ndim)).addressable_data(0)
    return np.asarray(part)


@jax.jit
def _layer(leaf: Array, layer: int) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _write(file: pathlib.Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
