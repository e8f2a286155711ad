"""Processes that tokenise: python -m bigmac_jax.data.workers, started by `fill`, which tells them what on their stdin.

They are programs of their own, so that they need nothing of the process that starts them: no jax, no main module, no
threads that a fork would break. They end when it does.
"""

import contextlib
import json
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.token_shards import Store
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.progress import Progress

_ALONE = 1 << 25  # bytes of source that other processes are not started for
_ROOT = pathlib.Path(__file__).parents[2]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def fill(store: Store, processes: int = 0) -> None:
    """Makes all units of a store that are not there, together with whoever else does so.

    Args:
      processes: at most; 0: as many as there are cores.

    Raises:
      ConfigError: what is wrong with the source, or how a process ended.
    """
    units = list(range(len(store.docs.units)))
    with clock.timed("tokenise"):
        done = {unit: store.size_of(unit) for unit in units if store.finished(unit) is not None}
        left = [unit for unit in units if unit not in done]
        title, start = f"tokenising {store.split}", sum(done.values())
        with Progress(title, store.docs.size, "byte", initial=start, scaled=True, delay=2) as progress:

            def report(unit: int, count: int) -> None:
                progress.update(count - done.get(unit, 0))
                done[unit] = count

            several = sum(map(store.size_of, left)) >= _ALONE and not store.docs.alone
            count = min(processes or cores(), len(left)) if several else 1
            if count > 1:
                _together(store, left, count, report)
            else:
                store.work(left, report)


def _together(store: Store, units: list[int], count: int, report: Any) -> None:
    paths = [str(_ROOT), *sys.path, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "RAYON_NUM_THREADS": str(max(1, cores() // count)),
    }
    _ = store.docs.units, getattr(store.docs, "held", None)  # found once, not by each of them
    task = pickle.dumps((store, units))
    lines: queue.Queue[tuple[int, str]] = queue.Queue()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "bigmac_jax.data.workers"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )
        for _ in range(count)
    ]  # fmt: skip

    def listen(number: int) -> None:
        stdout = workers[number].stdout
        assert stdout
        for line in stdout:
            lines.put((number, line.decode()))
        lines.put((number, ""))

    try:
        for number, worker in enumerate(workers):
            assert worker.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended; how, is said below
                worker.stdin.write(task)
                worker.stdin.flush()
            threading.Thread(target=listen, args=(number,), daemon=True).start()
        running = count
        while running:
            number, line = lines.get()
            if line:
                said = json.loads(line)
                if error := said.get("error"):
                    raise ConfigError(error)
                report(said["unit"], said["bytes"])
                continue
            running -= 1
            if code := workers[number].wait():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                fix = "memory may not suffice" if code == -signal.SIGKILL else "see above"
                raise ConfigError(f"a process that tokenises the {store.split} split {how}; {fix}; run it again")
    finally:
        for worker in workers:
            assert worker.stdin
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()  # which ends it
            worker.wait()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; who started this one decides
    store, units = pickle.load(sys.stdin.buffer)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def report(unit: int, count: int) -> None:
        print(json.dumps({"unit": unit, "bytes": count}, allow_nan=False), flush=True)

    try:
        store.work(units, report)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}, allow_nan=False), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the thread reads stdin, which the interpreter would wait for


if __name__ == "__main__":
    main()
