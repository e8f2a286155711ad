"""How rows cross a link: their format, and the collectives that carry them.

A format applies to the rows of the forward pass, another to their gradients. 8-bit rows are bitcast to unsigned
integers and carry their float32 scale, max|row| over the format's largest number, in four more bytes. So are 16-bit
rows on CPU, where XLA widens small floats in collectives (and so does any reduction); on TPU that would be a copy of
its own. Collectives stand in the scope PAYLOAD or METADATA, by which they are known in the compiled program.

S ranks, C rows a pair, R width, W bytes (or elements) of an encoded row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bigmac_jax.model.mesh import platform

PAYLOAD, METADATA = "exchange_payload", "exchange_metadata"
EXCHANGED = "exchanged"  # what came over a link: execution.remat=exchange keeps it
FORMATS = ("float32", "bfloat16", "float8_e4m3", "int8")
Movement = Callable[[Array, Any], Array]  # encoded rows, and what tells it where they go
_EIGHT_BIT = {"float8_e4m3": (jnp.float8_e4m3fn, 448.0), "int8": (jnp.int8, 127.0)}


def row_bytes(format: str, width: int) -> int:
    """Bytes of a row on the wire, its scale included."""
    return {"float32": 4 * width, "bfloat16": 2 * width}.get(format, width + 4)


def encode(x_R: Array, format: str) -> Array:
    """Rows of any leading dimensions → what crosses."""
    if format == "float32":
        return x_R.astype(jnp.float32)
    if format == "bfloat16":
        x_R = x_R.astype(jnp.bfloat16)
        return jax.lax.bitcast_convert_type(x_R, jnp.uint16) if platform() == "cpu" else x_R
    dtype, largest = _EIGHT_BIT[format]
    x_R = x_R.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x_R), axis=-1, keepdims=True), 1e-30) / largest
    small_R = x_R / scale
    small_R = (jnp.round(small_R) if format == "int8" else small_R).astype(dtype)
    scale_4 = jax.lax.bitcast_convert_type(scale, jnp.uint8).reshape(*x_R.shape[:-1], 4)
    return jnp.concatenate([jax.lax.bitcast_convert_type(small_R, jnp.uint8), scale_4], axis=-1)


def decode(wire_W: Array, format: str, dtype: Any) -> Array:
    """The rows again, in `dtype`."""
    if wire_W.dtype == jnp.uint16:
        wire_W = jax.lax.bitcast_convert_type(wire_W, jnp.bfloat16)
    if format not in _EIGHT_BIT:
        return wire_W.astype(dtype)
    scale = jax.lax.bitcast_convert_type(wire_W[..., -4:].reshape(*wire_W.shape[:-1], 1, 4), jnp.float32)
    return (jax.lax.bitcast_convert_type(wire_W[..., :-4], _EIGHT_BIT[format][0]).astype(jnp.float32) * scale).astype(
        dtype
    )


@dataclass(frozen=True)
class Wire:
    """The links of one or more mesh axes, inside `shard_map`.

    Attributes:
      forward, backward: the formats of rows and of their gradients.
    """

    axis: tuple[str, ...]
    forward: str = "float32"
    backward: str = "float32"

    def swap(self, rows_SCR: Array) -> Array:
        """Chunk s goes to rank s; chunk s of the result came from rank s."""
        return self.move(rows_SCR, None, self._swap, self._swap)

    def gather(self, x_TR: Array) -> Array:
        """The rows of all ranks, rows_STR."""
        return self.move(x_TR, None, self._gather, None)

    def reduce(self, y_STR: Array) -> Array:
        """Sums what all S ranks have for a rank's rows, y_STR → its own rows [T, R] (a reduce-scatter): the transpose
        of `gather`."""
        return self.move(y_STR, None, None, self._gather)

    def swap_metadata(self, x_SC: Array) -> Array:
        """As `swap`, without a format."""
        with jax.named_scope(METADATA):
            return _kept(jax.lax.all_to_all(x_SC, self.axis, 0, 0, tiled=True))

    def gather_metadata(self, x: Array, tiled: bool = False) -> Array:
        with jax.named_scope(METADATA):
            return _kept(jax.lax.all_gather(x, self.axis, tiled=tiled))

    def move(self, x: Array, where: Any, there: Movement | None, back: Movement | None) -> Array:
        """Rows through `there`, their gradients through `back`; None stands for the sum over the ranks.

        `where` is what both are told beside the encoded rows.
        """

        @jax.named_scope(PAYLOAD)
        def cross(x: Array, where: Any, movement: Movement | None, format: str) -> Array:
            if movement is not None:
                return decode(movement(encode(x, format), where), format, x.dtype)
            if format == "float32":
                return self._reduce(encode(x, format)).astype(x.dtype)
            # Small formats cannot be added on the way: the rows cross as they are, and are added in float32.
            received = decode(self._swap(encode(x, format), None), format, jnp.float32)
            return received.sum(0).astype(x.dtype)

        @jax.custom_vjp
        def moved(x: Array, where: Any) -> Array:
            return cross(x, where, there, self.forward)

        moved.defvjp(
            lambda x, where: (moved(x, where), where),
            lambda where, dy: (cross(dy, where, back, self.backward), None),
        )
        # Named here, because what has a gradient of its own is one operation to recomputation.
        return _kept(moved(x, where))

    def _swap(self, x_SC: Array, _: Any) -> Array:
        return jax.lax.all_to_all(x_SC, self.axis, 0, 0, tiled=True)

    def _gather(self, x_T: Array, _: Any) -> Array:
        return jax.lax.all_gather(x_T, self.axis)

    def _reduce(self, x_ST: Array) -> Array:
        return jax.lax.psum_scatter(x_ST, self.axis, scatter_dimension=0)


def _kept(received: Array) -> Array:
    return checkpoint_name(received, EXCHANGED)
