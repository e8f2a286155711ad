"""The table of benchmarks.overflow, from runs by hand."""

from benchmarks.overflow_runs import table


def test_means_over_seeds_and_differences_to_the_dropless_run_of_a_seed() -> None:
    def run(factor: str, overflow: str, seed: int, loss: float, dropped: float, moved: float = 0.0) -> dict:
        series = {"step": list(range(10)), "dropped": [0.5] * 9 + [dropped], "moved": [0.0] * 9 + [moved]}
        return {"factor": factor, "overflow": overflow, "steps": 50, "seed": seed, "loss": loss, "dropped": dropped,
                "moved": moved, "series": series}  # fmt: skip

    runs = [
        run("1.0", "next", 2, 4.03, 0.03, 0.1), run("inf", "drop", 1, 4.0, 0.0), run("inf", "drop", 2, 4.02, 0.0),
        run("1.0", "next", 1, 4.02, 0.01, 0.1), run("1.25", "drop", 3, 5.0, 0.02),
    ]  # fmt: skip
    dropless, next_, alone = table(runs).splitlines()[2:]
    assert dropless == "| dropless | 2 | 0.00 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | 4.0100 ± 0.0100 |  |"
    assert next_.split(" | ")[2:6] == ["2.00 ± 1.00", "2.00 ± 1.00", "10.00 ± 0.00", "10.00 ± 0.00"]
    assert next_.endswith(" | 4.0250 ± 0.0050 | +15.0 ± 5.0 |")
    assert alone == "| factor 1.25, drop | 1 | 2.00 | 2.00 | 0.00 | 0.00 | 5.0000 |  |"
