"""Drafts by a next-token module: its cache is what its training form computes, whatever comes, goes and is refused."""

import random
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import leaf_name, on_mesh, random_model, split_batch, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.inference import Generator, Request, Sampling, Speculation
from bigmac_jax.inference.decoding import State
from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.int8_weights import Int8
from bigmac_jax.inference.jobs import Job
from bigmac_jax.inference.sampling import RowSampling, sample
from bigmac_jax.model.mesh import axes_of, spec_of
from bigmac_jax.model.router import Padding
from bigmac_jax.model.transformer import Transformer

from .test_engine import CHUNK, LENGTH, PAGE, POSITIONS, SLOTS, WORDS, Alone, assert_as_alone, config_on, play, schedule
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
    """A random model whose module looks at the token that it reads more than at the features; branches add little, so
    that some of its guesses are right."""
    D = config.model.hidden_size
    draw = np.random.default_rng(3).standard_normal
    given = {
        "mtp.projection.w_DF": np.concatenate([np.eye(D), draw((D, D)) / D]),
        "mtp.embedding_norm.scale_D": 1 + 0.1 * draw(D),
    }
    model = random_model(config, {name: value.astype(np.float32) for name, value in given.items()})

    def shrink(path: Any, w: jax.Array) -> jax.Array:
        name = leaf_name(path)
        ends = any(part in name for part in (".out.", ".up.", "shared.down")) and "mtp.layers.attention" not in name
        return w * 0.3 if ends else w

    return jax.tree_util.tree_map_with_path(shrink, model)


@dataclass(frozen=True)
class Drafted:
    """A slot at a draft."""

    job: Job
    position: int  # of its next token
    features_D: np.ndarray  # the module's, one position before
    tokens: list[int]


def watch(engine: Engine) -> list[Drafted]:
    """What the engine's drafts will find, and draft; in a quarter of its steps it doesn't draft."""
    drafts, seen, draw = engine.drafts, [], random.Random(0)
    assert drafts is not None
    draft = drafts.programs.draft

    def watched(weights: Any, state: State, slots_SBX: jax.Array, tokens: int) -> Any:
        assert state.ahead is not None
        h_SBD, position_SB = (np.array(v) for v in (state.ahead.features_SBD, state.position_SB))
        state, drafted_GSB = draft(weights, state, slots_SBX, tokens=tokens)
        for job, at in engine._running.items():
            if 0 < at.asked < job.sampling.max_tokens:  # else its slot is idle
                place = at.shard, at.slot
                drafted = np.asarray(drafted_GSB)[:, *place].tolist()
                seen.append(Drafted(job, int(position_SB[place]), h_SBD[place], drafted))
        return state, drafted_GSB

    drafts.programs = drafts.programs._replace(draft=watched)
    drafts.should_draft = lambda: draw.random() < 0.75  # type: ignore[method-assign]
    return seen


