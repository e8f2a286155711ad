"""The most used experts of every layer on the device: requests get the tokens that they get with all experts there, and
which expert stands in which slot is what a loop in NumPy says."""

import copy
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import abstract_layer, on_mesh, random_like, random_model, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.inference import Generator, Sampling, Speculation
from bigmac_jax.inference.int8_weights import Int8
from bigmac_jax.model.mesh import HOST
from bigmac_jax.model.resident import check_resident, host_sharding, in_host, is_resident, with_resident
from bigmac_jax.model.resident_experts import Held, HeldMoE, choose_round, least_used, start_held
from bigmac_jax.model.router import Padding

from .test_engine import LENGTH, POSITIONS, SLOTS, Alone, assert_as_alone, play, schedule
from .test_resident import MODELS, SIZES, assert_evaluates_as_on_the_device, config_of

E, K, LAYERS = 8, 2, 3


class Brute:
    """The slots of one layer, by loops."""

    def __init__(self, slots: int):
        self.slots: list[int] = [-1] * slots
        self.uses = [0] * E
        self.copies = self.rounds = 0

    def step(self, chosen: set[int]) -> None:
        for expert in chosen:
            self.uses[expert] += 1
        left = sorted(chosen, key=lambda expert: (expert not in self.slots, self.uses[expert], expert))
        # Those in slots are as many as fit in the first round, by their numbers.
        here = [expert for expert in range(E) if expert in chosen and expert in self.slots]
        left = here + left[len(here) :]
        while left:
            now, left = left[: len(self.slots)], left[len(self.slots) :]
            for expert in sorted(now):
                if expert not in self.slots:
                    self._put(expert, now)
            self.rounds += 1

    def _put(self, expert: int, now: list[int]) -> None:
        free = [slot for slot, held in enumerate(self.slots) if held not in now]
        least = min(free, key=lambda slot: (self.slots[slot] >= 0 and 1 + self.uses[self.slots[slot]], slot))
        self.slots[least] = expert
        self.copies += 1


def config_of_layer(**fields: Any) -> Config:
    return tiny(num_experts=E, top_k=K, structure="bigmac", num_shared_experts=1, gated=True, use_bias=True, **fields)


class Layers:
    """Layers that are alike but for their experts, with all of these in host memory."""

    def __init__(self, config: Config):
        self.plain = random_like(abstract_layer(config), config)
        scale = np.arange(1, LAYERS + 1, dtype=np.float32)

        def stack(w: Any) -> Any:
            of_layers = jnp.stack([np.asarray(w) * s for s in scale])
            return jax.device_put(jax.device_put(of_layers, jax.NamedSharding(jax.sharding.get_mesh(), _spec(w))))

        self.stacked = jax.tree.map(stack, self.plain.experts)
        self.store = jax.tree.map(lambda w: jax.device_put(w, host_sharding(w)), self.stacked)

    def of(self, layer: int) -> Any:
        plain = copy.copy(self.plain)
        plain.experts = jax.tree.map(lambda w: w[layer], self.stacked)
        return plain

    def without(self) -> Any:
        plain = copy.copy(self.plain)
        plain.experts = None
        return plain


def _spec(w: Any) -> Any:
    return jax.sharding.PartitionSpec(None, *jax.typeof(w).sharding.spec)


def _apply(moe: Any, store: Any, held: Held, x_BLD: Any, padding: Padding) -> tuple[Any, Held, Any]:
    layer = HeldMoE(moe, store, held, lambda tree: tree)
    y_BLD, (stats, held) = layer(x_BLD, True, padding)
    return y_BLD, held, stats


