"""Which split a document of a source belongs to that has none of its own.

It is decided by the beginning of its text, so that it does not depend on files, on how they are compressed, on the
order of documents, or on who reads them; and the same text is never in two splits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bigmac_jax.data.documents import WHOLE, Portion

SPLITS = ("train", "validation", "test")
SHARE = 0.05  # of the text, for validation and for the test split
FEW = 1000  # documents; of more, each is held out with the chance SHARE
RULE = "text-1"  # part of a corpus's fingerprint


def split_of(key: object) -> str:
    """The split that a text's key, or a year, falls in: by its hash, 1 in 20 validation, 1 in 20 test."""
    bucket = int(hashlib.sha256(str(key).encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def key_of(beginning: str) -> str:
    """Of a document by its first piece; a digest."""
    return hashlib.sha256(beginning.encode()).hexdigest()[:32]


class Held(NamedTuple):
    """What is held out.

    Attributes:
      splits: that are, of validation and test.
      few: key → split of each document, if they are few; None: by the hash of their keys.
      sizes: key → characters, where each document is cut: its end is held out.
    """

    splits: tuple[str, ...]
    few: dict[str, str] | None = None
    sizes: dict[str, int] | None = None

    def portion(self, beginning: str, split: str) -> Portion | None:
        if not self.splits:
            return WHOLE
        key = key_of(beginning)
        if self.sizes is not None:
            # Training has the beginning; the last share of it is that of the last split.
            edges = [0.0, *(1 - SHARE * (len(self.splits) - i) for i in range(len(self.splits)))]
            number, size = (("train", *self.splits).index(split)), self.sizes[key]
            stop = None if number + 1 == len(edges) else round(edges[number + 1] * size)
            return Portion(round(edges[number] * size), stop)
        its = self.few[key] if self.few is not None else split_of(key)
        return WHOLE if (its if its in self.splits else "train") == split else None


def hold_out(documents: Iterable[tuple[str, int]], splits: Sequence[str]) -> tuple[Held, str]:
    """What is held out of documents, given as (key, characters), and a line that says so. Of more than FEW no more
    are looked at.

    Of few documents those are taken, in the order of their keys, that bring a split nearer to SHARE of the text, at
    least one; of fewer than there are splits, the end of each.
    """
    held = tuple(splits)
    sizes: dict[str, int] = {}
    for number, (key, size) in enumerate(documents):
        if number >= FEW:
            return Held(held), f"1 in {1 / SHARE:.0f} documents each for {' and '.join(held)}, by a hash of their text"
        sizes[key] = sizes.get(key, 0) + size
    total = sum(sizes.values())
    if len(sizes) <= len(held):
        what = "the text's end is" if len(sizes) == 1 else f"the end of each of {len(sizes)} documents is"
        parts = ", ".join(f"{SHARE:.0%} for {split}" for split in held)
        return Held(held, sizes=sizes), f"{what} held out: {parts}"
    few, said = dict.fromkeys(sizes, "train"), []
    for number, split in enumerate(held):
        free = [key for key in sorted(sizes) if few[key] == "train"]
        wanted, taken, most = SHARE * total, list[str](), len(free) - (len(held) - number)
        got = 0
        for key in free:
            if len(taken) < most and abs(got + sizes[key] - wanted) < abs(got - wanted):
                taken.append(key)
                got += sizes[key]
        for key in taken or [min(free, key=lambda k: (sizes[k], k))]:
            few[key] = split
        got = sum(sizes[key] for key, its in few.items() if its == split)
        count = sum(its == split for its in few.values())
        said.append(f"{count} of {len(sizes)} documents, {got / total:.1%} of the text, for {split}")
    return Held(held, few=few), f"held out are {'; '.join(said)}"
