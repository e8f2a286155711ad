"""Hardware files: what they hold, what is refused, and the torus."""

import dataclasses
import pathlib
import re

import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.planning.hardware import HARDWARE, Link, load_hardware
from bigmac_jax.planning.hardware.torus import Block, Torus, larger, parts
from bigmac_jax.planning.topologies import GPUS, TPUS

FOLDER = pathlib.Path(load_hardware.__code__.co_filename).parent
PLANE = Torus(dimensions=2, wrap_multiple=16, wrap_together=False)
CUBES = Torus(dimensions=3, wrap_multiple=4, wrap_together=True)


def test_the_files() -> None:
    assert set(HARDWARE) == {"paper", *TPUS, *GPUS}
    for name in HARDWARE:
        hardware = load_hardware(name)
        assert (hardware.torus is not None) == (hardware.platform == "tpu") == (name in TPUS)
        assert hardware.fast.bandwidth > hardware.slow.bandwidth
        # Data sheets: FP8 is twice as fast on Hopper, Blackwell and TPU7x, and no faster before.
        eight_bit = None if name in ("paper", "v5e", "v5p", "v6e") else pytest.approx(2 * hardware.peak_flops, rel=1e-3)
        assert hardware.peak_flops_8bit == eight_bit
    # As libtpu's topologies spell them.
    kinds = {name: load_hardware(name).device_kind for name in TPUS}
    assert kinds == {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


@pytest.mark.parametrize("name", GPUS)
def test_a_target_is_of_its_gpu(name: str) -> None:
    """The name is that of the figures, and the memory what jax gives a process of it."""
    hardware, target = load_hardware(name), (FOLDER / f"{name}.textproto").read_text()
    assert f'device_description_str: "{hardware.device_kind}"' in target
    (memory,) = re.findall(r"device_memory_size: (\d+)", target)
    assert hardware.memory_bytes == pytest.approx(0.94 * int(memory), rel=0.01)
    capability = {"h": "{ major: 9 }", "2": "{ major: 10 }", "3": "{ major: 10 minor: 3 }"}
    assert capability["h" if name[0] == "h" else name[-3]] in target


def test_racks_of_72() -> None:
    """The whole rack is one fast domain; a job takes as few racks as can be, all with as many."""
    for name, wire in {"gb200": 50e9, "gb300": 100e9}.items():
        rack = load_hardware(name)
        assert (rack.peak_flops, rack.peak_flops_8bit, rack.machine_ranks) == (2.5e15, 5e15, 72)
        assert (rack.fast.bandwidth, rack.slow.bandwidth) == (900e9, wire)
        assert rack.fast == load_hardware("b300").fast
        ranks = [rack.ranks_together(n) for n in (1, 8, 64, 72, 128, 144, 256)]
        assert ranks == [1, 8, 64, 72, 64, 72, 64]
    host = load_hardware("h800")
    assert host.fast.bandwidth == 200e9  # of 400 in both directions
    assert [host.ranks_together(n) for n in (2, 6, 7, 8, 12, 64)] == [2, 6, 7, 8, 4, 8]


def test_a_chip_of_two_cores() -> None:
    """Figures of the file are a chip's, those loaded are of a core; the cores of a chip are neighbours, and share its
    links."""
    core = load_hardware("tpu7x")
    assert core.torus is not None and core.cores == 2
    assert (core.peak_flops, core.peak_flops_8bit, core.memory_bytes) == (1153.5e12, 2307e12, 94.75 * 2**30)
    assert (core.memory_bandwidth, core.machine_ranks) == (3690e9, 2 * 9216)
    assert (core.fast.bandwidth, core.slow.bandwidth) == (50e9, 6.25e9)
    assert core.torus.slice((4, 4, 4)) == Block((2, 4, 4, 4), (False, True, True, True))
    assert [core.torus.near_cube(n) for n in (1, 2, 16, 128)] == [(1, 1, 1), (1, 1, 1), (2, 2, 2), (4, 4, 4)]
    # A chip's bytes over its links, whichever of its cores sends them: half of the cut's for twice as many senders.
    chips = CUBES.slice((4, 4, 8))
    cores = core.torus.slice((4, 4, 8))
    assert 255 / 256 * cores.busiest_link() == pytest.approx(127 / 128 * chips.busiest_link())
    inner, outer = parts(core.torus.slice((2, 2, 2)), 2)
    assert (inner.shape, outer.shape, outer.stride) == ((2, 1, 1, 1), (1, 2, 2, 2), 1)


def test_memory_is_what_a_program_gets() -> None:
    """GiB of a device, as XLA's errors have them, in two decimals."""
    limits = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
    assert {name: round(load_hardware(name).memory_bytes / 2**30, 2) for name in TPUS} == limits


@pytest.mark.parametrize(("name", "bits"), [("v5e", 6.4e12), ("v6e", 25.6e12)])
def test_what_a_pod_sends_to_others(name: str, bits: float) -> None:
    """As cloud.google.com/tpu/docs states it, of 256 chips."""
    assert 256 * 8 * load_hardware(name).slow.bandwidth == bits


def test_the_papers_cluster() -> None:
    paper = load_hardware("paper")
    assert (paper.peak_flops, paper.memory_bytes, paper.machine_ranks) == (149.7e12, 45e9, 8)
    assert paper.slow.bandwidth * 8 * 8 == 100e9  # bits a second of a machine
    assert {load_hardware(name).hidden_share for name in ("paper", *GPUS)} == {0.366}


def test_clocks_give_the_peaks() -> None:
    """MXUs × multipliers × two FLOPs; v6e's, and those of a core of TPU7x, do two products a cycle."""
    cycle = {"v5e": 4 * 128**2 * 2, "v5p": 8 * 128**2 * 2, "v6e": 2 * 256**2 * 2 * 2, "tpu7x": 2 * 256**2 * 2 * 2}
    for name, flops in cycle.items():
        hardware = load_hardware(name)
        assert hardware.clock_hz is not None
        assert flops * hardware.clock_hz == pytest.approx(hardware.peak_flops, rel=0.005)


def edited(path: pathlib.Path, old: str, new: str, of: str = "v5e") -> pathlib.Path:
    text = (FOLDER / f"{of}.toml").read_text()
    assert len(re.findall(old, text, re.MULTILINE)) == 1
    path.write_text(re.sub(old, new, text, flags=re.MULTILINE))
    return path


def test_a_file_of_ones_own(tmp_path: pathlib.Path) -> None:
    path = edited(tmp_path / "mine.toml", "^bandwidth = 50e9", "bandwidth = 7")
    assert load_hardware(path).fast == Link(7.0, 1e-6)
    assert load_hardware(str(path)) == load_hardware(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("^memory_bytes.*", "", "mine.toml: memory_bytes is missing; see v5e.toml for what it is"),
        ("^dimensions.*", "", "mine.toml: torus.dimensions is missing; see v5e.toml for what it is"),
        ("^clock_hz", "clock", "mine.toml: clock is not a field; use one of platform, device_kind, "),
        ("^bandwidth = 50e9", "speed = 50e9", "mine.toml: fast.speed is not a field; use one of bandwidth, latency"),
        ("^platform.*", "platform = 3", "mine.toml: platform=3 must be a text"),
        ("^platform.*", 'platform = "cpu"', "mine.toml: platform='cpu' must be gpu or tpu"),
        ("^overlaps.*", "overlaps = 1", "mine.toml: overlaps=1 must be true or false"),
        ("^machine_ranks.*", "machine_ranks = 8.0", "mine.toml: machine_ranks=8.0 must be a whole number"),
        ("^machine_ranks.*", "machine_ranks = true", "mine.toml: machine_ranks=True must be a whole number"),
        ("^peak_flops =.*", 'peak_flops = "x"', "mine.toml: peak_flops='x' must be a number"),
        ("^peak_flops =.*", "peak_flops = 0", "mine.toml: peak_flops=0.0 must be a finite number above 0"),
        ("^peak_flops =.*", "peak_flops = inf", "mine.toml: peak_flops=inf must be a finite number above 0"),
        ("^bandwidth = 50e9", "bandwidth = -1.0", "mine.toml: fast.bandwidth=-1.0 must be a finite number above 0"),
        ("^matmul_efficiency.*", "matmul_efficiency = 1.2", "mine.toml: matmul_efficiency=1.2 must be at most 1"),
        ("^clock_hz.*", "", "mine.toml: platform='tpu' needs clock_hz; see v5e.toml"),
        (r"^\[torus\](.|\n)*", "", "mine.toml: platform='tpu' needs torus; see v5e.toml"),
        (r"^\[fast\].*\n.*\n.*", "", "mine.toml: fast is missing; see v5e.toml for what it is"),
        (r"^overlaps.*", "overlaps = ", "mine.toml is not valid TOML (Invalid value"),
    ],
)
def test_what_is_refused(old: str, new: str, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_hardware(edited(tmp_path / "mine.toml", old, new))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_number_for_a_table(tmp_path: pathlib.Path) -> None:
    path = edited(tmp_path / "mine.toml", r"^\[fast\].*\n.*\n.*", "")
    path.write_text("fast = 3\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"^mine.toml: fast=3 must be a table, as \[fast\]$"):
        load_hardware(path)


@pytest.mark.parametrize("name", ["v4", "nowhere/x.toml", "", "."])
def test_no_such_hardware(name: str) -> None:
    known = ", ".join(HARDWARE)
    with pytest.raises(ConfigError, match=f"can't be read as a file; use one of {known}, or a path"):
        load_hardware(name)


def test_an_efficiency_of_one_is_the_most(tmp_path: pathlib.Path) -> None:
    assert (
        load_hardware(edited(tmp_path / "mine.toml", "^matmul_efficiency.*", "matmul_efficiency = 1")).matmul_efficiency
        == 1.0
    )


def test_peaks() -> None:
    """8 bits are for what is multiplied in them, and no faster than 16 where a chip has none."""
    h100, v5e = load_hardware("h100"), load_hardware("v5e")
    for hardware in (h100, v5e):
        exact, half = hardware.peak_flops_float32, hardware.peak_flops
        assert exact <= half
        assert [hardware.peak(dtype, False) for dtype in ("float32", "bfloat16")] == [exact, half]
    assert [hardware.peak("float32", True) for hardware in (h100, v5e)] == [h100.peak_flops_8bit, v5e.peak_flops]


@pytest.mark.parametrize(
    ("shape", "times", "most", "expected"),
    [
        ((2, 2), 1, 256, (2, 2)),
        ((2, 2), 2, 256, (2, 4)),  # of two that are as short the last
        ((2, 2), 4, 256, (4, 4)),
        ((2, 2, 4), 8, 256, (4, 4, 8)),
        ((4, 2), 2, 256, (4, 4)),
        ((2, 4), 2, 16, (4, 4)),  # as many as there may be
        ((2, 4), 4, 31, (4, 4)),
        ((2, 4), 2, 15, (2, 4)),
    ],
)
def test_a_larger_slice(shape: tuple[int, ...], times: int, most: int, expected: tuple[int, ...]) -> None:
    assert larger(shape, times, most) == expected


def test_rings() -> None:
    assert PLANE.slice((4, 8)).rings == (False, False)
    assert PLANE.slice((8, 16)).rings == (False, True)
    assert PLANE.slice((16, 16)).rings == (True, True)
    assert CUBES.slice((2, 4, 4)).rings == (False, False, False)  # rings come with whole cubes
    assert CUBES.slice((4, 4)).rings == (False, False)
    assert CUBES.slice((4, 4, 8)).rings == (True, True, True)


def test_bisections_by_hand() -> None:
    # 4 × 8: 16 chips on each side of 4 links; a chip sends each of 31 others 1/31.
    assert PLANE.slice((4, 8)).busiest_link() == pytest.approx(16 * 16 / 31 / 4)
    # 2 × 4 × 4: an axis of 4 is cut through 2 · 4 links.
    assert CUBES.slice((2, 4, 4)).busiest_link() == pytest.approx(16 * 16 / 31 / 8)
    # 4 × 4 × 8: 64 and 64, two cuts of 16 links.
    assert CUBES.slice((4, 4, 8)).busiest_link() == pytest.approx(64 * 64 / 127 / 32)
    assert PLANE.slice((8, 4)).busiest_link() == PLANE.slice((4, 8)).busiest_link()
    # A line of 3: the first sends the other two 1/2 each.
    assert Block((3,), (False,)).busiest_link() == pytest.approx(1)
    assert Block((1, 1), (False, False)).busiest_link() == 0
    # 3 × 2: 2 chips and 4 on the sides of 2 links, more than 3 and 3 of 3.
    assert Block((3, 2), (False, False)).busiest_link() == pytest.approx(2 * 4 / 5 / 2)
    # A ring of 5: 2 chips and 3, two cuts.
    assert Block((5,), (True,)).busiest_link() == pytest.approx(2 * 3 / 4 / 2)


@pytest.mark.parametrize(("name", "bandwidth"), [("v5e", 1.6e12), ("v6e", 3.2e12)])
def test_bisection_of_a_pod(name: str, bandwidth: float) -> None:
    """As cloud.google.com/tpu/docs states it."""
    hardware = load_hardware(name)
    assert hardware.torus is not None
    across = 128 * 128 / 255  # bytes, if every chip sends one in all
    seconds = hardware.torus.slice((16, 16)).busiest_link() / hardware.fast.bandwidth
    assert across / seconds == pytest.approx(bandwidth)


def test_hops_and_links() -> None:
    assert PLANE.slice((4, 8)).hops() == 3 + 7
    assert PLANE.slice((16, 16)).hops() == 8 + 8
    assert Block((5, 3), (True, False)).hops() == 2 + 2
    assert PLANE.slice((4, 8)).ring_links() == 2
    assert PLANE.slice((8, 16)).ring_links() == 3
    assert CUBES.slice((2, 2, 1)).ring_links() == 2


def test_near_cube() -> None:
    assert [PLANE.near_cube(n) for n in (1, 2, 8, 32, 256)] == [(1, 1), (1, 2), (2, 4), (4, 8), (16, 16)]
    cores = dataclasses.replace(CUBES, cores=2)
    assert [cores.near_cube(n) for n in (3, 5)] == [(1, 1, 2), (1, 1, 3)]  # a chip may be half used
    assert [CUBES.near_cube(n) for n in (4, 32, 64, 48)] == [(1, 2, 2), (2, 4, 4), (4, 4, 4), (3, 4, 4)]


def test_parts_of_every_second_chip() -> None:
    """Two of them are two links apart; every second of those four, and there the data of four blocks shares a link."""
    inner, outer = parts(parts(PLANE.slice((8, 8)), 2)[1], 2)
    assert (inner, outer) == (Block((2, 1), (False, False), stride=2), Block((2, 8), (False, False), stride=4))
    assert (inner.hops(), outer.hops()) == (1 * 2, (1 + 7) * 4)
    assert (inner.ring_links(), outer.ring_links()) == (1 / 2, 2 / 4)
    assert inner.busiest_link() == 2
    assert outer.busiest_link() == pytest.approx(8 * 8 / 15 / 2 * 4)


def test_parts_of_a_slice() -> None:
    inner, outer = parts(PLANE.slice((4, 8)), 8)
    assert (inner, outer) == (Block((4, 2), (False, False)), Block((1, 4), (False, False), stride=2))
    assert outer.ring_links() == 0.5 and outer.hops() == 6  # two lines through the same links
    inner, outer = parts(PLANE.slice((16, 16)), 16)
    assert (inner, outer) == (Block((16, 1), (True, False)), Block((1, 16), (True, True)))
    assert parts(PLANE.slice((16, 16)), 8)[0].rings == (False, False)  # half of a ring is a line
