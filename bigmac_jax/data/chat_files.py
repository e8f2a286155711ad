"""The files that say how a model's dialogues are written: a chat template, and the names of special tokens."""

import json
import pathlib
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime.storage import check_inside, errors, locate, reason

TEMPLATE_FILE = "chat_template.jinja"  # beside a tokenizer, and in the workdir of a run
SETTINGS_FILE = "tokenizer_config.json"  # likewise; in a workdir it has all of `ChatFiles` but the template
_SPECIAL, _DATE = ("bos_token", "eos_token", "pad_token", "unk_token"), "strftime_now"
_SPLITS, _ENDS = "split_special_tokens", "eos_token_id"


class ChatFiles(NamedTuple):
    """The content of such files."""

    template: str = ""
    special: dict[str, str] = {}  # noqa: RUF012  nobody changes it; bos_token and the like
    place: str = ""  # where the template was found
    date: str = ""  # ISO, what strftime_now gives when a run reads its rows; "" = now
    ends: tuple[int, ...] = ()  # the eos_token_id of the model's config.json
    splits: bool = True  # whether text that holds a special token's name is text for transformers' tokenizer, too


NO_CHAT = ChatFiles()


def read_chat_folder(folder: pathlib.Path) -> ChatFiles:
    """Reads chat_template.jinja and tokenizer_config.json of a folder; either may be missing. Raises ConfigError for
    one that cannot be read, or is a link to something outside of the folder."""
    settings = _read_settings(folder, SETTINGS_FILE)
    special = {}
    for name in _SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            special[name] = value
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        defaults = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(defaults, {}).get("template")
    splits = bool(settings.get(_SPLITS)) if (folder / SETTINGS_FILE).is_file() else True
    found = ChatFiles("", special, "", str(settings.get(_DATE, "")), _find_ends(settings), splits)
    if (folder / TEMPLATE_FILE).is_file():  # transformers, too, takes it first
        file = check_inside(folder, TEMPLATE_FILE)
        return found._replace(template=_read_template(file, str(folder / TEMPLATE_FILE)), place=str(file))
    if isinstance(template, str) and template:
        return found._replace(template=template, place=str(folder / SETTINGS_FILE))
    return found


def read_chat(file: str, tokenizer_file: str, setting: str) -> ChatFiles:
    """Reads a Jinja file, or a folder as `read_chat_folder` does, and what stands beside the tokenizer's file. The
    template is that of the first that has one; special tokens are rather those beside the tokenizer, and the ends are
    its model's. Raises ConfigError for a file that cannot be read, or a folder without a template; `setting` names
    `file` there."""
    own = beside = NO_CHAT
    if tokenizer_file.endswith((".json", ".model")):
        folder = locate(tokenizer_file, "data.tokenizer").parent
        beside = read_chat_folder(folder)
        beside = beside._replace(ends=beside.ends or _find_ends(_read_settings(folder, "config.json")))
    if file:
        path = locate(file, setting)
        if path.is_dir():
            own = read_chat_folder(path)._replace(date="")  # another run's
            if not own.template:
                raise ConfigError(
                    f"{setting}={file} holds neither {TEMPLATE_FILE} nor a {SETTINGS_FILE} with a chat template"
                )
        else:
            template = _read_template(path, f"{setting}={file}")
            own = read_chat_folder(path.parent)._replace(template=template, place=file)
    found = own if own.template else beside
    special = beside.special or own.special
    return ChatFiles(found.template, special, found.place, own.date, beside.ends, beside.splits)


def format_chat_files(files: ChatFiles) -> dict[str, bytes]:
    """Name → content of the files from which `read_chat_folder` reads the same; none if there is nothing to say."""
    if files == NO_CHAT:
        return {}
    values: dict[str, Any] = {**files.special, **format_splits(files)}
    values |= {_DATE: files.date} if files.date else {}
    values |= {_ENDS: list(files.ends)} if files.ends else {}
    settings = {SETTINGS_FILE: (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()}
    return settings | ({TEMPLATE_FILE: files.template.encode()} if files.template else {})


def format_splits(files: ChatFiles) -> dict[str, bool]:
    """The field by which transformers' tokenizer cuts special tokens' names in a text into letters. With a chat
    template it is left out: transformers encodes what the template writes as one text."""
    return {_SPLITS: True} if files.splits and not files.template else {}


def _read_settings(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The JSON object of a file; {} if there is none."""
    if not (folder / name).is_file():
        return {}
    file = check_inside(folder, name)
    try:
        settings = json.loads(file.read_bytes())
    except errors(ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({reason(error)}); mend it, or remove it") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / name} holds no JSON object; mend it, or remove it")
    return settings


def _find_ends(settings: dict[str, Any]) -> tuple[int, ...]:
    """The tokens of eos_token_id, which is a number, a list, or null; a negative one means none."""
    value = settings.get(_ENDS)
    return tuple(i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0)


def _read_template(file: pathlib.Path, name: str) -> str:
    try:
        return file.read_text().removeprefix("\ufeff")
    except errors(UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({reason(error)}); give a Jinja file") from None
