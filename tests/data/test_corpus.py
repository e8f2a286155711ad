"""Sources of text: what is read, what is held out, what is refused."""

import json
import logging
import pathlib
from collections.abc import Iterator

import pytest
import tiny_dataset  # noqa: F401  registers the datasets

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.data import sotu as sotu_module
from bigmac_jax.data import splits
from bigmac_jax.data.corpus import JoinedDocuments, join_fingerprints, open_documents
from bigmac_jax.data.documents import WHOLE, Documents, ReadCounts
from bigmac_jax.data.local_files import find_files
from bigmac_jax.data.splits import HeldOut, choose_split, hold_out, text_key

SPLITS = ("train", "validation", "test")


def read(cache: pathlib.Path, split: str = "train", **data: str) -> list[str]:
    return list(open_documents(DataConfig(**data), split, str(cache)))


# --- the embedded corpus ---


@pytest.mark.full
def test_sotu_splits_by_year(sotu):
    config, _, streams = sotu
    assert {s: stream.counts.documents for s, stream in streams.items()} == {"train": 224, "validation": 15, "test": 10}
    total = sum(len(path.read_bytes()) for _, path in sotu_module.speech_files())
    assert sum(stream.counts.bytes for stream in streams.values()) == total == 12_185_751
    assert sum(stream.counts.words for stream in streams.values()) == 2_019_452
    held_out = list(open_documents(config.data, "validation", config.cache_dir))
    expected = [path.read_text() for year, path in sotu_module.speech_files() if choose_split(year) == "validation"]
    assert held_out == expected


def test_sotu_after_a_killed_preparation(tmp_path):
    left_over = tmp_path / "tfds" / f"sotu-{sotu_module.package_version()}" / "bigmac_sotu" / "incomplete.ABCDEF_1.0.0"
    left_over.mkdir(parents=True)
    (left_over / "bigmac_sotu-train.array_record-00000-of-00001").write_bytes(b"half")
    docs = open_documents(DataConfig(), "test", str(tmp_path))
    assert len(list(docs)) == len(list(docs)) == 10  # re-iterable
    assert not left_over.exists()


