"""Which pages of the cache belong to which sequence, on one shard of the batch. On the host; it knows no arrays."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Lease:
    """The pages of a sequence, in order."""

    pages: list[int]
    ready: int  # tokens at its beginning that were there when it began
    known: int  # pages at its beginning that others can find
    alone: bool = False  # another sequence with this beginning is known; what follows here is not


class Pages:
    """The pages of a shard: given out for a whole sequence at once, so that none has to end for lack of them, and
    shared by sequences that begin alike.

    A full page is known by its tokens and the page before it. A known page that nobody uses stays until its place is
    needed; the one that was used longest ago goes first. A sequence that uses a page uses those before it, and gives
    them back after it: so a page goes before the one it is known by.

    Args:
      size: positions of a page.
      reuse: whether to share pages.
    """

    def __init__(self, number: int, size: int, reuse: bool = True):
        self.number, self.size, self._reuse = number, size, reuse
        self._free = list(range(number))[::-1]
        self._users = [0] * number
        self._by_key: dict[tuple[int, tuple[int, ...]], int] = {}  # (the page before it or -1, its tokens) → page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known pages without a user, the oldest first

    @property
    def in_use(self) -> int:
        """Pages that sequences hold."""
        return self.number - self.available

    @property
    def available(self) -> int:
        return len(self._free) + len(self._unused)

    def needed(self, positions: int) -> int:
        return -(-positions // self.size)

    def begin(self, tokens: Sequence[int], positions: int) -> Lease | None:
        """Pages for a sequence that begins with `tokens` and grows to so many positions; None while there are too few.

        The last of `tokens` is never ready: what follows it has to be computed.
        """
        shared = self.matching(tokens)
        fresh = self.needed(positions) - len(shared)
        if fresh > self.available - sum(self._users[page] == 0 for page in shared):
            return None
        for page in shared:
            self._use(page)
        taken = [self._take() for _ in range(fresh)]
        return Lease(shared + taken, len(shared) * self.size, len(shared))

    def matching(self, tokens: Sequence[int]) -> list[int]:
        """Known pages that hold the beginning of `tokens`, all but the last one."""
        found: list[int] = []
        while (stop := (len(found) + 1) * self.size) < len(tokens):
            page = self._by_key.get((found[-1] if found else -1, tuple(tokens[stop - self.size : stop])))
            if page is None:
                break
            found.append(page)
        return found

    def filled(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Makes known the pages of a sequence that hold `tokens`, its beginning."""
        while self._reuse and not lease.alone and (stop := (lease.known + 1) * self.size) <= len(tokens):
            page = lease.pages[lease.known]
            key = lease.pages[lease.known - 1] if lease.known else -1, tuple(tokens[stop - self.size : stop])
            if key in self._by_key:
                lease.alone = True
            else:
                self._by_key[key], self._key_of[page] = page, key
                lease.known += 1

    def end(self, lease: Lease) -> None:
        """Gives the pages back."""
        for page in reversed(lease.pages):
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)
        lease.pages = []

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._by_key[self._key_of.pop(page)]
        self._users[page] = 1
        return page