@pytest.mark.parametrize(
    ("slots", "latent_norm"),
    [(3, "post_combine"), *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, "skip"), (7, "gate")))],
)
def test_the_slots_are_those_of_a_loop(slots: int, latent_norm: str) -> None:
    """Of a hundred batches of a few tokens, in layers by turns: y is the layer's with all experts, and the experts in
    slots and their uses are those of a loop. At last nothing is copied for experts that stand there."""
    config, draw = config_of_layer(latent_norm=latent_norm), np.random.default_rng(0)
    with on_mesh(config):
        layers = Layers(config)
        held = jax.jit(start_held, static_argnums=1)(layers.store, slots)
        brute = [Brute(slots) for _ in range(LAYERS)]
        run = jax.jit(_apply)
        plain = jax.jit(lambda moe, x, padding: moe(x, True, padding))
        route = jax.jit(lambda moe, x, padding: moe.route(x, True, padding)[0].experts_BLK)
        of_layers, without = [layers.of(layer) for layer in range(LAYERS)], layers.without()
        # Tokens that are alike choose alike, so that some experts are used more.
        common = draw.standard_normal((4, 1, 16)).astype(np.float32)
        for batch in range(100):
            x_BLD = common[draw.integers(4, size=6), 0][None] + 0.3 * draw.standard_normal((1, 6, 16))
            x_BLD = split_tokens(x_BLD.astype(np.float32))
            padding = Padding.of(split_tokens(draw.random((1, 6)) < draw.choice((0.0, 0.5, 0.9))))
            layer = batch % LAYERS
            held = held._replace(layer=jnp.int32(layer))
            y_BLD, held, stats = run(without, layers.store, held, x_BLD, padding)
            (expected, of_plain), experts_BLK = plain(of_layers[layer], x_BLD, padding), route(without, x_BLD, padding)
            np.testing.assert_allclose(y_BLD, expected, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_array_equal(stats.load, of_plain.load)
            brute[layer].step({int(e) for e in np.asarray(experts_BLK).ravel()} - {E})
            assert np.asarray(held.expert_YN).tolist() == [of.slots for of in brute], batch
            assert np.asarray(held.uses_YE).tolist() == [of.uses for of in brute], batch
        for w_YN, w_YE in zip(held.slots, jax.tree.leaves(layers.stacked), strict=True):
            for layer, of in enumerate(brute):
                np.testing.assert_array_equal(w_YN[layer], np.asarray(w_YE)[layer, of.slots])
        assert sum(of.copies for of in brute) > 30 and (slots > 5 or max(of.rounds for of in brute) > 40)
        # What stands in slots is not read again: in host memory is nothing but NaN now.
        broken = jax.tree.map(lambda w: jax.device_put(jnp.full_like(w, jnp.nan), host_sharding(w)), layers.stacked)
        layer, alone = 0, 0
        while alone < 5:
            x_BLD = split_tokens((common[draw.integers(4), 0] + 0.3 * draw.standard_normal((1, 6, 16))).astype("f4"))
            padding = Padding.of(split_tokens(np.array([[False] + [True] * 5])))
            chosen = {int(e) for e in np.asarray(route(without, x_BLD, padding)).ravel()} - {E}
            after = run(without, broken, held._replace(layer=jnp.int32(layer)), x_BLD, padding)
            if chosen <= set(brute[layer].slots):
                expected = plain(of_layers[layer], x_BLD, padding)[0]
                np.testing.assert_allclose(after[0], expected, atol=1e-5 * np.abs(expected).max())
            else:
                assert np.isnan(after[0]).any()
            alone += chosen <= set(brute[layer].slots) or slots < K
            layer = (layer + 1) % LAYERS


def test_who_leaves() -> None:
    """By hand: six experts, three slots."""
    uses_E, expert_N = jnp.array([9, 4, 4, 0, 7, 8]), jnp.array([0, 2, 1])

    def now(*experts: int) -> Any:
        return jnp.array([expert in experts for expert in range(6)])

    def chosen(left: Any, expert_N: Any = expert_N) -> list[int]:
        return np.flatnonzero(choose_round(left, expert_N, uses_E)).tolist()

    assert least_used(expert_N, uses_E, now(3)) == 1  # experts 2 and 1 are used as often: the first slot
    assert least_used(expert_N, uses_E, now(2, 3)) == 2
    assert least_used(expert_N, uses_E, now(1, 2, 3)) == 0
    assert least_used(expert_N.at[2].set(-1), uses_E, now(3)) == 2  # an empty one first
    assert chosen(now(3, 5)) == [3, 5] and chosen(now()) == []
    assert chosen(now(0, 2, 3, 4, 5)) == [0, 2, 3]  # those that are there, then the least used
    assert chosen(now(4, 5)) == [4, 5]
    assert chosen(now(1, 3, 4, 5), jnp.array([-1, -1, -1])) == [1, 3, 4]
    assert chosen(now(0, 1, 2, 4)) == [0, 1, 2]


def test_greedy_tokens_are_those_of_experts_on_the_device() -> None:
    """Those that the whole model thinks likeliest. No expert is copied, or counted, for a slot without a request."""
    config, prompts = tiny(length=LENGTH, structure="bigmac"), ([200], [5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6])
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    with on_mesh(config):
        model = random_model(config)
        generator = Generator(with_resident(config, experts=3), model)
        engine = generator.engine(SLOTS, (), POSITIONS, **SIZES)
        jobs = [generator.job(prompt, sampling) for prompt in prompts]
        for part in (jobs[:1], jobs[1:]):
            for job in part:
                engine.submit(job)
            while engine.busy:
                engine.step()
            held = engine._state.cache.experts
            assert isinstance(held, Held)
            if part == jobs[:1]:
                assert (np.asarray(held.uses_YE).sum(1) == config.model.top_k * 12).all()  # of the tokens read
        read_BL = np.zeros((len(jobs), LENGTH), np.int32)
        for row_L, prompt, job in zip(read_BL, prompts, jobs, strict=True):
            row_L[: len(prompt) + 12] = [*prompt, *job.text.tokens]
        run = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0].argmax(-1))
        likeliest_BL = np.asarray(run(model, split_tokens(read_BL)))
    expected = [row_L[len(of) - 1 :][:12].tolist() for row_L, of in zip(likeliest_BL, prompts, strict=True)]
    assert [job.text.tokens for job in jobs] == expected and len(set(map(tuple, expected))) == 3


