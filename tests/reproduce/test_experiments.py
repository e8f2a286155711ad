"""What experiments make of what was measured, with measurements of which the answer is known."""

import pathlib
from collections.abc import Sequence

import pytest

from benchmarks.reproduce.experiments import BIGMAC, EXPERIMENTS
from benchmarks.reproduce.lab import WARM, Case, Lab, Record


def test_batches_of_several_lengths_are_told_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fine_grained takes n² seconds for n tokens, bigmac n."""

    def measure(lab: Lab, cases: Sequence[Case]) -> list[Record]:
        lengths = [int(new) for case in cases for a in case.arguments if "new" in a for new in a[6:].split(",")]
        power = 1 if BIGMAC in cases[0].overrides else 2
        lines = [lengths[line % len(lengths)] ** power for line in range(WARM + cases[0].steps)]
        return [{"seconds": lines[WARM:]} for _ in cases]

    monkeypatch.setattr(Lab, "measure", measure)
    rows = EXPERIMENTS["table9"](Lab(tmp_path, steps=3, repeats=1), 1e6, False).rows
    assert [row["here"] for row in rows] == [1, 2, 5, 10] * 4
    assert [row["paper"] for row in rows[:8]] == [3.11, 2.89, 2.41, 1.99, 2.81, 2.50, 2.03, 1.62]
    assert rows[1]["what"] == "all_to_all, K = 8, tokens generated: 2"
