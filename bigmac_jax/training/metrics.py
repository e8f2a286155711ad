"""What a run reports: metrics.jsonl, dashboards, a progress line; FLOPs and the rate that MFU is measured against."""

import contextlib
import logging
import math
import os
import pathlib
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bigmac_jax.config import Config, ConfigError, strict_json
from bigmac_jax.model.choose_exchange import predict_seconds
from bigmac_jax.model.counts import flops
from bigmac_jax.model.mesh import current_group, ranks
from bigmac_jax.model.moe import Aux
from bigmac_jax.model.traffic import exchange_traffic, tokens_at_a_time
from bigmac_jax.runtime import signals
from bigmac_jax.runtime.clock import STEPPING, clock
from bigmac_jax.runtime.progress import Waiting
from bigmac_jax.training.dashboards import open_dashboards
from bigmac_jax.training.metrics_file import NAME, drop_records
from bigmac_jax.training.step import StepMetrics

_log = logging.getLogger(__name__)
_MOST = 16 << 20  # bytes of records that wait for a disk


class MetricsWriter:
    """Writes records to metrics.jsonl and the dashboards, and shows progress.

    Records of steps after `first_step`, which a killed run left, are dropped.

    Args:
      folder: where it writes.
      wandb: train.wandb.
      workdir: where `folder` is copied to, if it is not that itself.

    Raises:
      ConfigError: metrics.jsonl cannot be read or written.
    """

    def __init__(
        self, folder: pathlib.Path, first_step: int, steps: int, wandb: str = "", workdir: pathlib.Path | None = None
    ):
        try:
            drop_records(folder, first_step)
            self._file = (folder / NAME).open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{folder / NAME} cannot be written ({error.strerror}); free space, or move it away"
            ) from None
        self._waiting, self._told = b"", False  # what the file does not take, and whether that was said
        self._boards = open_dashboards(folder, first_step, wandb, workdir or folder)
        self._steps = steps
        self._bar = tqdm.tqdm(
            total=steps, initial=first_step, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None
        )  # None: shown on a terminal only

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record, which holds "step": a JSON object a line, flushed; it also goes to the dashboards."""
        self._flush()
        if len(self._waiting) < _MOST:
            self._waiting += f"{strict_json(record)}\n".encode()
            self._flush()
        for board in self._boards:
            board.write(record)

    def _flush(self) -> None:
        try:
            while self._waiting:  # the last bytes of a full disk take a part of a line
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                _log.warning("%s cannot be written (%s); up to %d MiB of records wait until it can, or the run ends",
                             self._file.name, error.strerror, _MOST >> 20)  # fmt: skip
            self._told = True

    def progress(self, step: int, line: str | None = None) -> None:
        """Shows how far the run is; `line` describes a step that is logged."""
        with signals.tolerate_lost_output(sys.stderr):
            self._bar.update(step - self._bar.n)
            if line is not None and self._bar.disable:
                print(f"step {step} of {self._steps}: {line}", file=sys.stderr, flush=True)
            elif line is not None:
                self._bar.set_postfix_str(line)

    def print(self, line: str) -> None:
        with signals.tolerate_lost_output(sys.stdout):
            self._bar.write(line)
            sys.stdout.flush()

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """A context that shows what the run waits for."""
        return Waiting(what, bar=self._bar)

    def close(self) -> None:
        self._bar.close()
        self._flush()
        with contextlib.suppress(OSError):
            self._file.close()
        for board in self._boards:
            board.close()


class SilentWriter:
    """The writer of a process that is not the first."""

    def write(self, record: dict[str, Any]) -> None: ...
    def progress(self, step: int, line: str | None = None) -> None: ...
    def print(self, line: str) -> None: ...
    def close(self) -> None: ...
    def waiting(self, what: str) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()


class StepTimer:
    """Seconds per step since the last reading, by the clock: evaluation, saves and compilation are other phases."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins to measure."""
        self._start, self.steps = self._seconds(), 0

    def read(self) -> float:
        """Returns the seconds per step, of which `steps` were counted, and starts anew."""
        seconds = (self._seconds() - self._start) / max(1, self.steps)
        self.restart()
        return seconds

    def _seconds(self) -> float:
        phases = clock.seconds()
        return sum(phases.get(phase, 0.0) for phase in ("first step", *STEPPING))


class RunConstants:
    """The constants of a run that turn a step's time into rates."""

    def __init__(self, config: Config):
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.flops_per_step = sum(flops(config).values())
        self.causal_flops_per_step = sum(flops(config, causal=True).values())
        # While a token's choices are fewer than model.top_k (train.choices_from), so are the experts' FLOPs.
        self.choices = config.model.choices
        self.flops_per_choice = flops(config).get("experts", 0.0) / max(1, self.choices)
        # Simulated CPU devices share the cores that one of them can use alone; a mesh may leave others idle.
        used = jax.process_count() if jax.default_backend() == "cpu" else ranks()
        self.peak_flops = dense_matmul_rate(config.execution.dtype) * used
        self.wire_bytes = round(sum(exchange_traffic(config, ranks(), current_group()).padded))


