"""Processes that tokenise: python -m bigmac_jax.data.workers, started by `make_shards`, which sends each its task.

They are programs of their own, so that they need nothing of the process that starts them: no jax, no main module, no
threads that a fork would break. They end when it does.
"""

import contextlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.token_shards import ShardStore
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.progress import Progress

_ALONE = 1 << 25  # bytes of source for which no other processes are started
_ROOT = pathlib.Path(__file__).parents[2]


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def make_shards(store: ShardStore, processes: int) -> None:
    """Makes all units of a store that are missing, together with other hosts that do the same, by at most `processes`
    processes here (0 = one per core). Raises ConfigError for what is wrong with the source, or how a process ended."""
    from bigmac_jax.runtime import hosts  # and jax, which the processes that it starts do without

    with clock.timed("tokenise"):
        sizes = {unit: store.size_of(unit) for unit in range(len(store.docs.units))}
        done = {unit: size for unit, size in sizes.items() if store.finished(unit) is not None}
        left = [unit for unit in sizes if unit not in done]
        title, start = f"tokenising {store.split}", sum(done.values())
        silent = not hosts.is_first()
        with Progress(title, store.docs.size, "byte", start, scaled=True, delay=2, silent=silent) as progress:

            def report(unit: int, count: int) -> None:
                progress.update(count - done.get(unit, 0))
                done[unit] = count

            several = sum(sizes[unit] for unit in left) >= _ALONE and not store.docs.alone
            count = min(processes or count_cores(), len(left)) if several else 1
            if count > 1:
                _share_work(store, left, count, report)
            else:
                store.work(left, report)


def _share_work(store: ShardStore, units: list[int], count: int, report: Callable[[int, int], None]) -> None:
    paths = [str(_ROOT), *sys.path, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "RAYON_NUM_THREADS": str(max(1, count_cores() // count)),
    }
    _ = store.docs.units, getattr(store.docs, "held", None)  # found once, not by each of them
    task = pickle.dumps((store, units))
    reading, writing = os.pipe()  # of all of them; it ends when the last of them does
    command = [sys.executable, "-m", "bigmac_jax.data.workers"]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writing, env=environment) for _ in range(count)]
    os.close(writing)
    try:
        for worker in workers:
            assert worker.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended; how, is said below
                worker.stdin.write(task)
                worker.stdin.flush()
        with open(reading) as lines:
            for line in lines:
                said = json.loads(line)
                if error := said.get("error"):
                    raise ConfigError(error)
                report(said["unit"], said["bytes"])
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            assert worker.stdin
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()  # which ends it
            worker.wait()
    for code in filter(None, codes):
        if all(store.finished(unit) is not None for unit in units):
            return  # the others have done its work
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        fix = "memory may not suffice" if code == -signal.SIGKILL else "see above"
        raise ConfigError(f"a process that tokenises the {store.split} split {how}; {fix}; run it again")


def main() -> None:
    """Does the task that stands on stdin; prints a line of JSON for each step, or for an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; who started this one decides
    store, units = pickle.load(sys.stdin.buffer)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        # At once, since other processes write into the same pipe, too; it takes 4 KB at a time.
        os.write(sys.stdout.fileno(), (json.dumps(message, allow_nan=False) + "\n").encode())

    try:
        store.work(units, lambda unit, count: say(unit=unit, bytes=count))
    except ConfigError as error:
        say(error=str(error)[:600])
    os._exit(0)  # the thread reads stdin, which the interpreter would wait for


if __name__ == "__main__":
    main()