def padded(rows: list[list[int]], multiple: int = 8) -> np.ndarray:
    count = -(-len(rows) // multiple) * multiple
    return np.array([[*row, *[0] * (LENGTH + 1)][: LENGTH + 1] for row in rows + [[]] * (count - len(rows))], np.int32)


@jax.jit
def in_training(
    model: Transformer, tokens_BL: jax.Array, next_BL: jax.Array, h_BLD: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Features and logits of the model, and of its module behind them, or behind `h_BLD`."""
    if h_BLD is None:
        h_BLD = model.features(tokens_BL, evaluating=True)[0]
    none = Padding.of(jnp.zeros_like(next_BL, bool))
    x_BLD, _ = model.next_features(0, h_BLD, next_BL, None, dropout_key=None, padding=none, choices=None)
    return h_BLD, model.logits(h_BLD), x_BLD, model.logits(x_BLD)


def compute(model: Transformer, rows_BL: np.ndarray, h_BLD: np.ndarray | None = None) -> list[np.ndarray]:
    """`in_training` of rows of tokens, with one more each."""
    tokens = (split_batch(of) for of in (rows_BL[:, :-1], rows_BL[:, 1:]))
    found = in_training(model, *tokens, None if h_BLD is None else split_tokens(h_BLD))
    return [np.asarray(of) for of in found]


def choose(logits_RV: np.ndarray, jobs: list[Job], positions: list[int]) -> list[int]:
    """The token that each request takes from logits at a position."""
    settings = [
        (s.temperature, s.top_k, s.top_p, s.seed, job.number, 0, position, *logits_V)
        for job, position, logits_V in zip(jobs, positions, logits_RV, strict=True)
        for s in [job.sampling]
    ]
    columns = np.array(settings + settings[:1] * (-len(jobs) % 64)).T.reshape(7 + logits_RV.shape[1], 8, -1)
    types = np.float32, np.int32, np.float32, np.uint32, np.int32, np.int32, np.int32
    *rows, position_SB = (split_batch(column.astype(of)) for column, of in zip(columns, types, strict=False))
    logits_SBV = split_tokens(np.moveaxis(columns[7:], 0, -1).astype(np.float32))
    chosen = jax.jit(sample)(logits_SBV, RowSampling(*rows), position_SB).token
    return np.asarray(chosen).reshape(-1)[: len(jobs)].tolist()


def assert_as_in_training(model: Transformer, seen: list[Drafted]) -> int:
    """All tokens, the first two that were drafted, and the features of the module to 2e-5 of the largest; how many were
    compared."""
    jobs = list(dict.fromkeys(of.job for of in seen))
    texts = {job: [*job.prompt, *job.text.tokens] for job in jobs}
    h_BLD, logits_BLV, found_BLD, guess_BLV = compute(model, padded([texts[job] for job in jobs]))
    new = [(b, job, i) for b, job in enumerate(jobs) for i in range(len(job.prompt), len(texts[job]))]
    chosen = choose(
        np.array([logits_BLV[b, i - 1] for b, _, i in new]), [job for _, job, _ in new], [i for *_, i in new]
    )
    assert chosen == [texts[job][i] for _, job, i in new]
    # Behind the last token nothing was seen.
    known = [(of, jobs.index(of.job)) for of in seen if of.position < len(texts[of.job])]
    for of, b in known:
        right_D = found_BLD[b, of.position - 1]
        np.testing.assert_allclose(of.features_D, right_D, atol=2e-5 * np.abs(right_D).max())
    guess_RV = np.array([guess_BLV[b, of.position - 1] for of, b in known])
    expected = choose(guess_RV, [of.job for of, _ in known], [of.position + 1 for of, _ in known])
    assert [of.tokens[0] for of, _ in known] == expected
    if len(seen[0].tokens) == 1:
        return len(known)
    # A second token is guessed as if the module's features were the model's of the next position. At the end of a
    # request nothing more is read.
    longer = [(of, b) for of, b in known if of.position < min(LENGTH - 1, of.job.positions - 1)]
    some = longer[:: max(1, len(longer) // 24)]
    rows = padded([texts[of.job] for of, _ in some])
    h_RLD = np.zeros((len(rows), *h_BLD.shape[1:]), np.float32)
    for row, (of, b) in enumerate(some):
        h_RLD[row] = h_BLD[b]
        h_RLD[row, of.position], rows[row, of.position + 1] = found_BLD[b, of.position - 1], of.tokens[0]
    guess_RLV = compute(model, rows, h_RLD)[-1]
    guess_RV = np.array([guess_RLV[row, of.position] for row, (of, _) in enumerate(some)])
    expected = choose(guess_RV, [of.job for of, _ in some], [of.position + 2 for of, _ in some])
    assert [of.tokens[1] for of, _ in some] == expected
    return len(known)


def test_a_schedule_gives_what_the_whole_model_gives() -> None:
    """Tokens, drafts and the module's cache, against whole texts in their training form."""
    config = config_of("plain", (1, 1, 1))
    with on_mesh(config):
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
    with on_mesh(config):
        model = guessing_model(config)
        plain, drafting = (Generator(config, model, speculate=how) for how in (None, Speculation(tokens, least=0.0)))
        positions = max(POSITIONS, LENGTH * int(np.prod(mesh[:4])))
        alone = Alone(plain, plain.engine(SLOTS, (), positions, reuse=False, **SIZES))
        engine = drafting.engine(SLOTS, (), positions, **SIZES)
        seen = watch(engine)
        for seed in seeds:
            plans = schedule(seed)
            jobs = play(drafting, engine, plans)
            assert_as_alone(jobs, plans, alone)
            assert not any(job.reused for job in jobs)  # a page's last token was not read by the module
        assert assert_as_in_training(model, seen) > 20 * len(seeds)
    assert drafting.drafts is not None
    assert 0 < drafting.drafts.accepted < drafting.drafts.drafted


@pytest.mark.full
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_weights_of_fewer_bits_that_are_consumed_and_gathered(weights: str) -> None:
    """The module's are kept like the model's, and the model's arrays are freed."""
    config = config_of("plain", (2, 1, 1, 1, True), mtp_modules=2)
    requests = [Request(WORDS[5 * i : 7 * i + 4], Sampling(12, float(i % 2), ignore_eos=True)) for i in range(6)]
    with on_mesh(config):
        texts, generators = [], []
        for how in (None, Speculation(3, least=0.0)):
            model = guessing_model(config)
            generator = Generator(config, model, consume=True, weights=weights, speculate=how)
            texts.append([completion.tokens for completion in generator.generate(requests)])
            generators.append(generator)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model))
    assert texts[0] == texts[1]
    plain, drafting = generators
    assert plain.drafts is None and plain._decoder.next_tokens is None
    assert drafting.drafts is not None and 0 < drafting.drafts.accepted < drafting.drafts.drafted
    module = drafting._decoder.next_tokens
    assert module is not None
    w = module.projection.w_DF.get_value()
    assert isinstance(w, Int8) == (weights == "int8")
    for leaf in jax.tree.leaves(w):
        assert leaf.shape[0] == 1 and not axes_of(spec_of(leaf))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(w)} == ({"int8", "float32"} if weights == "int8" else {weights})


def test_who_drafts() -> None:
    """The module where there is one, unless the experts of each rank are asked for."""
    with on_mesh(config := config_of("plain", (1, 1, 2))):
        plain = config_of("plain", (1, 1, 2), mtp_modules=0)
        by_module = [
            [
                Speculation(tokens, by=by).by_module(of)
                for tokens, by in ((2, "auto"), (2, "mtp"), (2, "local"), (0, "mtp"))
            ]
            for of in (config, plain)
        ]
        assert by_module == [[True, True, False, False], [False, True, False, False]]
        for how in (Speculation(2), Speculation(2, 3, by="local"), Speculation(0, 9)):
            how.check(config)
        with pytest.raises(
            ConfigError, match=r"draft_with=mtp needs a next-token module, and model\.mtp_modules=0; use"
        ):
            Speculation(2, by="mtp").check(plain)
        with pytest.raises(
            ConfigError, match=r"draft_with=mtp says how tokens are drafted, and speculate=0 drafts none"
        ):
            Speculation(0, by="mtp").check(config)
        with pytest.raises(
            ConfigError, match="local_experts=3 is for drafts by the experts of each rank, and a next-t"
        ):
            Speculation(2, 3).check(config)
    with pytest.raises(ConfigError, match="draft_with='eagle' must be one of auto, mtp, local"):
        Speculation(2, by="eagle")
    with on_mesh(config := config_of("dense", (1, 1, 1))):
        Speculation(2).check(config)
