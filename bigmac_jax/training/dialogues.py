"""What a run keeps of how dialogues are written, and whether it goes on with that."""

import pathlib
from collections.abc import Mapping

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_files import SETTINGS_FILE, TEMPLATE_FILE, ChatFiles, read_chat
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import Stream
from bigmac_jax.training.workdir import run_of

_ROWS = "rows"  # of a split, as they are encoded


def run_chat(config: Config, stream: Stream) -> ChatFiles:
    """What a run keeps of the dialogues of its model, also where it is trained on text."""
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


def rows_of(streams: Mapping[str, Stream | None]) -> dict[str, str]:
    """Fingerprints of conversations as they are encoded, by name; `streams`: by split."""
    return {f"{split} {_ROWS}": s.rows for split, s in streams.items() if isinstance(s, Conversations)}


def check_rows(workdir: pathlib.Path, rows: Mapping[str, str]) -> None:
    """Raises ConfigError if a run would go on with other tokens of the same text. `rows`: as of `rows_of`."""
    known = run_of(workdir)["data"]
    for name, digest in rows.items():
        if known.get(name, digest) != digest:
            raise ConfigError(
                f"the {name} are other tokens than this workdir was started with, though their text is the same: the "
                f"chat template or special tokens have changed; bring back {TEMPLATE_FILE} and {SETTINGS_FILE} of the "
                f"workdir, or use a new --workdir"
            )
