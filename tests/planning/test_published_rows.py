"""Published runs: the files' form, and that shapes, FLOPs and layouts agree with what their sources say."""

import hashlib
import pathlib
import tomllib
from typing import Any

import pytest

import bigmac_jax.planning
from bigmac_jax.planning import published
from bigmac_jax.planning.hardware import load_hardware

FOLDER = pathlib.Path(bigmac_jax.planning.__file__).parent / "published"
MODELS: dict[str, dict[str, Any]] = tomllib.loads((FOLDER / "models.toml").read_text())
ROWS: list[dict[str, Any]] = [
    row
    for file in sorted(FOLDER.glob("*.toml"))
    if file.stem != "models"
    for row in tomllib.loads(file.read_text())["run"]
]

NUMBERS = ("devices", "batch", "length", "micro", "tensor", "stages", "virtual", "context", "expert")
CHOICES: dict[str, set[Any]] = {
    "machine": {"h100", "h200", "h800", "b200", "b300", "gb200", "gb300", "v5e", "v5p", "v6e", "tpu7x"},
    "precision": {"bf16", "fp8", "mxfp8", "nvfp4"},
    "sharding": {"zero1", "fsdp", "none"},
    "remat": {"none", "selective", "half", "mlp", "layer"},
    "offload": {"", "inputs", "optimizer"},
    "routing": {"forced", "natural"},
    "causal": {True, False},
    "overlap": {True, False},
    "mtp": {True, False},
}
REQUIRED = {"model", "row", "software", "capacity", "source", "assumed", *NUMBERS, *CHOICES}
OPTIONAL = {"peak", "differs", "dedup", "watts", "memory_bandwidth", "network"}
FIGURES = {"tokens_per_s", "seconds", "tflops", "mfu"}
ATTENTION = {"layers", "heads", "kv_heads", "head_size"}
LATENT_ATTENTION = {"layers", "heads", "q_rank", "kv_rank", "head_size", "rope_size", "value_size"}
BLOCKS = {
    "moe": {"layers", "experts", "top_k", "width", "shared", "latent"},
    "mlp": {"layers", "width"},
    "mamba": {"layers", "heads", "head_size", "groups", "state", "conv"},
}


def attention(model: dict[str, Any]) -> int:
    """Weights of one attention layer."""
    hidden, a = model["hidden"], model["attention"]
    if "q_rank" not in a:
        return hidden * (2 * a["heads"] + 2 * a["kv_heads"]) * a["head_size"]
    queries = a["heads"] * a["head_size"]
    query = a["q_rank"] * (hidden + queries) if a["q_rank"] else hidden * queries
    expanded = a["heads"] * (a["head_size"] - a["rope_size"] + a["value_size"])
    keys_and_values = hidden * (a["kv_rank"] + a["rope_size"]) + a["kv_rank"] * expanded
    return query + keys_and_values + a["heads"] * a["value_size"] * hidden


def experts(model: dict[str, Any], count: int) -> int:
    """Weights of one MoE layer with `count` of its experts."""
    hidden, moe, matrices = model["hidden"], model["moe"], 3 if model["gated"] else 2
    routed = matrices * (moe["latent"] or hidden) * moe["width"] * count
    return routed + hidden * (matrices * moe["shared"] + moe["experts"] + 2 * moe["latent"])


def mamba(model: dict[str, Any]) -> int:
    hidden, m = model["hidden"], model["mamba"]
    inner = m["heads"] * m["head_size"]
    return hidden * (3 * inner + 2 * m["groups"] * m["state"] + m["heads"])


def weights(model: dict[str, Any], *, active: bool, tables: int) -> int:
    """Weights of the matrices, with `tables` of tokens; those that a token meets if `active`."""
    total = model["attention"]["layers"] * attention(model) + tables * model["hidden"] * model["vocab"]
    if "moe" in model:
        total += model["moe"]["layers"] * experts(model, model["moe"]["top_k" if active else "experts"])
    if "mlp" in model:
        matrices = 3 if model["gated"] else 2
        total += model["mlp"]["layers"] * matrices * model["hidden"] * model["mlp"]["width"]
    if "mamba" in model:
        total += model["mamba"]["layers"] * mamba(model)
    return total


