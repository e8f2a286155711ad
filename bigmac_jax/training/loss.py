"""The training loss, and the scores of evaluation.

B batch, L length, T tokens on this rank, C of a chunk, D hidden, V vocabulary, v of it on a rank, Y layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.layers import divisor
from bigmac_jax.model.mesh import (
    AXES,
    TENSOR,
    Weight,
    batch_spec,
    on_each_rank,
    platform,
    rank_spec,
    tensor_ranks,
    token_spec,
)
from bigmac_jax.model.moe import Aux
from bigmac_jax.model.router import Padding
from bigmac_jax.model.transformer import Transformer, own_rows

# Logits held at once by `linear_cross_entropy`, in entries: on CPU a chunk that stays in the last-level cache.
_CHUNK_ENTRIES = {"cpu": 2**22}
_CHUNK_ENTRIES_ACCELERATOR = 2**27


class LossParts(NamedTuple):
    """What the loss is made of; means over the tokens of the batch."""

    cross_entropy: Array  # nats; the loss of preferences, where these are learned
    aux: Aux
    preferences: Any = None  # `preferences.Preferences`
    gaps: Any = None  # `distillation.Gaps` of a run with a teacher


class Share(NamedTuple):
    """What a part of a step's batch is told of the whole. Counts are the step's over its parts, by which sums are
    divided, so that the mean over the parts is the mean over the step; by default all is this batch's own."""

    targets: Array | None = None  # of DPO pairs
    tokens: Array | None = None  # but padding
    load_YE: Array | None = None  # for the balance loss

    def padding(self, batch: Batch) -> Padding | None:
        """What of a batch belongs to no document."""
        return None if batch.segments_BL is None else Padding.of(batch.segments_BL == PADDING, self.tokens)


WHOLE = Share()  # a batch that is no part of another


def loss_fn(
    model: Transformer, batch: Batch, dropout_key: Array | None = None, share: Share = WHOLE
) -> tuple[Array, LossParts]:
    """Cross-entropy of the targets, plus the router's losses, summed over layers."""
    config = model.config.model
    x_BLD, aux = _features(model, batch, dropout_key, share)
    ce = linear_cross_entropy(x_BLD, model.unembedding(), batch.targets_BL, share.targets)
    return with_router_losses(config, ce, aux), LossParts(ce, aux)


def _features(model: Transformer, batch: Batch, dropout_key: Array | None, share: Share) -> tuple[Array, Aux]:
    return model.features(
        batch.inputs_BL,
        batch.segments_BL,
        dropout_key=dropout_key,
        load_YE=share.load_YE,
        padding=share.padding(batch),
    )


def with_router_losses(config: ModelConfig, loss: Array, aux: Aux) -> Array:
    """`loss` plus the router's, summed over layers."""
    if not config.is_moe:
        return loss
    loss = loss + config.z_loss_coefficient * aux.z_loss.sum()
    if config.balance == "aux_loss":
        loss = loss + config.balance_coefficient * aux.balance_loss.sum()
    return loss


class TokenScores(NamedTuple):
    """What evaluation finds: of each position, and of the routers over all tokens but padding's."""

    nll_BL: Array  # -log p(target), nats, float32
    likeliest_BL: Array  # whether no token has a larger logit; of equals the first counts
    load_YE: Array  # share of the choices that went to each expert
    entropy_Y: Array  # of the router's scores, mean over tokens, nats
    tokens: Array  # how many that are


@jax.named_scope("loss")
def linear_cross_entropy(x_BLD: Array, w_VD: Weight, targets_BL: Array, targets: Array | None = None) -> Array:
    """Mean cross-entropy of the logits x wᵀ over the targets that are not NO_TARGET, nats, without ever holding them
    all. `targets`: how many the mean is of, if not as many as these.

    Each rank walks over chunks of its tokens and computes a chunk's gradients while its logits are still in cache: the
    loss is a sum, so they are known up to a factor. Against whole logits, forward and backward take about a fifth less
    time on CPU (docs/performance.md), and chunk × V instead of T × V memory.

    Where `tensor` splits the table, each of its ranks takes the tokens of all, and computes what its v rows give.
    """

    def on_rank(x_BLD: Array, targets_BL: Array, w_vD: Array) -> Array:
        x_TD, targets_T = of_tensor_ranks(x_BLD, targets_BL)
        return _summed(x_TD, w_vD, targets_T)[None]

    targets = jnp.sum(targets_BL != NO_TARGET) if targets is None else targets
    targets_BL = jax.sharding.reshard(targets_BL, token_spec(2))
    x_BLD, value = _table_first(x_BLD, w_VD.value)
    weights = (w_VD._replace(value=value),)
    return on_each_rank(on_rank, (x_BLD, targets_BL), weights, out_specs=rank_spec(1)).sum() / divisor(targets)


