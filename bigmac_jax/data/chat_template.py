"""Chat templates: messages to text to tokens, and which of these are an answer.

A template is Jinja as transformers has it (`apply_chat_template`): sandboxed, with its globals, filters and the tags
{% generation %} … {% endgeneration %} around what the assistant writes. Training and serving both encode here, and in
the same pieces: an answer begins with a token of its own, as it does when a model writes it.
"""

import datetime
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from bigmac_jax.config import ConfigError
from bigmac_jax.data.chat_files import ChatFiles, read_chat
from bigmac_jax.data.documents import log_once
from bigmac_jax.data.tokenizer import (
    END_OF_TEXT,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TooLongError,
    encode_at_most,
)

_DATE = "strftime_now"  # the function by which a template asks for the date
# For a model that was tuned without a template of its own.
DEFAULT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant:{% generation %} {{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}{{ message.role | capitalize }}: {{ message.content }}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# For one that was never tuned, and knows dialogues like this from its texts.
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
ROLES = ("system", "developer", "user", "assistant")
# Unicode says that these are never characters: they mark answers in what is rendered, and stand for an answer.
_BEGIN, _END, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
_NUMBER = "_number_of"  # what a template's loops call where they begin with a message
_PLACE = re.compile(f"{_BEGIN}([0-9]+){_END}")
_CHECKED = 1024  # messages that are rendered again, turn by turn, before most turns are only found
Messages = Sequence[dict[str, str]]


class ChatError(ValueError):
    """Messages that a template does not take, as one line; `index` is the message that is wrong, if one is."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(" ".join(message.split()))
        self.index = index


class _UntoldError(ChatError):
    """A template that doesn't show where answers begin and end."""

    def __init__(self, problem: str):
        super().__init__(
            f"the chat template {problem}; put {{% generation %}} and {{% endgeneration %}} around answers"
        )


class PromptLimit(NamedTuple):
    """How much a prompt may take: at most so many tokens (a message is at least one). `check` is called between parts
    of the work, and ends it by raising."""

    tokens: int
    check: Callable[[], object] = lambda: None


class Piece(NamedTuple):
    """Part of a rendered conversation: an answer, or what stands between answers."""

    text: str
    answer: bool


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Numbered(dict[str, str]):
    """A message that knows its place among others."""

    def __init__(self, message: dict[str, str], number: int):
        super().__init__(message)
        self._number = number  # which no template can read


class Chat:
    """A template with a tokenizer; arguments as in `ChatFiles`. Without `special`, eos_token is the tokenizer's end of
    text.

    Attributes:
      end: the name of the end of text.
      opening: what the template writes between the prompt for an answer and its content, as a space.
      stop: the special token that ends an answer, if it is another one.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str = DEFAULT, special: dict[str, str] | None = None, date: str = ""
    ):
        self.template, self.files = template, ChatFiles(template, special or {}, date=date)
        self.encode_batch, self._names = _make_encoder(tokenizer)
        self.end = self._names[0]
        self._any_name = re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))))
        names = [len(name.encode()) for name in self._names]
        self._token_bytes = max(tokenizer.token_bytes, *names) if tokenizer.token_bytes else 0
        known = {name: value for name, value in self.files.special.items() if value in self._names}
        self._special = {"eos_token": self.end, "bos_token": "", "pad_token": self.end} | known
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, _DATE: self._format_date, _NUMBER: _write_number}
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(template)
            self._numbered = environment.from_string(_number_loops(environment.parse(template)))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not Jinja ({error}); fix it, or give another one") from None
        self._marks = "endgeneration" in template
        self.opening, self.stop = self._find_frame()

    def prompt(self, messages: Messages, limit: PromptLimit | None = None) -> list[int]:
        """The tokens that an answer follows; raises ChatError as `pieces` does, and TooLongError above the limit."""
        if limit and len(messages) > limit.tokens:
            raise TooLongError(limit.tokens)
        texts = [piece.text for piece in self.pieces(messages, prompt=True, limit=limit)]
        if not limit:
            return [token for ids in self.encode_batch(texts) for token in ids]
        return encode_at_most(self.encode_batch, texts, limit.tokens, self._token_bytes, limit.check)

    def pieces(self, messages: Messages, prompt: bool = False, limit: PromptLimit | None = None) -> list[Piece]:
        """The text of messages, cut where answers begin and end.

        An answer is what the template's generation tags enclose. Without them it is what a message of the assistant
        adds to the prompt for it, up to the last special token of that.

        Args:
          prompt: the beginning of a further answer stands at the end. Then a conversation whose answers cannot be
            told is one piece.

        Raises:
          ChatError: an unknown role, a special token in a message, or messages that the template does not take.
          TooLongError: so long a text has more tokens than the limit.
        """
        self._check(messages)
        text = self._render(messages, prompt)
        if self._marks:
            return _make_pieces(re.split(f"[{_BEGIN}{_END}]", text))
        if limit and self._token_bytes and len(text) > limit.tokens * self._token_bytes:
            raise TooLongError(limit.tokens)
        try:
            spans = self._find_answers(messages, text, prompt, limit.check if limit else lambda: None)
        except _UntoldError:
            if prompt:  # who asks wants an answer, however the turns before it are cut
                return [Piece(text, False)]
            raise
        cuts = [0]
        for start, stop in spans:
            ends = [at + len(name) for name in self._names if (at := text.rfind(name, start, stop)) >= 0]
            cuts += [start, max(ends, default=stop)]
        return _make_pieces([text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])])

    def _find_answers(
        self, messages: Messages, text: str, prompt: bool, check: Callable[[], object]
    ) -> list[tuple[int, int]]:
        """Finds where each answer begins and ends in the text: what a message of the assistant adds to the prompt for
        it. Raises _UntoldError if it adds to something else, or is written otherwise when others follow it.

        To render the messages before each answer takes the square of their number. So that is done for the first ones,
        for those at twice the place of the last one, and at the end. Between them an answer begins where the template's
        loop comes to its message, behind the same words, which must be true of all that were rendered.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rendered, last, found = 0, 0, {}
        rewritten = _UntoldError("writes a turn otherwise when others follow it")
        for i in turns:
            if rendered + 2 * i >= _CHECKED and i < 2 * last and i < len(messages) - 1:
                continue
            rendered, last = rendered + 2 * i + 1, i
            check()
            before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not after.startswith(before) and after.startswith(self._render(messages[:i], False)):
                raise _UntoldError(
                    "ends a prompt with words (add_generation_prompt) that it does not write before answers"
                )
            if not (after.startswith(before) and text.startswith(after)):
                raise rewritten
            found[i] = len(before), len(after)
        if len(found) == len(turns):
            return list(found.values())
        check()
        places = self._find_places(messages, text, prompt) | {len(messages): found.get(len(messages) - 1, (0, 0))[1]}
        if not {place for i in turns for place in (i, i + 1)} <= set(places):
            raise rewritten
        # What a template writes behind the messages before an answer, and behind the answer.
        opening, closing = (text[places[turns[0] + n] : found[turns[0]][n]] for n in (0, 1))
        for i in turns:
            start, stop = places[i] + len(opening), places[i + 1] + (len(closing) if i + 1 < len(messages) else 0)
            if not (text.startswith(opening, places[i]) and text.startswith(closing, stop - len(closing))):
                raise rewritten
            if found.setdefault(i, (start, stop)) != (start, stop):
                raise rewritten
        return [found[i] for i in turns]

    def _find_places(self, messages: Messages, text: str, prompt: bool) -> dict[int, int]:
        """Finds where in the text the template's last loop over messages comes to each; some or none without one."""
        numbered = self._render([_Numbered(message, i) for i, message in enumerate(messages)], prompt, self._numbered)
        parts = _PLACE.split(numbered)
        if "".join(parts[::2]) != text:
            return {}
        at = itertools.accumulate(map(len, parts[::2]))
        return {int(number): place for number, place in zip(parts[1::2], at, strict=False)}

    def _format_date(self, form: str) -> str:
        date = datetime.datetime.fromisoformat(self.files.date) if self.files.date else datetime.datetime.now()
        return date.strftime(form)

    def _find_frame(self) -> tuple[str, tuple[str, ...]]:
        """`opening` and `stop`; without them for a template that does not take a question and its answer."""
        asked = [{"role": "user", "content": "?"}]
        try:
            prompt = self._render(asked, True)
            text = self._render([*asked, {"role": "assistant", "content": _ANSWER}], False)
        except ChatError:
            return "", ()
        before, found, behind = re.sub(f"[{_BEGIN}{_END}]", "", text).rpartition(_ANSWER)
        if not found:
            return "", ()
        first = min((name for name in self._names if name in behind), key=behind.find, default=self.end)
        return before[len(prompt) :] if before.startswith(prompt) else "", () if first == self.end else (first,)

    def split_names(self, text: str) -> list[str]:
        """What stands before, between and behind the special tokens of a rendered text."""
        return self._any_name.split(text)

    def check_text(self, text: str, what: str, index: int | None) -> None:
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
            return template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=prompt, **self._special
            )
        except Exception as error:  # a template may do anything that Jinja lets it
            raise ChatError(f"the chat template does not take these messages: {error}") from None


