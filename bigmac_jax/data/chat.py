"""Chat templates: messages to text to tokens, and which of these are an answer.

A template is Jinja as transformers has it (`apply_chat_template`): sandboxed, with its globals, filters and the tags
{% generation %} … {% endgeneration %} around what the assistant writes. Training and serving both encode here, and in
the same pieces: an answer begins with a token of its own, as it does when a model writes it.
"""

import datetime
import itertools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import once
from bigmac_jax.data.tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, Tokenizer
from bigmac_jax.storage import errors, locate, reason, within

FILE = "chat_template.jinja"  # beside a tokenizer, and in the workdir of a run
SETTINGS = "tokenizer_config.json"  # likewise; there it has special tokens' names, and the date of a run's rows
_SPECIAL, _DATE = ("bos_token", "eos_token", "pad_token", "unk_token"), "strftime_now"
# Of a model that was tuned without a template of its own.
DEFAULT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant:{% generation %} {{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}{{ message.role | capitalize }}: {{ message.content }}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Of one that was never tuned, and knows dialogues like this from its texts.
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
ROLES = ("system", "developer", "user", "assistant")
_BEGIN, _END = "\ufdd0", "\ufdd1"  # no characters, by Unicode's own word: they mark answers in what is rendered
_ANSWER = "\ufdd2"  # of the same kind: stands for an answer
Messages = Sequence[dict[str, str]]


class ChatError(ValueError):
    """Messages that a template does not take, as one line; `index` is the message that is wrong, if one is."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(" ".join(message.split()))
        self.index = index


class Piece(NamedTuple):
    text: str
    answer: bool


class ChatFiles(NamedTuple):
    """What files say of a model's dialogues.

    Attributes:
      special: bos_token and the like, by these names.
      place: of the template, "" without one.
      date: ISO, of what strftime_now gives where a run reads its rows; "" = now.
    """

    template: str = ""
    special: dict[str, str] = {}  # noqa: RUF012  nobody changes it
    place: str = ""
    date: str = ""


NO_CHAT = ChatFiles()


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class Chat:
    """A template with a tokenizer.

    Args:
      special: what the template calls eos_token and the like, if it is a special token of the tokenizer; the
        tokenizer's end of text without it.
      date: ISO, of what strftime_now gives; now without it.

    Attributes:
      files: what it is made of.
      end: the end of text, by its name.
      stop: the special token that ends an answer, where that is another one; else nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str = DEFAULT, special: dict[str, str] | None = None, date: str = ""
    ):
        self.template, self.files = template, ChatFiles(template, special or {}, date=date)
        self._encode_batch, self._names = _encoder(tokenizer)
        self.end = self._names[0]
        known = {name: value for name, value in (special or {}).items() if self.knows(value)}
        self._special = {"eos_token": self.end, "bos_token": "", "pad_token": self.end} | known
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, _DATE: self._date}
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not Jinja ({error}); fix it, or give another one") from None
        self._marks = "endgeneration" in template
        self.stop = self._stop()

    def knows(self, name: str) -> bool:
        """Whether it is a special token."""
        return name in self._names

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts in which special tokens stand by their names."""
        return self._encode_batch(texts)

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens that an answer follows; raises ChatError."""
        pieces = self.pieces(messages, prompt=True)
        return [token for ids in self.encode_batch([piece.text for piece in pieces]) for token in ids]

    def pieces(self, messages: Messages, prompt: bool = False) -> list[Piece]:
        """The text of messages, cut where answers begin and end.

        An answer is what the template's generation tags enclose. Without them it is what a message of the assistant
        adds to the prompt for it, up to the last special token of that.

        Args:
          prompt: the beginning of a further answer stands at the end.

        Raises:
          ChatError: an unknown role, a special token in a message, or messages that the template does not take.
        """
        self._check(messages)
        text = self._render(messages, prompt)
        if self._marks:
            parts = re.split(f"[{_BEGIN}{_END}]", text)
            return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]
        cuts = [0]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not (after.startswith(before) and text.startswith(after)):
                if prompt:  # who asks wants an answer, however the turns before it were cut
                    return [Piece(text, False)]
                raise ChatError(
                    "the chat template writes a turn otherwise when others follow it; put {% generation %} and "
                    "{% endgeneration %} around answers"
                )
            marks = [after.rfind(name) + len(name) for name in self._names if name in after[len(before) :]]
            cuts += [len(before), max(marks, default=len(after))]
        cuts.append(len(text))
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]

    def _date(self, form: str) -> str:
        date = datetime.datetime.fromisoformat(self.files.date) if self.files.date else datetime.datetime.now()
        return date.strftime(form)

    def _stop(self) -> tuple[str, ...]:
        try:
            text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}], False)
        except ChatError:
            return ()
        _, found, behind = text.rpartition(_ANSWER)
        if not found:
            return ()
        first = min((name for name in self._names if name in behind), key=behind.find, default=self.end)
        return () if first == self.end else (first,)

    def check_text(self, text: str, what: str, index: int | None = None) -> None:
        """Raises ChatError if a text holds what only a template may write."""
        found = next((name for name in (*self._names, _BEGIN, _END) if name in text), None)
        if found is not None:
            raise ChatError(f"{what} holds the special token {found!r}; leave it out", index)

    def _check(self, messages: Messages) -> None:
        for i, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise ChatError(f"messages[{i}] has the unknown role {message['role']!r}; use {', '.join(ROLES)}", i)
            self.check_text(message["content"], f"messages[{i}]", i)

    def _render(self, messages: Messages, prompt: bool) -> str:
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=prompt, **self._special)
        except Exception as error:  # a template may do anything that Jinja lets it
            raise ChatError(f"the chat template does not take these messages: {error}") from None


