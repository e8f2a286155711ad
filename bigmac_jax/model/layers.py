"""The parts of a transformer that are not the MoE layer.

B batch, L length, M room of a cache, D hidden, N heads, G key-value heads, H head size, F MLP hidden.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.data.batch import PADDING
from bigmac_jax.mesh import (
    TENSOR,
    Weight,
    batch_spec,
    cache_spec,
    on_each_rank,
    platform,
    replicated_spec,
    split_spec,
    tensor_ranks,
    token_spec,
)
from bigmac_jax.model.attention_kernels import causal_attention
from bigmac_jax.model.parameters import Declaration, parameter, weight


def residual_scale(config: Config) -> float:
    """Factor on the initial std of the matrix that ends a residual branch (GPT-2); a layer has two branches."""
    return 1 / math.sqrt(2 * config.model.num_layers)


def activate(config: ModelConfig, x: Array, gate: Array | None = None) -> Array:
    """σ(x), or σ(gate)·x for gated experts and MLPs."""
    functions = {"relu2": lambda v: jnp.square(jax.nn.relu(v)), "gelu": jax.nn.gelu, "silu": jax.nn.silu}
    function = functions[config.activation]
    return function(x) if gate is None else function(gate) * x


def dropout(x_BLD: Array, rate: float, key: Array | None) -> Array:
    """Zeroes a share `rate` of the entries and scales the rest up; without a key it is the identity."""
    if key is None or rate == 0:
        return x_BLD
    keep = jax.random.bernoulli(key, 1 - rate, x_BLD.shape, out_sharding=token_spec(x_BLD.ndim))
    return jnp.where(keep, x_BLD / (1 - rate), 0)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm of the last dimension, computed in float32."""

    def __init__(self, config: Config, size: int, kind: str = ""):
        """`kind`: by default model.norm."""
        self.config = config
        one, zero = (Declaration("D", "norms", v, constant=True, decays=False, small=True, exact=True) for v in (1, 0))
        self.scale_D = parameter(config, None, (size,), one)
        layernorm = (kind or config.model.norm) == "layernorm"
        self.bias_D = parameter(config, None, (size,), zero) if layernorm else None

    def __call__(self, x: Array) -> Array:
        return normalised(self.config.model, x, *(v[...] for v in (self.scale_D, self.bias_D) if v is not None))

    def weights(self) -> list[Weight]:
        """The scale, and LayerNorm's bias."""
        return [weight(self.config, v) for v in (self.scale_D, self.bias_D) if v is not None]


def normalised(config: ModelConfig, x: Array, scale_D: Array, bias_D: Array | None = None) -> Array:
    """LayerNorm of the last dimension, without a bias RMSNorm; computed in float32."""
    y = x.astype(jnp.float32)
    if bias_D is not None:
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.norm_eps) * last_axes(scale_D, y)
    if bias_D is not None:
        y = y + last_axes(bias_D, y)
    return y.astype(x.dtype)


def last_axes(v: Array, like: Array) -> Array:
    """`v` with leading dimensions of size 1, ready to meet `like` under strict rank promotion."""
    return v.reshape((1,) * (like.ndim - v.ndim) + v.shape)


# Rows of one product in `tall_product`: XLA:CPU slows down on longer ones, whose columns leave the cache.
_TALL_ROWS = 1024


