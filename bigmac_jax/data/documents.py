"""What every source of text has in common: documents in pieces that can be read again, cleaned and counted."""

import abc
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError

# Longer texts are encoded in pieces, so that memory stays bounded whatever the length of a document.
PIECE = 1 << 17
_CUT = re.compile(r"(?<=\S)[ \n]")
_NAMED = 5  # files in a message
_log = logging.getLogger(__name__)
_said: set[str] = set()  # a corpus is read more than once (tokenizer, then tokens); its defects are told once

# A document's text: as a whole, or a long one in blocks of UTF-8 that are cut anywhere.
Content = str | bytes | Iterator[bytes]


class Slice(NamedTuple):
    """A part of a file that is read by itself: bytes of its lines, row groups, batches, or all of it."""

    file: int
    start: int = 0
    stop: int = -1  # -1: to the end
    size: int = 0  # bytes of the file that it has, roughly


Unit = tuple[Slice, ...]  # what one process reads at a time: they depend on the source alone


@dataclasses.dataclass
class Seen:
    """What was found in a part of a corpus. `null` counts rows without a text, `source` bytes of the source, `files`
    names those that were not UTF-8."""

    found: int = 0
    empty: int = 0
    null: int = 0
    broken: int = 0
    source: int = 0
    files: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Seen") -> None:
        self.found += other.found
        self.empty += other.empty
        self.null += other.null
        self.broken += other.broken
        self.source += other.source
        self.files += [file for file in other.files if file not in self.files]


class Portion(NamedTuple):
    """Of a document's characters; stop None: to the end."""

    start: int = 0
    stop: int | None = None


WHOLE = Portion()


