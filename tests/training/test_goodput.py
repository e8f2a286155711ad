"""What a run's start took, in a line."""

from types import SimpleNamespace

import pytest

from bigmac_jax.training import goodput
from bigmac_jax.training.goodput import Goodput


@pytest.mark.parametrize(
    ("compiling", "beside"),
    [
        (2.0, ""),
        (2.05, ""),
        (2.08, "; of 2.1 s of compiling, 0.1 s went on beside the rest"),
        (9.0, "; of 9.0 s of compiling, 7.0 s went on beside the rest"),
    ],
)
def test_a_start_is_described(compiling: float, beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took less than a twentieth of a second is left out."""
    seconds = {"start": 1.5, "compile": 2.0, "data wait": 0.04, "restore": 0.05123}
    monkeypatch.setattr(goodput.clock, "seconds", lambda: seconds)
    assert goodput.describe_start(compiling) == f"start: other 1.5 s, compile 2.0 s, restore 0.1 s{beside}"
    assert goodput.start_record(3) == {
        "step": 3, "start/start_s": 1.5, "start/compile_s": 2.0, "start/data_wait_s": 0.04, "start/restore_s": 0.051
    }  # fmt: skip


def test_a_start_that_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput.clock, "seconds", lambda: {"start": 1.0})
    assert goodput.describe_start(0.0) == goodput.describe_start(0.05) == "start: other 1.0 s"
    assert goodput.describe_start(0.5) == "start: other 1.0 s; of 0.5 s of compiling, 0.5 s went on beside the rest"


PARTS = {"steps": 6.0, "data_wait": 1.0, "compile": 2.0, "save": 3.0, "evaluate": 1.5, "start": 5.0, "restart": 1.0,
         "lost": 0.5}  # fmt: skip


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of each phase, which a test sets; "now" is what time.time says."""
    at = {"now": 103.0, "start": 3.0}
    monkeypatch.setattr(goodput.clock, "seconds", lambda: {name: s for name, s in at.items() if name != "now"})
    monkeypatch.setattr(goodput, "time", SimpleNamespace(time=lambda: at["now"]))
    return at


def parts(record: dict[str, float]) -> dict[str, float]:
    return {part: record[f"goodput/{part}_s"] for part in PARTS}


def test_the_parts_of_a_first_start(passed: dict[str, float]) -> None:
    """It began 3 s before; phases that are no part are of the start."""
    counted = Goodput([], 0)
    passed |= {"now": 117.62512, "start": 5.0, "restore": 0.9575, "first step": 0.75012, "compile": 2.0,
               "data wait": 0.5, "steps": 8.0425, "save": 0.25, "evaluate": 0.125}  # fmt: skip
    record = counted.record(4)
    expected = {"steps": 8.043, "data_wait": 0.5, "compile": 2.0, "save": 0.25, "evaluate": 0.125, "start": 6.708}
    assert parts(record) == expected | {"restart": 0.0, "lost": 0.0}
    assert record["goodput/wall_s"] == 17.625 and record["goodput/since_unix_s"] == 100.0
    assert record["goodput/share"] == 0.4563  # 8.0425 of 17.625
    assert len(record) == len(PARTS) + 3


def test_steps_that_are_done_again_are_lost(passed: dict[str, float]) -> None:
    """4 steps took 8 s and 6 took 11; back to 4 after 12 s, to 5 where nothing is lost, and to the beginning."""
    counted = Goodput([], 0)
    for step, seconds in ((4, 8.0), (6, 11.0)):
        passed["steps"] = seconds
        counted.record(step)
    passed["steps"] = 12.0
    counted.go_back(4)
    passed["steps"] = 13.0
    found = parts(counted.record(5))
    assert (found["steps"], found["lost"]) == (9.0, 4.0)
    counted.go_back(5)
    found = parts(counted.record(5))
    assert (found["steps"], found["lost"]) == (9.0, 4.0)
    counted.go_back(0)
    found = parts(counted.record(0))
    assert (found["steps"], found["lost"]) == (0.0, 13.0)


def test_steps_between_two_records_take_the_same_time(passed: dict[str, float]) -> None:
    """4 steps took 8 s and 6 took 11, and the run is at 10 after 15: back to 8 and to 5, of which no record is."""
    counted = Goodput([], 0)
    for step, seconds in ((4, 8.0), (6, 11.0)):
        passed["steps"] = seconds
        counted.record(step)
    passed["steps"] = 15.0
    counted.go_back(8, 10)
    found = parts(counted.record(8))
    assert (found["steps"], found["lost"]) == (13.0, 2.0)
    counted.go_back(5)
    found = parts(counted.record(5))
    assert (found["steps"], found["lost"]) == (9.5, 5.5)
    last = {f"goodput/{part}_s": seconds for part, seconds in PARTS.items()} | {"goodput/since_unix_s": 100.0}
    records = [last | {"step": step, "goodput/steps_s": step / 10, "goodput/wall_s": 20.0} for step in (20, 40)]
    passed["steps"] = 0.0
    found = parts(Goodput(records, 30).record(30))
    assert (found["steps"], found["lost"]) == (3.0, 1.5)


def test_a_later_start_goes_on_counting(passed: dict[str, float]) -> None:
    """The run began at 100 and had counted 20 s; at 128.5 this process began, and goes on from step 2 of 5."""
    last = {f"goodput/{part}_s": seconds for part, seconds in PARTS.items()}
    last |= {"step": 5, "goodput/wall_s": 20.0, "goodput/since_unix_s": 100.0}
    earlier = [last | {"step": step, "goodput/steps_s": 1.5 * step, "goodput/wall_s": 9.0} for step in (1, 2, 4)]
    records = [*earlier, {"step": 3, "goodput/steps_s": 4.0}, last, {"step": 5}]
    passed |= {"now": 130.0, "start": 1.0, "restore": 0.5}
    record = Goodput(records, 2).record(2)
    expected = PARTS | {"steps": 3.0, "lost": 0.5 + 3.0, "restart": 1.0 + 8.5 + 1.5}
    assert parts(record) == expected and sum(expected.values()) == record["goodput/wall_s"] == 30.0
    assert record["goodput/since_unix_s"] == 100.0
    for name in last.keys() - {"step"}:  # of an earlier version, or no number
        for value in ({}, {name: None}):
            without = Goodput([{k: v for k, v in last.items() if k != name} | value], 5).record(5)
            assert without["goodput/since_unix_s"] == 128.5 and without["goodput/restart_s"] == 0.0
