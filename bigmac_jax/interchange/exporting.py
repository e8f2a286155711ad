"""A model → a directory of safetensors, which transformers or `import_model` loads."""

import itertools
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.names import ask
from bigmac_jax.data.chat_files import NO_CHAT, ChatFiles
from bigmac_jax.data.chat_files import TEMPLATE_FILE as CHAT_TEMPLATE
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.interchange import bigmac, model_card, nemotron_h, plain, qwen3_moe, tensor_files, tokenizer_files
from bigmac_jax.interchange.layout import Format, Leaves, Tensor, stored_shapes
from bigmac_jax.interchange.model_card import Trained
from bigmac_jax.interchange.tensor_files import DTYPES, Spec, write_json
from bigmac_jax.model.mesh import replicated_spec
from bigmac_jax.model.parameters import declared_leaves
from bigmac_jax.model.plain_router import plain_router
from bigmac_jax.model.transformer import Transformer, without_next_tokens
from bigmac_jax.runtime import hosts, storage

_log = logging.getLogger(__name__)
FORMATS: dict[str, Format] = {
    "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe, "bigmac": bigmac, "bigmac_jax": plain,
}  # fmt: skip
_WITH_NEXT_TOKENS = ("nemotron_h", "bigmac_jax")


def choose_format(config: Config, name: str = "auto") -> str:
    """The model_type under which a model is written.

    Args:
      name: auto (a class that transformers has if one fits, else our own), nemotron_h, qwen3_moe, bigmac or plain.

    Raises:
      ConfigError: the model cannot be written like that; the line names the fields.
    """
    names = ["auto", "nemotron_h", "qwen3_moe", "bigmac", "plain"]
    if name not in names:
        raise ConfigError(f"--format={name} must be one of {', '.join(names)}{ask(name, names)}")
    if name == "auto":
        return next(key for key in FORMATS if not FORMATS[key].find_obstacles(config.model))
    name = "bigmac_jax" if name == "plain" else name
    if obstacles := FORMATS[name].find_obstacles(config.model):
        reason = ", ".join(f"model.{line}" for line in obstacles)
        raise ConfigError(f"--format={name}: {reason}; use --format=auto")
    return name


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

    Parameters leave the devices a layer at a time, and a shard is written as soon as it is full, so that the host's
    memory holds no more. With several processes, all must call it; process 0 writes.

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
    given, size = tensor_files.parse_dtype(dtype), tensor_files.parse_size(max_shard_size)
    name = choose_format(config, format)
    with hosts.raise_together():  # now: later the other processes would wait for this one
        if hosts.is_first():
            tensor_files.check_new(output)
        ends = tokenizer_files.end_ids(tokenizer, chat, config.model.vocab_size) if tokenizer else None
    if name not in _WITH_NEXT_TOKENS and config.model.mtp_modules:
        if hosts.is_first():
            _log.warning("%s has no place for next-token modules (model.mtp_modules=%d), which --format=plain and "
                         "nemotron_h hold; it is written without", name, config.model.mtp_modules)  # fmt: skip
        config, model = without_next_tokens(config, model)
    config, model = plain_router(config, model)
    layout, leaves = FORMATS[name], declared_leaves(model)
    tensors = list(layout.tensors(config.model, leaves))
    dtypes = {tensor.name: DTYPES["float32"] if tensor.exact else given for tensor in tensors}
    specs = [Spec(stored, shape, dtypes[stored]) for stored, shape in stored_shapes(tensors, leaves).items()]
    arrays = _read_values(tensors, leaves)

    def write() -> None:
        with tensor_files.whole_or_nothing(output) as directory:
            tensor_files.write_shards(directory, tensor_files.split_shards(specs, size), arrays)
            ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": ends}
            values = layout.to_json(config, leaves) | {"dtype": dtype}
            write_json(directory / "config.json", values if layout is plain else values | ids | {"pad_token_id": None})
            if tokenizer:
                tokenizer_files.write_tokenizer(directory, config, tokenizer, chat)
            if chat.template:
                (directory / CHAT_TEMPLATE).write_text(chat.template)
            if tokenizer and layout is not plain:
                write_json(directory / "generation_config.json", ids | {"pad_token_id": tokenizer.eos_id})
            for file in bigmac.CODE if layout is bigmac else ():
                shutil.copyfile(file, directory / file.name)
            card = model_card.make_card(config, name, trained, output.name, tokenizer is not None, bool(chat.template))
            (directory / "README.md").write_bytes(card.encode(errors="replace"))  # folders' names may be no UTF-8

    failed: ConfigError | None = None
    try:
        if hosts.is_first():
            write()
    except ConfigError as error:  # of the disk, which the others do not meet
        failed = error
    for _ in arrays if hosts.is_distributed() else ():  # all of them gather every layer, whatever could be written
        pass
    with hosts.raise_together():
        if failed:
            raise failed
    return name


def _read_values(tensors: Iterable[Tensor], leaves: Leaves) -> Iterator[np.ndarray]:
    """The stored tensors' values, on process 0; a layer of a parameter is gathered once for all of its tensors."""
    held: dict[tuple[str, int | None], np.ndarray] = {}  # one layer of a parameter

    def read(tensor: Tensor) -> np.ndarray:
        if not tensor.leaf:
            return np.zeros(tensor.shape, np.float32)
        if (key := (tensor.leaf, tensor.layer)) not in held:
            held.clear()  # before the next one comes
            held[key] = gather_layer(leaves[tensor.leaf], tensor.layer)
        return _convert(tensor, held[key])

    for _, parts in itertools.groupby(tensors, lambda tensor: tensor.name):
        found = [read(tensor) for tensor in parts]
        yield found[0] if len(found) == 1 else np.concatenate(found)
        del found


def _convert(tensor: Tensor, layer: np.ndarray) -> np.ndarray:
    """The tensor as it is stored, or its part, from the layer of the parameter that holds it."""
    value = layer if tensor.expert is None else layer[tensor.expert]
    value = value.T if tensor.transposed else value
    value = value.T[:, None] if tensor.depthwise else value
    # In float32, as the model multiplies: the product is the same to the last bit.
    return value if tensor.scale == 1 else value * np.float32(tensor.scale)


def gather_layer(leaf: Array, layer: int | None) -> np.ndarray:
    """A parameter on the host, or one layer of it. With several processes, all must call it."""
    part = leaf if layer is None else _take_layer(leaf, layer)
    if not part.is_fully_addressable:
        part = jax.sharding.reshard(part, replicated_spec(part.ndim)).addressable_data(0)
    return np.asarray(part)


@jax.jit
def _take_layer(leaf: Array, layer: int) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
