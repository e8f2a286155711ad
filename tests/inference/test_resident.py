"""Experts in host memory: a request gets the tokens that it gets with all experts on the device, whatever comes and
goes beside it and however many layers the ring holds."""

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import abstract_model, on_mesh, random_model, random_tokens, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation.tasks.task_jobs import open_jobs, score_jobs
from bigmac_jax.inference import Generator, Speculation
from bigmac_jax.inference.int8_weights import Int8
from bigmac_jax.model.mesh import placed
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.model.resident import (
    HOST,
    Ring,
    check_resident,
    compute_with_ring,
    experts_in_host,
    hold,
    holds_experts,
    in_host,
    is_resident,
    lacks_experts,
    order_of_layers,
    placed_in_host,
    take_layer,
    with_resident,
)

from .test_engine import CHUNK, LENGTH, PAGE, POSITIONS, SLOTS, Alone, assert_as_alone, play, schedule

SIZES: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
# Four layers with experts in two stacks of one loop, with a layer without between; layers with experts in two loops.
MODELS: dict[str, dict[str, Any]] = {
    "two stacks": {"blocks": "*E*-*E", "num_layers": 2},
    "two loops": {"blocks": "*EM-M-*E*E", "num_layers": 1, "mamba_head_dim": 4},
    "dense first": {"num_layers": 4, "first_dense_layers": 1},
    "one by one": {"num_layers": 4, "first_dense_layers": 1, "unroll_layers": 0},  # as on CPU by default
    "next tokens": {"num_layers": 3, "mtp_modules": 1},
}


def config_of(model: str, mesh: tuple[int, ...] = (1, 1, 1), **fields: Any) -> Config:
    return tiny(mesh, length=LENGTH, structure="bigmac", num_shared_experts=1, **MODELS[model], **fields)


def compare(model: str, mesh: tuple[int, ...], layers: int, how: Speculation | None, weights: str, seeds: range) -> int:
    """Plays schedules with experts in host memory against each request alone with all on the device; how many tokens
    were compared."""
    config, compared = config_of(model, mesh), 0
    with on_mesh(config):
        parameters = random_model(config)
        plain = Generator(config, parameters, weights=weights)
        resident = Generator(with_resident(config, layers), parameters, weights=weights, speculate=how)
        held = resident._decoder.store
        assert (held is not None) == (layers < config.model.moe_layers)
        if held is not None:
            of_layers = [leaf for leaf in jax.tree.leaves(held) if len(leaf) == config.model.moe_layers]
            assert of_layers == jax.tree.leaves(held) and all(map(in_host, of_layers))
            assert any(isinstance(of, Int8) for of in jax.tree.leaves(held, is_leaf=lambda v: isinstance(v, Int8))) == (
                weights == "int8"
            )
        positions = max(POSITIONS, LENGTH * int(np.prod(mesh)))
        alone = Alone(plain, plain.engine(SLOTS, (), positions, reuse=False, **SIZES))
        engine = resident.engine(SLOTS, (), positions, **SIZES)
        for seed in seeds:
            plans = schedule(seed)
            compared += assert_as_alone(play(resident, engine, plans), plans, alone)
    if how:
        assert resident.drafts is not None and resident.drafts.drafted > 0
    return compared


@pytest.mark.full
def test_joining_requests_get_the_tokens_of_experts_on_the_device() -> None:
    assert compare("two stacks", (1, 1, 1), 3, None, "", range(2)) > 50


@pytest.mark.full
@pytest.mark.parametrize("weights", ["", "int8"])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=["1x1", "2x2"])
def test_any_ring_and_weights(mesh: tuple[int, ...], layers: int, weights: str) -> None:
    assert compare("two stacks", mesh, layers, None, weights, range(3)) > 100


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "mesh"), [("two loops", (1, 1, 1)), ("dense first", (1, 2, 1, 2, True, True)), ("one by one", (1, 1, 2))]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_any_model_and_mesh(model: str, mesh: tuple[int, ...], layers: int) -> None:
    assert compare(model, mesh, layers, None, "", range(2)) > 50