def tall_product(x_TX: Array, dy_TY: Array, precision: Any = None) -> Array:
    """xᵀ dy → [X, Y], the gradient of a weight.

    On CPU in slices of rows, with the longer side of the result last, which XLA:CPU multiplies faster.
    """
    if platform() != "cpu":
        return jnp.matmul(x_TX.T, dy_TY, precision=precision)
    if x_TX.shape[1] > dy_TY.shape[1]:
        return tall_product(dy_TY, x_TX, precision).T
    T = x_TX.shape[0]
    if T <= _TALL_ROWS or T % _TALL_ROWS:
        return jnp.matmul(x_TX.T, dy_TY, precision=precision)

    def add(i: Array, total: Array) -> Array:
        x, dy = (jax.lax.dynamic_slice_in_dim(v, i * _TALL_ROWS, _TALL_ROWS) for v in (x_TX, dy_TY))
        return total + jnp.matmul(x.T, dy, precision=precision)

    first = jnp.matmul(x_TX[:_TALL_ROWS].T, dy_TY[:_TALL_ROWS], precision=precision)
    return jax.lax.fori_loop(1, T // _TALL_ROWS, add, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_BLX: Array, w_XY: Array, precision: Any = None) -> Array:
    """x @ w on one rank, with `tall_product` for the weight's gradient."""
    return jnp.matmul(x_BLX, w_XY, precision=precision)


def _product_fwd(x_BLX: Array, w_XY: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return product(x_BLX, w_XY, precision), (x_BLX, w_XY)


def _product_bwd(precision: Any, saved: tuple[Array, Array], dy_BLY: Array) -> tuple[Array, Array]:
    x_BLX, w_XY = saved
    x_TX, dy_TY = (v.reshape(-1, v.shape[-1]) for v in (x_BLX, dy_BLY))
    return jnp.einsum("...Y,XY->...X", dy_BLY, w_XY, precision=precision), tall_product(x_TX, dy_TY, precision)


product.defvjp(_product_fwd, _product_bwd)


class Linear(nnx.Module):
    """x @ w (+ b), in the dtype of x.

    Args:
      part: of the model, for counts.
      split: "outputs" or "inputs" of the matrix over `tensor`, "" for neither.
      heads: of the outputs, if they are fewer than the ranks of `tensor`: each rank takes one of them.
    """

    def __init__(
        self,
        config: Config,
        key: Array,
        fan_in: int,
        fan_out: int,
        part: str,
        bias: bool,
        scale: float = 1.0,
        split: str = "",
        heads: int = 0,
    ):
        self.config, self.split, self.heads = config, split, heads
        outputs = TENSOR if split == "outputs" and not heads else None
        axes = (TENSOR, None) if split == "inputs" else (None, outputs)
        matrix = Declaration("DF", part, scale / math.sqrt(fan_in), axes=axes)
        self.w_DF = parameter(config, key, (fan_in, fan_out), matrix)
        zero = Declaration("F", part, 0, constant=True, axes=axes[1:], decays=False, small=True)
        self.b_F = parameter(config, None, (fan_out,), zero) if bias else None

    def __call__(self, x: Array) -> Array:
        """Of tokens, each rank its own; of a matrix split by inputs, of whole sequences whose inputs are split."""
        if self.split == "inputs":
            return on_each_rank(_of_split_inputs, (x,), self.weights(), in_spec=split_spec)
        return on_each_rank(affine, (x,), self.weights())

    def weights(self) -> list[Weight]:
        """The matrix, and the bias if there is one."""
        return [weight(self.config, v) for v in (self.w_DF, self.b_F) if v is not None]


def affine(x_BLX: Array, w_XY: Array, b_Y: Array | None = None) -> Array:
    """x @ w (+ b) on one rank."""
    y_BLY = product(x_BLX, w_XY)
    return y_BLY if b_Y is None else y_BLY + last_axes(b_Y, y_BLY)


def split_outputs(x_BLD: Array, *layers: Linear) -> list[Array]:
    """Tokens through layers that are split by outputs → whole sequences, F split. They are gathered once for all."""

    def on_rank(x_BLD: Array, *weights: Array) -> tuple[Array, ...]:
        if tensor_ranks() > 1:
            x_BLD = jax.lax.all_gather(x_BLD, TENSOR, axis=1, tiled=True)
        given = iter(weights)
        return tuple(affine(x_BLD, *(_own_head(layer, next(given)) for _ in layer.weights())) for layer in layers)

    weights = [w for layer in layers for w in layer.weights()]
    return on_each_rank(on_rank, (x_BLD,), weights, out_specs=(split_spec(3),) * len(layers))


def _own_head(layer: Linear, w: Array) -> Array:
    """Of weights [..., F] that are not split, because there are fewer heads than ranks: those of this rank's head."""
    if not layer.heads:
        return w
    width = w.shape[-1] // layer.heads
    head = jax.lax.axis_index(TENSOR) * layer.heads // tensor_ranks()
    return jax.lax.dynamic_slice_in_dim(w, head * width, width, axis=w.ndim - 1)


def _of_split_inputs(x_BLF: Array, w_FD: Array, b_D: Array | None = None) -> Array:
    """Whole sequences, F split → tokens: each rank sums what all have for its own."""
    y_BLD = product(x_BLF, w_FD)
    if tensor_ranks() > 1:
        y_BLD = jax.lax.psum_scatter(y_BLD, TENSOR, scatter_dimension=1, tiled=True)
    return y_BLD if b_D is None else y_BLD + last_axes(b_D, y_BLD)


class Documents(NamedTuple):
    """Of whole sequences whose tokens see their own document alone."""

    segment_BL: Array  # int32, one number a document
    position_BL: Array  # int32, within the document
    padding_BL: Array  # bool, of the tokens of each rank: of no document


def documents_of(segments_BL: Array) -> Documents:
    """Where documents begin and what belongs to none; segments as `data.batch.Batch` has them."""

    def positions(segments_BL: Array) -> Array:
        place_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32), segments_BL.shape)
        begins_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1]) != 0
        return place_BL - jax.lax.cummax(jnp.where(begins_BL, place_BL, 0), axis=1)

    segments_BL = jax.sharding.reshard(segments_BL, batch_spec(2))
    position_BL = on_each_rank(positions, (segments_BL,), in_spec=batch_spec, out_specs=batch_spec(2))
    return Documents(segments_BL, position_BL, jax.sharding.reshard(segments_BL == PADDING, token_spec(2)))


