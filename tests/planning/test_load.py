"""How uneven routing makes a step longer, by hand; and where it is read from."""

import json
import pathlib

import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.config.reading import load_config
from bigmac_jax.planning.cost import make_job
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.load import EVEN, Load, read_load
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan

LAYERS = ((2.0, 0.0, 1.0, 1.0), (0.5, 0.5, 2.0, 1.0))


def test_the_busiest_rank_by_hand() -> None:
    """Of two ranks the first has (2 + 0) / 2 in one layer, the second (2 + 1) / 2 in the other."""
    load = Load(1.0, LAYERS)
    assert load.over(2) == pytest.approx((1 + 1.5) / 2)
    assert load.over(4) == 2.0 and load.over(1) == 1.0
    assert Load(1.3).over(8) == 1.3 and Load(1.3).over(1) == 1.0 and EVEN.over(8) == 1.0
    assert Load(8.0).over(2) == 2.0  # no rank has more rows than there are


def test_it_is_read(tmp_path: pathlib.Path) -> None:
    config = load_config("tiny", ["model.num_experts=4", "model.top_k=2"])
    records = [{"step": step, "moe/load": [[1.0] * 4] * 2 if step < 26 else LAYERS} for step in range(27)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    found = read_load(str(tmp_path), config)  # of the last tenth, two records
    assert found.layers_YE == ((1.5, 0.5, 1.0, 1.0), (0.75, 0.75, 1.5, 1.0))
    assert read_load("1.25", config) == Load(1.25) and read_load("", config) == EVEN
    assert [read_load(text, config).busiest for text in ("1", "4")] == [1.0, 4.0]  # even, and all to one
    # Of a short run the last record; those without a load don't count.
    short = [{"step": 0, "moe/load": [[1.0] * 4] * 2}, {"step": 1, "moe/load": LAYERS}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in short))
    assert read_load(str(tmp_path), config) == Load(1.0, LAYERS)
    with pytest.raises(ConfigError, match="is a run with 4 experts a layer, but this config has 2; give a number"):
        read_load(str(tmp_path), load_config("tiny", ["model.num_experts=2", "model.top_k=1"]))


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("0.5", (), "--imbalance=0.5 must be between 1 (even) and the 32 experts (one takes all)"),
        ("64", (), "--imbalance=64 must be between 1 (even) and the 32 experts (one takes all)"),
        ("nan", (), "--imbalance=nan must be a number, as 1.3, or the workdir of a run with experts"),
        ("2", ("model.structure=dense",), "--imbalance=2 is of experts, and model.structure=dense has none; drop it"),
    ],
)
def test_what_is_refused(text: str, fields: tuple[str, ...], message: str) -> None:
    config = load_config("tiny", ["model.num_experts=32", *fields])
    with pytest.raises(ConfigError) as caught:
        make_plan(config, Request(devices=8, hardware="h100", imbalance=text))
    assert str(caught.value) == message


def test_others_wait_for_the_busiest() -> None:
    """For its experts' rows; not where each expert has room for so many and no more."""
    config = load_config("qwen3_30b", ["mesh.expert=8", "model.capacity_factor=inf", "model.balance=none"])
    sizes, hardware = {"data": 1, "node": 1, "expert": 8, "tensor": 1}, load_hardware("h100")
    even, uneven = (make_job(config, sizes, hardware, load=load) for load in (EVEN, Load(1.5)))
    assert (even.imbalance, uneven.imbalance) == (1.0, 1.5)
    plans = [make_plan(config, Request(devices=8, hardware="h100", imbalance=text)) for text in ("", "1.5")]
    assert [plan["imbalance"] for plan in plans] == [1.0, 1.5]
    assert plans[1]["time"]["total"] > 1.1 * plans[0]["time"]["total"]
    dropping = load_config("qwen3_30b", ["mesh.expert=8"])
    assert make_job(dropping, sizes, hardware, load=Load(1.5)).imbalance == 1.0


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        (("exchange=ragged",), (1.4, 3.1)),  # the rows that there are
        (("exchange=gather",), (1.0, 1.0)),  # all rows, whoever needs them
        (("exchange=all_to_all", "buffer_factor=inf"), (1.0, 1.0)),  # buffers for the worst case
        # With room for 1.5 times the mean's rows 3.1 times take three rounds. The two that follow send six times, not
        # four: forward, and backward both ways.
        (("exchange=all_to_all",), (1.0, 1 + 2 * 6 / 4)),
        (("exchange=dedup",), (1.0, 1 + 2 * 6 / 4)),
        (("exchange=dedup", "remat=layer"), (1.0, 1 + 2 * 8 / 6)),
        (("exchange=all_to_all", "buffer_factor=1.2"), (1 + 6 / 4, 1 + 2 * 6 / 4)),
    ],
)
def test_uneven_rows_on_the_wire(fields: tuple[str, ...], times: tuple[float, float]) -> None:
    overrides = ["mesh.expert=8", "model.capacity_factor=inf", "execution.remat=none"]
    config = load_config("qwen3_30b", [*overrides, *(f"execution.{field}" for field in fields)])
    sizes, hardware = {"data": 1, "node": 1, "expert": 8, "tensor": 1}, load_hardware("h100")
    even, *uneven = (make_job(config, sizes, hardware, load=load).exchange for load in (EVEN, Load(1.4), Load(3.1)))
    assert [seconds / even for seconds in uneven] == pytest.approx(times)
