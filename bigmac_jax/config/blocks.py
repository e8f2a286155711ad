"""A model as a sequence of residual branches, and the loops over layers that compute it.

A pattern has a letter a branch, as in Nemotron-H's configs: * attention, M Mamba-2, E experts, - an MLP. A layer is
some branches that mix tokens and the one that follows them and takes each token by itself.
"""

import functools
import re
from typing import NamedTuple

BRANCHES = {"*": "attention", "M": "mamba", "E": "mlp", "-": "mlp"}  # what a layer calls them
LONGEST = 512  # branches of a pattern


class Stack(NamedTuple):
    """Layers of the same branches, whose parameters are stacked along a leading dimension."""

    name: str  # begins the names of its parameters
    blocks: str  # the branches of a layer
    layers: range  # the numbers of its layers in the model
    experts: range  # their numbers among the layers with experts; empty without


class Loop(NamedTuple):
    """Layers that are gone through in turn, some times."""

    layers: tuple[str, ...]
    trips: int


def name_branches(blocks: str) -> list[str]:
    """Names a layer's branches; those of a kind that it has several of are numbered: mamba0, mamba1."""
    names = [BRANCHES[letter] for letter in blocks]
    return [f"{name}{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def split_layers(pattern: str) -> tuple[str, ...]:
    """The layers of a pattern: MM*EM- are MM*E and M-."""
    return tuple(re.findall(r"[*M]*[E-]|[*M]+$", pattern))


@functools.lru_cache(maxsize=256)
def find_loops(pattern: str) -> tuple[Loop, ...]:
    """Finds the loops that compute a pattern with the fewest layers to compile. Parameters are named after them, so
    that another choice would not load a checkpoint of this one."""
    layers = split_layers(pattern)
    best: list[tuple[int, tuple[Loop, ...]]] = [(0, ())]  # of the first layers: how many are compiled, and the loops
    for end in range(1, len(layers) + 1):
        candidates = []
        for size in range(1, end + 1):
            body, start = layers[end - size : end], end
            while start >= size and layers[start - size : start] == body:
                start -= size
                compiled, before = best[start]
                candidates.append((compiled + size, (*before, Loop(body, (end - start) // size))))
        best.append(min(candidates, key=lambda of: (of[0], len(of[1]))))
    return best[-1][1]


@functools.lru_cache(maxsize=256)
def make_stacks(loops: tuple[Loop, ...]) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of each loop. Those of attention and experts are called `layers`, and `first` the layers without
    experts before them; of other patterns layers0_1 is the second layer of the first loop."""
    plain = [loop.layers for loop in loops] in ([("*-",), ("*E",)], [("*E",)], [("*-",)])
    runs, layer, expert = [], 0, 0
    for number, (body, trips) in enumerate(loops):
        of_loop, with_experts = [], sum("E" in blocks for blocks in body)
        for place, blocks in enumerate(body):
            name = ("first", "layers")[number - len(loops)] if plain else f"layers{number}_{place}"
            before = expert + sum("E" in earlier for earlier in body[:place])
            experts = _every(with_experts, before, trips) if "E" in blocks else range(0)
            layers = _every(len(body), layer + place, trips)
            of_loop.append(Stack(name, blocks, layers, experts))
        layer, expert = layer + trips * len(body), expert + trips * with_experts
        runs.append(tuple(of_loop))
    return tuple(runs)


def _every(step: int, first: int, count: int) -> range:
    """So many numbers, `step` apart; it stops behind the last."""
    return range(first, first + step * (count - 1) + 1, step)
