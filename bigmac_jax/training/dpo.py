"""Direct preference optimisation (DPO, arXiv 2305.18290): of two answers to a prompt, the chosen one becomes likelier
than the other, measured against a reference that stays.

B batch, L length; S sequences of a row: 2p is the chosen answer of pair p with its prompt, 2p + 1 the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.data.batch import NO_TARGET, Batch
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import batch_spec
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.training.loss import LossTerms, Share, add_router_losses, mean_of_targets, token_nll


class PairMetrics(NamedTuple):
    """Metrics of preference pairs, means over a step."""

    accuracy: Array  # share of the pairs whose chosen answer has the larger reward
    margin: Array  # by how much it is larger: rewards are beta · log(p / p of the reference)


def count_pairs(batch: Batch) -> Array:
    """The number of preference pairs in a batch."""
    return jnp.sum((batch.segments_BL.max(1) + 1) // 2)


def dpo_loss(model: Transformer, batch: Batch, dropout_key: Array | None, share: Share) -> tuple[Array, LossTerms]:
    """Mean over pairs of -log sigmoid(beta · ((log p - log p_ref of the chosen) - (the same of the other))), plus the
    router's losses.

    Args:
      batch: with reference_BL, -log p_ref of each target.
    """
    config = model.config
    nll_BL, stats = token_nll(model, batch, dropout_key, share)
    counts_BL = batch.targets_BL != NO_TARGET
    gain_BL = jnp.where(counts_BL, batch.reference_BL - jax.sharding.reshard(nll_BL, batch_spec(2)), 0)
    rows = sum_pairs(config, gain_BL, batch.segments_BL)
    count = count_pairs(batch) if share.targets is None else share.targets
    loss_U, *metrics = (mean_of_targets(of_rows, count) for of_rows in rows)
    return add_router_losses(config.model, share, LossTerms(loss_U, loss_U, stats, pairs_U=PairMetrics(*metrics)))


def sum_pairs(config: Config, gain_BL: Array, segments_BL: Array) -> tuple[Array, Array, Array]:
    """Sums over the pairs of each row, [B] each: the loss, in how many the chosen answer wins, and the margins.

    Args:
      gain_BL: each token's log-probability less the reference model's.
      segments_BL: each token's answer: 2p is the chosen one of pair p, 2p + 1 the rejected one, negative is none.
    """

    def on_rank(gain_BL: Array, segments_BL: Array) -> tuple[Array, Array, Array]:
        B, L = gain_BL.shape
        S = L + L % 2
        row_B1 = jnp.arange(B).reshape(B, 1)
        place_BL = jnp.where(segments_BL < 0, S, segments_BL)  # of no sequence: nowhere
        gain_BS = jnp.zeros_like(gain_BL, shape=(B, S)).at[row_B1, place_BL].add(gain_BL, mode="drop")
        margin_BP = config.tuning.dpo_beta * (gain_BS[:, 0::2] - gain_BS[:, 1::2])
        there_BP = jnp.arange(S // 2).reshape(1, -1) < ((segments_BL.max(1) + 1) // 2).reshape(B, 1)
        loss_BP, right_BP = -jax.nn.log_sigmoid(margin_BP), (margin_BP > 0).astype(margin_BP.dtype)
        return tuple(jnp.where(there_BP, v_BP, 0).sum(1) for v_BP in (loss_BP, right_BP, margin_BP))  # type: ignore[return-value]

    segments_BL = jax.sharding.reshard(segments_BL, batch_spec(2))
    specs = (batch_spec(1),) * 3
    return on_each_rank(on_rank, (gain_BL, segments_BL), in_spec=batch_spec, out_specs=specs)
