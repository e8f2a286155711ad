"""docs/reproduction.md and its notes hold what docs/results holds, and nothing else."""

import json
import pathlib
import re
from typing import Any

import pytest

from benchmarks.markers import markers
from benchmarks.reproduce import pages
from benchmarks.reproduce.calibrate import SHARE, CalibrationError, rate_of
from benchmarks.reproduce.experiments import EXPERIMENTS

DOCS = pathlib.Path(__file__).parents[2] / "docs"
BEGIN, END = markers("results")


def images(docs: pathlib.Path) -> set[str]:
    return {path.stem for path in (docs / pages.IMAGES).glob("*")}


def check(docs: pathlib.Path) -> None:
    """Every picture and every section has its raw file, and page and notes are those that they make."""
    results = pages.read(docs)
    names = {result["name"] for result in results}
    assert images(docs) == names, "a picture without a raw file, or a raw file without its picture"
    if not (docs / pages.NOTES).exists():
        assert not names
        return
    text = (docs / pages.NOTES).read_text()
    assert set(re.findall(rf"{pages.IMAGES}/(\w+)\.png", text)) == names
    for page, made in ((pages.NOTES, "".join(map(pages.section, results))), (pages.PAGE, pages.summary(results))):
        between = (docs / page).read_text().partition(BEGIN)[2].partition(END)[0]
        assert between.strip() == made.strip(), f"{page} was not made from docs/results"


def result(name: str) -> dict[str, Any]:
    """Invented: only to see what a page makes of it."""
    machine = {"processor": "P", "cores": 2, "memory_gb": 8, "python": "3", "jax": "0", "flax": "0", "commit": "abc"}
    return {
        "name": name, "title": "T", "about": "A.", "command": "python -m x", "date": "2026-01-01", "machine": machine,
        "runs": 3, "steps": 20, "calibration": {"rate": 5e7, "share": 0.92}, "records": [],
        "rows": [
            {"what": "a", "paper": 2.0, "here": 3.0, "unit": "×", "lowest": 2.5, "highest": 3.5},
            {"what": "b", "paper": None, "here": 1.0, "unit": "×"},
        ],
        "traffic": {"a": {"exchange_sent_bytes": 1e8, "metadata_sent_bytes": 0, "other_sent_bytes": 4e6}},
    }  # fmt: skip


@pytest.fixture
def docs(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "results").mkdir()
    for name in ("figure3", "table1"):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(result(name)))
    (tmp_path / pages.NOTES).parent.mkdir()
    (tmp_path / pages.NOTES).write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    pages.write(tmp_path)
    return tmp_path


def test_the_page_in_this_repository_is_made_from_its_raw_files() -> None:
    check(DOCS)


def test_notes_say_paper_here_ratio_and_origin(docs: pathlib.Path) -> None:
    text = (docs / pages.NOTES).read_text()
    check(docs)
    assert text.startswith("# Before\n") and text.endswith("\nAfter\n") and "old" not in text
    assert "| a | 2.00× | 3.00× (2.50–3.50) | 1.50 |" in text
    assert "| b |  | 1.00× |  |" in text
    assert "| a | 100.00 | 0.00 | 4.00 | 4.0 % |" in text
    for part in (
        "python -m x",
        "2026-01-01",
        "2 cores of P",
        "jax 0",
        "commit abc",
        "50 Mbit/s",
        "results/table1.json",
    ):
        assert part in text
    assert text.index("table1.png") < text.index("figure3.png")


def test_the_page_has_the_rows_that_decide(docs: pathlib.Path) -> None:
    rows = [{"what": what, "paper": 2.0, "here": 3.0, "unit": "×"} for what in ("small, K = 4", "medium, K = 4")]
    path = docs / "results/figure3.json"
    path.write_text(json.dumps(result("figure3") | {"title": "Figure 3: it", "rows": rows}))
    pages.write(docs)
    check(docs)
    text = (docs / pages.PAGE).read_text()
    title = "| **[Figure 3: it](notes/reproduction.md#figure-3-it)** | | | |"
    assert f"{title}\n| small, K = 4 | 2.00× | 3.00× | 1.50 |\n" in text
    assert "medium" not in text and "medium" in (docs / pages.NOTES).read_text()


def test_without_gradients_a_page_has_what_left_the_hosts(docs: pathlib.Path) -> None:
    def record(*overrides: str, repeat: int = 0) -> dict[str, Any]:
        return {"case": {"overrides": [*overrides, "a.b=1"], "repeat": repeat}, "link_bytes_a_step": [1e6, 5e5]}

    big = "model.structure=bigmac"
    records = [record("data.x=2"), record("data.x=2", repeat=1), record("data.x=2", big)]
    path = docs / "results/table1.json"
    path.write_text(json.dumps(result("table1") | {"traffic": {}, "records": records}))
    pages.write(docs)
    check(docs)
    text = (docs / pages.NOTES).read_text()
    assert "|---|---|\n|  | 1.50 |\n| structure = bigmac | 1.50 |\n" in text


def test_a_figure_without_its_raw_file_is_found(docs: pathlib.Path) -> None:
    (docs / "results/figure3.json").unlink()
    with pytest.raises(AssertionError, match="a picture without a raw file"):
        check(docs)
    (docs / pages.IMAGES / "figure3.png").unlink()
    with pytest.raises(AssertionError):
        check(docs)


def test_a_number_changed_by_hand_is_found(docs: pathlib.Path) -> None:
    page = docs / pages.NOTES
    page.write_text(page.read_text().replace("3.00×", "3.10×"))
    with pytest.raises(AssertionError, match="was not made from"):
        check(docs)


def test_every_experiment_has_a_place_on_the_page() -> None:
    assert set(pages.HEADLINES) == set(EXPERIMENTS)


def test_the_rate_solves_the_model_of_a_step() -> None:
    seconds, gradients, exchange = 0.7, 2e6, 300e6
    rate = rate_of(seconds, gradients, exchange)
    step = seconds + (gradients + exchange) / rate
    assert exchange / rate / step == pytest.approx(SHARE)
    assert rate_of(1.0, 0.0, 1e6, 0.75) == pytest.approx(1e6 / 3)
    with pytest.raises(CalibrationError, match=r"10\.0% of the exchange's time"):
        rate_of(seconds, 30e6, exchange)
