"""Starts train.py as its own process, and watches and kills it."""

import pathlib
import signal
import time
from collections.abc import Callable, Sequence

import forks

from benchmarks.ports import free_port

from .tools import read_records

LIMIT = 120.0  # seconds; a start takes five


class Process:
    """train.py on two simulated devices. Output goes to files, so that it never blocks."""

    def __init__(self, config: pathlib.Path, workdir: pathlib.Path, *arguments: str):
        self.workdir, self._log = workdir, workdir.with_suffix(".log")
        command = ["train.py", f"--config={config}", f"--workdir={workdir}", "--cpu_devices=2",
                   "--config.mesh.expert=2", f"--config.cache_dir={config.parent / 'cache'}"]  # fmt: skip
        self._process = forks.start([*command, *arguments], self._log)

    def wait(self) -> int:
        return self._process.wait(LIMIT)

    def kill_when(self, due: Callable[[pathlib.Path], bool], delay: float, number: int = signal.SIGKILL) -> None:
        """Sends the signal `delay` seconds after `due(workdir)` holds, while the process is alive."""
        end = time.monotonic() + LIMIT
        while not due(self.workdir):
            assert self._process.poll() is None, f"ended before it was to be killed:\n{self.output}"
            assert time.monotonic() < end, f"nothing happened:\n{self.output}"
            time.sleep(0.001)
        time.sleep(delay)
        assert self._process.poll() is None, f"ended before it was killed:\n{self.output}"
        self._process.send_signal(number)

    @property
    def output(self) -> str:
        return self._log.read_text()


def last_step(workdir: pathlib.Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    try:
        return max((record["step"] for record in read_records(workdir)), default=0)
    except (OSError, ValueError):
        return 0


def checkpoint_steps(workdir: pathlib.Path) -> set[int]:
    """Of checkpoints that are complete."""
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()} if folder.exists() else set()


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written just now."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


class Job:
    """train.py, or `script`, as several processes on this machine; inside a `with` that leaves none behind."""

    def __init__(
        self,
        count: int,
        config: pathlib.Path | None,
        workdir: pathlib.Path,
        *arguments: str,
        script: Sequence[str] = ("train.py",),
        environments: Sequence[dict[str, str]] = (),  # of a cluster, instead of arguments
        own: Sequence[Sequence[str]] = (),  # arguments of each process
    ):
        self.workdir, self._logs = workdir, [workdir.with_suffix(f".{i}.log") for i in range(count)]
        coordinator = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i, path in enumerate(self._logs):
            command = [*script, f"--workdir={workdir}", *arguments, *(own[i] if own else ())]
            command += [f"--config={config}", f"--config.cache_dir={config.parent / 'cache'}"] if config else []
            if environments:
                command.append("--distributed")
            else:
                command += [f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={i}"]
            environment = environments[i] if environments else {}
            self.processes.append(forks.start(command, path, environment=environment))

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, step: int) -> None:
        """Waits for the record of a step."""
        end = time.monotonic() + LIMIT
        while last_step(self.workdir) < step:
            assert all(process.poll() is None for process in self.processes), self.outputs
            assert time.monotonic() < end, self.outputs
            time.sleep(0.01)

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Exit codes of the processes, of which each must end in `limit` seconds."""
        end = time.monotonic() + limit
        return [process.wait(max(0.01, end - time.monotonic())) for process in self.processes]

    @property
    def outputs(self) -> list[str]:
        return [log.read_text() for log in self._logs]