def flops(model: dict[str, Any], row: dict[str, Any]) -> float:
    """FLOPs of a step for one token. What isn't causal is whole in every layer, windows or not."""
    hidden, a = model["hidden"], model["attention"]
    seen = row["length"] / 2 if row["causal"] else row["length"]
    window, windows = a.get("window", 0), a.get("window_layers", 0)
    in_window = min(window * (1 - window / 2 / row["length"]), seen) if row["causal"] else seen
    each = 2 * a["heads"] * (a["head_size"] + a.get("value_size", a["head_size"]))
    forward = 2 * weights(model, active=True, tables=1)
    forward += each * ((a["layers"] - windows) * seen + windows * in_window)
    if "mamba" in model:
        m = model["mamba"]
        forward += m["layers"] * 7 * m["heads"] * m["head_size"] * m["state"]  # as Megatron counts the scan
    if row["mtp"]:
        module = 2 * hidden**2 + attention(model) + experts(model, model["moe"]["top_k"]) + hidden * model["vocab"]
        forward += model["mtp"] * (2 * module + each * seen)
    return 3 * forward


def test_the_form() -> None:
    assert len(ROWS) > 130 and all(isinstance(row["row"], str) for row in ROWS)
    for row in ROWS:
        name = row["row"]
        assert set(row) >= REQUIRED and set(row) <= REQUIRED | FIGURES | OPTIONAL, name
        assert len(name.split(" | ")) == 3 and name == name.strip(), name
        assert row["model"] in MODELS and all(row[key] in values for key, values in CHOICES.items()), name
        assert all(type(row[key]) is int and row[key] > 0 for key in NUMBERS), name
        assert row["source"] and row["software"] and row["capacity"] >= 0, name
        assert FIGURES & set(row) and not {"tokens_per_s", "seconds"} <= set(row), name
        assert ("mfu" in row) == ("peak" in row), name
        assert row.get("dedup", False) is False or row["expert"] > 1, name
    assert len({row["row"] for row in ROWS}) == len(ROWS)
    for name, model in MODELS.items():
        assert model["source"], name
        a = set(model["attention"]) - {"window", "window_layers"}
        assert a == (LATENT_ATTENTION if "q_rank" in a else ATTENTION), name
        assert all(set(model[key]) == keys for key, keys in BLOCKS.items() if key in model), name
    assert {row["model"] for row in ROWS} == set(MODELS)


def test_a_third_is_set_aside() -> None:
    aside = [row for row in ROWS if int(hashlib.sha256(row["row"].encode()).hexdigest(), 16) % 3 == 0]
    assert len(ROWS) / 4 < len(aside) < len(ROWS) / 2.5


def test_parameters() -> None:
    for name, model in MODELS.items():
        tables = 1 if model["tied"] else 2
        assert weights(model, active=False, tables=tables) == pytest.approx(model["parameters"], rel=0.03), name
        # Sources differ on whether a token meets the table that it is looked up in.
        counts = [weights(model, active=True, tables=count) for count in (1, tables)]
        assert any(count == pytest.approx(model["active"], rel=0.03) for count in counts), name


