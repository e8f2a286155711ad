"""A model that decodes with its keys and values cached in pages.

A step reads some tokens of many sequences: of each of the S shards of the batch W rows of C tokens, side by side,
[S, T] with T = W · C, as if they were the tokens of one sequence. So every layer that takes each token by itself splits
them over `tensor` as in training. D hidden, G key-value heads, H head size, V vocabulary, Y layers of a group, n pages
of p positions.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.config.errors import require
from bigmac_jax.inference.decoder_weights import convert, hold_experts
from bigmac_jax.inference.int8_weights import dequantize
from bigmac_jax.inference.layer_loop import Group, Loop, count_trips
from bigmac_jax.model.attention import Attention, KeyValues, Rows
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mamba import Mamba, Past, Projected, make_past
from bigmac_jax.model.mesh import TENSOR, batch_ranks, batch_spec, cache_spec, platform, tensor_ranks, token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.next_tokens import NextTokens
from bigmac_jax.model.plain_router import plain_router
from bigmac_jax.model.resident import Ring, compute_layer, is_resident, start
from bigmac_jax.model.resident_experts import Held
from bigmac_jax.model.router import Padding
from bigmac_jax.model.transformer import Block, TokenMixer, Transformer, init_model, without_next_tokens
from bigmac_jax.training.step import split_model

WEIGHTS = ("", "float32", "bfloat16", "int8")
Pasts = tuple[KeyValues | Past, ...]  # of the branches of a layer that have one: in pages, or of each slot
Seen = tuple[tuple[tuple[Projected, ...], ...], ...]  # likewise: the tokens of Mamba layers whose past waits for them


class Cache(NamedTuple):
    """What a decoder keeps between steps."""

    pasts: tuple[tuple[Pasts, ...], ...]  # of the layers of each group, in all trips
    experts: Ring | Held | None = None  # on the device, of a decoder whose experts stand in host memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model for decoding: weights in execution.dtype or int8, its layers in stacked groups that are scanned.

    A group is a loop over layers (`stacks_of_loops`), so that compilation does not take longer the more there are. On
    CPU it is one trip, and elsewhere with execution.unroll_layers, because a step that reads one of stacked layers
    copies what it slices (`layer_loop.Loop`).
    """

    ends: Transformer  # embedding, final norm and unembedding; its stacks of layers are None
    groups: tuple[Group, ...]
    next_tokens: NextTokens | None = None  # the module that drafts (`next_token_drafts`), its parameters one deep
    # The experts' parameters in host memory, [Y, …]; the layers are without. None where all stand on the device.
    store: Any = None

    @property
    def config(self) -> Config:
        """The run's config with the execution settings of decoding."""
        return self.ends.config


