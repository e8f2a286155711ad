"""What process 0 tells the others, over a store that is a dictionary."""

from typing import Any

import pytest

from bigmac_jax.inference.jobs import Job
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.runtime import hosts
from bigmac_jax.serving import lockstep
from bigmac_jax.serving.lockstep import Leader, follow


class Store(dict[str, str]):
    """That of jax's coordination service; breaks at the write `broken`."""

    broken = -1

    def key_value_set(self, key: str, value: str) -> None:
        if len(self) == self.broken:
            self.broken = -1
            raise RuntimeError("UNAVAILABLE")
        self[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self[key]


class Followed:
    """A generator and an engine that note what they are told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def job(self, prompt: list[int], sampling: Sampling, number: int) -> Any:
        return Job(prompt, sampling, type("Text", (), {"finish_reason": ""})(), number)

    def submit(self, job: Job) -> None:
        self.seen.append(list(job.prompt))

    def step(self) -> None:
        self.seen.append("step")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "coordination_store", lambda: made)
    monkeypatch.setattr(lockstep, "_PART", 20)
    return made


def job(followed: Followed) -> Job:
    return followed.job(list(range(30)), Sampling(), 0)


def test_followers_end_as_process_0_does(store: Store) -> None:
    told, followed = Leader(), Followed()
    told.send_step([job(followed)], [])
    told.send(lockstep.IDLE)
    told.send(lockstep.END)
    assert len(store) > 5  # the first one in parts
    assert follow(followed, followed) == 0  # type: ignore[arg-type]
    assert followed.seen == [list(range(30)), "step"]


@pytest.mark.parametrize("broken", [-1, 3])
def test_an_engine_that_fails_ends_the_others(store: Store, broken: int) -> None:
    """With an exit code (`cli.run` gives PeerError's), also where a message was broken off."""
    told, followed = Leader(), Followed()
    told.send(lockstep.IDLE)
    store.broken = broken
    if broken > 0:
        with pytest.raises(RuntimeError, match="UNAVAILABLE"):
            told.send_step([job(followed)], [])
        assert len(store) == broken
    told.send(lockstep.ABORT)
    with pytest.raises(hosts.PeerError, match="the engine of process 0 failed; its log says why"):
        follow(followed, followed)  # type: ignore[arg-type]
    assert followed.seen == []