def compare(model: str, experts: int, how: Speculation | None, weights: str, seeds: range) -> int:
    """Plays schedules against each request alone with all experts on the device; how many tokens were compared."""
    config, compared = config_of(model), 0
    with on_mesh(config):
        parameters = random_model(config)
        plain = Generator(config, parameters, weights=weights)
        resident = Generator(with_resident(config, experts=experts), parameters, weights=weights, speculate=how)
        held = resident._decoder.store
        assert (held is not None) == (experts < config.model.expert_count)
        if held is not None:
            assert all(map(in_host, jax.tree.leaves(held)))
            kinds = {type(of) for of in jax.tree.leaves(held, is_leaf=lambda v: isinstance(v, Int8))}
            assert (Int8 in kinds) == (weights == "int8")
        alone = Alone(plain, plain.engine(SLOTS, (), POSITIONS, reuse=False, **SIZES))
        engine = resident.engine(SLOTS, (), POSITIONS, **SIZES)
        for seed in seeds:
            plans = schedule(seed)
            compared += assert_as_alone(play(resident, engine, plans), plans, alone)
        if held is not None:
            of = engine._state.cache.experts
            assert isinstance(of, Held) and {w.sharding.memory_kind for w in of.slots} == {"device"}
            assert all(w.shape[:2] == (config.model.moe_layers, experts) for w in of.slots)
            assert np.asarray(of.expert_YN >= 0).all() and np.asarray(of.uses_YE).max() > 10
    if how:
        assert resident.drafts is not None and resident.drafts.drafted > 0
    return compared


@pytest.mark.full
@pytest.mark.parametrize(("experts", "weights"), [(1, ""), (1, "int8"), (4, ""), (4, "int8"), (7, ""), (8, "")])
def test_joining_requests_and_weights(experts: int, weights: str) -> None:
    assert compare("two stacks", experts, None, weights, range(2)) > 50


@pytest.mark.full
@pytest.mark.parametrize(("model", "experts"), [("two loops", 1), ("dense first", 4), ("one by one", 4)])
def test_any_model(model: str, experts: int) -> None:
    assert compare(model, experts, None, "", range(2)) > 50


@pytest.mark.full
@pytest.mark.parametrize("weights", ["", "int8"])
@pytest.mark.parametrize(("model", "by", "local"), [("two stacks", "local", 5), ("next tokens", "mtp", 0)])
def test_drafts(model: str, by: str, local: int, weights: str) -> None:
    """Drafts take experts from the same slots."""
    for experts in (1, 4):
        assert compare(model, experts, Speculation(3, local, least=0.0, by=by), weights, range(2)) > 50


@pytest.mark.full
@pytest.mark.parametrize(("model", "experts"), list(zip(MODELS, (1, 4, 3, 1, 4), strict=True)))
def test_a_model_in_host_memory_evaluates_as_on_the_device(model: str, experts: int) -> None:
    assert_evaluates_as_on_the_device(with_resident(config_of(model, remat="layer"), experts=experts), 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("asked", [{"experts": 3}, {"layers": 2}])
def test_texts_are_scored(asked: dict[str, int]) -> None:
    """By a model that was made to stand on the device."""
    config = config_of("dense first")
    with on_mesh(config):
        parameters = random_model(config)
        (expected,), (found,) = (
            Generator(with_resident(config, **of), parameters).score(["the peace of the nation"])
            for of in ({"layers": 0}, asked)
        )
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


class _Device(SimpleNamespace):
    def addressable_memories(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(kind="device")]


def test_what_cannot_be_is_one_line() -> None:
    """Before anything is compiled: the device is none of jax's."""
    config = with_resident(config_of("dense first"), experts=2)
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
    check_resident(config, mesh)
    other: Any = SimpleNamespace(devices=np.array([_Device(device_kind="some chip")]), shape={"expert": 1})
    with pytest.raises(ConfigError, match=rf"^resident_experts=2 needs {HOST} .* some chip .*; use .*=0$"):
        check_resident(config, other)
    for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1, 2)):
        with on_mesh(config_of("dense first", sizes)):
            wide = jax.sharding.get_mesh()
        with pytest.raises(ConfigError, match=r"^resident_experts=2 is for one device, .* has 2 \(mesh .* 2\); use "):
            check_resident(config, wide)
        check_resident(with_resident(config, experts=8), wide)  # all of them: as without
    dense = with_resident(tiny(structure="dense"), experts=1)
    with pytest.raises(ConfigError, match=r"^resident_experts=1 is of experts, .*structure=dense has none; .*=0$"):
        check_resident(dense, mesh)
    with pytest.raises(ConfigError, match=r"resident_layers=1 and resident_experts=2 are two ways .* to 0$"):
        with_resident(config, layers=1)
    assert with_resident(config) is config
    assert with_resident(config, 2, 0) == with_resident(config_of("dense first"), layers=2)
    resident = [experts for experts in range(10) if is_resident(with_resident(config, experts=experts))]
    assert resident == list(range(1, 8))
