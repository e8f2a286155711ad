"""The same documents give the same tokens whatever holds them; what is broken is one line with its place."""

import codecs
import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE
from training.tools import as_saved

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data import documents, encoding, kinds, local_files, readers, text_field
from bigmac_jax.data.chat_files import read_chat
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.kinds import guess_kind
from bigmac_jax.data.pipeline import open_stream, text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from bigmac_jax.evaluation.tasks.definitions import load_task
from bigmac_jax.planning.hardware import load_hardware

TEXTS = [f"{i}: {SAMPLE}" + "words and\n" * (i % 7 * 40) for i in range(90)] + ["x" * 400_000, "tail"]
OWN = {"validation_source": "-", "test_source": "-"}
Make = Callable[..., Config]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text, "deep": {"text": [1, "]"]}} for text in texts], indent=1).encode()


def comma(texts: list[str]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows([["n", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def parquet(texts: list[str], kind: Any = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(len(texts)), "text": pa.array(texts, kind)}), sink, row_group_size=13)
    return sink.getvalue().to_pybytes()


def arrow(texts: list[str], new: Any = pa.ipc.new_file, kind: Any = None) -> bytes:
    table, sink = pa.table({"text": pa.array(texts, kind)}), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return sink.getvalue().to_pybytes()


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


CONTAINERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lines,
    "a.json": array,
    "b.json": lines,  # as some name them
    "a.csv": comma,
    "a.parquet": parquet,
    "large.parquet": lambda texts: parquet(texts, pa.large_string()),
    "dictionary.parquet": lambda texts: parquet(texts, pa.dictionary(pa.int32(), pa.string())),
    "view.parquet": lambda texts: parquet(texts, pa.string_view()),
    "dictionary.arrow": lambda texts: arrow(texts, kind=pa.dictionary(pa.int8(), pa.large_string())),
    "view.arrow": lambda texts: arrow(texts, pa.ipc.new_stream, pa.string_view()),
    "a.arrow": arrow,
    "stream.arrow": lambda texts: arrow(texts, pa.ipc.new_stream),
    "a.feather": arrow,
}
WAYS = [*CONTAINERS, *(f"{name}{end}" for name in CONTAINERS for end in (".gz", ".zst") if "parquet" not in name)]
FAST = ("a.jsonl", "a.json.gz", "a.csv.zst", "a.parquet", "a.arrow.gz", "stream.arrow", "a.feather",
        "dictionary.parquet", "view.parquet", "dictionary.arrow", "view.arrow")  # fmt: skip


def content_of(name: str, texts: list[str]) -> bytes:
    for end, compress in ((".gz", gzip.compress), (".zst", zstandard)):
        if name.endswith(end):
            return compress(content_of(name.removesuffix(end), texts))
    return CONTAINERS[name](texts)


def tokens(make_config: Make, source: object, **data: Any) -> tuple[list[int], Any]:
    stream = open_stream(make_config(source, **OWN, **data), "train", ByteTokenizer())
    return stream.tokens(0, stream.num_tokens).tolist(), stream.counts


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.full) for n in WAYS])
def test_the_same_tokens(name, tmp_path, make_config, monkeypatch):
    """As one file or as several, read whole or in parts, and as text files."""
    monkeypatch.setattr(local_files, "UNIT", 60_000)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_bytes(content_of(name, TEXTS))
    (tmp_path / "many").mkdir()
    for i in range(0, len(TEXTS), 31):
        (tmp_path / "many" / f"{i:02}-{name}").write_bytes(content_of(name, TEXTS[i : i + 31]))
    expected = [256, *(i for text in TEXTS for i in [*text.encode(), 256])]
    found, counts = tokens(make_config, tmp_path / "one")
    assert found == expected
    assert (counts.documents, counts.words) == (len(TEXTS), sum(len(text.split()) for text in TEXTS))
    assert tokens(make_config, tmp_path / "many") == (found, counts)


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_files_of_text(end, tmp_path, make_config, monkeypatch):
    """Each a document, read in blocks that cut characters and words."""
    monkeypatch.setattr(kinds, "BLOCK", 1021)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard}[end]
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt{end}").write_bytes(compress(text.encode()))
    found, counts = tokens(make_config, tmp_path)
    assert found == [256, *(i for text in TEXTS for i in [*text.encode(), 256])]
    assert counts.words == sum(len(text.split()) for text in TEXTS)