def test_sotu_is_prepared_silently(tmp_path, capfd):
    open_documents(DataConfig(), "test", str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_damaged_dataset_is_named(tmp_path):
    docs = open_documents(DataConfig(), "train", str(tmp_path))
    file = next(tmp_path.glob("tfds/**/bigmac_sotu-train*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"bigmac_sotu.* cannot be read .*delete it"):
        list(docs)


def test_a_damaged_index_is_made_again(tmp_path, caplog):
    before = open_documents(DataConfig(), "train", str(tmp_path)).fingerprint
    (file,) = tmp_path.glob("tfds/**/dataset_info.json")
    file.write_text(file.read_text()[:50])
    assert open_documents(DataConfig(), "train", str(tmp_path)).fingerprint == before
    assert sum("is damaged; preparing it again" in record.message for record in caplog.records) == 1


# --- other TFDS datasets ---


def test_tfds_by_name_and_config(tmp_path):
    plain = read(tmp_path, source="tfds:tiny_text/plain", text_field="body")
    assert plain == [f"document {i} é" for i in range(30)]
    assert read(tmp_path, "test", source="tfds:tiny_text/loud", text_field="body")[2] == "DOCUMENT 2 É"
    prints = {
        open_documents(DataConfig(source=f"tfds:tiny_text/{name}", text_field="body"), split, str(tmp_path)).fingerprint
        for name in ("plain", "loud")
        for split in ("train", "test")
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("source", "split", "field", "message"),
    [
        ("tiny_text/plain", "validation", "body", "no validation split, only train, test; set data.validation_source"),
        ("tiny_text/plain", "train", "text", "data.text_field='text' is not a feature .*use one of body, number"),
        ("tiny_text/plain", "train", "number", "holds int, not text"),
        ("tiny_text/nothing", "train", "body", "cannot be opened .*check its name and config"),
        ("no_such_dataset_here", "train", "body", "is not a dataset TFDS knows"),
        ("needs_tensorflow", "train", "body", "needs a package to be prepared .*pip install tensorflow"),
        ("not_there", "train", "body", "could not be downloaded .*ConnectionError: Failed to resolve 'host'.*network"),
    ],
)
def test_tfds_errors(tmp_path, source, split, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, split, source=f"tfds:{source}", text_field=field)
    assert "\n" not in str(error.value)


def test_validation_source_may_be_a_file_beside_a_dataset(tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    own = str(tmp_path / "own.txt")
    data = {"source": "tfds:tiny_text/plain", "text_field": "body", "validation_source": own}
    assert read(tmp_path, "validation", **data) == ["mine"]


# --- local files ---


def test_folder_file_and_glob(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes("zwei\r\nZeilen ü".encode())
    (folder / "deep" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "x": 1}\n')
    (folder / "README.md").write_text("not a document")
    (folder / ".hidden").write_text("nor this")
    own = {"validation_source": "-", "test_source": "-"}  # nothing held out
    assert read(tmp_path, source=str(folder), **own) == ["zwei\r\nZeilen ü", "three", "four"]
    assert "2 files beside the corpus left out: .hidden, README.md" in caplog.text
    (folder / ".hidden").unlink()
    read(tmp_path, source=str(folder), **own)
    assert "1 file beside the corpus left out: README.md" in caplog.text
    assert read(tmp_path, source=str(folder / "**" / "*.jsonl"), **own) == ["three", "four"]
    assert read(tmp_path, source=str(folder / "b.txt"), **own) == ["zwei\r\nZeilen ü"]


def test_what_stands_beside_a_corpus(tmp_path, caplog):
    """All in hidden folders, and a README or license; not data whose name begins like one."""
    caplog.set_level("INFO")
    folder = tmp_path / "texts"
    corpus = ["notice.jsonl", "citations-2023.jsonl", "notices.txt", "readme/a.txt", "license.csv.gz"]
    hidden = [".cache/huggingface/download/a.jsonl.metadata", ".ipynb_checkpoints/a-checkpoint.txt", "deep/.git/b.txt"]
    beside = [
        *hidden,
        "LICENSE-MIT",
        "Readme.txt",
        "__MACOSX/._a.txt",
        "__MACOSX/a.txt",
        "_SUCCESS",
        "deep/CITATION.cff",
    ]
    for name in corpus + beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\n")
    assert sorted(str(path.relative_to(folder)) for path in find_files(str(folder), "data.source")) == sorted(corpus)
    assert "9 files beside the corpus left out: .cache/huggingface/download/a.jsonl.metadata, " in caplog.text
    # A folder that the user names is not hidden by what is above it.
    assert len(find_files(str(folder / ".cache" / ".." / "deep" / ".git"), "data.source")) == 1


def test_links_in_a_folder(tmp_path):
    """They are read; one that leads nowhere, as to a disk that is not mounted, is told unless it is hidden."""
    for name in ("c", "far"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"in {name}")
    (tmp_path / "c" / "web").symlink_to("../far")
    (tmp_path / "c" / ".#a.txt").symlink_to("editor@host:1")
    own = {"validation_source": "-", "test_source": "-"}
    assert read(tmp_path, source=str(tmp_path / "c"), **own) == ["in c", "in far"]
    (tmp_path / "far").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/c/web seems to be unreadable \(No such file or directory\)"):
        read(tmp_path, source=str(tmp_path / "c"), **own)


def rows(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_many_documents_are_held_out_by_a_hash_of_their_text(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "FEW", 100)
    texts = [f"row {i}" for i in range(300)]
    source = rows(tmp_path / "rows.jsonl", texts)
    got = {split: read(tmp_path, split, source=source) for split in SPLITS}
    assert got == {split: [text for text in texts if choose_split(text_key(text)) == split] for split in SPLITS}
    assert min(map(len, got.values())) > 3
    # A split with a path of its own is not cut out of the source.
    other = rows(tmp_path / "other.jsonl", ["other"])
    assert read(tmp_path, "validation", source=source, validation_source=other) == ["other"]
    train = read(tmp_path, source=source, validation_source=other)
    assert train == [text for text in texts if choose_split(text_key(text)) != "test"]
    # In another order, and twice each: a text is in the same split, and in no other.
    again = rows(tmp_path / "again.jsonl", texts[::-1] + texts)
    assert set(read(tmp_path, "validation", source=again)) == set(got["validation"])


@pytest.mark.parametrize("count", [3, 4, 30, 1000])
def test_few_documents_are_held_out_by_a_share_of_the_text(tmp_path, caplog, count):
    """At least one each; no document in two splits, none lost, and the share is near where documents are small."""
    source = rows(tmp_path / "rows.jsonl", [f"{i} " * (1 + 37 * i % 101) for i in range(count)])
    whole = read(tmp_path, source=source, validation_source="-", test_source="-")
    with caplog.at_level(logging.INFO):
        got = {split: read(tmp_path, split, source=source) for split in SPLITS}
    assert sorted(text for texts in got.values() for text in texts) == sorted(whole) and len(whole) == count
    shares = {split: sum(map(len, texts)) / sum(map(len, whole)) for split, texts in got.items()}
    assert min(map(len, got.values())) >= 1 and shares["train"] > 0.5
    if count >= 30:
        assert all(abs(shares[split] - 0.05) < 0.6 / count for split in ("validation", "test")), shares
    line = next(r.message for r in caplog.records if "held out are" in r.message)
    assert f"{len(got['test'])} of {count} documents, {shares['test']:.1%} of the text, for test" in line


@pytest.mark.parametrize("count", [1000, 1001])
def test_few_documents_are_a_thousand(count):
    held, line = hold_out(((str(i), 1) for i in range(count)), ("validation", "test"))
    assert (held.few is None) == (count > 1000) == line.startswith("1 in 20 documents each for validation and test")


def test_documents_that_are_held_out_by_hand() -> None:
    """Of 100 characters 5 each, in the order of keys; copies count for their text, and training keeps a document."""
    splits = ("validation", "test")
    held, line = hold_out([("d", 3), ("c", 2), ("b", 2), ("a", 92), ("d", 1)], splits)
    assert held.few == {"a": "train", "b": "validation", "c": "validation", "d": "test"}
    assert line == (
        "held out are 2 of 4 documents, 4.0% of the text, for validation; 1 of 4 documents, 4.0% of the text, for test"
    )
    # Where none is near, the smallest; of equal ones the first.
    held, _ = hold_out([("a", 40), ("b", 30), ("d", 20), ("c", 20)], splits)
    assert held.few == {"a": "train", "b": "train", "c": "validation", "d": "test"}
    held, _ = hold_out([(key, 1) for key in "cab"], splits)
    assert held.few == {"a": "validation", "b": "test", "c": "train"}
    held, _ = hold_out([(key, 1) for key in "cab"], ("test",))
    assert held.few == {"a": "test", "b": "train", "c": "train"}
    # Many equal ones: a twentieth each, rounded to what is nearer.
    held, _ = hold_out([(f"{i:03}", 1) for i in range(50)], splits)
    assert held.few and [list(held.few.values()).count(split) for split in splits] == [2, 2]


def test_ends_that_are_held_out_by_hand() -> None:
    """Of the longest copy; the last split has what is left."""
    held, line = hold_out([("k", 100), ("k", 99)], ("validation", "test"))
    assert held.sizes == {"k": 100} and line == "the text's end is held out: 5% for validation, 5% for test"
    held = HeldOut(("validation", "test"), sizes={text_key("x"): 1000})
    assert [held.portion("x", split) for split in SPLITS] == [(0, 900), (900, 950), (950, None)]
    held = HeldOut(("test",), sizes={text_key("x"): 1000})
    assert [held.portion("x", split) for split in ("train", "test")] == [(0, 950), (950, None)]
    for given in (("test", "validation"), ("test",)):  # for one split, too: a whole one would be half of the text
        held, line = hold_out([("k", 1), ("l", 2)], given)
        assert held.sizes == {"k": 1, "l": 2} and line.startswith("the end of each of 2 documents is")
    assert HeldOut(()).portion("x", "test") == WHOLE


def test_a_documents_key_and_split_stay() -> None:
    """Or what was held out of a run's text would be trained on by the next one."""
    assert text_key("x") == "2d711642b726b04401627ca9fbac32f5"
    held = {year: choose_split(year) for year in range(1790, 1850) if choose_split(year) != "train"}
    assert {year for year, split in held.items() if split == "test"} == {1810, 1816, 1847}
    assert {year for year, split in held.items() if split == "validation"} == {1802, 1820, 1840, 1842, 1849}


@pytest.mark.parametrize("count", [1, 2])
def test_of_fewer_documents_than_splits_the_ends_are_held_out(tmp_path, caplog, count):
    texts = [f"document {i}: " + "".join(f"{word} " for word in range(200_000)) for i in range(count)]
    source = rows(tmp_path / "rows.jsonl", texts)
    with caplog.at_level(logging.INFO):
        got = {split: read(tmp_path, split, source=source) for split in SPLITS}
    assert [list(parts) for parts in zip(*got.values(), strict=True)] == [
        [text[:a], text[a:b], text[b:]]
        for text, (a, b) in zip(texts, _edges(got), strict=True)
    ]  # fmt: skip
    for text, (a, b) in zip(texts, _edges(got), strict=True):
        assert abs(a / len(text) - 0.9) < 1e-4 and abs(b / len(text) - 0.95) < 1e-4
        assert text[a] == text[b] == " "  # no word is cut
    assert "5% for validation, 5% for test" in caplog.text
    # The end alone, where the other split has a path of its own; and all of it where both have.
    if count == 1:
        assert read(tmp_path, "test", source=source, validation_source="-") == got["test"]
    assert read(tmp_path, source=source, validation_source="-", test_source="-") == texts


def test_copies_are_cut_where_one_of_them_is(tmp_path):
    one, other = ("".join(f"{name}{word} " for word in range(2000)) for name in "ab")
    alone = rows(tmp_path / "alone.jsonl", [one])
    twice = rows(tmp_path / "twice.jsonl", [one, other, one])
    for split in SPLITS:
        (part,) = read(tmp_path, split, source=alone)
        assert read(tmp_path, split, source=rows(tmp_path / "copies.jsonl", [one, one])) == [part, part]
        first, second, again = read(tmp_path, split, source=twice)
        assert first == again == part and second == part.replace("a", "b")


def test_a_line_end_of_two_characters_is_a_place_to_cut(tmp_path):
    """Of text without spaces the only one."""
    (tmp_path / "a.txt").write_bytes(("国情咨文说的是国家的状况。\r\n" * 20_000).encode())
    got = {split: read(tmp_path, split, source=str(tmp_path / "a.txt")) for split in SPLITS}
    assert [len(parts) for parts in got.values()] == [1, 1, 1]
    assert "".join(part for (part,) in got.values()) == (tmp_path / "a.txt").read_bytes().decode()
    for split in ("validation", "test"):
        assert got[split][0].startswith("\r\n国") and abs(len(got[split][0]) / 300_000 - 0.05) < 1e-3


def test_a_text_without_a_place_to_cut_has_no_held_out_split(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    with pytest.raises(ConfigError, match=r"^validation split of .* has 0 documents with text .*; set data.validation"):
        read(tmp_path, "validation", source=str(tmp_path / "a.txt"))


def _edges(got: dict[str, list[str]]) -> list[tuple[int, int]]:
    return [(len(a), len(a) + len(b)) for a, b in zip(got["train"], got["validation"], strict=True)]


def test_fingerprint_follows_content(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "v.txt"
    path.write_text("one")
    other.write_text("v")
    seen = set()

    def changed(split: str = "train", **data: str) -> bool:
        new = open_documents(DataConfig(source=str(path), **data), split, str(tmp_path)).fingerprint
        return new not in seen and not seen.add(new)

    assert changed()
    assert not changed()
    assert changed("validation")
    assert changed(validation_source=str(other))
    assert changed(text_field="body")
    path.write_text("two")  # as long as before
    assert changed()


def test_broken_utf8_is_replaced_counted_and_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \xc3"}\n{"text": "lone \\ud800 surrogate"}\n{"text": "fine"}\n')
    (tmp_path / "c.csv").write_bytes(b"n,text\n1,all\n2,\xc3a\n3,of it\n\xff,\n")
    (tmp_path / "d.json").write_bytes(b'[{"text": "\xff"}, {"text": "end"}]')
    with caplog.at_level(logging.WARNING):
        docs = open_documents(
            DataConfig(source=str(tmp_path), validation_source="-", test_source="-"), "train", str(tmp_path / ".cache")
        )
        texts = ["good �� bad", "half �", "lone � surrogate", "fine", "all", "�a", "of it", "�", "end"]
        assert list(docs) == texts
        list(docs)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "5 documents" in lines[0]
    assert all(name in lines[0] for name in ("a.txt", "b.jsonl", "c.csv", "d.json"))


def test_empty_documents_are_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "word"}\n{"text": " \\n"}\n')
    with caplog.at_level(logging.INFO):
        assert read(tmp_path, source=str(path), validation_source="-", test_source="-") == ["word"]
    assert [r.message for r in caplog.records if "2 empty documents skipped" in r.message]


def test_byte_order_mark_in_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "word"}')
    assert read(tmp_path, source=str(tmp_path / "a.jsonl")) == ["word"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "a.jsonl line 2 is not valid JSON"),
        ("[" * 100_000, "a.jsonl line 2 is not valid JSON"),
        ('["text"]', "line 2 is a JSON list; each line must be one JSON object"),
        ('{"body": "x"}', "line 2: data.text_field='text' is missing; set data.text_field to .*body"),
        ('{"text": 7}', "line 2: data.text_field='text' holds int; no field here is text: give another data.source$"),
        ('{"id": 7}', "is missing; no field here is text: give another data.source, or leave such rows out with"),
        ('{"messages": []}', "is missing; rows with messages are of tuning.objective=sft; give that$"),
        ('{"conversations": []}', "is missing; rows with conversations are of tuning.objective=sft; give that$"),
        (
            '{"prompt": "a", "completion": "b"}',
            "rows with completion are of tuning.objective=sft; .* prompt, completion$",
        ),
        ('{"prompt": [], "chosen": [], "rejected": []}', "is missing; rows with chosen are of tuning.objective=dpo"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': 'fine'})}\n{line}\n")
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert "\n" not in str(error.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7")
    for source, split, message in [
        ("empty", "train", "holds no file; put files there that are .txt, .jsonl"),
        ("missing.txt", "train", "data.source='.*missing.txt' is not there; use sotu"),
        ("*.nothing", "train", "is not there"),
        ("a.pdf", "train", "a.pdf seems to be PDF, and read are .txt, .*; convert it"),
        ("blank.txt", "train", r"0 documents with text \(1 empty\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, split, source=str(tmp_path / source))
    with pytest.raises(ConfigError, match=r"data\.test_source='nowhere' is not there"):
        read(tmp_path, "test", source=str(tmp_path / "one.txt"), test_source="nowhere")
    with pytest.raises(ConfigError, match="split='dev' must be one of"):
        read(tmp_path, "dev")


# --- several sources ---


class Pieces(Documents):
    """Documents of which each is a list of pieces."""

    fix, fingerprint = "give some", ""

    def __init__(self, name: str, size: int, *documents: list[str]):
        self.name, self.size, self._documents, self.fingerprint = name, size, documents, f"of {name}"

    def read(self, unit, counts):
        raise NotImplementedError

    def all_pieces(self) -> Iterator[tuple[str, bool]]:
        for pieces in self._documents:
            yield from ((piece, piece is pieces[-1]) for piece in pieces)


def test_several_sources_are_read_in_turn_by_bytes():
    """A piece of whichever has the smallest share behind it, though its document goes on; one that says no size counts
    as of one byte."""
    a = Pieces("a", 12, ["A1", "a2", "a3", "a4"], ["A5", "a6"])
    b = Pieces("b", 6, ["B1b"], ["B2b"])
    c = Pieces("c", 0, ["C"], ["CC"])
    joined = JoinedDocuments({"a": a, "b": b, "c": c})
    # Shares before each piece: a 0, b 0, c 0, a 1/6, a 1/3, a 1/2, b 1/2, a 2/3, a 5/6, then all have one.
    assert list(joined.all_text()) == ["A1", "B1b", "C", "a2", "a3", "a4", "B2b", "A5", "a6", "CC"]
    assert list(joined) == ["A1a2a3a4", "A5a6", "B1b", "B2b", "C", "CC"]
    assert (joined.name, joined.size) == ("a and b and c", 18)
    assert joined.fingerprint == join_fingerprints({"a": "of a", "b": "of b", "c": "of c"}) != "of a"
    assert JoinedDocuments({"a": a}).fingerprint == "of a"
    with pytest.raises(NotImplementedError):
        joined.read((), ReadCounts())


def test_defects_are_told_with_five_names_at_most(tmp_path, caplog):
    """And each once, of those that there are."""
    (tmp_path / "a.txt").write_text("text")
    docs = open_documents(DataConfig(str(tmp_path / "a.txt")), "train", str(tmp_path / "cache"))
    names = [f"{i}.txt" for i in range(6)]
    with caplog.at_level(logging.INFO, "bigmac_jax"):
        docs.report(ReadCounts(found=1))
        assert not caplog.messages
        docs.report(ReadCounts(found=9, broken=5, files=[*names[:5], names[0]]))
        docs.report(ReadCounts(found=9, broken=6, files=names))
        docs.report(ReadCounts(found=1, empty=1, null=1234))
        docs.report(ReadCounts(found=1, empty=1))
    listed = "0.txt, 1.txt, 2.txt, 3.txt, 4.txt"
    assert [(record.levelname, record.message.removeprefix(f"{docs.name}: ")) for record in caplog.records] == [
        ("WARNING", f"5 documents hold bytes that are not UTF-8, replaced by U+FFFD: {listed}"),
        ("WARNING", f"6 documents hold bytes that are not UTF-8, replaced by U+FFFD: {listed} and 1 more"),
        ("INFO", "1 empty documents skipped"),
        ("WARNING", "1,234 rows left out, whose data.text_field is null or missing"),
    ]
    with pytest.raises(ConfigError, match=r"has 0 documents with text \(2 empty, 3 rows without data\.text_field\); "):
        docs.report(ReadCounts(empty=2, null=3))
