"""--scale: how far each structure scales, and the term that stops it; by hand, and against the search in full."""

import json
import pathlib
import resource
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bigmac_jax.config import ConfigError, MeshConfig, load_config
from bigmac_jax.planning import pictures, planner, scaling
from bigmac_jax.planning.candidates import Machine
from bigmac_jax.planning.job import exposed
from bigmac_jax.planning.place import Request, find_place
from bigmac_jax.planning.report_programs import program_table, programs_table
from bigmac_jax.planning.scaling import Scale, _grown, parse_scale, scale, where_it_stops
from bigmac_jax.planning.search import fastest, search
from bigmac_jax.planning.structures import CONTROL, alternatives, of_equal_size
from planning.test_planner import plan, run, shown
from planning.test_search import CONFIG, EIGHT, H100, with_memory

SMALL = replace(CONFIG, data=replace(CONFIG.data, batch_size=32))


def test_numbers_of_devices() -> None:
    assert parse_scale("64..512") == Scale([64, 128, 256, 512], strong=False)
    assert len(parse_scale("64..65536").devices) == 11 and parse_scale("24..48").devices == [24, 48]
    assert parse_scale("1024,64,256:strong") == Scale([64, 256, 1024], strong=True)
    assert parse_scale("8") == Scale([8], strong=False) and parse_scale("1..4") == Scale([1, 2, 4], strong=False)
    assert parse_scale("1048576") == Scale([2**20], strong=False)  # the most