def test_parts_of_files_are_where_lines_begin(tmp_path, make_config, monkeypatch):
    """Every line is in one part, however the parts are cut."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["one", "two", "three ü", "four"]).replace(b"\n", b"\n\n", 1))
    for unit in (1, 2, 3, 7, 19, 20, 21, 50):
        monkeypatch.setattr(local_files, "UNIT", unit)
        docs = open_documents(make_config(path, **OWN).data, "train", str(tmp_path / "cache"))
        assert list(docs) == ["one", "two", "three ü", "four"], unit
        assert len(docs.units) == -(-path.stat().st_size // unit)


@pytest.mark.parametrize(("unit", "expected"), [(9, 4), (10, 2), (19, 2), (20, 1)])
def test_small_files_fill_a_unit(unit, expected, tmp_path, make_config, monkeypatch):
    """Four of five bytes: as many as go into it whole."""
    monkeypatch.setattr(local_files, "UNIT", unit)
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("text ")
    docs = open_documents(make_config(tmp_path, **OWN).data, "train", str(tmp_path / "cache"))
    assert len(docs.units) == expected and list(docs) == ["text "] * 4


def test_long_texts_come_in_the_pieces_of_the_whole():
    """However they are cut into chunks; an end of one is not an end of the text."""
    text = "".join(f"wörd{i}\n " for i in range(90_000)) + "x" * 600_000
    expected = list(documents.cut_text(text))
    for size in (1, 7, 100_000):
        chunks = (text[i : i + size] for i in range(0, len(text) if size > 1 else 0, size))
        if size > 1:
            assert list(documents.cut_chunks(chunks)) == expected
    encoded = text.encode()
    for size in (3, 65_537):
        blocks = iter([encoded[i : i + size] for i in range(0, len(encoded) if size > 3 else 3000, size)])
        got = "".join(documents._Decoder(blocks))
        assert got == (text if size > 3 else encoded[:3000].decode(errors="replace"))


def test_texts_are_cut_by_hand() -> None:
    """Pieces of 3 to 6: at a space or line's end behind a visible character, or else at 6."""
    cases = {
        "abcdef": ["abcdef"], "abcdefg": ["abcdef", "g"], "abc defg": ["abc", " defg"], "abcde fgh": ["abcde", " fgh"],
        "abcdef gh": ["abcdef", " gh"], "ab  efgh": ["ab  ef", "gh"], "ab cdefg": ["ab cde", "fg"],
        "abc\nefgh": ["abc", "\nefgh"], "abcdefghijkl": ["abcdef", "ghijkl"],
        "abcd fghij lmn": ["abcd", " fghij", " lmn"],
        "abc\refgh": ["abc\ref", "gh"], "": [""],
    }  # fmt: skip
    assert {text: list(documents.cut_text(text, 3)) for text in cases} == cases
    for text, pieces in cases.items():
        assert list(documents.cut_chunks(iter(text), 3)) == pieces


def test_portions_are_cut_by_hand() -> None:
    """Before white space at or behind the characters that are given; nothing behind them is read."""
    wanted = [(0, 8), (0, None), (1, 4), (2, 5), (3, 6), (5, 5), (6, None), (0, 2), (8, None)]
    found = ["".join(documents.cut_portion(["ab cd ef"], documents.Portion(*of))) for of in wanted]
    assert found == ["ab cd ef", "ab cd ef", " cd", " cd", " ef", "", "", "ab", ""]
    parts = iter(["ab cd", " ef gh", "!"])
    assert list(documents.cut_portion(parts, documents.Portion(3, 7))) == [" ef"] and list(parts) == ["!"]
    parts = iter(["ab cd", " ef gh", "!"])
    assert list(documents.cut_portion(parts, documents.Portion(0, 5))) == ["ab cd"] and next(parts) == " ef gh"
    assert list(documents.cut_portion(["ab", "\r\ncd", " e"], documents.Portion(2))) == ["\r\ncd", " e"]