@pytest.mark.full
@pytest.mark.parametrize("weights", ["", "int8"])
@pytest.mark.parametrize(
    ("model", "mesh", "by"),
    [("two stacks", (1, 1, 2), "local"), ("next tokens", (1, 1, 1), "mtp"), ("two loops", (1, 1, 2), "local")],
)
def test_drafts(model: str, mesh: tuple[int, ...], by: str, weights: str) -> None:
    """Drafts go through the same ring, and leave it where the step that verifies them begins."""
    for layers in (1, 2):
        assert compare(model, mesh, layers, Speculation(3, least=0.0, by=by), weights, range(3)) > 100


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_in_host_memory_evaluates_as_on_the_device(model: str, layers: int) -> None:
    _evaluate(model, layers)


@pytest.mark.full
def test_evaluation_goes_through_the_ring() -> None:
    _evaluate("two stacks", 3, (1, 1, 1))


def _evaluate(model: str, layers: int, mesh: tuple[int, ...] = (1, 1, 2)) -> None:
    of_plain = assert_evaluates_as_on_the_device(with_resident(config_of(model, mesh), layers), 1e-6)
    assert np.ptp(of_plain.load, axis=0).max() > 0  # layers differ


def assert_evaluates_as_on_the_device(config: Config, tolerance: float) -> Any:
    """Compares logits, to a share of the largest one, and loads → the statistics of the model on the device."""
    with on_mesh(config):
        given = random_model(config)
        held = hold(config, given)
        assert all(in_host(leaf) for leaf in jax.tree.leaves(held.resident))
        tokens_BL = split_tokens(random_tokens(config)[:, :-1])
        run = jax.jit(lambda model, tokens: model(tokens, evaluating=True))
        (expected, of_plain), (found, of_held) = run(given, tokens_BL), run(held, tokens_BL)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(of_held.load, of_plain.load)
    return of_plain


@pytest.mark.full
def test_a_task_is_answered_and_scored_with_experts_in_host_memory(tmp_path: pathlib.Path) -> None:
    """Of one command: what writes holds the model itself, what scores is given a held one."""
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "2"}')
    written = 'kind = "generate"\nprompt = "{q} ="\nanswer = "{a}"\nmax_tokens = 2\n'
    for name, fields in (("written", written), ("text", 'kind = "perplexity"\ntext = "q"\n')):
        columns = 'source = "rows.jsonl"\n[columns]\nq = "q"\na = "a"'
        (tmp_path / f"{name}.toml").write_text(fields + columns)
    config, found = config_of("one by one"), list[dict[str, Any]]()
    for layers in (0, 1):
        with on_mesh(config):
            given = random_model(with_resident(config, layers))
            names = [str(tmp_path / f"{name}.toml") for name in ("written", "text")]
            jobs = open_jobs(names, [], 0, config, ByteTokenizer(), LENGTH)
            found.append(score_jobs(jobs, given, ByteTokenizer(), tmp_path / str(layers), "", LENGTH, 1))
    assert found[1]["written"] == found[0]["written"]
    assert found[1]["text"]["perplexity"] == pytest.approx(found[0]["text"]["perplexity"], rel=1e-5)


def test_the_order_of_layers() -> None:
    """By hand: which stack, and which place there, each layer with experts has."""
    orders = {
        "two stacks": [(0, 0), (1, 0), (0, 1), (1, 1)],
        "two loops": [(0, 0), (1, 0), (1, 1)],
        "dense first": [(0, 0), (0, 1), (0, 2)],
        "one by one": [(0, 0), (0, 1), (0, 2)],
        "next tokens": [(0, 0), (0, 1), (0, 2)],
    }
    assert {model: order_of_layers(config_of(model)) for model in MODELS} == orders


def test_abstract_experts_stand_in_host_memory() -> None:
    """Those of layers and of nothing else, split as they were; a tree that is placed there stands there whole."""
    config = config_of("next tokens", (2, 1, 2, 1, True))
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
        given = placed(abstract_model(config), mesh)
    before, found = named_leaves(given), named_leaves(experts_in_host(given, mesh))
    assert {name for name in found if found[name].sharding.memory_kind == HOST} == {
        "layers.mlp.experts.w_in_eRF", "layers.mlp.experts.w_out_eFR"
    }  # fmt: skip
    assert "mtp.layers.mlp.experts.w_in_eRF" in before
    everywhere = named_leaves(placed_in_host(given, mesh))
    for name, leaf in before.items():
        for other in (found[name], everywhere[name]):
            assert (other.shape, other.dtype, other.sharding.spec) == (leaf.shape, leaf.dtype, leaf.sharding.spec)
        assert everywhere[name].sharding.memory_kind == HOST and found[name].sharding.mesh == mesh


