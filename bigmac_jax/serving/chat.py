"""Messages of a chat to the tokens of a prompt."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from bigmac_jax.config import ConfigError
from bigmac_jax.data.tokenizer import JsonTokenizer, Tokenizer
from bigmac_jax.serving.limits import ApiError

Messages = Sequence[dict[str, str]]
# Where no template is given. A model that was not trained on chats knows dialogues like this from its texts.
_STOP = ("\nUser:",)


class Chat:
    """A template, and how what it gives is encoded.

    Attributes:
      stop: texts that end an answer, beside those that a request names.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "", special: dict[str, str] | None = None):
        self.stop: tuple[str, ...] = () if template else _STOP
        self._special = special or {}
        self._render: Callable[..., str] | None = None
        self._encode = tokenizer.encode
        self._names: list[str] = []
        if not template:
            return
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._render = environment.from_string(template).render
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not Jinja ({error}); fix it, or give --chat_template") from None
        if isinstance(tokenizer, JsonTokenizer):
            # A template names special tokens. What users write holds none, or they could write another's part.
            knowing = tokenizers.Tokenizer.from_str(tokenizer.json_text)
            knowing.no_truncation()
            knowing.no_padding()
            self._names = [token.content for token in knowing.get_added_tokens_decoder().values() if token.special]
            self._encode = lambda text: knowing.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: Messages) -> list[int]:
        """Raises ApiError for messages that the template does not take."""
        if self._render is None:
            parts = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
            return self._encode("".join(parts) + "Assistant:")
        for i, message in enumerate(messages):
            if found := next((name for name in self._names if name in message["content"]), None):
                raise ApiError(400, f"messages[{i}] holds the special token {found!r}; leave it out", "messages")
        try:
            text = self._render(messages=list(messages), add_generation_prompt=True, **self._special)
        except Exception as error:  # a template may do anything that Jinja lets it
            raise ApiError(400, f"the chat template does not take these messages: {error}", "messages") from None
        return self._encode(text)


def load_chat(tokenizer: Tokenizer, file: str, tokenizer_file: str) -> Chat:
    """The template of a file; without one that of the `tokenizer_config.json` beside the tokenizer's, if there is one.

    Raises:
      ConfigError: a file that cannot be read, or is no template.
    """
    special: dict[str, str] = {}
    template = ""
    if tokenizer_file.endswith((".json", ".model")):
        folder = pathlib.Path(tokenizer_file).expanduser().parent
        try:
            settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_bytes())
        except (OSError, ValueError):
            settings = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(name)
            special[name] = value.get("content", "") if isinstance(value, dict) else value or ""
        found = settings.get("chat_template", "")
        template = found if isinstance(found, str) else ""
        beside = folder / "chat_template.jinja"
        template = beside.read_text() if not template and beside.is_file() else template
    if file:
        try:
            template = pathlib.Path(file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat_template={file} cannot be read ({error}); give a Jinja file") from None
    return Chat(tokenizer, template, special)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
