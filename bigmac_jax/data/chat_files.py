"""The files that say how a model's dialogues are written: a chat template, and the names of special tokens."""

import json
import pathlib
from typing import NamedTuple

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime.storage import check_inside, errors, locate, reason

TEMPLATE_FILE = "chat_template.jinja"  # beside a tokenizer, and in the workdir of a run
SETTINGS_FILE = "tokenizer_config.json"  # likewise; in a workdir it has special tokens, and the date of a run's rows
_SPECIAL, _DATE = ("bos_token", "eos_token", "pad_token", "unk_token"), "strftime_now"


class ChatFiles(NamedTuple):
    """The content of such files."""

    template: str = ""
    special: dict[str, str] = {}  # noqa: RUF012  nobody changes it; bos_token and the like
    place: str = ""  # where the template was found
    date: str = ""  # ISO, what strftime_now gives when a run reads its rows; "" = now


NO_CHAT = ChatFiles()


def read_chat_folder(folder: pathlib.Path) -> ChatFiles:
    """Reads chat_template.jinja and tokenizer_config.json of a folder; either may be missing. Raises ConfigError for
    one that cannot be read, or is a link to something outside of the folder."""
    settings = {}
    if (folder / SETTINGS_FILE).is_file():
        file = check_inside(folder, SETTINGS_FILE)
        try:
            settings = json.loads(file.read_bytes())
        except errors(ValueError, RecursionError) as error:
            raise ConfigError(f"{file} cannot be read ({reason(error)}); mend it, or remove it") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / SETTINGS_FILE} holds no JSON object; mend it, or remove it")
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
    date = str(settings.get(_DATE, ""))
    if (folder / TEMPLATE_FILE).is_file():  # transformers, too, takes it first
        file = check_inside(folder, TEMPLATE_FILE)
        return ChatFiles(_read_template(file, str(folder / TEMPLATE_FILE)), special, str(file), date)
    if isinstance(template, str) and template:
        return ChatFiles(template, special, str(folder / SETTINGS_FILE), date)
    return ChatFiles("", special, "", date)


def read_chat(file: str, tokenizer_file: str, setting: str) -> ChatFiles:
    """Reads a Jinja file, or a folder as `read_chat_folder` does, and what stands beside the tokenizer's file. The
    template is that of the first that has one; special tokens are rather those beside the tokenizer. Raises ConfigError
    for a file that cannot be read, or a folder without a template; `setting` names `file` there."""
    own = beside = NO_CHAT
    if tokenizer_file.endswith((".json", ".model")):
        beside = read_chat_folder(locate(tokenizer_file, "data.tokenizer").parent)
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
    return ChatFiles(found.template, beside.special or own.special, found.place, own.date)


def format_chat_files(files: ChatFiles) -> dict[str, bytes]:
    """Name → content of the files from which `read_chat_folder` reads the same; none if there is nothing to say."""
    if not (files.template or files.special):
        return {}
    values = files.special | ({_DATE: files.date} if files.date else {})
    settings = {SETTINGS_FILE: (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()}
    return settings | ({TEMPLATE_FILE: files.template.encode()} if files.template else {})


def _read_template(file: pathlib.Path, name: str) -> str:
    try:
        return file.read_text().removeprefix("\ufeff")
    except errors(UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({reason(error)}); give a Jinja file") from None
