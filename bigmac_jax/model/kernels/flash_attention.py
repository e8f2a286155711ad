"""Causal attention on one rank, inside documents: softmax(q kᵀ / √H) v, by the kernel that suits the platform.

B batch, L length, M keys of a block, N heads, G key-value heads, H head size, P length padded to whole blocks. The
kernels of TPUs and GPUs hold neither scores nor a mask of L × L.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.kernels.grouped_matmul import on_this_rank
from bigmac_jax.model.layers import product
from bigmac_jax.model.mesh import platform

_CUDNN_HEAD = 128  # the largest head that cuDNN's attention takes forward and backward on every GPU since Ampere
_SPLASH_HEAD = _TRITON_HEAD = 256  # the largest that was compiled
_TRITON_LEAST = 16  # elements that a product of Triton sums at least
# Below so many positions scores are smaller than the padding to a block of splash.
_SPLASH_LENGTH = 128


@jax.named_scope("attention")
def causal_attention(
    q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None = None, implementation: str = "auto"
) -> Array:
    """softmax(q kᵀ / √H) v over the positions up to each query's own → [B, L, N, H], in the dtype of q.

    Args:
      segments_BL: int32, any numbers, equal along a document: a query sees its own document alone. None: all is one.
      implementation: as execution.attention; `auto` is resolved by `choose_implementation`.

    Raises:
      ConfigError: it does not take the case, see `refusal`.
    """
    _, L, _, H = q_BLNH.shape
    here, dtype, segments = platform(), str(q_BLNH.dtype), segments_BL is not None
    if implementation == "auto":
        implementation = choose_implementation(here, dtype, H, L, segments)
    if refused := refusal(implementation, here, dtype, H, segments):
        raise ConfigError(refused)
    return _FUNCTIONS[implementation](q_BLNH, k_BLGH, v_BLGH, segments_BL)


def attention_implementation(config: Config, on: str = "") -> str:
    """Name of the attention implementation that training takes on a platform, by default the current mesh's."""
    if config.execution.attention != "auto":
        return config.execution.attention
    m, length = config.model, config.data.sequence_length
    return choose_implementation(on or platform(), config.execution.dtype, m.head_size, length, config.has_segments)


def choose_implementation(platform: str, dtype: str, head_size: int, length: int, segments: bool) -> str:
    """The implementation that `auto` takes: the fastest that takes the case."""
    fastest = {"tpu": ("splash",), "gpu": ("cudnn", "triton"), "cpu": ("blocks",)}.get(platform, ())
    if platform == "tpu" and length < _SPLASH_LENGTH:
        return "xla"
    return next((name for name in fastest if not refusal(name, platform, dtype, head_size, segments)), "xla")


def refusal(implementation: str, platform: str, dtype: str, head_size: int, segments: bool) -> str:
    """The rule that a case breaks, and what to set instead; "" if the implementation takes it."""
    setting = f"execution.attention={implementation}"
    home = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}.get(implementation, platform)
    if platform != home:
        return f"{setting} is a kernel of {home.upper()}s, not of {platform.upper()}s; use execution.attention=auto"
    if implementation == "cudnn":
        if dtype != "bfloat16":
            return f"{setting} needs bfloat16, not {dtype}; use execution.dtype=bfloat16, or execution.attention=triton"
        if head_size % 8 or head_size > _CUDNN_HEAD:
            return (
                f"{setting} needs heads of a multiple of 8 up to {_CUDNN_HEAD}, not of {head_size}; "
                "use execution.attention=auto"
            )
        if segments:
            return f"{setting} does not keep documents apart; use execution.attention=triton"
    if implementation == "splash" and head_size > _SPLASH_HEAD:
        return f"{setting} takes heads of up to {_SPLASH_HEAD}, not of {head_size}; use execution.attention=xla"
    if implementation == "triton" and not _TRITON_LEAST <= head_size <= _TRITON_HEAD:
        return (
            f"{setting} takes heads of {_TRITON_LEAST} to {_TRITON_HEAD}, not of {head_size}; "
            "use execution.attention=xla"
        )
    return ""


def xla(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None) -> Array:
    """jax.nn's plain attention, which holds all scores."""
    same_B1LL = None if segments_BL is None else (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BLNH, k_BLGH, v_BLGH, mask=same_B1LL, is_causal=True, implementation="xla")


def cudnn(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None) -> Array:
    """cuDNN's fused attention, for one document a row.

    It knows rows of several as offsets of at most so many documents a row, which a batch does not promise.
    """
    return jax.nn.dot_product_attention(q_BLNH, k_BLGH, v_BLGH, is_causal=True, implementation="cudnn")


