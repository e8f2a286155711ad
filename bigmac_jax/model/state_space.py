"""The functions of a Mamba-2 mixer (arXiv 2405.21060), on one rank: convolution, state space and gated norm.

B batch, L length, F features, K taps of a convolution, N = G · M heads in G groups of M, P head size, S size of the
state. The sequence goes in chunks, C of them, of Q positions, which as those that are looked back at are J.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.mesh import platform

# Log of a decay below which it is nothing in float32. Decays are differences of sums of logs, which a large one would
# leave inexact.
_LEAST_LOG = -88.0


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, whose backward pass keeps the arrays alone.

    As `jax.checkpoint`, but that gives way to the policy of one around it, as there is around each layer.
    """
    made = jax.custom_vjp(function)

    def backward(arrays: Any, dy: Any) -> Any:
        return jax.vjp(function, *jax.lax.optimization_barrier(arrays))[1](dy)

    made.defvjp(lambda *arrays: (function(*arrays), arrays), backward)
    return made


@recomputed
@jax.named_scope("convolution")
def convolve(x_BLF: Array, past_BKF: Array, w_KF: Array, bias_F: Array | None, position_BL: Array | None) -> Array:
    """SiLU of a causal depthwise convolution, computed in float32.

    Args:
      past_BKF: the K - 1 inputs before the first.
      w_KF: the last tap meets the input itself.
      position_BL: within the document, before which no tap reaches; None: all is one, with its past.
    """
    K, L = w_KF.shape[0], x_BLF.shape[1]
    padded_BLF = jnp.concatenate([past_BKF.astype(x_BLF.dtype), x_BLF], axis=1)
    y_BLF = jnp.zeros(x_BLF.shape, jnp.float32)
    for k in range(K):
        tap_BLF = padded_BLF[:, k : k + L].astype(jnp.float32) * w_KF[k].astype(jnp.float32)[None, None]
        if position_BL is not None:
            tap_BLF = jnp.where(position_BL[:, :, None] >= K - 1 - k, tap_BLF, 0)
        y_BLF += tap_BLF
    if bias_F is not None:
        y_BLF += bias_F.astype(jnp.float32)[None, None]
    return jax.nn.silu(y_BLF).astype(x_BLF.dtype)


def last_inputs(x_BLF: Array, past_BKF: Array, count_B: Array) -> Array:
    """The `past_BKF` of what follows the first `count_B` inputs of each row."""
    padded_BLF = jnp.concatenate([past_BKF.astype(x_BLF.dtype), x_BLF], axis=1)
    place_BK = count_B[:, None] + jnp.arange(past_BKF.shape[1], dtype=count_B.dtype)[None]
    return jnp.take_along_axis(padded_BLF, place_BK[:, :, None], axis=1)


@jax.named_scope("time_step")
def time_step(time_BLN: Array, bias_N: Array, least: float, most: float, count_B: Array | None) -> Array:
    """softplus(time + bias) in float32, held between `least` and `most`; 0 past a row's first `count_B` tokens
    (None: all are), where the state then stays what it is."""
    dt_BLN = jnp.clip(jax.nn.softplus(time_BLN.astype(jnp.float32) + bias_N[None, None]), least, most)
    if count_B is None:
        return dt_BLN
    real_BL = jnp.arange(dt_BLN.shape[1], dtype=count_B.dtype)[None] < count_B[:, None]
    return jnp.where(real_BL[:, :, None], dt_BLN, 0)


