"""Values of process 0 reach all processes whole, however long they are."""

import json

import numpy as np
import pytest

from bigmac_jax.runtime import hosts


@pytest.mark.parametrize("length", [0, 1000, 1022, 1023, 5000, 100_000])
def test_broadcast_is_never_cut(monkeypatch, length):
    """Of two processes that are simulated here: what the other one sends is what process 0 would have got."""
    value = {"é": "x" * length}

    def gather(message):
        return [message.encode()[: hosts._MESSAGE].decode(errors="ignore"), "null"]

    def allgather(array):
        assert array.size.bit_count() == 1  # of few sizes
        return np.stack([array, array * 0])

    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "gather", gather)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)
    assert hosts.broadcast(value) == value
    assert hosts.broadcast(list(range(length // 5))) == list(range(length // 5))
    assert json.dumps(hosts.broadcast(float("nan"))) == "NaN"
