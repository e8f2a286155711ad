"""Training of a byte-level BPE."""

import logging
import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmac_jax.data.documents import PIECE, cut_text

END_OF_TEXT = "<|endoftext|>"
_LONG_RUN = re.compile(r"\S{256}|\s{256}")
_TRAINING_CHARACTERS = 1 << 30  # BPE counts words: more text changes little
_log = logging.getLogger(__name__)


def make_byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Makes a tokenizer in GPT-2's way: words with the space before them, as bytes; every text has an encoding and
    comes back unchanged."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE with END_OF_TEXT at id 0; returns its tokenizer.json. The same texts give the same
    file."""
    tokenizer = make_byte_level(models.BPE())
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
