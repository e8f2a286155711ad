"""The Mamba-2 mixer (arXiv 2405.21060).

B batch, L length, D hidden, N heads of P numbers, I = N · P, G groups of B and C, S size of the state, K taps of the
convolution, F outputs of a projection.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model.attention import Documents, Rows
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.layers import Linear, residual_scale, split_outputs
from bigmac_jax.model.mesh import TENSOR, batch_ranks, batch_spec, split_spec
from bigmac_jax.model.parameters import Declaration, parameter, weight
from bigmac_jax.model.state_space import (
    Steps,
    convolve,
    gated_norm,
    last_inputs,
    recomputed,
    scan_states,
    time_step,
)

_LARGEST_RATE = 16.0  # exp(a_log) starts between 1 and this
_FIRST_STEPS = 1e-3, 0.1  # between which Δt starts
_LEAST_FIRST_STEP = 1e-4


class Projected(NamedTuple):
    """What the projections make of tokens."""

    gate_BLI: Array
    inner_BLI: Array
    b_BLF: Array  # F = G · S
    c_BLF: Array
    time_BLN: Array


class Weights(NamedTuple):
    """The parameters between the projections, of a rank; or the `gathering.Weight` of each."""

    conv_inner_KF: Array
    conv_b_KF: Array
    conv_c_KF: Array
    conv_inner_bias_F: Array | None
    conv_b_bias_F: Array | None
    conv_c_bias_F: Array | None
    a_log_N: Array
    skip_N: Array
    time_bias_N: Array
    scale_D: Array


class Past(NamedTuple):
    """What a layer keeps of the tokens before: the last K - 1 inputs of each convolution, and the heads' states."""

    inner_BKF: Array
    b_BKF: Array
    c_BKF: Array
    states_BNPS: Array  # float32


class GatedNorm(nnx.Module):
    """The scale of `state_space.gated_norm`."""

    def __init__(self, config: Config, size: int):
        one = Declaration("D", "mamba", 1, True, (TENSOR,), decays=False, small=True, exact=True)
        self.scale_D = parameter(config, None, (size,), one)


class Mamba(nnx.Module):
    """A state space whose step and matrices each token chooses, behind a short convolution; heads and groups are split
    over `tensor`."""

    def __init__(self, config: Config, key: Array):
        self.config = config
        m = config.model
        D, I, F, N, K = m.hidden_size, m.mamba_width, m.mamba_groups * m.mamba_state, m.mamba_head_count, m.mamba_conv  # noqa: E741
        keys = jax.random.split(key, 11)
        linear = functools.partial(Linear, config, part="mamba", bias=m.mamba_bias)
        self.gate = linear(keys[0], D, I, split="outputs")
        self.inner = linear(keys[1], D, I, split="outputs")
        self.b = linear(keys[2], D, F, split="outputs")
        self.c = linear(keys[3], D, F, split="outputs")
        self.time = linear(keys[4], D, N, split="outputs")
        self.out = linear(keys[5], I, D, scale=residual_scale(config), split="inputs")

        # Taps are a vector for each feature, and no matrix between features.
        taps = Declaration(
            "KF", "mamba", 1 / math.sqrt(K), axes=(None, TENSOR), decays=False, small=True, draw=_uniform
        )
        self.conv_inner_KF = parameter(config, keys[6], (K, I), taps)
        self.conv_b_KF, self.conv_c_KF = (parameter(config, key, (K, F), taps) for key in keys[7:9])
        zero = Declaration("F", "mamba", 0, True, (TENSOR,), decays=False, small=True)
        self.conv_inner_bias_F = parameter(config, None, (I,), zero) if m.mamba_conv_bias else None
        self.conv_b_bias_F = parameter(config, None, (F,), zero) if m.mamba_conv_bias else None
        self.conv_c_bias_F = parameter(config, None, (F,), zero) if m.mamba_conv_bias else None

        of_head = functools.partial(Declaration, "N", "mamba", axes=(TENSOR,), decays=False, small=True, exact=True)
        self.a_log_N = parameter(config, keys[9], (N,), of_head(value=1, draw=_rates))
        self.skip_N = parameter(config, None, (N,), of_head(value=1, constant=True))
        self.time_bias_N = parameter(config, keys[10], (N,), of_head(value=1, draw=_first_steps))
        self.norm = GatedNorm(config, I)

    def __call__(self, x_BLD: Array, documents: Documents | None = None) -> Array:
        """Mixes whole sequences, from their first position; of each rank's own tokens."""
        projected = self.project(x_BLD)
        positions = () if documents is None else (documents.position_BL,)

        def on_rank(*arrays: Any) -> Array:
            projected, (*positions, weights) = Projected(*arrays[:5]), arrays[5:]
            return mix(self.config, projected, weights, position_BL=positions[0] if positions else None)[0]

        y_BLI = on_each_rank(
            on_rank,
            (*projected, *positions),
            [self._weights()],
            in_spec=(*[split_spec(3)] * len(projected), *[batch_spec(2)] * len(positions)),
            out_specs=split_spec(3),
        )
        return self.out(y_BLI)

    def step(self, projected: Projected, past: Past, rows: Rows) -> tuple[Array, Past]:
        """Mixes the next tokens of sequences.

        Args:
          projected: of the rows of each shard side by side (`project`).
          past: of each slot, [S, B, …]. A row at position 0 begins without one.

        Returns:
          (y_STD, the past with the tokens of the rows)
        """
        given = [v for v in rows[1:] if v is not None]

        def on_rank(*arrays: Any) -> tuple[Array, tuple[Array, ...]]:
            projected, past, of_rows, weights = Projected(*arrays[:5]), Past(*arrays[5:9]), arrays[9:-1], arrays[-1]
            step = _step_row_by_row if rows.slot_SW is not None else _step_slots
            return step(self.config, projected, past, weights, *(v[0] for v in of_rows))

        y_STI, past = on_each_rank(
            on_rank,
            (*projected, *past, *given),
            [self._weights()],
            in_spec=(*[split_spec(3)] * len(projected), *_past_specs(), *[batch_spec(2)] * len(given)),
            out_specs=(split_spec(3), _past_specs()),
        )
        return self.out(y_STI), Past(*past)

    def project(self, x_BLD: Array) -> Projected:
        """Projects each rank's own tokens → whole sequences, F split."""
        return Projected(*split_outputs(x_BLD, self.gate, self.inner, self.b, self.c, self.time))

    def _weights(self) -> Weights:
        own: Any = [*(getattr(self, name) for name in Weights._fields[:-1]), self.norm.scale_D]
        own = [v if v is None else weight(self.config, v) for v in own]
        return Weights(*own)


