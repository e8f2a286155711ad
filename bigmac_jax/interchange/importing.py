"""A directory of safetensors → a model, or a workdir, as a run at step 0."""

import functools
import hashlib
import logging
import math
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import TOKENIZER_SIZES, Config, ConfigError, missing_place_fix, read_object, with_overrides
from bigmac_jax.config.reading import retrained
from bigmac_jax.config.root import is_moved
from bigmac_jax.data.chat_files import ChatFiles
from bigmac_jax.data.files import file_digest
from bigmac_jax.data.tokenizer import Tokenizer, TooManyIdsError
from bigmac_jax.interchange import tokenizer_files
from bigmac_jax.interchange.exporting import FORMATS
from bigmac_jax.interchange.layout import Format, Leaves, Tensor, stored_shapes
from bigmac_jax.interchange.tensor_files import Checkpoint, Index
from bigmac_jax.model.mesh import make_mesh, placed
from bigmac_jax.model.parameters import declared_leaves, leaf_name
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.runtime.workdir_lock import lock_workdir
from bigmac_jax.training.checkpoint_arrays import find_nonfinite
from bigmac_jax.training.history import model_name
from bigmac_jax.training.new_run import check_new, check_no_run, write_new_run

# What an import or a conversion may set: all that is not the model's function.
MAY_SET = (
    "mesh.", "execution.", "data.", "optimizer.", "train.", "tuning.", "cache_dir", "model.dropout",
    "model.capacity_factor", "model.overflow", "model.context_length", "model.balance_", "model.z_loss_coefficient",
)  # fmt: skip
_log = logging.getLogger(__name__)