@pytest.mark.parametrize("text", ["many", "64..", "64..1000", "512..64", "0..8", "64,0", "64..2097152", "1048577", "8:weak", "8:", "-8", "nan", "64;128"])  # fmt: skip  # noqa: E501
def test_what_are_no_numbers_of_devices(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--scale=.* must be numbers of devices") as error:
        parse_scale(text)
    assert "\n" not in str(error.value)


def point(devices: int, **terms: float) -> dict[str, Any]:
    """Of 1,000 tokens a device."""
    time = {"matmul": 1.0, "exchange": 0.5, "hidden": 0.25, "gradients": 0.25} | terms
    time["total"] = sum(time.values()) - 2 * time["hidden"]
    rate = 1000 / time["total"]
    return {"devices": devices, "tokens": 1000 * devices, "tokens_per_s_per_device": rate, "time": time}


def test_what_stops_it_by_hand() -> None:
    """1.5 s are 80 % of 1.875 s. At 32 devices the step takes 2.1 s, 71 %: 0.1 s are gradients', 0.5 s of the exchange,
    whose hidden part is no more than before; of a token a thousandth of that."""
    points = [point(8), point(16, gradients=0.6), point(32, gradients=0.35, exchange=1.0), point(64, gradients=9.0)]
    found = where_it_stops(points)
    assert found and (found["devices"], found["term"]) == (32, "exchange")
    assert found["share"] == pytest.approx(1.5 / 2.1) and found["grew"]["exchange"] == pytest.approx(0.5 / 1000)
    assert found["grew"]["gradients"] == pytest.approx(0.1 / 1000) and found["grew"]["matmul"] == 0
    assert where_it_stops(points[:2]) is None
    short: dict[str, Any] = {"devices": 16, "lacks": "memory"}
    assert where_it_stops([point(8), short]) == {"devices": 16, "term": "memory"}
    assert where_it_stops([short, point(32)]) is None  # the fewest on which something fits
    assert where_it_stops([short, short | {"devices": 32}]) == {"devices": 16, "term": "memory"}


def test_the_table_of_collectives_by_hand() -> None:
    sums = {"kind": "reduce-scatter", "axes": ["data", "expert"], "role": "gradients", "direction": "backward"}
    row = sums | {"in_each_layer": True, "asynchronous": True, "count": 1234, "sent_bytes": 2**30}
    table = program_table({"device_kind": "TPU v6e", "compile_seconds": 9, "collectives": [row]})
    assert [[str(column.header), *column.cells] for column in table.columns] == [
        ["collectives of a rank", "reduce-scatter in each layer"], ["axes", "data, expert"], ["what", "gradients"],
        ["pass", "backward"], ["async", "yes"], ["count", "1,234"], ["sent", "1.00 GiB"],
    ]  # fmt: skip


def test_the_table_of_programs_by_hand() -> None:
    memory = {"arguments": 2**30, "temporaries": 2**29, "total": 3 * 2**29}
    ran = {"memory": memory, "memory_beside": 2**31, "fits": False, "compile_seconds": 1.5}
    table = programs_table({"programs": {"step": ran, "init": {"compiler": "too large"}}, "restore": {}})
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    assert columns == [
        ["", "step", "init"], ["arguments", "1.00 GiB", ""], ["temporaries", "512.00 MiB", ""],
        ["total", "1.50 GiB", ""], ["alive beside it", "2.00 GiB", ""], ["fits", "no", "no"],
        ["compiled in", "1.5 s", ""],
    ]  # fmt: skip


def test_exposed_terms_are_all_of_a_step() -> None:
    for candidate in search(CONFIG, EIGHT)[::40]:
        time = candidate.times.as_dict()
        assert sum(exposed(time).values()) == pytest.approx(time["total"])
        assert not {"total", "mfu", "hidden", "hidden_sums"} & set(exposed(time))


def test_meshes_that_grow() -> None:
    best = search(CONFIG, EIGHT)[0]
    r, d, n, e, t = best.sizes.values()
    twice = {(r, 2 * d, n, e, t), (r, d, 2 * n, e, t), (r, d, n, 2 * e, t), (r, d, n, e, 2 * t)}
    assert _grown([best], 2) == twice | {(2 * r, d, n, e, t)}
    assert len(_grown([best], 4)) == 15 and _grown([best], 1) == {(r, d, n, e, t)}
    # 5,040 = 2^4 · 3^2 · 5 · 7 has 60 divisors: going through all tuples of five would take minutes.
    assert len(_grown([best], 5040)) == 70 * 15 * 5**2


@pytest.mark.parametrize(("strong", "sizes"), [(False, [32, 64, 192]), (True, [32, 32, 32])])
def test_structures_are_searched_on_each_number_of_devices(
    strong: bool, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the batch that is theirs, and whatever the config's own mesh is, which vanilla's few experts do not fill."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(scaling, "_curve", lambda own, places: asked.append((own, places)) or [point(8), point(16)])
    model, mesh = replace(SMALL.model, num_experts=32), MeshConfig(expert=16, tensor=2, fsdp=True)
    config = replace(SMALL, model=model, mesh=mesh)
    found = scale(config, Scale([8, 16, 48], strong), lambda n: Machine(n, H100))
    assert [curve["stops"] for curve in found.pop("structures").values()] == [None] * 5
    for own, places in asked:
        assert own is config and [machine for _, machine in places] == [Machine(n, H100) for n in (8, 16, 48)]
        assert [of.data.batch_size for of, _ in places] == sizes
        assert {of.mesh for of, _ in places} == {MeshConfig(fsdp=True)}
    tokens = [128 * size for size in sizes]
    kind = {"kind": "strong" if strong else "weak", "devices": [8, 16, 48], "keeps": 0.8}
    assert found == kind | {"batch_size": sizes, "tokens_per_step": tokens}


@pytest.mark.full
def test_the_fastest_is_the_searchs_first() -> None:
    """Though it looks at less: not at what recomputes for nothing, nor at meshes that can't fit."""
    sizes = sorted(sum(c.memory.values()) for c in search(CONFIG, EIGHT))
    for size in (sizes[-1], sizes[len(sizes) // 4], sizes[3]):
        first = search(CONFIG, with_memory(size))[0]
        found = fastest(CONFIG, with_memory(size))
        assert first.fits and found[0].times.tokens_per_s == first.times.tokens_per_s
        assert len({tuple(c.sizes.values()) for c in found}) == len(found)
    assert fastest(CONFIG, with_memory(1)) == []


@pytest.mark.full
@pytest.mark.parametrize(("devices", "strong"), [([8, 16], False), ([8, 16, 32, 64], False), ([8, 16, 32, 64], True)])
def test_points_are_those_of_the_search(devices: list[int], strong: bool) -> None:
    """4 sequences on each device; and the same 32 on all."""
    found = scale(SMALL, Scale(devices, strong), lambda n: Machine(n, H100))
    assert found["batch_size"] == ([32] * len(devices) if strong else [4 * n for n in devices])
    length = SMALL.data.sequence_length
    assert found["tokens_per_step"] == [batch * length for batch in found["batch_size"]]
    assert list(found["structures"]) == ["bigmac", "fine_grained", CONTROL, "vanilla", "dense"]
    for n, batch, made in zip(devices, found["batch_size"], found["structures"]["bigmac"]["points"], strict=True):
        config = replace(SMALL, mesh=MeshConfig(), data=replace(SMALL.data, batch_size=batch))
        best = fastest(config, Machine(n, H100))[0]
        assert made["tokens_per_s_per_device"] == pytest.approx(best.times.tokens_per_s / n, rel=0.02), n


@pytest.mark.parametrize(("rates", "looks"), [((99, 98), "all grown grown"), ((97, 97), "all grown all grown")])
def test_meshes_are_all_tried_where_growing_loses_a_fiftieth(
    rates: tuple[int, int], looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device has 100 tokens a second, and then `rates`; of all meshes the best has 98, and 97."""
    seen = []

    def found(_: Any, machine: Machine, grown: Any = None) -> list[Any]:
        seen.append("grown" if grown else "all")
        rate = {8: (100, 100), 16: (98, rates[0]), 32: (97, rates[1])}[machine.devices][bool(grown)]
        times = SimpleNamespace(tokens_per_s=rate * machine.devices)
        return [SimpleNamespace(times=times, sizes={})]

    monkeypatch.setattr(scaling, "fastest", found)
    monkeypatch.setattr(scaling, "_point", lambda own, config, machine, best: best[0].times.tokens_per_s)
    monkeypatch.setattr(scaling, "_grown", lambda best, times: {(times, 1, 1, 1, 1)})
    points = scaling._curve(SMALL, [(SMALL, Machine(n, H100)) for n in (8, 16, 32)])
    assert points == [800, 16 * max(98, rates[0]), 32 * rates[1]] and " ".join(seen) == looks


def test_a_mesh_that_there_is_not() -> None:
    """One sequence for 8 ranks of `tensor` at most four: no mesh."""
    config = replace(SMALL, data=replace(SMALL.data, batch_size=1))
    found = scale(config, Scale([4, 8], strong=True), lambda n: Machine(n, H100))["structures"]["bigmac"]
    assert found["points"][1] == {"devices": 8, "lacks": "mesh"} and found["stops"] == {"devices": 8, "term": "mesh"}
    with pytest.raises(ConfigError, match=r"batch_size=1 on 4 devices .* on 6; use a multiple of 2") as error:
        scale(config, Scale([4, 6], strong=False), lambda n: Machine(n, H100))
    assert "\n" not in str(error.value)


def test_a_plan_says_how_far_it_scales(tmp_path: pathlib.Path) -> None:
    made = plan("configs/tiny.py", ("mesh.expert=2",), hardware="h100", scale="2,8")
    curves = made["scale"]["structures"]
    at_eight = curves["fine_grained"]["points"][1]
    flags = [flag.removeprefix("--config.") for flag in at_eight["flags"]]
    pasted = plan("configs/tiny.py", ("mesh.expert=2", *flags), devices=8, hardware="h100")
    assert pasted["structure"] == "fine_grained" and pasted["time"] == at_eight["time"]
    text = shown(made)
    assert "weak scaling: a step has" in text
    for name, curve in made["scale"]["structures"].items():
        first, last = (point["tokens_per_s_per_device"] for point in curve["points"])
        if not curve["stops"]:
            assert f"{name} keeps {100 * last / first:.1f} % at 8 devices" in text
    assert not made["scale"]["structures"]["bigmac"]["stops"]
    assert json.loads(json.dumps(made["scale"], allow_nan=False)) == made["scale"]
    pictures.draw(made, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match=r"--scale=2,8 needs .* add --hardware=NAME"):
        plan("configs/tiny.py", ("data.batch_size=32",), scale="2,8")


def test_other_structures_have_other_numbers_of_experts_in_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight are none of vanilla's two."""
    config, request = load_config("tiny", ["train.experts_per_checkpoint=8"]), Request(devices=1, hardware="h100")
    found = {"bigmac": config, "vanilla": of_equal_size(config, "vanilla", "none")}
    monkeypatch.setattr(planner, "alternatives", lambda config, studied: found)
    steps = planner._steps(config, find_place(config, request), request)
    assert not any(isinstance(step, str) for step in steps.values())


@pytest.mark.full
def test_to_65536_devices_in_a_minute() -> None:
    """A model of 258 billion; on 512 devices what it finds is the search's."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # whatever else the machine does
    done = run("--config=large:258b", "--hardware=h100", "--scale=64..65536", "--json")
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 60
    found = json.loads(done.stdout.splitlines()[-1])["scale"]
    assert found["devices"][-1] == 65536 and len(found["devices"]) == 11
    config = replace(load_config("large:258b"), mesh=MeshConfig(fsdp=True))
    for name, structure in alternatives(config).items():
        assert not isinstance(structure, ConfigError)
        made = found["structures"][name]["points"][3]
        batch = found["batch_size"][3]
        best = fastest(replace(structure, data=replace(structure.data, batch_size=batch)), Machine(512, H100))[0]
        assert made["tokens_per_s_per_device"] == pytest.approx(best.times.tokens_per_s / 512, rel=0.03), name
