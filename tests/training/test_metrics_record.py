"""The line of metrics.jsonl for a step, by hand."""

import math
import mmap
import pathlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import on_mesh, tiny

from bigmac_jax.model.counts import flops
from bigmac_jax.model.moe import Aux, empty_stats
from bigmac_jax.training import metrics
from bigmac_jax.training.distillation import Gaps
from bigmac_jax.training.dpo import PairMetrics
from bigmac_jax.training.loss import LossParts
from bigmac_jax.training.metrics import RunConstants, StepTimer, moe_record, step_record
from bigmac_jax.training.step import StepMetrics


def test_rates_of_a_step() -> None:
    """4,096 tokens and 6e12 FLOPs in two seconds, of a machine that does 1e13 a second."""
    run: Any = SimpleNamespace(
        tokens_per_step=4096, flops_per_step=6e12, causal_flops_per_step=4e12, peak_flops=1e13, wire_bytes=0
    )
    parts = LossParts(jnp.float32(2.0), Aux(jnp.zeros(()), *empty_stats()))
    step = StepMetrics(jnp.float32(2.0), parts, jnp.float32(0.5), jnp.float32(1e-3), jnp.asarray(False))
    record = step_record(3, step, 2.0, run)
    assert (record["step"], record["tokens"], record["step_time_s"]) == (3, 3 * 4096, 2.0)
    assert record["tokens_per_s"] == 2048
    assert (record["mfu"], record["mfu_causal"]) == pytest.approx((0.3, 0.2))
    assert record["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert (record["grad_norm"], record["learning_rate"]) == pytest.approx((0.5, 1e-3))
    mean = Aux(jnp.ones(2), *(jnp.full((2, *v.shape[1:]), 0.5) for v in empty_stats()))
    moving = mean._replace(load=jnp.full((2, 4), 0.25), moved_rate=jnp.asarray([[0.25], [0.125]]))
    without = mean._replace(load=moving.load)
    assert moe_record(moving, run)["moe/moved_rate"] == 0.1875 and "moe/moved_rate" not in moe_record(without, run)
    assert not any(name.startswith(("moe/", "dpo/", "teacher/")) for name in record)


def test_fewer_choices_are_fewer_flops() -> None:
    """Two of four choices, of 1e12 FLOPs each: the other two are not done, and don't count."""
    run: Any = SimpleNamespace(
        tokens_per_step=4096, flops_per_step=6e12, causal_flops_per_step=4e12, peak_flops=1e13, wire_bytes=0,
        choices=4, flops_per_choice=1e12,
    )  # fmt: skip
    parts = LossParts(jnp.float32(2.0), Aux(jnp.zeros(()), *empty_stats()))
    values = jnp.float32(2.0), parts, jnp.float32(0.5), jnp.float32(1e-3), jnp.asarray(False)
    record = step_record(3, StepMetrics(*values, choices=jnp.int32(2)), 2.0, run)
    assert record["moe/choices"] == 2 and (record["mfu"], record["mfu_causal"]) == pytest.approx((0.2, 0.1))
    assert "moe/choices" not in step_record(3, StepMetrics(*values), 2.0, run)


def record_of(**parts: Any) -> dict[str, Any]:
    run: Any = SimpleNamespace(
        tokens_per_step=10, flops_per_step=1.0, causal_flops_per_step=0.5, peak_flops=1.0, wire_bytes=0
    )
    values = {"cross_entropy": jnp.float32(2.0), "aux": Aux(jnp.zeros(()), *empty_stats())} | parts
    scalars = jnp.float32(2.0), LossParts(*values.values()), jnp.float32(0.5), jnp.float32(1e-3), jnp.asarray(False)
    return step_record(3, StepMetrics(*scalars), 2.0, run)


def test_what_a_step_has_learned_from() -> None:
    """Pairs in the place of a perplexity; the teacher's layers in a mean; modules' losses where there are several."""
    assert list(LossParts._fields) == ["cross_entropy", "aux", "pairs", "gaps", "next_K"]
    pairs, gaps = PairMetrics(jnp.float32(0.75), jnp.float32(0.5)), Gaps(jnp.float32(0.125), jnp.asarray([0.5, 0.25]))
    record = record_of(pairs=pairs, gaps=gaps, next_K=jnp.asarray([2.0, 4.0]))
    assert "teacher/hidden" not in record_of(pairs=None, gaps=gaps._replace(hidden_Y=None), next_K=None)
    assert (record["dpo/accuracy"], record["dpo/margin"]) == (0.75, 0.5) and "perplexity" not in record
    assert (record["teacher/divergence"], record["teacher/hidden"]) == (0.125, 0.375)
    assert [record[f"mtp/loss{end}"] for end in ("", "_1", "_2")] == [3.0, 2.0, 4.0] and "mtp/loss_3" not in record
    assert (record["mfu"], record["mfu_causal"]) == (0.5, 0.25)
    one = record_of(pairs=None, gaps=None, next_K=jnp.asarray([2.0]))
    assert one["mtp/loss"] == 2.0 and "mtp/loss_1" not in one and "mtp/loss_0" not in one
    assert record_of(cross_entropy=jnp.float32(1e4))["perplexity"] == math.exp(700)


def test_the_routers_metrics_by_hand() -> None:
    """Loads of half, a quarter and two eighths are 2, 1, 1/2 and 1/2 of the mean; of the other layer all are even."""
    load_YE = np.asarray([[0.5, 0.25, 0.125, 0.125], [0.25] * 4])
    none = np.zeros((2, 0))
    aux = Aux(np.asarray([1.0, 3.0]), np.asarray([0.5, 1.5]), none, load_YE, np.asarray([0.1234567, 0.25]), none,
              np.asarray([0.5, 1.0]), none)  # fmt: skip
    run: Any = SimpleNamespace(wire_bytes=77)
    assert moe_record(aux, run) == {
        "moe/balance_loss": 2.0, "moe/z_loss": 1.0, "moe/drop_rate": pytest.approx(0.18672835),
        "moe/drop_rate_by_layer": [0.123457, 0.25], "moe/load_cv": pytest.approx(math.sqrt(0.375) / 2),
        "moe/max_load": 1.5, "moe/router_entropy": 0.75, "moe/wire_bytes": 77,
        "moe/load": [[2.0, 1.0, 0.5, 0.5], [1.0] * 4],
    }  # fmt: skip
    assert record_of(aux=aux).items() >= (moe_record(aux, run) | {"moe/wire_bytes": 0}).items()
    thirds = aux._replace(load=np.asarray([[1 / 3 + 0.0115, 1 / 3, 1 / 3]] * 2))
    assert moe_record(thirds, run)["moe/load"][0] == [1.0345, 1.0, 1.0]


def test_the_constants_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "dense_matmul_rate", {"float32": 5.0, "bfloat16": 7.0}.__getitem__)
    for structure, choices in (("bigmac", 3), ("dense", None)):
        config = tiny((1, 1, 2), length=16, structure=structure, dtype="float32")
        with on_mesh(config):
            run, done = RunConstants(config), flops(config)
        assert run.tokens_per_step == 8 * 16 and run.peak_flops == 5.0  # two simulated devices share the cores of one
        assert run.flops_per_step == sum(done.values()) > run.causal_flops_per_step == sum(flops(config, True).values())
        if choices:
            assert run.choices == choices and run.flops_per_choice == done["experts"] / choices
            # 64 tokens on each of two ranks choose three of eight experts; rows of 4 numbers of 4 bytes, and back.
            assert run.wire_bytes > 0
        else:
            assert run.flops_per_choice == run.wire_bytes == 0


