"""Sweeps: every combination of some fields' values."""

import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig, ModelConfig
from bigmac_jax.planning.sweep import sweep

CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=256, vocab_size=512, num_experts=16, top_k=4),
    data=DataConfig(tokenizer="bytes", sequence_length=128, batch_size=16),
)


def test_sweep() -> None:
    found = sweep(CONFIG, {"structure": ["fine_grained", "bigmac"], "model.top_k": ["2", "4", "8"]})
    combinations = [(s, k) for s in ("fine_grained", "bigmac") for k in (2, 4, 8)]
    assert [(c.model.structure, c.model.top_k) for _, c in found] == combinations
    assert [fields for fields, _ in found] == [{"structure": s, "model.top_k": str(k)} for s, k in combinations]
    assert all(c.data == CONFIG.data and c.model.hidden_size == 256 for _, c in found)
    assert sweep(CONFIG, {}) == [({}, CONFIG)]
    assert sweep(CONFIG, {"capacity_factor": ["inf"]})[0][1].model.capacity_factor == float("inf")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"topk": ["1"]}, "'topk' is not a field of the config; did you mean model.top_k?"),
        (
            {"xyzzy": ["1"]},
            "'xyzzy' is not a field of the config; its groups are model, execution, mesh, data, optimizer, train, "
            "tuning (`bigmac fields` lists their fields)",
        ),
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
        "bigmac_jax.planning.sweep.flat_values", lambda config: {"train.steps": 1, "optimizer.steps": 2}
    )
    with pytest.raises(ConfigError, match=r"^'steps' may be train\.steps or optimizer\.steps; use the full name$"):
        sweep(CONFIG, {"steps": ["1"]})
