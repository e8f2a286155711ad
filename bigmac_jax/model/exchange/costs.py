"""What an exchange costs one rank: rows, bytes, collectives and seconds, from sizes alone.

T tokens and K choices on this rank, S ranks, E experts, e of a rank.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from bigmac_jax.model.exchange.all_to_all import AllToAll
from bigmac_jax.model.exchange.dedup import Dedup
from bigmac_jax.model.exchange.gather import Gather
from bigmac_jax.model.exchange.hop import Hop, expected_rows
from bigmac_jax.model.exchange.ragged import Ragged
from bigmac_jax.model.exchange.strategy import Strategy
from bigmac_jax.model.exchange.wire import row_bytes

# Bytes a second that one rank sends inside its machine and to others, for `exchange=auto`: an NVLink- or ICI-class link
# and a network card of 100 Gb/s for each rank.
FAST_LINK = 200e9
SLOW_LINK = 12.5e9
# Seconds that a collective takes however little it sends; what decides for the few rows of a decode step.
LATENCY = 10e-6


class Sent(NamedTuple):
    """What one rank sends, rows or bytes: inside its machine, and to other machines."""

    fast: float
    slow: float

    def times(self, factor: float) -> "Sent":
        return Sent(self.fast * factor, self.slow * factor)

    def plus(self, other: "Sent") -> "Sent":
        return Sent(self.fast + other.fast, self.slow + other.slow)


NOTHING = Sent(0, 0)


class Cost(NamedTuple):
    """What one rank sends in the two exchanges of a layer's forward pass.

    Attributes:
      dispatch, combine: rows, room without a token included.
      useful: rows of one exchange that hold a token, at uniform routing.
      metadata, metadata_gradient: bytes beside rows (experts, counts, gates), forward and in the gradient.
      collectives: of rows, of metadata, and of what is left for another round.
    """

    dispatch: Sent = NOTHING
    combine: Sent = NOTHING
    useful: Sent = NOTHING
    metadata: Sent = NOTHING
    metadata_gradient: Sent = NOTHING
    collectives: int = 0


def cost(exchange: Strategy, tokens: int, choices: int) -> Cost:
    """The cost of exchanging T tokens with K choices each; nothing on one rank.

    The ragged exchange's is that of exact rows, also on CPU, where an emulation sends more.
    """
    if exchange.ranks == 1:
        return Cost()
    spent = _cost(exchange, tokens, choices)
    asks = exchange.most_rounds(tokens, choices) > 1  # whether any rank has something left
    return spent._replace(collectives=spent.collectives + asks)


@functools.singledispatch
def _cost(exchange: Strategy, tokens: int, choices: int) -> Cost:
    raise TypeError(f"{type(exchange).__name__} has no cost")


@_cost.register
def _(exchange: AllToAll, tokens: int, choices: int) -> Cost:
    rows = _to_each_rank(exchange, exchange.rows(tokens, choices))
    useful = _to_each_rank(exchange, tokens * choices / exchange.ranks)
    if not exchange.dropless:
        return Cost(rows, rows, useful, collectives=2)
    return Cost(rows, rows, useful, metadata=_to_each_rank(exchange, 4 * exchange.local_experts), collectives=3)


@_cost.register
def _(exchange: Ragged, tokens: int, choices: int) -> Cost:
    rows = _to_each_rank(exchange, tokens * choices / exchange.ranks)
    return Cost(rows, rows, rows, metadata=_to_each_rank(exchange, 4 * exchange.num_experts), collectives=3)


@_cost.register
def _(exchange: Dedup, tokens: int, choices: int) -> Cost:
    hops = exchange.hops(tokens, choices)

    def over_hops(amount: Callable[[Hop], float]) -> Sent:
        """The sum of what a rank sends if it is `amount` to each destination of a hop."""
        total = NOTHING
        for hop in hops:
            sent = (hop.ranks - 1) * amount(hop)
            if hop.wire.axis == exchange.axis:
                total = total.plus(_to_each_rank(exchange, amount(hop)))
            else:
                total = total.plus(Sent(sent, 0) if hop.wire.axis == exchange.axis[1:] else Sent(0, sent))
        return total

    def expected(hop: Hop) -> float:
        reached = exchange.num_experts // hop.experts  # destinations that share the experts, and the tokens they serve
        return expected_rows(tokens * reached // hop.ranks, choices, exchange.num_experts, reached)

    def metadata(hop: Hop) -> int:
        """Experts and gates, and in rounds what a hop before another one is told that found no room behind it."""
        told = exchange.in_rounds and hop is not hops[-1]
        return hop.capacity * (hop.metadata_bytes(choices) + told * min(choices, hop.experts))

    rows = over_hops(lambda hop: hop.capacity)
    return Cost(
        rows,
        rows,
        over_hops(expected),
        metadata=over_hops(metadata),
        metadata_gradient=over_hops(lambda hop: hop.capacity * hop.gate_bytes(choices)),
        # In each hop experts, rows, gates, and rows back; in rounds a hop before another one is told what is left.
        collectives=4 * len(hops) + (len(hops) - 1 if exchange.in_rounds else 0),
    )


@_cost.register
def _(exchange: Gather, tokens: int, choices: int) -> Cost:
    rows = _to_each_rank(exchange, tokens)
    return Cost(
        rows,
        rows,
        _to_each_rank(exchange, expected_rows(tokens, choices, exchange.num_experts, exchange.ranks)),
        metadata=_to_each_rank(exchange, tokens * choices * (4 + 4)),  # experts and gates
        metadata_gradient=_to_each_rank(exchange, tokens * choices * 4),
        collectives=4,  # experts, rows, gates, and the sums
    )


def _to_each_rank(exchange: Strategy, amount: float) -> Sent:
    """What a rank sends if it is `amount` to each other rank of the group."""
    machines, size = exchange.sizes
    return Sent((size - 1) * amount, (machines - 1) * size * amount)


def wire_bytes(exchange: Strategy, tokens: int, choices: int, width: int, format: str) -> int:
    """Payload bytes that one rank sends to others in the two exchanges of one direction, padding included.

    `format`: that of the rows; "": the forward pass's.
    """
    spent = cost(exchange, tokens, choices)
    return round(sum(spent.dispatch) + sum(spent.combine)) * row_bytes(format or exchange.forward, width)


def seconds(exchange: Strategy, tokens: int, choices: int, width: int) -> float:
    """Predicted time of a forward pass's exchanges, from collectives and the bytes on fast and slow links."""
    spent = cost(exchange, tokens, choices)
    sent = spent.dispatch.plus(spent.combine).times(row_bytes(exchange.forward, width)).plus(spent.metadata)
    return sent.fast / FAST_LINK + sent.slow / SLOW_LINK + spent.collectives * LATENCY
