"""--tokens: days and device-hours of a training, by hand; and what is no number of tokens."""

import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.planning.training_time import parse_tokens, training_time
from planning.test_planner import plan, shown


def test_tokens_as_people_write_them() -> None:
    known = {"15T": 15e12, "300b": 300e9, "250M": 250e6, "8k": 8000, "1.5e12": 1.5e12, "0.5T": 5e11, "1": 1,
             "15000000000000.0": 15e12, "1e+16": 1e16}  # fmt: skip
    for text, tokens in known.items():
        assert parse_tokens(text) == tokens, text


@pytest.mark.parametrize("text", ["0", "-1B", "many", "nan", "inf", "1e999", "1e-3", "15TB", "T", "1,000", "0.4", " "])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match=r"15T, 300B or 1\.5e12") as error:
        parse_tokens(text)
    assert "\n" not in str(error.value)


def test_days_by_hand() -> None:
    """A thousand tokens in steps of 300 are four steps; of 6 hours each, on 8 devices, a day and 192 device-hours."""
    found = training_time(1000, 300, 6 * 3600.0, 8)
    assert found == {"tokens": 1000, "steps": 4, "seconds": 86400.0, "days": 1.0, "device_hours": 192.0}
    assert training_time(900, 300, 1.0, 1)["steps"] == 3


def test_a_plan_says_the_days_of_each_structure() -> None:
    made = plan(devices=32, hardware="h100", tokens="300B")
    columns = [made, *(column for column in made["baselines"].values() if "error" not in column)]
    assert len(columns) == 3
    for column in columns:
        training = column["training"]
        assert training["steps"] == -(-300 * 10**9 // made["tokens_per_step"])
        assert training["days"] == pytest.approx(300e9 / column["time"]["tokens_per_s"] / 86400, rel=1e-5)
        assert training["device_hours"] == pytest.approx(24 * 32 * training["days"])
    text = shown(made)
    assert "days for 300.00 B tokens, steps alone" in text and f"{made['training']['device_hours']:,.0f}" in text
    assert "training" not in plan(devices=32, hardware="h100")
    assert plan(devices=32, hardware="h100", tokens=3e11)["training"] == made["training"]  # from Python


def test_days_need_hardware() -> None:
    with pytest.raises(ConfigError, match=r"--tokens=15T needs .* add --hardware=NAME") as error:
        plan(devices=32, tokens="15T")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="--tokens=0 must be"):
        plan(devices=32, hardware="h100", tokens="0")
