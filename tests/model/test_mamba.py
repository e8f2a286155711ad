"""The Mamba mixer against a recurrence that goes step by step, and its adjoint, in float64 NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ConfigError, MeshConfig, ModelConfig
from bigmac_jax.model.attention import Documents, find_documents
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mamba import Mamba, Past, Projected, mix, token_products
from bigmac_jax.model.mesh import BATCH, TENSOR, batch_spec, make_mesh, placed, split_spec
from bigmac_jax.model.state_space import Steps, gated_norm, scan_states, time_step
from bigmac_jax.planning import hlo
from bigmac_jax.planning.hlo_flops import matmul_flops

from .tools import assert_close, leaves, on_mesh, split_batch, split_tokens, tiny

CONVOLUTIONS = {"inner": "conv_inner", "b": "conv_b", "c": "conv_c"}
Values = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def d_silu(x: np.ndarray) -> np.ndarray:
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def expected(m: ModelConfig, p: Values, x_BLD: np.ndarray, position_BL: np.ndarray, dy_BLD: np.ndarray) -> Values:
    """The layer's output y, dx, and the gradients of y · dy by name: derived by hand, one position at a time."""
    p = {name: value.astype(np.float64) for name, value in p.items()}
    x_BLD, dy_BLD = x_BLD.astype(np.float64), dy_BLD.astype(np.float64)
    B, L, _ = x_BLD.shape
    N, H, G, S, K = m.mamba_head_count, m.mamba_head_dim, m.mamba_groups, m.mamba_state, m.mamba_conv
    of = {"F": 0.0}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[f"{name}.w_DF"] + p.get(f"{name}.b_F", of["F"])

    projected = {name: linear(name, x_BLD) for name in ("gate", "inner", "b", "c", "time")}
    before, after = {}, {}  # SiLU
    for name, conv in CONVOLUTIONS.items():
        u = np.zeros_like(projected[name]) + p.get(f"{conv}_bias_F", 0.0)
        for at in range(L):
            for back in range(K):
                whole = position_BL[:, at] >= back
                if at >= back:
                    u[:, at] += whole[:, None] * p[f"{conv}_KF"][K - 1 - back] * projected[name][:, at - back]
        before[name], after[name] = u, silu(u)
    raw = np.logaddexp(0, projected["time"] + p["time_bias_N"])
    dt = np.clip(raw, m.mamba_least_step, m.mamba_most_step)
    a = -np.exp(p["a_log_N"])
    decay = np.exp(a * dt) * (position_BL > 0)[:, :, None]
    x = after["inner"].reshape(B, L, N, H)
    b, c = (np.repeat(after[name].reshape(B, L, G, S), N // G, axis=2) for name in ("b", "c"))
    h = np.zeros((B, L + 1, N, H, S))  # h[:, at] is the state before that position
    y = np.zeros((B, L, N, H))
    for at in range(L):
        added = (dt[:, at, :, None] * x[:, at])[..., None] * b[:, at, :, None]
        h[:, at + 1] = decay[:, at, :, None, None] * h[:, at] + added
        y[:, at] = (h[:, at + 1] * c[:, at, :, None]).sum(-1)
    v = (y + p["skip_N"][:, None] * x).reshape(B, L, -1)
    w = (v * silu(projected["gate"])).reshape(B, L, G, -1)
    r = 1 / np.sqrt((w * w).mean(-1, keepdims=True) + m.norm_eps)
    n = w * r
    scale = p["norm.scale_D"].reshape(G, -1)
    out = (n * scale).reshape(B, L, -1)
    found = {"y": linear("out", out)}

    def linear_back(name: str, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        found[f"{name}.w_DF"] = np.einsum("blx,bly->xy", x, d)
        if f"{name}.b_F" in p:
            found[f"{name}.b_F"] = d.sum((0, 1))
        return d @ p[f"{name}.w_DF"].T

    d_out = linear_back("out", out, dy_BLD).reshape(B, L, G, -1)
    found["norm.scale_D"] = (d_out * n).sum((0, 1)).reshape(-1)
    dn = d_out * scale
    dw = (r * (dn - n * (dn * n).mean(-1, keepdims=True))).reshape(B, L, -1)
    d = {"gate": dw * v * d_silu(projected["gate"])}
    dv = (dw * silu(projected["gate"])).reshape(B, L, N, H)
    found["skip_N"] = (dv * x).sum((0, 1, 3))
    dx = dv * p["skip_N"][:, None]
    d_dt, da = np.zeros_like(dt), np.zeros_like(a)
    db, dc = np.zeros_like(b), np.zeros_like(c)
    dh = np.zeros((B, N, H, S))
    for at in reversed(range(L)):
        dh += dv[:, at, ..., None] * c[:, at, :, None]
        dc[:, at] = (dv[:, at, ..., None] * h[:, at + 1]).sum(2)
        d_dt[:, at] = (dh * x[:, at, ..., None] * b[:, at, :, None]).sum((2, 3))
        dx[:, at] += dt[:, at, :, None] * (dh * b[:, at, :, None]).sum(3)
        db[:, at] = dt[:, at, :, None] * (dh * x[:, at, ..., None]).sum(2)
        d_log = (dh * h[:, at]).sum((2, 3)) * decay[:, at]
        d_dt[:, at] += d_log * a
        da += (d_log * dt[:, at]).sum(0)
        dh = dh * decay[:, at, :, None, None]
    found["a_log_N"] = da * a
    d["time"] = d_dt * (dt == raw) * sigmoid(projected["time"] + p["time_bias_N"])
    found["time_bias_N"] = d["time"].sum((0, 1))
    of_heads = {"inner": dx.reshape(B, L, -1)}
    of_heads |= {name: g.reshape(B, L, G, N // G, S).sum(3).reshape(B, L, -1) for name, g in (("b", db), ("c", dc))}
    for name, conv in CONVOLUTIONS.items():
        du = of_heads[name] * d_silu(before[name])
        if f"{conv}_bias_F" in p:
            found[f"{conv}_bias_F"] = du.sum((0, 1))
        d[name], found[f"{conv}_KF"] = np.zeros_like(du), np.zeros_like(p[f"{conv}_KF"])
        for at in range(L):
            for back in range(min(K, at + 1)):
                whole = du[:, at] * (position_BL[:, at] >= back)[:, None]
                found[f"{conv}_KF"][K - 1 - back] += (whole * projected[name][:, at - back]).sum(0)
                d[name][:, at - back] += whole * p[f"{conv}_KF"][K - 1 - back]
    found["dx"] = sum(linear_back(name, x_BLD, d[name]) for name in projected)
    return found


def small(mesh: tuple[int, ...] = (1, 1, 1), length: int = 8, batch: int = 2, **fields: Any) -> Config:
    sizes = {"mamba_head_dim": 4, "mamba_heads": 8, "mamba_groups": 2, "mamba_state": 6, "blocks": "M-"}
    return tiny(mesh, batch, length, structure="dense", **sizes | fields)


def random_layer(config: Config, steps: float = 0.0, rates: float = 0.0, spread: float = 1.0) -> Mamba:
    """A layer on the current mesh whose every parameter is random; `steps` and `rates` are added to the steps' biases,
    which `spread` multiplies, and to a_log."""
    draw = np.random.default_rng(0).standard_normal

    def fill(path: Any, leaf: Any) -> jax.Array:
        name, value = jax.tree_util.keystr(path), draw(leaf.shape).astype(np.float32)
        if "time_bias" in name:
            value = spread * value + steps
        elif "a_log" in name:
            value = 0.5 * value + rates
        elif "scale" in name or "skip" in name:
            value = 1 + 0.3 * value
        elif "w_DF" in name:
            value /= np.sqrt(leaf.shape[0])
        else:
            value *= 0.5
        return jax.device_put(value, leaf.sharding)

    abstract = jax.eval_shape(lambda: Mamba(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, placed(abstract, make_mesh(config)))


def inputs(config: Config) -> tuple[np.ndarray, np.ndarray]:
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    x, dy = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    return x, dy


def segments_of(config: Config) -> np.ndarray:
    """Documents of all lengths from one token on, each row's others."""
    B, L = config.data.batch_size, config.data.sequence_length
    draw = np.random.default_rng(2)
    begins = draw.random((B, L)) < np.linspace(0.1, 0.4, L)
    begins[:, 3:5] = True  # a document of one token
    return np.cumsum(begins, axis=1).astype(np.int32)


def positions_of(segments_BL: np.ndarray) -> np.ndarray:
    found = np.zeros_like(segments_BL)
    for row, segments in zip(found, segments_BL, strict=True):
        for at in range(1, len(row)):
            row[at] = row[at - 1] + 1 if segments[at] == segments[at - 1] else 0
    return found


def computed(config: Config, segments_BL: np.ndarray | None, **random: float) -> tuple[Values, Values]:
    """(y, dx and the gradients, the parameters)"""
    x_BLD, dy_BLD = inputs(config)

    def loss(layer: Mamba, x_BLD: jax.Array, dy_BLD: jax.Array, documents: Documents | None) -> Any:
        y_BLD = layer(x_BLD, documents)
        return jnp.sum((y_BLD * dy_BLD).astype(jnp.float32)), y_BLD

    with on_mesh(config):
        layer = random_layer(config, **random)
        documents = None if segments_BL is None else find_documents(split_batch(segments_BL))
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        dtype = config.execution.dtype
        x_BLD, dy_BLD = (split_tokens(jnp.asarray(v, dtype)) for v in (x_BLD, dy_BLD))
        (gradient, dx), y = step(layer, x_BLD, dy_BLD, documents)
        return leaves(gradient) | {"y": np.asarray(y), "dx": np.asarray(dx)}, leaves(layer)


def compare(config: Config, documents: bool, tolerance: float = 1e-5, **random: float) -> None:
    segments_BL = segments_of(config) if documents else None
    found, values = computed(config, segments_BL, **random)
    shape = config.data.batch_size, config.data.sequence_length
    plain_BL = np.broadcast_to(np.arange(shape[1]), shape)
    position_BL = plain_BL if segments_BL is None else positions_of(segments_BL)
    x_BLD, dy_BLD = inputs(config)
    assert_close(found, expected(config.model, values, x_BLD, position_BL, dy_BLD), tolerance)


# Lengths that are no whole chunks, chunks longer than a sequence and of one position; one group, and a group a head.
CASES = [
    {"length": 19, "mamba_chunk": 8, "documents": True, "mamba_bias": True},
]
MORE: list[dict[str, Any]] = [
    {"length": 13, "mamba_chunk": 128, "mamba_groups": 1, "mamba_conv_bias": False},
    {"length": 7, "mamba_chunk": 1, "documents": True},
    {"length": 2, "mamba_chunk": 4, "mamba_conv": 5},
    {"length": 16, "mamba_chunk": 4, "mamba_groups": 8, "documents": True, "mamba_conv": 2},
    {"length": 37, "mamba_chunk": 5, "mamba_groups": 4, "mamba_head_dim": 3, "mamba_state": 1, "documents": True},
    {"length": 33, "mamba_chunk": 32, "mamba_least_step": 0.3, "mamba_most_step": 0.8},
    {"length": 24, "mamba_chunk": 8, "mamba_heads": 0, "mamba_head_dim": 8, "mamba_groups": 1},
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)], ids=str)
def test_the_layer_is_the_recurrence(case: dict[str, Any]) -> None:
    case = dict(case)
    documents = case.pop("documents", False)
    compare(small(**case), documents)


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 2, 2),
        *(
            pytest.param(mesh, marks=pytest.mark.full)
            for mesh in ((1, 1, 4), (1, 1, 1, 4), (1, 2, 1, 2), (2, 2, 2), (2, 1, 2, 2, True), (8, 1, 1, 1, True))
        ),
    ],
)
@pytest.mark.parametrize("documents", [True, pytest.param(False, marks=pytest.mark.full)])
def test_on_a_mesh(mesh: tuple[int, ...], documents: bool) -> None:
    """Heads and groups over `tensor`, the batch over all others."""
    config = small(mesh, length=12, batch=8, mamba_groups=4, mamba_chunk=5, mamba_bias=True)
    compare(config, documents)


@pytest.mark.full
def test_long_sequences_and_steps_of_all_sizes() -> None:
    """Decays from 1 to nothing in one chunk."""
    compare(small(length=300, mamba_chunk=128), documents=True, spread=8.0, rates=2.0)
    compare(small(length=300, mamba_chunk=128), documents=False, steps=-6.0, rates=3.0)


def scanned(logs: np.ndarray, chunk: int, x: float = 1.0, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    """y and the last state of one head of one number whose inputs are all `x` and whose decays are exp(logs); and the
    gradients of the sum of all y."""
    one_BLF = jnp.ones((1, len(logs), 1), dtype)

    def run(steps: Steps) -> Any:
        y_BLI, state_BNPS = scan_states(steps, jnp.zeros((1, 1, 1, 1)), chunk, position_BL=None)
        return y_BLI.sum(), (y_BLI[0, :, 0], state_BNPS[0, 0, 0, 0])

    steps = Steps(
        x * one_BLF, jnp.ones((1, len(logs), 1)), jnp.asarray(logs, jnp.float32)[None, :, None], one_BLF, one_BLF
    )
    gradient, (y, state) = jax.jit(jax.grad(run, has_aux=True))(steps)
    return np.asarray(y), np.asarray(state), gradient


def test_no_decay_is_too_strong() -> None:
    """States that are forgotten at once: no exponent overflows, no gradient is NaN, and what the chunk remembers beside
    them is as exact as ever."""
    logs = np.where(np.arange(64) % 7 == 0, -1e30, -0.01)
    y, _, gradient = scanned(logs, 64)
    state, expected = 0.0, []
    for log in logs:
        state = np.exp(log) * state + 1
        expected.append(state)
    np.testing.assert_allclose(y, expected, rtol=1e-3)
    assert all(np.isfinite(v.astype(np.float32)).all() for v in gradient)


@pytest.mark.parametrize("chunk", [4, 512])
def test_sums_and_states_are_float32(chunk: int) -> None:
    """1,000 inputs that bfloat16 holds, and whose sum it doesn't."""
    y, state, _ = scanned(np.zeros(1000), chunk, x=1 + 2**-7, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and state.dtype == np.float32
    assert state == 1000 * (1 + 2**-7)


def pieces(config: Config, counts_PB: np.ndarray, C: int) -> tuple[Values, Values]:
    """Whole sequences at once, and in pieces of C tokens of which rows have `counts_PB`: what comes out, and the last
    past."""
    layer_inputs = inputs(config)[0]

    def whole(layer: Mamba, x_BLD: jax.Array) -> Any:
        count_B = split_batch(np.full(len(x_BLD), x_BLD.shape[1], np.int32))
        return on_rows(layer, x_BLD, None, count_B)

    def on_rows(layer: Mamba, x_BLD: jax.Array, past: Past | None, count_B: jax.Array) -> Any:
        projected, given = layer.project(x_BLD), [*past] if past else []

        def on_rank(*arrays: Any) -> Any:
            projected, (*past, count_B, weights) = Projected(*arrays[:5]), arrays[5:]
            return mix(config, projected, weights, Past(*past) if past else None, count_B)

        specs = [split_spec(3)] * 3 + [P(BATCH, TENSOR, None, None)]
        return on_each_rank(
            on_rank,
            (*projected, *given, count_B),
            [layer._weights()],
            in_spec=(*[split_spec(3)] * 5, *specs[: len(given)], batch_spec(1)),
            out_specs=(split_spec(3), Past(*specs)),
        )

    with on_mesh(config):
        layer = random_layer(config)
        y_BLI, last = jax.jit(whole)(layer, split_tokens(layer_inputs))
        step = jax.jit(on_rows)
        B, L, D = layer_inputs.shape
        done_B, found_BLI, past = np.zeros(B, int), np.zeros(y_BLI.shape, np.float32), None
        for count_B in counts_PB:
            x_BCD = np.full((B, C, D), 1e3, np.float32)  # what no count covers is never read
            for row, (start, count) in enumerate(zip(done_B, count_B, strict=True)):
                x_BCD[row, :count] = layer_inputs[row, start : start + count]
            y_BCI, past = step(layer, split_tokens(x_BCD), past, split_batch(count_B.astype(np.int32)))
            for row, (start, count) in enumerate(zip(done_B, count_B, strict=True)):
                found_BLI[row, start : start + count] = np.asarray(y_BCI)[row, :count]
            done_B += count_B
        assert (done_B == L).all() and past is not None
        return {"y": found_BLI, **past._asdict()}, {"y": np.asarray(y_BLI), **last._asdict()}


@pytest.mark.parametrize(
    ("mesh", "C", "chunk"),
    [
        ((1, 1, 1), 5, 3),
        *(pytest.param(*case, marks=pytest.mark.full) for case in [((1, 1, 2, 2), 4, 8), ((1, 1, 1), 1, 8)]),
    ],
)
def test_pieces_are_the_whole(mesh: tuple[int, ...], C: int, chunk: int) -> None:
    """Rows of a decoding step have other numbers of tokens, none among them."""
    config = small(mesh, length=12, batch=4, mamba_chunk=chunk)
    draw, left_B, counts = np.random.default_rng(5), np.full(4, 12), []
    while left_B.any():
        counts.append(np.minimum(draw.integers(0, C + 1, 4), left_B))
        left_B = left_B - counts[-1]
    assert_close(*pieces(config, np.array(counts), C))


@pytest.mark.full
def test_in_bfloat16() -> None:
    for chunk in (16, 128):
        config = small(length=200, mamba_chunk=chunk, dtype="bfloat16")
        found, values = computed(config, segments_of(config), steps=-3.0)
        position_BL = positions_of(segments_of(config))
        x_BLD, dy_BLD = (np.asarray(jnp.asarray(v, "bfloat16"), np.float32) for v in inputs(config))
        assert_close(found, expected(config.model, values, x_BLD, position_BL, dy_BLD), 0.03)


def test_what_it_starts_as() -> None:
    config = small(mamba_heads=256, mamba_groups=1, mamba_state=8, mamba_bias=True)
    with on_mesh(config):
        values = leaves(jax.jit(lambda: Mamba(config, jax.random.key(0)))())
    rates, steps = np.exp(values["a_log_N"]), np.logaddexp(0, values["time_bias_N"])
    assert 1 <= rates.min() < 1.5 and 15 < rates.max() <= 16 and 8 < rates.mean() < 9
    assert 1e-3 <= steps.min() * 1.001 < 1.2e-3 and 0.08 < steps.max() <= 0.1 * 1.001
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.2
    assert (values["skip_N"] == 1).all() and (values["norm.scale_D"] == 1).all()
    assert (values["conv_inner_bias_F"] == 0).all() and (values["time.b_F"] == 0).all()
    for name in ("conv_inner_KF", "conv_b_KF", "conv_c_KF"):
        assert 0.4 < np.abs(values[name]).max() <= 0.5, name
        assert values[name].min() < -0.4 and abs(values[name].mean()) < 0.1, name
    # No two are of one key: its numbers stand in one order, whatever they are drawn as.
    drawn = [value for value in values.values() if value.std()]
    assert len(drawn) == len({tuple(np.argsort(value.ravel()[:8])) for value in drawn}) == 11


def test_the_gated_norm_and_its_least_denominator() -> None:
    """Against NumPy, of two groups; eps stands beside the mean square, which it is as large as here."""
    rng = np.random.default_rng(0)
    y, x, gate = rng.standard_normal((3, 2, 3, 8)).astype(np.float32)
    skip, scale = rng.standard_normal(4).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float32)
    gated = ((y + np.repeat(skip, 2) * x) * silu(gate)).reshape(2, 3, 2, 4)
    normed = gated / np.sqrt(np.square(gated).mean(-1, keepdims=True) + 0.5) * scale
    found = gated_norm(0.5, *map(jnp.asarray, (y, x, gate, skip, scale)))
    np.testing.assert_allclose(found, normed.reshape(y.shape), rtol=1e-5, atol=1e-6)


def test_steps_of_time_are_held_and_end_with_a_row() -> None:
    """softplus(time + bias) between a least and a most step, exactly 0 behind a row's tokens."""
    time = np.array([[[-9.0, 0.0], [0.5, 9.0], [1.0, -9.0]]] * 4, np.float32)
    bias, counts = np.array([0.25, -0.25], np.float32), np.array([0, 1, 2, 3], np.int32)
    held = np.clip(np.logaddexp(0, time + bias), 0.1, 2.0)
    given = jnp.asarray(time), jnp.asarray(bias), 0.1, 2.0
    np.testing.assert_allclose(time_step(*given, None), held, rtol=1e-6)
    kept = held * (np.arange(3) < counts[:, None])[..., None]
    np.testing.assert_allclose(time_step(*given, jnp.asarray(counts)), kept, rtol=1e-6)


@pytest.mark.full
def test_products_are_counted() -> None:
    """As many as the program has, of chunks that divide the length."""
    config = small(length=16, mamba_chunk=8)
    with on_mesh(config):
        x_BLD = split_tokens(inputs(config)[0])
        program = jax.jit(lambda layer, x_BLD: layer(x_BLD)).lower(random_layer(config), x_BLD).compile()
    found = matmul_flops(hlo.parse(program.as_text())).total
    assert found == 2 * 2 * 16 * sum(token_products(config.model, 8).values())


@pytest.mark.parametrize(
    ("fields", "mesh", "parts"),
    [
        ({"mamba_groups": 3}, {}, ("model.mamba_heads=8", "multiple of model.mamba_groups=3", "use 2 or 4 groups")),
        ({"mamba_heads": 0, "mamba_head_dim": 5}, {}, ("2 × model.hidden_size = 32", "mamba_head_dim=5", "use")),
        ({"mamba_least_step": 2.0, "mamba_most_step": 1.0}, {}, ("mamba_least_step=2", "below", "mamba_most_step=1")),
        ({}, {"tensor": 4}, ("model.mamba_groups=2", "multiple of mesh.tensor=4", "use mesh.tensor=2")),
    ],
)
def test_sizes_that_do_not_fit(fields: dict[str, Any], mesh: dict[str, int], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(small(**fields), mesh=MeshConfig(data=1, **mesh))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    small(blocks="", **fields)  # of a model without Mamba layers nothing is asked
