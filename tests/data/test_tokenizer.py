"""Tokenizers: round trips, identity with the unsplit text, and clear refusals."""

import dataclasses
import json
import random
import time

import pytest
import tokenizers
from conftest import SAMPLE
from tokenizers import models, pre_tokenizers

from bigmac_jax.config import Config, ConfigError, DataConfig, TrainConfig, TuningConfig
from bigmac_jax.data import tokenizer as module
from bigmac_jax.data.documents import Documents, cut_text
from bigmac_jax.data.sotu import speech_files
from bigmac_jax.data.tokenizer import JsonTokenizer, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def gpt2():
    return module._load_gpt2()


@pytest.fixture(params=["bpe", "bytes", "gpt2"])
def tokenizer(request, sotu, gpt2):
    return {"bpe": sotu[1], "bytes": module.ByteTokenizer(), "gpt2": gpt2}[request.param]


def test_round_trip(tokenizer):
    generator = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]  # every character but the surrogates
    noise = "".join(map(chr, generator.choices(points, k=5000)))
    for text in ("", " ", "\n", "Hello world", SAMPLE, noise):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.bytes_of, ids)) == text.encode()
        assert tokenizer.eos_id not in ids
        assert not ids or 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert tokenizer.encode_batch([SAMPLE, "", "a b"]) == [tokenizer.encode(t) for t in (SAMPLE, "", "a b")]


@pytest.mark.parametrize("tuning", ["sft", "dpo"])
def test_rows_train_no_tokenizer(tuning):
    config = Config(data=DataConfig(source="a.jsonl"), train=TrainConfig(init_from="x"))
    config = dataclasses.replace(config, tuning=TuningConfig(tuning))
    with pytest.raises(ConfigError, match=rf"{tuning} has rows; give a model to begin with \(train.init_from\)"):
        load_tokenizer(config)


def test_decode_never_fails(tokenizer):
    assert tokenizer.decode([]) == ""
    half = tokenizer.encode("日")[:1]
    assert isinstance(tokenizer.decode([*half, tokenizer.eos_id, 10**6, -1]), str)
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    assert tokenizer.bytes_of(tokenizer.eos_id) == b"<|endoftext|>"
    assert tokenizer.bytes_of(10**6) is tokenizer.bytes_of(-1) is None
    assert tokenizer.decode(tokenizer.encode("lone \ud800")) == "lone �"


def test_gpt2_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)


def test_bpe_has_the_size_asked_for(sotu):
    config, tokenizer, _ = sotu
    assert tokenizer.vocab_size == config.model.vocab_size == 8192
    again = load_tokenizer(config)  # from the cache
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_pieces_give_the_tokens_of_the_whole(sotu, gpt2):
    text = SAMPLE * 20 + "".join(path.read_text() for _, path in speech_files()[:5])
    for tokenizer in (sotu[1], gpt2):
        whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == whole
        cut = list(cut_text(text, 100))
        assert len(cut) > len(text) / 300
        assert [i for ids in tokenizer.encode_batch(cut) for i in ids] == whole


def test_a_cut_behind_punctuation_may_change_its_tokens():
    """Where a tokenizer's pattern joins a newline to it, as Qwen's; there alone."""
    pattern = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, ".Ċ", "aĊ"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(".", "Ċ"), ("a", "Ċ")]))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    for line, changed in (("aaaaaaa.\n", 1), ("aaaaaaaa\n", 0), ("aaaa. aa\n", 0)):
        pieces = list(cut_text(line * 100, 100))
        apart = [i for piece in pieces for i in tokenizer.encode(piece).ids]
        assert len(apart) - len(tokenizer.encode(line * 100).ids) == changed * (len(pieces) - 1) and len(pieces) > 5


def test_pieces_are_bounded():
    for text in ("x" * 1000, " " * 1000, "ab " * 500, "", "a" * 150 + "\n" * 500):
        cut = list(cut_text(text, 100))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 200


@pytest.mark.parametrize("text", ["x" * 3_000_000, " " * 3_000_000, "ab\n" * 300_000])
def test_long_runs_take_linear_time(text):
    start = time.perf_counter()
    tokenizer = JsonTokenizer(train_bpe([text], 300))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 20  # quadratic time would be hours


def test_training_text_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_TRAINING_CHARACTERS", 20_000)
    parts = list(module._training_text(["ab " * 5000] * 5))
    assert "".join(parts) == "ab " * 10_000
    assert max(map(len, module._training_text(["x" * 100_000]))) == 256


def test_a_mixture_is_learned_of_all_sources(tmp_path, make_config, monkeypatch):
    """Though one of them is a single document, longer than what is read; a tokenizer of the old order is not taken."""
    monkeypatch.setattr(module, "_TRAINING_CHARACTERS", 400_000)
    (tmp_path / "a.txt").write_text("alpha bravo " * 50_000)
    (tmp_path / "b.jsonl").write_text('{"text": "lambda zebra"}\n' * 20_000)
    config = make_config("sotu", mixture=f"{tmp_path}/a.txt=1,{tmp_path}/b.jsonl=1", tokenizer="bpe", vocab_size=290)
    data = dataclasses.replace(config.data, validation_source="-", test_source="-")
    tokenizer = load_tokenizer(dataclasses.replace(config, data=data))
    assert len(tokenizer.encode(" alpha bravo lambda zebra")) < 8
    (path,) = tmp_path.glob("cache/tokenizers/*.json")
    assert path.name.endswith("-in-turn.sealed.json")


