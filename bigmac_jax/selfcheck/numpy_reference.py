"""The values that checks compare with: float64 in NumPy on the host, gradients by hand, no code of the model.

B batch, L queries, M keys, N heads, G key-value heads, H head size, T tokens, K choices of each, D hidden, R row width,
F expert hidden; the experts' activation is relu².
"""

import math
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def attention(q_BLNH: np.ndarray, k_BMGH: np.ndarray, v_BMGH: np.ndarray, dy_BLNH: np.ndarray) -> Arrays:
    """Causal attention: y, and the gradients of y · dy with respect to q, k and v."""
    q, k, v, dy = (x.astype(np.float64) for x in (q_BLNH, k_BMGH, v_BMGH, dy_BLNH))
    B, M, G, H = k.shape
    sharing, scale = q.shape[2] // G, 1 / math.sqrt(H)
    k_BMNH, v_BMNH = (np.repeat(x, sharing, axis=2) for x in (k, v))
    scores_BNLM = scale * np.einsum("BLNH,BMNH->BNLM", q, k_BMNH)
    p_BNLM = _softmax(np.where(np.tri(M, dtype=bool), scores_BNLM, -np.inf))
    dp_BNLM = np.einsum("BLNH,BMNH->BNLM", dy, v_BMNH)
    ds_BNLM = scale * p_BNLM * (dp_BNLM - (dp_BNLM * p_BNLM).sum(-1, keepdims=True))

    def of_group(d_BMNH: np.ndarray) -> np.ndarray:
        return d_BMNH.reshape(B, M, G, sharing, H).sum(3)

    return {
        "y": np.einsum("BNLM,BMNH->BLNH", p_BNLM, v_BMNH),
        "dq": np.einsum("BNLM,BMNH->BLNH", ds_BNLM, k_BMNH),
        "dk": of_group(np.einsum("BNLM,BLNH->BMNH", ds_BNLM, q)),
        "dv": of_group(np.einsum("BNLM,BLNH->BMNH", p_BNLM, dy)),
    }


def experts(
    weights: Mapping[str, np.ndarray], x_TR: np.ndarray, gate_TK: np.ndarray, expert_TK: np.ndarray, dy_TR: np.ndarray
) -> Arrays:
    """y_t = Σ_k g_tk E(x_t) of the expert of each choice; and the gradients of y · dy.

    Args:
      weights: w_in_eRF, w_out_eFR and, if there are biases, b_in_eF, b_out_eR.
      expert_TK: a number that is no expert's: the choice is somebody else's.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x, gate, dy = (v.astype(np.float64) for v in (x_TR, gate_TK, dy_TR))
    y, dx, d_gate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    dw = {name: np.zeros_like(value) for name, value in w.items()}
    for i in range(w["w_in_eRF"].shape[0]):
        t, k = np.nonzero(expert_TK == i)
        w_in, w_out = w["w_in_eRF"][i], w["w_out_eFR"][i]
        h_tF = np.maximum(x[t] @ w_in + (w["b_in_eF"][i] if "b_in_eF" in w else 0), 0)
        out_tR = h_tF**2 @ w_out + (w["b_out_eR"][i] if "b_out_eR" in w else 0)
        np.add.at(y, t, gate[t, k][:, None] * out_tR)
        d_gate[t, k] = (dy[t] * out_tR).sum(-1)
        d_out = gate[t, k][:, None] * dy[t]
        dh = d_out @ w_out.T * 2 * h_tF
        np.add.at(dx, t, dh @ w_in.T)
        dw["w_in_eRF"][i], dw["w_out_eFR"][i] = x[t].T @ dh, (h_tF**2).T @ d_out
        if "b_in_eF" in w:
            dw["b_in_eF"][i], dw["b_out_eR"][i] = dh.sum(0), d_out.sum(0)
    return {"y": y, "dx": dx, "d_gate": d_gate} | {f"d_{name}": value for name, value in dw.items()}


def margin(router_DE: np.ndarray, x_TD: np.ndarray, choices: int) -> np.ndarray:
    """The lead of each token's last choice over the first expert that it did not choose, in logits [T]."""
    logits_TE = np.sort(x_TD.astype(np.float64) @ router_DE.astype(np.float64), axis=-1)
    return logits_TE[:, -choices] - logits_TE[:, -choices - 1]


def moe(weights: Mapping[str, np.ndarray], x_TD: np.ndarray, dy_TD: np.ndarray, choices: int) -> Arrays:
    """The bigmac layer: top-k of a softmax whose chosen gates are divided by their sum; y and dx of y · dy.

    Args:
      weights: router_DE, down_DR, up_RD, w_in_eRF, w_out_eFR.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x, dy = x_TD.astype(np.float64), dy_TD.astype(np.float64)
    logits_TE = x @ w["router_DE"]
    expert_TK = np.argsort(-logits_TE, axis=-1)[:, :choices]
    gate_TK = _softmax(np.take_along_axis(logits_TE, expert_TK, -1))
    rows = experts(
        {name: w[name] for name in ("w_in_eRF", "w_out_eFR")}, x @ w["down_DR"], gate_TK, expert_TK, dy @ w["up_RD"].T
    )
    d_gate = rows["d_gate"]
    d_logits_TE = np.zeros_like(logits_TE)
    through_gates_TK = gate_TK * (d_gate - (gate_TK * d_gate).sum(-1, keepdims=True))
    np.put_along_axis(d_logits_TE, expert_TK, through_gates_TK, -1)
    return {"y": rows["y"] @ w["up_RD"], "dx": rows["dx"] @ w["down_DR"].T + d_logits_TE @ w["router_DE"].T}


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