def test_the_last_of_some() -> None:
    for count in range(4):
        marked = [(str(i), i == count - 1) for i in range(count)]
        assert list(documents.mark_last(map(str, range(count)))) == marked


def test_a_character_that_is_cut_off() -> None:
    for text, blocks in {
        b"a\xc3": (b"a", b"\xc3"), b"a\xc3\xa9": (b"a\xc3\xa9", b""), b"\xf0\x9f\x98": (b"", b"\xf0\x9f\x98"),
        b"abcde": (b"abcde", b""), b"ab\xf0\x9f": (b"ab", b"\xf0\x9f"), b"": (b"", b""), b"a\xff": (b"a\xff", b""),
        "ab😀".encode(): ("ab😀".encode(), b""),
    }.items():  # fmt: skip
        assert documents.split_last_character(text) == blocks


def test_words_are_those_of_the_whole_text() -> None:
    """However it is cut; ASCII is counted by its bytes where it is long."""
    assert np.flatnonzero(encoding._SPACE).tolist() == [i for i in range(128) if chr(i).isspace()]
    draw = random.Random(0)
    for letters in ("ab \t\n\x0b\x1c\x1f ", "aé \n\u2003\x85 "):
        for size in (1, 30, 500, 2000):
            text = "".join(draw.choices(letters, k=3 * size))
            cuts = [0, *sorted(draw.randrange(len(text)) for _ in range(5)), len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
            counter, found = encoding.WordCounter(), 0
            for number, piece in enumerate(pieces):
                found += counter.count(piece, piece.encode(), number == len(pieces) - 1)
            assert found == len(text.split()), text
            assert counter.count("ab", b"ab", True) == 1  # of the next document
    skipping = encoding.WordCounter()
    skipping.skip("wo", False)
    assert skipping.count("rd two", b"rd two", False) == 1


def test_pieces_are_encoded_some_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH", 10)
    parts = [("abcd", False), ("efghij", True), ("k l", True), ("m" * 10, False), ("n", True)]
    counts, words = encoding.Counts(), encoding.WordCounter()
    found = [(tokens.tolist(), n) for tokens, n in encoding.encode_pieces(parts, ByteTokenizer(), counts, words)]
    assert found == [
        ([*b"abcdefghij", 256], 2), ([*b"k l", 256, *b"mmmmmmmmmm"], 2), ([*b"n", 256], 1),
    ]  # fmt: skip
    assert vars(counts) == {"tokens": 27, "documents": 3, "bytes": 24, "words": 4}


def test_files_are_cut_into_slices_by_hand(monkeypatch):
    """Lines by bytes, tables by their groups, and the rest not at all."""

    def cut(kind: str, size: int, unit: int, groups: int = 0, compression: str = "") -> list[tuple[Any, ...]]:
        monkeypatch.setattr(readers, "count_parts", lambda path, kind: groups)
        return [
            tuple(part) for part in readers.cut_slices(3, pathlib.Path("a"), kinds.Kind(kind, compression), size, unit)
        ]

    assert cut("jsonl", 10, 4) == [(3, 0, 4, 4), (3, 4, 8, 4), (3, 8, 10, 2)]
    assert cut("jsonl", 8, 4) == [(3, 0, 4, 4), (3, 4, 8, 4)]
    for whole in (("jsonl", 4, 4), ("txt", 10, 4), ("json", 10, 4), ("jsonl", 10, 4, 0, "gz"), ("parquet", 4, 4, 9)):
        assert cut(*whole) == [(3, 0, None, whole[1])]
    assert cut("parquet", 103, 30, 5) == [(3, 0, 1, 28), (3, 1, 2, 25), (3, 2, 3, 25), (3, 3, 5, 25)]
    assert cut("arrow", 120, 30, 9) == [(3, 0, 2, 30), (3, 2, 4, 30), (3, 4, 6, 30), (3, 6, 9, 30)]
    assert cut("feather", 100, 30, 2) == [(3, 0, 1, 50), (3, 1, 2, 50)]
    assert cut("parquet", 100, 30, 1) == [(3, 0, 1, 100)] and cut("parquet", 100, 30, 0) == [(3, 0, 0, 100)]


def test_a_damaged_table_is_not_cut_by_a_guess(tmp_path):
    """Which another host, that can read it, would not share."""
    for content, message in ((b"PAR1 and no more", "is damaged or cut off"), (b"%PDF-1.7", "seems to be PDF")):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/a\.parquet {message}"):
            readers.cut_slices(0, tmp_path / "a.parquet", kinds.Kind("parquet"), 16, 8)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.jsonl"])
def test_a_slice_has_its_rows_and_their_numbers(name, tmp_path):
    """Of groups of 13 and batches of 17, the third; lines from the byte behind the thirtieth."""
    rows = [f"row {i}" for i in range(60)]
    path, kind = tmp_path / name, guess_kind(pathlib.Path(name))
    field = text_field.TextField("text")
    first = {"parquet": 26, "arrow": 34, "jsonl": 30}[kind.name]
    last = {"parquet": 39, "arrow": 51, "jsonl": 32}[kind.name]
    path.write_bytes(content_of(name, rows))
    starts = [0, *itertools.accumulate(len(lines([row])) + (i > 9) for i, row in enumerate(rows))]
    part = documents.Slice(0, 2, 3, 77) if kind.name != "jsonl" else documents.Slice(0, starts[30], starts[32], 77)
    counts = documents.ReadCounts(source=5)
    assert [content for _, content, _ in readers.read_slice(path, kind, part, field, counts)] == (
        rows[first:last] if kind.name == "jsonl" else [row.encode() for row in rows[first:last]]
    )
    assert counts.source == 82
    path.write_bytes(content_of(name, [*rows[: first + 1], None, *rows[first + 2 :]]))
    with pytest.raises(ConfigError, match=rf"{name} (row|line) {first + 2}: data\.text_field='text' is null"):
        list(readers.read_slice(path, kind, part, field, counts))


def damaged_gzip(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(9) + content[len(content) // 2 + 9 :]


BROKEN: list[tuple[str, bytes, str]] = [
    ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-50], r"a\.jsonl\.gz is damaged or cut off \(EOFError.*good copy"),
    ("a.jsonl.gz", damaged_gzip(gzip.compress(lines(TEXTS))), r"a\.jsonl\.gz is damaged or cut off"),
    ("a.txt.zst", zstandard(SAMPLE.encode() * 99)[:-9], r"a\.txt\.zst cannot be read \(.*Truncated compressed"),
    ("a.txt.gz", b"not compressed", r"a\.txt\.gz is damaged or cut off \(BadGzipFile"),
    ("a.txt", parquet(["a"]), r"a\.txt seems to be Parquet, not \.txt; give it the ending of what it is"),
    ("a.jsonl.gz", gzip.compress(arrow(["a"])), r"a\.jsonl\.gz seems to be Arrow, not \.jsonl"),
    ("a.parquet", b"text", r"a\.parquet seems to be text, not \.parquet"),
    ("a.txt", "text".encode("utf-16"), r"a\.txt seems to be text as UTF-16, not \.txt; save it as UTF-8"),
    ("a.jsonl.gz", gzip.compress("{}".encode("utf-16")), r"a\.jsonl\.gz seems to be text as UTF-16, not \.jsonl; save"),
    ("a.csv", "text\n".encode("utf-16"), r"a\.csv seems to be text as UTF-16"),
    ("a.txt", "naïve – “text”".encode("utf-16-le"), r"a\.txt seems to be text as UTF-16, not \.txt; save it as UTF-8"),
    ("a.txt.gz", gzip.compress(b"\0a" * 3000), r"a\.txt\.gz seems to be text as UTF-16"),
    ("a.json", '{"text": "a"}'.encode("utf-16-be"), r"a\.json seems to be text as UTF-16"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-32-le"), r"a\.jsonl seems to be text as UTF-16"),
    ("a.jsonl", b'{"text": null}', r"a\.jsonl line 1: data\.text_field='text' is null; .* data\.null_rows=skip"),
    ("a.jsonl", b'{"body": "a"}', r"a\.jsonl line 1: data\.text_field='text' is missing; .*one of body, or leave such"),
    ("a.parquet", parquet(["a" * 99] * 99)[:-9], r"a\.parquet is damaged or cut off \(ArrowInvalid"),
    ("a.parquet.gz", gzip.compress(parquet(["a"])), r"Parquet is compressed inside; decompress the file"),
    ("a.arrow", arrow(["a" * 99] * 99, pa.ipc.new_stream)[:-200], r"a\.arrow (is damaged or cut off|cannot be read)"),
    ("a.json", b'[{"text": "a"}, {"text": "b"}', r"a\.json is cut off behind entry 2"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json behind entry 1: a comma is missing"),
    ("a.json", b'[{"text": "a"}] 7', r"something stands behind the array"),
    ("a.json", b'{"text": "a"}\n{"text": "b', r"a\.json entry 2 is not valid JSON"),
    ("a.json", b'[{"text": "a"},7]', r"a\.json entry 2 is a JSON int"),
    ("a.json", b'{"text": "a"} {"text": 7}', r"a\.json entry 2: data\.text_field='text' holds int"),
    ("a.json", b"[" * 100_000, r"a\.json entry 1 is nested too deeply"),
    ("a.csv", b"n,text\n1,a\n2\n", r"a\.csv line 3 has 1 columns, its first line 2"),
    ("a.csv", b'n,text\n1,"a\n2,b\n', r"a\.csv line 3 is not valid CSV"),
    ("a.csv", b"n,body\n1,a\n", r"a\.csv line 2: data\.text_field='text' is missing; set .*one of n, body"),
    ("a.jsonl", lines(["fine"] * 500) + b'{"text": 7}\n', r"a\.jsonl line 501: data\.text_field='text' holds int"),
    ("a.jsonl", b'{"text": "' + b"x" * 3000 + b'"}\n', r"a\.jsonl line 1 is longer than 64 MiB; .*\.txt of its own"),
    ("a.json", b'[{"text": "' + b"x" * 3000 + b'"}]', r"a\.json entry 1 is longer than 64 MiB"),
    ("a.csv", b"text\n" + b"x" * 3000, r"a\.csv: a line is longer than 64 MiB"),
    ("a.parquet", parquet(["x" * 3000]), r"a\.parquet row 1 is longer than 64 MiB"),
    ("a.txt", b"", r"0 documents with text \(1 empty\)"),
    ("a.jsonl.gz", gzip.compress(b""), r"0 documents with text \(0 empty\)"),
    ("a.csv", b"text\n", r"0 documents with text \(0 empty\)"),
    ("a.parquet", b"", r"a\.parquet is damaged or cut off"),
    ("a.arrow", b"", r"a\.arrow (is damaged or cut off|cannot be read)"),
    ("a.bin", b"\0\1\2", r"a\.bin seems to be binary data, and read are \.txt, .*; convert it"),
    ("a.md", b"# Title\n", r"a\.md seems to be text, .*; rename it to \.txt"),
    ("a.tar", bytes(257) + b"ustar", r"a\.tar seems to be a tar file"),
    ("a.xlsx", b"PK\x03\x04", r"a\.xlsx seems to be a zip file \(also \.docx"),
]  # fmt: skip


def table_of(column: Any, name: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column, "other": ["o"] * len(column)}), sink)
    return sink.getvalue().to_pybytes()


BROKEN += [
    ("a.parquet", table_of(["a"], "body"), r"a\.parquet: data\.text_field='text' is missing; .*one of body, other"),
    ("a.parquet", table_of([1]), r"a\.parquet: data\.text_field='text' holds int64; set .*one of other"),
    ("a.parquet", table_of(["a", None]), r"a\.parquet row 2: data\.text_field='text' is null; mend the row, or leave"),
    ("a.parquet", table_of([["a"]]), r"data\.text_field='text' holds list"),
]


def doubled(new: Any) -> bytes:
    """Two columns of the field's name, in an Arrow file or stream, or in Parquet."""
    sink, table = pa.BufferOutputStream(), pa.table([["one"], ["uno"], ["o"]], names=["text", "text", "other"])
    if new is pq.write_table:
        new(table, sink)
    else:
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


TWICE = "2 columns are named 'text', which is data.text_field; rename all but one"
BROKEN += [
    ("a.parquet", doubled(pq.write_table), rf"a\.parquet: {TWICE}"),
    ("a.arrow", doubled(pa.ipc.new_file), rf"a\.arrow: {TWICE}"),
    ("a.feather.gz", gzip.compress(doubled(pa.ipc.new_stream)), rf"a\.feather\.gz: {TWICE}"),
    ("a.csv", b"text,n,text\none,1,uno\n", rf"a\.csv line 1: {TWICE}"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)), ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BROKEN)])