def make_decoder(
    config: Config,
    model: Transformer,
    exchange: str = "auto",
    consume: bool = False,
    weights: str = "",
    gathered: bool = False,
    next_tokens: bool = False,
) -> Decoder:
    """Makes the decoder of a model; it never drops tokens.

    Args:
      exchange: the strategy, instead of the one that suited training; `auto` takes the fastest one for the few rows of
        a decode step, and for the many of a prefill.
      consume: frees the model's arrays on the way, so that memory for one more of them is enough; the model can't be
        used any more.
      weights: float32, bfloat16 or int8; "" keeps execution.dtype. The computation is in the same dtype, with int8 in
        execution.dtype.
      gathered: what mesh.fsdp has split is gathered now, and kept, instead of in every step; experts in host
        memory stay split.
      next_tokens: keeps the model's first next-token module, for drafts; the others, or all, are left out.

    Raises:
      ConfigError: weights of another name.
    """
    require(weights in WEIGHTS, f"weights={weights!r} must be float32, bfloat16 or int8, or empty for execution.dtype")
    if not next_tokens:
        config, model = without_next_tokens(config, model)
    config, model = plain_router(config, model)  # or every step would make its matrix
    dtype = weights if weights in ("float32", "bfloat16") else config.execution.dtype
    changes: Any = {"exchange": exchange, "overlap_chunks": 1, "remat": "none", "dtype": dtype}
    execution = dataclasses.replace(config.execution, **changes)
    config = dataclasses.replace(config, execution=execution)
    # No array is made here: the mesh may be of devices that are only compiled for.
    abstract = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    ends: Any = nnx.merge(split_model(abstract)[0], *split_model(model)[1:])
    stacks = dict(zip(config.model.stacks, ends.stacks(), strict=True))
    for stack in stacks:
        setattr(ends, stack.name, None)
    modules, ends.mtp = ends.mtp, None
    # A loop over stacked layers copies what it slices out of the stack, in every step.
    one_by_one = execution.unroll_layers >= config.model.depth or (not execution.unroll_layers and platform() == "cpu")
    to_decoder = functools.partial(convert, config, consume=consume, weights=weights, gathered=gathered)
    store = None
    if is_resident(config):
        stacks, store = hold_experts(config, stacks, consume=consume, weights=weights)
    groups: list[Group] = []
    for loop in config.model.stacks_of_loops:
        parts = [to_decoder(stacks[stack], layers=len(stack.layers) * one_by_one) for stack in loop]
        groups += zip(*parts, strict=True)
    if modules is not None:
        modules = to_decoder(modules, layers=config.model.mtp_modules)[0]
    return Decoder(to_decoder(ends)[0], tuple(groups), modules, store)


def make_cache(decoder: Decoder, pages: int, page_size: int, slots: int) -> Cache:
    """An empty cache with so many pages, and slots for Mamba layers, for each batch shard and layer."""
    sizes = pages, page_size, slots
    pasts = tuple(
        tuple(make_pasts(decoder.config, layer, *sizes, trips=count_trips(group)) for layer in group)
        for group in decoder.groups
    )
    return Cache(pasts, None if decoder.store is None else start(decoder.store, decoder.config.execution))


def make_pasts(config: Config, layer: Block, pages: int, page_size: int, slots: int, trips: int = 1) -> Pasts:
    """The empty pasts of a layer, in all trips. A key-value head that several ranks of `tensor` read is there once for
    each of them."""
    m, dtype = config.model, config.execution.dtype

    def make(mixer: TokenMixer) -> KeyValues | Past:
        if isinstance(mixer, Mamba):
            return make_past(config, slots, trips)
        shape = max(m.kv_heads, tensor_ranks()), batch_ranks() * trips * pages, page_size, m.head_size
        return KeyValues(*(jnp.zeros(shape, dtype, out_sharding=cache_spec()) for _ in range(2)))

    return tuple(make(mixer) for _, mixer in layer.mixers() if isinstance(mixer, TokenMixer))


def advance(model: Decoder, cache: Cache, tokens_ST: Array, rows: Rows) -> tuple[Array, Cache]:
    """Runs the layers over the next tokens of sequences → features x_STD, and the cache with these tokens added.

    Decoding is this with one token a row; a prompt is read in rows of some pages. Tokens of a row beyond its count may
    be any.
    """
    return _advance(model, cache, tokens_ST, rows)[:2]


def try_out(model: Decoder, cache: Cache, tokens_ST: Array, rows: Rows) -> tuple[Array, Cache, Seen]:
    """As `advance`, for tokens of which it is not known yet how many will stay: Mamba layers' pasts are what they were,
    and `settle` adds to them. What attention has too many is written over."""
    return _advance(model, cache, tokens_ST, rows, settles=False)


