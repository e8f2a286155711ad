"""Bytes that ranks send in a training step: rows of the exchange, sequences over `tensor`, gradients to replicas.

Counted from the config, without a device. B batch, L length, D hidden, R row width, K top-k.
"""

import math
from typing import NamedTuple

from bigmac_jax.config import Config
from bigmac_jax.model.choose_exchange import choose_exchange, make_exchange
from bigmac_jax.model.counts import Sizes, forward_passes, parameters, recomputes
from bigmac_jax.model.exchange import AllToAll, Ragged, Strategy
from bigmac_jax.model.exchange.costs import Sent, cost
from bigmac_jax.model.exchange.wire import row_bytes
from bigmac_jax.model.mesh import REPLICA, ExpertGroup


class Traffic(NamedTuple):
    """Bytes that all ranks together send to other ranks in the exchanges of a training step, and how often."""

    payload: Sent  # rows that hold a token, at uniform routing
    padded: Sent  # rows with the room around them
    metadata: Sent  # experts, counts, gates
    exchanges: int  # payload exchanges that one rank takes part in


def exchange_traffic(config: Config, ranks: int, group: ExpertGroup, name: str = "") -> Traffic:
    """Counts a training step's exchange bytes with the strategy `name`, by default the configured one."""
    m, tokens = config.step_model, tokens_at_a_time(config, ranks)
    if not m.is_moe:
        return Traffic(Sent(0, 0), Sent(0, 0), Sent(0, 0), 0)
    if name:
        exchange = make_exchange(name, config, m.capacity_factor, group)
    else:
        exchange = choose_exchange(config, m.capacity_factor, tokens, group)
    forward, backward = (row_bytes(format, m.wire_size) for format in (exchange.forward, exchange.backward))
    # The forward pass runs again where loads are counted first, where it is rematerialised with its exchange, and as
    # DPO's reference.
    passes, again = forward_passes(config), exchanges_again(config)
    dispatches = passes + again
    combines = passes + (again and _back_again(config, exchange))

    def rows(dispatch: Sent, combine: Sent) -> Sent:
        there = dispatch.times(dispatches * forward + backward)
        return there.plus(combine.times(combines * forward + backward))

    spent = cost(exchange, tokens, m.choices)
    parts = config.train.accumulate_steps * config.execution.overlap_chunks
    here = m.count_trained("E") * parts  # layers of a rank in a step
    return Traffic(
        rows(spent.useful, spent.useful).times(here * ranks),
        rows(spent.dispatch, spent.combine).times(here * ranks),
        spent.metadata.times(dispatches).plus(spent.metadata_gradient).times(here * ranks),
        (dispatches + combines + 2) * here,
    )


def tokens_at_a_time(config: Config, ranks: int) -> int:
    """Tokens of a rank that one exchange carries in training."""
    parts = ranks * config.train.accumulate_steps * config.execution.overlap_chunks
    return config.data.batch_size * config.data.sequence_length // parts


def sends_ragged(config: Config, ranks: int, group: ExpertGroup, teaches: bool = False) -> bool:
    """Whether the exchanges of a training step are ragged, by execution.exchange or because `auto` takes them; those of
    a teacher, which drops nothing, if it is the config of one."""
    m = config.step_model
    if not m.is_moe or math.prod(group.sizes) == 1:
        return False
    capacity_factor = math.inf if teaches else m.capacity_factor
    return isinstance(choose_exchange(config, capacity_factor, tokens_at_a_time(config, ranks), group), Ragged)


def exchanges_again(config: Config) -> bool:
    """Whether the recomputed forward pass exchanges rows again."""
    return config.execution.remat in ("layer", "offload")


