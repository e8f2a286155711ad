"""The training loss, and the scores of evaluation.

B batch, L length, T tokens on this rank, C of a chunk, D hidden, V vocabulary, v of it on a rank, Y layers, E experts,
U replicas.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.balance import balance_losses
from bigmac_jax.model.gathering import Weight, on_each_rank
from bigmac_jax.model.layers import divisor
from bigmac_jax.model.mesh import (
    AXES,
    TENSOR,
    batch_spec,
    join,
    per_replica,
    platform,
    rank_spec,
    replicas,
    tensor_ranks,
    token_spec,
)
from bigmac_jax.model.moe import Aux, LayerStats
from bigmac_jax.model.next_tokens import look_ahead
from bigmac_jax.model.router import Padding
from bigmac_jax.model.transformer import Transformer, own_rows

# Logits held at once by `linear_cross_entropy`, in entries: on CPU a chunk that stays in the last-level cache.
_CHUNK_ENTRIES = {"cpu": 2**22}
_CHUNK_ENTRIES_ACCELERATOR = 2**27


class LossTerms(NamedTuple):
    """The loss and its terms in means over each replica's tokens, and what is logged beside it."""

    loss_U: Array
    cross_entropy_U: Array  # nats; of a run with DPO, its loss
    stats: LayerStats  # [Y, U, …]
    balance_YU: Array | None = None  # the balance loss, where it is a term
    pairs_U: Any = None  # `dpo.PairMetrics`
    gaps: Any = None  # `distillation.Gaps` of a run with a teacher
    next_KU: Array | None = None  # cross-entropy of the K next-token modules, nats

    def join(self) -> "tuple[Array, LossParts]":
        """The loss, and its terms, in means over all replicas."""
        aux = Aux.of(self.stats, self.balance_YU)
        pairs, gaps = jax.tree.map(lambda v: v.mean(0), self.pairs_U), self.gaps
        if gaps is not None:
            gaps = gaps._replace(divergence=gaps.divergence.mean(0))
        next_K = None if self.next_KU is None else self.next_KU.mean(1)
        return self.loss_U.mean(), LossParts(self.cross_entropy_U.mean(), aux, pairs, gaps, next_K)


class LossParts(NamedTuple):
    """Terms of the loss and what is logged beside it; means over the tokens of the batch."""

    cross_entropy: Array  # nats; of a run with DPO, its loss
    aux: Aux
    pairs: Any = None  # `dpo.PairMetrics`
    gaps: Any = None  # `distillation.Gaps` of a run with a teacher
    next_K: Array | None = None  # cross-entropy of the K next-token modules, nats


class Share(NamedTuple):
    """What one of several parts of a batch knows of the whole; None is the part's own.

    Sums are divided by these counts, those of the whole over the number of parts, so that the mean over the parts is
    the mean over the batch.
    """

    targets: Array | None = None  # with DPO, pairs
    tokens: Array | None = None  # padding left out
    load_YE: Array | None = None  # for the balance loss
    choices: Array | None = None  # how many experts a token takes now, if fewer than model.top_k
    ahead: "tuple[Share, ...]" = ()  # the same for what each next-token module sees (`look_ahead`)

    def padding(self, batch: Batch) -> Padding | None:
        """The positions that belong to no document."""
        return None if batch.segments_BL is None else Padding.of(batch.segments_BL == PADDING, self.tokens)


WHOLE = Share()  # a batch that is no part of another


def loss_fn(model: Transformer, batch: Batch, dropout_key: Array | None, share: Share) -> tuple[Array, LossTerms]:
    """Cross-entropy of the targets, plus the router's losses, summed over layers."""
    x_BLD, stats = _features(model, batch, dropout_key, share)
    ce_U = linear_cross_entropy(x_BLD, model.unembedding(), batch.targets_BL, share.targets)
    terms = LossTerms(ce_U, ce_U, stats)
    if model.config.trains_mtp:
        terms = _add_next_tokens(model, x_BLD, batch, dropout_key, share, terms)
    return add_router_losses(model.config.model, share, terms)


