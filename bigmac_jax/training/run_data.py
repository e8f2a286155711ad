"""Checks that a run goes on with the text, tokens and chat template of its first start, which run.json records."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping

from bigmac_jax.config import Config, ConfigError, DataConfig
from bigmac_jax.data.chat_files import SETTINGS_FILE, TEMPLATE_FILE, ChatFiles, read_chat
from bigmac_jax.data.conversations import Conversations, RefusedRowError
from bigmac_jax.data.corpus import has_splits, open_documents
from bigmac_jax.data.documents import log_once
from bigmac_jax.data.pipeline import Stream, open_stream
from bigmac_jax.data.splits import EARLIER_RULES
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.runtime import hosts
from bigmac_jax.training.workdir import read_config, read_run_json, use_saved_template

_log = logging.getLogger(__name__)
# Fields that name where data lies; they may change as long as what lies there does not.
_PLACES = {"train": "source", "tokenizer": "tokenizer", "validation": "validation_source"}
_ROWS = "rows"  # of a split, as they are encoded


def check_data(workdir: pathlib.Path, config: Config, data: dict[str, str]) -> None:
    """Checks that a run goes on with the data that it was started with, wherever that lies now.

    Args:
      data: fingerprints by name.

    Raises:
      ConfigError: it would not, or can't be told because run.json does not have a fingerprint.
    """
    saved, known = read_config(workdir).data, read_run_json(workdir)["data"]
    for place in ("validation_source", "test_source"):
        before, now = getattr(saved, place), getattr(config.data, place)
        if bool(before) != bool(now):
            # What has no source of its own is held out of data.source, which is then another text.
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and decides what "
                f"is held out of data.source; keep {before!r}, or use a new --workdir"
            )
    for name, place in _PLACES.items():
        before, now = getattr(saved, place), getattr(config.data, place)
        if name in known and name in data:
            if known[name] != data[name] and (name == "tokenizer" or not _is_text(known[name], config, name)):
                text = f"data.{_main_place(config.data)}={getattr(config.data, _main_place(config.data))}"
                where = text if name == "train" else f"the {name} split of {text}"
                where = f"data.{place}={now}" if now and name != "train" else where
                raise ConfigError(
                    f"{where} holds other data than this workdir was started with; bring that back, or use a new "
                    f"--workdir"
                )
        elif before != now and not (name == "validation" and name not in data):
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and its run.json "
                f"has nothing to compare the data by; keep {before!r}, or use a new --workdir"
            )


def check_split(workdir: pathlib.Path, config: Config, split: str) -> None:
    """Raises ConfigError if a split of the run's data holds other text than when the run was trained."""
    known, data, name = read_run_json(workdir)["data"], config.data, split
    if split not in known and not getattr(data, f"{split}_source", ""):
        name = "train"  # which it was held out of
    if name in known and not _is_text(known[name], config, name):
        place = _place_of(data, split)
        raise ConfigError(
            f"data.{place}={getattr(data, place)} holds other data than {workdir} was trained with, so its {split} "
            f"split is another; bring that back, or score a text with --text_file"
        )


def _is_text(known: str, config: Config, split: str) -> bool:
    """Whether a split has the fingerprint `known`, or had it by an earlier rule of what is held out; of that, a line
    warns."""
    docs = open_documents(config.data, split, config.cache_dir)
    if known != docs.fingerprint and known in map(docs.fingerprint_by, EARLIER_RULES):
        log_once(
            logging.WARNING,
            f"{docs.name} is cut by a newer rule than the run was started with: of one or two texts, those with copies "
            f"or with lines that end in \\r\\n are cut elsewhere, and none of two is held out as a whole",
        )
        return True
    return known == docs.fingerprint


