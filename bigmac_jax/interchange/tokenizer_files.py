"""The tokenizer beside a model: tokenizer.json or a .model, and tokenizer_config.json, as transformers reads them."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Container

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_files import ChatFiles, format_chat_files, format_splits, read_chat
from bigmac_jax.data.chat_template import Chat
from bigmac_jax.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from bigmac_jax.interchange.tensor_files import write_json
from bigmac_jax.runtime import hosts, storage

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_log = logging.getLogger(__name__)


def write_tokenizer(directory: pathlib.Path, config: Config, tokenizer: Tokenizer, chat: ChatFiles) -> None:
    """Writes the files with which transformers' PreTrainedTokenizerFast encodes text as `tokenizer` does. A
    SentencePiece model, which has no tokenizer.json, is copied.

    Args:
      chat: its special tokens are named; with its template they are single tokens in any text.
    """
    known: Container[str]
    end: str | None
    if isinstance(tokenizer, SentencePieceTokenizer):
        (directory / tokenizer.file).write_bytes(tokenizer.content)
        known, end = tokenizer.pieces, tokenizer.pieces[tokenizer.eos_id]
    else:
        whole = tokenizers.Tokenizer.from_str(_json_text(tokenizer))
        known, end = whole.get_vocab(with_added_tokens=True), whole.id_to_token(tokenizer.eos_id)
        whole.no_truncation()
        whole.no_padding()
        values = json.loads(whole.to_str())
        if whole.num_special_tokens_to_add(False):
            values["post_processor"] = None  # nothing is added to text where models are trained here
        write_json(directory / "tokenizer.json", values)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids, which decoders have no use for
        "bos_token": None,  # or transformers takes that of a SentencePiece model
        "eos_token": end,
        "pad_token": end,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
    } | {name: value for name, value in chat.special.items() if value in known}
    write_json(directory / "tokenizer_config.json", settings | format_splits(chat))


def _json_text(tokenizer: Tokenizer) -> str:
    """The tokenizer.json of one that is no SentencePiece model."""
    return tokenizer.json_text if isinstance(tokenizer, JsonTokenizer) else _make_byte_bpe()


def _make_byte_bpe() -> str:
    """tokenizer.json of the bytes: a BPE without merges, and 256 for the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # GPT-2's: a byte that is not visible has one above 255
    others = iter([character for character in alphabet if ord(character) > 255])
    vocabulary = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer.to_str()


def warn_of_added(place: str, tokenizer: Tokenizer) -> None:
    """Says in a line which special tokens transformers puts around every text by a model's tokenizer: here none are."""
    if isinstance(tokenizer, JsonTokenizer) and hosts.is_first():
        whole = tokenizers.Tokenizer.from_str(tokenizer.json_text)
        whole.no_padding()
        if whole.num_special_tokens_to_add(False):
            line = "%s: its tokenizer adds %s to every text; here, and in exports, only a chat template writes them"
            _log.warning(line, place, " and ".join(whole.encode("").tokens))


def extends(given: Tokenizer, own: Tokenizer) -> bool:
    """Whether all tokens of `own` have the same ids in `given`."""
    new, old = _vocabulary(given), _vocabulary(own)
    known = bool(new and old) and all(new.get(token) == number for token, number in old.items())
    return known or given.fingerprint == own.fingerprint


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of tokens; {} of a SentencePiece model."""
    if not isinstance(tokenizer, JsonTokenizer | ByteTokenizer):
        return {}
    return tokenizers.Tokenizer.from_str(_json_text(tokenizer)).get_vocab(with_added_tokens=True)


def end_ids(tokenizer: Tokenizer, chat: ChatFiles, vocab_size: int) -> int | list[int]:
    """Tokens at which transformers' generation ends: the end of text; if they differ, what ends an answer of the chat
    template, what is called eos_token, and those of an imported model's config.json.

    Raises:
      ConfigError: the chat template is not Jinja.
    """
    ids: list[int | None] = [tokenizer.eos_id]
    if isinstance(tokenizer, JsonTokenizer):
        stop = Chat(tokenizer, chat.template, chat.special).stop if chat.template else ()
        known = tokenizers.Tokenizer.from_str(tokenizer.json_text)
        ids += [known.token_to_id(name) for name in (*stop, chat.special.get("eos_token", ""))]
    ids += [number for number in chat.ends if number < vocab_size]
    found = list(dict.fromkeys(number for number in ids if number is not None))
    return found if found[1:] else tokenizer.eos_id


def read_tokenizer(config: Config) -> tuple[Tokenizer, ChatFiles]:
    """The tokenizer that data.tokenizer names, and beside it its special tokens' names and its chat template.

    Raises:
      ConfigError: one of these files can't be read, or the tokenizer does not fit the model.
    """
    tokenizer, chat = load_tokenizer(config), read_chat("", config.data.tokenizer, "data.tokenizer")
    if chat.template:
        try:
            Chat(tokenizer, chat.template, chat.special)
        except ConfigError as error:
            raise ConfigError(f"{chat.place}: {error}") from None
    return tokenizer, chat


def keep_tokenizer(workdir: pathlib.Path, config: Config, tokenizer: Tokenizer, chat: ChatFiles) -> Config:
    """Writes the files of `read_tokenizer` to a workdir → the config that names them."""
    files = format_chat_files(chat) | ({tokenizer.file: tokenizer.content} if tokenizer.file else {})
    for name, content in files.items() if hosts.is_first() else ():
        storage.write_atomically(workdir / name, content)
    if not tokenizer.file:
        return config
    own = str(storage.absolute(workdir) / tokenizer.file)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=own))
