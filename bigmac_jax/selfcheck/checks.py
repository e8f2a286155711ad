"""Checks of the parts that depend on the hardware, each against NumPy in float64.

All devices compute; a check of one device's part gives each of them the same data. N rows with K choices each among e
local experts, B batch, L length, H head size, G key-value heads, D hidden, R row width, F expert hidden, S ranks.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.choose_exchange import available_exchanges
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.experts import grouped_mlp
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.kernels.flash_attention import causal_attention
from bigmac_jax.model.kernels.paged_attention import paged_attention
from bigmac_jax.model.mesh import batch_spec, make_mesh, place, rank_spec, replicated_spec, token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.planning.topologies import first_line
from bigmac_jax.runtime import environment, hosts
from bigmac_jax.selfcheck import numpy_reference
from bigmac_jax.selfcheck.numpy_reference import Arrays
from bigmac_jax.training.step import make_trainer

# The largest max|a - b| over max|b| that counts as rounding. Float32 is multiplied in float32 (precision highest),
# bfloat16 as it is in training. A wrong row or a sum that lacks a rank is off by a tenth or more.
BOUNDS = {"float32": 3e-5, "bfloat16": 3e-2}
NORM_BOUND = 1e-4  # for the gradient's norm on all devices, relative to one device's

# Settings to try, the best first, where a check of a part fails.
ALTERNATIVES = {
    "attention": ("execution.attention=xla", "execution.attention=blocks"),
    "experts": ("execution.grouped_matmul=blocks",),
    "exchange": tuple(f"execution.exchange={name}" for name in STRATEGIES),
}
_IMPLEMENTATIONS = {"cpu": ("auto", "xla"), "tpu": ("auto", "xla"), "gpu": ("auto", "xla", "cudnn", "triton")}


class MismatchError(Exception):
    """A part did not compute what it should."""


class Check(NamedTuple):
    """One thing that the machine must compute right.

    Attributes:
      part: the part of the program that is checked.
      setting: what selects that part, or "".
      run: raises an exception, or says how good the part is.
    """

    name: str
    part: str
    setting: str
    run: Callable[[], str]


class Result(NamedTuple):
    """The outcome of a check.

    Attributes:
      why: why it failed; "" if it is ok.
      detail: how good it is, in words.
    """

    check: Check
    why: str
    detail: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.why


def run(check: Check) -> Result:
    """Runs a check, which fails where it raises an exception; the result is the same in all processes."""
    start, detail, why = time.perf_counter(), "", ""
    try:
        detail = check.run()
    except MismatchError as error:
        why = str(error)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
    found = [
        text if process == 0 else f"process {process}: {text}" for process, text in enumerate(hosts.gather(why)) if text
    ]
    return Result(check, found[0] if found else "", detail, time.perf_counter() - start)


def advice(results: Sequence[Result]) -> dict[str, str]:
    """What to set instead, by the name of each check that failed; "" where nothing else was found to work."""
    red = {result.check.setting for result in results if not result.ok}
    return {
        result.check.name: next((s for s in ALTERNATIVES.get(result.check.part, ()) if s not in red), "")
        for result in results
        if not result.ok
    }


def all_checks(devices: Sequence[Any]) -> list[Check]:
    """The checks of a mesh over `devices`."""
    checks = []
    for layout in ("dropless", "capacity"):
        for dtype in BOUNDS:
            test = functools.partial(check_experts, devices, layout == "dropless", dtype)
            checks.append(Check(f"experts {layout} {dtype}", "experts", "execution.grouped_matmul=auto", test))
    for implementation in _IMPLEMENTATIONS.get(devices[0].platform, ("auto", "xla")):
        for dtype in BOUNDS:
            if (implementation, dtype) != ("cudnn", "float32"):
                test = functools.partial(check_attention, devices, implementation, dtype)
                setting = f"execution.attention={implementation}"
                checks.append(Check(f"attention {implementation} {dtype}", "attention", setting, test))
    for dtype in BOUNDS:
        checks.append(Check(f"decoding {dtype}", "decoding", "", functools.partial(check_decoding, devices, dtype)))
    for name in available_exchanges(devices[0].device_kind):
        test = functools.partial(check_exchange, devices, name)
        checks.append(Check(f"exchange {name}", "exchange", f"execution.exchange={name}", test))
    checks.append(Check("training step", "training", "", functools.partial(check_training, devices)))
    return checks


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
    config = _config(len(devices), use_bias=True, dtype=dtype)
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

    actual = _run_on_each(make_mesh(config, devices=devices), dtype, on_rank, arrays, expert_NK)
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

    actual = _run_on_each(make_mesh(_config(len(devices)), devices=devices), dtype, on_rank, arrays)
    return compare(
        actual, numpy_reference.attention(**{f"{n}_{_DIMS[n]}": v for n, v in arrays.items()}), BOUNDS[dtype]
    )


_DIMS = {"q": "BLNH", "k": "BMGH", "v": "BMGH", "dy": "BLNH"}


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
    mesh = make_mesh(_config(len(devices)), devices=devices)
    actual = _run_on_each(mesh, dtype, on_rank, given, table_WK, position_WC)
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
    config = _config(len(devices), nodes, exchange=name, grouped_matmul="blocks")
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
        return _replicate({"y": y_BLD, "dx": pull(dy_BLD)[0], "drops": stats.drop_rate.mean()})

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
    losses, norm = train(_config(len(devices)), devices)
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        raise MismatchError(f"the loss goes {' → '.join(f'{loss:.4f}' for loss in losses)}; it should fall")
    if len(devices) > 1:
        one = _config(len(devices), ranks=1)
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
    """Number of nodes of the hierarchical exchange: slices, hosts of GPUs, or two for the sake of the check."""
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    processes = len({device.process_index for device in devices})
    nodes = slices if slices > 1 else processes if processes > 1 and devices[0].platform == "gpu" else 2
    return nodes if len(devices) > nodes and len(devices) % nodes == 0 else 1


def compare(actual: Arrays, expected: Arrays, bound: float) -> str:
    """Compares arrays with those expected → a line that says the largest difference.

    An array may have a leading dimension of ranks that the expected one lacks.

    Raises:
      MismatchError: an array differs by more than `bound` times the largest entry of the one expected.
    """
    worst = 0.0
    for name, b in expected.items():
        a = actual[name].astype(np.float64)
        largest = np.abs(b).max()
        off = np.abs(a - b).max() / largest if largest > 0 else math.inf  # zeros show nothing
        if not off <= bound:  # NaN too
            where = ""
            if a.ndim > b.ndim:
                by_rank = np.abs(a - b).reshape(a.shape[0], -1).max(1) / largest
                wrong = [rank for rank, value in enumerate(by_rank) if not value <= bound]
                where = f" on {len(wrong)} of {len(by_rank)} devices" if len(by_rank) > 1 else ""
            raise MismatchError(
                f"{name} is off by {off:.1e} of its largest entry{where}; at most {bound:g} is rounding"
            )
        worst = max(worst, float(off))
    return f"within {worst:.0e}"


def execute(mesh: Mesh, dtype: str, function: Callable[..., Any], values: Any, specs: Any, ragged: bool = False) -> Any:
    """Compiles `function` with training's options, and runs it on NumPy arrays that `specs` place on the mesh → NumPy
    arrays.

    Args:
      dtype: what is computed in; with float32, products keep all digits.
      ragged: whether the function has ragged exchanges, which need an option of their own.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
        arrays = jax.tree.map(place, values, specs)
        program = compile_program(mesh, jax.jit(function).lower(*arrays), ragged)
        return jax.tree.map(np.asarray, program(*arrays))


