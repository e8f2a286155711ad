"""plan.py from a request to its tables: the paper's digits, side by side structures, sweeps, nonsense in one line."""

import dataclasses
import io
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from absl import flags
from rich.console import Console

from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.model.counts import parameters
from bigmac_jax.model.memory import checkpoint_bytes
from bigmac_jax.planning import compiled_programs, pictures, planner, report, topologies, units
from bigmac_jax.planning.hardware import HARDWARE, load_hardware
from bigmac_jax.planning.paper import left_out
from bigmac_jax.planning.place import Place, Request
from bigmac_jax.planning.planner import _bytes_read, _checkpoint, _costs, _restore, make_plan

ROOT = pathlib.Path(__file__).parents[2]
XL = "configs/paper/gpt3_xl.py"
EP32 = ("mesh.expert=32",)


def plan(path: str = XL, overrides: tuple[str, ...] = EP32, **request: Any) -> dict[str, Any]:
    return make_plan(load_config(f"{ROOT}/{path}", overrides), Request(**request))


def shown(made: dict[str, Any]) -> str:
    output = io.StringIO()
    report.show(made, Console(file=output, width=200, highlight=False))
    return output.getvalue()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def test_the_command_gives_the_papers_digits() -> None:
    """Tables 3 and 4, and the model's own counts beside them: 0.5 % in parameters, 3 % in FLOPs."""
    for structure, expected in {
        "bigmac": ("3.78", "3649.00", "372.00"),
        "fine_grained": ("3.73", "3490.67", "1488.00"),
    }.items():
        arguments = (f"--config={XL}", f"--config.model.structure={structure}", "--config.mesh.expert=32")
        done = run(*arguments, "--config.model.projection_init=random", "--devices=32", "--paper", "--json")
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout.splitlines()[-1])
        paper = made["paper"]
        digits = (paper["parameters"] / 1e9, paper["flops_per_step"] / 1e12, paper["all_to_all_bytes_per_step"] / 2**30)
        assert tuple(f"{value:.2f}" for value in digits) == expected
        unread = "set, but not read: model.projection_init=random (model.structure=fine_grained)\n"
        assert done.stderr.count("not read") == done.stderr.count(unread) == (structure == "fine_grained")
        assert made["parameters_total"] == pytest.approx(paper["parameters"], rel=0.005)
        assert made["flops_per_step"] == pytest.approx(paper["flops_per_step"], rel=0.03)
        assert made["exchanges"]["all_to_all"]["payload"] == paper["all_to_all_bytes_per_step"]


def test_formulas_say_what_they_leave_out() -> None:
    assert plan(devices=32, paper=True)["paper"]["left_out"] == []
    acc = plan("configs/latent_moe.py:acc", devices=32, paper=True)
    assert acc["paper"]["left_out"] == ["model.expert_hidden_size"] and "model.expert_hidden_size" in shown(acc)
    modern = plan("configs/modern.py", devices=32, paper=True)
    assert modern["paper"]["left_out"] == ["model.num_kv_heads", "model.tie_embeddings", "model.num_shared_experts"]
    others = {"first_dense_layers": 2, "mtp_modules": 1, "latent_norm": "gate", "router": "hyper", "blocks": "*EM"}
    for name, value in others.items():
        changed = load_config("paper/gpt3_xl", {f"model.{name}": value, "model.mamba_heads": 4, "data.batch_size": 32})
        assert left_out(changed) == [f"model.{name}"]


def test_baselines_stand_beside_and_say_why_not() -> None:
    made = plan(devices=32)
    assert set(made["baselines"]) == {"fine_grained", "vanilla", "dense"}
    assert "or 4 ranks" in made["baselines"]["vanilla"]["error"]
    fine = made["baselines"]["fine_grained"]
    assert 4 * made["exchanges"]["all_to_all"]["padded_fast"] == fine["exchanges"]["all_to_all"]["padded_fast"]
    alone = plan(overrides=(*EP32, "model.structure=fine_grained"), devices=32)
    assert fine["flops_per_step"] == alone["flops_per_step"] and fine["memory"] == alone["memory"]
    vanilla = plan(overrides=("mesh.expert=4", "model.structure=vanilla"))
    assert vanilla["devices"] == 4 and vanilla["parameters"]["experts"] > 3.2e9


