"""The search over meshes and settings: what it tries is valid, what it skips is slower, what it says is so."""

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bigmac_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    check_batch,
    with_overrides,
)
from bigmac_jax.model import counts
from bigmac_jax.model.memory import rank_memory
from bigmac_jax.model.mesh import axis_sizes
from bigmac_jax.planning import report
from bigmac_jax.planning import search as searching
from bigmac_jax.planning.candidates import REMAT, Machine, variants
from bigmac_jax.planning.cluster import mesh_group
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.hardware.torus import larger
from bigmac_jax.planning.load import Load
from bigmac_jax.planning.search import NEAREST, Candidate, axes, describe, fastest, flags, search

CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=256, vocab_size=512, num_experts=16, top_k=4),
    execution=ExecutionConfig(dtype="bfloat16"),
    data=DataConfig(tokenizer="bytes", sequence_length=128, batch_size=16),
)
H100, V5E = load_hardware("h100"), load_hardware("v5e")
EIGHT = Machine(8, H100)


def with_memory(size: float, devices: int = 8) -> Machine:
    return Machine(devices, replace(H100, memory_bytes=size), headroom=0)


@pytest.mark.full
def test_what_fits_alone() -> None:
    """Where all fits, some does and nothing does: in the same order, but for what recomputes though all fits whole."""
    sizes = sorted(sum(v.memory.values()) for v in variants(CONFIG, EIGHT))
    for size, some in ((sizes[-1], True), (sizes[len(sizes) // 4], True), (sizes[0] / 9, False)):
        fits = [v for v in variants(CONFIG, with_memory(size)) if v.fits]
        found = list(variants(CONFIG, with_memory(size), fitting=True))
        kept = [v.config for v in found]
        assert found == [v for v in fits if v.config in kept] and bool(fits) == bool(found) == some
        for config in (v.config for v in fits if v.config not in kept):
            less = REMAT[: REMAT.index(config.execution.remat)]
            train = replace(config.train, accumulate_steps=1)
            assert any(replace(config, execution=replace(config.execution, remat=r), train=train) in kept for r in less)
    assert len(list(variants(CONFIG, with_memory(sizes[-1]), fitting=True))) < len(sizes)


def settings(c: Candidate) -> tuple[Any, ...]:
    mesh, execution = c.config.mesh, c.config.execution
    return (*c.sizes.values(), mesh.fsdp, mesh.split_experts, execution.exchange, execution.overlap_chunks, execution.remat)  # fmt: skip  # noqa: E501


def test_what_is_tried() -> None:
    found = search(CONFIG, EIGHT)
    meshes = {tuple(c.sizes.values())[1:] for c in found}
    assert {c.sizes["replica"] for c in found} == {1}  # one machine
    assert {m[:3] for m in meshes if m[3] == 1 and m[1] == 1} == {(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8)}
    assert {m[:3] for m in meshes if m[3] == 1 and m[1] > 1} == {(2, 2, 2), (1, 2, 4), (1, 4, 2)}  # of two levels
    assert {m[3] for m in meshes} == {1, 2, 4}  # four heads
    assert {c.config.mesh.split_experts for c in found if c.sizes["tensor"] == 1} == {False}
    assert {c.config.mesh.split_experts for c in found if c.sizes["tensor"] > 1} == {False, True}
    assert {c.config.mesh.fsdp for c in found} == {False, True}
    kinds = {(c.config.execution.exchange, c.sizes["node"] > 1) for c in found if c.sizes["expert"] > 1}
    assert kinds == {("hierarchical", True)} | {(n, False) for n in ("all_to_all", "dedup", "gather", "ragged")}
    assert {c.config.execution.overlap_chunks for c in found} == {1, 2, 4, 8}
    assert {c.config.execution.remat for c in found} == set(REMAT)
    assert {c.config.train.accumulate_steps for c in found} == {1}  # all fit whole
    assert len({settings(c) for c in found}) == len({c.config for c in found}) == len(found)


def test_of_equally_fast_ones_the_smallest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = step_time(CONFIG, {"data": 8, "node": 1, "expert": 1, "tensor": 1}, H100)
    monkeypatch.setattr(searching, "step_time", lambda *_: times)
    left = [c.headroom for c in search(CONFIG, EIGHT)]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]


@pytest.mark.full
def test_moments_go_to_host_memory_where_nothing_fits_without() -> None:
    """On each mesh by itself, and nowhere on a machine that is not known to have any."""
    smallest = [v for v in variants(CONFIG, with_memory(1.0)) if not v.config.execution.offload_optimizer]
    least = min(sum(v.memory.values()) for v in smallest)
    places = dict[Any, set[bool]]()
    for v in variants(CONFIG, with_memory(1.2 * least)):
        if v.fits:
            mesh = tuple(v.sizes.values()), v.config.mesh.fsdp, v.config.mesh.split_experts
            places.setdefault(mesh, set()).add(v.config.execution.offload_optimizer)
    assert sorted(map(sorted, places.values()))[0] == [False] and [True] in map(sorted, places.values())
    assert all(len(where) == 1 for where in places.values())
    small = with_memory(0.98 * least)
    found = [v for v in variants(CONFIG, small) if v.fits]
    assert found and all(v.config.execution.offload_optimizer and v.memory["optimizer"] == 0 for v in found)
    assert "--config.execution.offload_optimizer=True" in describe(CONFIG, small)[1]["best"]["flags"]
    without = replace(small, hardware=replace(small.hardware, host_bandwidth=None))
    left = list(variants(CONFIG, without))
    assert not any(v.fits for v in left)
    assert {v.config.execution.remat for v in left} == set(REMAT) - {"offload"}


def test_what_a_search_would_find_without_the_pass_that_counts_loads() -> None:
    """As a search for the config that needs none finds it; there and where the batch is whole nothing is said."""
    least = min(sum(v.memory.values()) for v in variants(CONFIG, with_memory(1.0, 2), lean=True))
    machine, step = with_memory(1.1 * least, 2), with_overrides(CONFIG, ["model.balance_scope=step"])
    (chosen, said), (_, without) = (describe(config, machine) for config in (step, CONFIG))
    assert chosen.train.accumulate_steps > 1 and chosen.model.balance_scope == "step"
    found = said["best"]["without_first_pass"]
    assert found["tokens_per_s"] == without["best"]["tokens_per_s"] > said["best"]["tokens_per_s"]
    assert sorted(found["flags"]) == sorted([*without["best"]["flags"], "--config.model.balance_scope=part"])
    assert without["best"]["without_first_pass"] is None
    assert describe(step, Machine(2, H100))[1]["best"]["without_first_pass"] is None


def test_what_just_fits() -> None:
    """The whole batch, where no byte is to be left and none is."""
    mesh = {(1, 1, 1, 8, 1)}
    whole = next(variants(CONFIG, EIGHT, lean=True, among=mesh))
    size = sum(whole.memory.values())
    first, less = (next(variants(CONFIG, with_memory(s), lean=True, among=mesh)) for s in (size, size - 1))
    assert (first.config, first.fits, first.headroom) == (whole.config, True, 0)
    assert whole.config.train.accumulate_steps == 1 < less.config.train.accumulate_steps


def test_of_two_that_fit_whole_the_one_without_copies_is_faster() -> None:
    found = [c.config.execution.remat for c in search(CONFIG, EIGHT)]
    assert found.index("layer") < found.index("offload")


@pytest.mark.full
def test_order() -> None:
    found = search(CONFIG, EIGHT)
    assert all(c.fits and c.headroom >= 0.15 for c in found)
    rates = [c.times.tokens_per_s for c in found]
    assert rates == sorted(rates, reverse=True) and rates[0] > 1.5 * rates[-1]
    # With room for some of them, these come first, and behind them the nearest.
    sizes = sorted(sum(c.memory.values()) for c in found)
    small = search(CONFIG, with_memory(sizes[len(sizes) // 4]))
    fit = [c for c in small if c.fits]
    assert 0 < len(fit) < len(small) == len(fit) + NEAREST and all(c.fits for c in small[: len(fit)])
    assert all(c.headroom >= 0 for c in fit) and max(c.config.train.accumulate_steps for c in fit) > 1
    missed = [c.headroom for c in small[len(fit) :]]
    assert missed == sorted(missed, reverse=True) and missed[0] < 0
    # A tenth left free is a machine with a tenth less.
    reserve = search(CONFIG, replace(with_memory(sizes[len(sizes) // 4] / 0.9), headroom=0.1))
    assert abs(sum(c.fits for c in reserve) - len(fit)) <= 1  # 0.9 is no binary number


def every(config: Config, devices: int) -> list[Config]:
    """Every valid mesh and setting of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    axes = [m for m in itertools.product(divisors, repeat=4) if m[0] * m[1] * m[2] * m[3] == devices]
    names = ("all_to_all", "dedup", "hierarchical", "gather", "ragged")
    for mesh, fsdp, split in itertools.product(axes, (False, True), (False, True)):
        for name, chunks, remat, parts in itertools.product(names, (1, 2, 4, 8), REMAT, (1, 2, 4, 8, 16)):
            execution = replace(config.execution, exchange=name, overlap_chunks=chunks, remat=remat)
            try:
                other = Config(config.model, execution, MeshConfig(*mesh, fsdp, split), config.data,
                               train=TrainConfig(accumulate_steps=parts))  # fmt: skip
                axis_sizes(other, devices)
            except ConfigError:
                continue
            found.append(other)
    return found


@pytest.mark.full
def test_nothing_that_is_skipped_is_faster() -> None:
    """Against all that can be written down, at four sizes of memory: none that fits has more tokens a second."""
    known = []
    for config in every(CONFIG, 8):
        sizes = axis_sizes(config, 8)
        memory = rank_memory(config, 8, mesh_group(sizes, H100), counts.parameters(config, sizes))
        known.append((sum(memory.values()), step_time(config, sizes, H100).tokens_per_s))
    by_memory = sorted(memory for memory, _ in known)
    for share in (0, 0.02, 0.3, 1):
        limit = by_memory[int(share * (len(known) - 1))]
        best = search(CONFIG, with_memory(limit))[0]
        assert best.fits
        assert best.times.tokens_per_s == pytest.approx(max(rate for memory, rate in known if memory <= limit))


def test_a_candidate_is_what_it_says() -> None:
    for c in search(CONFIG, EIGHT)[:5]:
        assert c.sizes == axis_sizes(c.config, 8)
        assert c.times == step_time(c.config, c.sizes, H100)
        count = counts.parameters(c.config, c.sizes)
        assert c.memory == rank_memory(c.config, 8, mesh_group(c.sizes, H100), count)
        assert c.headroom == 1 - sum(c.memory.values()) / H100.memory_bytes


def test_candidates_are_timed_with_the_load() -> None:
    """Twice the rows on the busiest rank cost time where experts are split, and nothing on one rank."""
    machines = [replace(EIGHT, load=Load(busiest)) for busiest in (1.0, 2.0)]
    meshes = {(1, 8, 1, 1, 1), (1, 1, 1, 8, 1)}  # replica, data, node, expert, tensor
    even, uneven = ({axes(c): c.times.tokens_per_s for c in fastest(CONFIG, on, meshes)} for on in machines)
    assert even.keys() == uneven.keys() == meshes
    assert [uneven[mesh] < 0.95 * even[mesh] for mesh in sorted(meshes)] == [True, False]
    assert fastest(CONFIG, with_memory(1), meshes) == []  # where nothing fits


@pytest.mark.full
def test_what_make_mesh_refuses_is_not_tried() -> None:
    """Between hosts of 8, expert × tensor ranks of one node lie in one host; and `tensor` never leaves it."""
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=64))
    found = [v.sizes for v in variants(config, Machine(32, H100))]
    nodes = [s["expert"] * s["tensor"] for s in found if s["node"] > 1]
    assert nodes and all(8 % block == 0 for block in nodes)
    assert any(s["expert"] == 16 for s in found)  # a flat group may lie across
    of_two = variants(config, Machine(32, replace(H100, machine_ranks=2)))
    assert {v.sizes["tensor"] for v in of_two} == {1, 2} < {s["tensor"] for s in found}


def test_short_sequences_go_in_fewer_chunks() -> None:
    """Four tokens of a rank are no eight chunks."""
    short = replace(CONFIG, data=replace(CONFIG.data, sequence_length=4, batch_size=8))
    found = list(variants(short, EIGHT))
    assert {v.config.execution.overlap_chunks for v in found} == {1, 2, 4}
    for v in found:
        check_batch(v.config, v.sizes["data"])


def test_flags_turn_one_into_the_other() -> None:
    """Those that differ alone; pasted they give the candidate, whatever the config's own mesh was."""
    of_its_own = replace(CONFIG, mesh=MeshConfig(data=1, expert=2, tensor=2, fsdp=True))
    four = Machine(4, H100)
    for config in (CONFIG, of_its_own):
        best = search(config, four)[0].config
        pasted = [flag.removeprefix("--config.") for flag in flags(config, best)]
        assert pasted and with_overrides(config, pasted) == best
        again = search(best, four)[0].config
        assert flags(best, again) == [] and again == best
    assert not any("mesh.data" in flag for flag in flags(CONFIG, search(CONFIG, four)[0].config))  # 0: all there are


def test_what_would_fit() -> None:
    """What is said makes it fit, and half as many devices more do not. Long sequences: activations are most of it."""
    config = replace(CONFIG, data=replace(CONFIG.data, sequence_length=2048, batch_size=8), execution=ExecutionConfig())
    config = replace(config, optimizer=OptimizerConfig(b2=0.9999))  # too slow for moments in bfloat16
    least = min(sum(v.memory.values()) for v in variants(config, with_memory(1, 2)))
    machine = with_memory(0.9 * least, 2)
    best = describe(config, machine)[1]["best"]
    assert best["fits"] is False and best["headroom"] == pytest.approx(1 - 1 / 0.9)
    said = dict(flag.split("=") for flag in best["would_fit"])
    assert said.keys() == {"--devices", "--config.execution.dtype", "--config.data.sequence_length"}
    more = int(said.pop("--devices"))
    assert search(config, replace(machine, devices=more))[0].fits
    assert not search(config, replace(machine, devices=more // 2))[0].fits
    for name, value in said.items():
        override = f"{name.removeprefix('--config.')}={value}"
        assert search(with_overrides(config, [override]), machine)[0].fits
    assert describe(config, with_memory(least, 2))[1]["best"]["would_fit"] == []
    # A tenth is free, where 15 % were to be.
    free = describe(config, replace(with_memory(least / 0.895, 2), headroom=0.15))[1]["best"]
    assert not free["fits"] and free["would_fit"][0] == "--headroom=0.1"


def test_a_slice() -> None:
    found = search(CONFIG, Machine(8, V5E, (2, 4)))
    assert found and "ragged" not in {c.config.execution.exchange for c in found}  # v5e has none
    assert {c.config.execution.overlap_chunks for c in found} == {1} and all(c.times.hidden == 0 for c in found)
    with pytest.raises(ConfigError, match="its expert groups make no block of the topology"):
        search(CONFIG, Machine(8, V5E, (4, 4)))  # 16 chips


@pytest.mark.parametrize("devices", [1, 3, 7, pytest.param(32, marks=pytest.mark.full)])
def test_nothing_crashes(devices: int) -> None:
    for structure in ("dense", "vanilla", "fine_grained"):
        c = replace(CONFIG, model=replace(CONFIG.model, structure=structure, num_experts=32))
        if devices in (3, 7):
            with pytest.raises(ConfigError, match=rf"--search finds no mesh of {devices} devices .*batch_size=16"):
                search(c, Machine(devices, H100))
        else:  # 16 sequences: on 32 devices two of `tensor` share one
            assert {min(2, c.sizes["tensor"]) for c in search(c, Machine(devices, H100))} <= {1 + (devices == 32), 2}


@pytest.mark.full
def test_replicas_are_whole_machines() -> None:
    """Of four hosts: one replica, two of two hosts each, four; of a slice none, of two slices one each."""
    hosts, slice_ = Machine(32, replace(H100, machine_ranks=8)), Machine(16, V5E, (4, 4))
    wide = replace(CONFIG, data=replace(CONFIG.data, batch_size=64))
    assert {c.sizes["replica"] for c in search(wide, hosts)} == {1, 2, 4}
    assert {c.sizes["replica"] for c in search(wide, slice_)} == {1}
    two = search(wide, replace(slice_, devices=32))
    assert {c.sizes["replica"] for c in two} == {1, 2}
    # Across slices parameters are not gathered where gradients alone can be summed.
    (best,) = (c for c in two[:1])
    assert best.sizes["replica"] == 2 and "--config.mesh.replica=2" in flags(wide, best.config)


def test_a_dense_model_has_no_expert_group() -> None:
    found = search(replace(CONFIG, model=replace(CONFIG.model, structure="dense")), EIGHT)
    assert {tuple(c.sizes.values()) for c in found} == {(1, 8, 1, 1, 1), (1, 4, 1, 1, 2), (1, 2, 1, 1, 4)}
    assert {c.config.execution.remat for c in found} == {"none", "layer", "offload"}
    assert len({settings(c) for c in found}) == len(found)


def test_rounds_limit_the_exchanges() -> None:
    model = replace(CONFIG.model, capacity_factor=float("inf"))
    found = search(replace(CONFIG, model=model, execution=replace(CONFIG.execution, buffer_factor=1.5)), EIGHT)
    names = {c.config.execution.exchange for c in found if c.config.mesh.expert_ranks > 1}
    assert names == {"all_to_all", "dedup", "hierarchical", "ragged"}


def test_overflow_limits_the_exchanges() -> None:
    model = replace(CONFIG.model, capacity_factor=1.25, overflow="next", overflow_tries=1)
    assert {c.config.execution.exchange for c in search(replace(CONFIG, model=model), EIGHT)} == {"all_to_all"}


def test_a_search_times_no_more_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(searching, "step_time", lambda *a: timed.append(a) or step_time(*a))
    assert len(search(CONFIG, with_memory(1))) == len(timed) == NEAREST


def test_the_least_change_of_each_kind_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice to 64 times the devices; of the batch and of the sequences a half or a quarter, if it is a whole number."""
    machine, fits = replace(with_memory(1.0, 3), topology=(1, 3)), set[str]()
    own = replace(CONFIG, execution=ExecutionConfig(), data=replace(CONFIG.data, batch_size=12, sequence_length=6))

    def found(config: Config, here: Machine, lean: bool, fitting: bool) -> Any:
        grown = {"topology": larger((1, 3), here.devices // 3, 8)}
        assert lean and fitting and here == replace(machine, devices=here.devices, **grown)
        moved = [f"{here.devices}"] if here.devices != 3 else []
        moved += [flag.removeprefix("--config.") for flag in flags(own, config)]
        assert len(moved) == 1
        return iter([None] if fits & set(moved) else [])

    monkeypatch.setattr(searching, "variants", found)
    for holds, said in (
        (set(), []),
        ({"6", "12"}, ["--devices=6"]),
        ({"96", "192"}, ["--devices=96"]),
        ({"192"}, ["--devices=192"]),
        ({"384", "3"}, []),
        ({"execution.dtype=bfloat16"}, ["--config.execution.dtype=bfloat16"]),
        ({"optimizer.moment_dtype=bfloat16", "24"}, ["--devices=24", "--config.optimizer.moment_dtype=bfloat16"]),
        ({"data.batch_size=6", "data.batch_size=3"}, ["--config.data.batch_size=6"]),
        ({"data.batch_size=3", "data.sequence_length=3"},
         ["--config.data.batch_size=3", "--config.data.sequence_length=3"]),
        ({"data.sequence_length=1", "data.sequence_length=2", "data.batch_size=4"}, []),
    ):  # fmt: skip
        fits.clear()
        fits |= holds
        assert searching.what_would_fit(own, machine) == said


def test_rows_that_differ_look_different() -> None:
    """Each number of a mesh stands under its axis; what is split over replicas is said."""
    time = {"total": 1.0, "exchange_share": 0.25, "tokens_per_s": 8.0}
    sizes = {"replica": 2, "data": 1, "node": 1, "expert": 4, "tensor": 1}
    row: dict[str, Any] = {"mesh": sizes, "fsdp": True, "split_experts": False, "exchange": "dedup",
        "overlap_chunks": 1, "remat": "none", "offload_optimizer": False, "replica_optimizer": "copied",
        "accumulate_steps": 1, "fits": True, "memory": 8, "headroom": 0.5, "time": time}  # fmt: skip
    rows = [row, row | {"replica_optimizer": "sharded"}, row | {"offload_optimizer": True}]
    written = io.StringIO()
    Console(file=written, width=200).print(report._search(rows))
    text = written.getvalue()
    assert "replica × data × node × expert × tensor" in text and text.count("2 × 1 × 1 × 4 × 1") == 3
    lines = [line for line in text.splitlines() if "dedup" in line]
    assert [("split" in line.replace("split experts", ""), "host" in line) for line in lines] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip
