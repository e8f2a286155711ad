"""The training loss. B batch, L length, T tokens on this rank, D hidden, V vocabulary, Y layers, E experts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.mesh import AXES, on_each_rank, platform, rank_spec, token_spec
from bigmac_jax.model.moe import Aux
from bigmac_jax.model.transformer import Transformer

# Logits held at once by `linear_cross_entropy`, in entries: on CPU a chunk that stays in the last-level cache.
_CHUNK_ENTRIES = {"cpu": 2**22}
_CHUNK_ENTRIES_ACCELERATOR = 2**27


class LossParts(NamedTuple):
    """What the loss is made of; means over the tokens of the batch."""

    cross_entropy: Array  # nats
    aux: Aux


def loss_fn(
    model: Transformer, tokens_BL: Array, dropout_key: Array | None = None, load_YE: Array | None = None
) -> tuple[Array, LossParts]:
    """Cross-entropy of tokens 1 … L given those before, plus the router's losses, summed over layers.

    Args:
      tokens_BL: [B, L + 1].
      load_YE: loads of the whole step for the balance loss, if this batch is a part of it.
    """
    config = model.config
    x_BLD, aux = model.features(tokens_BL[:, :-1], dropout_key=dropout_key, load_YE=load_YE)
    ce = linear_cross_entropy(x_BLD, model.unembedding().astype(x_BLD.dtype), tokens_BL[:, 1:])
    loss = ce + config.z_loss_coefficient * aux.z_loss.sum()
    if config.balance == "aux_loss":
        loss = loss + config.balance_coefficient * aux.balance_loss.sum()
    return loss, LossParts(ce, aux)


def cross_entropy(logits_BLV: Array, targets_BL: Array) -> Array:
    """-log p(target) of every position, nats → [B, L] float32."""
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL


def linear_cross_entropy(x_BLD: Array, w_VD: Array, targets_BL: Array) -> Array:
    """Mean cross-entropy of the logits x wᵀ, nats, without ever holding them all.

    Each rank walks over chunks of its tokens and computes a chunk's gradients while its logits are still in cache: the
    loss is a sum, so they are known up to a factor. Against whole logits, forward and backward take about a fifth less
    time on CPU (docs/performance.md), and chunk × V instead of T × V memory.
    """

    def on_rank(x_BLD: Array, targets_BL: Array, w_VD: Array) -> Array:
        return _summed(x_BLD.reshape(-1, x_BLD.shape[-1]), w_VD, targets_BL.reshape(-1))[None]

    targets_BL = jax.sharding.reshard(targets_BL, token_spec(2))
    return on_each_rank(on_rank, (x_BLD, targets_BL), (w_VD,), out_specs=rank_spec(1)).sum() / targets_BL.size


@jax.custom_vjp
def _summed(x_TD: Array, w_VD: Array, targets_T: Array) -> Array:
    return _walk(x_TD, w_VD, targets_T, gradients=False)[0]


def _summed_fwd(x_TD: Array, w_VD: Array, targets_T: Array) -> tuple[Array, Any]:
    return _walk(x_TD, w_VD, targets_T, gradients=True)


def _summed_bwd(gradients: tuple[Array, Array], d_sum: Array) -> tuple[Array, Array, None]:
    dx_TD, dw_VD = gradients
    return (dx_TD * d_sum).astype(dx_TD.dtype), (dw_VD * d_sum).astype(dx_TD.dtype), None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _walk(x_TD: Array, w_VD: Array, targets_T: Array, gradients: bool) -> tuple[Array, Any]:
    """Sum of -log softmax(x wᵀ)[target], and its gradients in x and w."""
    chunks = _chunks(x_TD.shape[0], w_VD.shape[0])

    def body(carry: tuple[Array, Any], xs: tuple[Array, Array]) -> tuple[tuple[Array, Any], Any]:
        total, dw_VD = carry
        x_CD, targets_C = xs
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits_CV = product("CD,VD->CV", x_CD, w_VD)
        # softmax(logits) = p / z. Neither the division nor the -1 at the target is spent on C × V entries.
        largest_C1 = logits_CV.max(-1, keepdims=True)
        p_CV = jnp.exp(logits_CV - largest_C1)
        z_C1 = p_CV.sum(-1, keepdims=True)
        target_CD = w_VD[targets_C]
        target_C = product("CD,CD->C", x_CD, target_CD)
        total = total + jnp.sum(jnp.log(z_C1) + largest_C1) - target_C.sum()
        if not gradients:
            return (total, None), None
        p_CV = p_CV.astype(x_CD.dtype)
        dx_CD = product("CV,VD->CD", p_CV, w_VD) / z_C1 - target_CD
        dw_VD = dw_VD + product("CV,CD->VD", p_CV, (x_CD / z_C1).astype(x_CD.dtype))
        return (total, dw_VD), dx_CD.astype(x_CD.dtype)

    def zeros(shape: tuple[int, ...]) -> Array:
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), AXES, to="varying")

    carry = (zeros(()), zeros(w_VD.shape) if gradients else None)
    split = (x_TD.reshape(chunks, -1, x_TD.shape[1]), targets_T.reshape(chunks, -1))
    (total, dw_VD), dx_CTD = jax.lax.scan(body, carry, split)
    if dw_VD is None:
        return total, None
    return total, (dx_CTD.reshape(x_TD.shape), dw_VD.at[targets_T].add(-x_TD.astype(jnp.float32)))


def _chunks(tokens: int, vocab: int) -> int:
    """The fewest equal chunks of at most _CHUNK_ENTRIES logits."""
    entries = _CHUNK_ENTRIES.get(platform(), _CHUNK_ENTRIES_ACCELERATOR)
    wanted = max(1, -(-tokens * vocab // entries))
    return next(n for n in range(wanted, tokens + 1) if tokens % n == 0) if wanted < tokens else tokens
