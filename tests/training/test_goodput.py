"""What a run's start took, in a line."""

import pytest

from bigmac_jax.training import goodput


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
    seconds = {"start": 1.5, "compile": 2.0, "data wait": 0.04, "restore": 0.05}
    monkeypatch.setattr(goodput.clock, "seconds", lambda: seconds)
    assert goodput.describe_start(compiling) == f"start: other 1.5 s, compile 2.0 s, restore 0.1 s{beside}"
    assert goodput.start_record(3) == {
        "step": 3, "start/start_s": 1.5, "start/compile_s": 2.0, "start/data_wait_s": 0.04, "start/restore_s": 0.05
    }  # fmt: skip


def test_a_start_that_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput.clock, "seconds", lambda: {"start": 1.0})
    assert goodput.describe_start(0.0) == "start: other 1.0 s"
    assert goodput.describe_start(0.5) == "start: other 1.0 s; of 0.5 s of compiling, 0.5 s went on beside the rest"