@jax.named_scope("gated_norm")
def gated_norm(eps: float, y_BLI: Array, x_BLI: Array, gate_BLI: Array, skip_N: Array, scale_GI: Array) -> Array:
    """RMSNorm of (y + skip · x) · SiLU(gate) by group, computed in float32.

    Args:
      skip_N: a number a head.
      scale_GI: by group.
    """
    skip_I = jnp.repeat(skip_N, y_BLI.shape[-1] // skip_N.shape[0])
    y_BLI, x_BLI, silu_BLI = (v.astype(jnp.float32) for v in (y_BLI, x_BLI, gate_BLI))
    y_BLI = (y_BLI + skip_I[None, None] * x_BLI) * jax.nn.silu(silu_BLI)
    # Group by group: on TPU [B, L, G, I / G] is another layout, to which all of y would be copied.
    groups = jnp.split(y_BLI, scale_GI.shape[0], axis=-1)
    normed = [
        (y_BLI * jax.lax.rsqrt(jnp.square(y_BLI).mean(-1, keepdims=True) + eps) * scale_I[None, None])
        for y_BLI, scale_I in zip(groups, scale_GI, strict=True)
    ]
    return jnp.concatenate(normed, axis=-1).astype(gate_BLI.dtype)


class Steps(NamedTuple):
    """What a state space does at each position: h = exp(log) h + dt · x ⊗ b, and y = h · c.

    Heads and groups stand beside each other in x, b and c, as they come from projections: apart they are another layout
    on TPU, which only a chunk at a time is copied to.
    """

    x_BLI: Array  # I = N · P
    dt_BLN: Array  # float32, at least 0
    log_BLN: Array  # float32, at most 0
    b_BLF: Array  # F = G · S
    c_BLF: Array


def scan_states(steps: Steps, state_BNPS: Array, chunk: int, position_BL: Array | None) -> tuple[Array, Array]:
    """Runs a state space over whole sequences, by chunks as matrix products (state-space duality).

    Decays and states are float32; products take their inputs in the dtype of x, and sum in float32.

    Args:
      state_BNPS: float32, before the first position.
      chunk: positions of a chunk, at most L of them; the last one may be shorter.
      position_BL: within the document: where it is 0 nothing is left of the state. None: all is one.

    Returns:
      (y_BLI in the dtype of x, the state behind the last position)
    """
    return _scan(min(chunk, steps.x_BLI.shape[1]), steps, state_BNPS, position_BL)


class _Chunk(NamedTuple):
    x_BQI: Array
    dt_BGMQ: Array
    sum_BGMQ: Array  # of the logs of the decays, from the chunk's first position
    b_BQF: Array
    c_BQF: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(Q: int, steps: Steps, state_BNPS: Array, position_BL: Array | None) -> tuple[Array, Array]:
    """`scan_states` by chunks of Q. Its backward pass keeps the state before each; what is of Q × Q is made again."""

    def step(state_BGMPS: Array, given: Any) -> tuple[Array, Array]:
        y_BQI, state_BGMPS = _chunk(state_BGMPS, *given)
        return state_BGMPS, y_BQI

    state_BGMPS = _grouped(steps, state_BNPS)
    state_BGMPS, y_CBQI = jax.lax.scan(step, state_BGMPS, (_chunks(Q, state_BGMPS, steps), _begun(Q, position_BL)))
    return _joined(y_CBQI, steps), state_BGMPS.reshape(state_BNPS.shape)


def _scan_fwd(Q: int, steps: Steps, state_BNPS: Array, position_BL: Array | None) -> tuple[tuple[Array, Array], Any]:
    def step(state_BGMPS: Array, given: Any) -> tuple[Array, tuple[Array, Array]]:
        y_BQI, next_BGMPS = _chunk(state_BGMPS, *given)
        return next_BGMPS, (y_BQI, state_BGMPS)

    state_BGMPS = _grouped(steps, state_BNPS)
    chunks = _chunks(Q, state_BGMPS, steps)
    state_BGMPS, (y_CBQI, states_CBGMPS) = jax.lax.scan(step, state_BGMPS, (chunks, _begun(Q, position_BL)))
    return (_joined(y_CBQI, steps), state_BGMPS.reshape(state_BNPS.shape)), (steps, position_BL, states_CBGMPS)


def _scan_bwd(Q: int, saved: Any, gradients: tuple[Array, Array]) -> tuple[Steps, Array, None]:
    def step(d_state_BGMPS: Array, given: Any) -> tuple[Array, _Chunk]:
        state_BGMPS, chunk, begun_BQ, dy_BQI = given
        _, pull = jax.vjp(lambda state_BGMPS, chunk: _chunk(state_BGMPS, chunk, begun_BQ), state_BGMPS, chunk)
        return pull((dy_BQI, d_state_BGMPS))

    (dy_BLI, d_state_BNPS), (steps, position_BL, states_CBGMPS) = gradients, saved
    chunks, pull = jax.vjp(partial(_chunks, Q, states_CBGMPS[0]), steps)
    given = states_CBGMPS, chunks, _begun(Q, position_BL), _chunked(Q, dy_BLI)
    d_state_BGMPS, d_chunks = jax.lax.scan(step, _grouped(steps, d_state_BNPS), given, reverse=True)
    return *pull(d_chunks), d_state_BGMPS.reshape(d_state_BNPS.shape), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _chunked(Q: int, v_BL: Array) -> Array:
    """[B, L, …] to [C, B, Q, …]; positions behind the last have zeros: they do nothing."""
    B, L = v_BL.shape[:2]
    v_BL = jnp.pad(v_BL, [(0, 0), (0, -L % Q), *[(0, 0)] * (v_BL.ndim - 2)])
    return v_BL.reshape(B, -1, Q, *v_BL.shape[2:]).swapaxes(0, 1)


def _joined(y_CBQI: Array, steps: Steps) -> Array:
    """The way back, to the shape of x."""
    B, L, _ = steps.x_BLI.shape
    return y_CBQI.swapaxes(0, 1).reshape(B, -1, y_CBQI.shape[-1])[:, :L]


def _grouped(steps: Steps, state_BNPS: Array) -> Array:
    B, _, P, S = state_BNPS.shape
    return state_BNPS.reshape(B, steps.b_BLF.shape[-1] // S, -1, P, S)


def _chunks(Q: int, state_BGMPS: Array, steps: Steps) -> _Chunk:
    """All chunks: each array with C before its other dimensions."""
    B, G, M = state_BGMPS.shape[:3]
    x_CBQI, dt_CBQN, log_CBQN, b_CBQF, c_CBQF = (_chunked(Q, v_BL) for v_BL in steps)
    dt_CBGMQ, log_CBGMQ = (v.reshape(-1, B, Q, G, M).transpose(0, 1, 3, 4, 2) for v in (dt_CBQN, log_CBQN))
    return _Chunk(x_CBQI, dt_CBGMQ, jnp.cumsum(jnp.maximum(log_CBGMQ, _LEAST_LOG), axis=-1), b_CBQF, c_CBQF)


def _begun(Q: int, position_BL: Array | None) -> Array | None:
    """Number of documents that begin in a position's chunk up to it."""
    return None if position_BL is None else jnp.cumsum(_chunked(Q, (position_BL == 0).astype(jnp.int32)), axis=-1)


@jax.named_scope("state_space")
def _chunk(state_BGMPS: Array, chunk: _Chunk, begun_BQ: Array | None) -> tuple[Array, Array]:
    """One chunk → (y_BQI, the state behind it). No exponent is above 0.

    Args:
      begun_BQ: documents that begin in the chunk up to each position.
    """
    x_BQI, dt_BGMQ, sum_BGMQ, b_BQF, c_BQF = chunk
    B, G, M, P, S = state_BGMPS.shape
    Q, dtype = x_BQI.shape[1], x_BQI.dtype
    x_BQGMP, b_BQGS, c_BQGS = x_BQI.reshape(B, Q, G, M, P), b_BQF.reshape(B, Q, G, S), c_BQF.reshape(B, Q, G, S)
    before_BQJ = jnp.tri(Q, k=-1, dtype=bool)[None]
    enters_BGMQ, leaves_BGMQ = jnp.exp(sum_BGMQ), jnp.exp(sum_BGMQ[..., -1:] - sum_BGMQ)
    stays_BGM = enters_BGMQ[..., -1]
    if begun_BQ is not None:
        before_BQJ = before_BQJ & (begun_BQ[:, :, None] == begun_BQ[:, None, :])
        first_BQ, last_BQ = begun_BQ == 0, begun_BQ == begun_BQ[:, -1:]
        enters_BGMQ = jnp.where(first_BQ[:, None, None], enters_BGMQ, 0)
        leaves_BGMQ = jnp.where(last_BQ[:, None, None], leaves_BGMQ, 0)
        stays_BGM = jnp.where(first_BQ[:, -1:, None], stays_BGM, 0)
    decay_BGMQJ = sum_BGMQ[..., :, None] - sum_BGMQ[..., None, :]
    # Of a position itself it is 1, with no gradient: large ones would have to cancel.
    itself_QJ = jnp.where(jnp.eye(Q, dtype=bool), 0, -jnp.inf)
    decay_BGMQJ = jnp.exp(jnp.where(before_BQJ[:, None, None], decay_BGMQJ, itself_QJ[None, None, None]))
    scores_BGQJ = _product("BQGS,BJGS->BGQJ", c_BQGS, b_BQGS)
    mixed_BGMQJ = (scores_BGQJ[:, :, None] * decay_BGMQJ).astype(dtype)
    added_BQGMP = x_BQGMP * _by_position(dt_BGMQ)  # in float32
    y_BQGMP = _product("BGMQJ,BJGMP->BQGMP", mixed_BGMQJ, added_BQGMP.astype(dtype))
    y_BQGMP += _product("BQGS,BGMPS->BQGMP", c_BQGS, state_BGMPS.astype(dtype)) * _by_position(enters_BGMQ)
    left_BQGMP = (added_BQGMP * _by_position(leaves_BGMQ)).astype(dtype)
    state_BGMPS = stays_BGM[..., None, None] * state_BGMPS + _product("BQGS,BQGMP->BGMPS", b_BQGS, left_BQGMP)
    return y_BQGMP.astype(dtype).reshape(x_BQI.shape), state_BGMPS


def _by_position(v_BGMQ: Array) -> Array:
    """[B, G, M, Q] to [B, Q, G, M, 1]."""
    return v_BGMQ.transpose(0, 3, 1, 2)[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum that sums in float32, as do its gradients; these, too, take inputs in the dtype of a and b."""
    if platform() == "cpu":  # which multiplies no 16-bit numbers to 32-bit sums
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _product_bwd(equation: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    a, b = saved
    inputs, output = equation.split("->")
    of_a, of_b = inputs.split(",")
    dy = dy.astype(a.dtype)
    da, db = _product(f"{output},{of_b}->{of_a}", dy, b), _product(f"{of_a},{output}->{of_b}", a, dy)
    return da.astype(a.dtype), db.astype(b.dtype)


_product.defvjp(lambda equation, a, b: (_product(equation, a, b), (a, b)), _product_bwd)
