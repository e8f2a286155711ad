"""Drafts change when tokens come, not which."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import abstract_model, leaf_name, on_mesh, random_model

from bigmac_jax.config import Config
from bigmac_jax.inference import Generator, Request, Sampling, Speculation
from bigmac_jax.inference import drafts as drafting
from bigmac_jax.inference.engine import Engine

from .test_engine import CHUNK, LENGTH, PAGE, POSITIONS, SLOTS, WORDS, Alone, assert_as_alone, config_on, play, schedule

SIZES: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
PROMPTS = [WORDS[3 * i : 4 * i + 5] for i in range(8)]
# Mesh, local experts of a rank, tokens of a draft.
CASES = [((1, 1, 2), 0, 3), ((1, 1, 1), 2, 1), ((2, 1, 2), 0, 4), ((1, 1, 8), 0, 2), ((1, 2, 1, 2, True, True), 0, 3)]


def complete(generator: Generator, engine: Engine, requests: list[Request]) -> tuple[list[list[int]], list[int]]:
    """The tokens of each, and how many a step gave."""
    jobs = [
        generator.job(generator.tokenizer.encode(str(request.prompt)), request.sampling, number)
        for number, request in enumerate(requests)
    ]
    for job in jobs:
        engine.submit(job)
    sizes = []
    while engine.busy:
        sizes.append(len(engine.step()))
    return [job.text.tokens for job in jobs], sizes


def run(config: Config, model: Any, requests: list[Request], how: Speculation | None = None) -> tuple[Any, Generator]:
    generator = Generator(config, model, batch_size=SLOTS, speculate=how)
    return generator.generate(requests), generator


def mixed(count: int = 8) -> list[Request]:
    """Greedy and drawn, of several lengths, one with the most likely tokens."""
    return [
        Request(
            PROMPTS[i % 8],
            Sampling(5 + 2 * (i % 7), float(i % 2), ignore_eos=True, seed=i // 2, logprobs=3 if i == 4 else 0),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("mesh", "local", "tokens", "seeds"),
    [(*case, range(10)) for case in CASES],
)
@pytest.mark.full
def test_any_schedule_gives_what_each_gets_alone_without_drafts(
    mesh: tuple, local: int, tokens: int, seeds: range
) -> None:
    config = config_on(mesh)
    with on_mesh(config):
        model = random_model(config)
        plain, drafts = (
            Generator(config, model, speculate=how) for how in (None, Speculation(tokens, local, least=0.0))
        )
        positions = max(POSITIONS, LENGTH * int(np.prod(mesh[:4])))
        alone = Alone(plain, plain.engine(SLOTS, (), positions, reuse=False, **SIZES))
        engine = drafts.engine(SLOTS, (), positions, **SIZES)
        for seed in seeds:
            plans = schedule(seed)
            assert_as_alone(play(drafts, engine, plans), plans, alone)
    assert drafts.drafts is not None
    assert 0 < drafts.drafts.accepted < drafts.drafts.drafted


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[tuple[Config, Any]]:
    config = config_on((1, 1, 2))
    with on_mesh(config):
        yield config, random_model(config)


@pytest.mark.full
def test_all_is_accepted_where_experts_give_nothing() -> None:
    """Drawn tokens, too; a request of sixteen takes the step of its prompt and three of five."""
    config = config_on((1, 1, 2))
    with on_mesh(config):
        shapes = {
            leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_model(config))
        }
        nothing = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if "experts.w_out" in name}
        assert nothing
        model = random_model(config, nothing)
        generator = Generator(config, model, speculate=Speculation(4))
        drafts, generator.drafts = generator.drafts, None
        expected, _ = complete(generator, generator.engine(SLOTS, (), POSITIONS, **SIZES), mixed())
        generator.drafts = drafts
        engine = generator.engine(SLOTS, (), POSITIONS, **SIZES)
        found, _ = complete(generator, engine, mixed())
        assert found == expected and drafts is not None and drafts.drafted == drafts.accepted > 40
        _, sizes = complete(generator, engine, [Request("abc", Sampling(16, ignore_eos=True))])
        assert [size for size in sizes if size] == [6, 5, 5]


@pytest.mark.full
def test_not_all_where_they_are_left_out(two_ranks: tuple[Config, Any]) -> None:
    """What is accepted and what is not: the tokens are those without drafts."""
    config, model = two_ranks
    with on_mesh(config):
        expected, _ = run(config, model, mixed())
        found, generator = run(config, model, mixed(), Speculation(4))
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert generator.drafts is not None and 0 < generator.drafts.accepted < generator.drafts.drafted


@pytest.mark.full
def test_the_most_likely_tokens_are_those_of_each_position(two_ranks: tuple[Config, Any]) -> None:
    config, model = two_ranks
    likely = []
    with on_mesh(config):
        for how in (None, Speculation(4)):
            generator = Generator(config, model, speculate=how)
            engine = generator.engine(SLOTS, (), POSITIONS, **SIZES)
            engine.submit(generator.job((5, 6, 7), Sampling(9, ignore_eos=True, logprobs=3)))
            found = []
            while engine.busy:
                found += [(step.token, step.alternatives) for step in engine.step()]
            likely.append(found)
    plain, drafts = likely
    assert len(plain) == len(drafts) == 9
    for (token, of_plain), (same, of_drafts) in zip(plain, drafts, strict=True):
        assert token == same and [t for t, _ in of_plain] == [t for t, _ in of_drafts]
        assert of_plain[0][0] == token and len(of_plain) == 3
        np.testing.assert_allclose([p for _, p in of_plain], [p for _, p in of_drafts], atol=1e-5)


@pytest.mark.full
def test_drafts_that_are_not_accepted_pause(
    two_ranks: tuple[Config, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, model = two_ranks
    monkeypatch.setattr(drafting, "_WINDOW", 40)
    monkeypatch.setattr(drafting, "_PAUSE", 3)
    requests = mixed(24)
    with on_mesh(config), caplog.at_level(logging.INFO):
        expected, _ = run(config, model, requests)
        found, generator = run(config, model, requests, Speculation(4, least=0.99))
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    said = [record.getMessage() for record in caplog.records if "drafted tokens" in record.getMessage()]
    assert len(said) > 1 and "% were accepted, fewer than 99.0 %: no drafts for the next 3 steps" in said[0]
    assert generator.drafts is not None
    assert generator.drafts.drafted < 0.9 * sum(len(c.tokens) - 1 for c in found) * 4


@pytest.mark.full
def test_what_is_drawn_is_drawn_as_without_drafts() -> None:
    """Texts of three tokens, by a chi-square test of two samples: other seeds, so that they are independent."""
    config, count = config_on((1, 1, 2)), 3000
    with on_mesh(config):
        model = random_model(config)
        samples = []
        for seed, how in ((1, None), (2, Speculation(2, least=0.0))):
            sampling = Sampling(3, temperature=1.0, top_k=3, seed=seed, ignore_eos=True)
            generator = Generator(config, model, batch_size=64, speculate=how)
            samples.append(Counter(c.tokens for c in generator.generate([Request(PROMPTS[3], sampling)] * count)))
        assert generator.drafts is not None and 0.1 < generator.drafts.accepted / generator.drafts.drafted < 0.95
    first, second = samples
    texts = [text for text in first.keys() | second.keys() if first[text] + second[text] >= 10]
    a, b = (np.array([sample[text] for text in texts], float) for sample in samples)
    statistic = ((a - b) ** 2 / (a + b)).sum()
    # Of chi-square with n degrees of freedom the mean is n, the variance 2 n.
    n = len(texts) - 1
    assert n > 10 and statistic < n + 4 * np.sqrt(2 * n)
