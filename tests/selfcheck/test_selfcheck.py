"""The self-check: green on a machine that computes right, red in the right place on one that doesn't."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from bigmac_jax.model import experts
from bigmac_jax.model.exchange import STRATEGIES, Gather, Ragged
from bigmac_jax.model.mesh import batch_spec, make_mesh, rank_spec, ranks, token_spec
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.selfcheck import checks, host, numpy_reference, on_devices, part_checks, rates
from bigmac_jax.selfcheck.on_devices import MismatchError
from bigmac_jax.selfcheck.rates import Rate, all_rates, find_hardware
from bigmac_jax.training import step

ROOT = pathlib.Path(__file__).parents[2]


def selfcheck(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bigmac_jax.selfcheck", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("platform", "slices", "processes", "expected"),
    [
        ("tpu", [0, 0, 1, 1], [0, 0, 1, 1], 2),
        ("tpu", [0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 9, 3),
        ("tpu", [0, 0, 1], [0] * 3, 1),  # no whole number of devices each
        ("tpu", [0, 1], [0, 1], 1),  # one device each: nothing inside a node
        ("gpu", [None] * 6, [0, 0, 1, 1, 2, 2], 3),
        ("gpu", [None] * 4, [0] * 4, 2),
        ("gpu", [None] * 8, list(range(8)), 2),  # a process a GPU: which of them share a host is not known
        ("cpu", [None] * 4, [0, 1, 2, 3], 2),
        ("tpu", [1] * 4, [0] * 4, 2),
        ("cpu", [None] * 3, [0] * 3, 1),
        ("cpu", [None] * 2, [0] * 2, 1),
    ],
)
def test_nodes(platform: str, slices: list[int | None], processes: list[int], expected: int) -> None:
    devices = [
        types.SimpleNamespace(platform=platform, slice_index=slice_, process_index=process)
        for slice_, process in zip(slices, processes, strict=True)
    ]
    assert part_checks.count_nodes(devices) == expected


def two() -> list[Any]:
    return jax.devices()[:2]


def scaled(function: Any, factor: float = 1.01) -> Any:
    return lambda *args, **kwargs: factor * function(*args, **kwargs)


@pytest.mark.full
def test_the_command_is_green() -> None:
    done = selfcheck("--cpu_devices=2", "--json", "--quick")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] and not report["rates"] and not report["advice"]
    assert all(check["ok"] and not check["why"] and check["seconds"] >= 0 for check in report["checks"])
    names = {check["name"] for check in report["checks"]}
    assert names >= {f"exchange {name}" for name in STRATEGIES} | {"training step"}
    assert names >= {f"experts {of} {dtype}" for of in ("dropless", "capacity") for dtype in part_checks.BOUNDS}
    assert names >= {f"attention {of} {dtype}" for of in ("auto", "xla") for dtype in part_checks.BOUNDS}
    assert all(f"{name} …" in done.stderr for name in names)  # which one hangs, if one does
    assert report["device"] | {"platform": "cpu", "devices": 2, "processes": 1} == report["device"]
    assert report["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    "flag",
    [*(pytest.param(f, marks=pytest.mark.full) for f in ("--cpu_devices=two", "--fast")), "--config.model.top_k=2"],
)
def test_bad_flags(flag: str) -> None:
    done = selfcheck(flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("at_terminal", [False, True])
def test_a_check_is_named_before_it_runs(
    at_terminal: bool, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a line of its own, or at a terminal, which `rich` shows, for as long as it runs."""
    shown: list[str] = []

    @contextlib.contextmanager
    def status(name: str) -> Iterator[None]:
        shown.append(f"{name} begins")
        yield
        shown.append(f"{name} ends")

    console = types.SimpleNamespace(is_terminal=at_terminal, status=status)
    program = command("selfcheck")
    monkeypatch.setattr(program, "Console", lambda stderr: console)

    def test() -> str:
        shown.append(capsys.readouterr().err)
        return "fine"

    result = program._run(checks.Check("the wire", "exchange", "", test))
    assert (result.ok, result.detail) == (True, "fine")
    assert shown == (["the wire begins", "", "the wire ends"] if at_terminal else ["the wire …\n"])


