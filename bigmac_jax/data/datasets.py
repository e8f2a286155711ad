"""Documents from TFDS datasets, the embedded one among them: prepared once as array_record, read without TensorFlow."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import Documents, one_line
from bigmac_jax.data.files import cache_directory, locked

_log = logging.getLogger(__name__)
DATASET = "tfds:"
_FORMAT = "array_record"  # the one format that is read at random, and without TensorFlow


class TfdsDocuments(Documents):
    """The documents of one split of a TFDS dataset, in the order it was prepared in.

    Args:
      source: `sotu`, or `tfds:` and a name that TFDS knows, `NAME`, `NAME/CONFIG` or `NAME:VERSION`; `setting` is the
        config field it came from, for messages.
      split, text_field: which split, and which feature holds the text.
      cache_dir: the dataset is prepared there, unless TFDS's own directory has it prepared already.

    Raises:
      ConfigError: unknown dataset, split or feature; a dataset that cannot be downloaded or prepared here.
    """

    def __init__(self, source: str, setting: str, split: str, text_field: str, cache_dir: str):
        self.setting = f"{setting}={source}"
        self.name = f"{split} split of {self.setting}"
        self.fix = "choose another dataset"
        self.split, self.text_field = split, "text" if source == "sotu" else text_field
        with quiet():
            name = source.removeprefix(DATASET)
            self.builder = _sotu(cache_dir) if source == "sotu" else find_dataset(name, cache_dir, self.setting)
            info = self.builder.info
        if split not in info.splits:
            raise ConfigError(
                f"{self.setting} has no {split} split, only {', '.join(info.splits)}; "
                + ("choose another dataset" if split == "train" else f"set data.{split}_source to a file of text")
            )
        features = list(info.features) if hasattr(info.features, "keys") else []
        if self.text_field not in features:
            raise ConfigError(
                f"data.text_field={self.text_field!r} is not a feature of {self.setting}; "
                f"use one of {', '.join(map(str, features)) or '(it has none by name)'}"
            )
        self.size = int(info.splits[split].num_bytes)

    @functools.cached_property
    def fingerprint(self) -> str:
        info = self.builder.info
        split = info.splits[self.split]
        where = pathlib.Path(self.builder.data_path).parent.parent.name if info.name == "bigmac_sotu" else ""
        key = [info.full_name, where, self.split, list(split.shard_lengths), int(split.num_bytes), self.text_field]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def read(self) -> Iterator[tuple[str, str | bytes, bool]]:
        try:
            rows = self.builder.as_data_source(split=self.split)
            count = len(rows)
        except Exception as error:
            raise ConfigError(self._unreadable(error)) from None
        for number in range(count):
            try:
                content = rows[number][self.text_field]
            except Exception as error:
                raise ConfigError(self._unreadable(error)) from None
            if not isinstance(content, str | bytes):
                raise ConfigError(
                    f"data.text_field={self.text_field!r} of {self.setting} holds {type(content).__name__}, not text; "
                    f"use another feature"
                )
            yield self.setting, content, False

    def _unreadable(self, error: Exception) -> str:
        path = self.builder.data_path
        return f"{self.setting}: {path} cannot be read as {_FORMAT} ({one_line(error)}); delete it to prepare it again"


def _sotu(cache_dir: str) -> Any:
    from bigmac_jax.data import sotu  # here, since TFDS takes its time to import

    root = cache_directory(cache_dir, "tfds", f"sotu-{sotu.package_version()}")
    return _prepared(sotu.BigmacSotu(data_dir=root, file_format=_FORMAT), "data.source=sotu", show=False)


def find_dataset(dataset: str, cache_dir: str, setting: str) -> Any:
    """The builder of a TFDS dataset by its name, prepared; call it inside `quiet`. ConfigError as for the class."""
    import tensorflow_datasets as tfds

    def builder(**where: Any) -> Any:
        try:
            return tfds.builder(dataset, file_format=_FORMAT, **where)
        except tfds.core.DatasetNotFoundError:
            raise ConfigError(
                f"{setting} is not a dataset TFDS knows; check the name, or import its builder first"
            ) from None
        except Exception as error:
            raise ConfigError(f"{setting} cannot be opened ({one_line(error)}); check its name and config") from None

    with contextlib.suppress(ConfigError):
        own = builder()
        if own.is_prepared() and own.info.file_format.value == _FORMAT:
            return own
    return _prepared(builder(data_dir=cache_directory(cache_dir, "tfds")), setting, show=True)


def _prepared(builder: Any, setting: str, show: bool) -> Any:
    """Prepares the dataset unless it is; one process does it while others wait at the lock."""
    if builder.is_prepared():
        return builder
    import tensorflow_datasets as tfds

    version = pathlib.Path(builder.data_path)
    with locked(cache_directory(version.parent) / version.name):
        for left_over in version.parent.glob(f"incomplete.*_{version.name}"):  # of processes that were killed
            shutil.rmtree(left_over, ignore_errors=True)
        if not builder.is_prepared():
            _log.info("%s: preparing in %s", setting, version)
            # Hosted copies are tfrecord files, which could not be read.
            download = tfds.download.DownloadConfig(try_download_gcs=False)
            if not show:
                tfds.disable_progress_bar()
            try:
                with contextlib.redirect_stdout(sys.stderr if show else io.StringIO()):
                    builder.download_and_prepare(download_config=download, file_format=_FORMAT)
            except ImportError as error:
                raise ConfigError(
                    f"{setting} needs a package to be prepared ({one_line(error)}); pip install tensorflow "
                    f"(or that package) once, to prepare it; reading it needs no TensorFlow"
                ) from None
            except Exception as error:
                raise ConfigError(
                    f"{setting} could not be downloaded and prepared ({one_line(error)}); "
                    f"check the network, or prepare it elsewhere and set TFDS_DATA_DIR"
                ) from None
            finally:
                if not show:
                    tfds.enable_progress_bar()
        else:  # by the process that held the lock before us; read what it wrote
            builder.info.read_from_directory(str(version))
    return builder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS prints to stdout, which belongs to results, and warns of each directory that is not there yet."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        absl_logging.set_verbosity(level)