def settle(model: Decoder, cache: Cache, seen: Seen, count_SB: Array) -> Cache:
    """The cache with the first `count_SB` tokens of each slot, of those that were tried out."""

    def step(pasts: Any, xs: Any) -> tuple[Any, None]:
        group, trip, seen = xs
        after = []
        for layer, of_layer, seen_by_layer in zip(group, pasts, seen, strict=True):
            mixers = [mixer for _, mixer in layer.mixers() if isinstance(mixer, TokenMixer)]
            given, settled = iter(seen_by_layer), []
            for mixer, past in zip(mixers, of_layer, strict=True):
                if isinstance(mixer, Mamba):
                    past = _update(past, mixer.step(next(given), _take(past, trip), rows)[1], trip)
                settled.append(past)
            after.append(tuple(settled))
        return tuple(after), None

    rows, after = Rows(count_SB, count_SB, count_SB), []  # of which Mamba layers read the count alone
    for group, pasts, seen_by_group in zip(model.groups, cache.pasts, seen, strict=True):
        if any(seen_by_group):
            xs = (
                dequantize(group, model.config.execution.dtype),
                jnp.arange(count_trips(group), dtype=jnp.int32),
                seen_by_group,
            )
            pasts = jax.lax.scan(step, pasts, xs)[0]
        after.append(pasts)
    return cache._replace(pasts=tuple(after))


def only_keys(after: Any, before: Any) -> Any:
    """The pasts `after` some steps, with those of Mamba layers as they were."""

    def choose(new: KeyValues | Past, old: KeyValues | Past) -> KeyValues | Past:
        return new if isinstance(new, KeyValues) else old

    return jax.tree.map(choose, after, before, is_leaf=lambda node: isinstance(node, KeyValues | Past))


def _advance(
    model: Decoder, cache: Cache, tokens_ST: Array, rows: Rows, settles: bool = True
) -> tuple[Array, Cache, Seen]:
    def step(
        loop: Loop, trips: int, carry: tuple[Array, Any, Any], xs: tuple[list[Any], Array]
    ) -> tuple[tuple[Array, Any, Any], Any]:
        (x_STD, pasts, experts), (leaves, trip) = carry, xs
        group, after, seen = loop.in_trip(leaves, trip), [], []
        for layer, of_layer in zip(group, pasts, strict=True):

            def compute(layer: Block, x_STD: Array = x_STD, of_layer: Pasts = of_layer) -> Any:
                return through_layer(as_computed(layer), x_STD, of_layer, (trip, trips), rows, settles, idle)

            (x_STD, of_layer, projected, _), experts = compute_layer(
                model.store, experts, execution, layer, compute, as_computed
            )
            after.append(of_layer)
            seen.append(projected)
        return (x_STD, tuple(after), experts), tuple(seen)

    execution, experts = model.config.execution, cache.experts
    as_computed = functools.partial(dequantize, dtype=execution.dtype)
    # Experts are not copied for tokens that nobody asked for.
    idle = find_idle(rows, tokens_ST.shape[1]) if isinstance(experts, Held) else None
    x_STD, groups = as_computed(model.ends).embed(tokens_ST, positions(rows, tokens_ST.shape[1])), []
    for group, pasts in zip(model.groups, cache.pasts, strict=True):
        loop, trips = Loop.of(group), count_trips(group)
        of_trips = loop.sliced, jnp.arange(trips, dtype=jnp.int32)
        carry = x_STD, pasts, experts
        (x_STD, pasts, experts), seen = jax.lax.scan(functools.partial(step, loop, trips), carry, of_trips)
        groups.append((pasts, seen))
    return x_STD, Cache(tuple(pasts for pasts, _ in groups), experts), tuple(seen for _, seen in groups)


