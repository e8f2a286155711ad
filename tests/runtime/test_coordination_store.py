"""The store of jax's coordination service has no public name: where it is, and what watchdog and lockstep ask of it."""

import pytest
from jax._src import distributed
from jax.errors import JaxRuntimeError

from benchmarks.ports import free_port
from bigmac_jax.runtime import hosts


def test_the_store_is_there_and_does_what_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red after an update of jax: mend `hosts.coordination_store`, or the callers of the method that is named."""
    assert hosts.coordination_store() is None  # a job of one
    state = distributed.State()
    monkeypatch.setattr(state, "initialize_preemption_sync_manager", lambda: None)  # it would take SIGTERM
    state.initialize(f"127.0.0.1:{free_port()}", 1, 0, cluster_detection_method="deactivate")
    monkeypatch.setattr(distributed, "global_state", state)
    try:
        store = hosts.coordination_store()
        assert hosts._number() == 0
        store.key_value_set("a/1", "x")
        store.key_value_set("a/1", "y", allow_overwrite=True)
        with pytest.raises(JaxRuntimeError, match="ALREADY_EXISTS"):
            store.key_value_set("a/1", "z")
        assert store.key_value_try_get("a/1") == store.blocking_key_value_get("a/1", 1000) == "y"
        assert store.key_value_dir_get("a/") == [("a/1", "y")]
        store.key_value_delete("a/1")
        with pytest.raises(JaxRuntimeError, match="NOT_FOUND"):
            store.key_value_try_get("a/1")
        with pytest.raises(JaxRuntimeError, match="DEADLINE_EXCEEDED"):
            store.blocking_key_value_get("a/1", 1)
        store.wait_at_barrier("b", 1000)
    finally:
        state.shutdown()