@pytest.mark.parametrize(("stats", "expected"), [(None, None), ({}, None), ({"bytes_limit": 9}, 9)])
def test_a_report_names_the_memory_that_a_device_says_it_has(
    stats: dict[str, int] | None, expected: int | None, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats)
    program = command("selfcheck")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(program.environment, "compiler_options", lambda of: {"of": of.platform})
    assert program.device() == {
        "platform": "gpu", "kind": device.device_kind, "devices": 8, "processes": 1, "memory_bytes": expected,
        "hardware": "h100", "compiler_options": {"of": "gpu"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected", "text"),
    [
        (2.5e12, 5e12, "2.5 TFLOP/s a device, 50% of the hardware file's 5 T"),
        (1e9, 3e9, "1 GFLOP/s a device, 33% of the hardware file's 3 G"),
        (999.9e6, None, "1e+03 MFLOP/s a device"),
        (1234.0, 0.0, "1.23 kFLOP/s a device"),
        (12.0, None, "12 FLOP/s a device"),
    ],
)
def test_a_rate_is_told_beside_what_the_hardware_file_expects(
    value: float, expected: float | None, text: str, command: Any
) -> None:
    found: dict[str, Any] = {}
    check = command("selfcheck")._as_check(Rate("matmul", "FLOP", lambda: value, expected), found)
    assert (check.name, check.part, check.setting, found) == ("rate matmul", "rate", "", {})
    assert check.run() == text
    share = value / expected if expected else None
    assert found == {"matmul": {"value": value, "unit": "FLOP/s", "expected": expected, "share": share}}


@pytest.mark.full
def test_the_command_with_rates_is_green() -> None:
    done = selfcheck("--cpu_devices=2")
    assert done.returncode == 0, done.stdout
    for words in ("rate matmul float32", "rate memory", "rate all-to-all", "rate training step", "a device"):
        assert words in done.stdout


@pytest.mark.full
def test_what_is_broken_is_red_and_the_rest_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = Gather.dispatch

    def without_a_row(self: Gather, *arguments: Any) -> Any:
        rows_NR, gate_NK = dispatch(self, *arguments)
        return rows_NR.at[3].set(0), gate_NK

    def refused(self: Ragged, experts_TK: Any) -> Any:
        raise RuntimeError("no such collective\nand no more of this")

    monkeypatch.setattr(experts, "_even", scaled(experts._even))
    monkeypatch.setattr(jax.nn, "dot_product_attention", scaled(jax.nn.dot_product_attention))
    monkeypatch.setattr(Gather, "dispatch", without_a_row)
    monkeypatch.setattr(Ragged, "plan", refused)
    results = [checks.run(check) for check in checks.all_checks(two())]
    red = {result.check.name: result.why for result in results if not result.ok}
    # A hundredth is rounding in bfloat16.
    kernel, attention = "experts dropless float32", "attention xla float32"
    assert red.keys() == {kernel, attention, "exchange gather", "exchange ragged"}
    assert "off by" in red[kernel] and "on 2 of 2 devices; at most 3e-05 is rounding" in red[kernel]
    assert "off by 1.0e-02" in red[attention]
    assert red["exchange ragged"] == "RuntimeError: no such collective"
    (trained,) = (result.detail.split() for result in results if result.check.part == "training")
    assert [float(trained[1]), float(trained[3])] == pytest.approx([5.581, 4.578], abs=0.005)  # random tokens: log 264
    assert checks.advice(results) == {
        kernel: "execution.grouped_matmul=blocks",
        attention: "execution.attention=auto",
        "exchange gather": "execution.exchange=all_to_all",
        "exchange ragged": "execution.exchange=all_to_all",
    }


@pytest.mark.parametrize(
    ("red", "expected"),
    [
        (("auto f", "auto b"), "execution.attention=xla"),
        (("xla b",), "execution.attention=auto"),  # green in float32 alone is not enough
        (("auto b", "xla f"), "execution.attention=blocks"),
        (("dropless",), "execution.grouped_matmul=blocks"),
        (("all_to_all",), "execution.exchange=dedup"),
        (("all_to_all", "dedup"), ""),  # no other was checked, of devices that may not have it
        (("step",), ""),
    ],
)
def test_advice_is_what_was_green_or_is_called_untested(
    red: tuple[str, ...], expected: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"auto f": "execution.attention=auto", "auto b": "execution.attention=auto",
             "xla f": "execution.attention=xla", "xla b": "execution.attention=xla",
             "dropless": "execution.grouped_matmul=auto", "all_to_all": "execution.exchange=all_to_all",
             "dedup": "execution.exchange=dedup", "step": ""}  # fmt: skip
    parts = ["attention"] * 4 + ["experts", "exchange", "exchange", "training"]
    results = [
        checks.Result(checks.Check(name, part, setting, str), "off" if name in red else "", "", 0.0)
        for (name, setting), part in zip(names.items(), parts, strict=True)
    ]
    found = checks.advice(results)
    assert found == dict.fromkeys(red, expected)
    command("selfcheck")._show({"advice": found, "ok": False}, results)
    end = " (untested)" if expected.endswith("=blocks") else ""
    fix = f"set --config.{expected}{end}" if expected else "no setting goes around it"
    assert f"{red[0]} failed: {fix}\n" in capsys.readouterr().out


def test_a_lost_row_is_seen_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []
    monkeypatch.setattr(
        on_devices.environment, "compiler_options", lambda device, ragged: options.append((device, ragged)) or {}
    )
    even, attend = experts._even, jax.nn.dot_product_attention
    monkeypatch.setattr(experts, "_even", lambda *args: even(*args).at[5].set(0))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: attend(*a, **k).at[:, 7].set(0))
    with pytest.raises(MismatchError):
        part_checks.check_experts(two(), True, "bfloat16")
    with pytest.raises(MismatchError):
        part_checks.check_attention(two(), "xla", "bfloat16")
    assert options == [(jax.devices()[0], False)] * 2


@pytest.mark.full
def test_a_lost_row_of_decoding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert part_checks.check_decoding(two(), "float32").startswith("within ")
    attend = part_checks.paged_attention
    monkeypatch.setattr(part_checks, "paged_attention", lambda *args: attend(*args).at[:, 2].set(0))
    with pytest.raises(MismatchError):
        part_checks.check_decoding(two(), "bfloat16")