def tensor_bytes(config: Config, sizes: Sizes, group: ExpertGroup) -> float:
    """Bytes that a rank sends to its `tensor` ranks in a training step.

    A layer's attention gathers its input and scatters its output, and their gradients the other way round; so does a
    dense MLP, and with mesh.split_experts the experts, whose rows are `wire_size` wide. Of the tables of tokens each
    rank has some rows: it reads them for all ranks' tokens and scatters the sums, and for the loss gathers tokens.
    """
    m, t, again = config.step_model, sizes.get("tensor", 1), recomputes(config)
    if t == 1:
        return 0.0
    ranks = math.prod(sizes.values())
    passes = forward_passes(config)
    tokens = config.data.batch_size * config.data.sequence_length / ranks
    # What a recomputed layer ends in is not summed again.
    moved = m.count_trained("*M") * tokens * m.hidden_size * (2 * passes + 2 + 2 * again)
    moved += m.count_trained("-") * tokens * m.hidden_size * (2 * passes + 2 + again)
    if m.is_moe and config.mesh.split_experts:
        at_a_time = tokens_at_a_time(config, ranks)
        exchange = choose_exchange(config, m.capacity_factor, at_a_time, group)
        rows = tokens / at_a_time * received_rows(exchange, at_a_time, m.choices)
        # Sums that an exchange brings back are needed again with the exchange alone.
        repeated = again + (exchanges_again(config) and _back_again(config, exchange))
        moved += m.count_trained("E") * rows * m.wire_size * (2 * passes + 2 + repeated)
    tables = tokens * m.hidden_size * (passes + 3) * (1 + m.mtp_modules)
    ids = 4 * tokens * (passes + 1) * (1 + m.mtp_modules)
    return (t - 1) * (config.execution.dtype_bytes * (moved + tables) + ids)


def replica_bytes(config: Config, sizes: Sizes) -> float:
    """Bytes that a rank sends to other replicas in a step: its shards of the gradients, in execution.reduce_dtype, and
    with mesh.replica_optimizer=sharded the float32 parameters that it has updated."""
    count, replicas = parameters(config, sizes), sizes.get(REPLICA, 1)
    reduced = 2 if config.execution.reduce_dtype == "bfloat16" else 4
    # A sum that all have is a scatter and a gather; where parameters are updated in shards, these are gathered instead.
    whole = count.shards_of_a_rank - count.scattered_of_a_rank
    return (1 - 1 / replicas) * (2 * reduced * whole + (reduced + 4) * count.scattered_of_a_rank)


def exchanged_bytes(config: Config, ranks: int, group: ExpertGroup) -> float:
    """Bytes that a rank receives in the exchanges of one layer's forward pass, which execution.remat=exchange keeps."""
    m, tokens = config.model, tokens_at_a_time(config, ranks)
    if not m.is_moe or math.prod(group.sizes) == 1:
        return 0.0
    exchange = choose_exchange(config, m.capacity_factor, tokens, group)
    rows = received_rows(exchange, tokens, m.choices) * config.execution.overlap_chunks
    ways = 1 + _back_again(config, exchange)
    return ways * rows * m.wire_size * config.execution.dtype_bytes


def received_rows(exchange: Strategy, tokens: int, choices: int) -> float:
    """Rows that a rank receives in one exchange, empty ones and its own included; alone it keeps its tokens' rows, or
    places them in the experts' room."""
    if exchange.ranks == 1:
        return exchange.rows(tokens, choices) if isinstance(exchange, AllToAll) and not exchange.dropless else tokens
    if isinstance(exchange, Ragged):  # it sends no empty row, but has room for them
        return exchange.room(tokens, choices)
    return sum(cost(exchange, tokens, choices).dispatch) * exchange.ranks / (exchange.ranks - 1)


def computed_rows(exchange: Strategy, tokens: int, choices: int) -> float:
    """Rows a token that experts multiply: with a capacity they stand by expert, full or not."""
    if isinstance(exchange, AllToAll) and not exchange.dropless:
        return exchange.rows(tokens, choices) * exchange.ranks / tokens
    return choices


def _back_again(config: Config, exchange: Strategy) -> bool:
    """Whether a backward pass needs what came back: not where nothing but sums follows on it."""
    m = config.model
    return m.structure == "bigmac" or bool(m.latent_norms) or not exchange.sums_at_experts