def import_model(directory: str | pathlib.Path, overrides: Sequence[str] = ()) -> tuple[Config, Transformer]:
    """Reads the config and the model of a checkpoint of any of `FORMATS`, onto the current mesh or else the config's.

    Files are read a tensor at a time, each straight to the devices that hold it.

    Args:
      overrides: "mesh.expert=4", …, of fields that don't change what the model computes.

    Raises:
      ConfigError: a model that has no equivalent here, tensors that don't fit its config.json, or damaged files.
    """
    with hosts.raise_together():
        config, layout, checkpoint = open_checkpoint(pathlib.Path(directory), overrides)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = make_mesh(config, fit_batch=False)
        jax.set_mesh(mesh)
    abstract = placed(jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0)), mesh)
    leaves = declared_leaves(abstract)
    with hosts.raise_together():
        tensors = _match_tensors(layout, config, leaves, checkpoint)
    parts: dict[str, dict[int | None, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for tensor in tensors:
        parts[tensor.leaf][tensor.layer].append(tensor)
    model = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _read_leaf(leaves[name := leaf_name(path)].shape, leaf, parts[name], checkpoint), abstract
    )
    if (left_out := checkpoint.left_out) and hosts.is_first():
        _log.warning(
            "%d tensors of %s are left out (%s): config.json does not ask for them",
            len(left_out),
            directory,
            left_out[0],
        )
    if leaf := find_nonfinite(model):
        stored = (tensor.name for tensor in tensors if tensor.leaf == leaf)
        bad = next((name for name in stored if not np.isfinite(checkpoint.read(name)).all()), leaf)
        raise ConfigError(f"{bad} of {directory} holds NaN or infinity; get a good copy")
    return config, model


def import_run(
    directory: str | pathlib.Path,
    workdir: str | pathlib.Path,
    overrides: Sequence[str] = (),
    name: str = "",
    place: str | pathlib.Path = "",
) -> Config:
    """Writes an imported model to a workdir, as a run at step 0 with a fresh optimizer.

    Args:
      name: what its card calls the checkpoint; by default as its directory.
      place: where the user has it, if the directory is a copy.

    Raises:
      ConfigError: as `import_model`; or the workdir holds a run, or cannot be written.
    """
    directory, workdir = pathlib.Path(directory), storage.locate(workdir, "--workdir")
    check_no_run(workdir, "--workdir")
    overrides = [override for override in overrides if override != "data.tokenizer=bpe"]  # the checkpoint's own
    given = [override for override in overrides if override.startswith("data.tokenizer=")]
    with hosts.raise_together():
        config = check_new(open_checkpoint(directory, [field for field in overrides if field not in given])[0])
        found = find_tokenizer(directory, config, given, place)
        digest = checkpoint_digest(directory) if hosts.is_distributed() else ""
    own = found[0].fingerprint if found else ""  # each reads its part of the tensors from its own folder
    hosts.check_same({"the files of --checkpoint": digest[:12], "the tokenizer of --checkpoint": own[:12] or "none"})
    config, model = import_model(directory, overrides)
    with lock_workdir(workdir):
        if found:
            with hosts.raise_together():
                config = tokenizer_files.keep_tokenizer(workdir, config, *found)
        write_new_run(workdir, config, model, [f"`{name or model_name(directory.absolute())}`, which was imported"])
    return config


def find_tokenizer(
    directory: pathlib.Path, config: Config, given: Sequence[str], place: str | pathlib.Path = ""
) -> tuple[Tokenizer, ChatFiles] | None:
    """The tokenizer of a checkpoint, which `config` names; None, with a warning, if there is none.

    Args:
      given: overrides of data.tokenizer: of one that has the same ids, and may have more. It is taken instead.
      place: of the checkpoint, for messages; by default its directory.

    Raises:
      ConfigError: it has other ids, or cannot be read.
    """
    name, own, place = config.data.tokenizer, None, place or directory
    if name in TOKENIZER_SIZES or pathlib.Path(name).is_file():
        try:
            if name not in TOKENIZER_SIZES:
                storage.check_inside(directory, pathlib.Path(name).name)
            own = _read_tokenizer(place, config)
            tokenizer_files.warn_of_added(str(place), own[0])
        except ConfigError as error:
            problem = f"{place} can't be imported with its tokenizer: {error}"
            if not given:
                raise ConfigError(problem) from None
            if hosts.is_first():
                _log.warning("%s; %s is taken", problem, given[-1])
    elif not given and hosts.is_first():
        _log.warning("%s holds no tokenizer; give --config.data.tokenizer, which text needs", place)
    if not given:
        return own
    tokenizer, chat = _read_tokenizer(place, with_overrides(config, given), given)
    if own and not tokenizer_files.extends(tokenizer, own[0]):
        raise ConfigError(
            f"{given[-1]} gives other ids than the tokenizer of {place}; drop it to take that, or give one that "
            f"only adds tokens to it"
        )
    if not own:
        return tokenizer, chat
    return tokenizer, chat._replace(ends=own[1].ends) if chat.template else own[1]


def _read_tokenizer(
    place: str | pathlib.Path, config: Config, given: Sequence[str] = ()
) -> tuple[Tokenizer, ChatFiles]:
    """As `tokenizer_files.read_tokenizer`; an import keeps its table, and a run that begins with the folder may grow
    it."""
    try:
        return tokenizer_files.read_tokenizer(config)
    except TooManyIdsError as error:
        fields = " ".join(f"--config.{field}" for field in (f"model.vocab_size={error.rows}", *given))
        raise ConfigError(
            f"{error.problem}; an import keeps its table: give bigmac train --config.train.init_from={place} {fields} "
            f"instead"
        ) from None


def open_checkpoint(directory: pathlib.Path, overrides: Sequence[str] = ()) -> tuple[Config, Format, Checkpoint]:
    """The config of a checkpoint, its format, and its tensors, none of which is read yet; arguments and errors as for
    `import_model`."""
    file = storage.check_inside(directory, "config.json")
    fix = "give the directory of a checkpoint, or copy it again"
    values = read_object(file, missing_place_fix(str(directory), fix))
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ConfigError(f"{file}: model_type={kind} must be one of {', '.join(FORMATS)}")
    for override in overrides:
        if not (override.startswith(MAY_SET) or is_moved(override.partition("=")[0])):
            raise ConfigError(f"--config.{override}: the checkpoint says what the model is; drop it")
    layout = FORMATS[kind]
    checkpoint = Checkpoint(directory, layout.split_stored)
    try:
        config = layout.from_json(values, checkpoint)
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not a config of {kind} ({type(error).__name__}: {error})") from None
    model, count = config.model, len(checkpoint.names())
    matrices = model.count_trained("E") * model.expert_count
    numbers = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    # Or their names alone would fill the memory. A layer's experts may be one tensor.
    if model.depth + model.mtp_modules > count or matrices > numbers:
        raise ConfigError(
            f"{file}: {model.depth} layers with {model.expert_count} experts need more than the {count} tensors "
            f"of {directory}"
        )
    return retrained(config, overrides), layout, checkpoint


def checkpoint_digest(directory: pathlib.Path, place: pathlib.Path | None = None) -> str:
    """A digest of a folder's config.json and tensors; of a file above 1 GiB its ends count, and the time of its last
    change at `place`, which the folder may be a copy of."""

    def version(file: pathlib.Path) -> str:
        return storage.file_version(place / file.name) if place else ""

    files = sorted(f for f in directory.iterdir() if f.name == "config.json" or f.suffix == ".safetensors")
    digests = (file_digest(storage.check_inside(directory, file.name), version) for file in files)
    parts = [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _match_tensors(layout: Format, config: Config, leaves: Leaves, checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors to read; ConfigError unless the checkpoint holds all that its config says, in these shapes, and no
    other."""
    tensors = list(layout.tensors(config.model, leaves))
    tables = {tensor.leaf for tensor in tensors if tensor.layer is None and tensor.name in checkpoint}
    shapes = stored_shapes(tensors, leaves)
    for tensor in tensors:
        if tensor.name not in checkpoint:
            if not tensor.leaf or tensor.leaf in tables:  # zeros, or a table that stands under another name
                continue
            raise ConfigError(f"{checkpoint.directory} lacks {tensor.name}, which its config.json asks for")
        wanted, found = shapes[tensor.name], checkpoint.shape(tensor.name)
        if tensor.leaf and found != wanted:
            raise ConfigError(f"{tensor.name} of {checkpoint.directory} is {found}, its config.json says {wanted}")
    if others := sorted(checkpoint.names() - set(shapes)):
        raise ConfigError(
            f"{checkpoint.directory} holds {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}, which a "
            f"model of its config.json does not have"
        )
    return [tensor for tensor in tensors if tensor.name in checkpoint]


def _read_leaf(
    shape: tuple[int, ...], abstract: Any, parts: dict[int | None, list[Tensor]], checkpoint: Checkpoint
) -> Array:
    """Reads a parameter of `shape` onto its devices; one of stacked layers is filled layer by layer."""
    sharding = abstract.sharding
    if None in parts:
        return _place(shape, abstract, parts[None], checkpoint)
    own = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    of_layer = jax.ShapeDtypeStruct(abstract.shape[1:], abstract.dtype, sharding=own)
    value = _zeros(abstract.shape, abstract.dtype, sharding.spec)
    for layer, tensors in parts.items():
        value = _set_layer(value, _place(shape[1:], of_layer, tensors, checkpoint), layer)
    return value


def _place(shape: tuple[int, ...], like: Any, tensors: list[Tensor], checkpoint: Checkpoint) -> Array:
    """Reads an array of `shape` onto its devices, each of which reads its own part; behind it are zeros where `like`,
    an abstract array, is larger."""

    def read(index: Any) -> np.ndarray:
        if tensors[0].expert is None:
            return _read_part(tensors[0], index, checkpoint)
        experts: slice = index[0]
        return np.stack([_read_part(tensor, index[1:], checkpoint) for tensor in tensors[experts]])

    def shard(index: Any) -> np.ndarray:
        here = [len(range(n)[wanted]) for n, wanted in zip(like.shape, index, strict=True)]
        there = tuple(slice(*wanted.indices(n)) for n, wanted in zip(shape, index, strict=True))
        if any(wanted.start >= wanted.stop for wanted in there):
            return np.zeros(here, np.float32)
        part = read(there)
        return np.pad(part, [(0, size - found) for size, found in zip(here, part.shape, strict=True)])

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def _read_part(tensor: Tensor, index: Index, checkpoint: Checkpoint) -> np.ndarray:
    """Reads a part of a parameter, and no more than it."""
    turned = tensor.transposed or tensor.depthwise
    index = index[::-1] if turned else index
    if rows := tensor.rows:
        wanted: slice = index[0]
        own = range(rows.start, rows.stop)[wanted]
        index = (slice(own.start, own.stop), *index[1:])
    if tensor.depthwise:
        return np.ascontiguousarray(checkpoint.read(tensor.name, (index[0], slice(None), index[1]))[:, 0].T)
    value = checkpoint.read(tensor.name, index)
    return np.ascontiguousarray(value.T) if turned else value


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, spec: P) -> Array:
    return jnp.zeros(shape, dtype, out_sharding=spec)


@jax.jit(donate_argnums=0)
def _set_layer(value: Array, part: Array, layer: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(value, part, layer, 0)
