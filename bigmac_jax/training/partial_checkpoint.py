"""Checkpoints that hold some of the experts: Partial Experts Checkpoint (MoC-System, arXiv 2408.04307).

A save holds everything else whole, and K of each layer's experts, which take turns; a restart takes each expert from
the newest save that has it. So a save is smaller, and a restart loses what the other experts have learned since theirs.
The experts of a save are an item of their own: of older saves nothing else is kept.

Y layers with experts, E experts, K of them in a save.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, TrainConfig
from bigmac_jax.model.mesh import AXES, fully_sharded, spec_of
from bigmac_jax.model.parameters import Declaration, map_declared
from bigmac_jax.runtime import storage
from bigmac_jax.training.checkpoint_arrays import DamagedError
from bigmac_jax.training.offload import on_device

TURN, LEARNED = "experts", "experts"  # keys in a checkpoint's items `run` and `data`
EXPERTS = "experts"  # the item of a save of some, with the leaves that it splits
PARTS = ("weights", "optimizer")  # of an expert, that a save may hold of some


@dataclass(frozen=True)
class Turn:
    """Which experts a save holds: layer i has (i + first + j) mod E, j < count.

    Attributes:
      count: K; 0 where the save is whole.
      of: weights, optimizer (its state) or both: the parts that it holds of so many experts.
    """

    first: int = 0
    count: int = 0
    of: str = "both"

    def splits(self, part: str) -> bool:
        """Whether the save lacks this part of some experts."""
        return self.count > 0 and self.of in (part, "both")

    @property
    def splits_all(self) -> bool:
        return all(map(self.splits, PARTS))

    def entries(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The layers and the experts that it holds, as an index of [Y, E]."""
        layers_Y1 = np.arange(shape[0])[:, None]
        return layers_Y1, (layers_Y1 + self.first + np.arange(self.count)) % shape[1]


WHOLE = Turn()
Saves = Mapping[int, Turn]  # by step
Items = dict[str, dict[str, Any]]  # of a checkpoint, by item and by part of the state


def newest_copies(saves: Saves, part: str, shape: tuple[int, int]) -> np.ndarray:
    """The step of the newest save that holds a part of each expert, [Y, E]; -1 where there is none."""
    copies_YE = np.full(shape, -1)
    for step, turn in sorted(saves.items()):
        if turn.splits(part):
            copies_YE[turn.entries(shape)] = step
        else:
            copies_YE[:] = step
    return copies_YE


def needed_saves(saves: Saves, newest: Sequence[int], shape: tuple[int, int]) -> set[int]:
    """The steps of the saves that restoring any of the `newest` would read, and of the last whole one, which has every
    expert if another is damaged."""
    needed = {*newest, max((step for step, turn in saves.items() if not turn.count), default=-1)}
    for last in newest:
        before = {step: turn for step, turn in saves.items() if step <= last}
        for part in PARTS:
            needed.update(newest_copies(before, part, shape).flat)
    return needed - {-1}


def next_turn(config: Config, saves: Saves, count: int, shape: tuple[int, int]) -> Turn:
    """The turn of the save behind these: `count` experts of each layer (0 = all); all where one would have no copy."""
    before = saves[max(saves)] if saves else WHOLE
    first, of = (before.first + before.count) % shape[1], config.train.partial_checkpoint
    turn = Turn(first, count if count < shape[1] else 0, of)
    after = dict(saves) | {max(saves, default=0) + 1: turn}
    complete = all((newest_copies(after, part, shape) >= 0).all() for part in PARTS)
    return turn if complete else replace(turn, count=0)


def read_turn(directory: pathlib.Path) -> Turn:
    """Which experts a checkpoint holds."""
    try:
        return Turn(*json.loads((directory / "run" / "metadata").read_bytes())[TURN])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if storage.is_store(directory) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a moment without it says nothing
        return WHOLE  # one without is whole; one that is damaged is found to be


def expert_shape(params: Any) -> tuple[int, int]:
    """(Y, E) of a model's parameters; (0, 0) without experts."""
    found = [(0, 0)]
    map_declared(lambda of, w: found.append((w.shape[0], w.shape[1])) if _are_experts(of) else None, params)
    return max(found)


def map_experts(
    function: Callable[[str, Any], Any], items: Items, others: Callable[[Any], Any] = lambda leaf: leaf
) -> Items:
    """Maps `function(part, leaf)` over the experts' leaves [Y, E, …], and `others` over all other ones."""

    def apply(name: str, tree: Any) -> Any:
        part = "optimizer" if name == "opt_state" else "weights"
        own = map_declared(lambda of, _: _are_experts(of), tree)
        return jax.tree.map(lambda own, leaf: function(part, leaf) if own is True else others(leaf), own, tree)

    return {item: {name: apply(name, tree) for name, tree in found.items()} for item, found in items.items()}