def _add_next_tokens(
    model: Transformer, x_BLD: Array, batch: Batch, dropout_key: Array | None, share: Share, terms: LossTerms
) -> LossTerms:
    """Adds the mean of the next-token modules' losses, each a mean over its own targets, with train.mtp_weight, and
    their layers' statistics behind the model's (DeepSeek-V3, equations 21 to 25). `x_BLD` is the model's features."""
    losses, stats = [], [terms.stats]
    for number in range(model.config.model.mtp_modules):
        ahead, own = look_ahead(batch, number + 1), share.ahead[number] if share.ahead else WHOLE
        padding = own.padding(ahead)
        assert padding is not None
        x_BLD, of_module = model.next_features(
            number,
            x_BLD,
            ahead.inputs_BL,
            batch.segments_BL,
            dropout_key=dropout_key,
            padding=padding,
            choices=share.choices,
        )
        losses.append(linear_cross_entropy(x_BLD, model.unembedding(), ahead.targets_BL, own.targets))
        stats += [of_module] if model.config.model.mtp_stack.experts else []
    next_KU, joined = jnp.stack(losses), jax.tree.map(join, *stats)
    loss_U = terms.loss_U + model.config.train.mtp_weight * next_KU.mean(0)
    return terms._replace(loss_U=loss_U, stats=joined, next_KU=next_KU)


def _features(model: Transformer, batch: Batch, dropout_key: Array | None, share: Share) -> tuple[Array, LayerStats]:
    return model.features(
        batch.inputs_BL,
        batch.segments_BL,
        dropout_key=dropout_key,
        padding=share.padding(batch),
        choices=share.choices,
    )


def add_router_losses(config: ModelConfig, share: Share, terms: LossTerms) -> tuple[Array, LossTerms]:
    """Adds the router's losses, summed over layers → the loss to be differentiated, and its terms."""
    loss_U, stats, balance_YU = terms.loss_U, terms.stats, None
    if config.is_moe:
        loss_U = loss_U + config.z_loss_coefficient * stats.z_loss.sum(0)
        if config.balance == "aux_loss":
            balance_YU = balance_losses(stats.shares, stats.load, share.load_YE)
            loss_U = loss_U + config.balance_coefficient * balance_YU.sum(0)
    return loss_U.mean(), terms._replace(loss_U=loss_U, balance_YU=balance_YU)


class TokenScores(NamedTuple):
    """What evaluation measures: of each position, and of the routers over all tokens that are no padding."""

    nll_BL: Array  # -log p(target), nats, float32
    likeliest_BL: Array  # whether no token has a larger logit; of equal ones the first counts
    load_YE: Array  # share of the choices that went to each expert
    entropy_Y: Array  # of the router's scores, mean over tokens, nats
    tokens: Array  # their number


@jax.named_scope("loss")
def linear_cross_entropy(x_BLD: Array, w_VD: Weight, targets_BL: Array, targets: Array | None) -> Array:
    """Mean cross-entropy of the logits x wᵀ over the targets that are not NO_TARGET, nats, without ever holding all
    logits, [U]. `targets` is the number to divide by of all replicas, if not that of these targets.

    Each rank computes a chunk's gradients while its logits are still in cache: the loss is a sum, so they are known up
    to a factor. Against whole logits, forward and backward take about a fifth less time on CPU (docs/performance.md),
    and chunk × V instead of T × V memory.

    Where `tensor` splits the table, each of its ranks takes the tokens of all, and computes what its v rows give.
    """

    def on_rank(x_BLD: Array, targets_BL: Array, w_vD: Array) -> Array:
        x_TD, targets_T = gather_tensor_tokens(x_BLD, targets_BL)
        return _cross_entropy(x_TD, w_vD, targets_T)[None]

    targets = jnp.sum(targets_BL != NO_TARGET) if targets is None else targets
    targets_BL = jax.sharding.reshard(targets_BL, token_spec(2))
    x_BLD, value = _table_first(x_BLD, w_VD.value)
    weights = (w_VD._replace(value=value),)
    return mean_of_targets(on_each_rank(on_rank, (x_BLD, targets_BL), weights, out_specs=rank_spec(1)), targets)


def mean_of_targets(sums: Array, targets: Array) -> Array:
    """The mean over each replica's share of all `targets` [U], from the sums of rows or of ranks."""
    return per_replica(sums).sum(1) / divisor(targets / replicas())


@jax.custom_vjp
def _table_first(x_BLD: Array, w_VD: Array) -> tuple[Array, Array]:
    """Returns both. The table's gradient goes back to its shards before the layers' gradients are computed; otherwise
    it would stay whole in memory all along."""
    return x_BLD, w_VD


