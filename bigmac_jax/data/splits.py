"""Holds documents out for validation and test, where a source has no such splits of its own.

The beginning of a document's text decides its split, so that files, their compression, the order of documents and
their readers do not matter, and the same text is never in two splits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bigmac_jax.data.documents import WHOLE, Portion

SPLITS = ("train", "validation", "test")
SHARE = 0.05  # of the text, for each of validation and test
FEW = 1000  # documents; of more, each is held out with probability SHARE
# How one split is held out, and how two are; part of a corpus's fingerprint. text-2 held out a whole one of two
# documents for one split; text-1 cut long copies elsewhere, too, and never before \r.
RULES = {1: "text-3", 2: "text-2"}
EARLIER_RULES = ("text-2", "text-1")


def choose_split(key: object) -> str:
    """The split of a text's key, or of a year, by its hash: 1 in 20 validation, 1 in 20 test."""
    bucket = int(hashlib.sha256(str(key).encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def text_key(beginning: str) -> str:
    """Digest of a document's first piece, by which the document is known."""
    return hashlib.sha256(beginning.encode()).hexdigest()[:32]


class HeldOut(NamedTuple):
    """Which documents of a source are held out for `splits`, some of validation and test."""

    splits: tuple[str, ...]
    few: dict[str, str] | None = None  # document's key → split; None: the key's hash decides
    sizes: dict[str, int] | None = None  # key → characters of one copy: each document is cut, and its end held out

    def portion(self, beginning: str, split: str) -> Portion | None:
        """The part of a document that belongs to a split, by the document's first piece; None = nothing."""
        if not self.splits:
            return WHOLE
        key = text_key(beginning)
        if self.sizes is not None:
            # Training has the beginning; the last share is that of the last split.
            edges = [0.0, *(1 - SHARE * (len(self.splits) - i) for i in range(len(self.splits)))]
            number, size = (("train", *self.splits).index(split)), self.sizes[key]
            stop = None if number + 1 == len(edges) else round(edges[number + 1] * size)
            return Portion(round(edges[number] * size), stop)
        own = self.few[key] if self.few is not None else choose_split(key)
        return WHOLE if (own if own in self.splits else "train") == split else None


def hold_out(documents: Iterable[tuple[str, int]], splits: Sequence[str]) -> tuple[HeldOut, str]:
    """Chooses what is held out of (key, characters) of documents, and describes the choice in a line.

    Few documents: each split gets those that, in the order of their keys, bring it nearer to SHARE of the text, at
    least one. Of one or two: the end of each, as a whole one would be half of the text. More than FEW, the rest of
    which is not looked at: a hash decides."""
    held = tuple(splits)
    sizes, longest = dict[str, int](), dict[str, int]()  # of all copies of a document, and of one
    for number, (key, size) in enumerate(documents):
        if number >= FEW:
            line = f"1 in {1 / SHARE:.0f} documents each for {' and '.join(held)}, by a hash of their text"
            return HeldOut(held), line
        sizes[key] = sizes.get(key, 0) + size
        longest[key] = max(longest.get(key, 0), size)
    total = sum(sizes.values())
    if len(sizes) <= len(SPLITS) - 1:
        what = "the text's end is" if len(sizes) == 1 else f"the end of each of {len(sizes)} documents is"
        parts = ", ".join(f"{SHARE:.0%} for {split}" for split in held)
        return HeldOut(held, sizes=longest), f"{what} held out: {parts}"
    few, lines = dict.fromkeys(sizes, "train"), []
    for number, split in enumerate(held):
        free = [key for key in sorted(sizes) if few[key] == "train"]
        wanted, taken, most = SHARE * total, list[str](), len(free) - (len(held) - number)
        got = 0
        for key in free:
            if len(taken) < most and abs(got + sizes[key] - wanted) < abs(got - wanted):
                taken.append(key)
                got += sizes[key]
        taken = taken or [min(free, key=lambda k: (sizes[k], k))]
        few |= dict.fromkeys(taken, split)
        got = sum(sizes[key] for key in taken)
        lines.append(f"{len(taken)} of {len(sizes)} documents, {got / total:.1%} of the text, for {split}")
    return HeldOut(held, few=few), f"held out are {'; '.join(lines)}"