def test_what_is_broken_is_one_line(case, tmp_path, make_config, monkeypatch):
    name, content, message = BROKEN[case]
    monkeypatch.setattr(kinds, "LONGEST", 1 << 20 if "longer" not in message else 2000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        tokens(make_config, tmp_path / name)
    assert "\n" not in str(error.value)


def with_mark(name: str, content: bytes) -> bytes:
    """Behind a byte order mark."""
    for end, compress, decompress in ((".gz", gzip.compress, gzip.decompress), (".zst", zstandard, None)):
        if name.endswith(end):
            plain = decompress(content) if decompress else pa.input_stream(pa.py_buffer(content), "zstd").read()
            return compress(codecs.BOM_UTF8 + plain)
    return codecs.BOM_UTF8 + content


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.zst"]
)
def test_a_byte_order_mark_is_no_text(name, tmp_path, make_config, monkeypatch):
    """Nor does a part of a file of lines begin later for it."""
    monkeypatch.setattr(local_files, "UNIT", 40)
    texts = ["one", "two and three", "four"]
    content = b"four" if ".txt" in name else content_of(name.removesuffix(".gz").removesuffix(".zst"), texts)
    if ".csv" in name:
        content = b'"text","n"\r\none,1\r\n"two and three",2\r\nfour,3\r\n'  # the first name in quotes
    compress = gzip.compress if name.endswith(".gz") else zstandard if name.endswith(".zst") else bytes
    (tmp_path / name).write_bytes(with_mark(name, compress(content)))
    expected = [256, *b"four", 256] if ".txt" in name else [256, *(i for text in texts for i in [*text.encode(), 256])]
    assert tokens(make_config, tmp_path / name)[0] == expected


