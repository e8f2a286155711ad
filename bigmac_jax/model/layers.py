"""The parts of a transformer that are not the MoE layer.

B batch, L length, M room of a cache, D hidden, N heads, G key-value heads, H head size, F MLP hidden.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model.gathering import Weight, on_each_rank
from bigmac_jax.model.mesh import TENSOR, platform, spec_of, split_spec, tensor_ranks, token_spec
from bigmac_jax.model.parameters import Declaration, parameter, weight


def residual_scale(config: Config) -> float:
    """Factor on the initial std of the matrix that ends a residual branch (GPT-2)."""
    return 1 / math.sqrt(config.model.count_branches("*ME-"))


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

    def __init__(self, config: Config, size: int, kind: str = "", gain: float = 1.0):
        """`kind`: by default model.norm. `gain`: what the scale starts as."""
        self.config = config
        one, zero = (
            Declaration("D", "norms", v, constant=True, decays=False, small=True, exact=True) for v in (gain, 0)
        )
        self.scale_D = parameter(config, None, (size,), one)
        layernorm = (kind or config.model.norm) == "layernorm"
        self.bias_D = parameter(config, None, (size,), zero) if layernorm else None

    def __call__(self, x: Array) -> Array:
        scaled = functools.partial(normalize, self.config.model)
        return on_each_rank(scaled, (x,), self.weights(), in_spec=[spec_of(x)], out_specs=spec_of(x))

    def weights(self) -> list[Weight]:
        """The scale, and LayerNorm's bias."""
        return [weight(self.config, v) for v in (self.scale_D, self.bias_D) if v is not None]


@jax.named_scope("norm")
def normalize(config: ModelConfig, x: Array, scale_D: Array, bias_D: Array | None = None) -> Array:
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


def divisor(count: Array) -> Array:
    """The divisor of a mean over `count` entries, which may be a fraction (a part's share of a step); 1 for none."""
    return jnp.where(count > 0, count, 1)


# Entries of a matrix up to which a transposed copy of it costs less than it saves.
_COPIED = 2**21
_MANY_ROWS = 1024  # of a product that takes longer than its start and its bytes


