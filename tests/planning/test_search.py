"""The search over meshes and settings, and sweeps."""

from dataclasses import replace

import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig, ExecutionConfig, ModelConfig
from bigmac_jax.mesh import axis_sizes
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.search import search, sweep

CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=256, vocab_size=512, num_experts=16, top_k=4),
    execution=ExecutionConfig(dtype="bfloat16"),
    data=DataConfig(tokenizer="bytes", sequence_length=128, batch_size=16),
)
H100 = load_hardware("h100")


def test_all_that_is_valid() -> None:
    found = search(CONFIG, 8, H100)
    assert {c.sizes["tensor"] for c in found} == {1}  # as in the config
    meshes = {tuple(c.sizes.values())[:3] for c in found}
    assert {m for m in meshes if m[1] == 1} == {(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8)}
    assert {m for m in meshes if m[1] > 1} == {(2, 2, 2), (1, 2, 4), (1, 4, 2)}  # of two levels
    kinds = {(c.config.execution.exchange, c.sizes["node"] > 1) for c in found if c.sizes["expert"] > 1}
    assert kinds == {("hierarchical", True)} | {(n, False) for n in ("all_to_all", "dedup", "gather", "ragged")}
    assert {c.config.execution.overlap_chunks for c in found} == {1, 2, 4, 8}
    assert {c.config.execution.remat for c in found} == {"none", "exchange", "layer"}
    assert {c.config.train.accumulate_steps for c in found} == {1, 2}  # 16 sequences on 8 ranks
    assert len({c.config for c in found}) == len(found)


def test_order() -> None:
    found = search(CONFIG, 8, H100)
    assert all(c.fits for c in found)
    rates = [c.times.tokens_per_s for c in found]
    assert rates == sorted(rates, reverse=True) and rates[0] > 1.5 * rates[-1]
    # With room for half of them, these come first.
    sizes = sorted(sum(c.memory.values()) for c in found)
    small = search(CONFIG, 8, replace(H100, memory_bytes=sizes[len(sizes) // 2]))
    fit = [c.fits for c in small]
    assert len(small) == len(found) and len(fit) // 2 < sum(fit) < len(fit)
    assert fit == sorted(fit, reverse=True)
    assert all(sum(c.memory.values()) <= sizes[len(sizes) // 2] for c in small if c.fits)


def test_a_candidate_is_what_it_says() -> None:
    for c in search(CONFIG, 8, H100)[:5]:
        assert c.sizes == axis_sizes(c.config, 8)
        assert c.times == step_time(c.config, c.sizes, H100)


def test_a_slice() -> None:
    v5e = load_hardware("v5e")
    found = search(CONFIG, 8, v5e, (2, 4))
    assert found and "ragged" not in {c.config.execution.exchange for c in found}  # v5e has none
    assert all(c.times.hidden == 0 for c in found)
    assert search(CONFIG, 8, v5e, (4, 4)) == []  # 16 chips


@pytest.mark.parametrize("devices", [1, 3, 7, 32])
def test_nothing_crashes(devices: int) -> None:
    for structure in ("dense", "vanilla", "fine_grained"):
        c = replace(CONFIG, model=replace(CONFIG.model, structure=structure, num_experts=32))
        assert bool(search(c, devices, H100)) == (devices == 1)  # 16 sequences


def test_a_dense_model_has_one_mesh() -> None:
    found = search(replace(CONFIG, model=replace(CONFIG.model, structure="dense")), 8, H100)
    assert {tuple(c.sizes.values()) for c in found} == {(8, 1, 1, 1)}


def test_sweep() -> None:
    found = sweep(CONFIG, {"structure": ["fine_grained", "bigmac"], "model.top_k": ["2", "4", "8"]})
    assert [(c.model.structure, c.model.top_k) for c in found] == [
        (s, k) for s in ("fine_grained", "bigmac") for k in (2, 4, 8)
    ]
    assert all(c.data == CONFIG.data and c.model.hidden_size == 256 for c in found)
    assert sweep(CONFIG, {}) == [CONFIG]
    assert sweep(CONFIG, {"capacity_factor": ["inf"]})[0].model.capacity_factor == float("inf")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"topk": ["1"]}, "'topk' is not a field of the config; did you mean top_k?"),
        ({"xyzzy": ["1"]}, "'xyzzy' is not a field of the config; did you mean a field such as model.top_k?"),
        ({"top_k": ["many"]}, "model.top_k='many' must be of type int, as in --config.model.top_k=4"),
        ({"top_k": ["17"]}, "model.top_k=17 must be at most model.num_experts=16; use 16"),
    ],
)
def test_what_a_sweep_refuses(axes: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(CONFIG, axes)
    assert str(error.value) == message


def test_a_name_of_two_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two fields share a name today."""
    monkeypatch.setattr(
        "bigmac_jax.planning.search.field_values", lambda values: [("train.steps", 1), ("optimizer.steps", 2)]
    )
    with pytest.raises(ConfigError, match=r"^'steps' may be train\.steps or optimizer\.steps; use the full name$"):
        sweep(CONFIG, {"steps": ["1"]})
