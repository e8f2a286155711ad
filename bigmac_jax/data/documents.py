"""Text documents of any source, read as a stream of pieces of bounded size, decoded and counted."""

import abc
import codecs
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self

from bigmac_jax.config import ConfigError

# Characters. Longer texts are encoded in pieces, so that memory stays bounded whatever the length of a document.
PIECE = 1 << 17
_CUT = re.compile(r"(?<=\S)[ \n]")
_BORDER = re.compile(r"(?<=\S)[ \r\n]")  # of portions; text without spaces may have no other place than a line's end
_NAMED = 5  # files in a message
_log = logging.getLogger(__name__)
_logged: set[str] = set()  # a corpus is read more than once (tokenizer, then tokens); its defects are told once

# A document's text: all of it, or a long one in blocks of UTF-8 that are cut anywhere.
Content = str | bytes | Iterator[bytes]


class Slice(NamedTuple):
    """Part of a file that can be read by itself: a range of bytes, row groups or record batches."""

    file: int
    start: int = 0
    stop: int | None = None  # None: to the end
    size: int = 0  # bytes of the file in it, roughly


Unit = tuple[Slice, ...]  # what one process reads at a time; depends on the source alone


class Sums:
    """A record whose fields can be added to."""

    def add(self, other: Self) -> None:
        """Adds another one's fields."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclasses.dataclass
class ReadCounts(Sums):
    """What was met while reading a part of a corpus."""

    found: int = 0  # documents with text
    empty: int = 0  # documents without
    null: int = 0  # rows left out because they have no text
    broken: int = 0  # documents with bytes that are not UTF-8
    source: int = 0  # bytes of the source
    files: list[str] = dataclasses.field(default_factory=list)  # of broken documents


class Portion(NamedTuple):
    """A range of a document's characters; stop None: to the end."""

    start: int = 0
    stop: int | None = None


WHOLE = Portion()


class Documents(abc.ABC):
    """The non-empty documents of one split of a source, in a fixed order; can be iterated over again."""

    name: str  # for messages, such as "validation split of data.source=notes.jsonl"
    size: int  # bytes of source text, roughly; for progress bars
    fix: str  # what to do when there is no document
    alone = False  # only this process can read the source

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes when the documents do."""

    def fingerprint_by(self, rule: str) -> str:
        """The fingerprint that the documents had when `rule` said what is held out (`splits.RULES`)."""
        return self.fingerprint

    @property
    def units(self) -> list[Unit]:
        """The parts that processes share between them; in their order they make up the source."""
        return [()]

    @abc.abstractmethod
    def read(self, unit: Unit, counts: ReadCounts) -> Iterator[tuple[str, Content, bool]]:
        """Yields (file or dataset, content, whether bytes were replaced already); adds to `counts.source`."""

    def portion(self, beginning: str) -> Portion | None:
        """The part of a document that belongs to this split, by the document's first piece; None = nothing."""
        return WHOLE

    def pieces(
        self, unit: Unit, counts: ReadCounts, portion_of: Callable[[str], Portion | None] | None = None
    ) -> Iterator[tuple[str, bool]]:
        """Yields (piece, is it its document's last) for the documents of a unit, or what `portion_of` says of them. A
        text of nothing but white space, if no longer than a piece, is not a document."""
        portion_of = portion_of or self.portion
        for place, content, replaced in self.read(unit, counts):
            chunks = _Decoder(content)
            parts = mark_last(cut_chunks(chunks))
            first, is_all = next(parts)
            if is_all and (not first or first.isspace()):
                counts.empty += 1
                continue
            portion = portion_of(first)
            if portion is None:
                continue
            parts = itertools.chain([(first, is_all)], parts)
            if portion != WHOLE:
                parts = mark_last(cut_portion((part for part, _ in parts), portion))
            begun = False
            for part in parts:
                counts.found += not begun
                begun = True
                yield part
            if not begun:  # the portion is empty
                continue
            if replaced or chunks.broken:
                counts.broken += 1
                if place not in counts.files:
                    counts.files.append(place)

    def all_pieces(self) -> Iterator[tuple[str, bool]]:
        """Yields the pieces of all documents; raises ConfigError at the end if there was no document."""
        counts = ReadCounts()
        for unit in self.units:
            yield from self.pieces(unit, counts)
        self.report(counts)

    def all_text(self) -> Iterator[str]:
        """Yields the text of all documents in pieces; of several sources, any beginning of it has a share of each."""
        return (piece for piece, _ in self.all_pieces())

    def __iter__(self) -> Iterator[str]:
        """Yields whole documents, each in memory; raises as `all_pieces` does."""
        parts: list[str] = []
        for piece, last in self.all_pieces():
            parts.append(piece)
            if last:
                yield "".join(parts)
                parts = []

    def report(self, counts: ReadCounts) -> None:
        """Logs the defects of a corpus that has been read; raises ConfigError if it has no document."""
        if counts.broken:
            files = list(dict.fromkeys(counts.files))
            names = ", ".join(files[:_NAMED]) + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")
            log_once(
                logging.WARNING,
                f"{self.name}: {counts.broken} documents hold bytes that are not UTF-8, replaced by U+FFFD: {names}",
            )
        if counts.empty:
            log_once(logging.INFO, f"{self.name}: {counts.empty} empty documents skipped")
        if not counts.found:
            null = f", {counts.null} rows without data.text_field" if counts.null else ""
            raise ConfigError(f"{self.name} has 0 documents with text ({counts.empty} empty{null}); {self.fix}")
        if counts.null:
            log_once(
                logging.WARNING, f"{self.name}: {counts.null:,} rows left out, whose data.text_field is null or missing"
            )