def chat_in(folder: pathlib.Path) -> ChatFiles:
    """Of chat_template.jinja and tokenizer_config.json, which may be missing.

    Raises:
      ConfigError: one of them cannot be read, or is a link to something outside of the folder.
    """
    settings = {}
    if (folder / SETTINGS).is_file():
        file = within(folder, SETTINGS)
        try:
            settings = json.loads(file.read_bytes())
        except errors(ValueError, RecursionError) as error:
            raise ConfigError(f"{file} cannot be read ({reason(error)}); mend it, or remove it") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / SETTINGS} holds no JSON object; mend it, or remove it")
    special = {}
    for name in _SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            special[name] = value
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), ""
        )
    template, place = (found, folder / SETTINGS) if isinstance(found, str) and found else ("", "")
    if (folder / FILE).is_file():  # transformers, too, takes it first
        template, place = _text(within(folder, FILE), str(folder / FILE)), folder / FILE
    return ChatFiles(template, special, str(place), str(settings.get(_DATE, "")))


def read_chat(file: str, tokenizer_file: str, setting: str) -> ChatFiles:
    """What a Jinja file, or a folder as of `chat_in`, says, and what stands beside the tokenizer's file: the template
    of the first that has one, but the names of the tokenizer's special tokens are rather those beside it.

    Args:
      setting: the flag or the field that gives the file.

    Raises:
      ConfigError: a file that cannot be read, or a folder without a template.
    """
    given = beside = NO_CHAT
    if tokenizer_file.endswith((".json", ".model")):
        beside = chat_in(locate(tokenizer_file, "data.tokenizer").parent)
    if file:
        path = locate(file, setting)
        if path.is_dir():
            given = chat_in(path)._replace(date="")  # another run's
            if not given.template:
                raise ConfigError(f"{setting}={file} holds neither {FILE} nor a {SETTINGS} with a chat template")
        else:
            given = chat_in(path.parent)._replace(template=_text(path, f"{setting}={file}"), place=file)
    template, place = (given if given.template else beside)[::2]
    return ChatFiles(template, beside.special or given.special, place, given.date)


def chat_contents(files: ChatFiles) -> dict[str, bytes]:
    """By name, the files that `chat_in` reads so; none if there is nothing to say."""
    if not (files.template or files.special):
        return {}
    values = files.special | ({_DATE: files.date} if files.date else {})
    settings = {SETTINGS: (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()}
    return settings | ({FILE: files.template.encode()} if files.template else {})


def load_chat(
    tokenizer: Tokenizer, file: str, tokenizer_file: str, setting: str, default: str = DEFAULT, dated: bool = False
) -> Chat:
    """The template that `read_chat` finds, else `default`; arguments and errors as there, or it is no template.

    Args:
      dated: strftime_now gives the date that the files say, or always that of now; else the time of each answer.
    """
    files = read_chat(file, tokenizer_file, setting)
    template = files.template or default
    date = files.date or datetime.datetime.now().isoformat() if dated and _DATE in template else ""
    chat = Chat(tokenizer, template, files.special, date)
    for name, value in files.special.items():
        if not chat.knows(value):
            once(logging.WARNING, f"{name}={value!r} is no special token of data.tokenizer; chat templates lack it")
    of = f"of {files.place}" if files.place else "that is our own, User: … and Assistant: …; no other was found"
    once(logging.INFO, f"messages go through the chat template {of}")
    return chat


def _text(file: pathlib.Path, name: str) -> str:
    try:
        return file.read_text()
    except errors(UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({reason(error)}); give a Jinja file") from None


def _encoder(tokenizer: Tokenizer) -> tuple[Callable[[Sequence[str]], list[list[int]]], list[str]]:
    """What encodes texts in which special tokens stand by their names, and these, the end of text first."""
    if isinstance(tokenizer, JsonTokenizer):
        knowing = tokenizers.Tokenizer.from_str(tokenizer.json_text)
        knowing.no_truncation()
        knowing.no_padding()
        added = knowing.get_added_tokens_decoder()
        names = [token.content for token in added.values() if token.special]
        end = knowing.id_to_token(tokenizer.eos_id) or END_OF_TEXT

        def encode_batch(texts: Sequence[str]) -> list[list[int]]:
            return [found.ids for found in knowing.encode_batch_fast(list(texts), add_special_tokens=False)]

        return encode_batch, [end, *(name for name in names if name != end)]
    end = END_OF_TEXT if isinstance(tokenizer, ByteTokenizer) else tokenizer.decode([tokenizer.eos_id]) or "</s>"

    def encode(text: str) -> list[int]:
        first, *others = text.split(end)
        return tokenizer.encode(first) + [i for part in others for i in (tokenizer.eos_id, *tokenizer.encode(part))]

    return lambda texts: [encode(text) for text in texts], [end]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As transformers has it: Jinja's own escapes what HTML would not take."""
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