def test_small_text_gives_a_smaller_vocabulary(text_file, make_config, caplog):
    config = make_config(text_file, tokenizer="bpe")
    tokenizer = load_tokenizer(config)
    assert 257 < tokenizer.vocab_size < 8192
    assert "model.vocab_size=8192; the rest stay unused" in caplog.text
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


def test_damaged_bpe_is_trained_again(text_file, make_config, tmp_path, caplog):
    config = make_config(text_file, tokenizer="bpe", vocab_size=300)
    first = load_tokenizer(config)
    (path,) = tmp_path.glob("cache/tokenizers/*.json")
    path.write_text(path.read_text()[:1000])
    assert load_tokenizer(config).fingerprint == first.fingerprint
    assert sum("is damaged" in record.message for record in caplog.records) == 1
    path.write_text(path.read_text().replace(r"\"e\"", r"\"ē\""))  # a tokenizer, but another one
    assert load_tokenizer(config).fingerprint == first.fingerprint
    assert sum("is damaged" in record.message for record in caplog.records) == 2
    text_file.write_text("other text " * 100)
    assert load_tokenizer(config).fingerprint != first.fingerprint


def test_tokenizer_json(sotu, make_config, tmp_path):
    ours = sotu[1]
    spec = json.loads(ours._tokenizer.to_str())
    spec["added_tokens"] = [{"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                             "rstrip": False, "normalized": False, "special": True}]  # fmt: skip
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(make_config("sotu", tokenizer=str(path)))
    assert tokenizer.eos_id == 0
    assert tokenizer.encode(SAMPLE) == ours.encode(SAMPLE)  # "<|endoftext|>" in it is text, nothing is cut off


@pytest.mark.parametrize(
    ("special", "end"),
    [
        (["<eos>"], "<eos>"),  # Gemma's, in which </s> is a tag of HTML
        (["<pad>", "<|im_end|>", "<eos>"], "<eos>"),  # the better known one
        (["<pad>"], "</s>"),  # none of the names: an ordinary token of one
    ],
)
def test_the_end_of_text_is_rather_a_special_token(special, end):
    vocabulary = {name: i for i, name in enumerate(["</s>", "<eos>", "<pad>", "<|im_end|>", "a"])}
    whole = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    whole.add_special_tokens(special)
    whole.add_tokens([name for name in vocabulary if name[0] == "<" and name not in special])
    assert JsonTokenizer(whole.to_str()).eos_id == vocabulary[end]


def test_sentencepiece(make_config, tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = (path.read_text() for _, path in speech_files()[:3])
    with open(tmp_path / "sp.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in lines for line in text.splitlines()]),
            model_writer=file, vocab_size=500, model_type="bpe", minloglevel=2,
        )  # fmt: skip
    config = make_config("sotu", tokenizer=str(tmp_path / "sp.model"))
    tokenizer = load_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (500, 2)
    text = "the Congress of the United States"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))) == b" " + text.encode()
    assert tokenizer.bytes_of(tokenizer.eos_id) is tokenizer.bytes_of(500) is None
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="pip install 'bigmac_jax\\[sentencepiece\\]'"):
        load_tokenizer(config)


def test_errors(make_config, tmp_path, monkeypatch, sotu):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_text("{}")
    spec = json.loads(sotu[1]._tokenizer.to_str().replace("<|endoftext|>", "<|unknown|>"))
    (tmp_path / "no_end.json").write_text(json.dumps(spec))
    (tmp_path / "large.json").write_text(sotu[1]._tokenizer.to_str())
    for name, size, message in [
        ("nowhere.json", 8192, "must be bpe, bytes, gpt2, or the path"),
        (tmp_path / "bad.json", 8192, "is not a tokenizer.json"),
        (tmp_path / "bad.model", 8192, "is not a SentencePiece model"),
        (tmp_path / "no_end.json", 8192, "no end-of-text token"),
        (tmp_path / "large.json", 8000, "model.vocab_size=8000 must be at least the 8192 .*use 8192"),
        ("gpt2", 8192, "model.vocab_size=8192 must be at least the 50257 of data.tokenizer=gpt2; use 50304"),
        ("bytes", 256, "model.vocab_size=256 must be at least the 257 of data.tokenizer=bytes; use 384"),
        ("bpe", 100, "model.vocab_size=100 must be at least the 257 of data.tokenizer=bpe; use 384"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            load_tokenizer(make_config("sotu", tokenizer=str(name), vocab_size=size))
        assert "\n" not in str(error.value)

    config = make_config("sotu", tokenizer="gpt2", vocab_size=50304)
    monkeypatch.setitem(module._GPT2_FILES, "vocab.bpe", "0000")
    with pytest.raises(ConfigError, match="is not GPT-2's file"):
        load_tokenizer(config)
    monkeypatch.setattr(module, "_GPT2_PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(ConfigError, match="pip install 'bigmac_jax\\[gpt2\\]'"):
        load_tokenizer(config)


def test_documents_is_what_the_tokenizer_reads(make_config, tmp_path):
    """bpe on a source without text is the source's error."""
    (tmp_path / "blank.txt").write_text(" ")
    assert issubclass(
        type(module.open_documents(make_config(tmp_path / "blank.txt").data, "train", str(tmp_path))), Documents
    )
    with pytest.raises(ConfigError, match="0 documents with text"):
        load_tokenizer(make_config(tmp_path / "blank.txt", tokenizer="bpe"))