@pytest.mark.parametrize(("layers", "experts"), [*((n, 0) for n in range(5)), (0, 1), (0, 7), (0, 8), (0, 9)])
def test_who_has_experts_in_host_memory(layers: int, experts: int) -> None:
    """Of three layers with eight experts each, whoever asks for fewer, and for one at least; no dense model."""
    config = with_resident(config_of("next tokens"), layers, experts)
    assert is_resident(config) == ((layers, experts) in [(1, 0), (2, 0), (0, 1), (0, 7)])
    assert holds_experts(config) == (experts in (1, 7))
    assert not is_resident(with_resident(tiny(structure="dense"), layers, 0))


def test_what_stands_on_the_device_is_the_ring() -> None:
    config = with_resident(config_of("dense first"), 2)
    with on_mesh(config):
        given = random_model(config)
        generator = Generator(config, given)
        engine = generator.engine(SLOTS, (), POSITIONS, **SIZES)
        store, (ring,) = generator._decoder.store, _rings(engine._state)
        w_yeRF, slots_keRF = (jax.tree.leaves(tree)[0] for tree in (store, ring.slots))
        assert w_yeRF.sharding.memory_kind == HOST and slots_keRF.sharding.memory_kind == "device"
        assert (len(w_yeRF), len(slots_keRF)) == (3, 2)
        for layer in range(2):
            np.testing.assert_array_equal(slots_keRF[layer], take_layer(w_yeRF, layer))
        layers = [layer for group in generator._decoder.groups for layer in group]
        assert [lacks_experts(layer) for layer in layers] == [False, True]
    assert not is_resident(with_resident(config, 3)) and not is_resident(with_resident(config, 0))


def _rings(state: Any) -> list[Ring]:
    return [of for of in jax.tree.leaves(state, is_leaf=lambda of: isinstance(of, Ring)) if isinstance(of, Ring)]


class _Device(SimpleNamespace):
    def addressable_memories(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(kind="device")]


def test_what_cannot_be_is_one_line() -> None:
    """Before anything is compiled: the device is none of jax's."""
    config = with_resident(config_of("dense first"), 2)
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
    other: Any = SimpleNamespace(devices=np.array([_Device(device_kind="some chip")]))
    check_resident(config, mesh)
    check_resident(with_resident(config, 0), other)
    with pytest.raises(ConfigError, match=r"^resident_layers=2 needs .* some chip has device alone; use .*=0$"):
        check_resident(config, other)
    dense = with_resident(tiny(structure="dense"), 1)
    with pytest.raises(ConfigError, match=r"^resident_layers=1 is of experts, .*structure=dense has none; .*=0$"):
        check_resident(dense, mesh)
    with on_mesh(dense), pytest.raises(ConfigError, match="resident_layers=1"):
        Generator(dense, random_model(dense))


def test_the_config_keeps_its_own_where_no_flag_is_given() -> None:
    config = with_resident(config_of("dense first"), 2)
    assert with_resident(config, None) is config
    assert dataclasses.replace(config, execution=config_of("dense first").execution) == with_resident(config, 0)


def test_a_layer_of_another_kind_lacks_no_experts() -> None:
    assert not lacks_experts(SimpleNamespace()) and not lacks_experts(SimpleNamespace(mlp=None))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_finds_its_experts_in_the_ring(layers: int) -> None:
    """Round after round: of five layers, of which as many stand in slots."""
    store = {"w": np.arange(10.0, dtype=np.float32).reshape(5, 2)}
    layer = SimpleNamespace(mlp=SimpleNamespace(experts=None))
    ring = Ring({"w": store["w"][:layers]}, np.int32(0), np.int32(0))
    step = jax.jit(lambda store, ring: compute_with_ring(store, ring, layers, layer, lambda it: (it.mlp.experts["w"],)))
    for number in range(12):
        (own,), ring = step(store, ring)
        np.testing.assert_array_equal(own, store["w"][number % 5])
    assert layer.mlp.experts is None
