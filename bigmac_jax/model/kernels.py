"""The grouped matmul of accelerators: M rows sorted by group, e groups with a matrix X × Y each."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.mesh import AXES, platform

# Tiles of the TPU kernel: rows, and elements of a matrix. In bfloat16 a step of 256 rows of a 512 × 2048 matrix takes
# 8.5 MiB, its buffers doubled; a kernel has 16 MiB on v5e.
_ROW_TILE = 256
_MATRIX_TILE = 2**20


def grouped_matmul(x_MX: Array, w_eXY: Array, sizes_e: Array) -> Array:
    """Rows of group i times matrix i; rows behind the last group are undefined.

    On TPU jax's Pallas megablox kernel, because plain `ragged_dot` compiles to a product over every group on v5e and
    v6e; M must be a multiple of its row tile. On GPU tokamax's, where it is installed.
    """
    if platform() == "tpu":
        return _megablox(x_MX, w_eXY, sizes_e)
    if platform() == "gpu" and importlib.util.find_spec("tokamax"):
        import tokamax

        return tokamax.ragged_dot(x_MX, w_eXY, sizes_e)
    return jax.lax.ragged_dot(x_MX, w_eXY, sizes_e)


@jax.custom_vjp
def _megablox(x_MX: Array, w_eXY: Array, sizes_e: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    return _on_this_rank(partial(gmm, preferred_element_type=x_MX.dtype, tiling=_tiling), x_MX, w_eXY, sizes_e)


def _megablox_fwd(x_MX: Array, w_eXY: Array, sizes_e: Array) -> tuple[Array, Any]:
    return _megablox(x_MX, w_eXY, sizes_e), (x_MX, w_eXY, sizes_e)


def _megablox_bwd(saved: Any, dy_MY: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    x_MX, w_eXY, sizes_e = saved
    to_x = partial(gmm, preferred_element_type=x_MX.dtype, tiling=_tiling, transpose_rhs=True)
    to_w = partial(tgmm, preferred_element_type=w_eXY.dtype, tiling=_tiling)
    return _on_this_rank(to_x, dy_MY, w_eXY, sizes_e), _on_this_rank(to_w, x_MX.T, dy_MY, sizes_e), None


_megablox.defvjp(_megablox_fwd, _megablox_bwd)


def row_tile(rows: int) -> int:
    """Rows of a tile; where they don't divide `rows`, these must be padded, which copies them."""
    tile = math.gcd(rows, _ROW_TILE)
    return tile if tile >= _ROW_TILE // 2 else _ROW_TILE


def _tiling(M: int, X: int, Y: int) -> tuple[int, int, int]:
    """Tiles of the Pallas kernel for [M, X] times [X, Y]; the gradients ask for theirs.

    An expert's whole matrix is one tile where it fits: it stays in fast memory while all rows of the expert pass.
    """
    return row_tile(M), *((X, Y) if X * Y <= _MATRIX_TILE else (min(X, 1024), min(Y, 1024)))


def _on_this_rank(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """Calls a kernel that doesn't say, as shard_map's check asks, that its result differs from rank to rank."""
    result = jax.shard_map(kernel, in_specs=(P(),) * len(arrays), out_specs=P(), check_vma=False)(*arrays)
    return jax.lax.pcast(result, AXES, to="varying")