class _Decoder:
    """Iterates over the chunks of a document's text; `broken` says whether bytes were replaced so far."""

    def __init__(self, content: Content):
        self._content, self.broken = content, False

    def __iter__(self) -> Iterator[str]:
        left = b""
        for block in [self._content] if isinstance(self._content, str | bytes) else self._content:
            if isinstance(block, bytes):
                block, left = split_last_character(left + block)
            yield self._decode(block)
        yield self._decode(left)

    def _decode(self, content: str | bytes) -> str:
        text, whole = decode(content)
        self.broken |= not whole
        return text


def cut_text(text: str, size: int = PIECE) -> Iterator[str]:
    """Cuts a long text into pieces of 1 to 2 × `size` characters whose tokens, joined, are those of the whole text, but
    for a few at a cut.

    The cut lies before a space or newline that follows a visible character: byte-level BPE in GPT-2's way never merges
    across it. Where others (Qwen, Llama 3, cl100k) join a newline to the punctuation before it, the tokens of these may
    be others, and so may those at a cut that is forced, as `size` characters hold no such place. Other cuts would give
    every long document another first piece, which says what split it belongs to (`splits`).
    """
    return cut_chunks([text], size)


def cut_chunks(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """`cut_text` for a text that comes in chunks; how it is cut into chunks changes nothing. Yields at least one
    piece, which may be empty."""
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk if start < len(text) else chunk, 0
        while len(text) - start > 2 * size:
            cut = _CUT.search(text, start + size, start + 2 * size)
            stop = cut.start() if cut else start + 2 * size
            yield text[start:stop]
            start = stop
    yield text[start:]


def cut_portion(parts: Iterable[str], portion: Portion) -> Iterator[str]:
    """Yields the pieces of a portion. It begins and ends before white space that follows a visible character, at or
    after the given characters: of two adjacent portions, each character is in exactly one."""
    at = 0
    for part in parts:
        start, stop = (_find_cut(part, wanted - at) for wanted in (portion.start, portion.stop or at + len(part)))
        if start < stop:
            yield part[start:stop]
        at += len(part)
        if portion.stop is not None and at >= portion.stop:
            return


def _find_cut(part: str, wanted: int) -> int:
    if not 0 < wanted < len(part):
        return min(max(wanted, 0), len(part))
    cut = _BORDER.search(part, wanted)
    return cut.start() if cut else len(part)


def mark_last(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yields each part with whether it is the last one."""
    parts = iter(parts)
    for before in parts:
        for part in parts:
            yield before, False
            before = part
        yield before, True


def split_last_character(block: bytes) -> tuple[bytes, bytes]:
    """Splits a block of UTF-8 before the character at its end that is cut off, if one is."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(block[-4:])
    stop = len(block) - len(decoder.getstate()[0])
    return block[:stop], block[stop:]


def decode(content: str | bytes) -> tuple[str, bool]:
    """Returns the text, and whether nothing was replaced: what is not UTF-8 (lone surrogates too) becomes U+FFFD."""
    try:
        if isinstance(content, bytes):
            return content.decode(), True
        content.encode()
        return content, True
    except UnicodeDecodeError as error:
        return error.object.decode(errors="replace"), False
    except UnicodeEncodeError as error:  # a JSON string may hold half of a surrogate pair
        return error.object.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False


def log_once(level: int, line: str) -> None:
    """Logs a line, unless this process has logged it before."""
    if line not in _logged:
        _logged.add(line)
        _log.log(level, line)
