"""Gives a trained fine_grained model a narrow exchange: fits W↓, W↑ and narrow experts to what its experts compute.

An expert of width F is E_i(x) = σ(x W_i) V_i. Its narrow one is σ(n(x W↓) W'_i) V'_i W↑, where n is the norm of
model.latent_norm, if there is one in front of the exchange. W↓ and W↑ are one for all experts of a layer.

    W↓   the R directions, of the experts' inputs as they are distributed, that matter most to what the experts' first
         matrices make of them: C^-½ U for C = E[x xᵀ] and U the first R eigenvectors of
         C^½ (Σ_i m_i W_i S_i² W_iᵀ) C^½, where m_i is the sum of gate² that expert i has, and S_i the lengths of the
         rows of V_i: a hidden unit matters as much as it sends on. So x W↓ is white.
    W'_i the least squares solution of x W_i ≈ n(x W↓) W'_i over the expert's own tokens, weighted by gate².
    W↑   Uᵀ, the first R principal directions of the layer's outputs y = Σ_i p_i E_i(x).
    V'_i V_i U, and what makes up, in least squares, for the hidden units being others now.

With R = D and no norm all of it is exact. The closest in print is the truncation-aware decomposition of one matrix
(Wang et al. 2024, "SVD-LLM", which has C^½); an exchange needs factors that all experts share.

T tokens, K choices, D hidden, R of the latent, F expert hidden, E experts; of an expert N tokens chose it. Float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.data.batch import Batch
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.parameters import declared_leaves
from bigmac_jax.model.transformer import Block, Transformer
from bigmac_jax.tuning.conversion.calibration import ExpertInputs, walk
from bigmac_jax.tuning.conversion.rebuild import rebuild_model, with_model

# Ridges, relative to the mean square. Directions in which a text has less are noise; where nothing is cut off, the fit
# is exact whatever they are.
_RIDGE = 1e-6
_OWN_RIDGE = 1e-2  # of an expert's own fit, of which the layer's is the prior: some experts see few tokens
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # those of `layers.activate`
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x.clip(-700))),
}
Leaves = dict[str, np.ndarray]  # of a layer's MoE, by the names that its parameters have in it


class LayerError(NamedTuple):
    """Relative squared errors of a layer's converted experts, |ŷ - y|² / |y|² over the text's tokens.

    Attributes:
      total: of the experts' output.
      inputs: of their hidden units before the activation, weighted as W↓ is chosen.
      outputs: of the output, by W↑ alone.
    """

    layer: int
    total: float
    inputs: float
    outputs: float


def narrowed(config: Config, ratio: float, latent_norm: str) -> Config:
    """The config of what `narrow` makes.

    Raises:
      ConfigError: another structure, one with a norm on its exchanged rows, or a ratio that doesn't fit.
    """
    m = config.model
    if m.structure != "fine_grained" or m.latent_norms:
        raise ConfigError(
            f"model.structure={m.structure} model.latent_norm={m.latent_norm} can't be given a narrow exchange, only "
            f"structure=fine_grained with latent_norm=none; train such a model"
        )
    return with_model(
        config,
        {"down_ratio": "--ratio", "latent_norm": "--latent_norm"},
        structure="bigmac",
        down_ratio=ratio,
        latent_norm=latent_norm,
        projection_init="random",  # fitted to what was trained, and so not held still
        expert_hidden_size=m.expert_width,
        shared_expert_hidden_size=m.shared_expert_hidden_size or (m.latent_size if m.num_shared_experts else 0),
        dense_hidden_size=m.mlp_width if m.mlp_layers else m.dense_hidden_size,
    )


def narrow(
    config: Config, model: Transformer, batches: Sequence[Batch], ratio: float, latent_norm: str = "none"
) -> tuple[Config, Transformer, list[LayerError]]:
    """Makes a fine_grained model bigmac: experts of the same number and width, and an exchange `ratio` times as wide.
    Errors as for `narrowed`.

    Args:
      model: fine_grained, of `config`, on the current mesh of one process.
      batches: a text, read as in evaluation.
      latent_norm: of the result. No fit can undo a norm behind the combine: the result then begins further away, but
        trains better (docs/quality.md).
    """
    target, m = narrowed(config, ratio, latent_norm), config.model
    layers: list[Leaves] = []
    errors: list[LayerError] = []

    def fit(number: int, layer: Block, seen: ExpertInputs) -> None:
        assert isinstance(layer.mlp, MoE)
        experts = {name: np.asarray(leaf, np.float64) for name, leaf in declared_leaves(layer.mlp.experts).items()}
        leaves, error = fit_layer(target.model, experts, seen)
        layers.append(leaves)
        errors.append(error._replace(layer=number))

    walk(model, batches, fit)
    given = {
        f"{stack.name}.mlp.{name}": np.stack([layers[number][name] for number in stack.experts])
        for stack in m.stacks
        for name in layers[0]
        if stack.experts
    }
    return target, rebuild_model(target, model, given), errors


def fit_layer(m: ModelConfig, experts: Leaves, seen: ExpertInputs) -> tuple[Leaves, LayerError]:
    """Fits a layer's narrow MoE → its parameters by name, and its error.

    Args:
      m: the config of the result.
      experts: the layer's parameters by name.
    """
    x_TD, R = seen.inputs_TD.astype(np.float64), m.latent_size
    first = [name for name in ("w_in_eRF", "w_gate_eRF") if name in experts]
    chosen = [np.nonzero(seen.experts_TK == e) for e in range(m.num_experts)]
    tokens = [t_N for t_N, _ in chosen]
    gates = [seen.gates_TK[of].astype(np.float64)[:, None] for of in chosen]

    # W↓, and x W↓.
    c_DD = _add_ridge(x_TD.T @ x_TD / len(x_TD), _RIDGE)
    root_DD, inverse_DD = _power(c_DD, 0.5), _power(c_DD, -0.5)
    square_DD = np.zeros_like(c_DD)
    for e, gate_N1 in enumerate(gates):
        length_F = np.linalg.norm(experts["w_out_eFR"][e], axis=1)
        for name in first:
            w_DF = experts[name][e] * length_F
            square_DD += np.square(gate_N1).sum() * (w_DF @ w_DF.T)
    kept_DR, of_inputs = _principal(root_DD @ square_DD @ root_DD, R)
    down_DR = inverse_DD @ kept_DR
    z_TR = _normalize(x_TD @ down_DR, m) if "pre_dispatch" in m.latent_norms else x_TD @ down_DR

    # The experts' first matrices: the layer's least squares solution, and each expert's step away from it.
    found = {name: value.copy() for name, value in experts.items()}
    for name in first:
        found[name] = np.zeros((m.num_experts, R, m.expert_width))
    all_RD = np.linalg.solve(_add_ridge(z_TR.T @ z_TR, _RIDGE), z_TR.T @ x_TD)
    y_TD = np.zeros_like(x_TD)
    hidden: list[tuple[np.ndarray, np.ndarray]] = []
    for e, (t_N, gate_N1) in enumerate(zip(tokens, gates, strict=True)):
        x_ND, z_NR = x_TD[t_N], z_TR[t_N]
        fit = _Fit(gate_N1 * z_NR)
        for name in first:
            all_RF = all_RD @ experts[name][e]
            found[name][e] = all_RF + fit.solve(gate_N1 * (x_ND @ experts[name][e] - z_NR @ all_RF))
        hidden.append((_hidden(m, experts, e, x_ND), _hidden(m, found, e, z_NR)))
        y_TD[t_N] += gate_N1 * _outputs(experts, e, hidden[e][0])

    # W↑, and the experts' second matrices.
    kept_DR, of_outputs = _principal(y_TD.T @ y_TD, R)
    found["w_out_eFR"] = experts["w_out_eFR"] @ kept_DR
    if "b_out_eR" in found:
        found["b_out_eR"] = experts["b_out_eR"] @ kept_DR
    y_TR = np.zeros_like(z_TR)
    for e, (t_N, gate_N1) in enumerate(zip(tokens, gates, strict=True)):
        before_NF, after_NF = hidden[e]
        change_NF = gate_N1 * (before_NF - after_NF)
        found["w_out_eFR"][e] += _Fit(gate_N1 * after_NF).solve(change_NF @ found["w_out_eFR"][e])
        y_TR[t_N] += gate_N1 * _outputs(found, e, after_NF)
    leaves = {f"experts.{name}": value for name, value in found.items()}
    leaves |= {"down.w_DF": down_DR, "up.w_DF": kept_DR.T}
    if "skip" in m.latent_norms:
        leaves["skip_1"] = np.zeros(1)  # as what is converted has none; a gate starts with zeros anyway
    if "post_combine" in m.latent_norms:
        n_TR = _normalize(y_TR, m)
        scale_R = (n_TR * y_TR).sum(0) / np.square(n_TR).sum(0)
        leaves["combine_norm.scale_D"], y_TR = scale_R, n_TR * scale_R
    total = np.square(y_TR @ kept_DR.T - y_TD).sum() / np.square(y_TD).sum()
    return leaves, LayerError(0, float(total), of_inputs, of_outputs)


class _Fit:
    """Ridge regression on a_NX: `solve(b_NY)` → w_XY with a w ≈ b."""

    def __init__(self, a_NX: np.ndarray):
        self._a_NX = a_NX
        self._square_XX = _add_ridge(a_NX.T @ a_NX, _OWN_RIDGE)

    def solve(self, b_NY: np.ndarray) -> np.ndarray:
        if not len(self._a_NX):  # an expert that no token chose
            return np.zeros((self._a_NX.shape[1], b_NY.shape[1]))
        return np.linalg.solve(self._square_XX, self._a_NX.T @ b_NY)


def _add_ridge(square_XX: np.ndarray, ridge: float) -> np.ndarray:
    return square_XX + ridge * np.trace(square_XX) / len(square_XX) * np.eye(len(square_XX))


def _power(square_XX: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive matrix."""
    values_X, vectors_XX = np.linalg.eigh(square_XX)
    return (vectors_XX * values_X**exponent) @ vectors_XX.T