@jax.custom_vjp
def _table_first(x_BLD: Array, w_VD: Array) -> tuple[Array, Array]:
    """Both as they are. The table's gradient goes back to its shards before the layers' gradients are computed, which
    would otherwise find it whole in memory all along."""
    return x_BLD, w_VD


_table_first.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def token_scores(model: Transformer, batch: Batch) -> TokenScores:
    """Scores the targets, dropless; logits are never held whole. Of NO_TARGET it is any number.

    Padding is what belongs to no document; of rows that are no documents, what stands behind the last target.
    """

    def on_rank(x_BLD: Array, targets_BL: Array, w_vD: Array) -> tuple[Array, Array]:
        x_TD, targets_T = of_tensor_ranks(x_BLD, targets_BL)

        def body(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            logits_Cv, target_C = _chunk(*xs, w_vD)[:2]
            largest_C1 = over_tensor(jax.lax.pmax, logits_Cv.max(-1, keepdims=True))
            z_C = over_tensor(jax.lax.psum, jnp.exp(logits_Cv - largest_C1).sum(-1))
            first_C = jnp.argmax(logits_Cv, axis=-1)
            if tensor_ranks() > 1:
                mine_C = jnp.take_along_axis(logits_Cv, first_C[:, None], axis=-1)[:, 0] == largest_C1[:, 0]
                first_C = first_C + jax.lax.axis_index(TENSOR) * w_vD.shape[0]
                first_C = jax.lax.pmin(jnp.where(mine_C, first_C, jnp.iinfo(jnp.int32).max), TENSOR)
            return None, (jnp.log(z_C) + largest_C1[:, 0] - over_tensor(jax.lax.psum, target_C), first_C == xs[1])

        chunks = chunks_of(x_TD.shape[0], w_vD.shape[0])
        xs = x_TD.reshape(chunks, -1, x_TD.shape[1]), targets_T.reshape(chunks, -1)
        scores = jax.lax.scan(body, None, xs)[1]
        nll_BL, likeliest_BL = (_own_part(v.reshape(x_BLD.shape[0], -1), targets_BL.shape[1]) for v in scores)
        return nll_BL, likeliest_BL

    padding = WHOLE.padding(batch)
    if padding is None:
        padding = Padding.of(_behind_targets(batch.targets_BL))
    x_BLD, aux = model.features(batch.inputs_BL, batch.segments_BL, padding=padding, evaluating=True)
    targets_BL = jax.sharding.reshard(batch.targets_BL, token_spec(2))
    specs = token_spec(2), token_spec(2)
    nll_BL, likeliest_BL = on_each_rank(on_rank, (x_BLD, targets_BL), (model.unembedding(),), out_specs=specs)
    return TokenScores(nll_BL, likeliest_BL, aux.load, aux.router_entropy, padding.tokens)


def _behind_targets(targets_BL: Array) -> Array:
    """Which positions have no target at or behind them."""

    def behind(targets_BL: Array) -> Array:
        return jax.lax.cummax(targets_BL, axis=1, reverse=True) == NO_TARGET

    targets_BL = jax.sharding.reshard(targets_BL, batch_spec(2))
    return on_each_rank(behind, (targets_BL,), in_spec=batch_spec, out_specs=batch_spec(2))


def token_nll(
    model: Transformer, batch: Batch, dropout_key: Array | None = None, share: Share = WHOLE
) -> tuple[Array, Aux]:
    """-log p of each target as training computes it, nats, and the layers' aux; to be differentiated. Of NO_TARGET it
    is any number. A chunk's logits are computed again for the backward pass."""

    def on_rank(x_BLD: Array, targets_BL: Array, w_vD: Array) -> Array:
        x_TD, targets_T = of_tensor_ranks(x_BLD, targets_BL)

        @jax.checkpoint
        def body(_: None, xs: tuple[Array, Array]) -> tuple[None, Array]:
            logits_Cv, target_C = _chunk(*xs, w_vD)[:2]
            largest_C1 = over_tensor(jax.lax.pmax, jax.lax.stop_gradient(logits_Cv.max(-1, keepdims=True)))
            z_C = over_tensor(jax.lax.psum, jnp.exp(logits_Cv - largest_C1).sum(-1))
            return None, jnp.log(z_C) + largest_C1[:, 0] - over_tensor(jax.lax.psum, target_C)

        chunks = chunks_of(x_TD.shape[0], w_vD.shape[0])
        xs = x_TD.reshape(chunks, -1, x_TD.shape[1]), targets_T.reshape(chunks, -1)
        nll_T = jax.lax.scan(body, None, xs)[1]
        return _own_part(nll_T.reshape(x_BLD.shape[0], -1), targets_BL.shape[1])

    x_BLD, aux = _features(model, batch, dropout_key, share)
    targets_BL = jax.sharding.reshard(batch.targets_BL, token_spec(2))
    return on_each_rank(on_rank, (x_BLD, targets_BL), (model.unembedding(),), out_specs=token_spec(2)), aux


def of_tensor_ranks(x_BLD: Array, targets_BL: Array) -> tuple[Array, Array]:
    """x_TD and targets_T of all tensor ranks' tokens."""
    if tensor_ranks() > 1:
        x_BLD, targets_BL = (jax.lax.all_gather(v, TENSOR, axis=1, tiled=True) for v in (x_BLD, targets_BL))
    return x_BLD.reshape(-1, x_BLD.shape[-1]), targets_BL.reshape(-1)


def _own_part(score_BL: Array, length: int) -> Array:
    """This rank's positions of whole sequences."""
    if tensor_ranks() == 1:
        return score_BL
    return jax.lax.dynamic_slice_in_dim(score_BL, jax.lax.axis_index(TENSOR) * length, length, axis=1)


def over_tensor(reduction: Callable[[Array, str], Array], value: Array) -> Array:
    return reduction(value, TENSOR) if tensor_ranks() > 1 else value


@jax.custom_vjp
def _summed(x_TD: Array, w_vD: Array, targets_T: Array) -> Array:
    return _walk(x_TD, w_vD, targets_T, gradients=False)[0]


def _summed_fwd(x_TD: Array, w_vD: Array, targets_T: Array) -> tuple[Array, Any]:
    return _walk(x_TD, w_vD, targets_T, gradients=True)


def _summed_bwd(gradients: tuple[Array, Array], d_sum: Array) -> tuple[Array, Array, None]:
    dx_TD, dw_vD = gradients
    return (dx_TD * d_sum).astype(dx_TD.dtype), (dw_vD * d_sum).astype(dx_TD.dtype), None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _chunk(x_CD: Array, targets_C: Array, w_vD: Array) -> tuple[Array, Array, Array, Array]:
    """float32 logits_Cv of this rank's rows; the target's, and its row (0 where this rank has none), target_CD; and
    the targets' places, v where this rank has none."""
    v, product = w_vD.shape[0], functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits_Cv = product("CD,VD->CV", x_CD, w_vD)
    row_C, here_C = own_rows(targets_C, v) if tensor_ranks() > 1 else (targets_C, targets_C != NO_TARGET)
    target_CD, place_C = jnp.where(here_C[:, None], w_vD[row_C], 0), jnp.where(here_C, row_C, v)
    return logits_Cv, product("CD,CD->C", x_CD, target_CD), target_CD, place_C


def _walk(x_TD: Array, w_vD: Array, targets_T: Array, gradients: bool) -> tuple[Array, Any]:
    """Sum of -log softmax(x wᵀ)[target], and its gradients in x and w; of `tensor` ranks each has a part of them."""
    chunks, ranks = chunks_of(x_TD.shape[0], w_vD.shape[0]), tensor_ranks()
    # XLA:CPU multiplies three times as fast if the result's longer side is the last one.
    longer_last = platform() == "cpu"

    def body(carry: tuple[Array, Any], xs: tuple[Array, Array]) -> tuple[tuple[Array, Any], Any]:
        total, dw = carry
        x_CD, targets_C = xs
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits_Cv, target_C, target_CD, place_C = _chunk(x_CD, targets_C, w_vD)
        # softmax(logits) = p / z. Neither the division nor the -1 at the target is spent on C × v entries.
        largest_C1 = over_tensor(jax.lax.pmax, logits_Cv.max(-1, keepdims=True))
        p_Cv = jnp.exp(logits_Cv - largest_C1)
        z_C1 = over_tensor(jax.lax.psum, p_Cv.sum(-1, keepdims=True))
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


def chunks_of(tokens: int, vocab: int) -> int:
    """The fewest equal chunks of at most _CHUNK_ENTRIES logits."""
    entries = _CHUNK_ENTRIES.get(platform(), _CHUNK_ENTRIES_ACCELERATOR)
    wanted = max(1, -(-tokens * vocab // entries))
    return next(n for n in range(wanted, tokens + 1) if tokens % n == 0) if wanted < tokens else tokens
