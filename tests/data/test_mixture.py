"""Mixtures: exact shares, each source's windows in turn, weights that change without repeating or skipping any."""

import itertools
import json
import pathlib
import random
from fractions import Fraction

import numpy as np
import pytest

from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.config.mixture import parse_curriculum, parse_mixture, short_name, whole_numbers
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.mixed_stream import Mixture
from bigmac_jax.data.pipeline import TrainIterator, open_stream
from bigmac_jax.data.token_cache import JoinedStream
from bigmac_jax.data.tokenizer import ByteTokenizer

LENGTH, BATCH = 8, 6


def test_what_is_written():
    parts = parse_mixture("tfds:a/b=2, books/**/*.jsonl.gz=0.5x4,gs://bucket/code.jsonl=1,/x/code.txt=1")
    assert [(p.name, p.source, p.weight, p.epochs) for p in parts] == [
        ("a-b", "tfds:a/b", 2, float("inf")),
        ("books", "books/**/*.jsonl.gz", Fraction(1, 2), 4),
        ("code", "/x/code.txt", 1, float("inf")),
        ("code-2", "gs://bucket/code.jsonl", 1, float("inf")),
    ]
    stages = parse_curriculum("10:code=1;20:books=1,a-b=0.5", parts)
    assert stages == [(0, (2, Fraction(1, 2), 1, 1)), (10, (0, 0, 1, 0)), (20, (Fraction(1, 2), 1, 0, 0))]
    assert [short_name(s) for s in ("sotu", "hf:o/n", "a.b/c.tar.gz", "/", "*.txt")] == ["sotu", "o-n", "c", "/", "all"]


