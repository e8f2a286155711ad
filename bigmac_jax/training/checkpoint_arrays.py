"""Writes and reads the arrays of a checkpoint. Behind each chunk lies its CRC-32C, which every reader compares."""

import functools
import json
import os
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bigmac_jax.config import ConfigError
from bigmac_jax.model.parameters import leaf_name, map_declared
from bigmac_jax.model.resident import in_host, take_layer
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.storage import UNREADABLE_NOW, is_store

_PADDED = "padded"  # the key in a checkpoint's item `run`
CHECKSUM: list[dict[str, Any]] = [{"name": "crc32c"}]
# TensorStore's errors about contents; on a store, others may be its own trouble, which passes.
_ABOUT_CONTENTS = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
_STATUS = re.compile(r"([A-Z_]{5,}): ")


class DamagedError(Exception):
    """A checkpoint can't be read; the message says in a few words what is wrong with it.

    Args:
      step: of the checkpoint, where it is not the one that was asked for.
    """

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


def write_checksums() -> None:
    """Makes Orbax write arrays with Zarr's own checksums, for which it has no option: one of its private functions is
    replaced, here alone.

    Raises:
      RuntimeError: this Orbax describes the arrays that it writes by another function.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    def describe(global_shape: tuple[int, ...], chunk_shape: tuple[int, ...], use_compression: bool) -> dict[str, Any]:
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        codecs += [{"name": "zstd", "configuration": {"level": 1}}] if use_compression else []
        codecs += CHECKSUM  # of what the others made, so of every byte that is written
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
        return {"shape": global_shape, "chunk_grid": grid, "codecs": codecs}

    tensorstore_utils._build_zarr3_metadata = describe
    written = tensorstore_utils.ArrayWriteSpec(
        "/", "w", global_shape=(1,), write_shape=(1,), dtype=np.dtype("float32"), use_zarr3=True, use_ocdbt=True
    ).json
    if written["metadata"] != describe((1,), (1,), use_compression=True):
        raise RuntimeError(
            f"Orbax {ocp.__version__} would write arrays without checksums: it does not describe them by "
            f"tensorstore_utils._build_zarr3_metadata any more; install one that pyproject.toml names"
        )


def array_handlers(*items: str) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Handlers of the items of a checkpoint that hold arrays; those of others are Orbax's."""
    write_checksums()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_zarr3=True))
    return registry


def read_arrays(directory: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays of a checkpoint by item, sharded as `abstract`: each process what its devices get, once.

    Raises:
      DamagedError: in all processes, if one of them found chunks that differ from their checksums, or are gone.
    """
    found, damage = {}, ""
    with hosts.raise_together():
        try:
            for item, tree in abstract.items():
                # Not strict: another mesh may have other zeros behind a parameter, or none; `check_shapes` is.
                wanted = ocp.checkpoint_utils.construct_restore_args(tree, strict=False)
                how = ocp.args.PyTreeRestore(item=tree, restore_args=wanted)
                found[item] = ocp.PyTreeCheckpointHandler().restore(directory / item, args=how)
        except Exception as error:
            _silence_dropped_reads()
            damage = _describe_damage(error, is_store(directory))
            if not damage:
                if code := os_code(error):
                    raise OSError(code, os.strerror(code), str(directory)) from error
                raise
    if damage := next(filter(None, hosts.gather(damage)), ""):
        raise DamagedError(damage)
    return found


def find_nonfinite(tree: Any) -> str:
    """The name of the first array that holds NaN or infinity; "" if none does. All processes must call it."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    here = [(path, leaf) for path, leaf in paths if not in_host(leaf)]
    finite = jax.device_get(_are_finite([leaf for _, leaf in here]))
    if bad := next((leaf_name(path) for (path, _), good in zip(here, finite, strict=True) if not good), ""):
        return bad
    # A device looks at one layer of what stands in host memory at a time.
    layers = ((path, take_layer(leaf, layer)) for path, leaf in paths if in_host(leaf) for layer in range(len(leaf)))
    return next((leaf_name(path) for path, layer in layers if not jax.device_get(_are_finite([layer]))[0]), "")


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _describe_damage(error: BaseException | None, store: bool) -> str:
    """What TensorStore says of contents that it could not read; "" if the error is another."""
    cause = error
    while cause is not None:
        status = _STATUS.match(text := str(cause))
        # Of this process or its devices: memory, open files, rights.
        if isinstance(cause, MemoryError) or "RESOURCE_EXHAUSTED" in text or os_code(cause) in UNREADABLE_NOW:
            return ""
        if status and (status[1] in _ABOUT_CONTENTS or not store):
            name = re.search(r'Error reading "([^"]*?)(?:/c[\d/]*)?"', text)
            how = "has changed (CRC-32C)" if "igest mismatch" in text else f"cannot be read ({text[:200]})"
            return f"{name[1] if name else 'an array'} {how}"
        cause = cause.__cause__ or cause.__context__
    return ""


def os_code(error: BaseException) -> int:
    """The errno that TensorStore gives at the end of a long line; 0 if it gives none."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else 0


@functools.cache
def _silence_dropped_reads() -> None:
    """Hides the tracebacks that Python prints of reads under way, which Orbax drops when another one fails."""
    say = sys.unraisablehook

    def hear(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if "orbax" not in getattr(code, "co_filename", "") and "Event loop is closed" not in str(unraisable.exc_value):
            say(unraisable)

    sys.unraisablehook = hear


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's arrays by name, as they stand."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(keys).split(".", 1)[1]: tuple(leaf.shape) for keys, leaf in paths}


def _declared_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return _shapes(map_declared(lambda of, w: jax.ShapeDtypeStruct(of.unpadded(w.shape), w.dtype), tree))


def describe_padding(model: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's item `run` says of a model that mesh.fsdp has put zeros behind: the shapes without them."""
    held, declared = _shapes(model), _declared_shapes(model)
    found = {name: list(shape) for name, shape in declared.items() if shape != held[name]}
    return {_PADDED: found} if found else {}


def check_shapes(directory: pathlib.Path, step: int, abstract: dict[str, Any]) -> None:
    """Raises ConfigError if a checkpoint's model has other shapes than `abstract`; it names the first difference."""
    folder = directory / str(step)
    padded = json.loads((folder / "run" / "metadata").read_bytes()).get(_PADDED, {})
    saved = _shapes(ocp.PyTreeCheckpointHandler().metadata(folder / "model").tree)
    saved |= {name: tuple(shape) for name, shape in padded.items()}
    wanted = _declared_shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            has, needs = (list(s[name]) if name in s else "none" for s in (saved, wanted))
            raise ConfigError(
                f"checkpoint {step} of {directory} is of another model: its {name} is {has}, the config asks "
                f"for {needs}; use the config.json it was trained with"
            )