def blocks(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None) -> Array:
    """For CPU, where XLA has no fused kernel: queries go in a few blocks that skip the keys behind them, with heads
    before positions (docs/performance.md has the figure)."""
    _, L, N, H = q_BLNH.shape
    q_BNLH = (q_BLNH / math.sqrt(H)).swapaxes(1, 2)
    # One key-value head per query head, so that every product here is a plain batch of matrices, in the gradient too.
    k_BNLH, v_BNLH = (jnp.repeat(x.swapaxes(1, 2), N // x.shape[2], axis=1) for x in (k_BLGH, v_BLGH))
    k_BNHL = k_BNLH.swapaxes(2, 3)
    block = max(128, -(-L // 4))
    done = []
    for start in range(0, L, block):
        stop = min(start + block, L)
        scores_BNLM = product(q_BNLH[:, :, start:stop], k_BNHL[:, :, :, :stop])
        seen = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None, None]
        if segments_BL is not None:
            seen = seen & (segments_BL[:, start:stop, None] == segments_BL[:, None, :stop])[:, None]
        weights_BNLM = jax.nn.softmax(jnp.where(seen, scores_BNLM.astype(jnp.float32), -jnp.inf))
        done.append(product(weights_BNLM.astype(v_BNLH.dtype), v_BNLH[:, :, :stop]))
    return jnp.concatenate(done, axis=2).swapaxes(1, 2)


def splash(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None, interpret: bool = False) -> Array:
    """jax's Pallas kernel of TPUs; key-value heads stay as few as they are."""
    return _differentiable(partial(_splash, interpret=interpret), q_BLNH, k_BLGH, v_BLGH, segments_BL)


def triton(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None, interpret: bool = False) -> Array:
    """jax's Pallas kernel of GPUs, lowered through Triton."""
    return _differentiable(partial(_triton, interpret=interpret), q_BLNH, k_BLGH, v_BLGH, segments_BL)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "xla": xla, "cudnn": cudnn, "blocks": blocks, "splash": splash, "triton": triton,
}  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """A kernel with its own gradient, each `on_this_rank`: the gradient of a nested shard_map would sum over ranks."""
    return on_this_rank(lambda *inputs: kernel(*_computed(inputs)), q, k, v, segments)


def _forward(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Any]:
    def both(*inputs: Any) -> Any:
        *heads, segments = _computed(inputs)
        return jax.vjp(lambda *heads: kernel(*heads, segments), *heads)

    return on_this_rank(both, q, k, v, segments)


def _backward(_: Any, pull: Any, dy: Array) -> tuple[Array, Array, Array, None]:
    def back(*inputs: Any) -> Any:
        pull, dy = _computed(inputs)
        return pull(dy)

    return (*on_this_rank(back, pull, dy), None)


_differentiable.defvjp(_forward, _backward)


def _computed(inputs: Any) -> Any:
    """The same numbers. Inputs of `on_this_rank` say that they differ from rank to rank, what is computed there does
    not, and jax.vjp and the kernels' interpreter ask that both say the same. XLA drops the product."""
    return jax.tree.map(lambda x: 1 * x, inputs)


# Lengths of splash's blocks, the best first: a step of a kernel reads one of keys and one of queries, so long ones save
# steps and reads. Scores are of _SPLASH_KEYS keys at a time. The longest is left out for heads over 128, which with it
# are more than a v5e's fast memory (16 MiB) in float32 passes. Chosen by that, not by time on a TPU.
_SPLASH_BLOCKS = (1024, 512, 256, 128)
_SPLASH_KEYS = 512
_TRITON_BLOCK = 64


class _Causal(CausalMask):
    """A causal mask that answers for whole blocks: the library asks of each whether all of it is seen, or nothing."""

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        if keys.stop - 1 <= queries.start or keys.start > queries.stop - 1:
            return np.full((1, 1), keys.start <= queries.start)  # not all its elements, which are L² together
        return super().__getitem__(block)

    __hash__ = CausalMask.__hash__


def _splash(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None, interpret: bool) -> Array:
    _, L, N, H = q_BLNH.shape
    block = block_length(L, _SPLASH_BLOCKS[H > 128 :])
    q_BNPH, k_BGPH, v_BGPH = (_padded(x, block).swapaxes(1, 2) for x in (q_BLNH / math.sqrt(H), k_BLGH, v_BLGH))
    P = q_BNPH.shape[2]
    # Not one kernel for both gradients: it holds a dq for each block of keys, in the dtype of q, before their sum.
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, _SPLASH_KEYS),
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=min(block, _SPLASH_KEYS),
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = MultiHeadMask([_Causal((P, P))] * N)
    attend = make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    if segments_BL is None:
        y_BNPH = jax.vmap(attend)(q_BNPH, k_BGPH, v_BGPH)
    else:
        segments_BP = _padded(segments_BL, block)
        y_BNPH = jax.vmap(attend)(q_BNPH, k_BGPH, v_BGPH, SegmentIds(segments_BP, segments_BP))
    return y_BNPH.swapaxes(1, 2)[:, :L]


def _triton(q_BLNH: Array, k_BLGH: Array, v_BLGH: Array, segments_BL: Array | None, interpret: bool) -> Array:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        from jax.experimental.pallas.ops.gpu import attention as library

    _, L, N, H = q_BLNH.shape
    # With heads of 256, 64 positions are more than the 227 KiB of shared memory that a block of an H100 or B200 has.
    block = _TRITON_BLOCK if H <= 128 else _TRITON_BLOCK // 2
    sizes = library.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    k_BLNH, v_BLNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BLGH, v_BLGH))
    arrays = [x if x is None else _padded(x, block) for x in (q_BLNH, k_BLNH, v_BLNH, segments_BL)]
    return library.mha(*arrays, 1 / math.sqrt(H), True, sizes, interpret=interpret)[:, :L]


def block_length(length: int, lengths: tuple[int, ...]) -> int:
    """The first of `lengths` that pads by at most an eighth, or the last."""
    return next((block for block in lengths if -length % block <= length // 8), lengths[-1])


def _padded(x_BL: Array, block: int) -> Array:
    """[B, L, …] up to whole blocks, with zeros: no query that is kept sees what comes behind it."""
    return jnp.pad(x_BL, [(0, 0), (0, -x_BL.shape[1] % block), *[(0, 0)] * (x_BL.ndim - 2)])
