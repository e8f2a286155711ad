"""Which pages of the cache belong to which sequence, on one batch shard. Bookkeeping on the host, without arrays."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Allocation:
    """The pages of a sequence, in order."""

    pages: list[int]
    cached: int  # tokens at its beginning that the cache already held
    shared: int  # pages at its beginning that other sequences can find
    duplicate: bool = False  # another sequence shares the same tokens from other pages; what follows here is not shared


class PageAllocator:
    """Allocates the pages of one batch shard: all pages of a sequence at once, so that none has to end for lack of
    them, and shared by sequences that begin alike.

    A full page is found by its tokens and the page before it. One that no sequence uses stays until its place is
    needed; the least recently used goes first. A sequence uses a page after those before it, and frees it before them:
    so a page never outlives the one that it is found by.

    Args:
      number: pages of the shard.
      size: positions of a page.
      reuse: whether sequences share pages.
    """

    def __init__(self, number: int, size: int, reuse: bool = True):
        self.number, self.size, self._reuse = number, size, reuse
        self._free = list(range(number))[::-1]
        self._users = [0] * number
        self._by_key: dict[tuple[int, tuple[int, ...]], int] = {}  # (the page before it or -1, its tokens) → page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # pages with a key and without a user, the oldest first

    @property
    def in_use(self) -> int:
        """Number of pages that sequences hold."""
        return self.number - self.available

    @property
    def available(self) -> int:
        """Number of pages that no sequence holds."""
        return len(self._free) + len(self._unused)

    def allocate(self, tokens: Sequence[int], positions: int) -> Allocation | None:
        """Allocates pages for a sequence that begins with `tokens` and grows to so many positions; None while too few
        are available.

        The last of `tokens` is never cached: the token after it has to be computed.
        """
        shared = self.find_prefix(tokens)
        fresh = -(-positions // self.size) - len(shared)
        if fresh > self.available - sum(self._users[page] == 0 for page in shared):
            return None
        for page in shared:
            self._users[page] += 1
            self._unused.pop(page, None)
        taken = [self._take() for _ in range(fresh)]
        return Allocation(shared + taken, len(shared) * self.size, len(shared))

    def find_prefix(self, tokens: Sequence[int]) -> list[int]:
        """The shared pages that hold the beginning of `tokens`, never the last token."""
        found: list[int] = []
        while (stop := (len(found) + 1) * self.size) < len(tokens):
            page = self._by_key.get((found[-1] if found else -1, tuple(tokens[stop - self.size : stop])))
            if page is None:
                break
            found.append(page)
        return found

    def share(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """Lets other sequences find the full pages of a sequence, whose beginning `tokens` is in the cache by now."""
        a = allocation
        while self._reuse and not a.duplicate and (stop := (a.shared + 1) * self.size) <= len(tokens):
            page = a.pages[a.shared]
            key = a.pages[a.shared - 1] if a.shared else -1, tuple(tokens[stop - self.size : stop])
            if key in self._by_key:
                a.duplicate = True
            else:
                self._by_key[key], self._key_of[page] = page, key
                a.shared += 1

    def free(self, allocation: Allocation) -> None:
        """Frees the pages of a sequence that has ended."""
        for page in reversed(allocation.pages):
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)
        allocation.pages = []

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._by_key[self._key_of.pop(page)]
        self._users[page] = 1
        return page