_table_first.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def token_scores(model: Transformer, batch: Batch) -> TokenScores:
    """Scores the targets for evaluation, dropless; logits are never held whole. The score of NO_TARGET is any number.

    Padding is what belongs to no document; of rows that are no documents, what stands behind the last target.
    """

    def score(logits_Cv: Array, target_C: Array, targets_C: Array) -> tuple[Array, Array]:
        largest_C, first_C, v = logits_Cv.max(-1), jnp.argmax(logits_Cv, axis=-1), logits_Cv.shape[-1]
        if tensor_ranks() > 1:
            mine_C = largest_C == jax.lax.pmax(largest_C, TENSOR)
            first_C = jnp.where(mine_C, first_C + jax.lax.axis_index(TENSOR) * v, jnp.iinfo(jnp.int32).max)
            first_C = jax.lax.pmin(first_C, TENSOR)
        return _log_sum_exp(logits_Cv) - target_C, first_C == targets_C

    padding = WHOLE.padding(batch)
    if padding is None:
        padding = Padding.of(_behind_targets(batch.targets_BL))
    x_BLD, stats = model.features(batch.inputs_BL, batch.segments_BL, padding=padding, evaluating=True)
    nll_BL, likeliest_BL = _score_targets(model, x_BLD, batch.targets_BL, score)
    return TokenScores(nll_BL, likeliest_BL, stats.load.mean(1), stats.router_entropy.mean(1), padding.tokens)


def _behind_targets(targets_BL: Array) -> Array:
    """Which positions have no target at or behind them."""

    def behind(targets_BL: Array) -> Array:
        return jax.lax.cummax(targets_BL, axis=1, reverse=True) == NO_TARGET

    targets_BL = jax.sharding.reshard(targets_BL, batch_spec(2))
    return on_each_rank(behind, (targets_BL,), in_spec=batch_spec, out_specs=batch_spec(2))


def token_nll(
    model: Transformer, batch: Batch, dropout_key: Array | None = None, share: Share = WHOLE
) -> tuple[Array, LayerStats]:
    """-log p of each target as training computes it, nats, and the layers' statistics; to be differentiated. The value
    at NO_TARGET is any number."""

    def score(logits_Cv: Array, target_C: Array, _: Array) -> tuple[Array]:
        return (_log_sum_exp(logits_Cv) - target_C,)

    x_BLD, stats = _features(model, batch, dropout_key, share)
    return _score_targets(model, x_BLD, batch.targets_BL, score)[0], stats


def _score_targets(model: Transformer, x_BLD: Array, targets_BL: Array, score: Callable[..., Any]) -> Any:
    """What `score` returns for every target, [B, L] each: of (logits_Cv of this rank, target's logit_C, targets_C) of a
    chunk. A chunk's logits are computed again in a backward pass."""

    def on_rank(x_BLD: Array, targets_BL: Array, w_vD: Array) -> Any:
        x_TD, targets_T = gather_tensor_tokens(x_BLD, targets_BL)

        @jax.checkpoint
        def body(_: None, xs: tuple[Array, Array]) -> tuple[None, Any]:
            logits_Cv, target_C = _logits(*xs, w_vD)[:2]
            return None, score(logits_Cv, reduce_tensor(jax.lax.psum, target_C), xs[1])

        chunks = num_chunks(x_TD.shape[0], w_vD.shape[0])
        xs = x_TD.reshape(chunks, -1, x_TD.shape[1]), targets_T.reshape(chunks, -1)
        scores = jax.lax.scan(body, None, xs)[1]
        return jax.tree.map(lambda v: _own_positions(v.reshape(x_BLD.shape[0], -1), targets_BL.shape[1]), scores)

    targets_BL = jax.sharding.reshard(targets_BL, token_spec(2))
    return on_each_rank(on_rank, (x_BLD, targets_BL), (model.unembedding(),), out_specs=token_spec(2))


def _log_sum_exp(logits_Cv: Array) -> Array:
    """log Σ exp over the whole vocabulary, [C]."""
    largest_C1 = reduce_tensor(jax.lax.pmax, jax.lax.stop_gradient(logits_Cv.max(-1, keepdims=True)))
    z_C = reduce_tensor(jax.lax.psum, jnp.exp(logits_Cv - largest_C1).sum(-1))
    return jnp.log(z_C) + largest_C1[:, 0]


def gather_tensor_tokens(x_BLD: Array, targets_BL: Array) -> tuple[Array, Array]:
    """Gathers x_TD and targets_T of the tokens of all tensor ranks."""
    if tensor_ranks() > 1:
        x_BLD, targets_BL = (jax.lax.all_gather(v, TENSOR, axis=1, tiled=True) for v in (x_BLD, targets_BL))
    return x_BLD.reshape(-1, x_BLD.shape[-1]), targets_BL.reshape(-1)


def _own_positions(score_BL: Array, length: int) -> Array:
    """Takes this rank's positions of whole sequences."""
    if tensor_ranks() == 1:
        return score_BL
    return jax.lax.dynamic_slice_in_dim(score_BL, jax.lax.axis_index(TENSOR) * length, length, axis=1)


def reduce_tensor(reduction: Callable[[Array, str], Array], value: Array) -> Array:
    """Reduces a value over the ranks of `tensor`, with psum or pmax."""
    return reduction(value, TENSOR) if tensor_ranks() > 1 else value


