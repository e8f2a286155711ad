"""Chips on a grid, each linked to its neighbours: how much an exchange loads a link, and how many hops it takes."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]


def larger(shape: Shape, times: int, most: int) -> Shape:
    """A slice of `times` as many chips, a power of two, or as many of them as are not above `most`: the shortest axes
    are doubled, of several the last first."""
    sizes = list(shape)
    while times > 1 and 2 * math.prod(sizes) <= most:
        shortest = max(range(len(sizes)), key=lambda axis: (-sizes[axis], axis))
        sizes[shortest], times = 2 * sizes[shortest], times // 2
    return tuple(sizes)


class Block(NamedTuple):
    """Chips of a slice that communicate with each other.

    A neighbour in the block is `stride` links away; chips between are in other blocks, whose data crosses those links.
    """

    shape: Shape  # chips along each axis
    rings: tuple[bool, ...]  # which axes are rings
    stride: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def busiest_link(self) -> float:
        """Bytes over the busiest link, in one direction, when every chip sends one byte in all to the others.

        The two halves of an axis send each other as much as they must, whatever the route; it crosses the chips of a
        cut, and of a ring's second cut. The longest axis without a ring decides.
        """
        n, busiest = self.chips, 0.0
        for size, ring in zip(self.shape, self.rings, strict=True):
            if size > 1:
                across = n * (size // 2) / size * (n * (size - size // 2) / size) / (n - 1)
                busiest = max(busiest, across / (n / size * (2 if ring else 1)))
        return busiest * self.stride

    def hops(self) -> int:
        """Number of links from a chip to the farthest one."""
        far = sum(size // 2 if ring else size - 1 for size, ring in zip(self.shape, self.rings, strict=True))
        return far * self.stride

    def ring_links(self) -> float:
        """Links that a chip sends on at once when data goes around every axis; a line is worth half a ring."""
        links = (2 if ring else 1 for size, ring in zip(self.shape, self.rings, strict=True) if size > 1)
        return sum(links) / self.stride


@dataclass(frozen=True)
class Torus:
    """How the chips of a TPU pod are linked."""

    dimensions: int  # number of axes
    wrap_multiple: int  # an axis whose length is a multiple of this is a ring
    wrap_together: bool  # axes are rings only if all of them can be
    cores: int = 1  # devices that jax shows a chip as; they share its links

    def slice(self, shape: Shape) -> Block:
        """The chips of a slice of this shape, whose axes are rings where they can be; before them an axis of cores."""
        whole = [size % self.wrap_multiple == 0 for size in shape]
        if self.wrap_together and not (len(shape) == self.dimensions and all(whole)):
            whole = [False] * len(shape)
        if self.cores > 1:
            return Block((self.cores, *shape), (False, *whole))
        return Block(shape, tuple(whole))

    def near_cube(self, devices: int) -> Shape:
        """The most compact shape of the chips of so many devices, axes ascending: 4x8 for 32 chips on a plane."""
        shape, factors, factor = [1] * self.dimensions, list[int](), 2
        chips = -(-devices // self.cores)
        while chips > 1:
            if chips % factor:
                factor += 1
            else:
                factors.append(factor)
                chips //= factor
        for factor in reversed(factors):
            shape = sorted([shape[0] * factor, *shape[1:]])
        return tuple(shape)


@functools.lru_cache(maxsize=4096)  # a search asks for the same few ten thousand times
def parts(whole: Block, ranks: int) -> tuple[Block, Block]:
    """Splits a block into (the chips of `ranks` consecutive ranks, the chips of every `ranks`-th rank): for instance an
    expert group, and the ranks that hold the same experts.

    Ranks count along the first axis first, as the ids of jax's devices do.
    """
    inner: list[int] = []
    for size in whole.shape:
        inner.append(math.gcd(size, ranks))
        ranks = ranks // size if inner[-1] == size else 1  # the next axis begins when this one is full
    outer = [size // i for size, i in zip(whole.shape, inner, strict=True)]
    stride = max([i for i, o in zip(inner, outer, strict=True) if o > 1], default=1)
    # A part of an axis is a line, whatever the axis is.
    rings = tuple(ring and o == 1 for ring, o in zip(whole.rings, outer, strict=True))
    return Block(tuple(inner), rings, whole.stride), Block(tuple(outer), whole.rings, whole.stride * stride)
