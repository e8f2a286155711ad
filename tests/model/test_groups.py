"""Rows grouped by expert: a hand-worked table, and the experts behind it at every skew."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.model.exchange import rows
from bigmac_jax.model.experts import grouped_mlp, sort_for_kernel
from bigmac_jax.model.groups import group, sort

from .tools import assert_close, pairwise, tiny


@pytest.mark.parametrize(
    ("even", "slots", "even_choices", "block_choices", "block_experts", "sizes"),
    [
        # Expert 0 has the choices 1, 4, 7, expert 1 none, expert 2 the choices 0, 3, 6; 8 choices in all, 3: elsewhere.
        # Blocks of two slots: (8 + 3 · 1) // 2 = 5.
        (0, [[4, 0], [10, 5], [1, 10], [6, 2]], [[], [], []],
         [[1, 4], [7, 8], [0, 3], [6, 8], [8, 8]], [0, 0, 2, 2, 2], [4, 0, 4]),
        (1, [[2, 0], [13, 5], [3, 13], [6, 4]], [[1], [8], [0]],
         [[4, 7], [3, 6], [8, 8], [8, 8], [8, 8]], [0, 2, 2, 2, 2], [2, 0, 2]),
        (2, [[4, 0], [16, 5], [1, 16], [8, 6]], [[1, 4], [8, 8], [0, 3]],
         [[7, 8], [6, 8], [8, 8], [8, 8], [8, 8]], [0, 2, 2, 2, 2], [2, 0, 2]),
        (3, [[6, 0], [19, 7], [1, 19], [8, 2]], [[1, 4, 7], [8, 8, 8], [0, 3, 6]],
         [[8, 8]] * 5, [2] * 5, [0, 0, 0]),
    ],
)  # fmt: skip
def test_groups(
    even: int, slots: list, even_choices: list, block_choices: list, block_experts: list, sizes: list
) -> None:
    """Four rows, two choices, three local experts."""
    expert_NK = np.array([[2, 0], [3, 2], [0, 3], [2, 0]], np.int32)
    groups = jax.jit(lambda experts: group(experts, 3, even, 2))(expert_NK)
    assert groups.slot_NK.tolist() == slots
    assert groups.even_eC.tolist() == even_choices
    assert groups.block_nb.tolist() == block_choices
    assert groups.expert_n.tolist() == block_experts
    assert groups.sizes_e.tolist() == sizes


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_bins(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3, 0, 2 and 0 positions."""
    monkeypatch.setattr(rows, "platform", lambda: where)
    found = rows.bin_of(jnp.arange(7, dtype=jnp.int32), jnp.asarray([3, 3, 5, 5], jnp.int32))
    assert found.dtype == jnp.int32 and found.tolist() == [0, 0, 0, 2, 2, 4, 4]


def test_sort() -> None:
    """The same choices without gaps, in seven slots and one that is left."""
    expert_NK = np.array([[2, 0], [3, 2], [0, 3], [2, 0]], np.int32)
    by_expert = jax.jit(lambda experts: sort(experts, 3, 8))(expert_NK)
    assert by_expert.slot_NK.tolist() == [[3, 0], [8, 4], [1, 8], [5, 2]]
    assert by_expert.choice_M.tolist() == [1, 4, 7, 0, 3, 6, 8, 8]
    assert by_expert.expert_M.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert by_expert.sizes_e.tolist() == [3, 0, 3]


def test_groups_of_a_bound() -> None:
    """Where at most three choices are local there are blocks for three, and not for all twelve."""
    expert_NK = jnp.asarray([[2, 0], [3, 3], [3, 3], [3, 3], [2, 3], [3, 3]], jnp.int32)
    bounded, whole = group(expert_NK, 3, 0, 2, 3), group(expert_NK, 3, 0, 2)
    assert (len(bounded.expert_n), len(whole.expert_n)) == (3, 7)  # (3 + 3·1) / 2, (12 + 3·1) / 2
    assert bounded.block_nb.tolist() == [[1, 12], [0, 8], [12, 12]]
    assert bounded.slot_NK.tolist() == [[2, 0], [6, 6], [6, 6], [6, 6], [3, 6], [6, 6]]
    assert sort_for_kernel(expert_NK, 3, 3).choice_M.tolist() == [1, 0, 8]


def test_sort_into_fewer_slots_than_choices() -> None:
    """One local expert, which a row chooses at most once; and more slots than choices."""
    expert_NK = np.array([[1, 0], [0, 1], [1, 1]], np.int32)
    by_expert = sort(jnp.asarray(expert_NK), 1, 3)
    assert (by_expert.slot_NK.tolist(), by_expert.choice_M.tolist()) == ([[3, 0], [1, 3], [3, 3]], [1, 2, 6])
    by_expert = sort(jnp.asarray(expert_NK), 1, 8)
    assert by_expert.slot_NK.tolist() == [[8, 0], [1, 8], [8, 8]]
    assert by_expert.choice_M.tolist() == [1, 2, *[6] * 6]
    assert by_expert.expert_M.tolist() == [0] * 8


SKEWS = ("uniform", "one", "elsewhere")


def chosen(skew: str, N: int, K: int, experts: int) -> np.ndarray:
    """Local experts of each row: at random, all the last ones, or almost all elsewhere."""
    score = np.random.default_rng(0).random((N, 2 * experts))
    if skew == "one":
        score[:, experts - K : experts] += 1  # behind all empty ones, whose blocks they would get
    if skew == "elsewhere":
        score[3:, experts:] += 1
    return np.minimum(np.argsort(-score, axis=1)[:, :K], experts).astype(np.int32)