def test_seconds_of_a_step_are_those_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = dict[str, float]()
    monkeypatch.setattr(metrics.clock, "seconds", lambda: phases)
    timer = StepTimer()
    phases |= {"steps": 3.0}
    timer.steps = 2
    assert timer.read() == 1.5
    phases |= {"first step": 1.0, "steps": 2.0, "data wait": 0.5, "evaluate": 9.0}
    timer.restart()
    timer.steps += 4
    phases |= {"steps": 9.0, "first step": 1.5, "data wait": 1.0, "save": 50.0}
    assert timer.read() == 2.0 and timer.steps == 0
    phases["steps"] += 3.0
    assert timer.read() == 3.0  # of no step that was counted


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}, {"peak_bytes_in_use": 7}, None, {}]
    devices = [SimpleNamespace(memory_stats=lambda told=told: told) for told in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    statm = SimpleNamespace(exists=lambda: True, read_text=lambda: "1000 70 30 5 0 6 0")
    monkeypatch.setattr(metrics, "pathlib", SimpleNamespace(Path={"/proc/self/statm": statm}.__getitem__))
    assert metrics.memory_record() == {"memory/device_peak_bytes": 9, "memory/host_bytes": 70 * mmap.PAGESIZE}
    statm.exists, devices[:3] = (lambda: False), []
    assert metrics.memory_record() == {}


def test_a_peak_is_that_of_the_devices_in_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPUs, that of the processes."""
    monkeypatch.setattr(metrics, "dense_matmul_rate", lambda dtype: 5.0)
    config = tiny((1, 1, 2))
    with on_mesh(config):
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        assert RunConstants(config).peak_flops == 15.0
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert RunConstants(config).peak_flops == 10.0 and jax.device_count() > 2


@pytest.mark.parametrize(("backend", "n"), [("cpu", 2048), ("gpu", 8192)])
def test_the_rate_that_mfu_is_relative_to(backend: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fastest of three, here the last."""
    ones, shapes, dtypes = np.ones, list[Any](), list[Any]()
    seconds = iter([0.0, 10.0, 10.0, 12.0, 12.0, 12.5])
    monkeypatch.setattr(np, "ones", lambda shape, dtype: (shapes.append(shape), ones((2, 2), dtype))[1])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "jit", lambda _: lambda x, y: (dtypes.append(str(x.dtype)), x)[1])
    assert metrics.dense_matmul_rate("bfloat16") == 2 * n**3 / 0.5
    assert shapes == [(n, n)] and dtypes == ["bfloat16"] * 3


def test_progress_is_shown_on_a_terminal_or_a_line_a_record(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    writer: Any = metrics.MetricsWriter(tmp_path, 2, 9)
    assert (writer._bar.total, writer._bar.n, writer._bar.disable) == (9, 2, True)
    writer.progress(4)
    assert not capsys.readouterr().err
    writer.progress(5, "loss 1")
    writer.print("done")
    assert capsys.readouterr() == ("done\n", "step 5 of 9: loss 1\n")
    writer._bar = mock.MagicMock(n=3, disable=False)
    writer.progress(5)
    assert writer._bar.mock_calls == [mock.call.update(2)]
    writer.progress(7, "loss 2")
    assert writer._bar.mock_calls[1:] == [mock.call.update(4), mock.call.set_postfix_str("loss 2")]
    assert not capsys.readouterr().err
    writer.write({"step": 7, "loss": math.nan})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 7, "loss": null}\n'