def test_weights_at_their_limits():
    """A million as whole numbers, of the mixture and of each stage; steps from 1 on."""
    assert whole_numbers((Fraction(1, 2), Fraction(1, 3), Fraction(0))) == [3, 2, 0]
    assert whole_numbers((Fraction(4), Fraction(6))) == [2, 3] and whole_numbers((Fraction(1, 7),)) == [1]
    parts = parse_mixture("a=999999,b=1")
    assert parse_curriculum("1:a=1,b=999999", parts)[1] == (1, (1, 999999))
    parse_mixture("a=999999999")
    for mixture, curriculum in (
        ("a=1000000,b=1", ""), ("a=1,b=1", "1:a=1000000,b=1"), ("a=1", "0:a=1"), ("a=1", "1:a=0"), ("a=1", ":a=1"),
        ("a=1", "1:a"), ("a=1", "3:a=1;2:a=2"), ("a=1", "1:=1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_curriculum(curriculum, parse_mixture(mixture))


def test_equal_names_are_numbered_by_source():
    """In any order of writing, and never one name twice."""
    for given in itertools.permutations(["a/x.txt=3", "b/x.txt=1", "c/x.txt=1", "x-2=1"]):
        names = {part.source: part.name for part in parse_mixture(",".join(given))}
        assert names == {"a/x.txt": "x", "b/x.txt": "x-2", "c/x.txt": "x-3", "x-2": "x-2-2"}


def test_texts_that_changed_places_are_other_data(tmp_path, make_config):
    """A run that has read so much of each source by its name does not go on with another text under it."""
    texts, folders = ("one text " * 50, "another " * 50), [tmp_path / "a", tmp_path / "b"]
    mixture = ",".join(f"{folder}/x.txt=1" for folder in folders)
    config = make_config("sotu", mixture=mixture, validation_source="-", test_source="-")
    found = []
    for order in (texts, texts[::-1], texts):
        for folder, text in zip(folders, order, strict=True):
            folder.mkdir(exist_ok=True)
            (folder / "x.txt").write_text(text)
        found.append(open_stream(config, "train", ByteTokenizer()).text)
        assert found[-1] == open_documents(config.data, "train", config.cache_dir).fingerprint
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("mixture", "curriculum", "message"),
    [
        ("a", "", "'a' must be SOURCE=WEIGHT, or SOURCE=WEIGHTxEPOCHS"),
        ("a=0,b=0", "", "data.mixture has weights of 0 alone"),
        ("a=-1", "", "the weight of a must be a number of at least 0, not '-1'"),
        ("a=1xtwo", "", "the epochs of a must be a number of at least 0, not 'two'"),
        ("a=1x0", "", "the epochs of a must be above 0, not '0'"),
        ("a=nan", "", "the weight of a must be a number of at least 0"),
        ("a=1000000000", "", "the weight of a must be a number of at least 0, not '1000000000'"),
        ("a=1x1e9", "", "the epochs of a must be a number of at least 0, not '1e9'"),
        ("a=1,a=2", "", "data.mixture names a twice"),
        ("ftp://a=1", "", "must be a local path, or begin with gs://"),
        ("", "5:a=1", "data.curriculum=5:a=1 needs data.mixture"),
        ("a=1", "x:a=1", r"'x:a=1' must be STEP:NAME=WEIGHT,… with a step above 0"),
        ("a=1", "5:a=1;5:a=2", "with a step above 5"),
        ("a=1", "5:b=1", "'b=1' must be NAME=WEIGHT, with one of a"),
        ("a=1", "5:", "step 5 names no source"),
        ("a=0.1234567,b=1", "", "its weights, as whole numbers, add up to 11234567, more than 1000000; round them"),
    ],
)
def test_what_is_written_wrong(mixture, curriculum, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", [f"data.mixture={mixture}", f"data.curriculum={curriculum}"])


def test_a_source_and_a_mixture_are_two():
    with pytest.raises(ConfigError, match=r"data\.source=b and data\.mixture are two"):
        load_config("tiny", ["data.source=b", "data.mixture=a=1"])


@pytest.mark.parametrize("seed", [0, 6, *(pytest.param(i, marks=pytest.mark.full) for i in (2, 5, 10, 11, 13, 19))])
def test_shares_are_exact_within_one(seed):
    """At every sample, whatever the weights; every source's windows come in turn."""
    generator = random.Random(seed)
    weights = tuple(Fraction(str(round(generator.random() ** 3 + 0.001, 3))) for _ in range(generator.randrange(2, 9)))
    parts = parse_mixture(",".join(f"{i}=1" for i in range(len(weights))))
    mixture = Mixture(parts, [(0, weights)], 1)
    given = [0] * len(weights)
    for i in range(3000):
        part, n = mixture.locate(i)
        assert n == given[part]
        given[part] += 1
        assert mixture.counts(i + 1) == tuple(given)
        exact = [(i + 1) * weight / sum(weights) for weight in weights]
        assert all(abs(count - share) < 1 for count, share in zip(given, exact, strict=True))


def test_changed_weights_go_on_where_each_source_was():
    parts = parse_mixture("a=3,b=1,c=2")
    first = Mixture(parts, parse_curriculum("7:b=1,c=1", parts), BATCH)
    saved = json.loads(json.dumps(first.state(9)))
    assert saved == [[0, {"a": "3", "b": "1", "c": "2"}], [7, {"a": "0", "b": "1", "c": "1"}]]
    again = Mixture(parts, parse_curriculum("7:b=1,c=1", parts), BATCH).resume(saved, 9, 9)
    assert [first.locate(i) for i in range(200)] == [again.locate(i) for i in range(200)]
    other = parse_mixture("c=1,a=9,b=0.5")  # in another order, too
    changed = Mixture(other, parse_curriculum("12:a=1", other), BATCH).resume(saved, 9, 9)
    assert [first.locate(i) for i in range(9 * BATCH)] == [changed.locate(i) for i in range(9 * BATCH)]
    assert changed.counts(9) == first.counts(9)
    seen = [changed.locate(i) for i in range(30 * BATCH)]
    assert all([n for part, n in seen if part == p] == list(range(changed.counts(30)[p])) for p in range(3))
    assert {part for part, _ in seen[12 * BATCH :]} == {0}
    assert [stage[0] for stage in changed.state(20)] == [0, 7, 9, 12]
    with pytest.raises(ConfigError, match=r"data\.mixture has the sources a, d, and .* started with a, b, c"):
        Mixture(parse_mixture("a=1,d=1"), [(0, (Fraction(1), Fraction(1)))], BATCH).resume(saved, 9, 9)


@pytest.fixture
def mixed(tmp_path: pathlib.Path, make_config):
    """(config of a mixture, tokens of each source): every window says which it is."""
    letters = {"a": 600, "b": 200, "c": 90}
    for letter, count in letters.items():
        (tmp_path / f"{letter}.txt").write_text("".join(f"{letter}{i:05} " for i in range(count)))

    def config(mixture: str, curriculum: str = "", steps: int = 60) -> Config:
        for letter in letters:
            mixture = mixture.replace(f"{letter}=", f"{tmp_path}/{letter}.txt=")
        made = make_config("sotu", mixture=mixture, curriculum=curriculum, sequence_length=LENGTH, batch_size=BATCH,
                           validation_source="-", test_source="-")  # fmt: skip
        object.__setattr__(made.train, "steps", steps)
        return made

    return config


def take(iterator, count: int) -> np.ndarray:
    return np.stack([batch.inputs_BL for batch in itertools.islice(iterator, count)])


def letters_of(rows: np.ndarray) -> list[str]:
    """Of each window the source, found by its text."""
    return [next(c for c in bytes(row.astype(np.uint8)).decode(errors="ignore") if c in "abc") for row in
            rows.reshape(-1, LENGTH)]  # fmt: skip


def test_batches_of_a_mixture(mixed):
    config = mixed("a=3,b=2,c=1")
    stream = open_stream(config, "train", ByteTokenizer())
    assert isinstance(stream, JoinedStream) and list(stream.parts) == ["a", "b", "c"]
    later = mixed("a=1,b=0,c=0", "3:c=1")
    assert letters_of(take(TrainIterator(later, stream), 5)) == ["a"] * 3 * BATCH + ["c"] * 2 * BATCH
    iterator = TrainIterator(config, stream)
    iterator.set_state({"batches": 0})
    rows = take(iterator, 40)
    found = letters_of(rows)
    assert [found.count(letter) for letter in "abc"] == [120, 80, 40]
    assert iterator.tokens_by_source(40) == {"a": 120 * LENGTH, "b": 80 * LENGTH, "c": 40 * LENGTH}
    # Each source goes through all its windows before it repeats one, in an order that is not the text's.
    of_c = [row.tobytes() for row, letter in zip(rows.reshape(-1, LENGTH), found, strict=True) if letter == "c"]
    assert len(set(of_c)) == 40 and of_c != sorted(of_c)


@pytest.mark.parametrize("rows", [(range(3), range(3, 6)), (range(0, 6, 2), range(1, 6, 2))])
def test_whoever_reads_them(mixed, rows):
    config = mixed("a=5,b=2,c=0.3", "10:c=1")
    stream = open_stream(config, "train", ByteTokenizer())
    expected = take(TrainIterator(config, stream), 20)
    parts = [TrainIterator(config, stream, list(part)) for part in rows]
    np.testing.assert_array_equal(
        np.concatenate([take(part, 20) for part in parts], axis=1), expected[:, list(itertools.chain(*rows))]
    )


def test_resumed_exactly_and_with_other_weights(mixed):
    """By the windows' texts: none is repeated before its source is used up, none is left out."""
    config = mixed("a=3,b=2,c=1", "5:a=1,b=1")
    stream = open_stream(config, "train", ByteTokenizer())
    expected = take(TrainIterator(config, stream), 20)
    iterator = TrainIterator(config, stream)
    before = take(iterator, 8)
    state = json.loads(json.dumps(iterator.get_state()))
    again = TrainIterator(config, stream)
    again.set_state(state | {"bad_steps": 1})
    np.testing.assert_array_equal(take(again, 12), expected[8:])
    again.set_state({"batches": 15})  # a rewind, past the data of a bad step
    np.testing.assert_array_equal(take(again, 5), expected[15:])

    other = mixed("c=3,b=1,a=1")
    changed = TrainIterator(other, open_stream(other, "train", ByteTokenizer()))
    changed.set_state(state)
    after = take(changed, 12)
    rows = np.concatenate([before, after]).reshape(-1, LENGTH)
    letters = letters_of(rows)
    for letter in "abc":
        alone = mixed(f"{letter}=1")
        plain = take(TrainIterator(alone, open_stream(alone, "train", ByteTokenizer())), 20).reshape(-1, LENGTH)
        got = np.stack([row for row, its in zip(rows, letters, strict=True) if its == letter])
        np.testing.assert_array_equal(got, plain[: len(got)])
    assert letters[8 * BATCH :].count("c") == pytest.approx(12 * BATCH * 3 / 5, abs=1)


def test_a_curriculum_switches_at_its_step_whatever_was_left_out(mixed):
    """Rewinds from step 7 to 4, over the switch at 5, and from 9 to 8: its batches are two, then three behind."""
    config = mixed("a=1,b=0,c=0", "5:a=1,b=3;10:b=1,c=3")
    stream = open_stream(config, "train", ByteTokenizer())
    iterator = TrainIterator(config, stream)
    states, letters = {}, []

    def go(step: int, stop: int) -> None:
        del letters[step:]
        for now in range(step, stop):
            letters.append("".join(sorted(set(letters_of(take(iterator, 1))))))
            states[now + 1] = json.loads(json.dumps(iterator.get_state()))

    go(0, 8)  # the bad step 7 is seen while step 8 runs
    iterator.set_state({"batches": 7}, 4)
    go(4, 9)
    iterator.set_state({"batches": 12}, 8)
    go(8, 14)
    assert letters == ["a"] * 5 + ["ab"] * 5 + ["bc"] * 4
    rest = take(iterator, 4)
    for step in (9, 10, 13):  # bit for bit, from a checkpoint behind a rewind
        again = TrainIterator(config, stream)
        again.set_state(states[step], step)
        np.testing.assert_array_equal(take(again, 18 - step)[-4:], rest, err_msg=str(step))


def test_weights_that_stay_are_one_stage():
    """A border between them would begin their order anew, and only in a run that was not resumed."""
    parts = parse_mixture("a=3,b=4")
    whole = Mixture(parts, parse_curriculum("5:a=3,b=4", parts), BATCH)
    again = whole.resume(whole.state(5), 5, 5)
    assert [whole.locate(i) for i in range(200)] == [again.locate(i) for i in range(200)]


def test_a_source_that_is_used_up(mixed, caplog):
    config = mixed("a=1,c=1x2", steps=60)
    iterator = TrainIterator(config, open_stream(config, "train", ByteTokenizer()))
    with pytest.raises(ConfigError, match=r"c\.txt would be read 2\.31 times by step 60, and at most 2 times; give it"):
        iterator.set_state({"batches": 0})
    config = mixed("a=1,c=1x2", steps=50)
    with caplog.at_level("INFO"):
        TrainIterator(config, open_stream(config, "train", ByteTokenizer())).set_state({"batches": 0})
    assert "data.mixture: c 50.0% of the windows, 1.92 epochs by step 50" in caplog.text


def test_a_source_that_is_used_up_by_rewinds(mixed):
    """Batches that rewinding left out were read, too: 50 steps take 52 batches and more."""
    config = mixed("a=1,c=1x2", steps=50)
    iterator = TrainIterator(config, open_stream(config, "train", ByteTokenizer()))
    iterator.set_state({"batches": 12}, 10)
    with pytest.raises(ConfigError, match=r"c\.txt would be read 2\.04 times by step 50, and at most 2 times; give it"):
        iterator.set_state({"batches": 13}, 10)
    iterator.set_state({"batches": 50})


def test_too_little_text_of_a_source(mixed, tmp_path):
    (tmp_path / "d.txt").write_text("d")
    config = mixed(f"a=1,{tmp_path}/d.txt=1")
    with pytest.raises(ConfigError, match=r"d of data\.mixture has 3 training tokens, 0 windows of .*fewer than one"):
        TrainIterator(config, open_stream(config, "train", ByteTokenizer()))
