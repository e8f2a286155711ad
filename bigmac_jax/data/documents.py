"""What every source of text has in common: documents that can be read again and again, cleaned and counted."""

import abc
import logging
from collections.abc import Iterator

from bigmac_jax.config import ConfigError

_log = logging.getLogger(__name__)
_said: set[str] = set()  # a corpus is read more than once (tokenizer, then tokens); its defects are told once


class Documents(abc.ABC):
    """A re-iterable of non-empty `str` documents in a fixed order.

    Attributes:
      name: for messages, such as "validation split of data.source=notes.jsonl".
      size: bytes of source text, roughly; for progress bars.
      fingerprint: hex digest that changes when the documents do.
    """

    name: str
    size: int
    fix: str  # what to do when there is no document

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str: ...

    @abc.abstractmethod
    def read(self) -> Iterator[tuple[str, str | bytes, bool]]:
        """Yields (file or dataset, content, whether undecodable bytes were replaced already)."""

    def __iter__(self) -> Iterator[str]:
        """Yields the documents; raises ConfigError at the end if there was none."""
        found = empty = broken = 0
        places: dict[str, None] = {}  # an ordered set
        for place, content, replaced in self.read():
            text, whole = decode(content)
            if replaced or not whole:
                broken += 1
                places[place] = None
            if not text or text.isspace():
                empty += 1
                continue
            found += 1
            yield text
        if broken:
            names = ", ".join(list(places)[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
            say_once(
                logging.WARNING,
                f"{self.name}: {broken} documents hold bytes that are not UTF-8, replaced by U+FFFD: {names}",
            )
        if empty:
            say_once(logging.INFO, f"{self.name}: {empty} empty documents skipped")
        if not found:
            raise ConfigError(f"{self.name} has 0 documents with text ({empty} empty); {self.fix}")


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


def say_once(level: int, line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.log(level, line)
