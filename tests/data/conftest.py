"""Small configs over text in a temporary directory, and one prepared cache of the embedded corpus."""

import os
import pathlib
from collections.abc import Callable

import pytest

from bigmac_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import load_tokenizer

SAMPLE = (
    "The quick brown fox.  Two spaces,\ttab,\r\nCRLF\n\n\nthree newlines; it's 1999's café, naïve Ωmega, 日本語, "
    "emoji 👩\u200d👩\u200d👧 and 🇩🇪, a null \x00, odd spaces \u00a0\u2003\u200b, <|endoftext|> as text, blanks   \n "
)


@pytest.fixture
def make_config(tmp_path: pathlib.Path) -> Callable[..., Config]:
    def make(source: object, vocab_size: int = 8192, seed: int = 0, **data: object) -> Config:
        data = {"tokenizer": "bytes"} | data
        return Config(
            model=ModelConfig(vocab_size=vocab_size),
            data=DataConfig(source=str(source), **data),
            train=TrainConfig(seed=seed),
            cache_dir=str(tmp_path / "cache"),
        )

    return make


@pytest.fixture
def text_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """One document of 5,001 bytes."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:04} " for i in range(1000)) + "\n")
    return path


@pytest.fixture(scope="session")
def sotu(tmp_path_factory: pytest.TempPathFactory):
    """(config, tokenizer, {split: stream}) of the embedded corpus with its own BPE; workers share a cache."""
    folder = tmp_path_factory.getbasetemp()
    config = Config(cache_dir=str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "sotu"))
    tokenizer = load_tokenizer(config)
    return (
        config,
        tokenizer,
        {split: open_stream(config, split, tokenizer) for split in ("train", "validation", "test")},
    )