@pytest.mark.full
def test_a_wrong_gradient_of_all_devices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn = step.loss_fn

    def off_on_several(*args: Any) -> Any:
        loss, parts = loss_fn(*args)
        return loss * (1.001 if ranks() > 1 else 1), parts

    monkeypatch.setattr(step, "loss_fn", off_on_several)
    with pytest.raises(MismatchError, match=r"norm is .* on all devices and .* on one of them"):
        part_checks.check_training(two())


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0], [2.0, 3.0, 2.5], [3.0, 2.5, 3.5], [3.0, math.nan, 2.0]])
def test_a_loss_that_does_not_fall_is_seen(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    monkeypatch.setattr(part_checks, "train", lambda *args: (losses, 1.0))
    with pytest.raises(MismatchError, match="it should fall"):
        part_checks.check_training(two())


def test_compare() -> None:
    b = np.array([1.0, -4.0])
    assert on_devices.compare({"y": np.array([[1.0, -4.0], [1.0, -4.1]])}, {"y": b}, 0.03) == "within 2e-02"
    for a, message in (
        ([[1, -4], [1, -4.1]], "y is off by 2.5e-02 of its largest entry on 1 of 2 devices"),
        ([[1, -4], [math.nan, -4]], "on 1 of 2 devices"),
    ):
        with pytest.raises(MismatchError, match=message):
            on_devices.compare({"y": np.array(a)}, {"y": b}, 0.02)
    three = np.array([[1, -4.5], [2, -5], [1, 0]])  # a rank is off by as much as it may, two are by more
    with pytest.raises(
        MismatchError, match=r"y is off by 1.0e\+00 of its largest entry on 2 of 3 devices; at most 0.125"
    ):
        on_devices.compare({"y": three}, {"y": b}, 0.125)
    with pytest.raises(MismatchError, match="largest entry; at most"):
        on_devices.compare({"y": three[1:2]}, {"y": b}, 0.125)
    small = np.array([0.5, -1e-6])
    assert on_devices.compare({"y": small}, {"y": small}, 0.0) == "within 0e+00"
    with pytest.raises(MismatchError):  # what is all zeros shows nothing
        on_devices.compare({"y": np.zeros(2)}, {"y": np.zeros(2)}, 1)


def test_what_the_hardware_files_expect() -> None:
    assert [find_hardware(kind) for kind in ("TPU v5 lite", "NVIDIA H100 80GB HBM3", "cpu")] == ["v5e", "h100", ""]

    def expected(name: str, devices: int) -> dict[str, float | None]:
        hardware = load_hardware(name)
        absent = [types.SimpleNamespace(platform=hardware.platform)] * devices
        return {rate.name: rate.expected for rate in all_rates(absent, hardware)}

    h100, v5e = expected("h100", 8), expected("v5e", 8)
    assert (h100["matmul bfloat16"], h100["memory"]) == (989.4e12, 3.35e12)
    assert h100["all-to-all"] == pytest.approx(450e9, rel=0.05)  # 64 MiB of it: the latency is small
    link, sizes = load_hardware("h100").fast, {"data": 1, "node": 1, "expert": 8, "tensor": 1}
    assert h100["all-to-all"] == pytest.approx(2**26 / (7 * link.latency + 2**26 / link.bandwidth), rel=1e-9)
    planned = step_time(rates.training_config(8, cpu=False), sizes, load_hardware("h100"))
    assert h100["training step"] == planned.tokens_per_s / 8
    # On 2 × 4 chips each sends 4/7 of it to the other half of the long axis, over 2 links of 50 GB/s for 4 chips.
    assert v5e["all-to-all"] == pytest.approx(50e9 * 7 / 8, rel=0.01)
    seconds = (1 + 3) * load_hardware("v5e").fast.latency + 2**26 * 8 / 7 / 50e9  # the hops of both axes
    assert v5e["all-to-all"] == pytest.approx(2**26 / seconds, rel=1e-9)
    assert expected("h100", 2).keys() == h100.keys()
    assert expected("h100", 1).keys() == {"matmul bfloat16", "memory", "training step"}
    assert all(value and value > 0 for value in (*h100.values(), *v5e.values()))
    absent = [types.SimpleNamespace(platform="cpu")] * 2
    assert all(rate.expected is None for rate in all_rates(absent, None))


class Timed:
    """In place of `rates._seconds`: every call takes so many seconds; what was to be timed is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float):
        self._seconds = seconds
        monkeypatch.setattr(rates, "_seconds", self)

    def __call__(self, function: Any, carry: Any, repeats: int) -> float:
        self.function, self.carry, self.repeats = function, carry, repeats
        return self._seconds


def test_seconds_are_those_of_a_call_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read behind two calls, of which one compiles, and behind the three that count."""
    clock, done, read = iter([100.0, 106.0]), list[int](), list[int]()

    def call(carry: int) -> int:
        done.append(carry)
        return carry + 2

    def now() -> float:
        read.append(len(done))
        return next(clock)

    monkeypatch.setattr(rates, "time", types.SimpleNamespace(perf_counter=now))
    assert rates._seconds(call, 1, repeats=3) == 2.0
    assert done == [1, 3, 5, 7, 9] and read == [2, 5]


def test_the_rate_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrays are read and one is written, in two seconds; here of eight threes instead of as many ones as asked."""
    timed, asked = Timed(monkeypatch, 2.0), list[int]()

    def ones(size: int, dtype: Any) -> np.ndarray:
        asked.append(size)
        return np.full(8, 3, dtype)

    monkeypatch.setattr(rates, "np", types.SimpleNamespace(ones=ones, float32=np.float32))
    for cpu in (True, False):
        assert rates.memory_rate(cpu) == 3 * 4 * 8 / 2 and timed.repeats == 20
        assert timed.carry.dtype == np.float32 and timed.carry.devices() == {jax.devices()[0]}
        assert np.asarray(timed.function(timed.carry)).tolist() == [4.5] * 8 and timed.carry.is_deleted()
    assert asked == [2**24] * 2 + [2**27] * 2


def test_the_rate_of_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three ranks sends five rows of 1024 numbers to each of the others, in half a second."""
    timed, devices = Timed(monkeypatch, 0.5), jax.devices()[4:7]
    assert rates.exchange_rate(devices, 2 * 5.4 * 4096) == 2 * 5 * 1024 * 4 / 0.5 and timed.repeats == 10
    assert timed.carry.shape == (3, 3, 5, 1024) and timed.carry.devices() == set(devices)
    assert timed.carry.sharding.shard_shape(timed.carry.shape) == (1, 3, 5, 1024)
    numbers = np.arange(9, dtype=np.float32).reshape(3, 3)[:, :, None, None] * np.ones((1, 1, 5, 1024), np.float32)
    with jax.set_mesh(timed.carry.sharding.mesh):
        given = jax.device_put(numbers, timed.carry.sharding)
        np.testing.assert_array_equal(timed.function(given), numbers.swapaxes(0, 1))
    assert given.is_deleted()
    assert rates.exchange_rate(jax.devices()[:2], 1.0) == 1024 * 4 / 0.5  # a row at least


def test_the_rate_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a batch by the seconds of a step, which is given random tokens and the first learning rate."""
    timed, steps = Timed(monkeypatch, 0.25), list[Any]()
    config = rates.training_config(2, cpu=True)

    class Trainer:
        def __init__(self, *given: Any) -> None:
            assert given[0] == config and dict(given[1].shape) == {
                "replica": 1, "data": 1, "node": 1, "expert": 2, "tensor": 1,
            }  # fmt: skip
            assert given[1].devices.flatten().tolist() == jax.devices()[4:6]

        def init(self, key: Any) -> str:
            assert jax.random.key_data(key).tolist() == [0, 0]
            return "state"

        def rate(self, done: int) -> tuple[str, int]:
            return "rate", done

        def step(self, state: str, batch: Any, rate: Any) -> tuple[str, Any]:
            steps.append((state, batch, rate))
            return "after", None

    monkeypatch.setattr(rates, "make_trainer", Trainer)
    assert rates.training_rate(config, jax.devices()[4:6]) == 4 * 128 / 0.25
    assert (timed.carry, timed.repeats, timed.function("before")) == ("state", 3, "after")
    ((state, batch, rate),) = steps
    assert (state, rate) == ("before", ("rate", 0))
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(4, 129), dtype=np.int32)
    np.testing.assert_array_equal(batch.inputs_BL, tokens[:, :-1])
    np.testing.assert_array_equal(batch.targets_BL, tokens[:, 1:])


def test_rates_are_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "dense_matmul_rate", {"float32": 96.0, "bfloat16": 192.0}.__getitem__)
    monkeypatch.setattr(rates, "training_rate", lambda config, devices: 60.0 * config.mesh.expert * len(devices))
    monkeypatch.setattr(rates, "exchange_rate", lambda devices, sent: len(devices) * sent)
    monkeypatch.setattr(rates, "memory_rate", lambda cpu: 5.0 + cpu)
    for platform, expected in (
        ("cpu", {"matmul float32": 96, "memory": 6, "all-to-all": 3 * 2**22, "training step": 180}),
        ("gpu", {"matmul bfloat16": 192, "memory": 5, "all-to-all": 3 * 2**26, "training step": 180}),
    ):
        found = all_rates([types.SimpleNamespace(platform=platform)] * 3, None)
        assert {rate.name: rate.measure() for rate in found} == expected
        assert [rate.unit for rate in found] == ["FLOP", "B", "B", "token"]


def test_how_a_rate_is_told(command: Any) -> None:
    """With three digits, and beside what the hardware file says."""
    program, found = command("selfcheck"), dict[str, Any]()
    check = program._as_check(Rate("matmul", "FLOP", lambda: 1.5e12, 6e12), found)
    assert check[:3] == ("rate matmul", "rate", "") and found == {}
    assert check.run() == "1.5 TFLOP/s a device, 25% of the hardware file's 6 T"
    alone = program._as_check(Rate("memory", "B", lambda: 2e10, None), found)
    assert alone.run() == "20 GB/s a device"
    assert program._as_check(Rate("none", "B", lambda: 0.0, 5.0), {}).run() == "0 B/s a device"
    assert found == {
        "matmul": {"value": 1.5e12, "unit": "FLOP/s", "expected": 6e12, "share": 0.25},
        "memory": {"value": 2e10, "unit": "B/s", "expected": None, "share": None},
    }
    values = (12_345e9, 1e12, 999.4e9, 1e9, 5.678e6, 1e6, 1234, 1000, 999, 0.5)
    told = ["12.3 T", "1 T", "999 G", "1 G", "5.68 M", "1 M", "1.23 k", "1 k", "999 ", "0.5 "]
    assert list(map(program._scaled, values)) == told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC: 12\n",
            "580.82.07, CUDA 13",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.1  Release Build\n", "590.1, CUDA 13"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed\n", ""),
        ("", "not said here"),
    ],
)
def test_the_driver(text: str, expected: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    file = tmp_path / "version"
    file.write_text(text)
    if expected:
        assert host.check_driver(file) == expected
        return
    with pytest.raises(MismatchError, match=r"the driver is 570.124.06, and CUDA 13 needs 580 or newer; use"):
        host.check_driver(file)


def test_the_memory() -> None:
    h100 = load_hardware("h100")
    assert host.check_memory(round(0.94 * 85_520_809_984), h100) == "74.9 GiB"
    assert host.check_memory(None, h100) == host.check_memory(1, None) == "not said here"
    with pytest.raises(MismatchError, match=r"jax gives a process 59.7 GiB of a GPU, and .* reckons with 74.5;"):
        host.check_memory(round(0.75 * 85_520_809_984), h100)


def test_hosts_of_gpus_alone_are_asked() -> None:
    def device(platform: str) -> Any:
        return types.SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": 10**11})

    assert host.host_checks([device("cpu")], None) == host.host_checks([device("tpu")], None) == []
    found = host.host_checks([device("gpu")], load_hardware("h100"))
    assert [check.name for check in found] == ["driver", "memory"] and found[1].run() == "93.1 GiB"


def test_checks_of_each_platform() -> None:
    """In their order: the dtypes of each part, cuDNN's attention in 16 bits alone, exchanges that the device has."""

    def found(platform: str, kind: str) -> list[tuple[Any, ...]]:
        devices = [types.SimpleNamespace(platform=platform, device_kind=kind)]
        made = checks.all_checks(devices)
        assert all(check.run.args[0] is devices and not check.run.keywords for check in made)
        return [(*check[:3], check.run.func.__name__, *check.run.args[1:]) for check in made]

    grouped, of_training = "execution.grouped_matmul=auto", ("training step", "training", "", "check_training")
    of_experts = [
        (f"experts {layout} {dtype}", "experts", grouped, "check_experts", layout == "dropless", dtype)
        for layout, dtype in itertools.product(("dropless", "capacity"), ("float32", "bfloat16"))
    ]
    decoding = [(f"decoding {d}", "decoding", "", "check_decoding", d) for d in ("float32", "bfloat16")]

    def attention(*names: str) -> list[tuple[Any, ...]]:
        return [
            (f"attention {name} {d}", "attention", f"execution.attention={name}", "check_attention", name, d)
            for name in names
            for d in ("float32", "bfloat16")
            if (name, d) != ("cudnn", "float32")
        ]

    def exchanges(*names: str) -> list[tuple[Any, ...]]:
        return [(f"exchange {n}", "exchange", f"execution.exchange={n}", "check_exchange", n) for n in names]

    four = "all_to_all", "dedup", "hierarchical", "gather"
    for platform, kind, kernels, names in (
        ("cpu", "cpu", ("auto", "xla"), (*four, "ragged")),
        ("tpu", "TPU v5 lite", ("auto", "xla"), four),
        ("gpu", "NVIDIA H100 80GB HBM3", ("auto", "xla", "cudnn", "triton"), (*four, "ragged")),
        ("other", "other", ("auto", "xla"), (*four, "ragged")),
    ):
        expected = [*of_experts, *attention(*kernels), *decoding, *exchanges(*names), of_training]
        assert found(platform, kind) == expected


def test_a_check_fails_everywhere_if_it_fails_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(gathered: list[str], error: Exception | None = None) -> tuple[Any, ...]:
        monkeypatch.setattr(checks.hosts, "gather", lambda why: [why, *gathered])
        monkeypatch.setattr(checks, "time", types.SimpleNamespace(perf_counter=iter((3.0, 5.5)).__next__))

        def test() -> str:
            if error:
                raise error
            return "fine"

        check = checks.Check("the wire", "exchange", "", test)
        made = checks.run(check)
        assert made.check is check and made.ok == (not made.why)
        return made[1:]

    assert result([]) == result(["", ""]) == ("", "fine", 2.5)
    assert result(["", "lost"]) == ("process 2: lost", "fine", 2.5)
    assert result(["lost", "lost"], MismatchError("off\nby one")) == ("off\nby one", "", 2.5)
    assert result([], ValueError("off\nby one")) == ("ValueError: off", "", 2.5)


BOUND_OF = {"float32": 3e-5, "bfloat16": 3e-2}


class Exact:
    """In place of what checks run on devices, of their references, and of `jax.vjp`: what is given to each is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]):
        self._expected, self.devices = expected, jax.devices()[5:7]
        for name, value in {
            "run_on_each": self.run_on_each,
            "compare": self.compare,
            "jax": types.SimpleNamespace(vjp=self.vjp),
            "numpy_reference": types.SimpleNamespace(experts=self.reference, attention=self.reference),
        }.items():
            monkeypatch.setattr(part_checks, name, value)

    def run_on_each(self, mesh: Any, dtype: str, on_rank: Any, *trees: Any) -> Any:
        assert mesh.devices.flatten().tolist() == self.devices
        self.dtype, self.trees = dtype, trees
        return on_rank(*trees)

    def vjp(self, function: Any, *arguments: Any) -> tuple[Any, Any]:
        def pull(dy: Any) -> Any:
            self.dy = dy
            return self.gradients

        self.arguments = arguments
        return function(*arguments), pull

    def reference(self, *given: Any, **named: Any) -> dict[str, Any]:
        self.given, self.named = given, named
        return self._expected

    def compare(self, actual: Any, expected: Any, bound: float) -> str:
        self.actual, self.expected, self.bound = actual, expected, bound
        return "fine"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropless", [True, False])
def test_what_experts_are_given(dropless: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and weights of one rank, the rows' experts as a router or a capacity exchange gives them."""
    S, C, K, e, R, F = 2, 32, 2, 8, 128, 256
    N = 192 if dropless else 512
    weights = {"w_in_eRF": (e, R, F), "w_out_eFR": (e, F, R), "b_in_eF": (e, F), "b_out_eR": (e, R)}
    shapes = {"x": (N, R), "dy": (N, R), "gate": (N, K if dropless else 1)} | weights
    names = {"y", "dx", "d_gate", *(f"d_{name}" for name in weights)}
    exact = Exact(monkeypatch, {name: f"expected {name}" for name in names})
    exact.gradients = "dx", "d_gate", {name: f"d_{name}" for name in weights}

    def mlp(config: Any, w: Any, rows: Any, gate: Any, expert: Any, share: int) -> np.ndarray:
        assert (config.model.use_bias, config.execution.dtype, config.mesh.expert) == (True, dtype, 2)
        exact.mlp = w, gate, expert
        assert share == (48 if dropless else 64) and rows.shape == ((N, R) if dropless else (S, e, C, R))
        return 2 * rows

    monkeypatch.setattr(part_checks, "grouped_mlp", mlp)
    assert part_checks.check_experts(exact.devices, dropless, dtype) == "fine"
    given, expert = exact.trees
    w = {name: given[name] for name in weights}
    assert {name: value.shape for name, value in given.items()} == shapes and expert.dtype == np.int32
    assert exact.dtype == dtype and {value.dtype.name for value in given.values()} == {dtype}
    # As large as what a layer's experts multiply: rows and biases about 1, and so are products.
    for name, scale in (("x", 1), ("dy", 1), ("b_in_eF", 1), ("b_out_eR", 1), ("w_in_eRF", 128**-0.5),
                        ("w_out_eFR", 256**-0.5)):  # fmt: skip
        assert np.std(given[name].astype(np.float64)) == pytest.approx(scale, rel=0.1), name
    assert (given["x"] != given["dy"]).any()
    # All processes draw the same.
    np.testing.assert_array_equal(given["x"], np.random.default_rng(0).standard_normal((N, R)).astype(given["x"].dtype))
    if dropless:  # two thirds of the first choices fall on expert 1; none is of 4 or 7, and e is no expert's here
        first, second = (np.bincount(column, minlength=e + 1) for column in expert.T)
        assert first.tolist() == [0, 128, 0, 64, 0, 0, 0, 0, 0] and expert[:4, 0].tolist() == [3, 1, 1, 3]
        assert set(np.flatnonzero(second)) == {0, 2, 5, 6, 8} and second[[0, 2, 5, 6, 8]].min() > 20
        assert len(np.unique(given["gate"])) > 50 and 0 <= given["gate"].min() < given["gate"].max() <= 1
    else:
        ordered = np.broadcast_to(np.arange(e)[None, :, None], (S, e, C))
        np.testing.assert_array_equal(expert, ordered.reshape(N, 1))
        assert (given["gate"] == 1).all()
    # Both sides are given the same.
    x, gate, w_of_vjp = exact.arguments
    assert (x is given["x"], gate is given["gate"], exact.dy is given["dy"], w_of_vjp) == (True, True, True, w)
    assert exact.mlp[0] is w_of_vjp and exact.mlp[1] is (gate if dropless else None)
    assert exact.mlp[2] is (expert if dropless else None) and exact.named == {}
    assert exact.given[0] == w and all(a is b for a, b in zip(
        exact.given[1:], (given["x"], given["gate"], expert, given["dy"]), strict=True
    ))  # fmt: skip
    left = names if dropless else names - {"d_gate"}
    np.testing.assert_array_equal(exact.actual.pop("y"), 2 * given["x"])
    assert exact.actual == {name: name for name in left - {"y"}} and exact.bound == BOUND_OF[dtype]
    assert exact.expected == {name: f"expected {name}" for name in left}


def test_what_attention_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, called = Exact(monkeypatch, {"expected": 1}), list[Any]()
    exact.gradients = "of q", "of k", "of v"

    def attention(*qkv: Any, implementation: str) -> str:
        called.append(qkv)
        return implementation

    monkeypatch.setattr(part_checks, "causal_attention", attention)
    for dtype in ("float32", "bfloat16"):
        assert part_checks.check_attention(exact.devices, "cudnn", dtype) == "fine"
        (given,) = exact.trees
        assert {name: value.shape for name, value in given.items()} == {
            "q": (1, 320, 4, 64), "dy": (1, 320, 4, 64), "k": (1, 320, 2, 64), "v": (1, 320, 2, 64),
        }  # fmt: skip
        assert exact.dtype == dtype and {value.dtype.name for value in given.values()} == {dtype}
        assert all(np.std(value.astype(np.float64)) == pytest.approx(1, rel=0.05) for value in given.values())
        assert all(a is b is c for a, b, c in zip(
            called.pop(), exact.arguments, (given["q"], given["k"], given["v"]), strict=True
        ))  # fmt: skip
        assert exact.dy is given["dy"] and not exact.given
        drawn = np.random.default_rng(1).standard_normal((1, 320, 4, 64))  # in all processes
        np.testing.assert_array_equal(given["q"], drawn.astype(given["q"].dtype))
        named = {"q_BLNH": given["q"], "k_BMGH": given["k"], "v_BMGH": given["v"], "dy_BLNH": given["dy"]}
        assert exact.named.keys() == named.keys() and all(exact.named[name] is named[name] for name in named)
        assert exact.actual == {"y": "cudnn", "dq": "of q", "dk": "of k", "dv": "of v"}
        assert (exact.expected, exact.bound) == ({"expected": 1}, BOUND_OF[dtype])


def test_what_decoding_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of 1 to 1104 tokens, in 69 pages of 16 each; here each row's query looks at its own, one by one."""
    lengths, pages = (1, 17, 129, 1104), 69
    exact = Exact(monkeypatch, {})

    def of_row(q_NH: Any, k_LGH: Any, v_LGH: Any) -> np.ndarray:
        y = np.zeros((4, 128))
        for n in range(4):
            weights = np.exp(k_LGH[:, n // 2].astype(np.float64) @ q_NH[n] / math.sqrt(128))
            y[n] = weights / weights.sum() @ v_LGH[:, n // 2]
        return y

    def reference(q: Any, k: Any, v: Any, dy: Any) -> dict[str, np.ndarray]:
        assert q.shape == dy.shape == (1, k.shape[1], 4, 128) and k.shape == v.shape == (1, k.shape[1], 2, 128)
        y = np.full(q.shape, np.nan)
        y[0, -1] = of_row(q[0, -1], k[0], v[0])
        return {"y": y}

    def attend(q_GWXH: Any, k_GnpH: Any, v_GnpH: Any, table_WK: Any, position_WC: Any) -> np.ndarray:
        assert q_GWXH.shape == (2, 4, 2, 128) and k_GnpH.shape == v_GnpH.shape == (2, 4 * pages, 16, 128)
        assert sorted(table_WK.flat) == list(range(4 * pages)) and list(table_WK.flat) != list(range(4 * pages))
        assert table_WK.shape == (4, pages) and position_WC.tolist() == [[length - 1] for length in lengths]
        y = np.zeros(q_GWXH.shape)
        for w, length in enumerate(lengths):
            k, v = (x[:, table_WK[w]].reshape(2, -1, 128).swapaxes(0, 1) for x in (k_GnpH, v_GnpH))
            begun = -(-length // 16) * 16
            for x in (k, v):  # zeros behind the last token of its page, and NaN in pages that have none
                assert np.isnan(x[begun:]).all() and (x[length:begun] == 0).all()
                assert np.std(x[:length]) == pytest.approx(1, rel=0.15)
            y[:, w] = of_row(q_GWXH[:, w].reshape(4, 128) * math.sqrt(128), k[:length], v[:length]).reshape(2, 2, 128)
        return y

    monkeypatch.setattr(part_checks, "numpy_reference", types.SimpleNamespace(attention=reference))
    monkeypatch.setattr(part_checks, "paged_attention", attend)
    assert part_checks.check_decoding(exact.devices, "float32") == "fine" and exact.bound == 3e-5
    (given, table, position) = exact.trees
    assert exact.dtype == "float32" and {value.dtype for value in given.values()} == {np.dtype("float32")}
    assert table.dtype == position.dtype == np.int32
    drawn = np.random.default_rng(1).standard_normal((4, 4, 128))
    np.testing.assert_array_equal(given["q"], drawn.astype(np.float32))
    assert exact.actual.keys() == exact.expected.keys() == {"y"} and exact.actual["y"].shape == (4, 4, 128)
    np.testing.assert_allclose(exact.actual["y"], exact.expected["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "devices", "sizes"), [("ragged", 2, (1, 2)), ("hierarchical", 4, (2, 2))])
def test_what_exchanges_are_given(
    name: str, devices: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {"drops": 0.0, "off": 0.0}

    def execute(mesh: Any, dtype: str, function: Any, given: Any, specs: Any, ragged: bool) -> Any:
        kept.update(mesh=mesh, dtype=dtype, function=function, given=given, specs=specs, ragged=ragged)
        layer, x, dy = given
        w = {"router_DE": layer.router_DE[...], "down_DR": layer.down.w_DF[...], "up_RD": layer.up.w_DF[...],
             "w_in_eRF": layer.experts.w_in_eRF[...], "w_out_eFR": layer.experts.w_out_eFR[...]}  # fmt: skip
        found = numpy_reference.moe(w, x.reshape(-1, 64), dy.reshape(-1, 64), 3)
        kept["w"] = w
        y, dx = (found[of].reshape(x.shape) for of in ("y", "dx"))
        kept["y"] = y = y.copy()
        return {"y": y, "dx": dx + kept["off"] * np.abs(dx).max(), "drops": np.float32(kept["drops"])}

    def compare(actual: Any, expected: Any, bound: float) -> str:
        assert actual["y"] is not expected["y"] and actual["y"].base is kept["y"]
        return on_devices.compare(actual, expected, bound)

    configs: list[Any] = []
    tiny = part_checks.tiny_config
    monkeypatch.setattr(part_checks, "execute", execute)
    monkeypatch.setattr(part_checks, "tiny_config", lambda *a, **k: configs.append(tiny(*a, **k)) or configs[-1])
    monkeypatch.setattr(part_checks, "compare", compare)
    chosen = jax.devices()[3 : 3 + devices]
    assert part_checks.check_exchange(chosen, name) == "within 0e+00"
    (config,) = configs
    assert (config.execution.exchange, config.execution.grouped_matmul) == (name, "blocks")
    mesh, (_, x, dy) = kept["mesh"], kept["given"]
    assert (mesh.shape["node"], mesh.shape["expert"]) == sizes and mesh.devices.flatten().tolist() == chosen
    assert (kept["dtype"], kept["ragged"]) == ("float32", name == "ragged")
    assert kept["specs"][1:] == (token_spec(3), token_spec(3))
    assert x.shape == dy.shape == (devices, 16, 64) and x.dtype == dy.dtype == np.float32
    lead = numpy_reference.margin(kept["w"]["router_DE"], x.reshape(-1, 64), 3)
    assert lead.min() > 0.1 and (np.diff(lead) <= 0).all()  # of twice as many tokens the half that is surest
    assert np.std(dy) == pytest.approx(1, rel=0.1) and (x != dy).all()
    for value in kept["w"].values():  # products are as large as their rows
        assert value.dtype == np.float32 and np.std(value) == pytest.approx(value.shape[-2] ** -0.5, rel=0.1)
    kept["off"] = 1e-4
    with pytest.raises(MismatchError, match=r"dx is off by 1"):
        part_checks.check_exchange(chosen, name)
    np.testing.assert_array_equal(kept["given"][1], x)  # all processes draw the same
    kept.update(off=0.0, drops=0.5)
    with pytest.raises(MismatchError, match=r"50.0% of the choices"):
        part_checks.check_exchange(chosen, name)

    def layer(x: Any, evaluating: bool) -> tuple[Any, Any]:
        assert evaluating
        return 2 * x, types.SimpleNamespace(drop_rate=np.array([0.25, 0.75]))

    def vjp(function: Any, x: Any, has_aux: bool) -> tuple[Any, Any, Any]:
        assert has_aux
        y, stats = function(x)
        return y, lambda dy: (5 * dy,), stats

    monkeypatch.setattr(part_checks, "jax", types.SimpleNamespace(vjp=vjp))
    monkeypatch.setattr(part_checks, "replicate", lambda arrays: arrays)
    assert kept["function"](layer, 3.0, 7.0) == {"y": 6.0, "dx": 35.0, "drops": 0.5}


def test_the_norm_on_all_devices_is_that_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def train(config: Any, devices: Any, steps: int = 3) -> tuple[list[float], float]:
        asked.append((config.mesh.expert, config.model.num_experts, config.data.batch_size, devices, steps))
        return [3.0, 3.5, 2.25], norms[len(devices)]

    monkeypatch.setattr(part_checks, "train", train)
    local = types.SimpleNamespace(local_devices=lambda backend: {"cpu": jax.devices()[5:]}[backend])
    monkeypatch.setattr(part_checks, "jax", local)
    for norm, good in ((2.0, True), (2.00019, True), (1.99981, True), (2.00021, False), (1.99979, False)):
        norms = {1: 2.0, 2: norm}
        asked.clear()
        if good:
            assert part_checks.check_training(two()) == "loss 3.000 → 2.250"
        else:
            with pytest.raises(MismatchError, match=r"and 2\.000000 on one of them"):
                part_checks.check_training(two())
        assert asked == [(2, 8, 2, two(), 3), (1, 8, 2, [jax.devices()[5]], 1)]
    monkeypatch.setattr(part_checks, "NORM_BOUND", 0.5)
    norms = {1: 2.0, 2: 3.0}
    part_checks.check_training(two())  # as far as the bound is near enough
    norms = {1: math.nan}
    assert part_checks.check_training(two()[:1]) == "loss 3.000 → 2.250"  # there is no other to compare with
    assert asked[4:] == [(1, 8, 1, two()[:1], 3)]


def test_three_steps_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of random tokens; losses of all steps, and the norm of the first."""
    config, steps, devices = on_devices.tiny_config(2), list[Any](), jax.devices()[3:5]

    class Trainer:
        def __init__(self, *given: Any) -> None:
            assert given[0] is config and given[1].devices.flatten().tolist() == devices
            self.step = types.SimpleNamespace(lower=lambda *given: given)

        def init(self, key: Any) -> int:
            np.testing.assert_array_equal(jax.random.key_data(key), [0, config.train.seed])
            return 100

        def rate(self, done: int) -> float:
            return done + 0.5

    def compile_program(mesh: Any, lowered: Any) -> Any:
        assert mesh.size == 2 and (lowered[0], lowered[2]) == (100, 0.5)
        assert jax.config.jax_default_matmul_precision == "highest"

        def step(state: int, batch: Any, rate: float) -> tuple[int, Any]:
            assert batch is lowered[1]
            steps.append((state, rate))
            return state + 1, types.SimpleNamespace(loss=np.float32(state), grad_norm=np.float32(10 * state))

        return step

    monkeypatch.setattr(part_checks, "make_trainer", Trainer)
    monkeypatch.setattr(part_checks, "compile_program", compile_program)
    placed: list[Any] = []
    monkeypatch.setattr(part_checks, "place", lambda batch, spec: placed.append((batch, spec)) or batch)
    assert part_checks.train(config, devices) == ([100.0, 101.0, 102.0], 1000.0)
    assert steps == [(100, 0.5), (101, 1.5), (102, 2.5)]
    assert part_checks.train(config, devices, steps=1) == ([100.0], 1000.0)
    batch, spec = placed[0]
    tokens = np.random.default_rng(3).integers(264, size=(2, 17), dtype=np.int32)
    np.testing.assert_array_equal(batch.inputs_BL, tokens[:, :-1])
    np.testing.assert_array_equal(batch.targets_BL, tokens[:, 1:])
    assert spec == batch_spec(2)


def test_the_tiny_model() -> None:
    """Experts on every device, and no fewer than top-k chooses among; the group is all devices, or so many of them."""
    for devices, count in ((1, 8), (2, 8), (3, 9), (4, 8), (5, 10), (8, 16)):
        config = on_devices.tiny_config(devices)
        assert (config.model.num_experts, config.mesh.expert, config.data.batch_size) == (count, devices, devices)
    config = on_devices.tiny_config(8, 2, use_bias=True, dtype="bfloat16", exchange="hierarchical")
    m, mesh, execution, optimizer = config.model, config.mesh, config.execution, config.optimizer
    assert (mesh.data, mesh.node, mesh.expert, on_devices.tiny_config(8, 1, 4).mesh.expert) == (1, 2, 4, 4)
    assert (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads, m.vocab_size) == (2, 64, 4, 2, 264)
    assert (m.top_k, m.expert_hidden_size, m.latent_norm, m.projection_init) == (3, 32, "none", "random")
    assert m.capacity_factor == math.inf and m.use_bias and not on_devices.tiny_config(2).model.use_bias
    assert (execution.unroll_layers, execution.dtype, execution.exchange) == (1, "bfloat16", "hierarchical")
    assert (config.data.tokenizer, config.data.sequence_length) == ("bytes", 16)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay_steps) == (1e-2, 0, 1000)


def test_how_checks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_devices.environment, "compiler_options", lambda device, ragged: {"ragged": ragged})

    def options(platform: str, *ragged: bool) -> Any:
        mesh = types.SimpleNamespace(devices=np.array([[types.SimpleNamespace(platform=platform)]]))
        lowered = types.SimpleNamespace(compile=lambda compiler_options: compiler_options)
        return on_devices.compile_program(mesh, lowered, *ragged)

    assert options("cpu") == {"xla_backend_optimization_level": 0, "ragged": False}
    assert options("gpu", True) == {"ragged": True}


def test_each_device_runs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    compile_program = on_devices.compile_program

    def compiled(mesh: Any, lowered: Any, ragged: bool) -> Any:
        seen.append(ragged)
        return compile_program(mesh, lowered, ragged)

    def on_rank(x: Any, tree: Any) -> dict[str, Any]:
        seen.append((x.shape, jax.config.jax_default_matmul_precision))
        return {"y": x + tree["two"], "sum": x.sum()}

    monkeypatch.setattr(on_devices, "compile_program", compiled)
    mesh = make_mesh(on_devices.tiny_config(2), devices=two())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for dtype, precision in (("float32", "highest"), ("bfloat16", None)):
        found = on_devices.run_on_each(mesh, dtype, on_rank, x, {"two": np.full((2, 3), 2, np.float32)})
        np.testing.assert_array_equal(found["y"], np.stack([x + 2] * 2))
        assert found["sum"].tolist() == [15, 15]
        assert isinstance(found["y"], np.ndarray) and seen == [((2, 3), precision), False]
        seen.clear()
    spec = rank_spec(2)
    on_devices.execute(mesh, "float32", lambda x: x, (x,), (spec,), True)
    assert seen == [True]


def gradients_by_differences(function: Any, arguments: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, np.ndarray]:
    """Of y · dy with respect to each argument, an entry at a time."""
    found = {}
    for name, value in arguments.items():
        gradient = np.zeros_like(value)
        for at in np.ndindex(value.shape):
            ends = []
            for by in (1e-6, -1e-6):
                moved = value.copy()
                moved[at] += by
                ends.append((function(**arguments | {name: moved}) * dy).sum())
            gradient[at] = (ends[0] - ends[1]) / 2e-6
        found[name] = gradient
    return found


def test_the_reference_of_attention() -> None:
    """One query, head and row at a time; gradients by differences."""
    draw = np.random.default_rng(5).standard_normal
    given = {"q": draw((2, 3, 4, 5)), "k": draw((2, 3, 2, 5)), "v": draw((2, 3, 2, 5))}
    dy = draw((2, 3, 4, 5))

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        y = np.zeros_like(q)
        for b, i, n in np.ndindex(2, 3, 4):
            scores = np.exp([q[b, i, n] @ k[b, j, n // 2] / math.sqrt(5) for j in range(i + 1)])
            y[b, i, n] = scores / scores.sum() @ v[b, : i + 1, n // 2]
        return y

    found = numpy_reference.attention(given["q"], given["k"], given["v"], dy)
    np.testing.assert_allclose(found["y"], attend(**given), rtol=1e-12)
    for name, gradient in gradients_by_differences(attend, given, dy).items():
        np.testing.assert_allclose(found[f"d{name}"], gradient, atol=1e-7)
    assert found.keys() == {"y", "dq", "dk", "dv"}
    half = numpy_reference.attention(*(v.astype(np.float16) for v in (*given.values(), dy)))
    assert {value.dtype for value in half.values()} == {np.dtype("float64")}


@pytest.mark.parametrize("biased", [True, False])
def test_the_reference_of_experts(biased: bool) -> None:
    """A row, a choice at a time: some are of no expert that is here, one row has an expert twice."""
    draw = np.random.default_rng(6).standard_normal
    w = {"w_in_eRF": draw((3, 4, 5)), "w_out_eFR": draw((3, 5, 4))}
    w |= {"b_in_eF": draw((3, 5)), "b_out_eR": draw((3, 4))} if biased else {}
    given = {"x": draw((6, 4)), "gate": draw((6, 2))} | w
    expert = np.array([[0, 1], [1, 1], [2, 3], [3, 3], [1, 0], [2, 0]])
    dy = draw((6, 4))

    def mlp(x: np.ndarray, gate: np.ndarray, **w: np.ndarray) -> np.ndarray:
        y = np.zeros_like(x)
        for t, k in np.argwhere(expert < 3):
            i = expert[t, k]
            h = np.maximum(x[t] @ w["w_in_eRF"][i] + (w["b_in_eF"][i] if biased else 0), 0) ** 2
            y[t] += gate[t, k] * (h @ w["w_out_eFR"][i] + (w["b_out_eR"][i] if biased else 0))
        return y

    found = numpy_reference.experts(w, given["x"], given["gate"], expert, dy)
    np.testing.assert_allclose(found["y"], mlp(**given), rtol=1e-12)
    names = {"x": "dx"} | {name: f"d_{name}" for name in ("gate", *w)}
    assert found.keys() == {"y", *names.values()}
    for name, gradient in gradients_by_differences(mlp, given, dy).items():
        np.testing.assert_allclose(found[names[name]], gradient, atol=1e-6)


def test_the_reference_of_the_layer() -> None:
    """A token at a time; the softmax is over the chosen experts alone. What the router leads by."""
    draw = np.random.default_rng(7).standard_normal
    w = {"router_DE": draw((6, 5)), "down_DR": draw((6, 3)), "up_RD": draw((3, 6)), "w_in_eRF": draw((5, 3, 4)),
         "w_out_eFR": draw((5, 4, 3))}  # fmt: skip
    x, dy = draw((4, 6)), draw((4, 6))

    def layer(x: np.ndarray) -> np.ndarray:
        y = np.zeros_like(x)
        for t, row in enumerate(x):
            logits = row @ w["router_DE"]
            chosen = sorted(range(5), key=lambda i: -logits[i])[:2]
            for i in chosen:
                gate = np.exp(logits[i]) / sum(np.exp(logits[j]) for j in chosen)
                h = np.maximum(row @ w["down_DR"] @ w["w_in_eRF"][i], 0) ** 2
                y[t] += gate * (h @ w["w_out_eFR"][i] @ w["up_RD"])
        return y

    found = numpy_reference.moe(w, x, dy, 2)
    np.testing.assert_allclose(found["y"], layer(x), rtol=1e-10)
    (dx,) = gradients_by_differences(layer, {"x": x}, dy).values()
    np.testing.assert_allclose(found["dx"], dx, atol=1e-5)
    assert found.keys() == {"y", "dx"}
    leads = numpy_reference.margin(np.diag([1.0, 2, 3, 4]), np.array([[1.0, 1, 1, 1], [8, 1, 1, 1]]), 2)
    assert leads.tolist() == [3 - 2, 4 - 3]
    assert numpy_reference.margin(np.diag([1.0, 2, 3, 4]), np.array([[9.0, 1, 1, 1]]), 1).tolist() == [9 - 4]
    large = numpy_reference._softmax(np.array([[1000.0, 1000.0 + math.log(3)], [0.0, 0.0]]))
    np.testing.assert_allclose(large, [[0.25, 0.75], [0.5, 0.5]])


def test_an_older_cuda_takes_an_older_driver(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  525.1\n")
    for plugins, expected in (((12,), "525.1, CUDA 12"), ((), "not said here")):
        names = {f"jax_cuda{cuda}_plugin" for cuda in plugins}
        monkeypatch.setattr(host.importlib.util, "find_spec", lambda name, names=names: name in names or None)
        assert host.check_driver(file) == expected
    assert host.check_driver(tmp_path / "none") == "not said here"
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  524.9\n")
    with pytest.raises(MismatchError, match=r"the driver is 524\.9, and CUDA 12 needs 525 or newer"):
        host.check_driver(file)
    # With both, what is newer is what jax takes.
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(MismatchError, match="CUDA 13 needs 580 or newer"):
        host.check_driver(file)


def test_a_hundredth_of_the_memory_may_be_missing() -> None:
    small = dataclasses.replace(load_hardware("h100"), memory_bytes=100 * 2**30)
    assert host.check_memory(99 * 2**30, small) == "99.0 GiB"
    with pytest.raises(MismatchError, match=r"98\.9 GiB of a GPU, and .* reckons with 100\.0;"):
        host.check_memory(99 * 2**30 - 2**26, small)
    silent = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert [check[1:3] for check in host.host_checks([silent], small)] == [("host", "")] * 2
    assert host.host_checks([silent], small)[1].run() == "not said here"


@pytest.mark.parametrize(
    ("cpu", "devices", "sizes"),
    [
        (True, 2, (2, 128, 2, 32, 128, 4)),
        (False, 8, (4, 1024, 8, 32, 2048, 32)),
        (False, 12, (4, 1024, 8, 36, 2048, 48)),
    ],
)
def test_the_model_whose_steps_are_timed(cpu: bool, devices: int, sizes: tuple[int, ...]) -> None:
    config = rates.training_config(devices, cpu)
    m, data = config.model, config.data
    found = m.num_layers, m.hidden_size, m.num_heads, m.num_experts, data.sequence_length, data.batch_size
    assert found == sizes and (m.vocab_size, data.tokenizer) == (8192, "bytes")
    assert config.execution.dtype == ("float32" if cpu else "bfloat16")
    assert (config.mesh.data, config.mesh.expert) == (1, devices)
    assert rates.training_config(40, cpu).model.num_experts == 40
