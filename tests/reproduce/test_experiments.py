"""What experiments make of what was measured, with measurements of which the answer is known."""

import pathlib
from collections.abc import Callable, Sequence

import pytest

from benchmarks.reproduce import perplexity, result, two_level
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.lab import WARM, Case, Lab, Record
from benchmarks.reproduce.learning import Course
from benchmarks.reproduce.result import BIGMAC, Result


@pytest.fixture
def experiment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """An experiment by name, where a case takes what a function says."""

    def run(name: str, seconds: Callable[[Case], float | list[float]], repeats: int = 1) -> Result:
        def measure(lab: Lab, cases: Sequence[Case]) -> list[Record]:
            return [{"median_s": took, "seconds": took, "unit": "step"} for took in map(seconds, cases)]

        monkeypatch.setattr(Lab, "measure", measure)
        monkeypatch.setattr(Lab, "traffic", lambda *_: {"exchange_sent_bytes": 1e7, "other_sent_bytes": 1e5})
        return EXPERIMENTS[name](Lab(tmp_path, steps=3, repeats=repeats), 1e6, False)

    return run


def choices(case: Case) -> int:
    return next((int(field[12:]) for field in case.overrides if field.startswith("model.top_k=")), 8)


def test_batches_of_several_lengths_are_told_apart(experiment: Callable[..., Result]) -> None:
    """fine_grained takes n² seconds for n tokens, bigmac n."""

    def seconds(case: Case) -> list[float]:
        lengths = [int(new) for a in case.arguments if a.startswith("--new=") for new in a[6:].split(",")]
        power = 1 if BIGMAC in case.overrides else 2
        return [float(lengths[line % len(lengths)] ** power) for line in range(WARM + case.steps)][WARM:]

    rows = experiment("table9", seconds).rows
    assert [row["here"] for row in rows] == [1, 2, 5, 10] * 4
    assert [row["paper"] for row in rows[:8]] == [3.11, 2.89, 2.41, 1.99, 2.81, 2.50, 2.03, 1.62]
    assert rows[1]["what"] == "all_to_all, K = 8, tokens generated: 2"


def test_inference_has_its_own_rate(experiment: Callable[..., Result]) -> None:
    """A step computes for 0.5 s and a pass for 0.05; both exchange K/4 Mbit."""

    def seconds(case: Case) -> float:
        computed = 0.5 if case.program == "train" else 0.05
        return computed + (0 if case.local else choices(case) * 0.25e6 / case.rate)

    rows = experiment("table1", seconds).rows
    shares = [row["here"] for row in rows]
    assert shares[0] == pytest.approx(100 * 0.25 / 0.75, abs=0.01)
    assert shares[9] == pytest.approx(100 * 2 / 2.05, abs=0.01)
    # 90.6 % at K = 8: 0.05 · 90.6 / 9.4 = 0.4819 s for 2 Mbit.
    assert rows[10]["what"] == "inference, 4.15 Mbit/s, K = 1"
    assert shares[14] == pytest.approx(90.6, abs=0.01)
    assert shares[10] == pytest.approx(100 * 0.4819 / 8 / (0.4819 / 8 + 0.05), abs=0.01)


def test_all_runs_of_the_first_size_and_one_of_the_second(experiment: Callable[..., Result]) -> None:
    """fine_grained takes K s, bigmac 1, 2 and 4 s."""
    result = experiment("figure3", lambda c: 2.0**c.repeat if BIGMAC in c.overrides else float(choices(c)), 3)
    small, medium = result.rows[1], result.rows[4]
    assert small == {"what": "small, K = 8", "paper": 3.07, "here": 4, "unit": "×", "lowest": 2, "highest": 8}
    assert medium == {"what": "medium, K = 8", "paper": 3.07, "here": 8, "unit": "×"}
    assert len(result.records) == 4 * 3 + 4