def open_run_stream(workdir: pathlib.Path, config: Config, split: str, tokenizer: Tokenizer) -> Stream:
    """Opens the tokens of a split of the run's data.

    Raises:
      ConfigError: it is not there any more, or holds other text than when the run was trained.
    """
    check_split(workdir, config, split)
    config = use_saved_template(workdir, config)
    if f"{split} {_ROWS}" not in read_run_json(workdir)["data"]:  # which the run has never read: nobody mended its rows
        tuning = dataclasses.replace(config.tuning, bad_rows="skip")
        return open_stream(dataclasses.replace(config, tuning=tuning), split, tokenizer)
    with rows_of_run(workdir):
        return open_stream(config, split, tokenizer)


@contextlib.contextmanager
def rows_of_run(workdir: pathlib.Path) -> Iterator[None]:
    """Says of a refused row that it was none when the run began, so that the fix of a new run is none here."""
    try:
        yield
    except RefusedRowError as error:
        raise ConfigError(
            f"{error.what}; it was not so when {workdir} was started: bring the rows back, or, if they are the same, "
            f"go on with the version of {workdir}/run.json, which read them otherwise, or use a new --workdir"
        ) from None


def say_data_place(workdir: pathlib.Path, config: Config, split: str) -> None:
    """Says in a line where a split of the run's data is read, which the workdir's config names."""
    field = _place_of(config.data, split)
    if (place := getattr(config.data, field)) != DataConfig.source and hosts.is_first():
        _log.info("the %s split is read from data.%s=%s, which the config of %s names", split, field, place, workdir)


def fingerprint_held_out(workdir: pathlib.Path, config: Config) -> dict[str, str]:
    """Fingerprints of the held-out splits that have files of their own, which training may not look at. One that
    run.json knows stays the run's: what lies there now may be another text, which evaluation then refuses."""
    found, known = {}, read_run_json(workdir)["data"]
    for split in ("validation", "test"):
        source = getattr(config.data, f"{split}_source")
        if source and split not in known and not has_splits(source):
            with contextlib.suppress(ConfigError):  # evaluation will say what is wrong with it
                found[split] = open_documents(config.data, split, config.cache_dir).fingerprint
    return found


def chat_files(config: Config, stream: Stream) -> ChatFiles:
    """The chat template and special tokens' names that a run keeps, trained on dialogues or on text."""
    if isinstance(stream, Conversations):
        return stream.chat.files
    return read_chat(config.tuning.chat_template, config.data.tokenizer, "tuning.chat_template")


def check_template(workdir: pathlib.Path, files: ChatFiles) -> None:
    """Raises ConfigError if the run has begun with another chat template."""
    own = workdir / TEMPLATE_FILE
    if files.template and own.is_file() and own.read_text() != files.template:
        raise ConfigError(
            f"tuning.chat_template is not {own}, which this workdir was started with; drop it, or use a new --workdir"
        )


def fingerprint_rows(streams: Mapping[str, Stream | None]) -> dict[str, str]:
    """Fingerprints of conversations as they are encoded, by name; `streams` are by split."""
    return {f"{split} {_ROWS}": s.rows for split, s in streams.items() if isinstance(s, Conversations)}


def check_rows(workdir: pathlib.Path, rows: Mapping[str, str]) -> None:
    """Raises ConfigError if a run would go on with other tokens of the same text; `rows` is from `fingerprint_rows`."""
    known = read_run_json(workdir)["data"]
    for name, digest in rows.items():
        if known.get(name, digest) != digest:
            raise ConfigError(
                f"the {name} are other tokens than this workdir was started with, though their text is the same: the "
                f"chat template or special tokens have changed, or an earlier version read rows otherwise; bring back "
                f"{TEMPLATE_FILE} and {SETTINGS_FILE} of the workdir, go on with the version of its run.json, or use a "
                f"new --workdir"
            )


def _main_place(data: DataConfig) -> str:
    return "mixture" if data.mixture else "source"


def _place_of(data: DataConfig, split: str) -> str:
    """The field that names where a split lies."""
    return own if getattr(data, own := f"{split}_source", "") else _main_place(data)
