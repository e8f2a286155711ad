"""Cases are measured once, with everything that they depend on in their key; times are read between checkpoints."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks.reproduce.lab import WARM, Case, CaseError, Lab, exchange_share, median
from benchmarks.reproduce.learning import steps_to


def test_every_field_of_a_case_is_in_its_key() -> None:
    case = Case("tiny")
    others = {
        "size": "small", "overrides": ("model.top_k=2",), "program": "forward", "local": True, "rate": 1e6,
        "machine": 2, "fast_rate": 1e7, "steps": 3, "repeat": 1, "arguments": ("--new=1",),
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(Case)}
    keys = {dataclasses.replace(case, **{name: value}).key for name, value in others.items()}
    assert len(keys | {case.key}) == len(others) + 1


def test_the_command_is_that_of_the_product() -> None:
    command = Case("tiny", ("model.top_k=2",), steps=3).command
    base = "--config=benchmarks/reproduce/base.py:tiny"
    assert command == ["train.py", base, "--config.model.top_k=2", f"--config.train.steps={3 + WARM}"]
    command = Case("tiny", program="forward", local=True, arguments=("--x=5",)).command
    assert command[:5] == ["-m", "benchmarks.reproduce.forward", "--local", "--x=5", base]


def test_a_measured_case_is_not_run_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, steps=2)
    case = lab.case("tiny")
    path = tmp_path / "cases" / f"{case.key}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"median_s": 1.5}))
    monkeypatch.setattr(Lab, "_run", lambda *_: pytest.fail("was run"))
    assert lab.measure([case, case]) == [{"median_s": 1.5}] * 2


def test_a_case_that_fails_names_its_log_and_leaves_no_record(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Case, "command", ["-c", "print('why'); raise SystemExit(2)"])
    lab = Lab(tmp_path, steps=1, hosts=1)
    case = lab.case("tiny")
    with pytest.raises(CaseError, match=r"ended with 2 after 0 steps; see \S+/host0\.log"):
        lab.measure([case])
    assert not list(tmp_path.glob("cases/*"))
    assert (tmp_path / "logs" / case.key / "host0.log").read_text() == "why\n"


@pytest.mark.full
@pytest.mark.parametrize(
    ("program", "local"), [("train", False), ("train", True), ("forward", False), ("forward", True)]
)
def test_a_case_is_measured_on_four_hosts(tmp_path: pathlib.Path, program: str, local: bool) -> None:
    lab = Lab(tmp_path, steps=2)
    (record,) = lab.measure([lab.case("tiny", program=program, local=local)])
    assert len(record["seconds"]) == 2 and record["median_s"] > 0
    assert record["unit"] == ("step" if program == "train" else "pass")
    assert not list(tmp_path.glob("runs/*"))


def test_shares_and_medians() -> None:
    assert exchange_share(10.0, 2.0) == pytest.approx(0.8)
    assert median([{"median_s": s} for s in (3.0, 1.0, 2.0)]) == 2.0


def test_a_perplexity_is_reached_between_two_checkpoints() -> None:
    points = [{"step": n, "perplexity": p} for n, p in ((10, 100.0), (20, 60.0), (30, 50.0))]
    assert steps_to(points, 80.0) == pytest.approx(15.0)
    assert steps_to(points, 50.0) == pytest.approx(30.0)
    assert steps_to(points, 120.0) == 10.0
    assert steps_to(points, 49.0) is None