def _principal(square_XX: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The eigenvectors of the largest eigenvalues, [X, count], and the others' share of all eigenvalues."""
    values_X, vectors_XX = np.linalg.eigh(square_XX)  # ascending
    lost = values_X[: len(values_X) - count].clip(0).sum() / values_X.clip(0).sum()
    return vectors_XX[:, ::-1][:, :count], float(lost)


def _hidden(m: ModelConfig, w: Leaves, e: int, x_NX: np.ndarray) -> np.ndarray:
    """An expert's hidden units, behind the activation."""
    hidden = [x_NX @ w["w_in_eRF"][e]]
    if m.gated:
        hidden.append(x_NX @ w["w_gate_eRF"][e])
    for h_NF, bias in zip(hidden, ("b_in_eF", "b_gate_eF"), strict=False):
        h_NF += w[bias][e] if bias in w else 0
    # On the host: XLA would compile for every number of tokens that an expert has.
    return _ACTIVATIONS[m.activation](hidden[-1]) * (hidden[0] if m.gated else 1)


def _outputs(w: Leaves, e: int, hidden_NF: np.ndarray) -> np.ndarray:
    """An expert's outputs."""
    y_NR = hidden_NF @ w["w_out_eFR"][e]
    return y_NR + w["b_out_eR"][e] if "b_out_eR" in w else y_NR


def _normalize(x_TR: np.ndarray, m: ModelConfig) -> np.ndarray:
    """`layers.normalize` of a scale of 1 and no bias."""
    x_TR = x_TR - x_TR.mean(-1, keepdims=True) if m.norm == "layernorm" else x_TR
    return x_TR / np.sqrt(np.square(x_TR).mean(-1, keepdims=True) + m.norm_eps)