def test_a_text_to_score_begins_behind_its_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"four")
    assert text_stream(tmp_path / "a.txt", ByteTokenizer()).tokens(0, 6).tolist() == [256, *b"four", 256]
    (tmp_path / "a.txt").write_bytes("four".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.txt seems to be text as UTF-16, not \.txt; save it as UTF-8"):
        text_stream(tmp_path / "a.txt", ByteTokenizer())


def test_whatever_else_is_text_may_have_a_mark(tmp_path, sotu):
    """A config, a tokenizer, a chat template, a machine, a task."""
    config, tokenizer, _ = sotu
    assert Config.from_json(codecs.BOM_UTF8 + config.to_json().encode()) == as_saved(config)
    (tmp_path / "tokenizer.json").write_bytes(codecs.BOM_UTF8 + tokenizer.json_text.encode())
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(dataclasses.replace(config, data=data)).encode("the union") == tokenizer.encode("the union")
    (tmp_path / "chat.jinja").write_bytes(codecs.BOM_UTF8 + b"{{ messages }}")
    assert read_chat(str(tmp_path / "chat.jinja"), "", "--chat_template").template == "{{ messages }}"
    package = pathlib.Path(local_files.__file__).parents[1]
    for name, read in (("planning/hardware/v5e.toml", load_hardware), ("evaluation/tasks/piqa.toml", load_task)):
        (file := tmp_path / pathlib.Path(name).name).write_bytes(codecs.BOM_UTF8 + (package / name).read_bytes())
        assert read(str(file)) == read(file.stem)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "dictionary.parquet", "a.arrow.gz", "stream.arrow"])
