"""TFDS datasets made here, found by name once this module is imported."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Two configs; a train and a test split, no validation."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="loud")]  # noqa: RUF012
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"body": tfds.features.Text(), "number": np.int32}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(30), "test": self._generate_examples(3)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            text = f"document {i} é"
            yield i, {"body": text.upper() if self.builder_config.name == "loud" else text, "number": i}


class NeedsTensorflow(TinyText):
    BUILDER_CONFIGS = []  # noqa: RUF012

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise ImportError("No module named 'tensorflow'")


class NotThere(NeedsTensorflow):
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise ConnectionError("Failed to resolve\n'host'")