def first_past(config: Config, weights: Weights, rows: int) -> Past:
    """The past of `rows` sequences that begin, on one rank, as wide as its weights."""
    m = config.model

    def tail(w_KF: Array) -> Array:
        return jnp.zeros((rows, m.mamba_conv - 1, w_KF.shape[1]), config.execution.dtype)

    states_BNPS = jnp.zeros((rows, weights.a_log_N.shape[0], m.mamba_head_dim, m.mamba_state), jnp.float32)
    return Past(tail(weights.conv_inner_KF), tail(weights.conv_b_KF), tail(weights.conv_c_KF), states_BNPS)


def mix(
    config: Config,
    projected: Projected,
    weights: Weights,
    past: Past | None = None,
    count_B: Array | None = None,
    position_BL: Array | None = None,
) -> tuple[Array, Past]:
    """What stands between a Mamba layer's projections, on one rank.

    Args:
      past: of the tokens before; None: there are none.
      count_B: int32; how many of a row's L tokens there are. What stands behind them changes no past, and what comes
        out there means nothing. None: all.
      position_BL: within the document, of sequences of several; None: all is one.

    Returns:
      (y_BLI, the past of the next tokens, its convolutions' only if there is a `count_B`)
    """
    m = config.model
    if past is None:
        past = _first_past_like(config, weights, projected.inner_BLI)
    inputs, tails = (projected.inner_BLI, projected.b_BLF, projected.c_BLF), list(past[:3])
    x_BLI, b_BLF, c_BLF = (
        convolve(*given, position_BL) for given in zip(inputs, tails, weights[:3], weights[3:6], strict=True)
    )
    if count_B is not None:  # a step of 0 would not do: what an idle slot computes may be NaN
        real_BL = jnp.arange(x_BLI.shape[1], dtype=count_B.dtype)[None] < count_B[:, None]
        x_BLI, b_BLF, c_BLF = (jnp.where(real_BL[:, :, None], v, 0) for v in (x_BLI, b_BLF, c_BLF))
    least, most = m.mamba_least_step, m.mamba_most_step
    dt_BLN = time_step(projected.time_BLN, weights.time_bias_N, least, most, count_B)
    log_BLN = -jnp.exp(weights.a_log_N)[None, None] * dt_BLN
    steps = Steps(x_BLI, dt_BLN, log_BLN, b_BLF, c_BLF)
    y_BLI, states_BNPS = scan_states(steps, past.states_BNPS, config.execution.mamba_chunk, position_BL)
    norm = recomputed(functools.partial(gated_norm, m.norm_eps))
    scale_GI = weights.scale_D.reshape(b_BLF.shape[-1] // m.mamba_state, -1)
    y_BLI = norm(y_BLI, x_BLI, projected.gate_BLI, weights.skip_N, scale_GI)
    if count_B is not None:
        tails = [last_inputs(x_BLF, tail_BKF, count_B) for x_BLF, tail_BKF in zip(inputs, tails, strict=True)]
    inner_BKF, b_BKF, c_BKF = tails
    return y_BLI, Past(inner_BKF, b_BKF, c_BKF, states_BNPS)


def _first_past_like(config: Config, weights: Weights, x_BLI: Array) -> Past:
    """`first_past` of as many rows as x has, said to differ from rank to rank as x does."""
    past, axes = first_past(config, weights, len(x_BLI)), tuple(jax.typeof(x_BLI).mat.varying)
    return jax.tree.map(lambda v: jax.lax.pcast(v, axes, to="varying") if axes else v, past)


def make_past(config: Config, slots: int, layers: int) -> Past:
    """The past of so many slots on each batch shard before their first token, for some layers [Y, S, B, …]."""
    m, dtype = config.model, config.execution.dtype
    F = m.mamba_groups * m.mamba_state
    tails = [(m.mamba_conv - 1, width) for width in (m.mamba_width, F, F)]
    shapes = [*tails, (m.mamba_head_count, m.mamba_head_dim, m.mamba_state)]
    leading = layers, batch_ranks(), slots
    arrays = (
        jnp.zeros((*leading, *shape), of, out_sharding=P(None, *spec))
        for shape, of, spec in zip(shapes, (*[dtype] * 3, jnp.float32), _past_specs(), strict=True)
    )
    return Past(*arrays)


def _past_specs() -> tuple[P, P, P, P]:
    """Of each slot's past [S, B, …]: each batch shard its own slots, features and heads over `tensor`."""
    tail = P(*batch_spec(3), TENSOR)
    return tail, tail, tail, P(*batch_spec(2), TENSOR, None, None)


def _step_slots(
    config: Config, projected: Projected, past: Past, weights: Weights, _: Array, count_W: Array
) -> tuple[Array, tuple[Array, ...]]:
    """`Mamba.step` on one rank, whose S is 1, where row w has slot w. None begins: its prompt has been read."""
    rows = Projected(*(v.reshape(len(count_W), -1, v.shape[-1]) for v in projected))
    y_WCI, after = mix(config, rows, weights, Past(*(v[0] for v in past)), count_W)
    return y_WCI.reshape(1, -1, y_WCI.shape[-1]), tuple(v[None] for v in after)


def _step_row_by_row(
    config: Config,
    projected: Projected,
    past: Past,
    weights: Weights,
    position_W: Array,
    count_W: Array,
    slot_W: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """`Mamba.step` on one rank, whose S is 1, where a row may go on where the one before it ends."""

    def step(past: Past, row: Any) -> tuple[Past, Array]:
        tokens, position, count, slot = row
        before = jax.tree.map(lambda v_B: jnp.where(position == 0, 0, v_B[slot])[None], past)
        y_1CI, after = mix(config, Projected(*(v[None] for v in tokens)), weights, before, count[None])
        # The slot of a row of nothing is out of range, and dropped.
        return jax.tree.map(lambda v_B, v_1: v_B.at[slot].set(v_1[0], mode="drop"), past, after), y_1CI[0]

    rows = Projected(*(v.reshape(len(count_W), -1, v.shape[-1]) for v in projected))
    after, y_WCI = jax.lax.scan(step, Past(*(v[0] for v in past)), (rows, position_W, count_W, slot_W))
    return y_WCI.reshape(1, -1, y_WCI.shape[-1]), tuple(v[None] for v in after)


def token_products(m: ModelConfig, chunk: int) -> dict[str, int]:
    """Multiply-adds of a token in the matrix products of a Mamba layer's forward pass, of 6 FLOPs in a training step.

    Args:
      chunk: execution.mamba_chunk; half of a chunk's products with itself are masked, and counted.
    """
    D, I, F, S = m.hidden_size, m.mamba_width, m.mamba_groups * m.mamba_state, m.mamba_state  # noqa: E741
    return {
        "projections": D * (3 * I + 2 * F + m.mamba_head_count),
        "chunks": chunk * (F + I),  # C Bᵀ by group, and with the decays times x
        "states": 2 * S * I,  # made, and read
    }


def _uniform(key: Array, shape: tuple[int, ...], out_sharding: P) -> Array:
    return jax.random.uniform(key, shape, minval=-1, maxval=1, out_sharding=out_sharding)


def _rates(key: Array, shape: tuple[int, ...], out_sharding: P) -> Array:
    """Logs of the rates at which states decay."""
    return jnp.log(jax.random.uniform(key, shape, minval=1, maxval=_LARGEST_RATE, out_sharding=out_sharding))


def _first_steps(key: Array, shape: tuple[int, ...], out_sharding: P) -> Array:
    """Biases whose softplus is log-uniform."""
    least, most = map(math.log, _FIRST_STEPS)
    log = jax.random.uniform(key, shape, minval=least, maxval=most, out_sharding=out_sharding)
    step = jnp.maximum(jnp.exp(log), _LEAST_FIRST_STEP)
    return step + jnp.log(-jnp.expm1(-step))