LAYOUTS = (
    ("batched", 48, 0), ("batched", 48, 9), ("batched", 48, 24), ("blocks", 48, 9), ("kernel", 48, 9),
    ("batched", 1, 0), ("kernel", 1, 0),  # fewer choices than experts
)  # fmt: skip
COVERING = pairwise(SKEWS, LAYOUTS, (False, True))


@pytest.mark.parametrize(
    ("skew", "layout", "gated"),
    [
        pytest.param(*case, marks=() if case in COVERING[::2] else pytest.mark.full)
        for case in itertools.product(SKEWS, LAYOUTS, (False, True))
    ],
)
def test_every_choice_is_computed_once(skew: str, layout: tuple[str, int, int], gated: bool) -> None:
    """y_n = Σ_k g_nk · E_k(x_n), and every gradient, with any number of even slots and rounds of blocks."""
    (implementation, N, share), K, e, R, F = layout, 3, 5, 6, 7
    config = tiny(grouped_matmul=implementation, activation="silu", gated=gated)
    rng = np.random.default_rng(1)
    names = {"w_in_eRF": (e, R, F), "w_out_eFR": (e, F, R), "b_in_eF": (e, F), "b_out_eR": (e, R)}
    if gated:
        names |= {"w_gate_eRF": (e, R, F), "b_gate_eF": (e, F)}
    w = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in names.items()}
    x, dy = (jnp.asarray(rng.standard_normal((N, R)), jnp.float32) for _ in range(2))
    gate, expert_NK = jnp.asarray(rng.random((N, K)), jnp.float32), chosen(skew, N, K, e)

    def reference(w: dict, x: jax.Array, gate: jax.Array) -> jax.Array:
        y = jnp.zeros((N, R))
        for i in range(e):
            hidden = x @ w["w_in_eRF"][i] + w["b_in_eF"][i][None]
            branch = x @ w["w_gate_eRF"][i] + w["b_gate_eF"][i][None] if gated else hidden
            active = branch * jax.nn.sigmoid(branch) * (hidden if gated else 1)
            weight = jnp.where(expert_NK == i, gate, 0).sum(1, keepdims=True)
            y = y + weight * (active @ w["w_out_eFR"][i] + w["b_out_eR"][i][None])
        return y

    def results(function: object, w: dict, x: jax.Array, gate: jax.Array) -> dict[str, jax.Array]:
        y, pull = jax.vjp(function, w, x, gate)  # type: ignore[arg-type]
        dw, dx, d_gate = pull(dy)
        return dw | {"y": y, "dx": dx, "d_gate": d_gate}

    def layer(w: dict, x: jax.Array, gate: jax.Array) -> jax.Array:
        return grouped_mlp(config, w, x, gate, jnp.asarray(expert_NK), share)

    actual = jax.jit(lambda *a: results(layer, *a))(w, x, gate)
    assert_close(actual, results(reference, w, x, gate))


def test_the_work_follows_the_rows() -> None:
    """Rounds end behind the last filled block: NaN in a row that no expert is asked for reaches nothing."""
    config = tiny(grouped_matmul="batched")
    w = {"w_in_eRF": jnp.ones((2, 3, 4)), "w_out_eFR": jnp.ones((2, 4, 3))}
    x = jnp.ones((8, 3)).at[5].set(math.nan)
    expert_NK = jnp.full((8, 1), 2).at[0, 0].set(1)
    y = grouped_mlp(config, w, x, jnp.ones((8, 1)), expert_NK, 1)
    np.testing.assert_array_equal(y[0], np.full(3, 36.0))  # (3 · 1)² · 4
    assert not np.asarray(y[1:]).any()


@pytest.mark.parametrize("implementation", ["batched", "blocks", "kernel"])
def test_an_experts_blocks_add_up_in_float32(implementation: str) -> None:
    """Hundreds of blocks of one expert, whose sum in bfloat16 is off by 11 % (`blocks`) and 0.4 % (`batched`) here."""
    N, e, R, F = 32_768, 8, 4, 4
    shapes = {"w_in_eRF": (e, R, F), "w_out_eFR": (e, F, R)}
    config = tiny(grouped_matmul=implementation)
    rng = np.random.default_rng(0)
    w = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x, expert_NK = jnp.asarray(1 + rng.standard_normal((N, R)), jnp.float32), jnp.zeros((N, 1), jnp.int32)

    def gradient(dtype: str) -> dict[str, jax.Array]:
        def loss(w: dict) -> jax.Array:
            return grouped_mlp(config, w, x.astype(dtype), jnp.ones((N, 1)), expert_NK, N // e).sum(dtype=jnp.float32)

        return jax.jit(jax.grad(loss))(w)

    assert_close(gradient("bfloat16"), gradient("float32"), 0.003)


@pytest.mark.parametrize(("block", "blocks"), [(4, 11), (1, 32), (32, 4), (100, 4)])
def test_as_many_blocks_as_can_be_filled(block: int, blocks: int) -> None:
    """Of 32 choices of four experts: whole ones, and each expert's last one, of a single row."""
    made = jax.eval_shape(lambda expert_NK: group(expert_NK, 4, 0, block), jax.ShapeDtypeStruct((16, 2), "int32"))
    assert made.block_nb.shape == (blocks, min(block, 32)) and made.expert_n.shape == (blocks,)