def load_chat(
    tokenizer: Tokenizer, file: str, tokenizer_file: str, setting: str, default: str = DEFAULT, date: str = ""
) -> Chat:
    """Loads the template that `read_chat` finds, else `default`; arguments and errors as there. With a `date` (ISO),
    strftime_now always gives that of the files or else this one, and `say_template` is left to the caller, whose rows
    may be texts alone; otherwise it gives the time of each answer."""
    files = read_chat(file, tokenizer_file, setting)
    template = files.template or default
    kept = files.date or date if date and _DATE in template else ""
    chat = Chat(tokenizer, template, files.special, kept)
    chat.files = files._replace(template=template, date=kept)
    for name, value in files.special.items():
        if value not in chat._names:
            log_once(logging.WARNING, f"{name}={value!r} is no special token of data.tokenizer; chat templates lack it")
    if not date:
        say_template(chat)
    return chat


def say_template(chat: Chat) -> None:
    """Says in a line where the template of messages was found."""
    place = chat.files.place
    origin = f"of {place}" if place else "that is our own, User: … and Assistant: …; no other was found"
    log_once(logging.INFO, f"messages go through the chat template {origin}")


def _make_pieces(parts: Sequence[str]) -> list[Piece]:
    """Every other part is an answer."""
    return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]


