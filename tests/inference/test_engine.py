"""Continuous batching: whatever comes and goes beside it, a request gets what it gets alone."""

import gc
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import on_mesh, random_model, tiny
from training.tools import text

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference import Generator, Sampling, decoding
from bigmac_jax.inference import engine as engine_module
from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import CANCELLED, Job
from bigmac_jax.inference.pages import PageAllocator

LENGTH, SLOTS, POSITIONS, PAGE, CHUNK = 40, 8, 160, 4, 32
WORDS = text(1, seed=2)[0]
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Plan:
    """A request of a schedule: when it comes, and after how many of its tokens it is cancelled (-1: never)."""

    arrives: int
    prompt: tuple[int, ...]
    sampling: Sampling
    number: int
    cancelled_after: int


def config_on(mesh: tuple[int, ...], **fields: Any) -> Config:
    return tiny(mesh, length=LENGTH, num_layers=1, structure="bigmac", num_shared_experts=1, **fields)


def schedule(seed: int) -> list[Plan]:
    draw = random.Random(seed)
    plans = []
    for _ in range(draw.randint(5, 14)):
        # Many begin alike.
        start = draw.choice((0, 0, 8, draw.randrange(200)))
        prompt = tuple(ByteTokenizer().encode(WORDS[start : start + draw.randint(1, 28)]))
        kind = draw.choice(
            ({}, {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1, "top_p": 0.8})
        )
        new = draw.randint(1, LENGTH - len(prompt))
        sampling = Sampling(max_tokens=min(new, 16), ignore_eos=draw.random() < 0.5, seed=draw.randrange(9), **kind)
        cancelled = draw.randint(0, 9) if draw.random() < 0.25 else -1
        plans.append(Plan(draw.randint(0, 30), prompt, sampling, draw.randrange(4), cancelled))
    return plans


def play(generator: Generator, engine: Engine, plans: list[Plan]) -> list[Job]:
    """Runs a schedule; checks at every step that the cache holds no more than it has."""
    jobs = [generator.job(plan.prompt, plan.sampling, plan.number) for plan in plans]
    now, left = 0, set(range(len(plans)))
    while left or engine.busy:
        for i in sorted(i for i in left if plans[i].arrives <= now):
            engine.submit(jobs[i])
            left.remove(i)
        engine.step()
        for plan, job in zip(plans, jobs, strict=True):
            if plan.arrives <= now and 0 <= plan.cancelled_after <= len(job.text.tokens):
                engine.cancel(job)
        for pages in engine.pages:
            assert 0 <= pages.in_use <= pages.number
        assert engine.running <= engine.shards * engine.slots
        now += 1
    assert all(pages.in_use == 0 for pages in engine.pages)
    return jobs


class Alone:
    """What each request gets by itself; kept."""

    def __init__(self, generator: Generator, engine: Engine):
        self.generator, self.engine = generator, engine
        self.known: dict[Any, Job] = {}

    def __call__(self, plan: Plan) -> Job:
        key = plan.prompt, plan.sampling, plan.number
        if key not in self.known:
            job = self.generator.job(*key)
            self.engine.submit(job)
            while self.engine.busy:
                self.engine.step()
            self.known[key] = job
        return self.known[key]


MESHES = [
    pytest.param((1, 1, 1), id="1x1"),
    pytest.param((2, 1, 2), id="2x2", marks=pytest.mark.full),
    pytest.param((1, 1, 8), id="1x8", marks=pytest.mark.full),
]


@pytest.fixture(scope="module", params=MESHES)
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[Generator, Engine, Alone]]:
    config = config_on(request.param)
    with on_mesh(config):
        generator = Generator(config, random_model(config))
        sizes: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
        positions = max(POSITIONS, LENGTH * int(np.prod(request.param)))
        alone = generator.engine(SLOTS, (), positions, reuse=False, **sizes)
        yield generator, generator.engine(SLOTS, (), positions, **sizes), Alone(generator, alone)


def assert_as_alone(jobs: list[Job], plans: list[Plan], alone: Alone) -> int:
    """Tokens equal, log-probabilities to 1e-5; how many tokens were compared."""
    compared = 0
    for job, plan in zip(jobs, plans, strict=True):
        expected = alone(plan)
        n = len(job.text.tokens)
        compared += n
        assert job.text.tokens == expected.text.tokens[:n], plan
        np.testing.assert_allclose(job.text.logprobs, expected.text.logprobs[:n], atol=TOLERANCE)
        if job.text.finish_reason == CANCELLED:
            assert plan.cancelled_after >= 0
        else:
            assert job.text.finish_reason == expected.text.finish_reason and job.text.text == expected.text.text
            assert n == len(expected.text.tokens)
    return compared