class Documents(abc.ABC):
    """A re-iterable of non-empty `str` documents in a fixed order.

    Attributes:
      name: for messages, such as "validation split of data.source=notes.jsonl".
      size: bytes of source text, roughly; for progress bars.
      fingerprint: hex digest that changes when the documents do.
      alone: whether other processes cannot read it.
    """

    name: str
    size: int
    fix: str  # what to do when there is no document
    alone = False

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str: ...

    @property
    def units(self) -> list[Unit]:
        """Read one after the other they are the whole."""
        return [()]

    @abc.abstractmethod
    def read(self, unit: Unit, seen: Seen) -> Iterator[tuple[str, Content, bool]]:
        """Yields (file or dataset, content, whether undecodable bytes were replaced already); counts `seen.source`."""

    def portion(self, beginning: str) -> Portion | None:
        """What of a document belongs here, by its first piece; None: nothing."""
        return WHOLE

    def pieces(
        self, unit: Unit, seen: Seen, portion_of: Callable[[str], Portion | None] | None = None
    ) -> Iterator[tuple[str, bool]]:
        """Yields the documents of a unit in pieces, each with whether it is its document's last.

        A text of white space alone that is no longer than a piece is no document.

        Args:
          portion_of: by default `portion`.
        """
        portion_of = portion_of or self.portion
        for place, content, replaced in self.read(unit, seen):
            text = _Text(content)
            parts = pieces_of(text.chunks())
            first = next(parts)
            second = next(parts, None)
            if second is None and (not first or first.isspace()):
                seen.empty += 1
                continue
            portion = portion_of(first)
            if portion is None:
                continue
            rest = itertools.chain([first], [] if second is None else [second], parts)
            seen.found += 1
            yield from _with_last(rest if portion == WHOLE else within(rest, portion))
            if replaced or text.broken:
                seen.broken += 1
                if place not in seen.files:
                    seen.files.append(place)

    def all_pieces(self) -> Iterator[tuple[str, bool]]:
        """The pieces of the whole; raises ConfigError at the end if there was no document."""
        seen = Seen()
        for unit in self.units:
            yield from self.pieces(unit, seen)
        self.tell(seen)

    def __iter__(self) -> Iterator[str]:
        """Yields whole documents, each in memory; raises as `all_pieces` does."""
        parts: list[str] = []
        for piece, last in self.all_pieces():
            parts.append(piece)
            if last:
                yield "".join(parts)
                parts = []

    def tell(self, seen: Seen) -> None:
        """Logs what was wrong with a corpus that has been read; raises ConfigError where it has no document."""
        if seen.broken:
            more = len(seen.files) - _NAMED
            names = ", ".join(seen.files[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            once(
                logging.WARNING,
                f"{self.name}: {seen.broken} documents hold bytes that are not UTF-8, replaced by U+FFFD: {names}",
            )
        if seen.empty:
            once(logging.INFO, f"{self.name}: {seen.empty} empty documents skipped")
        null = f", {seen.null} rows without data.text_field" if seen.null else ""
        if not seen.found:
            raise ConfigError(f"{self.name} has 0 documents with text ({seen.empty} empty{null}); {self.fix}")
        if seen.null:
            once(logging.WARNING, f"{self.name}: {seen.null:,} rows left out, whose data.text_field is null or missing")


class _Text:
    """Decodes a document's content; `broken` is whether bytes were replaced, once it is read."""

    def __init__(self, content: Content):
        self._content, self.broken = content, False

    def chunks(self) -> Iterator[str]:
        if isinstance(self._content, str | bytes):
            text, whole = decode(self._content)
            self.broken = not whole
            yield text
            return
        left = b""
        for block in self._content:
            block, left = whole_characters(left + block)
            text, whole = decode(block)
            self.broken |= not whole
            yield text
        text, whole = decode(left)
        self.broken |= not whole
        yield text


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cuts a long text into pieces of 1 to 2 × `size` characters whose tokens, joined, are those of the whole.

    The cut lies before a space or newline that follows a visible character: byte-level BPE never merges across it.
    Only where `size` characters hold no such place is it forced; the tokens at that cut may then differ from those
    of a text that was never cut.
    """
    return pieces_of([text], size)


def pieces_of(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """`pieces` of a text that comes in chunks: the same, however it is cut into them. At least one, which may be ""."""
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk if start < len(text) else chunk, 0
        while len(text) - start > 2 * size:
            cut = _CUT.search(text, start + size, start + 2 * size)
            stop = cut.start() if cut else start + 2 * size
            yield text[start:stop]
            start = stop
    yield text[start:]


def within(parts: Iterable[str], portion: Portion) -> Iterator[str]:
    """The pieces of a portion. It begins and ends where `pieces` may cut, at or behind what it says: of two portions
    that meet, each character is in one."""
    at = 0
    for part in parts:
        start, stop = (_place(part, wanted - at) for wanted in (portion.start, portion.stop or at + len(part)))
        if start < stop:
            yield part[start:stop]
        at += len(part)
        if portion.stop is not None and at >= portion.stop:
            return


def _place(part: str, wanted: int) -> int:
    if not 0 < wanted < len(part):
        return min(max(wanted, 0), len(part))
    cut = _CUT.search(part, wanted)
    return cut.start() if cut else len(part)


def _with_last(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    before: str | None = None
    for part in parts:
        if before is not None:
            yield before, False
        before = part
    if before is not None:
        yield before, True


def whole_characters(block: bytes) -> tuple[bytes, bytes]:
    """A block, and the beginning of a character of UTF-8 behind it."""
    for back in range(1, min(4, len(block) + 1)):
        byte = block[-back]
        if byte >= 0xC0:  # begins one of two bytes or more
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (block, b"") if back >= length else (block[:-back], block[-back:])
        if byte < 0x80:
            break
    return block, b""


def decode(content: str | bytes) -> tuple[str, bool]:
    """Returns the text and whether it was whole; what is not UTF-8 (lone surrogates too) becomes U+FFFD."""
    try:
        if isinstance(content, bytes):
            return content.decode(), True
        content.encode()
        return content, True
    except UnicodeDecodeError:
        assert isinstance(content, bytes)
        return content.decode(errors="replace"), False
    except UnicodeEncodeError:  # a JSON string may hold half of a surrogate pair
        assert isinstance(content, str)
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False


def one_line(error: BaseException) -> str:
    """The class and message of an exception, on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def once(level: int, line: str, *arguments: Any) -> None:
    if line not in _said:
        _said.add(line)
        _log.log(level, line, *arguments)