def _make_encoder(tokenizer: Tokenizer) -> tuple[Callable[[Sequence[str]], list[list[int]]], list[str]]:
    """Returns a function that encodes texts with special tokens in them, and their names, the end of text first."""
    if isinstance(tokenizer, JsonTokenizer):
        knowing = tokenizers.Tokenizer.from_str(tokenizer.json_text)
        knowing.no_truncation()
        knowing.no_padding()
        names = [token.content for token in knowing.get_added_tokens_decoder().values() if token.special]
        end = knowing.id_to_token(tokenizer.eos_id) or END_OF_TEXT

        def encode_batch(texts: Sequence[str]) -> list[list[int]]:
            return [found.ids for found in knowing.encode_batch_fast(list(texts), add_special_tokens=False)]

        return encode_batch, [end, *(name for name in names if name != end)]
    if isinstance(tokenizer, SentencePieceTokenizer):  # which decodes it to nothing
        end = tokenizer.pieces[tokenizer.eos_id]
    else:
        end = tokenizer.decode([tokenizer.eos_id]) or END_OF_TEXT

    def encode(text: str) -> list[int]:
        first, *others = text.split(end)
        return tokenizer.encode(first) + [i for part in others for i in (tokenizer.eos_id, *tokenizer.encode(part))]

    return lambda texts: [encode(text) for text in texts], [end]


def _number_loops(template: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Has each loop write the number of the message that it comes to, where it is one."""
    for loop in template.find_all(jinja2.nodes.For):
        if isinstance(loop.target, jinja2.nodes.Name):
            name = jinja2.nodes.Name(loop.target.name, "load")
            call = jinja2.nodes.Call(jinja2.nodes.Name(_NUMBER, "load"), [name], [], None, None)
            loop.body.insert(0, jinja2.nodes.Output([call]).set_lineno(loop.lineno))
    return template


def _write_number(value: Any) -> str:
    return f"{_BEGIN}{value._number}{_END}" if isinstance(value, _Numbered) else ""


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes what HTML would not take."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=False
    )
