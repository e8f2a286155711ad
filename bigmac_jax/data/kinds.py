"""What a file is: its kind by its name, and what it seems to be by its first bytes."""

import codecs
import gzip
import io
import pathlib
import zlib
from typing import Any, NamedTuple

import pyarrow as pa

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import Seen, one_line
from bigmac_jax.runtime import storage

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")
TABLES = ("parquet", "arrow", "feather")
READ = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, each also with {' or '.join(COMPRESSED)} behind it"
# Files that corpora come with and that are not of them.
_BESIDE = ("readme", "license", "licence", "notice", "citation", "changelog")
_HEAD = 4096  # bytes that a file is judged by
_BLOCK = 1 << 20
# First bytes → what has them, and the kind they belong to.
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
    """As "jsonl" and "gz"; without compression ""."""

    name: str
    compression: str = ""


def kind_of(path: pathlib.Path) -> Kind | None:
    """By its name; None if that says nothing."""
    name, compression = path.name.lower(), ""
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), suffix[1:]
    suffix = pathlib.PurePosixPath(name).suffix
    return Kind(suffix[1:], compression) if suffix in KINDS else None


def is_beside(path: pathlib.Path) -> bool:
    """Whether a file of a folder is none of its corpus: hidden, or its README or license."""
    return path.name.startswith((".", "_")) or path.name.lower().startswith(_BESIDE)


def seems(path: pathlib.Path) -> str:
    """What an unknown file seems to be, for a message."""
    with path.open("rb") as file:
        return _seems(file.read(_HEAD))


def _seems(head: bytes) -> str:
    for magic, what, _ in _MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar file"
    if not head:
        return "empty"
    if b"\0" in head:
        return "binary data"
    try:
        head[:-3].decode()
    except UnicodeDecodeError:
        return "binary data, or text that is not UTF-8"
    start = head.lstrip()[:1]
    return "JSON" if start in (b"{", b"[") else "a web page" if start == b"<" else "text"


def check_content(path: pathlib.Path, kind: Kind, head: bytes) -> None:
    """Whether a file (its content, where it is compressed) can be what its name says.

    Raises:
      ConfigError: it is something else.
    """
    wanted, head = "arrow" if kind.name == "feather" else kind.name, head[:_HEAD]
    for magic, what, of in _MAGIC:
        # A text may begin with the letters of some of them, and 4 bytes of 255 are an Arrow stream.
        if head.startswith(magic) and of != wanted:
            if magic.isascii() and magic.decode().isprintable() and b"\0" not in head and _seems_text(head):
                continue
            fix = "save it as UTF-8" if "UTF-16" in what else "give it the ending of what it is"
            raise ConfigError(f"{path} seems to be {what}, not .{kind.name}; {fix}")
    if kind.name in TABLES and head and not any(head.startswith(magic) for magic, _, of in _MAGIC if of == wanted):
        raise ConfigError(f"{path} seems to be {_seems(head)}, not .{kind.name}; give it the ending of what it is")


def _seems_text(head: bytes) -> bool:
    try:
        head[:-3].decode()
    except UnicodeDecodeError:
        return False
    return True


class _Counting(io.RawIOBase):
    """A file whose bytes are counted as they are read."""

    def __init__(self, file: Any, seen: Seen):
        self._file, self._seen = file, seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._seen.source += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_content(path: pathlib.Path, kind: Kind, seen: Seen, start: int = 0) -> Any:
    """A file's bytes, decompressed, from byte `start` of the file on; `check_content` has seen the first of them. What
    is text begins behind its byte order mark.

    Raises:
      ConfigError: it is something else than its name says. And what `broken` is for.
    """
    file: Any = path.open("rb")
    if start:
        file.seek(start)
    raw: Any = io.BufferedReader(_Counting(file, seen), _BLOCK)
    if kind.compression:
        inside: Any = gzip.GzipFile(fileobj=raw) if kind.compression == "gz" else _Zstandard(raw)
        raw = io.BufferedReader(inside, _BLOCK)
    if not start:
        check_content(path, kind, raw.peek(_HEAD))
        # Lines have theirs taken off one by one: what a slice begins with is counted in bytes of the file.
        if kind.name not in (*TABLES, "jsonl") and raw.peek(3).startswith(codecs.BOM_UTF8):
            raw.read(3)
    return raw


class _Zstandard(io.RawIOBase):
    """pyarrow's own, as a file of Python's; of several frames, like zstd's command."""

    def __init__(self, raw: Any):
        self._raw = raw
        self._stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def errors() -> tuple[type[Exception], ...]:
    """What a file that is damaged, or a store that is away, may raise while it is read."""
    return storage.errors(EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)


def broken(path: pathlib.Path, error: Exception) -> ConfigError:
    """One line for one of `errors`."""
    if isinstance(error, pa.ArrowException | EOFError | zlib.error | gzip.BadGzipFile):
        return ConfigError(f"{path} is damaged or cut off ({one_line(error)}); bring back a good copy")
    return ConfigError(f"{path} cannot be read ({storage.reason(error)}); check the file")
