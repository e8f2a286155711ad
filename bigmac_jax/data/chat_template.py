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
from bigmac_jax.data.tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, Tokenizer, TooLongError, encode_at_most
from bigmac_jax.runtime.storage import check_inside, errors, locate, reason

FILE = "chat_template.jinja"  # beside a tokenizer, and in the workdir of a run
SETTINGS = "tokenizer_config.json"  # likewise; there it has special tokens' names, and the date of a run's rows
_NUMBER = "_number_of"  # what a template's loops call where they begin with a message
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
# No characters, by Unicode's own word: they mark answers in what is rendered, or the number of a message.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_PLACE = re.compile(f"{_BEGIN}([0-9]+){_END}")
_CHECKED = 1024  # messages that are rendered again, turn by turn, before most turns are only found
_ANSWER = "\ufdd2"  # of the same kind: stands for an answer
Messages = Sequence[dict[str, str]]


class ChatError(ValueError):
    """Messages that a template does not take, as one line; `index` is the message that is wrong, if one is."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(" ".join(message.split()))
        self.index = index


def _nothing() -> None:
    pass


class Room(NamedTuple):
    """What a prompt may take.

    Attributes:
      tokens: at most. A message is one at least.
      check: called between parts of the work, which end where it raises.
    """

    tokens: int
    check: Callable[[], object] = _nothing


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


class _Numbered(dict[str, str]):
    """A message that knows its place among others."""

    def __init__(self, message: dict[str, str], number: int):
        super().__init__(message)
        self._number = number  # which no template can read


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
        names = [len(name.encode()) for name in self._names]
        self._token_bytes = max(tokenizer.token_bytes, *names) if tokenizer.token_bytes else 0
        known = {name: value for name, value in (special or {}).items() if self.knows(value)}
        self._special = {"eos_token": self.end, "bos_token": "", "pad_token": self.end} | known
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, _DATE: self._date, _NUMBER: _number}
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(template)
            self._numbered = environment.from_string(_numbering(environment.parse(template)))
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

    def prompt(self, messages: Messages, room: Room | None = None) -> list[int]:
        """The tokens that an answer follows.

        Raises:
          ChatError: as of `pieces`.
          TooLongError: they are more than there is room for, which is found as early as it can be.
        """
        if room and len(messages) > room.tokens:
            raise TooLongError(room.tokens)
        texts = [piece.text for piece in self.pieces(messages, prompt=True, room=room)]
        if not room:
            return [token for ids in self.encode_batch(texts) for token in ids]
        return encode_at_most(self.encode_batch, texts, room.tokens, self._token_bytes, room.check)

    def pieces(self, messages: Messages, prompt: bool = False, room: Room | None = None) -> list[Piece]:
        """The text of messages, cut where answers begin and end.

        An answer is what the template's generation tags enclose. Without them it is what a message of the assistant
        adds to the prompt for it, up to the last special token of that.

        Args:
          prompt: the beginning of a further answer stands at the end.
          room: for the tokens of all pieces.

        Raises:
          ChatError: an unknown role, a special token in a message, or messages that the template does not take.
          TooLongError: so long a text has more tokens than there is room for.
        """
        self._check(messages)
        text = self._render(messages, prompt)
        if self._marks:
            parts = re.split(f"[{_BEGIN}{_END}]", text)
            return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]
        if room and self._token_bytes and len(text) > room.tokens * self._token_bytes:
            raise TooLongError(room.tokens)
        answers = self._answers(messages, text, prompt, room.check if room else _nothing)
        if answers is None:
            if prompt:  # who asks wants an answer, however the turns before it were cut
                return [Piece(text, False)]
            raise ChatError(
                "the chat template writes a turn otherwise when others follow it; put {% generation %} and "
                "{% endgeneration %} around answers"
            )
        cuts = [0]
        for start, stop in answers:
            marks = [
                text.rfind(name, start, stop) + len(name) for name in self._names if text.find(name, start, stop) >= 0
            ]
            cuts += [start, max(marks, default=stop)]
        cuts.append(len(text))
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]

    def _answers(
        self, messages: Messages, text: str, prompt: bool, check: Callable[[], object]
    ) -> list[tuple[int, int]] | None:
        """Where what the assistant's messages add to the prompts for them begins and ends in the text; None if one is
        written otherwise when others follow it.

        To render the messages before each answer takes the square of their number. So that is done for the first ones,
        for those at twice the place of the last one, and at the end. Between them an answer begins where the template's
        loop comes to its message, behind the same words, which must be true of all that were rendered.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rendered, last, found = 0, 0, {}
        for i in turns:
            if rendered + 2 * i >= _CHECKED and i < 2 * last and i < len(messages) - 1:
                continue
            rendered, last = rendered + 2 * i + 1, i
            check()
            before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not (after.startswith(before) and text.startswith(after)):
                return None
            found[i] = len(before), len(after)
        if len(found) == len(turns):
            return list(found.values())
        check()
        places = self._places(messages, text, prompt) | {len(messages): found.get(len(messages) - 1, (0, 0))[1]}
        if not {place for i in turns for place in (i, i + 1)} <= set(places):
            return None
        # What a template writes behind the messages before an answer, and behind the answer.
        opening, closing = (text[places[turns[0] + n] : found[turns[0]][n]] for n in (0, 1))
        for i in turns:
            start, stop = places[i] + len(opening), places[i + 1] + (len(closing) if i + 1 < len(messages) else 0)
            if not (text.startswith(opening, places[i]) and text.startswith(closing, stop - len(closing))):
                return None
            if found.setdefault(i, (start, stop)) != (start, stop):
                return None
        return [found[i] for i in turns]

    def _places(self, messages: Messages, text: str, prompt: bool) -> dict[int, int]:
        """Where in the text the template's last loop over messages comes to each; of some, or none, if it has none."""
        numbered = self._render([_Numbered(message, i) for i, message in enumerate(messages)], prompt, self._numbered)
        parts = _PLACE.split(numbered)
        if "".join(parts[::2]) != text:
            return {}
        at = itertools.accumulate(map(len, parts[::2]))
        return {int(number): place for number, place in zip(parts[1::2], at, strict=False)}

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
        # Once for all of them: a tokenizer may have thousands of special tokens.
        everything = "\n".join(message["content"] for message in messages)
        if any(name in everything for name in (*self._names, _BEGIN, _END)):
            for i, message in enumerate(messages):
                self.check_text(message["content"], f"messages[{i}]", i)

    def _render(self, messages: Messages, prompt: bool, template: jinja2.Template | None = None) -> str:
        template = template or self._template
        try:
            return template.render(messages=list(messages), add_generation_prompt=prompt, **self._special)
        except Exception as error:  # a template may do anything that Jinja lets it
            raise ChatError(f"the chat template does not take these messages: {error}") from None


def chat_in(folder: pathlib.Path) -> ChatFiles:
    """Of chat_template.jinja and tokenizer_config.json, which may be missing.

    Raises:
      ConfigError: one of them cannot be read, or is a link to something outside of the folder.
    """
    settings = {}
    if (folder / SETTINGS).is_file():
        file = check_inside(folder, SETTINGS)
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
        template, place = _text(check_inside(folder, FILE), str(folder / FILE)), folder / FILE
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
        return file.read_text().removeprefix("\ufeff")
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


def _numbering(template: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Has each loop write the number of the message that it comes to, where it is one."""
    for loop in template.find_all(jinja2.nodes.For):
        if isinstance(loop.target, jinja2.nodes.Name):
            name = jinja2.nodes.Name(loop.target.name, "load")
            call = jinja2.nodes.Call(jinja2.nodes.Name(_NUMBER, "load"), [name], [], None, None)
            loop.body.insert(0, jinja2.nodes.Output([call]).set_lineno(loop.lineno))
    return template


def _number(value: Any) -> str:
    return f"{_BEGIN}{value._number}{_END}" if isinstance(value, _Numbered) else ""


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As transformers has it: Jinja's own escapes what HTML would not take."""
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
