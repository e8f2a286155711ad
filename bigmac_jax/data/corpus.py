"""Opens the documents of a split, whatever their source."""

import dataclasses
from collections.abc import Iterator, Mapping

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.config.mixture import parse_mixture
from bigmac_jax.data.datasets import DATASET, TfdsDocuments
from bigmac_jax.data.documents import Content, Documents, ReadCounts, Unit
from bigmac_jax.data.files import json_digest
from bigmac_jax.data.hub import HUB, open_hub
from bigmac_jax.data.local_files import FileDocuments, find_files
from bigmac_jax.data.splits import SPLITS
from bigmac_jax.data.text_field import TextField

MIXTURE = "data.mixture"


def open_documents(data: DataConfig, split: str, cache_dir: str, setting: str = "data.source") -> Documents:
    """Opens the documents of `split` (train, validation or test); of a mixture, those of all its sources.

    data.validation_source and data.test_source replace that split of data.source; from files, a split without a source
    of its own is held out of the text (`splits`). Data sets are prepared under `cache_dir` if they are not yet. In
    messages `setting` names data.source.

    Raises:
      ConfigError: a source that is not there, cannot be read, or has no such split. Broken lines and a split
        without documents raise it during iteration.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    parts = configs_by_source(data, split)
    if len(parts) > 1:
        return JoinedDocuments({name: open_documents(part, split, cache_dir, MIXTURE) for name, part in parts.items()})
    (data,) = parts.values()
    own = {"validation": data.validation_source, "test": data.test_source}
    source, setting = (own[split], f"data.{split}_source") if own.get(split) else (data.source, setting)
    if source == "sotu" or source.startswith(DATASET):
        return TfdsDocuments(source, setting, split, data.text_field, cache_dir)
    held_out = () if own.get(split) else tuple(name for name, path in own.items() if not path)
    field = TextField(data.text_field, data.null_rows == "skip")
    if source.startswith(HUB):
        # A source of its own is read as a whole: its training split.
        return open_hub(source, setting, field, "train" if own.get(split) else split, cache_dir, held_out)
    return FileDocuments(source, setting, find_files(source, setting), field, split, cache_dir, held_out)


def has_splits(source: str) -> bool:
    """Whether a source is a data set, which has splits of its own."""
    return source == "sotu" or source.startswith((DATASET, HUB))


def configs_by_source(data: DataConfig, split: str) -> dict[str, DataConfig]:
    """Splits a mixture's config into one for each source, by name; one named "" if the split has a single source."""
    parts = () if getattr(data, f"{split}_source", "") else parse_mixture(data.mixture)
    one = dataclasses.replace(data, mixture="", curriculum="")
    return {part.name: dataclasses.replace(one, source=part.source) for part in parts} or {"": one}


def join_fingerprints(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint of several sources, names included: how far a run has read is kept by name."""
    if len(fingerprints) == 1:
        return next(iter(fingerprints.values()))
    return json_digest(sorted(fingerprints.items()))


class JoinedDocuments(Documents):
    """The documents of several sources."""

    def __init__(self, parts: Mapping[str, Documents]):
        self._parts = parts
        self.name = " and ".join(docs.name for docs in parts.values())
        self.size = sum(docs.size for docs in parts.values())
        self.fix = "choose other sources"

    @property
    def fingerprint(self) -> str:
        return join_fingerprints({name: docs.fingerprint for name, docs in self._parts.items()})

    def fingerprint_by(self, rule: str) -> str:
        return join_fingerprints({name: docs.fingerprint_by(rule) for name, docs in self._parts.items()})

    def read(self, unit: Unit, counts: ReadCounts) -> Iterator[tuple[str, Content, bool]]:
        raise NotImplementedError("each source reads its own")

    def all_pieces(self) -> Iterator[tuple[str, bool]]:
        for docs in self._parts.values():
            yield from docs.all_pieces()

    def all_text(self) -> Iterator[str]:
        """Yields pieces of the sources in turn, by bytes; a source may be one document of many pieces."""
        streams = {name: docs.all_text() for name, docs in self._parts.items()}
        shares = dict.fromkeys(streams, 0.0)  # of each source, how much was read
        while shares:
            name = min(shares, key=shares.__getitem__)
            piece = next(streams[name], None)
            if piece is None:
                del shares[name]
                continue
            yield piece
            shares[name] += len(piece) / max(1, self._parts[name].size)
