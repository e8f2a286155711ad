"""Drafts by a next-token module: its cache is what its training form computes, whatever comes, goes and is refused."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import leaf_name, on_mesh, random_model, split_batch, split_tokens, tiny
from training.tools import quick

from bigmac_jax.config import Config
from bigmac_jax.inference import Generator, Speculation
from bigmac_jax.inference.decoding import State
from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import Job
from bigmac_jax.model.router import Padding
from bigmac_jax.model.transformer import Transformer

from .test_engine import CHUNK, LENGTH, PAGE, POSITIONS, SLOTS, Alone, assert_as_alone, config_on, play, schedule
from .test_mamba_decoding import hybrid

SIZES: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
CASES = [
    pytest.param(kind, mesh, fields, tokens, seeds, id=f"{kind}-{'x'.join(map(str, map(int, mesh)))}-{tokens}")
    for kind, mesh, fields, tokens, seeds in (
        ("plain", (1, 1, 1), {}, 2, range(20)),
        ("plain", (1, 1, 2), {"mtp_modules": 2}, 1, range(40)),
        ("plain", (2, 1, 2), {"positions": "learned", "tie_embeddings": False}, 3, range(20)),
        ("dense", (1, 1, 1), {}, 4, range(20)),
        ("hybrid", (1, 1, 1), {"mtp_blocks": "*ME"}, 3, range(40)),
        ("hybrid", (1, 1, 2), {}, 2, range(20)),
        ("hybrid", (1, 2, 1, 2, True, True), {"mtp_blocks": "M*E"}, 3, range(20)),
    )
]  # fmt: skip


def config_of(kind: str, mesh: tuple[int, ...], **fields: Any) -> Config:
    fields = {"mtp_modules": 1} | fields
    if kind == "dense":
        return tiny(mesh, length=LENGTH, structure="dense", **fields)
    return hybrid(mesh, **fields) if kind == "hybrid" else config_on(mesh, **fields)


def guessing_model(config: Config) -> Transformer:
    """A random model whose module sees the token that it reads better than the features. Branches add little, so that
    some of its guesses are right."""
    D = config.model.hidden_size
    draw = np.random.default_rng(3).standard_normal
    given = {
        "mtp.projection.w_DF": np.concatenate([np.eye(D), draw((D, D)) / D]),
        "mtp.embedding_norm.scale_D": 1 + 0.1 * draw(D),
    }
    model = random_model(config, {name: value.astype(np.float32) for name, value in given.items()})

    def shrink(path: Any, w: jax.Array) -> jax.Array:
        return w * 0.3 if any(part in leaf_name(path) for part in (".out.", ".up.", "shared.down")) else w

    return jax.tree_util.tree_map_with_path(shrink, model)


@dataclass(frozen=True)
class Drafted:
    """A slot at a draft."""

    job: Job
    position: int  # of its next token
    features_D: np.ndarray  # the module's, one position before
    tokens: list[int]


def watch(engine: Engine) -> list[Drafted]:
    """What the engine's drafts will find, and draft."""
    drafts, seen = engine.drafts, []
    assert drafts is not None
    draft = drafts.programs.draft

    def watched(weights: Any, state: State, slots_SBX: jax.Array, tokens: int) -> Any:
        assert state.ahead is not None
        h_SBD, position_SB = (np.array(v) for v in (state.ahead.features_SBD, state.position_SB))
        state, drafted_GSB = draft(weights, state, slots_SBX, tokens=tokens)
        for job, at in engine._running.items():
            if at.asked:
                place = at.shard, at.slot
                drafted = np.asarray(drafted_GSB)[:, *place].tolist()
                seen.append(Drafted(job, int(position_SB[place]), h_SBD[place], drafted))
        return state, drafted_GSB

    drafts.programs = drafts.programs._replace(draft=watched)
    return seen