def weight_gradient(x_TX: Array, dy_TY: Array, precision: Any) -> Array:
    """xᵀ dy → [..., X, Y], of matrices [..., T, X] and [..., T, Y].

    On CPU xᵀ is copied first: XLA:CPU multiplies a matrix that stands transposed at a half to a quarter of the speed.
    """
    x_XT = x_TX.swapaxes(-1, -2)
    if platform() == "cpu" and math.prod(x_XT.shape[-2:]) <= _COPIED:
        x_XT = jax.lax.optimization_barrier(x_XT)
    return jnp.matmul(x_XT, dy_TY, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("projection")
def product(x: Array, w: Array, precision: Any = None) -> Array:
    """x @ w on one rank, of [..., X] and [X, Y] or of [..., T, X] and as many matrices [..., X, Y], with
    `weight_gradient` for w's."""
    return jnp.matmul(x, w, precision=precision)


def _product_fwd(x: Array, w: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w, precision), (x, w)


@jax.named_scope("projection")
def _product_bwd(precision: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = jnp.matmul(dy, w.swapaxes(-1, -2), precision=precision)
    if w.ndim == 2:
        x, dy = (v.reshape(-1, v.shape[-1]) for v in (x, dy))
    return dx, weight_gradient(x, dy, precision)


product.defvjp(_product_fwd, _product_bwd)


def exact_product(x: Array, w: Array) -> Array:
    """x @ w as float32 has it, and so its gradients: by default a TPU multiplies in one pass of bfloat16, an H100 in
    TF32.

    `Precision.HIGHEST` is that, but XLA:GPU takes no tensor core for it, which are 15 times as fast. There bfloat16
    rows are multiplied with bfloat16 pieces of w, whose sum is w.
    """
    if platform() == "gpu" and x.dtype == jnp.bfloat16 and w.ndim == 2 and x.size >= _MANY_ROWS * x.shape[-1]:
        return _product_in_pieces(x, w)
    return product(x.astype(jnp.float32), w, jax.lax.Precision.HIGHEST)


def _pieces(v: Array, number: int) -> list[Array]:
    """bfloat16 arrays, each 2⁻⁸ of the one before; three of them sum to v."""
    pieces = []
    for _ in range(number):
        piece = jax.lax.reduce_precision(v, exponent_bits=8, mantissa_bits=7)  # of astype XLA makes nothing at all
        pieces.append(piece.astype(jnp.bfloat16))
        v = v - piece
    return pieces


_matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@jax.custom_vjp
@jax.named_scope("projection")
def _product_in_pieces(x: Array, w: Array) -> Array:
    y = _matmul(x, jnp.concatenate(_pieces(w, 3), -1))
    return y.reshape(*y.shape[:-1], 3, -1).sum(-2)


def _pieces_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product_in_pieces(x, w), (x, w)


@jax.named_scope("projection")
def _pieces_bwd(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    (high, middle, low), (w_high, w_middle) = _pieces(dy, 3), _pieces(w, 2)
    # dx is rounded to bfloat16: two pieces of each are enough, of which the two small ones need not meet.
    dx = _matmul(jnp.concatenate((high, high, middle), -1), jnp.concatenate((w_high, w_middle, w_high), -1).T)
    dy_T3Y = jnp.concatenate((high, middle, low), -1).reshape(-1, 3 * w.shape[-1])
    dw = _matmul(x.reshape(-1, x.shape[-1]).T, dy_T3Y)
    return dx.astype(x.dtype), dw.reshape(len(dw), 3, -1).sum(1)


_product_in_pieces.defvjp(_pieces_fwd, _pieces_bwd)


class Linear(nnx.Module):
    """x @ w (+ b), in the dtype of x.

    Args:
      part: of the model, for counts.
      latent: W↓ or W↑, which start as model.projection_init says and are trained at optimizer.projection_rate.
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
        latent: bool = False,
    ):
        self.config, self.split, self.heads = config, split, heads
        outputs = TENSOR if split == "outputs" and not heads else None
        axes = (TENSOR, None) if split == "inputs" else (None, outputs)
        selects = latent and config.model.projection_init == "selection"
        matrix = Declaration("DF", part, scale / math.sqrt(fan_in), axes=axes, selects=selects, slow=latent)
        self.w_DF = parameter(config, key, (fan_in, fan_out), matrix)
        zero = Declaration("F", part, 0, constant=True, axes=axes[1:], decays=False, small=True)
        self.b_F = parameter(config, None, (fan_out,), zero) if bias else None

    def __call__(self, x: Array) -> Array:
        """Applies the layer to each rank's own tokens; split by inputs, to whole sequences with split inputs."""
        if self.split == "inputs":
            return on_each_rank(_affine_split_inputs, (x,), self.weights(), in_spec=split_spec)
        return on_each_rank(affine, (x,), self.weights())

    def weights(self) -> list[Weight]:
        """The matrix, and the bias if there is one."""
        return [weight(self.config, v) for v in (self.w_DF, self.b_F) if v is not None]


def affine(x_BLX: Array, w_XY: Array, b_Y: Array | None = None) -> Array:
    """x @ w (+ b) on one rank."""
    y_BLY = product(x_BLX, w_XY)
    return y_BLY if b_Y is None else y_BLY + last_axes(b_Y, y_BLY)


def split_outputs(x_BLD: Array, *layers: Linear) -> list[Array]:
    """Applies layers that are split by outputs → whole sequences, F split. Tokens are gathered once for all layers."""

    def on_rank(x_BLD: Array, *weights: Array) -> tuple[Array, ...]:
        if tensor_ranks() > 1:
            x_BLD = jax.lax.all_gather(x_BLD, TENSOR, axis=1, tiled=True)
        given = iter(weights)
        return tuple(
            affine(x_BLD, *(_own_head(layer, next(given)) for _ in own))
            for layer, own in zip(layers, of_layers, strict=True)
        )

    of_layers = [layer.weights() for layer in layers]
    weights = [w for own in of_layers for w in own]
    return on_each_rank(on_rank, (x_BLD,), weights, out_specs=(split_spec(3),) * len(layers))


def _own_head(layer: Linear, w: Array) -> Array:
    """This rank's head out of weights [..., F] that are not split, because there are fewer heads than ranks."""
    if not layer.heads:
        return w
    width = w.shape[-1] // layer.heads
    head = jax.lax.axis_index(TENSOR) * layer.heads // tensor_ranks()
    return jax.lax.dynamic_slice_in_dim(w, head * width, width, axis=w.ndim - 1)


def _affine_split_inputs(x_BLF: Array, w_FD: Array, b_D: Array | None = None) -> Array:
    """x @ w (+ b) of whole sequences, F split → each rank's own tokens, summed over `tensor`."""
    y_BLD = product(x_BLF, w_FD)
    if tensor_ranks() > 1:
        y_BLD = jax.lax.psum_scatter(y_BLD, TENSOR, scatter_dimension=1, tiled=True)
    return y_BLD if b_D is None else y_BLD + last_axes(b_D, y_BLD)


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
