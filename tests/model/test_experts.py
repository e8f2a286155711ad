"""The experts by themselves: an accelerator's kernel leaves rows behind the last group undefined."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bigmac_jax.model import experts, moe
from bigmac_jax.model.kernels import grouped_matmul

from .tools import PAPER, abstract_layer, assert_close, loss_and_gradients, on_mesh, tiny

N, E, R, F = 40, 4, 16, 24


@jax.custom_vjp
def kernel(x_MX: Array, w_eXY: Array, sizes_e: Array) -> Array:
    """As the TPU's: reads no row behind the last group, and leaves NaN there, in the gradient too."""
    return behind(jax.lax.ragged_dot(behind(x_MX, sizes_e, 0), w_eXY, sizes_e), sizes_e, jnp.nan)


def behind(x_MX: Array, sizes_e: Array, value: float) -> Array:
    return jnp.where((jnp.arange(x_MX.shape[0]) < sizes_e.sum()).reshape(-1, 1), x_MX, value)


def kernel_bwd(saved: Any, dy_MY: Array) -> tuple[Array, Array, None]:
    x_MX, w_eXY, sizes_e = saved
    _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes_e), behind(x_MX, sizes_e, 0), w_eXY)
    dx_MX, dw_eXY = pull(behind(dy_MY, sizes_e, 0))
    return behind(dx_MX, sizes_e, jnp.nan), dw_eXY, None


kernel.defvjp(lambda *arguments: (kernel(*arguments), arguments), kernel_bwd)


