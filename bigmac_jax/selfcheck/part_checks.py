"""Checks of the parts that depend on the hardware, each against NumPy in float64.

All devices compute; a check of one device's part gives each of them the same data. N rows with K choices each among e
local experts, B batch, L length, H head size, G key-value heads, D hidden, R row width, F expert hidden, S ranks.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.experts import grouped_mlp
from bigmac_jax.model.kernels.flash_attention import causal_attention
from bigmac_jax.model.kernels.paged_attention import paged_attention
from bigmac_jax.model.mesh import batch_spec, make_mesh, place, token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.selfcheck import numpy_reference
from bigmac_jax.selfcheck.on_devices import (
    MismatchError,
    compare,
    compile_program,
    execute,
    replicate,
    run_on_each,
    tiny_config,
)
from bigmac_jax.training.step import make_trainer

# The largest max|a - b| over max|b| that counts as rounding. Float32 is multiplied in float32 (precision highest),
# bfloat16 as it is in training. A wrong row or a sum that lacks a rank is off by a tenth or more.
BOUNDS = {"float32": 3e-5, "bfloat16": 3e-2}
NORM_BOUND = 1e-4  # for the gradient's norm on all devices, relative to one device's


def check_experts(devices: Sequence[Any], dropless: bool, dtype: str) -> str:
    """Checks values and gradients of one rank's experts: rows sorted here, or as a capacity exchange gives them, C of
    each of S ranks for each expert.

    Of the dropless choices most fall on one expert, some on none that is here, and two experts get none.
    """
    S, C, K, e, R, F = 2, 32, 2, 8, 128, 256
    N = 192 if dropless else S * e * C
    draw = np.random.default_rng(0)
    x_NR, dy_NR = (draw.standard_normal((N, R)) for _ in range(2))
    gate_NK, expert_NK = np.ones((N, 1)), np.tile(np.repeat(np.arange(e), C), S)[:, None]
    if dropless:
        gate_NK = draw.random((N, K))
        expert_NK = np.stack([np.where(np.arange(N) % 3, 1, 3), draw.choice([0, 2, 5, 6, e], N)], 1)
    w = {
        "w_in_eRF": draw.standard_normal((e, R, F)) / math.sqrt(R),
        "w_out_eFR": draw.standard_normal((e, F, R)) / math.sqrt(F),
        "b_in_eF": draw.standard_normal((e, F)),
        "b_out_eR": draw.standard_normal((e, R)),
    }
    config = tiny_config(len(devices), use_bias=True, dtype=dtype)
    expert_NK = expert_NK.astype(np.int32)
    given = {"x": x_NR, "dy": dy_NR, "gate": gate_NK} | w
    arrays = {name: value.astype(jnp.dtype(dtype)) for name, value in given.items()}

    def on_rank(values: Mapping[str, Array], expert_NK: Array) -> dict[str, Array]:
        def mlp(x_NR: Array, gate_NK: Array, w: dict[str, Array]) -> Array:
            if dropless:
                return grouped_mlp(config, w, x_NR, gate_NK, expert_NK, N * K // e)
            return grouped_mlp(config, w, x_NR.reshape(S, e, C, R), None, None, N // e).reshape(x_NR.shape)

        y, pull = jax.vjp(mlp, values["x"], values["gate"], {name: values[name] for name in w})
        dx, d_gate, dw = pull(values["dy"])
        gradients = {"y": y, "dx": dx} | {f"d_{name}": value for name, value in dw.items()}
        return gradients | ({"d_gate": d_gate} if dropless else {})

    actual = run_on_each(make_mesh(config, devices=devices), dtype, on_rank, arrays, expert_NK)
    expected = numpy_reference.experts(
        {name: arrays[name] for name in w}, arrays["x"], arrays["gate"], expert_NK, arrays["dy"]
    )
    return compare(actual, {name: expected[name] for name in actual}, BOUNDS[dtype])


def check_attention(devices: Sequence[Any], implementation: str, dtype: str) -> str:
    """Compares attention's values and gradients with NumPy's, with two query heads to a key-value head → a line that
    says how far they are apart.

    Raises:
      MismatchError: they are farther apart than the dtype's bound.
    """
    B, L, N, G, H = 1, 320, 4, 2, 64
    draw = np.random.default_rng(1).standard_normal
    shapes = {"q": (B, L, N, H), "k": (B, L, G, H), "v": (B, L, G, H), "dy": (B, L, N, H)}
    arrays = {name: draw(shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}

    def on_rank(values: Mapping[str, Array]) -> dict[str, Array]:
        attention = functools.partial(causal_attention, implementation=implementation)
        y, pull = jax.vjp(attention, values["q"], values["k"], values["v"])
        return {"y": y} | dict(zip(("dq", "dk", "dv"), pull(values["dy"]), strict=True))

    actual = run_on_each(make_mesh(tiny_config(len(devices)), devices=devices), dtype, on_rank, arrays)
    dims = {"q": "BLNH", "k": "BMGH", "v": "BMGH", "dy": "BLNH"}
    expected = numpy_reference.attention(**{f"{name}_{dims[name]}": array for name, array in arrays.items()})
    return compare(actual, expected, BOUNDS[dtype])


def check_decoding(devices: Sequence[Any], dtype: str) -> str:
    """Compares the attention of one token to keys and values in pages with NumPy's, of rows of several lengths. Pages
    that a row has not begun are NaN, as what another request may have left there."""
    (N, G, H), page, length_W = (4, 2, 128), 16, (1, 17, 129, 1104)
    W, L = len(length_W), max(length_W)
    draw = np.random.default_rng(1)
    shapes = {"q": (W, N, H), "k": (W, L, G, H), "v": (W, L, G, H)}
    arrays = {name: draw.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}
    table_WK = draw.permutation(W * L // page).reshape(W, -1).astype(np.int32)
    position_WC = np.asarray(length_W, np.int32)[:, None] - 1

    def in_pages(name: str) -> np.ndarray:
        pages = np.full((G, table_WK.size, page, H), np.nan, arrays[name].dtype)
        for table_K, of_row, length in zip(table_WK, arrays[name], length_W, strict=True):
            begun = -(-length // page)
            written = np.where(np.arange(begun * page)[:, None, None] < length, of_row[: begun * page], 0)
            pages[:, table_K[:begun]] = written.reshape(begun, page, G, H).transpose(2, 0, 1, 3)
        return pages

    def on_rank(values: Mapping[str, Array], table_WK: Array, position_WC: Array) -> dict[str, Array]:
        q_GWXH = values["q"].reshape(W, G, N // G, H).swapaxes(0, 1) / math.sqrt(H)
        y_GWXH = paged_attention(q_GWXH, values["k"], values["v"], table_WK, position_WC)
        return {"y": y_GWXH.swapaxes(0, 1).reshape(W, N, H)}

    given = {"q": arrays["q"], "k": in_pages("k"), "v": in_pages("v")}
    mesh = make_mesh(tiny_config(len(devices)), devices=devices)
    actual = run_on_each(mesh, dtype, on_rank, given, table_WK, position_WC)
    expected = np.zeros((W, N, H))
    for row, length in enumerate(length_W):  # the last query of a sequence whose other queries are not looked at
        k, v = (arrays[name][row : row + 1, :length] for name in ("k", "v"))
        q = np.broadcast_to(arrays["q"][row], (1, length, N, H))
        expected[row] = numpy_reference.attention(q, k, v, np.zeros_like(q))["y"][0, -1]
    return compare(actual, {"y": expected}, BOUNDS[dtype])


def check_exchange(devices: Sequence[Any], name: str) -> str:
    """Checks the MoE layer, dropless, with its experts over all devices: y, and the gradient of the tokens.

    The experts are computed without a kernel of the accelerator, which has a check of its own.
    """
    nodes = count_nodes(devices) if name == "hierarchical" else 1
    config = tiny_config(len(devices), nodes, exchange=name, grouped_matmul="blocks")
    mesh, m, draw = make_mesh(config, devices=devices), config.model, np.random.default_rng(2)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: MoE(config, jax.random.key(0)))

    def matrix(leaf: Any) -> np.ndarray:
        return (draw.standard_normal(leaf.shape) / math.sqrt(leaf.shape[-2])).astype(np.float32)

    layer = jax.tree.map(matrix, abstract)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
    w = {
        "router_DE": layer.router_DE[...],
        "down_DR": layer.down.w_DF[...],
        "up_RD": layer.up.w_DF[...],
        "w_in_eRF": layer.experts.w_in_eRF[...],
        "w_out_eFR": layer.experts.w_out_eFR[...],
    }
    shape = config.data.batch_size, config.data.sequence_length, m.hidden_size
    T = shape[0] * shape[1]
    # Tokens whose choice no rounding changes.
    x_TD = draw.standard_normal((2 * T, m.hidden_size)).astype(np.float32)
    x_TD = x_TD[np.argsort(-numpy_reference.margin(w["router_DE"], x_TD, m.choices))[:T]]
    dy_TD = draw.standard_normal(x_TD.shape).astype(np.float32)

    def values_and_gradients(layer: MoE, x_BLD: Array, dy_BLD: Array) -> dict[str, Array]:
        y_BLD, pull, stats = jax.vjp(lambda x_BLD: layer(x_BLD, evaluating=True), x_BLD, has_aux=True)
        return replicate({"y": y_BLD, "dx": pull(dy_BLD)[0], "drops": stats.drop_rate.mean()})

    given = layer, x_TD.reshape(shape), dy_TD.reshape(shape)
    actual = execute(
        mesh, "float32", values_and_gradients, given, (specs, token_spec(3), token_spec(3)), name == "ragged"
    )
    if drops := float(actual.pop("drops")):
        raise MismatchError(f"{drops:.1%} of the choices were dropped, none should be")
    actual = {name: value.reshape(T, -1) for name, value in actual.items()}
    return compare(actual, numpy_reference.moe(w, x_TD, dy_TD, m.choices), BOUNDS["float32"])


def check_training(devices: Sequence[Any]) -> str:
    """Checks three steps on one batch: the loss falls, and the first gradient's norm is what one device computes."""
    losses, norm = train(tiny_config(len(devices)), devices)
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        raise MismatchError(f"the loss goes {' → '.join(f'{loss:.4f}' for loss in losses)}; it should fall")
    if len(devices) > 1:
        one = tiny_config(len(devices), ranks=1)
        expected = train(one, jax.local_devices(backend=devices[0].platform)[:1], steps=1)[1]
        if not abs(norm - expected) <= NORM_BOUND * expected:
            raise MismatchError(f"the gradient's norm is {norm:.6f} on all devices and {expected:.6f} on one of them")
    return f"loss {losses[0]:.3f} → {losses[-1]:.3f}"


def train(config: Config, devices: Sequence[Any], steps: int = 3) -> tuple[list[float], float]:
    """Trains on one random batch → (losses, the gradient's norm in the first step)."""
    mesh, losses, norms = make_mesh(config, devices=devices), [], []
    shape = config.data.batch_size, config.data.sequence_length + 1
    tokens = np.random.default_rng(3).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        trainer, batch = make_trainer(config, mesh), place(batch_from_windows(tokens), batch_spec(2))
        state = trainer.init(jax.random.key(config.train.seed))
        step = compile_program(mesh, trainer.step.lower(state, batch, trainer.rate(0)))
        for done in range(steps):
            state, metrics = step(state, batch, trainer.rate(done))
            losses.append(float(metrics.loss))
            norms.append(float(metrics.grad_norm))
    return losses, norms[0]


def count_nodes(devices: Sequence[Any]) -> int:
    """Number of nodes of the hierarchical exchange: slices, hosts of GPUs that are a process each, or two for the sake
    of the check."""
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    processes = len({device.process_index for device in devices})
    hosts = processes if 1 < processes < len(devices) and devices[0].platform == "gpu" else 2
    nodes = slices if slices > 1 else hosts
    return nodes if len(devices) > nodes and len(devices) % nodes == 0 else 1