@pytest.mark.parametrize(
    ("config", "structures"),
    [("configs/large.py:258b", {"fine_grained", "vanilla"}), ("configs/qwen3_30b.py:bigmac", {"fine_grained"}),
     ("configs/paper/gpt3_xl.py", {"fine_grained", "vanilla"})],
)  # fmt: skip
def test_models_side_by_side_are_of_one_size(config: str, structures: set[str]) -> None:
    """MoE structures have equal parameters in all; beside them, those of a dense one equal the active ones."""
    made = plan(config, overrides=("mesh.expert=1", "mesh.node=1", "mesh.data=0"), devices=1)
    found = made["baselines"]
    for name in structures:
        assert found[name]["parameters_total"] == pytest.approx(made["parameters_total"], rel=0.02)
    assert found["dense"]["parameters_total"] == pytest.approx(made["parameters_active"], rel=0.02)
    share = made["parameters_active"] / made["parameters_total"]
    assert f"dense has {100 * share:.1f} % of the parameters of bigmac: as many are active for a token" in shown(made)


def test_experts_beside_a_dense_model() -> None:
    """As many active parameters where a width gives them; else a line says what is nearest."""
    made = plan("configs/tiny.py", overrides=("model.structure=dense", "model.latent_norm=none"), devices=1)
    for name in ("fine_grained", "bigmac"):
        other = made["baselines"][name]
        assert other["parameters_active"] == pytest.approx(made["parameters_total"], rel=0.02), name
        assert f"{name} has {100 * other['parameters_total'] / made['parameters_total']:.1f} % of" in shown(made)
    large = plan("configs/large.py:258b", overrides=("model.structure=dense", "model.latent_norm=none", "mesh.expert=1",
                 "mesh.node=1", "mesh.data=0"), devices=1)  # fmt: skip
    assert "of the parameters of dense, and no width of its experts comes nearer" in shown(large)


def test_devices_follow_the_mesh() -> None:
    assert plan(overrides=("mesh.expert=8", "mesh.data=2"))["mesh"] == {
        "replica": 1,
        "data": 2,
        "node": 1,
        "expert": 8,
        "tensor": 1,
    }
    assert plan(overrides=("mesh.expert=8",), devices=32)["mesh"] == {
        "replica": 1,
        "data": 4,
        "node": 1,
        "expert": 8,
        "tensor": 1,
    }
    assert plan(topology="v6e:4x8")["devices"] == 32
    two = plan(topology="v6e:4x8", slices=2, overrides=("mesh.replica=2", "mesh.expert=8", "data.batch_size=64"))
    assert two["mesh"] == {"replica": 2, "data": 4, "node": 1, "expert": 8, "tensor": 1}
    assert two["time"]["replicas"] > 0
    with pytest.raises(ConfigError, match=r"must divide the 32 devices of a slice, or rows would cross slices"):
        plan(topology="v6e:4x8", slices=2, overrides=("mesh.expert=64", "model.num_experts=64", "data.batch_size=64"))
    with pytest.raises(ConfigError, match=r"--slices=2 says how many of a --topology there are"):
        plan(devices=32, slices=2)


def test_exchanges_by_link() -> None:
    """Machines of eight: 24 of 31 peers are remote. A mesh with nodes adds the hierarchical exchange."""
    made = plan(devices=32, hardware="paper")
    sent = made["exchanges"]["all_to_all"]
    assert sent["padded_slow"] / (sent["padded_slow"] + sent["padded_fast"]) == pytest.approx(24 / 31)
    assert "hierarchical" not in made["exchanges"]
    # On one level it is listed where it is configured.
    one_level = plan(overrides=(*EP32, "execution.exchange=hierarchical"), hardware="paper")
    assert one_level["exchanges"]["hierarchical"] == one_level["exchanges"]["dedup"]
    nodes = plan(overrides=("mesh.node=4", "mesh.expert=8"), devices=32, hardware="paper")
    assert nodes["exchanges"]["hierarchical"]["padded_slow"] < nodes["exchanges"]["dedup"]["padded_slow"]