def test_rows_without_a_text_are_left_out_and_counted(name, tmp_path, make_config, caplog):
    (tmp_path / name).write_bytes(content_of(name, ["one", None, "two", None]))
    found, counts = tokens(make_config, tmp_path / name, null_rows="skip")
    assert found == [256, *b"one", 256, *b"two", 256] and counts.documents == 2
    assert f"{name}: 2 rows left out, whose data.text_field is null or missing" in caplog.text
    with pytest.raises(ConfigError, match=r" 2: data\.text_field='text' is null; mend the row, or leave such rows out"):
        tokens(make_config, tmp_path / name)  # though its tokens are in the cache
    (tmp_path / name).write_bytes(content_of(name, [None]))
    with pytest.raises(ConfigError, match=r"0 documents with text \(0 empty, 1 rows without data\.text_field\)"):
        tokens(make_config, tmp_path / name, null_rows="skip")


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "entries",
    [
        [b'{"text": "good"}', b'{"text": "bad \xff two"}', b'{"text": "cut \xf0\x9f three"}'],
        [b'{"text": ""}', b'{"text": "bad \xff\xff two"}', b'{"text": "bad \xfe three"}', b'{"text": "good \\udc80"}'],
        [b'{"text": "good"}', b'{"text": "good", "other": "bad \xff"}', b'{"text": "\xc3\xa9 good"}'],
    ],
)
def test_an_entry_is_charged_with_its_own_bytes_alone(entries, block, tmp_path, make_config, monkeypatch, caplog):
    """As a line is, however many stand in a block."""
    monkeypatch.setattr(kinds, "BLOCK", block)
    contents = {
        "a.jsonl": b"\n".join(entries),
        "a.json": b"[" + b", ".join(entries) + b"]",
        "b.json": b"".join(entries),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    texts = {
        name: list(open_documents(make_config(tmp_path / name, **OWN).data, "train", tmp_path)) for name in contents
    }
    assert texts["a.json"] == texts["b.json"] == texts["a.jsonl"]
    counts = [re.search(r"(\d+) documents hold bytes", message) for message in caplog.messages]
    assert len({count and count[1] for count in counts}) == 1 and len(counts) == 3


def test_a_line_of_a_part_is_counted_from_the_files_start(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(local_files, "UNIT", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(["fine"] * 500) + b'{"text": 7}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl line 501: data\.text_field='text' holds int"):
        tokens(make_config, tmp_path)


def test_an_unknown_file_of_a_folder_is_refused(tmp_path, make_config):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(ConfigError, match=r"b\.pdf seems to be PDF.*take it away, or name the others with a glob"):
        tokens(make_config, tmp_path)
    assert tokens(make_config, tmp_path / "*.txt")[0] == [256, *b"text", 256]


def test_names():
    names = ["a.txt", "A.TXT", "a.b.jsonl.gz", "c4.json.zst", "x.parquet", "x", "x.gz", "x.txt.bz2", ".txt"]
    found = [guess_kind(pathlib.Path(name)) for name in names]
    known = [("txt", ""), ("txt", ""), ("jsonl", "gz"), ("json", "zst"), ("parquet", "")]
    assert found == [*known, None, None, None, None]
