"""Turns the messages of a chat into the tokens of a prompt."""

import pathlib

from bigmac_jax.data.chat_files import TEMPLATE_FILE
from bigmac_jax.data.chat_template import PLAIN, Chat, ChatError, Messages, PromptLimit, load_chat
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.serving.limits import ApiError

_SAID = 500  # characters of a template's error, which may hold everything that the template was given


class Dialogue:
    """A chat template whose errors are HTTP errors.

    Attributes:
      opening: what the template writes before the content of an answer, so that it is not part of that.
      stop: texts that end an answer, beside those that a request names.
    """

    def __init__(self, chat: Chat):
        self._chat, self.opening = chat, chat.opening
        self.stop: tuple[str, ...] = ("\nUser:",) if chat.template == PLAIN else chat.stop

    def prompt(self, messages: Messages, limit: PromptLimit | None = None) -> list[int]:
        """Renders messages as the token ids of a prompt; raises ApiError if the template refuses them, and as
        `Chat.prompt`."""
        try:
            return self._chat.prompt(messages, limit)
        except ChatError as error:
            raise ApiError(400, str(error)[:_SAID], "messages") from None


def load_dialogue(tokenizer: Tokenizer, file: str, tokenizer_file: str, workdir: pathlib.Path) -> Dialogue:
    """Loads the chat template in `file`, by default the run's own, else the one beside the tokenizer's file, else a
    plain dialogue.

    Raises:
      ConfigError: a file that cannot be read, or is no template.
    """
    own = workdir / TEMPLATE_FILE
    if not file and own.is_file():
        file = str(own)
    return Dialogue(load_chat(tokenizer, file, tokenizer_file, "--chat_template", PLAIN))
