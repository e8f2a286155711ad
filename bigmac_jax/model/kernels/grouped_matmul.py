"""The grouped matmul of accelerators: M rows sorted by group, e groups with a matrix X × Y each."""

import contextlib
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.model.exchange.rows import bin_of
from bigmac_jax.model.gathering import InStack
from bigmac_jax.model.kernels import grouped_matmul_gpu
from bigmac_jax.model.mesh import AXES, platform

# Tiles of the TPU kernel: rows, and elements of a matrix. In bfloat16 a step of 256 rows of a 512 × 2048 matrix takes
# 8.5 MiB, its buffers doubled; a kernel has 16 MiB on v5e.
_ROW_TILE = 256
_MATRIX_TILE = 2**20
_TILE_BYTES = 15 << 20


def grouped_matmul(x_MX: Array, w_eXY: Array | InStack, sizes_e: Array) -> Array:
    """Rows of group i times matrix i, in x's dtype; rows behind the last group are undefined.

    The gradient of w is written in w's dtype, which may be wider than x's: what is added up next needs no pass that
    widens it.

    On TPU jax's Pallas megablox kernel, because plain `ragged_dot` compiles to a product over every group on v5e and
    v6e; M must be a multiple of its row tile. On GPU, where it is one everywhere, our own (`grouped_matmul_gpu`).

    Args:
      w_eXY: one `InStack` is read where it stands, and has no gradient.
    """
    if isinstance(w_eXY, InStack):
        if platform() not in ("tpu", "gpu") or w_eXY.stack.dtype != x_MX.dtype:
            return grouped_matmul(x_MX, w_eXY.take(), sizes_e)
        w_iXY = w_eXY.stack.reshape(-1, *w_eXY.stack.shape[-2:])
        product = partial(_gmm, transpose_rhs=False)
        return on_this_rank(product, x_MX, w_iXY, sizes_e, w_eXY.layer * sizes_e.size)
    if platform() in ("tpu", "gpu"):
        return _kernel(x_MX, w_eXY, sizes_e, str(w_eXY.dtype))
    return _every_group(x_MX, w_eXY.astype(x_MX.dtype), sizes_e)


