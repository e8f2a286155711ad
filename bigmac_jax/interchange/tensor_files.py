"""A directory of safetensors files: written shard by shard, read tensor by tensor."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bigmac_jax.config import ConfigError, read_object
from bigmac_jax.config.names import ask
from bigmac_jax.runtime import signals, storage

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_STORED = ("F32", "BF16", "F16")  # what a float32 parameter can be read from
Index = tuple[Any, ...]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Spec(NamedTuple):
    """Name, shape and dtype of a tensor that is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_dtype(name: str) -> np.dtype[Any]:
    """The dtype that --dtype names."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype={name} must be one of {', '.join(DTYPES)}{ask(name, list(DTYPES))}")
    return DTYPES[name]


def parse_size(text: str) -> int:
    """The bytes that '5GB', '200MB' or '4096' means."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"--max_shard_size={text} must be a size such as 5GB or 200MB")
    return size


def split_shards(specs: Iterable[Spec], most: int) -> list[list[Spec]]:
    """Divides tensors into shards of at most `most` bytes, in order; one that is larger is a shard of its own."""
    shards: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    return shards


def write_shards(directory: pathlib.Path, shards: Sequence[Sequence[Spec]], tensors: Iterator[np.ndarray]) -> None:
    """Writes tensors, which come in the order of their specs; memory holds one shard of them at a time."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for spec in shard:
            value = np.ascontiguousarray(next(tensors), dtype=spec.dtype)
            assert value.shape == spec.shape, (spec, value.shape)
            values[spec.name] = value
        # transformers asks for the format; torch's layout is numpy's.
        save_file(values, directory / file, metadata={"format": "pt"})
        os.chmod(directory / file, (directory.stat().st_mode & 0o666))  # it is made for its owner alone
        weight_map |= dict.fromkeys(values, file)
    if len(shards) > 1:
        total = sum(spec.bytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def write_json(file: pathlib.Path, values: dict[str, Any]) -> None:
    file.write_bytes((json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def check_new(output: pathlib.Path) -> None:
    """Raises ConfigError if `output` is there already, unless it is an empty directory."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output={output} is there already; remove it, or give another one")


@contextlib.contextmanager
def whole_or_nothing(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside `output` that becomes it at the end, and is removed if something goes wrong. If the output is
    on a store, the directory is on this machine, and its config.json is sent last.

    Raises:
      ConfigError: `output` is there already, or cannot be written.
    """
    check_new(output)
    on_store = storage.is_store(output)
    place = pathlib.Path(tempfile.mkdtemp()) if on_store else output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        with signals.undo_on_signal(lambda: shutil.rmtree(place, ignore_errors=True)):
            place.mkdir(parents=True, exist_ok=on_store)
            yield place
            if on_store:
                storage.send_tree(place, output, last="config.json")
            else:
                os.replace(place, output)
    except storage.errors(SafetensorError) as error:
        raise ConfigError(f"--output={output} cannot be written ({storage.reason(error)}); give another one") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


class Checkpoint:
    """The tensors of a directory with model.safetensors, or else shards and their index. Nothing is read before it is
    asked.

    Raises:
      ConfigError: there is none, or a file is missing, cut short or damaged.
    """

    def __init__(
        self, directory: pathlib.Path, split_stored: Callable[[str, tuple[int, ...]], Iterator[tuple[str, Index]]]
    ):
        self.directory = directory
        self.left_out: list[str] = []  # stored tensors that are not asked for
        self._where: dict[str, tuple[str, Any, Index]] = {}  # name → the stored tensor's name, it, and the part of it
        for path in self._paths():
            try:
                file = safe_open(path, framework="numpy")
                for stored in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(stored)
                    parts = split_stored(stored, tuple(tensor.get_shape()))
                    self._where |= {name: (stored, tensor, part) for name, part in parts}
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{path} is not a whole safetensors file ({storage.reason(error)}); copy it again"
                ) from None

    def _paths(self) -> list[pathlib.Path]:
        if (self.directory / _SINGLE).is_file():  # as in transformers, which leaves an old index beside what it saves
            return [storage.check_inside(self.directory, _SINGLE)]
        index = self.directory / INDEX
        if not index.is_file():
            raise ConfigError(f"{self.directory} holds neither {_SINGLE} nor {INDEX}; give another --checkpoint")
        weight_map = read_object(storage.check_inside(self.directory, INDEX), "copy it again").get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names:
            raise ConfigError(f"{index} has no weight_map; copy it again")
        there = {path.name for path in self.directory.iterdir() if path.is_file()}
        if missing := sorted(names - there):
            raise ConfigError(f"{self.directory} lacks {missing[0]}, which {INDEX} names; copy it again")
        return [storage.check_inside(self.directory, name) for name in sorted(names)]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        return set(self._where)

    def leave_out(self, prefix: str) -> None:
        """Forgets the tensors whose names begin like this."""
        names = [name for name in self._where if name.startswith(prefix)]
        self.left_out += dict.fromkeys(self._where.pop(name)[0] for name in names)

    def shape(self, name: str) -> tuple[int, ...]:
        _, tensor, part = self._where[name]
        shape = tensor.get_shape()
        sizes = [len(range(size)[entry]) for size, entry in zip(shape, part, strict=False) if isinstance(entry, slice)]
        return (*sizes, *shape[len(part) :])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or the part of it that slices take, in float32."""
        _, tensor, part = self._where[name]
        if tensor.get_dtype() not in _STORED:
            raise ConfigError(f"{name} is {tensor.get_dtype()}; only {', '.join(_STORED)} can be imported")
        if part:
            return np.asarray(tensor[part], np.float32)[index]
        return np.asarray(tensor[index or (slice(None),)], np.float32)