@pytest.mark.parametrize(
    ("bias", "gated", "tile"),
    [(True, True, 1), (True, False, 1), (False, True, 1), (False, False, 1), (True, True, 50)],
)
def test_undefined_rows_reach_nothing(bias: bool, gated: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows are padded to whole tiles."""

    def in_tiles(x_MX: Array, *others: Any) -> Array:
        assert x_MX.shape[0] % tile == 0
        return kernel(x_MX, *others)

    monkeypatch.setattr(experts, "grouped_matmul", in_tiles)
    monkeypatch.setattr(experts, "row_tile", lambda rows: tile)
    monkeypatch.setattr(experts, "BLOCK", 8)  # of what it is compared with
    rng = np.random.default_rng(0)
    shapes = {"w_in_eRF": (E, R, F), "w_out_eFR": (E, F, R)}
    shapes |= {"w_gate_eRF": (E, R, F)} if gated else {}
    shapes |= {"b_in_eF": (E, F), "b_out_eR": (E, R)} if bias else {}
    shapes |= {"b_gate_eF": (E, F)} if bias and gated else {}
    shapes |= {"x_NR": (N, R), "gates_N1": (N, 1), "dy_NR": (N, R)}
    given = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    expert_N1 = jnp.asarray(rng.integers(E + 1, size=(N, 1)), jnp.int32)  # some rows' experts are elsewhere

    def results(implementation: str) -> dict[str, Array]:
        activation = PAPER["activation"]
        config = tiny(activation=activation, use_bias=bias, gated=gated, grouped_matmul=implementation)

        def loss(given: dict[str, Array]) -> tuple[Array, Array]:
            weights = {name: value for name, value in given.items() if name.startswith(("w_", "b_"))}
            y_NR = experts.grouped_mlp(config, weights, given["x_NR"], given["gates_N1"], expert_N1, 1)
            return jnp.sum(y_NR * given["dy_NR"]), y_NR

        gradients, y_NR = jax.jit(jax.grad(loss, has_aux=True))(given)
        return gradients | {"y_NR": y_NR}

    assert_close(results("kernel"), results("blocks"))


@pytest.mark.parametrize("tile", [1, 50])
def test_as_many_rows_of_each_rank_find_their_expert(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is given each row's expert and bias, and whole tiles of rows."""
    monkeypatch.setattr(experts, "grouped_matmul", kernel)
    monkeypatch.setattr(experts, "row_tile", lambda rows: tile)
    rng, S, C = np.random.default_rng(0), 2, 5
    shapes = {"w_in_eRF": (E, R, F), "w_out_eFR": (E, F, R), "b_in_eF": (E, F), "b_out_eR": (E, R)}
    weights = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    rows_SeCR = jnp.asarray(rng.standard_normal((S, E, C, R)), jnp.float32)

    def results(implementation: str) -> dict[str, Array]:
        config = tiny(use_bias=True, grouped_matmul=implementation)
        y_SeCR, pull = jax.vjp(lambda *given: experts._even_mlp(config, *given), weights, rows_SeCR)
        return {"y_SeCR": y_SeCR, "rows": pull(rows_SeCR)[1]} | pull(rows_SeCR)[0]

    assert_close(results("kernel"), results("batched"))


@pytest.mark.parametrize(
    ("rows", "tile"), [(256, 256), (512, 256), (128, 128), (384, 128), (64, 256), (192, 256), (300, 256), (1, 256)]
)
def test_rows_of_a_tile(rows: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 or 256 on TPU, where they divide the rows; other kernels take any number."""
    assert grouped_matmul.row_tile(rows) == 1
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "tpu")
    assert grouped_matmul.row_tile(rows) == tile
    # The whole matrix of an expert where it has at most a million entries.
    assert grouped_matmul._tiling(2, rows, 2048, 512) == (tile, 2048, 512)
    assert grouped_matmul._tiling(2, rows, 2048, 513) == (tile, 1024, 513)
    assert grouped_matmul._tiling(2, rows, 600, 4096) == (tile, 600, 1024)


@pytest.mark.parametrize(
    ("itemsize", "X", "Y", "tile"),
    [
        (2, 512, 2048, (512, 2048)),  # 2 · 2 · (256 · 2,560 + 2²⁰) bytes
        (2, 128, 8192, (128, 8192)),  # 12.1 MiB
        (4, 256, 4096, (256, 1024)),  # 16.5
        (4, 4096, 256, (1024, 256)),
        (4, 8192, 128, (1024, 128)),  # 24.3
        (4, 512, 2048, (512, 2048)),  # 13
        (4, 1024, 1025, (1024, 1024)),
    ],
)
def test_tiles_of_a_product(
    itemsize: int, X: int, Y: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fit into the 16 MiB of v5e."""
    monkeypatch.setattr(grouped_matmul, "row_tile", lambda rows: 256)
    assert grouped_matmul._tiling(itemsize, 512, X, Y) == (256, *tile)


@pytest.mark.parametrize(
    ("itemsize", "written", "X", "Y", "tile"),
    [
        (2, 4, 512, 2048, (512, 2048)),  # 2 · 256 · 2,560 · 2 + 12 · 2²⁰ bytes
        (2, 4, 128, 8192, (128, 1024)),  # rows of 8,320 numbers leave no room
        (2, 2, 256, 4096, (256, 4096)),
        (4, 4, 1024, 1024, (1024, 512)),
        (2, 4, 4096, 4096, (1024, 1024)),
    ],
)
def test_tiles_of_a_gradient(
    itemsize: int, written: int, X: int, Y: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fit into the 16 MiB of v5e."""
    monkeypatch.setattr(grouped_matmul, "row_tile", lambda rows: 256)
    assert grouped_matmul._gradient_tiling(itemsize, written, 512, X, Y) == (256, *tile)


def test_the_gradient_of_a_bias_is_summed_in_float32() -> None:
    """In bfloat16 a sum of ones stops at 256."""
    expert_M = jnp.asarray([1] * 4096 + [2] * 3, jnp.int32)
    b_eY = jnp.asarray([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], jnp.float32)
    y_MY, pull = jax.vjp(lambda b_eY: experts.bias_of_rows(b_eY, expert_M, "bfloat16"), b_eY)
    assert y_MY.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_MY.astype(jnp.float32), b_eY[expert_M])
    (d_b_eY,) = pull(jnp.ones_like(y_MY))
    np.testing.assert_array_equal(d_b_eY, [[0, 0], [4096, 4096], [3, 3]])


@pytest.mark.full
@pytest.mark.parametrize(("implementation", "bias"), [("kernel", True), ("batched", True), ("blocks", False)])
def test_a_gate_beside_w_in_changes_nothing(implementation: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered narrowly is cast, and so gathered as one; the numbers are those of two parameters."""
    fields = {"gated": True, "use_bias": bias, "grouped_matmul": implementation, "gather_dtype": "bfloat16"}
    config = tiny((2, 1, 2, 1, True, False), remat="layer", **fields)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 9))
    joined = loss_and_gradients(config, tokens)
    monkeypatch.setattr(moe, "can_join", lambda w: False)
    apart = loss_and_gradients(config, tokens)
    np.testing.assert_allclose(joined[0], apart[0], rtol=1e-6)
    assert_close(joined[1], apart[1])


@pytest.mark.parametrize(
    ("mesh", "fields", "joined"),
    [
        ((1, 1, 2, 1, False, False), {"gather_dtype": "bfloat16"}, True),
        ((2, 1, 2, 1, True, False), {"dtype": "bfloat16"}, True),
        ((1, 1, 2, 1, False, False), {}, False),  # nothing is cast, so standing beside each other would be a copy
        ((1, 1, 2, 2, False, True), {"dtype": "bfloat16"}, False),  # tensor has parts of both
        ((1, 1, 2, 1, False, False), {"dtype": "bfloat16", "gated": False}, False),
    ],
)
def test_what_stands_beside_each_other(
    mesh: tuple[int, int, int, int, bool, bool], fields: dict[str, Any], joined: bool
) -> None:
    config = tiny(mesh, **{"gated": True, "use_bias": True} | fields)
    with on_mesh(config):
        weights = jax.eval_shape(lambda: _values(moe.MoE(config, jax.random.key(0)).experts.weights(config)))
    both = config.model.gated and not joined
    assert ("w_gate_eRF" in weights, "b_gate_eF" in weights) == (both, both)
    assert weights["w_in_eRF"].shape[2] == (2 if joined else 1) * config.model.expert_width
    assert weights["b_in_eF"].shape[1] == (2 if joined else 1) * config.model.expert_width


def _values(weights: dict[str, Any]) -> dict[str, Array]:
    return {name: weight.value for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("dtype", "reduced", "fsdp", "remat", "gathered", "given"),
    [
        ("bfloat16", "float32", False, "none", "bfloat16", "float32"),
        ("bfloat16", "float32", True, "layer", "bfloat16", "float32"),
        ("bfloat16", "float32", True, "none", "bfloat16", "bfloat16"),  # the backward pass would keep the cast copy
        ("bfloat16", "bfloat16", False, "none", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", False, "none", "float32", "float32"),
        ("float32", "float32", False, "layer", "float32", "float32"),
    ],
)
def test_kernels_are_given_the_dtype_that_gradients_are_summed_in(
    dtype: str, reduced: str, fsdp: bool, remat: str, gathered: str, given: str
) -> None:
    config = tiny((1, 1, 1, 1, fsdp), dtype=dtype, reduce_dtype=reduced, remat=remat, use_bias=True)
    with on_mesh(config):
        weights = abstract_layer(config).experts.weights(config)
    assert weights.keys() == {"w_in_eRF", "w_out_eFR", "b_in_eF", "b_out_eR"}
    assert {w.crossing.compute for w in weights.values()} == {given}
    assert {w.crossing.gather for w in weights.values()} == {gathered}


def test_the_kernel_alone_gives_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is differentiated, and nothing is kept for it."""
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "tpu")
    of = jax.ShapeDtypeStruct
    given = of((512, 128), jnp.bfloat16), of((4, 128, 256), jnp.float32), of((4,), jnp.int32)
    assert jax.eval_shape(grouped_matmul.grouped_matmul, *given) == of((512, 256), jnp.bfloat16)