def test_a_program_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any, devices: Any, name: str) -> None:
        if name != "step":
            raise compiled_programs.DoesNotCompileError(f"the program {name!r} does not compile")
        raise compiled_programs.DoesNotFitError("step: Ran out of memory in memory space hbm")

    monkeypatch.setattr(compiled_programs, "compile_program", refuse)
    monkeypatch.setattr(
        topologies, "absent_devices", lambda topology: [types.SimpleNamespace(device_kind="TPU v5 lite")] * 32
    )
    made = plan(topology="v5e:4x8", compile=True)
    assert made["program"]["fits"] is False and made["program"]["change"] == "--config.execution.remat=layer"
    assert made["fits"] is False and not any(made["programs"][name]["fits"] for name in made["programs"])
    said = shown(made)
    assert "step does not fit or compile: step: Ran out of memory" in said and "--config.execution.remat=layer" in said
    assert "decode does not fit or compile: the program 'decode' does not compile" in said


def test_programs_are_compiled_for_devices_of_a_jax_that_runs() -> None:
    """As in a notebook that has trained before: for as many as there are."""
    assert len(planner._cpu_devices(jax.device_count() // 2)) == jax.device_count() // 2
    with pytest.raises(ConfigError, match=r"jax runs here with 8 already; use topology="):
        planner._cpu_devices(9)


def test_a_simulated_program_leaves_the_table_as_it_is() -> None:
    """The ragged exchange's figures are of exact rows, though the CPU's program emulates it."""
    place = Place(32, None, None, simulated=True)
    config = load_config(ROOT / XL, EP32)
    costs = _costs(config, {"data": 1, "node": 1, "expert": 32}, place)
    assert costs["exchanges"]["ragged"] == plan(devices=32)["exchanges"]["ragged"]
    ragged = load_config(ROOT / XL, (*EP32, "execution.exchange=ragged"))
    again = _costs(ragged, {"data": 1, "node": 1, "expert": 32}, place)["exchanges"]["ragged"]
    assert again == costs["exchanges"]["ragged"]


def test_a_sweep_is_the_product_of_its_values() -> None:
    made = plan(devices=32, hardware="paper", sweep=("top_k=1,8", "structure=fine_grained,bigmac"))
    assert [tuple(row["fields"].values()) for row in made["sweep"]] == [
        ("1", "fine_grained"), ("1", "bigmac"), ("8", "fine_grained"), ("8", "bigmac"),
    ]  # fmt: skip
    times = [row["time"]["total"] for row in made["sweep"]]
    assert times[2] > times[0] and times[2] > times[3]
    assert "fine_grained" in shown(made)
    again = plan(devices=32, sweep=("top_k=1", "top_k=8"))  # a field that is named twice has all of the values
    assert [row["fields"]["top_k"] for row in again["sweep"]] == ["1", "8"]


@pytest.mark.full
def test_a_search_puts_what_fits_first() -> None:
    made = plan(devices=32, hardware="h100", search=True)
    found = made["search"]
    fits = [candidate["fits"] for candidate in found]
    assert fits == sorted(fits, reverse=True) and any(fits)
    fitting = [candidate["time"]["tokens_per_s"] for candidate in found if candidate["fits"]]
    assert fitting == sorted(fitting, reverse=True)
    assert json.loads(json.dumps(made))["search"] == found


@pytest.mark.full
def test_the_best_is_what_its_flags_give() -> None:
    """plan.py says of the best mesh what it says of the config with the flags pasted."""
    made = plan(devices=32, hardware="h100", search=True)
    best, text = made["best"], shown(made)
    assert (
        best["fits"]
        and best["tokens_per_s"] == made["time"]["tokens_per_s"] == made["search"][0]["time"]["tokens_per_s"]
    )
    again = plan(overrides=(*EP32, *(f.removeprefix("--config.") for f in best["flags"])), devices=32, hardware="h100")
    for key, value in again.items():
        assert made[key] == value, key
    assert (
        again["fits"] and again["memory"]["total"] == best["memory"] and again["headroom"] == best["headroom"] >= 0.15
    )
    first, second, third = text.splitlines()[:3]
    assert first.startswith("Fits best, of ") and f"{100 * best['headroom']:.1f} % left" in first
    assert second == " ".join(best["flags"]) and "The fastest that fit" in text
    # Experts are not split, and so the config's 1.2 drops nothing: another computation than the one that was asked for.
    changed = "one rank of experts: model.capacity_factor=1.2 is not read, and nothing is dropped"
    assert best["notes"] == [changed] and third == f"this changes what is computed: {changed}"


def test_a_search_that_finds_nothing_says_what_would_fit() -> None:
    overrides = ("mesh.expert=2", "model.balance_scope=part")
    made = plan("configs/paper/gpt3_6_7b.py", overrides, devices=2, hardware="h100", search=True)
    best, text = made["best"], shown(made)
    assert not best["fits"] and best["headroom"] < 0 and not made["fits"]
    assert (
        "--devices=4" in best["would_fit"]
        and plan("configs/paper/gpt3_6_7b.py", ("mesh.expert=2",), devices=4, hardware="h100", search=True)["best"][
            "fits"
        ]
    )
    assert text.startswith("Nothing fits with 15.0 % of the memory left; the nearest takes ")
    assert " of a device's 74.51 GiB. Would fit: --devices=4" in text and "The nearest to fit" in text
    assert " ".join(best["flags"]) in text.splitlines()
    drops, note = best["notes"]
    assert "and nothing is dropped" in drops
    assert "with model.balance_scope=part the balance loss is of other parts" in note
    assert f"this changes what is computed: {note}" in text.splitlines()


def test_what_would_fit_is_in_the_words_of_the_topology() -> None:
    made = plan("configs/paper/gpt3_6_7b.py", ("mesh.expert=2",), topology="h100:1x2", search=True)
    assert "--topology=h100:2x2" in made["best"]["would_fit"] and not made["fits"]


def test_more_devices_in_the_words_of_the_topology() -> None:
    """A slice grows by its shortest axis, and of slices that don't there are more; a chip may be two devices."""
    for name, slices, flag, said in (
        ("h100:4x8", 1, "--devices=64", "--topology=h100:8x8"),
        ("v5e:4x8", 1, "--devices=64", "--topology=v5e:8x8"),
        ("v5e:2x2", 1, "--devices=32", "--topology=v5e:4x8"),
        ("v6e:4x8", 2, "--devices=128", "--topology=v6e:8x8"),
        ("v6e:8x16", 2, "--devices=1024", "--topology=v6e:16x16 --slices=4"),
        ("tpu7x:2x2x1", 1, "--devices=32", "--topology=tpu7x:2x2x4"),
        ("h100:4x8", 1, "--config.data.batch_size=4", "--config.data.batch_size=4"),
    ):
        topology = topologies.parse_topology(name, slices)
        assert topologies.respell_devices(topology, flag, load_hardware(topology.kind)) == said


@pytest.mark.full
def test_a_model_of_258_billion_on_512_gpus() -> None:
    """As a user asks it: an answer in a minute of one core, whose flags fit."""
    arguments = ("--config=configs/large.py:258b", "--topology=h100:64x8", "--json")
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # whatever else the machine does
    done = run(*arguments, "--search")
    assert done.returncode == 0, done.stderr
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["best"]["fits"] and made["devices"] == 512 and seconds < 60
    pasted = json.loads(run(*arguments, *made["best"]["flags"]).stdout.splitlines()[-1])
    assert pasted["fits"] and pasted["memory"] == made["memory"] and pasted["time"] == made["time"]
    assert pasted["time"]["total"] == made["search"][0]["time"]["total"] and pasted["mesh"] == made["search"][0]["mesh"]


def test_numbers_as_people_read_them() -> None:
    """The paper's tables keep their digits; what is larger takes the next unit."""
    assert [units.work(n * 1e12) for n in (0.5, 3649, 9999, 569670.17, 3_780_279.31, 2e7)] == [
        "0.50 T", "3,649.00 T", "9,999.00 T", "569.67 P", "3,780.28 P", "20.00 E",
    ]  # fmt: skip
    assert [units.size(n * 2**30) for n in (2**-30, 0.5, 1488, 686_070, 2e7)] == [
        "1 B", "512.00 MiB", "1,488.00 GiB", "669.99 TiB", "19.07 PiB",
    ]  # fmt: skip
    assert [units.duration(n) for n in (1.5, -1.5, -0.0123, -4.2e-5, 0)] == [
        "1.5 s",
        "-1.5 s",
        "-12.3 ms",
        "-42 µs",
        "0",
    ]
    assert [units.size(-5 * 2**30), units.count(-2e6)] == ["-5.00 GiB", "-2.00 M"]


def test_the_least_that_a_unit_has() -> None:
    assert list(map(units.work, (9.99e15, 1e16, 9.99e18, 1e19))) == ["9,990.00 T", "10.00 P", "9,990.00 P", "10.00 E"]
    assert units.work(0) == units.work(0.5) == "0.00 T"
    sizes = (1e4 * 2**40, 1e4 * 2**40 - 2**40, 1e4 * 2**30, 1e4 * 2**30 - 2**30, 2**30, 2**20, 2**10, 1023, -1023)
    assert list(map(units.size, sizes)) == [
        "9.77 PiB", "9,999.00 TiB", "9.77 TiB", "9,999.00 GiB", "1.00 GiB", "1.00 MiB", "1.00 KiB", "1023 B", "-1023 B",
    ]  # fmt: skip
    counts = list(map(units.count, (1e12, 1e9, 1e6, 1e3, 999)))
    assert counts == ["1.00 T", "1.00 B", "1.00 M", "1.00 k", "999"]
    assert list(map(units.elapsed, (3600, 3599, 60, 59.9, 0))) == ["1 h", "60 min", "1 min", "59.9 s", "0 s"]
    assert list(map(units.duration, (1, 1e-3, 1e-12))) == ["1 s", "1 ms", "1e-06 µs"]
    assert units.percent(0.037) == "3.7 %"
    near = [units.is_near(*pair) for pair in ((51, 50), (49, 50), (51.01, 50), (48.99, 50), (50, 51.02))]
    assert near == [True, True, False, False, True]


def test_tables_show_everything_that_was_asked() -> None:
    text = shown(plan(devices=32, hardware="paper", paper=True, sweep=("top_k=4,8",)))
    for part in ("3,649.00 T", "372.00 GiB", "fine_grained", "dense", "Table 1, K=8", "Sweep",
                 "slow links", "predicted: optimizer", "predicted: MFU"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("name", [n for n in HARDWARE if n != "paper"])
def test_topologies_bring_their_hardware(name: str) -> None:
    shape = {"v5p": "2x4x4", "tpu7x": "2x2x4"}.get(name, "1x32" if name.startswith("gb") else "4x8")
    made = plan(topology=f"{name}:{shape}")
    assert made["hardware"] == name and made["time"]["total"] > 0 and made["devices"] == 32
    # Neither an exchange inside a rack nor one of the slice's two cores takes slow links.
    slow = made["exchanges"]["all_to_all"]["padded_slow"]
    assert (slow > 0) == (shape == "4x8" and name not in topologies.TPUS)


def test_a_rack_is_one_machine_whatever_its_gpus() -> None:
    """64 of 72 are not machines of eight, which is what divides both."""
    fields = ("mesh.expert=64",)
    rack = plan(overrides=fields, devices=64, hardware="gb200")
    assert rack["time"] == plan(overrides=fields, topology="gb200:1x64")["time"]
    assert rack["exchanges"]["all_to_all"]["padded_slow"] == 0
    four = plan(overrides=fields, devices=256, hardware="gb200")
    assert four["time"] == plan(overrides=fields, topology="gb200:4x64")["time"]


@pytest.mark.parametrize(
    "fields",
    [
        ("model.vocab_size=128",),
        ("data.tokenizer=gpt2",),
        ("tuning.objective=sft",),
        ("tuning.objective=sft", "data.mixture=web=1,books=1"),
    ],
)
def test_a_plan_reads_no_data(fields: tuple[str, ...]) -> None:
    """So a vocabulary may be smaller than a tokenizer, and no file of conversations is needed."""
    made = plan("configs/tiny.py", fields, devices=1, hardware="h100")
    assert made["time"]["total"] > 0


def test_bars_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Of each structure, whatever its step is made of."""
    stacks: list[Any] = []
    stack = pictures._stack
    monkeypatch.setattr(pictures, "_stack", lambda ax, *given: stacks.append(given) or stack(ax, *given))
    made = plan(overrides=("mesh.expert=8", "mesh.fsdp=True"), devices=32, hardware="h100")
    pictures.draw(made, tmp_path / "x.png")
    names, parts = stacks[-1]
    columns = {made["structure"]: made} | made["baselines"]
    for number, name in enumerate(names):
        total = sum(values[number] for values in parts.values())
        assert total == pytest.approx(columns[name]["time"]["total"])
    assert {"attention", "memory", "gradients"} <= set(parts) and "host" not in parts


def test_a_ninth_part_is_drawn_too() -> None:
    _, (ax,) = pictures._panels(4, 4, 1)
    pictures._stack(ax, ["a"], {str(number): [1.0] for number in range(12)})
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}
    assert len(ax.patches) == len(looks) == 12


def test_pictures(tmp_path: pathlib.Path) -> None:
    import matplotlib.image

    for name, request in {"costs": {}, "sweep": {"sweep": ("top_k=1,2,4", "structure=bigmac,fine_grained")}}.items():
        path = tmp_path / f"{name}.png"
        pictures.draw(plan(devices=32, hardware="paper", **request), path)
        assert len({tuple(pixel) for row in matplotlib.image.imread(path)[::9, ::9] for pixel in row}) > 5
    with pytest.raises(ConfigError, match=r"use a \.png in a folder that exists"):
        pictures.draw(plan(devices=32), tmp_path / "none" / "x.png")


NONSENSE = {
    "unknown topology": ({"topology": "v9:4x8"}, EP32, "v5e, v5p, v6e"),
    "devices of another number": ({"topology": "v6e:4x8", "devices": 16}, EP32, "must be the 32"),
    "seven devices": ({"devices": 7}, ("mesh.expert=4",), "= 4 must be the 7 devices .* --devices=4"),
    "devices left over": ({"devices": 8}, ("mesh.expert=4", "mesh.data=1"), "= 4 must be the 8 devices"),
    "too few devices": ({"devices": 4}, EP32, "= 32 must be the 4 devices .* --devices=32"),
    "too small a slice": ({"topology": "v5e:4x4"}, EP32, "= 32 must be the 16 devices .* another mesh or --topology"),
    "a host of more GPUs than NVLink joins": ({"topology": "h100:2x16"}, EP32, "at most 8 NVIDIA H100 .*=h100:4x8"),
    "a rack of more": ({"topology": "gb200:1x144"}, EP32, "at most 72 NVIDIA GB200; use --topology=gb200:2x72"),
    "hardware of another chip": ({"topology": "v5e:4x8", "hardware": "v6e"}, EP32, "leave --hardware out"),
    "unknown hardware": ({"hardware": "abacus"}, EP32, ", ".join(HARDWARE)),
    "search without hardware": ({"search": True}, EP32, "--hardware=NAME"),
    "sweep without values": ({"sweep": ("top_k",)}, EP32, "FIELD=a,b"),
    "sweep of nothing": ({"sweep": (" ",)}, EP32, "FIELD=a,b"),
    "sweep of one field under two names": ({"sweep": ("top_k=1", "model.top_k=2")}, EP32, "swept twice"),
    "sweep of no field": ({"sweep": ("top_q=1,2",)}, EP32, "did you mean"),
    "sweep of nonsense": ({"sweep": ("top_k=1,two",)}, EP32, "must be of type int"),
    "formulas of vanilla": ({"paper": True}, ("mesh.expert=4", "model.structure=vanilla"), "not for structure="),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(name: str) -> None:
    request, overrides, part = NONSENSE[name]
    with pytest.raises(ConfigError, match=part) as error:
        plan(overrides=overrides, **request)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("request_", "overrides", "message"),
    [
        ({"sweep": ("nosuch=1",)}, (), "'nosuch' is not a field"),
        ({"sweep": ("top_k=1,two",)}, (), "must be of type int"),
        ({"paper": True}, ("model.structure=dense",), "not for structure=dense"),
        ({"scale": "8,9"}, ("data.batch_size=4",), "is no whole number of sequences on 9"),
        ({}, ("execution.resident_experts=4",), "resident_experts=4 is for one device"),
        ({"compile": True, "topology": "v5e:2x4", "hardware": ""}, (), "needs the TPU compiler"),
    ],
)
def test_what_a_search_cannot_mend_is_refused_before_it(
    request_: dict[str, Any], overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_search", lambda *_: pytest.fail("it was searched"))
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        plan("configs/tiny.py", overrides, **{"devices": 8, "hardware": "h100", "search": True} | request_)


def test_a_sweep_is_refused_before_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_programs", lambda *_: pytest.fail("it was compiled"))
    for sweep in ("top_k=64", "expert=3"):
        with pytest.raises(ConfigError, match=r"top_k=64 must be at most|must be a multiple of .* = 3"):
            plan("configs/tiny.py", (), devices=1, compile=True, sweep=(sweep,))


def test_a_picture_that_cannot_be_drawn_loses_no_json(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    """A folder that is missing is named before anything is planned; a figure is drawn when the plan is printed."""
    program = command("plan")

    def refuse(*_: Any) -> None:
        raise ConfigError("can't be written")

    monkeypatch.setattr(program.pictures, "draw", refuse)
    for file, message, printed in (("none/x.png", "mkdir -p .*none makes it", False), ("x.png", "can't be", True)):
        flags.FLAGS(["plan", "--json", f"--plot={tmp_path / file}", "--devices=1"])
        try:
            with pytest.raises(ConfigError, match=message):
                program.main()
        finally:
            flags.FLAGS.unparse_flags()
        assert bool(capsys.readouterr().out) == printed


def test_flags_that_change_nothing_are_named(command: Any) -> None:
    config, unread = load_config("paper/gpt3_xl"), command("plan")._unread  # of a finite capacity
    assert unread(config, Request()) == []
    (line,) = unread(config, Request(imbalance="1.5"))
    assert line.startswith("set, but not read: --imbalance (model.capacity_factor=")
    assert unread(config, Request(imbalance="1.5", sweep=("capacity_factor=1.25,inf",))) == []
    dropless = load_config("paper/gpt3_xl", ["model.capacity_factor=inf"])
    assert unread(dropless, Request(imbalance="1.5", search=True, headroom=0.2)) == []
    assert unread(dropless, Request(headroom=0.2)) == ["set, but not read: --headroom (of --search and --scale)"]


@pytest.mark.full
def test_nonsense_ends_the_command_with_2(tmp_path: pathlib.Path) -> None:
    """A hardware file with a missing field; an argument that belongs to nothing; names of files that cannot be."""
    text = (ROOT / "bigmac_jax/planning/hardware/h100.toml").read_text()
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("memory_bytes")))
    done = run(f"--config={XL}", f"--hardware={file}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "memory_bytes" in done.stderr and "mine.toml" in done.stderr
    for argument, part in {
        "top_k=1,2": "--sweep",
        "--plot=folder": ".png",
        "--hardware=~nobody/x.toml": "h100",
    }.items():
        done = run(f"--config={XL}", argument)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and part in done.stderr, done.stderr


def test_rounds_at_worst() -> None:
    """Two experts a rank: all tokens to one rank are 2 rows each, of 8 · 1.5 / 32 that there is room for."""
    fields = (*EP32, "model.num_experts=64", "model.top_k=8", "model.capacity_factor=inf")
    made = plan(overrides=(*fields, "execution.buffer_factor=inf"))
    assert made["most_rounds"] == 1 and "rounds" not in shown(made)
    made = plan(overrides=(*fields, "execution.buffer_factor=1.5"))
    assert made["most_rounds"] == 6 and "(of one round; at worst 6 rounds)" in shown(made)
    assert plan(overrides=fields)["exchanges"] == made["exchanges"]  # as auto is


def test_options_of_the_compiler() -> None:
    """Those of the machine, each with its reason, and those that the config gives, over them."""
    config = load_config("qwen3_30b", ["execution.compiler_options=xla_tpu_enable_async_all_to_all=false xla_mine=3"])
    made = make_plan(config, Request(topology="v6e:4x8", options=True))
    found = made["compiler_options"]
    values = {row["name"]: row["value"] for row in found}
    assert (values.pop("xla_tpu_enable_async_all_to_all"), values.pop("xla_mine")) == (False, 3)
    assert values and all(value is True for value in values.values())  # of v6e
    assert shown(made).count("Gathers of parameters and sums of gradients run on") == 1
    plain = make_plan(load_config("qwen3_30b"), Request(devices=32, hardware="h100", options=True))
    (row,) = plain["compiler_options"]
    dropless = ["execution.exchange=auto", "model.capacity_factor=inf", "mesh.expert=8", "data.batch_size=64"]
    ragged = make_plan(load_config("qwen3_30b", dropless), Request(topology="h100:1x8", options=True))
    assert not ragged["compiler_options"]  # for what auto takes there, the scheduler is not safe
    assert row["name"] == "xla_gpu_enable_latency_hiding_scheduler" and "asynchronous" in row["why"]
    with pytest.raises(ConfigError, match="--options"):
        make_plan(config, Request(options=True))


def test_bytes_that_are_read_onto_a_device() -> None:
    """Parameters, and what the optimizer keeps of them; not what is to stand in host memory."""

    def read(*overrides: str) -> dict[str, int]:
        return _bytes_read(load_config("tiny", overrides), {}, "gpu")

    count = parameters(load_config("tiny"), {})
    numbers = count.total
    assert read() == {"train": 12 * numbers, "generate": 4 * numbers}
    assert read("execution.offload_optimizer=True") == {"train": 4 * numbers, "generate": 4 * numbers}
    assert read("execution.resident_layers=1") == {"generate": 4 * (numbers - count.parts["experts"])}
    assert read("optimizer.average_decay=0.99")["train"] == 16 * numbers
    assert read("optimizer.moment_dtype=bfloat16")["train"] == 8 * numbers
    assert read("optimizer.name=muon")["train"] == checkpoint_bytes(load_config("tiny", ["optimizer.name=muon"]))
    lora = ("train.init_from=some", "tuning.lora_rank=4")
    adapters = parameters(load_config("tiny", lora), {}).trained_of_a_rank
    assert read(*lora) == {"train": 4 * numbers + 12 * adapters, "generate": 4 * numbers} and adapters < numbers / 10


@pytest.mark.parametrize(("memory", "fits"), [(300, True), (299, False)])
def test_bytes_that_reading_a_checkpoint_takes(memory: int, fits: bool) -> None:
    """Training: parameters and Adam's two moments; decoding: parameters beside the weights that it made of them."""
    place = Place(1, None, dataclasses.replace(load_hardware("h100"), memory_bytes=memory), False)
    read = {"train": 300, "generate": 100}
    assert _restore(read, {}, place) == {"train": 300, "generate": 100, "fits": fits}
    decode = {"decode": {"memory": {"arguments": 50}}}
    assert _restore(read, decode, place._replace(hardware=None)) == {"train": 300, "generate": 150}
    decode = {"decode": {"memory": {"arguments": 201}}}
    assert _restore(read, decode, place) == {"train": 300, "generate": 301, "fits": False}


# As the recipes say.
MACHINES = sorted(
    command
    for file in (ROOT / "configs").glob("*.py")
    for command in re.findall(r"bigmac plan --config=(\S+) --topology=(\S+)", file.read_text())
)


@pytest.mark.parametrize(
    ("recipe", "topology"),
    [pytest.param(*case, marks=pytest.mark.full if case[0].startswith("nemotron") else []) for case in MACHINES],
)
def test_a_recipe_is_planned_to_fit_the_machine_that_it_names(recipe: str, topology: str) -> None:
    recipe = f"{ROOT}/{recipe}" if recipe.startswith("configs/") else recipe
    assert make_plan(load_config(recipe), Request(topology=topology))["headroom"] > 0


def test_every_recipe_of_a_model_names_a_machine() -> None:
    named = {pathlib.PurePath(recipe.partition(":")[0]).stem for recipe, _ in MACHINES}
    assert named >= {"qwen3_30b", "large", "long", "nemotron3_nano", "nemotron3_super", "nemotron3_ultra"}


def test_a_teacher_is_not_planned() -> None:
    """Whatever is asked: it would hold a second model, and pass forward through it."""
    with pytest.raises(ConfigError, match=r"tuning\.teacher=other is a second model, which is not planned"):
        plan("configs/tiny.py", ("tuning.teacher=other",))


@pytest.mark.parametrize(("count", "older"), [(4, 7), (5, 6), (31, 1)])
@pytest.mark.parametrize("evaluates", [False, True])
def test_bytes_of_checkpoints_of_some_experts(count: int, older: int, evaluates: bool) -> None:
    """Of 32 experts. Kept are the newest two, the last whole one, the best, and older ones' experts alone."""
    config = load_config("tiny", [f"train.experts_per_checkpoint={count}", f"train.eval_every={int(evaluates)}"])
    whole, partial = checkpoint_bytes(config), checkpoint_bytes(config, count)
    one = checkpoint_bytes(config, 2) - checkpoint_bytes(config, 1)
    assert partial == whole - (32 - count) * one and config.train.keep_checkpoints == 2
    kept = 2 * partial + older * count * one + (1 + evaluates) * whole
    assert _checkpoint(config) == {"bytes": whole, "partial_bytes": partial, "kept_bytes": kept}


def test_a_dense_model_has_no_checkpoints_of_some_experts() -> None:
    dense = load_config("tiny", ["model.structure=dense", "train.experts_per_checkpoint=1"])
    assert _checkpoint(dense) == {"bytes": checkpoint_bytes(dense)}