def through_layer(
    layer: Block,
    x_STD: Array,
    pasts: Pasts,
    turn: tuple[Array, int],
    rows: Rows,
    settles: bool = True,
    idle: Padding | None = None,
) -> tuple[Array, Pasts, tuple[Projected, ...], Any]:
    """One layer of a group → x, the pasts, what Mamba layers have seen if it doesn't settle, and what its MoE reports.

    Args:
      pasts: of its branches, with those of all trips.
      turn: which trip of how many it is.
      idle: tokens that go to no expert.
    """
    given, (trip, trips) = iter(pasts), turn
    after: list[KeyValues | Past] = []
    seen: list[Projected] = []
    reported: Any = None
    for norm, mixer in layer.mixers():
        h_STD = norm(x_STD)
        if isinstance(mixer, Attention):
            past: Any = next(given)
            first = trip * (past.keys.shape[1] // batch_ranks() // trips)
            y_STD, past = mixer.step(h_STD, past, first, rows)
            after.append(past)
        elif isinstance(mixer, Mamba):
            projected, past = mixer.project(h_STD), next(given)
            y_STD, of_trip = mixer.step(projected, _take(past, trip), rows)
            after.append(_update(past, of_trip, trip) if settles else past)
            seen += [] if settles else [projected]
        elif isinstance(mixer, MoE):
            y_STD, reported = mixer(h_STD, evaluating=True, padding=idle)
        else:
            y_STD = mixer(h_STD)
        x_STD = x_STD + y_STD
    return x_STD, tuple(after), tuple(seen), reported


def _take(past: Past, trip: Array) -> Past:
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, trip, keepdims=False), past)


def _update(past: Past, of_trip: Past, trip: Array) -> Past:
    return jax.tree.map(lambda v, new: jax.lax.dynamic_update_index_in_dim(v, new, trip, 0), past, of_trip)


def compute_last_logits(model: Decoder, x_STD: Array, count_SW: Array) -> Array:
    """Float32 logits_SWV for the token after each row's last."""
    return compute_logits(model, take_last(x_STD, count_SW))


def take_last(x_STD: Array, count_SW: Array) -> Array:
    """x_SWD of each row's last token."""
    if x_STD.shape[:2] == count_SW.shape:  # rows of one token
        return x_STD
    specs = token_spec(3), batch_spec(2)
    return on_each_rank(_take_last, (x_STD, count_SW), in_spec=specs, out_specs=token_spec(3))


def compute_logits(model: Decoder, x_STD: Array) -> Array:
    """Float32 logits_STV for the token after each token."""
    ends = dequantize(model.ends, model.config.execution.dtype)
    return ends.logits(ends.final_norm(x_STD))


def positions(rows: Rows, tokens: int) -> Array:
    """position_ST of the rows' tokens, side by side; tokens beyond a row's count get the position of its first."""

    def on_rank(position_SW: Array, count_SW: Array) -> Array:
        step_C = jnp.arange(tokens // position_SW.shape[1], dtype=jnp.int32)[None, None]
        step_SWC = jnp.where(step_C < count_SW[..., None], step_C, 0)
        return (position_SW[..., None] + step_SWC).reshape(1, -1)

    return on_each_rank(on_rank, (rows.position_SW, rows.count_SW), in_spec=batch_spec, out_specs=batch_spec(2))


def find_idle(rows: Rows, tokens: int) -> Padding:
    """The tokens beyond each row's count, of all that stand side by side."""

    def on_rank(count_SW: Array) -> Array:
        step_C = jnp.arange(tokens // count_SW.shape[1], dtype=jnp.int32)[None, None]
        return (step_C >= count_SW[..., None]).reshape(1, -1)

    return Padding.of(on_each_rank(on_rank, (rows.count_SW,), in_spec=batch_spec, out_specs=batch_spec(2)))


def _take_last(x_STD: Array, count_SW: Array) -> Array:
    """On one rank, which has a part of its shard's tokens: the features [1, w, D] of the last tokens of its part of the
    rows."""
    (_, T, _), W = x_STD.shape, count_SW.shape[1]
    C = T * tensor_ranks() // W
    place_W = jnp.arange(W, dtype=jnp.int32) * C + jnp.maximum(count_SW[0] - 1, 0) - jax.lax.axis_index(TENSOR) * T
    here_W = (place_W >= 0) & (place_W < T)
    x_WD = jnp.where(here_W[:, None], x_STD[0, jnp.clip(place_W, 0, T - 1)], 0)
    return jax.lax.psum_scatter(x_WD, TENSOR, scatter_dimension=0, tiled=True)[None]
