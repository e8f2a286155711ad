"""report.html: what stands in it is what was logged, for every kind of run; it needs nothing else."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bigmac_jax.config import Config, ConfigError, ModelConfig, TrainConfig, TuningConfig
from bigmac_jax.config.objects import seal
from bigmac_jax.report.page import page, write_page
from bigmac_jax.report.runs import Run, read_runs
from bigmac_jax.report.series import POINTS, curves, expert_load, thin
from bigmac_jax.report.tables import differences, facts, notes

CHARTS = ["loss", "eval/perplexity", "eval/bits_per_byte", "moe/drop_rate", "moe/moved_rate", "moe/wire_bytes",
          "tokens_per_s", "step_time_s"]  # fmt: skip  # of `runs`
VOID = {"meta", "link", "input", "br"}
MOE = Config(model=ModelConfig(num_layers=2, hidden_size=16, num_heads=1, vocab_size=384, num_experts=4, top_k=2))
DENSE = Config(model=ModelConfig("dense", num_layers=2, hidden_size=16, num_heads=1, vocab_size=384))


def training(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 64 * step,
        "loss": 5 - step / 100,
        "step_time_s": 36.0,
        "tokens_per_s": 64 / 36,
    } | more


def routed(step: int) -> dict[str, Any]:
    load = [[0.0, 1.0 + step / 1000, 2.0, 1.0 - step / 1000], [4.0, 0.0, 0.0, 0.0]]
    routing = {"moe/drop_rate": 0.25, "moe/moved_rate": 0.125, "moe/wire_bytes": 3 << 20, "moe/load": load}
    return training(step, mfu_causal=0.25, **routing)


def evaluation(step: int, perplexity: float) -> dict[str, Any]:
    figures = {"eval/loss": float(np.log(perplexity)), "eval/bits_per_byte": float(np.log2(perplexity)) / 4}
    return {"step": step, "eval/perplexity": perplexity} | figures


def write(workdir: pathlib.Path, config: Config, records: list[dict[str, Any]], end: str = "") -> str:
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return str(workdir)


class Seen(html.parser.HTMLParser):
    """Elements with their attributes, texts by element, what was left open."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def data(self) -> list[dict[str, Any]]:
        return json.loads(self.texts["script"][0])["runs"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A routed run with evaluations, and a shorter dense one."""
    folder = tmp_path_factory.mktemp("runs")
    records = [r for step in range(10, 101, 10) for r in (routed(step), evaluation(step, 100 - abs(step - 70)))]
    first = write(folder / "first", MOE, records)
    return read_runs([first, write(folder / "second", DENSE, [training(5), training(10)])])


def test_it_needs_nothing_else(runs: list[Run]) -> None:
    text = page(runs)
    seen = Seen(text)
    assert not seen.open
    links = [a[name] for _, a in seen.elements for name in ("src", "href", "action", "srcset") if name in a]
    assert links == ["data:,"]  # no icon is asked for either
    assert not any(word in text for word in ("://", "@import", "fetch(", "XMLHttpRequest", "import("))
    assert set(re.findall(r"url\(.", text)) == {"url(#"}
    policy = next(a["content"] for _, a in seen.elements if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none';")
    assert "{{" not in text and len(text) < 100_000


def test_curves_are_what_was_logged(runs: list[Run]) -> None:
    first, second = Seen(page(runs)).data()
    assert (first["letter"], first["name"], second["letter"], second["name"]) == ("A", "first", "B", "second")
    steps = list(range(10, 101, 10))
    assert first["series"]["loss"] == {"step": steps, "value": [5 - step / 100 for step in steps]}
    assert first["series"]["eval/perplexity"]["value"] == [100 - abs(step - 70) for step in steps]
    assert first["series"]["moe/wire_bytes"]["value"] == [3 << 20] * 10
    assert first["clock"]["tokens"] == [64 * step for step in [0, *steps]]
    assert first["clock"]["hours"] == pytest.approx([step / 100 for step in [0, *steps]])  # 36 s a step, 10 a record
    assert second["series"].keys() == {"loss", "step_time_s", "tokens_per_s"} and second["load"] is None


def test_loads_are_what_was_logged(runs: list[Run]) -> None:
    load = Seen(page(runs)).data()[0]["load"]
    cells = np.frombuffer(base64.b64decode(load["cells"]), np.uint8).reshape(2, 4, 10)
    found = load["max"] * (cells / 255.0) ** 2
    expected = np.asarray([r["moe/load"] for r in runs[0].training]).transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert (load["layers"], load["experts"], load["step"]) == (2, 4, list(range(10, 101, 10)))


def test_tables(runs: list[Run]) -> None:
    routed_facts, dense_facts = facts(runs[0]), facts(runs[1])
    assert routed_facts["validation perplexity, last"] == "70.00"
    assert routed_facts["validation perplexity, best"] == "40.00 at step 10"
    assert routed_facts["validation bits per byte, last"] == f"{np.log2(70) / 4:.4f}"
    assert routed_facts["validation bits per byte, best"] == f"{np.log2(40) / 4:.4f} at step 10"
    assert dense_facts["validation bits per byte, best"] == "–"
    assert routed_facts["dropped choices, mean"] == "25.00% (model.capacity_factor=inf drops none)"
    assert routed_facts["moved choices, mean"] == "12.50%" and dense_facts["moved choices, mean"] == "–"
    assert routed_facts["exchange a step"] == "3.00 MiB"
    assert routed_facts["MFU with causal attention, median"] == "25.0%" and routed_facts["MFU, median"] == "–"
    assert routed_facts["experts a layer, top-k"] == "4, top-2" and dense_facts["experts a layer, top-k"] == "dense"
    assert routed_facts["time of training steps"] == "1 h" and dense_facts["validation perplexity, last"] == "–"
    different, equal = differences(runs)
    assert different["model.structure"] == ["bigmac", "dense"]
    assert equal["model.hidden_size"] == [16, 16] and "model.structure" not in equal
    assert len(different) + len(equal) == len(runs[0].fields)
    seen = Seen(page(runs))
    tags = [tag for tag, _ in seen.elements]
    assert tags.count("table") == tags.count("thead") == 3
    assert tags.index("details") > [a.get("class") for _, a in seen.elements].index("differs")  # equal ones come last
    assert seen.texts["strong"][0] == "≠ dense"


def test_losses_of_pairs_and_of_tokens_are_two_charts(runs: list[Run]) -> None:
    """DPO's is no curve that its validation loss, of a token, could be a marker of."""
    train, tuning = TrainConfig(init_from="there"), TuningConfig(objective="dpo")
    data = dataclasses.replace(MOE.data, source="pairs.jsonl", documents="masked", packing="best_fit")
    tuned = dataclasses.replace(runs[0], config=dataclasses.replace(MOE, train=train, tuning=tuning, data=data))
    seen = Seen(page([tuned, runs[1]]))
    dpo, dense = (run["series"] for run in seen.data())
    assert dpo["dpo/loss"]["value"][0] == 4.9 and "loss" not in dpo and "eval/loss" in dpo
    assert "loss" in dense and "dpo/loss" not in dense
    marks = {a["data-key"]: a.get("data-marks") for _, a in seen.elements if "data-key" in a}
    assert (marks["loss"], marks["dpo/loss"]) == ("eval/loss", None)
    rows = {"training loss, last": "–", "DPO loss of a pair, last": "4.0000"}
    assert facts(tuned) | rows == facts(tuned)
    assert facts(runs[0])["DPO loss of a pair, last"] == "–" and "DPO loss of a pair, last" not in page(runs)


def with_data(run: Run, objective: str = "pretrain", fingerprints: Any = (), **data: Any) -> Run:
    """The run on other data, or trained for something else."""
    fields = {"data": dataclasses.replace(MOE.data, **data)}
    if objective != "pretrain":
        fields["data"] = dataclasses.replace(fields["data"], source="rows.jsonl", documents="masked")
        fields |= {"train": TrainConfig(init_from="there"), "tuning": TuningConfig(objective=objective)}
    return dataclasses.replace(run, config=dataclasses.replace(MOE, **fields), fingerprints=dict(fingerprints))


def test_what_does_not_compare_is_said(runs: list[Run]) -> None:
    """Tokenizers and texts are told by their fingerprints, where all runs have them; else by the config."""
    run, other = runs  # which has no evaluation
    assert notes(runs) == notes([run]) == notes([run, with_data(run)]) == []
    unlike = [with_data(run), with_data(run, tokenizer="bytes"), with_data(other, validation_source="x"), run]
    (line,) = notes(unlike)
    assert line.startswith("Tokenizers differ: A = C = D ≠ B. Bits per byte compare them")
    assert line in page(unlike) and " differ: " not in page([run])
    texts = [run, with_data(run, source="x"), with_data(run, mixture="x=1,y=2"), with_data(run, validation_source="x")]
    assert notes(texts) == ["Validation texts differ: A ≠ B = D ≠ C. No figure of validation compares them."]
    assert notes([run, with_data(run, "sft")])[-1].startswith("Objectives differ: A ≠ B. Losses are over all tokens")
    windows = [
        run,
        with_data(run, sequence_length=16),
        with_data(run, documents="masked"),
        with_data(other, documents="masked"),
    ]
    (line,) = notes(windows)
    assert line.startswith("Windows differ (data.sequence_length, data.documents): A ≠ B ≠ C. Where more stands")
    same, another = {"tokenizer": "1", "validation": "2"}, {"tokenizer": "3", "validation": "4"}
    moved = [with_data(run, "pretrain", same), with_data(run, "pretrain", same, tokenizer="run/tokenizer.json")]
    assert notes(moved) == []  # a conversion's, which is a copy
    assert len(notes([*moved, with_data(run, "pretrain", another)])) == 2
    assert len(notes([*moved, run])) == 1  # of the names


def test_names_are_escaped(tmp_path: pathlib.Path) -> None:
    name = "<!--<script>alert(1)&amp;\"'{{data}}"
    workdir = write(tmp_path / name, MOE, [routed(1) | {"</script><b>": 1.0}])
    config = json.loads((tmp_path / name / "config.json").read_text())
    config["data"]["source"] = "</td></script><script>alert(2)"
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    seen = Seen(page(read_runs([workdir])))
    assert not seen.open and [tag for tag, _ in seen.elements].count("script") == 2
    assert seen.texts["title"] == [name] and seen.data()[0]["name"] == name
    assert config["data"]["source"] in seen.texts["td"] and "</script><b>" in seen.data()[0]["series"]


def test_names_need_not_be_utf8(tmp_path: pathlib.Path) -> None:
    """That of the run's folder, and of a file in its config."""
    config = dataclasses.replace(MOE, data=dataclasses.replace(MOE.data, source=os.fsdecode(b"text\xff.txt")))
    workdir = write(tmp_path / os.fsdecode(b"run\xff"), config, [routed(1)])
    write_page(read_runs([workdir]), tmp_path / "report.html")
    seen = Seen((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert seen.texts["title"] == ["run?"] and "text?.txt" in seen.texts["td"] and seen.data()[0]["name"] == "run\udcff"


def test_a_run_that_is_being_written(tmp_path: pathlib.Path) -> None:
    """Half a last line, a line cut by a full disk, values that are not finite, an event."""
    records = [routed(1), training(2, loss=float("nan")), {"step": 2, "event": "skip"}, training(3, mfu=float("inf"))]
    workdir = write(tmp_path / "run", MOE, records, '{"step": 4, "lo')
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"loss": 1.0}\n[1]\n\n' + path.read_text())
    (run,) = read_runs([workdir])
    (data,) = Seen(page([run])).data()
    assert data["series"]["loss"] == {"step": [1, 2, 3], "value": [4.99, None, 4.97]}
    assert data["events"] == [{"step": 2, "event": "skip"}] and facts(run)["bad steps"] == "1 skip"
    assert "mfu" not in data["series"] and data["load"]["step"] == [1]


def test_steps_that_were_logged_again(tmp_path: pathlib.Path) -> None:
    again = [
        training(1),
        training(2),
        training(3),
        evaluation(3, 9),
        training(2, loss=1.0),
        training(4),
        evaluation(3, 8),
    ]
    (run,) = read_runs([write(tmp_path / "run", DENSE, again)])
    assert [(r["step"], r["loss"]) for r in run.training] == [(1, 4.99), (2, 1.0), (4, 4.96)]
    assert [r["eval/perplexity"] for r in run.evaluations] == [8]


def test_thousands_of_records() -> None:
    """The page stays small, and keeps each curve's extremes and gaps."""
    rng = np.random.default_rng(0)
    loss_n = rng.normal(size=20_000)
    loss_n[[777, 15_000]] = 9, -9
    loss_n[10_000] = np.nan
    kept = thin(loss_n, POINTS)
    assert kept == sorted(set(kept)) and 500 < len(kept) <= POINTS
    assert {0, 777, 10_000, 15_000, 19_999} <= set(kept)
    load = rng.uniform(0, 2, (32, 64)).tolist()
    records = [
        training(i + 1, loss=None if np.isnan(x) else float(x), **{"moe/load": load})
        for i, x in enumerate(loss_n[:500])
    ]
    assert len(page([Run("long", MOE, records, [], [])])) < 500_000
    found = expert_load(records)
    assert found is not None and len(found["step"]) == 200_000 // (32 * 64) and found["step"][-1] == 500
    series = curves([training(i + 1, loss=float(x)) for i, x in enumerate(loss_n)])
    assert len(series["loss"]["step"]) <= POINTS and series["loss"]["step"][-1] == 20_000


def test_names_and_fingerprints_of_runs(tmp_path: pathlib.Path) -> None:
    a, b = (write(tmp_path / parent / "run", DENSE, [training(1)]) for parent in ("a", "b"))
    (tmp_path / "a" / "run" / "run.json").write_text(json.dumps(seal({"data": {"tokenizer": "7"}})))
    assert [(run.name, run.fingerprints) for run in read_runs([a, b])] == [(a, {"tokenizer": "7"}), (b, {})]
    assert [run.name for run in read_runs([a])] == ["run"]


@pytest.mark.parametrize(
    ("records", "config", "message"),
    [
        ([], "{}", "has logged no training step"),
        ([evaluation(1, 2.0)], "{}", "has logged no training step"),
        ([training(1)], "{", "cannot be read"),
        ([training(1)], "[]", "cannot be read"),
    ],
    ids=["empty", "evaluations alone", "half a config", "no config"],
)
def test_errors(tmp_path: pathlib.Path, records: list[dict[str, Any]], config: str, message: str) -> None:
    workdir = write(tmp_path / "run", DENSE, records)
    (tmp_path / "run" / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message) as error:
        read_runs([workdir])
    assert str(error.value).startswith(f"RUN={workdir} ") and "\n" not in str(error.value)


def test_a_config_that_changed_is_not_shown(tmp_path: pathlib.Path) -> None:
    workdir = write(tmp_path / "run", DENSE, [training(1)])
    digest = hashlib.sha256(DENSE.to_json().encode()).hexdigest()
    (tmp_path / "run" / "run.json").write_text(json.dumps(seal({"config": digest}), allow_nan=False))
    assert read_runs([workdir])[0].config == Config.from_json(DENSE.to_json())
    (tmp_path / "run" / "config.json").write_text(MOE.to_json())
    with pytest.raises(ConfigError, match=r"^RUN=.* has changed since the run wrote it"):
        read_runs([workdir])


@pytest.mark.full
def test_in_a_browser(runs: list[Run], tmp_path: pathlib.Path) -> None:
    """Nothing spills at 1280 and 400 pixels, the console is silent, every control changes what it should."""
    pytest.importorskip("PySide6.QtWebEngineCore", reason="pip install pyside6-webengine", exc_type=ImportError)
    write_page([dataclasses.replace(run, name=50 * run.name) for run in runs], tmp_path / "report.html")
    done = subprocess.run(
        [sys.executable, "-m", "report.browser", tmp_path / "report.html", tmp_path],
        cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["messages"] == []
    for width, found in seen["widths"].items():
        assert found["inner"] == int(width) >= found["scroll"] and found["spilt"] == 0
        assert found["charts"] == CHARTS
        assert found["maps"] == 2
        assert "last: A 4 · B 4.9" in found["readouts"] and "last: A 3 MiB" in found["readouts"]
    uses = seen["uses"]
    assert "100" in uses["start"]["ticks"] and "5,000" in uses["tokens"]["ticks"] and "1" in uses["hours"]["ticks"]
    assert uses["log"]["curve"] != uses["hours"]["curve"] and uses["hours"]["raw"] == 0 < uses["smooth"]["raw"]
    assert uses["key"]["readout"].startswith("hours 0: A 4.9")
    assert uses["zoom"]["zoomed"] and not uses["key"]["zoomed"] and uses["zoom"]["curve"] != uses["key"]["curve"]
    assert "A" not in uses["hide"]["ticks"] and "A" in uses["zoom"]["ticks"]