def padded(rows: list[list[int]], multiple: int = 8) -> np.ndarray:
    count = -(-len(rows) // multiple) * multiple
    return np.array([[*row, *[0] * (LENGTH + 1)][: LENGTH + 1] for row in rows + [[]] * (count - len(rows))], np.int32)


@jax.jit
def in_training(
    model: Transformer, tokens_BL: jax.Array, next_BL: jax.Array, h_BLD: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Features and guesses of the model, and of its module behind them, or behind `h_BLD`."""
    if h_BLD is None:
        h_BLD = model.features(tokens_BL, evaluating=True)[0]
    none = Padding.of(jnp.zeros_like(next_BL, bool))
    x_BLD, _ = model.next_features(0, h_BLD, next_BL, None, dropout_key=None, padding=none, choices=None)
    return tuple((features, model.logits(features).argmax(-1)) for features in (h_BLD, x_BLD))


def compute(model: Transformer, rows_BL: np.ndarray, h_BLD: np.ndarray | None = None) -> Any:
    """`in_training` of rows of tokens, with one more each."""
    tokens = (split_batch(of) for of in (rows_BL[:, :-1], rows_BL[:, 1:]))
    return jax.tree.map(np.asarray, in_training(model, *tokens, None if h_BLD is None else split_tokens(h_BLD)))


def assert_as_in_training(model: Transformer, seen: list[Drafted]) -> int:
    """Features of the module to 2e-5 of the largest, and of greedy requests all tokens and the first two that were
    drafted; how many were compared."""
    jobs = list(dict.fromkeys(of.job for of in seen))
    texts = {job: [*job.prompt, *job.text.tokens] for job in jobs}
    (h_BLD, next_BL), (found_BLD, guess_BL) = compute(model, padded([texts[job] for job in jobs]))
    for job, next_L in zip(jobs, next_BL, strict=False):
        if not job.sampling.temperature:
            first, last = len(job.prompt) - 1, len(texts[job]) - 1
            assert job.text.tokens == next_L[first:last].tolist()
    # Behind the last token nothing was seen.
    known = [(of, jobs.index(of.job)) for of in seen if of.position < len(texts[of.job])]
    for of, b in known:
        right_D = found_BLD[b, of.position - 1]
        np.testing.assert_allclose(of.features_D, right_D, atol=2e-5 * np.abs(right_D).max())
    greedy = [(of, b) for of, b in known if not of.job.sampling.temperature and of.position < LENGTH - 1]
    assert [of.tokens[0] for of, _ in greedy] == [guess_BL[b, of.position - 1] for of, b in greedy]
    if len(seen[0].tokens) == 1:
        return len(known)
    # A second token is guessed as if the module's features were the model's of the next position.
    some = greedy[:: max(1, len(greedy) // 24)]
    rows = padded([texts[of.job] for of, _ in some])
    h_RLD = np.zeros((len(rows), *h_BLD.shape[1:]), np.float32)
    for row, (of, b) in enumerate(some):
        h_RLD[row] = h_BLD[b]
        h_RLD[row, of.position], rows[row, of.position + 1] = found_BLD[b, of.position - 1], of.tokens[0]
    _, (_, guess_RL) = compute(model, rows, h_RLD)
    # At the end of a request nothing more is read.
    asked = [(row, of) for row, (of, _) in enumerate(some) if of.position + 1 < of.job.positions]
    assert [of.tokens[1] for _, of in asked] == [guess_RL[row, of.position] for row, of in asked]
    return len(known)


def test_a_schedule_gives_what_the_whole_model_gives() -> None:
    """Greedy tokens, and the module's cache, against whole texts in their training form."""
    config = config_of("plain", (1, 1, 1))
    with quick(), on_mesh(config):
        model = guessing_model(config)
        generator = Generator(config, model, speculate=Speculation(2, least=0.0))
        engine = generator.engine(SLOTS, (), POSITIONS, chunk=16, page_size=PAGE)
        seen = watch(engine)
        play(generator, engine, schedule(1))
        assert assert_as_in_training(model, seen) > 20
    assert generator.drafts is not None
    assert 0 < generator.drafts.accepted < generator.drafts.drafted


@pytest.mark.full
@pytest.mark.parametrize(("kind", "mesh", "fields", "tokens", "seeds"), CASES)
def test_any_schedule_gives_what_each_gets_alone(
    kind: str, mesh: tuple[int, ...], fields: dict[str, Any], tokens: int, seeds: range
) -> None:
    """Tokens as without drafts, and the module's cache as in its training form."""
    config = config_of(kind, mesh, **fields)
    with quick(), on_mesh(config):
        model = guessing_model(config)
        plain, drafting = (Generator(config, model, speculate=how) for how in (None, Speculation(tokens, least=0.0)))
        positions = max(POSITIONS, LENGTH * int(np.prod(mesh[:4])))
        alone = Alone(plain, plain.engine(SLOTS, (), positions, reuse=False, **SIZES))
        engine = drafting.engine(SLOTS, (), positions, **SIZES)
        seen = watch(engine)
        for seed in seeds:
            plans = schedule(seed)
            assert_as_alone(play(drafting, engine, plans), plans, alone)
        assert assert_as_in_training(model, seen) > 20 * len(seeds)
    assert drafting.drafts is not None
    assert 0 < drafting.drafts.accepted < drafting.drafts.drafted
