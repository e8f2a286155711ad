"""File formats: guessed from a file's name, checked against its first bytes, opened and decompressed."""

import codecs
import gzip
import io
import pathlib
import zlib
from typing import Any, NamedTuple

import pyarrow as pa

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import ReadCounts
from bigmac_jax.runtime import storage

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")
TABLES = ("parquet", "arrow", "feather")
READ = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, all but .parquet also with {' or '.join(COMPRESSED)} behind it"
# Names, without their endings, of files that come with a corpus and are not part of it.
_BESIDE = ("readme", "license", "licence", "notice", "citation", "changelog")
_HEAD = 4096  # bytes that a file is judged by
BLOCK = 1 << 20  # bytes that are read at a time
# Bytes of a document that is not a .txt of its own: what is read of it must be in memory as a whole.
LONGEST = 1 << 26
TOO_LONG = f"is longer than {LONGEST >> 20} MiB; give such a text a .txt of its own"
# First bytes, what has them, and the kind it is read as.
_MAGIC = (
    (b"PAR1", "Parquet", "parquet"),
    (b"ARROW1", "Arrow", "arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "arrow"),
    (b"FEA1", "Feather of its first version", ""),
    (b"\x1f\x8b", "gzip", ""),
    (b"\x28\xb5\x2f\xfd", "Zstandard", ""),
    (b"BZh", "bzip2", ""),
    (b"\xfd7zXZ\x00", "xz", ""),
    (b"\x04\x22\x4d\x18", "LZ4", ""),
    (b"PK\x03\x04", "a zip file (also .docx, .xlsx, .epub)", ""),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", ""),
    (b"%PDF", "PDF", ""),
    (b"\xd0\xcf\x11\xe0", "an old Office file", ""),
    (b"\x89HDF", "HDF5", ""),
    (b"\x93NUMPY", "NumPy", ""),
    (b"SQLite format 3", "SQLite", ""),
    (b"\x7fELF", "a program", ""),
    (b"\x89PNG", "a picture", ""),
    (b"\xff\xd8\xff", "a picture", ""),
    (b"Obj\x01", "Avro", ""),
    (b"\xff\xfe", "text as UTF-16", ""),
    (b"\xfe\xff", "text as UTF-16", ""),
)


class Kind(NamedTuple):
    """A file's format, such as "jsonl", and its compression, such as "gz", "" without one."""

    name: str
    compression: str = ""


def guess_kind(path: pathlib.Path) -> Kind | None:
    """Guesses a file's kind from its name; None if it is not one of KINDS."""
    name, compression = path.name.lower(), ""
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), suffix[1:]
    suffix = pathlib.PurePosixPath(name).suffix
    return Kind(suffix[1:], compression) if suffix in KINDS else None


def is_side_file(path: pathlib.Path) -> bool:
    """Whether a file, named by its path below a corpus's folder, is not part of the corpus: hidden, in a hidden folder,
    or a README or license."""
    if path.name.startswith("_") or any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return True
    kind, stem = guess_kind(path), path.name.lower().partition(".")[0]
    return stem.startswith(_BESIDE) if kind is None else kind.name == "txt" and stem in _BESIDE


def describe_content(path: pathlib.Path) -> str:
    """Says what an unknown file seems to be, for a message."""
    try:
        with path.open("rb") as file:
            return _describe(file.read(_HEAD))
    except storage.errors() as error:
        return f"unreadable ({storage.reason(error)})"


def _describe(head: bytes) -> str:
    if what := _find_magic(head)[1]:
        return what
    if head[257:262] == b"ustar":
        return "a tar file"
    if not head:
        return "empty"
    if b"\0" in head:
        return "binary data"
    if not _is_utf8(head):
        return "binary data, or text that is not UTF-8"
    start = head.lstrip()[:1]
    return "JSON" if start in (b"{", b"[") else "a web page" if start == b"<" else "text"


def _find_magic(head: bytes) -> tuple[bytes, str, str]:
    return next((entry for entry in _MAGIC if head.startswith(entry[0])), (b"", "", ""))


def _is_utf8(head: bytes) -> bool:
    try:
        head[:-3].decode()  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


def _is_wide(head: bytes) -> bool:
    """Whether every other byte is 0, or most of these: UTF-16 without its mark, which as UTF-8 is text with NULs."""
    return any(2 * half.count(0) > len(half) for half in (head[::2], head[1::2]))


def check_content(path: pathlib.Path, kind: Kind, head: bytes) -> None:
    """Raises ConfigError if a file is not what its name says; `head` has its first bytes, already decompressed."""
    wanted, head = "arrow" if kind.name == "feather" else kind.name, head[:_HEAD]
    magic, what, found = _find_magic(head)
    if not what and kind.name not in TABLES and _is_wide(head):
        what = "text as UTF-16"
    # A text may begin with the letters of a magic number, such as BZh.
    is_text = magic.isascii() and magic.decode().isprintable() and b"\0" not in head and _is_utf8(head)
    if what and found != wanted and not is_text:
        fix = "save it as UTF-8" if "UTF-16" in what else "give it the ending of what it is"
        raise ConfigError(f"{path} seems to be {what}, not .{kind.name}; {fix}")
    if kind.name in TABLES and head and found != wanted:
        raise ConfigError(f"{path} seems to be {_describe(head)}, not .{kind.name}; give it the ending of what it is")


class _RawFile(io.RawIOBase):
    """Makes a raw Python file of anything with `read` and `close`; adds the bytes that are read to `counts`."""

    def __init__(self, source: Any, counts: ReadCounts | None = None):
        self._source, self._counts = source, counts

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        if self._counts:
            self._counts.source += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def open_content(path: pathlib.Path, kind: Kind, counts: ReadCounts, start: int = 0) -> Any:
    """Opens a file for reading bytes, decompressed, from byte `start` of the file on; skips a byte order mark. Raises
    ConfigError if it is not what its name says, and `read_errors`."""
    opened: Any = path.open("rb")
    if start:
        opened.seek(start)
    file = io.BufferedReader(_RawFile(opened, counts), BLOCK)
    if kind.compression == "gz":
        file = io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK)  # type: ignore[arg-type]
    elif kind.compression:
        file = io.BufferedReader(_RawFile(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")), BLOCK)
    if not start:
        check_content(path, kind, file.peek(_HEAD))
        # A reader of lines strips the mark itself, since a slice begins at a byte of the file.
        if kind.name not in (*TABLES, "jsonl") and file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
    return file


def read_errors() -> tuple[type[Exception], ...]:
    """The exceptions that reading a damaged file, or a store that does not answer, may raise."""
    return storage.errors(EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)


def explain_error(path: pathlib.Path, error: Exception) -> ConfigError:
    """Makes a ConfigError of one of `read_errors`."""
    if isinstance(error, pa.ArrowException | EOFError | zlib.error | gzip.BadGzipFile):
        return ConfigError(f"{path} is damaged or cut off ({storage.reason(error)}); bring back a good copy")
    return ConfigError(f"{path} cannot be read ({storage.reason(error)}); check the file")