@jax.custom_vjp
def _cross_entropy(x_TD: Array, w_vD: Array, targets_T: Array) -> Array:
    return _sum_cross_entropy(x_TD, w_vD, targets_T, gradients=False)[0]


def _cross_entropy_fwd(x_TD: Array, w_vD: Array, targets_T: Array) -> tuple[Array, Any]:
    return _sum_cross_entropy(x_TD, w_vD, targets_T, gradients=True)


def _cross_entropy_bwd(gradients: tuple[Array, Array], d_sum: Array) -> tuple[Array, Array, None]:
    dx_TD, dw_vD = gradients
    return (dx_TD * d_sum).astype(dx_TD.dtype), (dw_vD * d_sum).astype(dx_TD.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _logits(x_CD: Array, targets_C: Array, w_vD: Array) -> tuple[Array, Array, Array, Array]:
    """This rank's float32 logits_Cv, the targets' own logits_C and rows target_CD (0 where another rank has them), and
    the targets' places (v where another rank has them)."""
    v, product = w_vD.shape[0], functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits_Cv = product("CD,VD->CV", x_CD, w_vD)
    row_C, here_C = own_rows(targets_C, v) if tensor_ranks() > 1 else (targets_C, targets_C != NO_TARGET)
    target_CD, place_C = jnp.where(here_C[:, None], w_vD[row_C], 0), jnp.where(here_C, row_C, v)
    return logits_Cv, product("CD,CD->C", x_CD, target_CD), target_CD, place_C


def _sum_cross_entropy(x_TD: Array, w_vD: Array, targets_T: Array, gradients: bool) -> tuple[Array, Any]:
    """Sum of -log softmax(x wᵀ)[target], and its gradients in x and w; each `tensor` rank has a part of them."""
    chunks, ranks = num_chunks(x_TD.shape[0], w_vD.shape[0]), tensor_ranks()
    # XLA:CPU multiplies three times as fast if the result's longer side is the last one.
    longer_last = platform() == "cpu"

    def body(carry: tuple[Array, Any], xs: tuple[Array, Array]) -> tuple[tuple[Array, Any], Any]:
        total, dw = carry
        x_CD, targets_C = xs
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits_Cv, target_C, target_CD, place_C = _logits(x_CD, targets_C, w_vD)
        # softmax(logits) = p / z. Neither the division nor the -1 at the target is spent on C × v entries.
        largest_C1 = reduce_tensor(jax.lax.pmax, logits_Cv.max(-1, keepdims=True))
        p_Cv = jnp.exp(logits_Cv - largest_C1)
        z_C1 = reduce_tensor(jax.lax.psum, p_Cv.sum(-1, keepdims=True))
        counts_C1 = (targets_C != NO_TARGET)[:, None]
        total = total + jnp.sum(jnp.where(counts_C1, jnp.log(z_C1) + largest_C1, 0)) / ranks - target_C.sum()
        if not gradients:
            return (total, None), None
        p_Cv, of_one_C1 = p_Cv.astype(x_CD.dtype), jnp.where(counts_C1, z_C1, jnp.inf)
        dx_CD = product("CV,VD->CD", p_Cv, w_vD) / of_one_C1 - target_CD
        x_CD = (x_CD / of_one_C1).astype(x_CD.dtype)
        dw = dw + (product("CD,CV->DV", x_CD, p_Cv) if longer_last else product("CV,CD->VD", p_Cv, x_CD))
        return (total, dw), (dx_CD.astype(x_CD.dtype), place_C)

    def zeros(shape: tuple[int, ...]) -> Array:
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), AXES, to="varying")

    carry = (zeros(()), zeros(w_vD.shape[::-1] if longer_last else w_vD.shape) if gradients else None)
    split = (x_TD.reshape(chunks, -1, x_TD.shape[1]), targets_T.reshape(chunks, -1))
    (total, dw), found = jax.lax.scan(body, carry, split)
    if dw is None:
        return total, None
    dx_CTD, place_CT = found
    dw_vD = (dw.T if longer_last else dw).at[place_CT.reshape(-1)].add(-x_TD.astype(jnp.float32), mode="drop")
    return total, (dx_CTD.reshape(x_TD.shape), dw_vD)


def num_chunks(tokens: int, vocab: int) -> int:
    """How many equal chunks the tokens are computed in: the fewest with at most _CHUNK_ENTRIES logits each."""
    entries = _CHUNK_ENTRIES.get(platform(), _CHUNK_ENTRIES_ACCELERATOR)
    wanted = max(1, -(-tokens * vocab // entries))
    return next(n for n in range(wanted, tokens + 1) if tokens % n == 0) if wanted < tokens else tokens
