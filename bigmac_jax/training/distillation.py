"""Distillation: the loss of a model that learns another one's predictions and the outputs of its layers.

    loss = (1 - λ) CE(text) + λ KL(teacher ‖ student) + μ mean of |x - x'|² / |x'|²  (+ the router's losses)

λ is tuning.teacher_weight, μ tuning.hidden_weight, x' the teacher's residual stream behind the same layer; the mean is
over layers with experts (of a dense model, all), of models of one width. The teacher is frozen, reads the same windows,
drops no token, and is computed beside the student, layer by layer. Of a batch in parts the last term is the mean over
the parts (Hinton et al. 2015, arXiv 1503.02531; hidden states as in Jiao et al.
2020, "TinyBERT").

B batch, L length, T tokens on this rank, C of a chunk, D hidden, V vocabulary, v of it on a rank, Y layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.data.batch import NO_TARGET, Batch
from bigmac_jax.model.attention import find_documents
from bigmac_jax.model.gathering import Weight, on_each_rank
from bigmac_jax.model.mesh import AXES, per_replica, rank_spec, tensor_ranks, token_spec
from bigmac_jax.model.transformer import Transformer, through_layers
from bigmac_jax.training.loss import (
    LossTerms,
    Share,
    add_router_losses,
    gather_tensor_tokens,
    linear_cross_entropy,
    mean_of_targets,
    num_chunks,
    reduce_tensor,
)


class Gaps(NamedTuple):
    """How far the student is from its teacher."""

    divergence: Array  # KL(teacher ‖ student), nats a target
    hidden_Y: Array | None  # |x - x'|² / |x'|² of each layer with experts; None of models of two widths


def distilled_loss(
    model: Transformer,
    teacher: Transformer,
    batch: Batch,
    dropout_key: Array | None,
    share: Share,
) -> tuple[Array, LossTerms]:
    """The loss of distillation; arguments and result as of `loss.loss_fn`. No gradient goes to the teacher."""
    tuning = model.config.tuning
    x_BLD, teacher_BLD, hidden_Y, stats = _side_by_side(model, teacher, batch, dropout_key, share)
    ce_U = linear_cross_entropy(x_BLD, model.unembedding(), batch.targets_BL, share.targets)
    tables = model.unembedding(), teacher.unembedding()
    kl_U = divergence(x_BLD, teacher_BLD, *tables, batch.targets_BL, share.targets)
    loss_U = (1 - tuning.teacher_weight) * ce_U + tuning.teacher_weight * kl_U
    if hidden_Y is not None:
        loss_U += tuning.hidden_weight * hidden_Y.mean()
    return add_router_losses(model.config.model, share, LossTerms(loss_U, ce_U, stats, gaps=Gaps(kl_U, hidden_Y)))


def _side_by_side(
    model: Transformer, teacher: Transformer, batch: Batch, dropout_key: Array | None, share: Share
) -> tuple[Array, Array, Array | None, Any]:
    """Computes features of both models, gaps between their layers, and the student's statistics."""
    one_width = model.config.model.hidden_size == teacher.config.model.hidden_size
    documents = None if batch.segments_BL is None else find_documents(batch.segments_BL)
    padding = share.padding(batch)
    position_BL = None if documents is None else documents.position_BL
    real_BL1 = (batch.targets_BL != NO_TARGET)[..., None]

    def step(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], Any]:
        x_BLD, t_BLD = carry
        (layer, of_teacher), key = xs
        x_BLD, stats = layer(x_BLD, key, False, documents, padding, share.choices)
        t_BLD, _ = of_teacher(t_BLD, None, True, documents, padding)
        t_BLD = jax.lax.stop_gradient(t_BLD)
        if not one_width:
            return (x_BLD, t_BLD), (stats, None)
        ours, theirs = (v.astype(jnp.float32) for v in (x_BLD, t_BLD))
        squares = [per_replica(jnp.square(v) * real_BL1).sum((1, 2, 3)) for v in (ours - theirs, theirs)]
        return (x_BLD, t_BLD), (stats, squares)

    x_BLD, keys_Y = model.embedded(batch.inputs_BL, position_BL, dropout_key)
    carry = x_BLD, jax.lax.stop_gradient(teacher.embed(batch.inputs_BL, position_BL))
    stacks = list(zip(model.stacks(), teacher.stacks(), strict=True))
    (x_BLD, t_BLD), (stats, squares) = through_layers(model.config, step, carry, stacks, keys_Y)
    hidden_Y = None
    if squares is not None:
        gaps_Y, sizes_Y = (squares_YU.sum(1) for squares_YU in squares)
        hidden_Y = gaps_Y / jnp.maximum(sizes_Y, 1e-20)
    return model.final_norm(x_BLD), jax.lax.stop_gradient(teacher.final_norm(t_BLD)), hidden_Y, stats


@jax.named_scope("loss")
def divergence(
    x_BLD: Array, teacher_BLD: Array, w_VD: Weight, teacher_VD: Weight, targets_BL: Array, targets: Array | None = None
) -> Array:
    """Mean KL(teacher ‖ student) over the targets that are not NO_TARGET, nats, [U]. Logits are held chunk by chunk,
    and computed again in the backward pass."""

    def on_rank(x_BLD: Array, teacher_BLD: Array, targets_BL: Array, w_vD: Array, teacher_vD: Array) -> Array:
        x_TD, targets_T = gather_tensor_tokens(x_BLD, targets_BL)
        t_TD, _ = gather_tensor_tokens(teacher_BLD, targets_BL)
        chunks = num_chunks(len(targets_T), 2 * w_vD.shape[0])

        @jax.checkpoint
        def body(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
            x_CD, t_CD, targets_C = xs
            log_p_Cv, log_q_Cv = _log_softmax(x_CD, w_vD), _log_softmax(t_CD, teacher_vD)
            kl_C = reduce_tensor(jax.lax.psum, (jnp.exp(log_q_Cv) * (log_q_Cv - log_p_Cv)).sum(-1))
            return total + jnp.where(targets_C != NO_TARGET, kl_C, 0).sum() / tensor_ranks(), None

        zero = jax.lax.pcast(jnp.zeros(()), AXES, to="varying")
        parts = tuple(v.reshape(chunks, -1, *v.shape[1:]) for v in (x_TD, t_TD, targets_T))
        return jax.lax.scan(body, zero, parts)[0][None]

    targets = jnp.sum(targets_BL != NO_TARGET) if targets is None else targets
    targets_BL = jax.sharding.reshard(targets_BL, token_spec(2))
    frozen = teacher_VD._replace(value=jax.lax.stop_gradient(teacher_VD.value))
    sums = on_each_rank(on_rank, (x_BLD, teacher_BLD, targets_BL), (w_VD, frozen), out_specs=rank_spec(1))
    return mean_of_targets(sums, targets)


def _log_softmax(x_CD: Array, w_vD: Array) -> Array:
    """Log-softmax over the whole vocabulary, for this rank's part of it; float32."""
    logits_Cv = jnp.einsum("CD,VD->CV", x_CD, w_vD, preferred_element_type=jnp.float32)
    largest_C1 = reduce_tensor(jax.lax.pmax, jax.lax.stop_gradient(logits_Cv).max(-1, keepdims=True))
    shifted_Cv = logits_Cv - largest_C1
    return shifted_Cv - jnp.log(reduce_tensor(jax.lax.psum, jnp.exp(shifted_Cv).sum(-1, keepdims=True)))