def rotate(x_BLNH: Array, theta: float, position_BL: Array | None = None) -> Array:
    """Rotary position embedding (RoFormer): pairs (i, i + H/2) turn by position · theta^(-2i/H).

    Args:
      position_BL: below L; by default 0 to L - 1.
    """
    if position_BL is None:
        angles = _angles(x_BLNH, theta, x_BLNH.shape[1])
        return _turn(x_BLNH, *(v_LH.reshape(1, v_LH.shape[0], 1, v_LH.shape[1]) for v_LH in angles))

    def on_rank(x_BLNH: Array, position_BL: Array) -> Array:
        angles = _angles(x_BLNH, theta, x_BLNH.shape[1])
        return _turn(x_BLNH, *(v_LH[position_BL][:, :, None] for v_LH in angles))

    specs = split_spec(4), batch_spec(2)
    return on_each_rank(on_rank, (x_BLNH, position_BL), in_spec=specs, out_specs=split_spec(4))


def rotate_to(x_BNH: Array, theta: float, position_B: Array, length: int) -> Array:
    """`rotate` of one position of each row, below `length`."""
    sin_LH, cos_LH = _angles(x_BNH, theta, length)
    return _turn(x_BNH, *(v[position_B][:, None] for v in (sin_LH, cos_LH)))


def _angles(x: Array, theta: float, length: int) -> tuple[Array, Array]:
    """Sines and cosines [L, H/2] of the angles, in the dtype of x [..., H]."""
    half = x.shape[-1] // 2
    # Constants on CPU, where XLA would compute a sine and a cosine for every entry of x, and again in the gradient.
    xp = np if platform() == "cpu" else jnp
    angle_LH = xp.outer(xp.arange(length), theta ** (-xp.arange(half) / half))
    return jnp.asarray(xp.sin(angle_LH), x.dtype), jnp.asarray(xp.cos(angle_LH), x.dtype)


@jax.custom_vjp
def _turn(x_BLNH: Array, sin: Array, cos: Array) -> Array:
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


# The gradient turns back.
_turn.defvjp(
    lambda x_BLNH, sin, cos: (_turn(x_BLNH, sin, cos), (sin, cos)),
    lambda angle, dy_BLNH: (_turn(dy_BLNH, -angle[0], angle[1]), None, None),
)


class KeyValues(NamedTuple):
    """Of the positions that a layer has seen: [B, L, G, H] where they come from, [Y, B, G, M, H] in a cache of Y."""

    keys: Array
    values: Array