def compile_program(mesh: Mesh, lowered: Any, ragged: bool = False) -> Any:
    """Compiles with the options of training; on CPU without LLVM's optimisations, because these programs take seconds
    to compile and milliseconds to run."""
    device = mesh.devices.flat[0]
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else {}
    options |= environment.compiler_options(device, ragged=ragged)
    with hosts.raise_together():  # all have compiled before one of them waits for the others
        return lowered.compile(compiler_options=options)


def _run_on_each(mesh: Mesh, dtype: str, on_rank: Callable[..., dict[str, Array]], *trees: Any) -> Arrays:
    """Runs `on_rank` on the same arrays on each device → the results of all [S, …]."""
    leaves, form = jax.tree.flatten(trees)

    def on_each(*leaves: Array) -> dict[str, Array]:
        result = on_rank(*jax.tree.unflatten(form, [leaf[0] for leaf in leaves]))
        return {name: value[None] for name, value in result.items()}

    def everywhere(*leaves: Array) -> dict[str, Array]:
        return _replicate(on_each_rank(on_each, leaves, in_spec=rank_spec, out_specs=rank_spec(1)))

    copies = [np.broadcast_to(leaf, (mesh.size, *leaf.shape)) for leaf in leaves]
    return execute(mesh, dtype, everywhere, tuple(copies), tuple(rank_spec(copy.ndim) for copy in copies))


def _replicate(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: jax.sharding.reshard(value, replicated_spec(value.ndim)) for name, value in arrays.items()}


def _config(devices: int, nodes: int = 1, ranks: int = 0, use_bias: bool = False, **execution: Any) -> Config:
    """A tiny bigmac model for so many devices, on a mesh whose expert group is `ranks` of them, or all."""
    group = ranks or devices
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=264,
            num_experts=devices * max(2, -(-8 // devices)),
            top_k=3,
            expert_hidden_size=32,
            latent_norm="none",  # as in the reference
            projection_init="random",
            capacity_factor=math.inf,
            use_bias=use_bias,
        ),
        execution=ExecutionConfig(unroll_layers=1, **execution),
        mesh=MeshConfig(data=1, node=nodes, expert=group // nodes),
        data=DataConfig(tokenizer="bytes", sequence_length=16, batch_size=devices),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, decay_steps=1000),
    )