SCHEDULES = {"1x1": 3, "2x2": 1, "1x8": 1}  # of random ones; the first for `make test`


def test_any_schedule_gives_what_each_gets_alone(
    engines: tuple[Generator, Engine, Alone], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    _play_all(*engines, range(SCHEDULES[name]))


@pytest.mark.full
def test_many_schedules(engines: tuple[Generator, Engine, Alone]) -> None:
    _play_all(*engines, range(100, 300))


def _play_all(generator: Generator, engine: Engine, alone: Alone, seeds: range) -> None:
    compared = reused = cancelled = 0
    for seed in seeds:
        plans = schedule(seed)
        jobs = play(generator, engine, plans)
        compared += assert_as_alone(jobs, plans, alone)
        reused += sum(job.reused for job in jobs)
        cancelled += sum(job.text.finish_reason == CANCELLED for job in jobs)
    assert compared > 30 * len(seeds) and reused > 0 and cancelled > 0


@pytest.mark.full
@pytest.mark.parametrize("exchange", ["all_to_all", "dedup", "hierarchical", "gather", "ragged"])
def test_every_exchange(exchange: str) -> None:
    config = config_on((1, 2, 2))
    with on_mesh(config):
        generator = Generator(config, random_model(config), exchange=exchange)
        sizes: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
        alone = Alone(generator, generator.engine(SLOTS, (), POSITIONS, reuse=False, **sizes))
        engine = generator.engine(SLOTS, (), POSITIONS, **sizes)
        for seed in range(10):
            assert_as_alone(play(generator, engine, plans := schedule(seed)), plans, alone)


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    config = config_on((1, 1, 1))
    with on_mesh(config):
        yield Generator(config, random_model(config))


@pytest.fixture
def engine(generator: Generator) -> Engine:
    return generator.engine(SLOTS, (), POSITIONS, chunk=CHUNK, page_size=PAGE)


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_first_come_first_served(generator: Generator, engine: Engine) -> None:
    """A long request that waits for pages is not overtaken by a short one that would fit; all end."""
    # They leave two pages: the short one would fit, the long one does not.
    filling = [
        generator.job((20 + i,) * 10, Sampling(max_tokens=n, ignore_eos=True)) for i, n in enumerate((23,) * 4 + (15,))
    ]
    long, short = generator.job((7,) * 20, Sampling(max_tokens=20)), generator.job((8,), Sampling(max_tokens=2))
    for job in (*filling, long, short):
        engine.submit(job)
    while not long.text.tokens:
        assert not short.text.tokens
        engine.step()
        assert engine.pages[0].in_use <= engine.pages[0].number == POSITIONS // PAGE
    finish(engine)
    assert all(job.text.finish_reason for job in (*filling, long, short))


def test_prompts_are_read_in_chunks_between_the_steps_of_others(generator: Generator, engine: Engine) -> None:
    first = generator.job((5,), Sampling(max_tokens=30, ignore_eos=True))
    engine.submit(first)
    engine.step(), engine.step()
    later = [generator.job((9, i) * 14, Sampling(max_tokens=1)) for i in range(3)]
    for job in later:
        engine.submit(job)
    before, prefills = len(first.text.tokens), engine.prefills
    while not all(job.text.finish_reason for job in later):
        engine.step()
    assert engine.prefills - prefills == 3  # six rows of four pages, two in a chunk
    assert len(first.text.tokens) - before >= 3
    finish(engine)


def test_an_equal_beginning_is_computed_once(generator: Generator, engine: Engine) -> None:
    prompt = tuple(range(40, 62))
    first = generator.job(prompt, Sampling(max_tokens=10, ignore_eos=True))
    engine.submit(first)
    finish(engine)
    again = generator.job(prompt, first.sampling)
    chat = generator.job((*prompt, *first.text.tokens, 3), Sampling(max_tokens=2, ignore_eos=True))
    for job in (again, chat):
        engine.submit(job)
    finish(engine)
    assert (first.reused, again.reused, chat.reused) == (0, 20, 28)  # full pages; of the answer all but the last token
    assert again.text.tokens == first.text.tokens


def test_one_decode_program(generator: Generator, engine: Engine) -> None:
    jit = generator._programs.decode._jitted
    jit.clear_cache()
    for plan in schedule(1):
        engine.submit(generator.job(plan.prompt, plan.sampling))
    finish(engine)
    assert jit._cache_size() == 1
    assert generator._programs.prefill._jitted._cache_size() <= 4


def test_cancelling_what_waits_and_what_has_ended(generator: Generator, engine: Engine) -> None:
    jobs = [generator.job((i + 1,) * 10, Sampling(max_tokens=5, ignore_eos=True)) for i in range(SLOTS + 2)]
    for job in jobs:
        engine.submit(job)
    engine.cancel(jobs[-1])
    assert engine.waiting == SLOTS + 1
    engine.step()
    engine.cancel(jobs[0])  # its prompt is being read
    finish(engine)
    engine.cancel(jobs[1])
    assert [job.text.finish_reason for job in jobs] == [CANCELLED, *["length"] * SLOTS, CANCELLED]
    assert not jobs[0].text.tokens and engine.pages[0].in_use == 0 and engine.running == 0


def test_what_has_no_room_is_refused(generator: Generator, engine: Engine) -> None:
    with pytest.raises(
        ConfigError, match=r"38 tokens, which with max_tokens=3 are 41, and must be at most 40; use a sh"
    ):
        engine.submit(generator.job((1,) * 38, Sampling(max_tokens=3)))
    with pytest.raises(ConfigError, match="the prompt has no tokens; give at least one"):  # it would never end
        engine.submit(generator.job((), Sampling(max_tokens=3)))
    with pytest.raises(
        ConfigError, match=r"the cache's 36 positions are 36 on each of 1 batch shards, .* use at least 40"
    ):
        generator.engine(1, (), 36, page_size=PAGE)
    assert not engine.busy


def soak(generator: Generator, engine: Engine, requests: int) -> tuple[list[int], list[int]]:
    """Objects and arrays that are alive, after each tenth of so many requests."""
    draw, objects, arrays = random.Random(0), [], []
    waiting: list[Job] = []
    for _ in range(10):
        for _ in range(requests // 10):
            prompt = tuple(draw.randrange(250) for _ in range(draw.randint(1, 20)))
            job = generator.job(prompt, Sampling(max_tokens=draw.randint(1, 4), ignore_eos=True))
            engine.submit(job)
            waiting.append(job)
            if draw.random() < 0.1:
                engine.cancel(waiting.pop(draw.randrange(len(waiting))))
            while engine.waiting > 4:
                engine.step()
        finish(engine)
        waiting.clear()
        gc.collect()
        objects.append(len(gc.get_objects()))
        arrays.append(len(jax.live_arrays()))
        assert all(pages.in_use == 0 and len(pages._by_key) <= pages.number for pages in engine.pages)
    return objects, arrays


@pytest.mark.full
def test_a_soak_leaves_nothing_behind(generator: Generator, engine: Engine) -> None:
    objects, arrays = soak(generator, engine, 10_000)
    assert arrays[-1] <= arrays[1]
    assert objects[-1] - objects[1] <= 200, objects


@pytest.mark.parametrize(
    ("chunk", "row", "ranks", "expected"),
    [
        (512, 64, 1, (1, 4, 8)), (64, 64, 1, (1,)), (65, 64, 1, (1, 2)), (1, 64, 1, (1,)), (256, 64, 1, (1, 4)),
        (257, 64, 1, (1, 4, 5)), (2048, 64, 1, (1, 4, 16, 32)), (512, 64, 2, (2, 4, 8)), (512, 64, 8, (8,)),
        (513, 64, 4, (4, 12)),
    ],
)  # fmt: skip
def test_widths_of_prefill(
    chunk: int, row: int, ranks: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one row to the chunk, each four times the last; tensor ranks divide them."""
    monkeypatch.setattr(engine_module, "tensor_ranks", lambda: ranks)
    assert engine_module._prefill_widths(chunk, row) == expected


@pytest.mark.parametrize(
    ("unread", "expected"),
    [
        ([], 0), ([(0, 0)], 0), ([(0, 1)], 1), ([(0, 16)], 1), ([(0, 17)], 1), ([(0, 33)], 4), ([(0, 49)], 4),
        ([(0, 64)], 4), ([(0, 65)], 4), ([(0, 80), (0, 160)], 16), ([(0, 176)], 4), ([(0, 192)], 16),
        ([(0, 256)], 16), ([(0, 999)], 16), ([(0, 32), (1, 32)], 1), ([(0, 32), (1, 48)], 4), ([(0, 20), (0, 20)], 4),
    ],
)  # fmt: skip
def test_the_program_that_prompts_fill(unread: list[tuple[int, int]], expected: int) -> None:
    """Of one, four and sixteen rows of 16 tokens the one that holds all if three quarters of it are filled, else the
    widest that is; by the shard with most rows."""
    jobs = [
        (SimpleNamespace(prompt=range(5 + tokens)), SimpleNamespace(shard=shard, read=5)) for shard, tokens in unread
    ]
    of: Any = SimpleNamespace(shards=2, _row_size=16, _widths=(1, 4, 16), _running=SimpleNamespace(items=lambda: jobs))
    assert Engine._choose_width(of) == expected
    four: Any = SimpleNamespace(prompt=range(64))
    of._widths, of._running = (1, 4, 5), SimpleNamespace(items=lambda: [(four, SimpleNamespace(shard=1, read=0))])
    assert Engine._choose_width(of) == 4


@pytest.mark.parametrize(
    ("requests", "batch", "tensor", "expected"),
    [(1, 1, 1, 1), (5, 1, 1, 5), (5, 2, 1, 3), (4, 2, 1, 2), (5, 2, 2, 4), (8, 2, 2, 4), (9, 2, 2, 6), (3, 1, 4, 4)],
)
def test_slots_of_a_shard(
    requests: int, batch: int, tensor: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough for all requests; tensor ranks divide them."""
    monkeypatch.setattr(decoding, "batch_ranks", lambda: batch)
    monkeypatch.setattr(decoding, "tensor_ranks", lambda: tensor)
    assert decoding.slots_per_shard(requests) == expected


@pytest.mark.parametrize(
    ("shards", "positions", "longest", "size", "expected"),
    [(1, 40, 40, 4, 10), (1, 41, 38, 4, 11), (2, 80, 40, 4, 10), (2, 73, 40, 4, 10), (1, 160, 160, 16, 10)],
)
def test_pages_of_a_shard(
    shards: int, positions: int, longest: int, size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all positions together; each shard has room for the longest request, of 16 positions a page."""
    monkeypatch.setattr(engine_module, "batch_ranks", lambda: shards)
    assert engine_module.count_pages(positions, longest, size) == expected
    assert size != 16 or engine_module.count_pages(positions, longest) == expected
    least = shards * size * (longest // size)
    with pytest.raises(ConfigError, match=f"the longest request, {least // shards + 1} tokens; use at least "):
        engine_module.count_pages(least, least // shards + 1, size)


def test_a_job_takes_a_position_a_token_but_for_the_last(generator: Generator) -> None:
    job = generator.job((1, 2, 3), Sampling(max_tokens=5), 7)
    assert (job.positions, job.number, job.begins, job.reused) == (7, 7, False, 0)


def admitted(engine: Any, prompts: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Shard, slot and reused tokens of each that gets a slot."""
    jobs = [SimpleNamespace(prompt=prompt, positions=len(prompt) + 1, reused=0) for prompt in prompts]
    engine._queue, engine._running = deque(jobs), Running()
    Engine._admit(engine)
    assert list(engine._queue) == jobs[len(engine._running.pairs) :]
    assert all(at.read == job.reused == at.allocation.cached for job, at in engine._running.pairs)
    return [(at.shard, at.slot, job.reused) for job, at in engine._running.pairs]


class Running:
    """Requests in order; they need no hash."""

    def __init__(self) -> None:
        self.pairs = list[Any]()

    def __setitem__(self, job: Any, at: Any) -> None:
        self.pairs.append((job, at))


def test_who_gets_which_slot() -> None:
    """The shard that holds the beginning, then the one with most pages, then the first; none overtakes."""

    def made(pages: tuple[int, ...], slots: int = 2) -> Any:
        return SimpleNamespace(
            pages=[PageAllocator(number, 4) for number in pages], _free=[list(range(slots))[::-1] for _ in pages]
        )

    assert admitted(made((4, 4)), [(1,) * 3, (2,) * 3, (3,) * 9, (4,)]) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert admitted(made((3, 5)), [(1,) * 3, (2,) * 3, (3,) * 3]) == [(1, 0, 0), (1, 1, 0), (0, 0, 0)]
    assert admitted(made((2, 2)), [(1,) * 4, (2,) * 8, (3,)]) == [(0, 0, 0)]  # of three pages none has room
    assert admitted(made((4, 4), 1), [(1,), (2,), (3,)]) == [(0, 0, 0), (1, 0, 0)]
    engine = made((4, 8))
    known = engine.pages[0].allocate(range(9), 9)
    engine.pages[0].share(known, range(9))
    engine.pages[0].free(known)
    assert admitted(engine, [tuple(range(9)), (7,) * 9]) == [(0, 0, 8), (1, 0, 0)]