class Attention(nnx.Module):
    """Causal attention with optional grouped key-value heads, query-key norm and rotary positions; heads are split over
    `tensor`. Of key-value heads that are fewer than its ranks, each rank takes the one that its query heads ask."""

    def __init__(self, config: Config, key: Array):
        self.config = config
        m = config.model
        D, N, G, H = m.hidden_size, m.num_heads, m.kv_heads, m.head_size
        keys = jax.random.split(key, 4)
        few = G if tensor_ranks() > G else 0
        part, bias = "attention", m.use_bias
        self.query = Linear(config, keys[0], D, N * H, part, bias, split="outputs")
        self.key = Linear(config, keys[1], D, G * H, part, bias, split="outputs", heads=few)
        self.value = Linear(config, keys[2], D, G * H, part, bias, split="outputs", heads=few)
        self.out = Linear(config, keys[3], N * H, D, part, bias, residual_scale(config), split="inputs")
        self.query_norm = Norm(config, H, "rmsnorm") if m.qk_norm else None
        self.key_norm = Norm(config, H, "rmsnorm") if m.qk_norm else None

    def __call__(self, x_BLD: Array, documents: Documents | None = None) -> tuple[Array, KeyValues]:
        """Of whole sequences from their first position; also the keys and values, for a cache."""
        q_BLNH, k_BLGH, v_BLGH = self._heads(x_BLD)
        m = self.config.model
        segments, position_BL = ((), None) if documents is None else ((documents.segment_BL,), documents.position_BL)
        if m.positions == "rope":
            q_BLNH, k_BLGH = (rotate(x_BLNH, m.rope_theta, position_BL) for x_BLNH in (q_BLNH, k_BLGH))
        y_BLNH = on_each_rank(
            functools.partial(causal_attention, implementation=self.config.execution.attention),
            (q_BLNH, k_BLGH, v_BLGH, *segments),
            in_spec=(*[split_spec(4)] * 3, *[batch_spec(2)] * len(segments)),
            out_specs=split_spec(4),
        )
        return self._joined(y_BLNH), KeyValues(k_BLGH, v_BLGH)

    def step(self, x_SBD: Array, past: KeyValues, layer: Array, position_SB: Array) -> tuple[Array, KeyValues]:
        """One more token of each sequence.

        Args:
          x_SBD: the rows of each shard of the batch side by side, like the tokens of one sequence.
          past: keys and values [Y, S·B, G, M, H] of several layers, up to each row's position.
          layer: int32, which of them this one is.
          position_SB: where its token stands, below M.

        Returns:
          (y_SBD, `past` with the token's own keys and values)
        """
        y_SBNH, *past = on_each_rank(
            functools.partial(_append_and_attend, self.config.model),
            (*self._heads(x_SBD), *past, layer, position_SB),
            in_spec=(*[split_spec(4)] * 3, cache_spec(5), cache_spec(5), replicated_spec(0), batch_spec(2)),
            out_specs=(split_spec(4), cache_spec(5), cache_spec(5)),
        )
        return self._joined(y_SBNH), KeyValues(*past)

    def _heads(self, x_BLD: Array) -> tuple[Array, Array, Array]:
        """q_BLNH, k_BLGH, v_BLGH before their rotation."""
        B, L, _ = x_BLD.shape
        # The shardings are given because jax 0.12 forgets that of a batch of one in a reshape.
        q_BLNH, k_BLGH, v_BLGH = (
            jnp.reshape(y_BLF, (B, L, -1, self.config.model.head_size), out_sharding=split_spec(4))
            for y_BLF in split_outputs(x_BLD, self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLGH = self.query_norm(q_BLNH), self.key_norm(k_BLGH)
        return q_BLNH, k_BLGH, v_BLGH

    def _joined(self, y_BLNH: Array) -> Array:
        B, L = y_BLNH.shape[:2]
        return self.out(jnp.reshape(y_BLNH, (B, L, -1), out_sharding=split_spec(3)))


def _append_and_attend(
    config: ModelConfig,
    q_SBNH: Array,
    k_SBGH: Array,
    v_SBGH: Array,
    keys_YBGMH: Array,
    values_YBGMH: Array,
    layer: Array,
    position_SB: Array,
) -> tuple[Array, Array, Array]:
    """`Attention.step` on one rank, whose S is 1."""
    _, B, G, M, H = keys_YBGMH.shape
    q_BNH, k_BGH, v_BGH = (v.reshape(B, -1, H) for v in (q_SBNH, k_SBGH, v_SBGH))
    position_B = position_SB.reshape(B)
    if config.positions == "rope":
        q_BNH, k_BGH = (rotate_to(v, config.rope_theta, position_B, M) for v in (q_BNH, k_BGH))
    row_B = jnp.arange(B)
    keys_YBGMH = keys_YBGMH.at[layer, row_B, :, position_B].set(k_BGH, unique_indices=True)
    values_YBGMH = values_YBGMH.at[layer, row_B, :, position_B].set(v_BGH, unique_indices=True)
    keys_BGMH, values_BGMH = keys_YBGMH[layer], values_YBGMH[layer]
    q_BGNH = (q_BNH / math.sqrt(H)).reshape(B, G, -1, H)  # N: the query heads of a key-value head
    scores_BGNM = jnp.einsum("BGNH,BGMH->BGNM", q_BGNH, keys_BGMH, preferred_element_type=jnp.float32)
    seen_BM = jnp.arange(M)[None] <= position_B[:, None]
    weights_BGNM = jax.nn.softmax(jnp.where(seen_BM[:, None, None], scores_BGNM, -jnp.inf))
    y_BGNH = jnp.einsum("BGNM,BGMH->BGNH", weights_BGNM.astype(values_BGMH.dtype), values_BGMH)
    return y_BGNH.reshape(q_SBNH.shape), keys_YBGMH, values_YBGMH


class MLP(nnx.Module):
    """The dense feed-forward layer D → F → D, F split over `tensor`.

    Also the shared experts, side by side as one: their matrices are whole, and like the rest of their layer they take
    each rank's own tokens.
    """

    def __init__(self, config: Config, key: Array, width: int, shared: bool = False):
        self.config = config
        m, keys = config.model, jax.random.split(key, 3)
        first, last, part = ("", "", "shared") if shared else ("outputs", "inputs", "mlp")
        self.up = Linear(config, keys[0], m.hidden_size, width, part, m.use_bias, split=first)
        self.gate = Linear(config, keys[1], m.hidden_size, width, part, m.use_bias, split=first) if m.gated else None
        self.down = Linear(config, keys[2], width, m.hidden_size, part, m.use_bias, residual_scale(config), split=last)

    def __call__(self, x_BLD: Array) -> Array:
        layers = [self.up] if self.gate is None else [self.up, self.gate]
        hidden = split_outputs(x_BLD, *layers) if self.down.split else [layer(x_BLD) for layer in layers]
        return self.down(activate(self.config.model, *hidden))
