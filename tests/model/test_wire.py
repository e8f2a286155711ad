"""Formats of rows on the wire: their error, their size, and what really crosses in the compiled program."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.exchange.wire import FORMATS, decode, encode, row_bytes

from .program import Collective, collectives, layer
from .tools import layer_and_gradients, some, tiny

# |decoded - row| ≤ bound · max|row|: half a unit in the last place, of the largest entry or of the entry itself.
BOUNDS = {"float32": 0.0, "bfloat16": 2**-8, "float8_e4m3": 2**-4, "int8": 0.5001 / 127}
ELEMENTS = {"float32": "float32", "bfloat16": "uint16", "float8_e4m3": "uint8", "int8": "uint8"}


def rows() -> np.ndarray:
    """Rows of very different sizes, one of them zero."""
    x = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    return x * np.array([1e-20, 1e-3, 0, 1, 50, 1e20], np.float32)[:, None]


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_comes_back_within_the_bound(format: str) -> None:
    x = rows()
    wire = encode(jnp.asarray(x), format)
    assert wire.dtype == ELEMENTS[format]
    assert wire.nbytes == 6 * row_bytes(format, 32)
    back = np.asarray(decode(wire, format, jnp.float32))
    largest = np.abs(x).max(1, keepdims=True)
    assert (np.abs(back - x) <= BOUNDS[format] * largest).all()
    assert format == "float32" or np.abs(back - x).max() > 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_does_not_come_back_finite(format: str, bad: float) -> None:
    """A diverged run must be seen, not repaired."""
    x = rows()
    x[3, 5] = bad
    back = np.asarray(decode(encode(jnp.asarray(x), format), format, jnp.float32))
    assert not np.isfinite(back[3]).all()
    assert np.isfinite(back[4]).all()


def payload(found: list[Collective], width: int) -> list[Collective]:
    """The collectives whose rows have the width, bare or with a scale."""
    return [c for c in found if c.operands[0][1][-1:] in ((width,), (width + 4,)) and c.kind != "all-reduce"]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    some(
        [
            (name, *formats)
            for formats in (("bfloat16", "float32"), ("int8", "float8_e4m3"), ("float8_e4m3", ""))
            for name in STRATEGIES
        ],
        every=6,
    ),
)
def test_every_payload_crosses_in_its_format(name: str, forward: str, backward: str) -> None:
    """R = 24, which no other array of the layer has as its last dimension."""
    model: dict[str, Any] = {
        "hidden_size": 96,
        "exchange": name,
        "wire_dtype": forward,
        "wire_dtype_backward": backward,
    }
    config = tiny((1, 2, 2), **model)
    there = payload(collectives(layer(config)), 24)
    both = payload(collectives(layer(config, gradients=True)), 24)
    exchanges = 4 if name == "hierarchical" else 2
    assert [c.operands[0][0] for c in there] == [ELEMENTS[forward]] * exchanges
    expected = sorted([ELEMENTS[forward]] * exchanges + [ELEMENTS[backward or forward]] * exchanges)
    assert sorted(c.operands[0][0] for c in both) == expected


def test_gather_adds_in_float32_where_float32_crosses() -> None:
    """Of a bfloat16 computation, too: the output on its way back, and the gradients of the rows and of the gates."""
    config = tiny((1, 1, 4), exchange="gather", dtype="bfloat16", wire_dtype="float32")
    program = str(layer(config, gradients=True).jaxpr)  # XLA:CPU would widen the sums of bfloat16 itself
    assert re.findall(r":(\w+)\[[^\n]* = reduce_scatter", program) == ["f32"] * 3


@pytest.mark.parametrize(
    ("name", "format"),
    some(
        [
            ("all_to_all", "int8"),
            ("gather", "float8_e4m3"),
            ("hierarchical", "int8"),
            ("dedup", "float8_e4m3"),
            ("ragged", "bfloat16"),
        ],
        every=5,
    ),
)
def test_the_layer_moves_by_the_formats_error(name: str, format: str) -> None:
    """Output and gradients against the float32 wire; the bounds are stated in docs/exchange.md."""
    # Without a skip, which sends nothing: the gradient of its factor is one sum, in which most cancels.
    exact, small = (
        layer_and_gradients(tiny((1, 2, 4), exchange=name, latent_norm="post_combine", wire_dtype=f))
        for f in ("", format)
    )
    error = {"bfloat16": 0.01, "float8_e4m3": 0.1, "int8": 0.03}[format]
    for leaf in exact:
        assert np.linalg.norm(small[leaf] - exact[leaf]) <= error * np.linalg.norm(exact[leaf]), leaf
    assert (small["y"] != exact["y"]).any() and (small["dx"] != exact["dx"]).any()


def test_sizes() -> None:
    """Payload and scale of int8 at R = 128: 0.258 of float32's."""
    assert row_bytes("int8", 128) / row_bytes("float32", 128) == pytest.approx(132 / 512)
    assert [row_bytes(f, 128) for f in FORMATS] == [512, 256, 132, 132]
    assert math.isclose(BOUNDS["int8"], 1 / 254, rel_tol=1e-3)
    assert jax.dtypes.finfo(jnp.float8_e4m3fn).max == 448