def _every_group(x_MX: Array, w_eXY: Array, sizes_e: Array) -> Array:
    """A product over every group, of which each row keeps that of its own. As the kernels do it reads no row behind the
    last group, and leaves NaN there.

    It is what `jax.lax.ragged_dot` does on CPU, without it: inside the loops of a step in parts, chunks and rounds
    XLA:CPU (jaxlib 0.10.2) computes that wrongly at times, or aborts.
    """
    group_M1 = bin_of(jnp.arange(x_MX.shape[0], dtype=jnp.int32), jnp.cumsum(sizes_e)).reshape(-1, 1)
    x_MX = jnp.where(group_M1 < len(w_eXY), x_MX, 0)
    y_MY = functools.reduce(jnp.add, [jnp.where(group_M1 == i, x_MX @ w_XY, 0) for i, w_XY in enumerate(w_eXY)])
    return jnp.where(group_M1 < len(w_eXY), y_MY, jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(x_MX: Array, w_eXY: Array, sizes_e: Array, gradient: str) -> Array:
    return _kernel_fwd(x_MX, w_eXY, sizes_e, gradient)[0]


def _kernel_fwd(x_MX: Array, w_eXY: Array, sizes_e: Array, gradient: str) -> tuple[Array, Any]:
    w_eXY = w_eXY.astype(x_MX.dtype)
    return on_this_rank(partial(_gmm, transpose_rhs=False), x_MX, w_eXY, sizes_e), (x_MX, w_eXY, sizes_e)


def _kernel_bwd(gradient: str, saved: Any, dy_MY: Array) -> tuple[Array, Array, None]:
    x_MX, w_eXY, sizes_e = saved
    dx_MX = on_this_rank(partial(_gmm, transpose_rhs=True), dy_MY, w_eXY, sizes_e)
    return dx_MX, on_this_rank(partial(_tgmm, dtype=jnp.dtype(gradient)), x_MX, dy_MY, sizes_e), None


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _gmm(x_MX: Array, w_iXY: Array, sizes_e: Array, first: Array | None = None, *, transpose_rhs: bool) -> Array:
    """`first` is that of the e groups' matrices, if there are more."""
    if platform() == "gpu":
        return grouped_matmul_gpu.gmm(x_MX, w_iXY, sizes_e, first, transpose_rhs=transpose_rhs)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    # The kernel multiplies group i with matrix i - group_offset.
    offset = None if first is None else -first
    tiling = partial(_tiling, x_MX.dtype.itemsize)
    kind = {"preferred_element_type": x_MX.dtype, "tiling": tiling, "transpose_rhs": transpose_rhs}
    return gmm(x_MX, w_iXY, sizes_e, group_offset=offset, **kind)


def _tgmm(x_MX: Array, dy_MY: Array, sizes_e: Array, dtype: Any) -> Array:
    """Σ x ⊗ dy over the rows of each group."""
    if platform() == "gpu":
        return grouped_matmul_gpu.tgmm(x_MX, dy_MY, sizes_e, dtype=dtype)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = partial(_gradient_tiling, x_MX.dtype.itemsize, jnp.dtype(dtype).itemsize)
    return tgmm(x_MX.T, dy_MY, sizes_e, preferred_element_type=dtype, tiling=tiling)


def row_tile(rows: int) -> int:
    """Rows of a tile; where they don't divide `rows`, these must be padded, which copies them."""
    if platform() != "tpu":
        return 1  # other kernels take any number of rows
    tile = math.gcd(rows, _ROW_TILE)
    return tile if tile >= _ROW_TILE // 2 else _ROW_TILE


def _tiling(itemsize: int, M: int, X: int, Y: int) -> tuple[int, int, int]:
    """Tiles of the Pallas kernel for [M, X] times [X, Y], numbers of so many bytes; the gradients ask for theirs.

    An expert's whole matrix is one tile where it fits: it stays in fast memory while all rows of the expert pass.
    """

    def fits(m: int, x: int, y: int) -> bool:  # Mosaic takes 15.4 MiB so counted, and refuses 16.5
        return x * y <= _MATRIX_TILE and 2 * itemsize * (m * x + x * y + m * y) <= _TILE_BYTES

    return _largest_tile(M, X, Y, fits)


def _gradient_tiling(itemsize: int, written: int, M: int, X: int, Y: int) -> tuple[int, int, int]:
    """As `_tiling`, of what is summed in float32 and written in `written` bytes."""

    def fits(m: int, x: int, y: int) -> bool:
        return 2 * itemsize * m * (x + y) + (2 * written + 4) * x * y <= _TILE_BYTES

    return _largest_tile(M, X, Y, fits)


def _largest_tile(M: int, X: int, Y: int, fits: Callable[[int, int, int], bool]) -> tuple[int, int, int]:
    rows = row_tile(M)
    for x, y in ((X, Y), (1024, 1024), (1024, 512), (512, 512)):
        tile = rows, min(X, x), min(Y, y)
        if fits(*tile):
            break
    return tile


def on_this_rank(kernel: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a kernel without shard_map's check of which axes its results vary over, which kernels don't say, and marks
    the results as different on every rank.

    Inputs and results are trees of arrays. Without a mesh it is a plain call.
    """
    # Products of 16-bit numbers have one precision: Mosaic refuses another that JAX_DEFAULT_MATMUL_PRECISION asks for.
    narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(inputs))
    with jax.default_matmul_precision("default") if narrow else contextlib.nullcontext():
        if jax.sharding.get_abstract_mesh().empty:
            return kernel(*inputs)
        result = jax.shard_map(kernel, in_specs=(P(),) * len(inputs), out_specs=P(), check_vma=False)(*inputs)
    return jax.tree.map(_varying, result)


def _varying(x: Array) -> Array:
    axes = tuple(axis for axis in AXES if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
