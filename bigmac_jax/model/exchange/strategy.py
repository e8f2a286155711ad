"""What an exchange strategy is: who sends which rows to whom.

All strategies run inside `shard_map` and have three parts: `plan` decides from the router's choice alone, `dispatch`
brings rows, and where it pays their gates, to the ranks that hold their experts, `combine` brings the experts' outputs
back and sums them. They know nothing of parameters; what they cost is said in `costs`.

T tokens and K choices on this rank, S = node × expert ranks, E experts, e = E/S of them here; N rows of width R arrive.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.wire import Wire

# Least rows per pair of ranks in a round: a decode step's few tokens would otherwise get a buffer of one or two rows,
# and many rounds. Two tokens with eight choices each have room in one, and need not ask whether anything is left.
FEW_ROWS = 16

Routes = TypeVar("Routes")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Where each choice stands among the rows that this rank sends: slot_TK and its inverse choice_M, as in `rows`."""

    slot_TK: Array
    choice_M: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan(Generic[Routes]):
    """Which row goes where.

    routes: what the strategy's own `dispatch` and `combine` need.
    expert_NK: the local experts of each row that arrives, e where there is none; None if the rows arrive as
      [S, e, C, R], as many of each rank for each expert.
    counts_E: how many of this rank's choices fell on each expert, before any drop.
    dropped: how many choices were dropped on this rank.
    left_TK: experts of the choices that another round must send, E for those that this one did; None without rounds.
    most_local: how many choices of expert_NK are local at most; None: as many as its shape allows.
    """

    routes: Routes
    expert_NK: Array | None
    counts_E: Array
    dropped: Array
    left_TK: Array | None = None
    most_local: int | None = field(default=None, metadata={"static": True})


@dataclass(frozen=True)
class Strategy(Generic[Routes]):
    """Attributes:
    sizes: ranks of the group by axis: machines (slow links), ranks of a machine (fast links).
    capacity_factor: f; inf drops nothing.
    axis: the mesh axes, as `sizes`.
    forward, backward: wire formats of rows and of their gradients.
    buffer_factor: room of a dropless exchange as a multiple of the rows expected at uniform routing. What exceeds it
      is sent in further rounds (`rounds`). inf reserves the worst case.
    """

    # Whether a rank weighs and sums the outputs of a row's experts before they return, so that `combine` is linear.
    sums_at_experts: ClassVar[bool] = False
    # Whether it can send in rounds.
    takes_rounds: ClassVar[bool] = False
    # Whether it counts room by expert, so that `place` can move choices to experts that have some.
    moves_choices: ClassVar[bool] = False

    num_experts: int
    sizes: tuple[int, int]
    capacity_factor: float
    axis: tuple[str, str]
    forward: str = "float32"
    backward: str = "float32"
    buffer_factor: float = math.inf

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks

    @property
    def dropless(self) -> bool:
        """Whether it has room for all rows; for `Config.dropless`, too."""
        return math.isinf(self.capacity_factor)

    @property
    def in_rounds(self) -> bool:
        """Whether plans say what is left for another round."""
        finite = math.isfinite(self.buffer_factor)
        return self.takes_rounds and self.dropless and finite and self.ranks > 1

    def most_rounds(self, tokens: int, choices: int) -> int:
        """Worst-case number of rounds: all tokens choose experts of one rank."""
        return 1

    @property
    def wire(self) -> Wire:
        """The links between all ranks of the group."""
        return Wire(self.axis, self.forward, self.backward)

    def place(self, ranked_TN: Array, choices: int) -> Array:
        """Moves choices that find their expert full to the token's next experts → experts_TK, which `plan` takes.

        Args:
          ranked_TN: each token's N >= K best experts, best first; E where there is none.
        """
        raise NotImplementedError

    def plan(self, experts_TK: Array) -> Plan[Routes]:
        """Plans one round. Expert E is none: padding's, or a choice that an earlier round sent."""
        raise NotImplementedError

    def dispatch(self, plan: Plan[Routes], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        """Brings each row to the ranks of its experts.

        Returns:
          rows_NR, and the gate_NK that their experts' outputs are multiplied by; None where `combine` does that.
        """
        raise NotImplementedError

    def combine(self, plan: Plan[Routes], y_NR: Array, gates_TK: Array) -> Array:
        """Brings the experts' outputs back and sums each token's, weighted by its gates → y_TR."""
        raise NotImplementedError


def room(rows: float, at_most: int) -> int:
    """⌈rows⌉ in [1, at_most]."""
    # Rounded before the ceiling: 1.1 · 10 is 11.000000000000002 in floats, and 11 rows are meant.
    return min(at_most, max(1, math.ceil(round(rows, 6))))


def round_room(factor: float, expected: float, worst: int, choices: int = 1) -> int:
    """Rows, or (row, choice) pairs, that a pair of ranks has room for in each round.

    Args:
      factor: room over what is expected (`buffer_factor`).
      expected: rows or pairs at uniform routing; `worst`: the most that there can be.
      choices: what the least room is multiplied by: 1 for rows, for pairs the most of a row.
    """
    return room(max(factor * expected, FEW_ROWS * choices), worst)


def count_choices(experts_TK: Array, experts: int) -> Array:
    """counts_E: how many choices fell on each expert; expert E, which is none, is left out."""
    return jnp.zeros_like(experts_TK, shape=(experts,)).at[experts_TK.reshape(-1)].add(1, mode="drop")


def none_dropped(experts_TK: Array) -> Array:
    """The number 0, which varies over ranks as `experts_TK` does."""
    return jnp.zeros_like(experts_TK, shape=())