def test_an_exchange_is_what_a_step_takes_longer(experiment: Callable[..., Result]) -> None:
    """fine_grained computes for 1 s and exchanges for K, bigmac for 2 s and K / 4."""

    def seconds(case: Case) -> float:
        big = BIGMAC in case.overrides
        return (2 if big else 1) + (0 if case.local else choices(case) / (4 if big else 1))

    rows = experiment("figure4", seconds).rows
    assert [row["here"] for row in rows] == [round(5 / 3, 4), 4, 9 / 4, 4] * 2
    assert [row["paper"] for row in rows[2:4]] == [2.95, 3.72]
    assert rows[4]["what"] == "ep 2, tp 2, K = 4, end to end"


def test_losses_are_compared_seed_by_seed(experiment: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds differ more than exchanges: 8 bits cost 1 % of each."""

    def learn(lab: Lab, course: Course) -> Record:
        eight = "execution.wire_dtype=int8" in course.overrides
        return {"final_loss": (course.seed - 1233) * (1.01 if eight else 1)}

    monkeypatch.setattr(two_level, "learn", learn)
    rows = experiment("strategies", lambda c: 1.0 if c.local else 3.0 if "all_to_all" in str(c.overrides) else 2.0).rows
    assert [row["here"] for row in rows] == [1, 1, 2, 2, 2, 2, 2, 2, *[1, 1.01, 1.01] * 2]
    assert rows[-1]["lowest"] == rows[-1]["highest"] == 1.01


def test_a_perplexity_is_compared_by_time_and_by_seed(
    experiment: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes fine_grained 8 s, the others 2. Of 300 steps bigmac needs 150 for what fine_grained ends at, and
    ends at half of it; vanilla never comes there. Seeds end at 8, 9, 10 (fine_grained)."""

    def learn(lab: Lab, course: Course) -> Record:
        big, vanilla = BIGMAC in course.overrides, "model.structure=vanilla" in course.overrides
        end = 8 + course.seed - 1234
        points = {100: 4 * end, 150: end, 300: end / 2} if big else {100: 4 * end, 300: end * (2 if vanilla else 1)}
        return {"evaluations": [{"step": step, "perplexity": value} for step, value in points.items()]}

    monkeypatch.setattr(perplexity, "learn", learn)
    big_or_vanilla = (BIGMAC, "model.structure=vanilla")
    result = experiment("figure1", lambda case: 2.0 if set(big_or_vanilla) & set(case.overrides) else 8.0)
    rows = result.rows
    assert [row["here"] for row in rows[:6]] == [4, 4, 4, 8, 8, None]
    assert rows[3]["lowest"] == rows[3]["highest"] == 8
    assert [row["here"] for row in rows[6:15]] == [9, 4.5, 4.5, 16, 8, 8, 4, 9, 4.5]
    assert (rows[6]["lowest"], rows[6]["highest"]) == (8, 10)
    error = round(0.5 * (2 * (1 / 3**0.5 / 9) ** 2) ** 0.5, 4)
    assert [row["here"] for row in rows[15:]] == [0.5, error] * 3
    assert {record["step_s"] for record in result.records if record.get("name") == "bigmac"} == {2.0}


def test_seeds_are_averaged_before_a_perplexity_is_looked_for() -> None:
    runs = [{"evaluations": [{"step": 100, "perplexity": p}, {"step": 200, "perplexity": 2.0}]} for p in (4.0, 8.0)]
    assert perplexity.mean_curve(runs) == [{"step": 100, "perplexity": 6.0}, {"step": 200, "perplexity": 2.0}]


def test_the_links_of_two_machines() -> None:
    """Half of the rows of two hosts take as long between them as three quarters of one host's rows did."""
    links = result.two_level(24e6)
    assert links == {"rate": 32e6, "machine": 2, "fast_rate": 256e6}
    assert 2 * 0.5 / links["rate"] == pytest.approx(0.75 / 24e6)
