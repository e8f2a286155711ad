"""Processes of a job, which are threads here: what they gather is what each of them gave."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bigmac_jax.runtime import hosts


def run_as_processes(monkeypatch: pytest.MonkeyPatch, count: int, work: Callable[[int], Any]) -> list[Any]:
    """Calls `work` with the number of each process, and returns what each gave or raised."""
    own = threading.local()
    barrier, messages = threading.Barrier(count), [np.zeros(0)] * count

    def process_allgather(message: np.ndarray) -> np.ndarray:
        messages[own.process] = message
        barrier.wait(10)
        gathered = np.stack(messages)
        barrier.wait(10)
        return gathered

    def run(process: int) -> Any:
        own.process = process
        try:
            return work(process)
        except Exception as error:
            return error

    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "is_first", lambda: own.process == 0)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", process_allgather)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
