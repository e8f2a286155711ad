"""The self-check: green on a machine that computes right, red in the right place on one that doesn't."""

import contextlib
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
from bigmac_jax.model.mesh import ranks
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.selfcheck import checks, host, on_devices, part_checks, rates
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


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0], [3.0, math.nan, 2.0]])
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
    """On CPU the product is one device's already: simulated devices share its cores."""
    monkeypatch.setattr(rates, "dense_matmul_rate", {"float32": 96.0, "bfloat16": 192.0}.__getitem__)
    monkeypatch.setattr(rates, "training_rate", lambda config, devices: 60.0 * config.mesh.expert * len(devices))
    monkeypatch.setattr(rates, "exchange_rate", lambda devices, sent: len(devices) * sent)
    monkeypatch.setattr(rates, "memory_rate", lambda cpu: 5.0 + cpu)
    for platform, expected in (
        ("cpu", {"matmul float32": 96, "memory": 6, "all-to-all": 3 * 2**22, "training step": 180}),
        ("gpu", {"matmul bfloat16": 64, "memory": 5, "all-to-all": 3 * 2**26, "training step": 180}),
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
