"""report.png from what a run logged, whatever it logged."""

import json
import pathlib
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from bigmac_jax.config import Config
from bigmac_jax.report.page import page
from bigmac_jax.report.plots import _losses, write_report
from bigmac_jax.report.runs import read_runs
from bigmac_jax.training.metrics_file import drop_records, read_records


def training(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": 5.0 - number, "tokens_per_s": 100.0, "mfu": 0.25} | more


def evaluation(step: int, loss: float | None) -> dict[str, Any]:
    return {"step": step, "eval/loss": loss, "eval/perplexity": loss, "eval/bits_per_byte": loss}


EXPERTS = {"moe/load": [[0.5, 1.5, 1.0], [1.0, 1.0, 1.0]], "moe/drop_rate_by_layer": [0.1, 0.0], "moe/moved_rate": 0.2}
LOGGED = {
    "dense": [training(1), training(2)],
    "moe": [training(1, **EXPERTS), evaluation(1, 4.0), training(2, **EXPERTS), evaluation(2, 3.0)],
    "one step": [training(1, **EXPERTS)],
    "a loss that was not finite": [training(1), training(2, loss=None), training(3, mfu=None)],
    "an evaluation that was not finite": [training(1), evaluation(1, None)],
    "evaluations of both kinds": [training(1), evaluation(1, 2.0), training(2), evaluation(2, None)],
}


def write(workdir: pathlib.Path, records: list[dict[str, Any]]) -> None:
    (workdir / "config.json").write_text(Config().to_json())
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("records", LOGGED.values(), ids=LOGGED)
def test_a_picture(tmp_path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    write(tmp_path, records)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (880, 1320) and pixels.std() > 0.05
    assert read_records(tmp_path) == records


@pytest.mark.parametrize("of_pairs", [False, True])
def test_the_losses_of_one_curve_are_alike(of_pairs: bool) -> None:
    axis = Figure().subplots()
    _losses(axis, [training(1), training(2)], [evaluation(2, 3.0)], of_pairs)
    assert [line.get_label() for line in axis.get_lines()] == (["training"] if of_pairs else ["training", "validation"])
    assert axis.get_ylabel() == ("DPO loss, a pair" if of_pairs else "loss, nats a token")
    assert axis.get_title() == "best validation perplexity 3.00 at step 2"


WRONG = [
    training(3, loss="low"), training(3, loss=[1.0]), training(3, tokens_per_s={"a": 1}), training(3, mfu=True),
    training(0, step="3"), training(-3), training(3, **EXPERTS | {"moe/load": [[1.0], [1.0, 2.0]]}),
    training(3, **EXPERTS | {"moe/load": []}), training(3, **EXPERTS | {"moe/load": [["x"]]}),
    training(3, **EXPERTS | {"moe/drop_rate_by_layer": 0.5}), {"step": 3, "event": 7}, evaluation(3, "low"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("record", WRONG, ids=range(len(WRONG)))
def test_a_record_of_a_wrong_type_is_left_out(tmp_path: pathlib.Path, record: dict[str, Any]) -> None:
    """Of the picture, of the page and of what a resumed run keeps."""
    good = LOGGED["moe"]
    write(tmp_path, [*good, record, training(3, **EXPERTS)])
    assert read_records(tmp_path) == [*good, training(3, **EXPERTS)]
    assert page(read_runs([str(tmp_path)])).endswith("</html>\n")
    drop_records(tmp_path, 2)
    assert read_records(tmp_path) == good


def test_numbers_that_no_run_reaches(tmp_path: pathlib.Path) -> None:
    """They are drawn, and nothing overflows."""
    huge = {"step_time_s": 1e300, "tokens": 10**18, "moe/load": [[1e300, -1e300, 0.0]] * 2}
    write(tmp_path, [training(1, **EXPERTS), training(2**62, **EXPERTS | huge), evaluation(2**62, 1e300)])
    assert page(read_runs([str(tmp_path)])).endswith("</html>\n")


@pytest.mark.parametrize("records", [[], [evaluation(1, 2.0)]], ids=["nothing", "an evaluation alone"])
def test_no_picture_without_training(tmp_path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    write(tmp_path, records)
    assert write_report(tmp_path) is None
    assert not (tmp_path / "report.png").exists()


def test_no_metrics(tmp_path: pathlib.Path) -> None:
    assert read_records(tmp_path) == [] and write_report(tmp_path) is None