def step_record(step: int, metrics: StepMetrics, seconds: float, run: RunConstants) -> dict[str, Any]:
    """The line of metrics.jsonl for a training step, on the host."""
    metrics = jax.device_get(metrics)
    loss, aux, pairs, gaps, next_K = metrics.parts
    spared = 0.0 if metrics.choices is None else run.flops_per_choice * (run.choices - int(metrics.choices))
    record = {"step": step, "tokens": step * run.tokens_per_step, "loss": float(loss)}
    if pairs is None:
        record["perplexity"] = math.exp(min(float(loss), 700))
    else:
        record |= {f"dpo/{name}": float(value) for name, value in pairs._asdict().items()}
    record |= {
        "learning_rate": float(metrics.learning_rate),
        "grad_norm": float(metrics.grad_norm),
        "step_time_s": seconds,
        "tokens_per_s": run.tokens_per_step / seconds,
        "mfu": (run.flops_per_step - spared) / seconds / run.peak_flops,
        "mfu_causal": (run.causal_flops_per_step - spared) / seconds / run.peak_flops,
    }
    if metrics.choices is not None:
        record["moe/choices"] = int(metrics.choices)
    if gaps is not None:
        record["teacher/divergence"] = float(gaps.divergence)
        if gaps.hidden_Y is not None:
            record["teacher/hidden"] = float(np.mean(gaps.hidden_Y))
    if next_K is not None:
        record["mtp/loss"] = float(np.mean(next_K))
        numbered = enumerate(next_K if len(next_K) > 1 else (), 1)
        record |= {f"mtp/loss_{number}": float(of_module) for number, of_module in numbered}
    return record | memory_record() | (moe_record(aux, run) if aux.load.shape[-1] else {})


def memory_record() -> dict[str, int]:
    """Memory in bytes: the fullest of this process's devices at its peak, and the process now; where it is told."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    record = {"memory/device_peak_bytes": max(known)} if known else {}
    pages = pathlib.Path("/proc/self/statm")
    if pages.exists():
        record["memory/host_bytes"] = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return record


def moe_record(aux: Aux, run: RunConstants) -> dict[str, Any]:
    """The router's metrics: means over layers, and drops and loads by layer."""
    load_YE = np.asarray(aux.load)
    relative_YE = load_YE * load_YE.shape[1]
    return {
        "moe/balance_loss": float(np.mean(aux.balance_loss)),
        "moe/z_loss": float(np.mean(aux.z_loss)),
        "moe/drop_rate": float(np.mean(aux.drop_rate)),
        "moe/drop_rate_by_layer": [round(float(rate), 6) for rate in aux.drop_rate],
        **({"moe/moved_rate": float(np.mean(aux.moved_rate))} if np.size(aux.moved_rate) else {}),
        "moe/load_cv": float(np.mean(relative_YE.std(1))),  # standard deviation over mean; 0 is balanced
        "moe/max_load": float(np.mean(relative_YE.max(1))),  # busiest expert over the mean
        "moe/router_entropy": float(np.mean(aux.router_entropy)),
        "moe/wire_bytes": run.wire_bytes,
        "moe/load": [[round(float(x), 4) for x in row] for row in relative_YE],
    }


def dense_matmul_rate(dtype: str) -> float:
    """Measures the FLOPs a second that a device reaches on a square matmul, which MFU is relative to."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    device = jax.local_devices()[0]
    seconds = []
    with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):  # the run's mesh does not take arrays of one device
        x = jax.device_put(np.ones((n, n), np.float32), device).astype(dtype)
        multiply = jax.jit(jnp.dot)
        for _ in range(3):  # of which the first compiles
            start = time.perf_counter()
            multiply(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def describe_auto(config: Config) -> str:
    """Describes which exchange `auto` took, and why, in a line; "" where there is nothing to choose."""
    if not config.model.is_moe or config.execution.exchange != "auto" or config.mesh.expert_ranks == 1:
        return ""
    seconds = predict_seconds(config, config.model.capacity_factor, tokens_at_a_time(config, ranks()))
    ordered = sorted(seconds, key=seconds.__getitem__)
    return f"exchange=auto took {ordered[0]}; predicted microseconds of a layer's exchanges, forward: " + ", ".join(
        f"{name} {1e6 * seconds[name]:.3g}" for name in ordered
    )