def test_layouts() -> None:
    for row in ROWS:
        name, ranks = row["row"], row["tensor"] * row["stages"] * row["context"]
        assert row["devices"] % ranks == 0 and row["devices"] // row["stages"] % row["expert"] == 0, name
        assert row["batch"] % (row["devices"] // ranks * row["micro"]) == 0, name
        assert row["virtual"] == 1 or row["stages"] > 1, name
        assert row["expert"] == 1 or "moe" in MODELS[row["model"]], name
        assert not row["mtp"] or "mtp" in MODELS[row["model"]], name


def test_flops() -> None:
    """TFLOP/s over tokens/s is what the shape says, or the shape, mtp or causal is wrong, or `differs` says why."""
    for row in ROWS:
        tokens_per_s = row.get("tokens_per_s")
        if "seconds" in row:
            tokens_per_s = row["batch"] * row["length"] / row["seconds"] / row["devices"]
        if tokens_per_s and "tflops" in row:
            expected = flops(MODELS[row["model"]], row)
            agrees = row["tflops"] * 1e12 / tokens_per_s == pytest.approx(expected, rel=0.035)
            assert agrees != bool(row.get("differs")), (row["row"], expected)


def test_runs_are_what_the_cost_model_reads() -> None:
    """The shapes' FLOPs and parameters, counted twice; a run's machine with what the run says of it."""
    shapes, runs = published.load_shapes(), published.load_runs()
    assert [run.row for run in runs] == [row["row"] for row in ROWS]
    for name, model in MODELS.items():
        tables = 1 if model["tied"] else 2
        assert shapes[name].parameters() == pytest.approx(weights(model, active=False, tables=tables) + _modules(model))
    for run, row in zip(runs, ROWS, strict=True):
        model = MODELS[row["model"]]
        scan = 3 * run.shape().scan_flops()
        ours, theirs = 3 * run.shape().flops(run.length, run.causal) - scan, flops(model, row)
        if "mamba" in model:
            m = model["mamba"]
            theirs -= 3 * m["layers"] * 7 * m["heads"] * m["head_size"] * m["state"]
        if run.causal or not model["attention"].get("window"):
            assert ours == pytest.approx(theirs, rel=1e-6), run.row
        assert run.set_aside == (int(hashlib.sha256(row["row"].encode()).hexdigest(), 16) % 3 == 0)
    slower = next(run for run in runs if run.watts == 500)
    machine, plain = published.machine_of(slower), load_hardware("h100")
    assert machine.matmul_efficiency == pytest.approx(plain.matmul_efficiency * 5 / 7)
    assert machine.memory_bandwidth == 2.4e12 and machine.slow == plain.slow
    shared = next(run for run in runs if run.network == 0.25)
    assert published.machine_of(shared).slow.bandwidth == plain.slow.bandwidth / 4


def _modules(model: dict[str, Any]) -> float:
    """Weights of next-token modules, which the published total leaves out."""
    if not model.get("mtp"):
        return 0.0
    hidden = model["hidden"]
    return model["mtp"] * (2 * hidden**2 + attention(model) + experts(model, model["moe"]["experts"]))


def test_what_exchanges_nothing() -> None:
    """Runs of dense models, and those whose ranks have all experts; all others exchange."""
    shapes = published.load_shapes()
    for run in published.load_runs():
        seconds = published.exchange_seconds(run, shapes[run.model], published.machine_of(run))
        assert (seconds == 0) == (shapes[run.model].moe is None or run.expert == 1), run


def test_what_a_run_does_not_say() -> None:
    """And tokens a second of a device by each of the four figures that a source may have."""
    required = {"model": "qwen3_30b", "row": "a | b | c", "software": "s", "machine": "h100", "devices": 8, "batch": 64,
                "length": 4096, "source": "paper"}  # fmt: skip
    model = next(name for name in MODELS if "moe" in MODELS[name])
    required["model"] = model
    run = published.Run(**required)
    ones = dict.fromkeys(("micro", "tensor", "stages", "virtual", "context", "expert"), 1)
    figures = dict.fromkeys(("tokens_per_s", "seconds", "tflops", "mfu", "capacity", "watts", "memory_bandwidth"), 0.0)
    texts = dict.fromkeys(("assumed", "peak", "offload", "differs"), "")
    others = {"causal": True, "precision": "bf16", "sharding": "zero1", "remat": "none", "overlap": False,
              "routing": "forced", "mtp": False, "dedup": False, "network": 1.0}  # fmt: skip
    assert vars(run) == required | ones | figures | texts | others
    assert run.tokens == 64 * 4096 and run.is_moe
    flops = 3 * run.shape().flops(4096, True)
    for figure, expected in (
        ({"tokens_per_s": 123.0, "seconds": 9.0}, 123.0),
        ({"seconds": 4.0, "tflops": 9.0}, 64 * 4096 / 4 / 8),
        ({"tflops": 250.0, "mfu": 0.9}, 250e12 / flops),
        ({"mfu": 0.4}, 0.4 * 989.4e12 / flops),
    ):
        assert published.Run(**required, **figure).measured() == pytest.approx(expected)
    for natural, uneven in (
        ({"routing": "natural", "expert": 2}, 1.5), ({"routing": "natural"}, 1.0), ({"expert": 2}, 1.0),
        ({"routing": "natural", "expert": 2, "capacity": 1.25}, 1.0),
    ):  # fmt: skip
        assert published.Run(**required, **natural).imbalance == uneven
