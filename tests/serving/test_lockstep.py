"""What process 0 tells the others, over a store that is a dictionary."""

import weakref
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

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def key_value_set(self, key: str, value: str) -> None:
        if len(self) == self.broken:
            self.broken = -1
            raise RuntimeError("UNAVAILABLE")
        self[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self[key]

    def key_value_delete(self, key: str) -> None:
        del self[key]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        self.met.append(name)


class Followed:
    """A generator and an engine that note what they are told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.jobs: weakref.WeakSet[Job] = weakref.WeakSet()

    def job(self, prompt: list[int], sampling: Sampling, number: int, begins: bool = False) -> Any:
        return Job(prompt, sampling, type("Text", (), {"finish_reason": ""})(), number, begins)

    def submit(self, job: Job) -> None:
        self.seen.append(list(job.prompt))
        self.jobs.add(job)

    def cancel(self, job: Job) -> None:
        self.seen.append(("cancelled", job.number))
        job.text.finish_reason = "cancelled"

    def step(self) -> None:
        """Ends the requests whose prompt is of one token."""
        self.seen.append("step")
        for job in self.jobs:
            job.text.finish_reason = job.text.finish_reason or ("stop" if len(job.prompt) == 1 else "")


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


def test_followers_keep_a_request_until_it_has_ended(store: Store) -> None:
    told, followed = Leader(), Followed()
    sent = [followed.job([5] * (number + 1), Sampling(seed=number), 10 + number, number == 2) for number in range(3)]
    told.send_step(sent[:2], [])
    told.send_step(sent[2:], sent[1:2])
    told.send_step([], sent[2:])
    told.send(lockstep.END)
    alive: list[list[int]] = []
    begun: list[int] = []
    step = followed.step
    followed.step = lambda: (alive.append(sorted(job.number for job in followed.jobs)), step())  # type: ignore
    submit = followed.submit
    followed.submit = lambda job: (begun.extend([job.number] * job.begins), submit(job))  # type: ignore
    follow(followed, followed)  # type: ignore[arg-type]
    assert begun == [12]
    assert followed.seen == [[5], [5, 5], "step", [5, 5, 5], ("cancelled", 11), "step", ("cancelled", 12), "step"]
    assert alive == [[10, 11], [11, 12], [12]]


@pytest.mark.parametrize("deletes", [True, False])
def test_what_all_have_read_is_deleted(store: Store, deletes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every fourth value, at which all wait for each other."""
    monkeypatch.setattr(lockstep, "_KEPT", 4)
    if not deletes:
        monkeypatch.setattr(store, "key_value_delete", lambda key: None)
    told, followed = Leader(), Followed()
    for _ in range(9):
        told.send(lockstep.IDLE)
    told.send(lockstep.END)
    barriers = [f"bigmac/serving/read/{values}" for values in (4, 8)]
    assert store.met == barriers and len(store) == (2 if deletes else 10)
    if not deletes:
        assert follow(followed, followed) == 0  # type: ignore[arg-type]
        assert store.met == barriers * 2


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