def _are_experts(of: Declaration) -> bool:
    return of.part == "experts" and of.dims.startswith("e")


def take_turn(items: Items, turn: Turn) -> Items:
    """The experts' leaves that a save splits become those of the turn, [Y, K, …]; of abstract ones, shapes."""

    def take(part: str, leaf: Any) -> Any:
        if not turn.splits(part):
            return leaf
        leaf = on_device(leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            taken = jax.eval_shape(functools.partial(_take, count=turn.count), leaf, 0)
            return jax.ShapeDtypeStruct(
                taken.shape, taken.dtype, sharding=jax.sharding.NamedSharding(leaf.sharding.mesh, taken.sharding.spec)
            )
        return _take(leaf, turn.first, count=turn.count)

    return map_experts(take, items)


@functools.partial(jax.jit, static_argnames="count")
def _take(w_YE: Array, first: Array | int, count: int) -> Array:
    """w_YK of a turn, dealt out so that every rank writes as much, as far as it divides."""
    spec = fully_sharded((count, *w_YE.shape[2:]), P(), jax.sharding.get_abstract_mesh().shape, over=AXES)

    def of_layer(_: None, layer: Array) -> tuple[None, Array]:
        # Ranks add up what they have, and zeros: as whole numbers, so that no bit changes, -0.0 neither.
        bits_YE = jax.lax.bitcast_convert_type(w_YE, f"uint{8 * w_YE.dtype.itemsize}")
        at = layer, _experts_of(layer, first, count, w_YE.shape[1])
        return None, bits_YE.at[at].get(out_sharding=spec, mode="promise_in_bounds")

    # A layer at a time: for a moment every rank holds all that is taken of it.
    _, bits_YK = jax.lax.scan(of_layer, None, jnp.arange(w_YE.shape[0]))
    return jax.lax.bitcast_convert_type(bits_YK, w_YE.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _put(w_YE: Array, w_YK: Array, first: Array | int) -> Array:
    """w_YE with the experts of a turn in their places."""
    spec = spec_of(w_YE)

    def put_layer(layer: Array, w_YE: Array) -> Array:
        w_K = w_YK.at[layer].get(out_sharding=P(None, *spec[2:]), mode="promise_in_bounds")
        at = layer, _experts_of(layer, first, w_YK.shape[1], w_YE.shape[1])
        return w_YE.at[at].set(w_K, out_sharding=spec, mode="promise_in_bounds", unique_indices=True)

    return jax.lax.fori_loop(0, w_YE.shape[0], put_layer, w_YE)


def _experts_of(layer: Array, first: Array | int, count: int, experts: int) -> Array:
    """Those of a layer in a turn, as `Turn.entries` has them."""
    return (layer + first + jnp.arange(count)) % experts


def set_apart(items: Items, turn: Turn) -> Items:
    """Moves the leaves that a save splits into an item of their own; where they stood, and around them, is None."""
    if not turn.count:
        return items
    split = map_experts(lambda part, leaf: leaf if turn.splits(part) else None, items, lambda _: None)
    return map_experts(lambda part, leaf: None if turn.splits(part) else leaf, items) | {EXPERTS: split}


def _put_back(items: Items) -> Items:
    """Undoes `set_apart`."""
    if EXPERTS not in items:
        return items
    rest = {item: tree for item, tree in items.items() if item != EXPERTS}
    return jax.tree.map(lambda a, b: b if a is None else a, rest, items[EXPERTS], is_leaf=lambda leaf: leaf is None)


def _put_turn(turn: Turn, w: Any, found: Any) -> Any:
    if found is ...:
        return w
    if found.shape == w.shape:
        return found
    kept, w = w.sharding, on_device(w)
    w = jnp.zeros(w.shape, w.dtype, device=w.sharding) if isinstance(w, jax.ShapeDtypeStruct) else w
    return jax.device_put(_put(w, found, turn.first), kept)


class Learned(NamedTuple):
    """What the experts' state has learned, counted from the loads, and what restarts have lost of it.

    Attributes:
      updates_YE: float64; 1 is all choices of a step in that layer. Of an expert whose parts are of different saves
        it counts the older.
      lost: the mean over layers of the updates that are lost.
      asked, doubled: train.experts_per_checkpoint, and how often K was doubled since that was asked for, because a
        restart found that too much was lost.
    """

    updates_YE: np.ndarray
    lost: float = 0.0
    asked: int = 0
    doubled: int = 0

    @classmethod
    def read(cls, saved: Mapping[str, Any] | None, shape: tuple[int, int], step: int) -> "Learned":
        """What the JSON of the save of `step` says; one that has none has counted nothing, and takes its steps as even
        over the experts."""
        if not saved:
            return cls(np.full(shape, step / max(1, shape[1])))
        return cls(**{**saved, "updates_YE": np.array(saved["updates_YE"], np.float64).reshape(shape)})

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"updates_YE": self.updates_YE.tolist()}

    def asked_for(self, experts: int) -> "Learned":
        """The same for a run that asks for so many in a save: another number is not doubled yet."""
        return self if experts == self.asked else self._replace(asked=experts, doubled=0)

    def add(self, load_YE: np.ndarray) -> None:
        """Counts a step, by each expert's share of its choices."""
        self.updates_YE[:] += load_YE

    @property
    def lost_share(self) -> float:
        """The share of the updates so far that are lost (the paper's PLT)."""
        steps = self.lost + self.updates_YE.sum(1).mean() if self.updates_YE.size else 0.0
        return self.lost / steps if steps else 0.0

    @property
    def in_a_save(self) -> int:
        """Experts of each layer in the next save; 0: all."""
        count = self.asked << self.doubled
        return count if count < self.updates_YE.shape[1] else 0


def join_saves(
    step: int,
    saves: Saves,
    abstract: Items,
    read: Callable[[int, Items], tuple[Items, Any]],
    train: TrainConfig | None,
) -> tuple[Items, Any, str]:
    """Takes the save of `step`, and each expert that it lacks from the newest one before it that has it → the items,
    the position of `step` with what the experts have learned, and a line about what is lost, "" if nothing is.

    Args:
      saves: some of which are of later steps.
      read: (the step of a save, abstract items, in which `...` is not read) → items, position.
      train: of the run that goes on: where more than its most_lost_updates are lost, K doubles.

    Raises:
      DamagedError: no save is left that holds one of the experts; or as `read`.
    """
    shape = expert_shape(abstract["model"]["params"])
    saves = {number: turn for number, turn in saves.items() if number <= step}
    copies = {part: newest_copies(saves, part, shape) for part in PARTS}
    for copies_YE in copies.values():
        if (copies_YE < 0).any():
            layer, expert = np.argwhere(copies_YE < 0)[0]
            raise DamagedError(f"no save is left that holds expert {expert} of layer {layer} (counted from 0)")
    items, positions = abstract, {}
    for source in sorted({int(number) for copies_YE in copies.values() for number in copies_YE.flat}):
        wanted = take_turn(abstract, saves[source])
        if source < step:
            wanted = _only(wanted, [part for part in PARTS if (copies[part] == source).any()])
        found, positions[source] = read(source, set_apart(wanted, saves[source]))
        items = jax.tree.map(functools.partial(_put_turn, saves[source]), items, _put_back(found))
    learned = {source: Learned.read(position.get(LEARNED), shape, source) for source, position in positions.items()}
    older_YE = np.minimum(*copies.values())
    joined = join_copies(learned, older_YE)
    lost_more = joined.lost > learned[step].lost and joined.lost_share > (train.most_lost_updates if train else 1)
    if doubles := lost_more and bool(train and train.experts_per_checkpoint):
        joined = joined._replace(doubled=joined.doubled + 1)
    line = _describe(step, older_YE, joined, doubles) if (older_YE < step).any() else ""
    return items, positions[step] | {LEARNED: joined.to_json()}, line


def _only(items: Items, parts: Sequence[str]) -> Items:
    """The experts' leaves of these parts; `...` for all others."""
    return map_experts(lambda part, leaf: leaf if part in parts else ..., items, lambda _: ...)


def join_copies(learned: Mapping[int, Learned], copies_YE: np.ndarray) -> Learned:
    """What experts have learned that are of the saves `copies_YE`, where the newest of the saves is restored."""
    newest = learned[max(learned)]
    updates_YE = np.empty(copies_YE.shape)
    for step, of_save in learned.items():
        updates_YE[copies_YE == step] = of_save.updates_YE[copies_YE == step]
    lost = float((newest.updates_YE - updates_YE).sum(1).mean())
    return newest._replace(updates_YE=updates_YE, lost=newest.lost + lost)


def _describe(step: int, copies_YE: np.ndarray, learned: Learned, doubles: bool) -> str:
    older = copies_YE[copies_YE < step]
    above = ", above train.most_lost_updates: from here on a save holds twice as many, or all"
    return (
        f"{older.size} of {copies_YE.size} experts are of saves before step {step}, the oldest of step "
        f"{older.min(initial=step)} (train.experts_per_checkpoint); {learned.lost_share:.2%} of the experts' updates "
        f"so far are lost{above if doubles else ''}"
    )
