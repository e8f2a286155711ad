"""The experts of one rank: a grouped two-layer MLP over blocks of rows. It does not know where the rows came from.

n blocks of b rows, e local experts, R row width, F expert hidden.
"""

import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig
from bigmac_jax.model.layers import activate


def grouped_mlp(config: ModelConfig, weights: dict[str, Array], rows_nbR: Array, expert_n: Array | None) -> Array:
    """E_i(x') = σ(x' W_i↑) W_i↓ for each block's expert i (paper, equation 4).

    Args:
      weights: w_in_eRF, w_out_eFR, and where the config has them w_gate_eRF, b_in_eF, b_gate_eF, b_out_eR.
      expert_n: the expert of each block; None if block i belongs to expert i.

    Returns:
      rows_nbR. Rows of an empty slot hold the biases' image of zero; nothing gathers them.
    """
    w = {name: value.astype(rows_nbR.dtype) for name, value in weights.items()}
    if expert_n is not None:
        w = {name: value[expert_n] for name, value in w.items()}

    def affine(x_nbX: Array, w_nXY: Array, b_nY: Array | None) -> Array:
        y_nbY = jnp.einsum("nbX,nXY->nbY", x_nbX, w_nXY)
        return y_nbY if b_nY is None else y_nbY + b_nY[:, None]

    hidden_nbF = affine(rows_nbR, w["w_in_eRF"], w.get("b_in_eF"))
    gate_nbF = affine(rows_nbR, w["w_gate_eRF"], w.get("b_gate_eF")) if config.gated else None
    return affine(activate(config, hidden_nbF, gate_nbF), w["w_out_eFR"], w.get("b_out_eR"))
