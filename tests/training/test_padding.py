"""Parameters with zeros behind them, so that mesh.fsdp splits what its ranks do not divide: the same run as on one
device, from the first draw to an export, and no more on a rank than its share."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model.tools import abstract_model, leaves, on_mesh, random_model, random_tokens, split_batch, tiny

from bigmac_jax.config import Config, ConfigError, OptimizerConfig, TrainConfig, TuningConfig
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.inference.generator import Generator
from bigmac_jax.interchange import export_model, import_model
from bigmac_jax.model.counts import parameters
from bigmac_jax.model.mesh import fully_sharded, make_mesh, names, padded_shape, shard_shape
from bigmac_jax.model.parameters import count_numbers, declared_leaves, named_leaves
from bigmac_jax.model.transformer import init_model
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.partial_checkpoint import Learned
from bigmac_jax.training.step import TrainState, make_trainer, split_model
from bigmac_jax.tuning.conversion.expert_copies import widen

ONE = (1, 1, 1, 1)
# data, node, expert, tensor, fsdp, split_experts. No dimension of a width of 16 is divided by 3.
MESHES = {
    "3": (3, 1, 1, 1, True),
    "3 x ep 2": (3, 1, 2, 1, True),
    "3 x tensor 2": (3, 1, 1, 2, True),
    "3 x ep 2, experts over data and tensor": (3, 1, 1, 2, True, True),
}
SIZES = {"data": 3, "node": 1, "expert": 2, "tensor": 1}


def others(first: str) -> list[Any]:
    return [name if name == first else pytest.param(name, marks=pytest.mark.full) for name in MESHES]


def of(mesh: Any = ONE, optimizer: str = "adamw", parts: int = 1, **fields: Any) -> Config:
    """Twelve rows of eight tokens, and steps that are about as long as the gradients."""
    config = tiny(mesh, batch=12, **fields)
    return dataclasses.replace(
        config,
        optimizer=OptimizerConfig(name=optimizer, learning_rate=0.1, eps=1, warmup_steps=0, average_decay=0.5),
        train=TrainConfig(accumulate_steps=parts),
    )


@pytest.mark.parametrize(
    ("shape", "own", "spec", "padded"),
    [
        ((6, 16), (), P(("data", "expert"), None), (6, 16)),  # 6 divides it: nothing is added
        ((16, 4), (), P(("data", "expert"), None), (18, 4)),  # 12 numbers on a rank; 3 · 6 and 4 · 4 would be more
        ((4, 15), (), P("expert", "data"), (4, 15)),  # two dimensions that are divided
        ((5, 7), (), P(("data", "expert"), None), (6, 7)),
        ((7, 5), (), P(None, ("data", "expert")), (7, 6)),
        ((8, 4, 5), ("expert",), P("expert", None, "data"), (8, 4, 6)),  # experts are not padded, nor is 4 to 6
        ((8, 5), ("expert",), P("expert", "data"), (8, 6)),
        ((8,), ("expert",), P("expert"), (8,)),  # of what is split already nothing more
    ],
)
def test_what_is_split_how(shape: Any, own: Any, spec: P, padded: Any) -> None:
    given = P(*own, *[None] * (len(shape) - len(own)))
    found = fully_sharded(shape, given, SIZES, pads=True)
    split = [[axis for axis in names(entry) if SIZES[axis] > 1] for entry in found]
    assert split == [list(names(entry)) for entry in spec] and padded_shape(shape, found, SIZES) == padded
    without = fully_sharded(shape, given, SIZES)
    assert padded_shape(shape, without, SIZES) == shape
    assert math.prod(shard_shape(shape, found, SIZES)) <= math.prod(shard_shape(shape, without, SIZES))


@pytest.mark.parametrize("name", others("3 x ep 2"))
def test_values_do_not_depend_on_the_zeros_behind_them(name: str) -> None:
    """Every drawn number is that of one device; a rank holds its share, and counts say what it is."""
    one, many = of(), of(MESHES[name])
    with on_mesh(one):
        expected = leaves(init_model(one, jax.random.key(0)))
    with on_mesh(many):
        model = init_model(many, jax.random.key(0))
        _, params, _ = split_model(model)
        drawn, sizes = leaves(model), dict(jax.sharding.get_mesh().shape)
        held, declared = named_leaves(model), declared_leaves(model)
    assert drawn.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_array_equal(drawn[leaf], value, leaf)
    padded = [leaf for leaf in held if held[leaf].shape != declared[leaf].shape]
    assert (
        len(padded) >= 8 and any("experts" in leaf for leaf in padded) and any("attention" in leaf for leaf in padded)
    )
    count = parameters(many, sizes)
    assert count.total == count_numbers(params) == sum(value.size for value in expected.values())
    here = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    assert count.of_a_rank == count.updated_of_a_rank == sum(map(math.prod, here))
    copies = [
        leaf for leaf, w in held.items() if w.ndim > 2 and math.prod(w.sharding.shard_shape(w.shape)) * 3 > w.size
    ]
    assert not copies


def trained(config: Config, steps: int = 2) -> tuple[dict[str, np.ndarray], TrainState]:
    """The state after steps of batches that depend on nothing, by name; `leaves` asserts that zeros are still zeros."""
    with jax.set_mesh(make_mesh(config)):
        trainer = make_trainer(config, jax.sharding.get_mesh())
        _, params, rest = split_model(init_model(config, jax.random.key(0)))
        state = trainer.begin(params, rest, jax.random.key(1))
        for number in range(steps):
            batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config, number)))
            state, metrics = trainer.step(state, batch, trainer.rate(np.int32(number)))
        assert np.isfinite(metrics.loss)
        return leaves(state), state


def check_steps(one: Config, many: Config) -> None:
    expected, _ = trained(one)
    found, state = trained(many)
    held = [leaf.shape for leaf in jax.tree.leaves(state.params)]
    assert held != [value.shape for name, value in found.items() if name.startswith("params")]  # zeros are behind some
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype.kind == "f" and "losses" not in name:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


FEATURES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "parts": 2},
    "adamw": {},
    "what is gathered is gathered again": {"remat": "exchange", "gated": True},
    "layers": {"remat": "layer", "unroll_layers": 2, "num_layers": 4},
    "hyper": {"router": "hyper", "optimizer": "muon"},
    "frozen": {"router": "frozen"},
    "dense": {"structure": "dense", "use_bias": True},
    "moments in host memory": {"offload_optimizer": True},
    "untied, bfloat16 gradients": {"tie_embeddings": False, "norm": "layernorm", "positions": "learned"},
}


@pytest.mark.parametrize("feature", [f if f == "muon" else pytest.param(f, marks=pytest.mark.full) for f in FEATURES])
@pytest.mark.parametrize("name", others("3 x ep 2"))
def test_steps_are_those_of_one_device(name: str, feature: str) -> None:
    fields = FEATURES[feature]
    check_steps(of(**fields), of(MESHES[name], **fields))


@pytest.mark.full
@pytest.mark.parametrize("state", ["copied", "sharded"])
def test_replicas(state: str) -> None:
    many = of((3, 1, 1, 1, True))
    check_steps(
        of(), dataclasses.replace(many, mesh=dataclasses.replace(many.mesh, replica=2, replica_optimizer=state))
    )


@pytest.mark.full
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", MESHES)
def test_adapters(name: str, dropout: float) -> None:
    def tuned(config: Config) -> Config:
        tuning = TuningConfig(lora_rank=2, lora_dropout=dropout, lora_targets="attention,experts,projections")
        return dataclasses.replace(config, tuning=tuning, train=TrainConfig(init_from="some"))

    check_steps(tuned(of()), tuned(of(MESHES[name])))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A state of 3 × 2 ranks that is saved, and its values."""
    workdir, config = tmp_path_factory.mktemp("padded"), of(MESHES["3 x ep 2"])
    with on_mesh(config):
        trainer = make_trainer(config, jax.sharding.get_mesh())
        _, params, rest = split_model(random_model(config))
        state = trainer.begin(params, rest, jax.random.key(1))
        checkpoints = Checkpoints(workdir, keep=1)
        assert checkpoints.save(state, {"batches": 1}, config, 1, None)
        checkpoints.close()
        return workdir, leaves(state)


def restored(workdir: pathlib.Path, config: Config) -> tuple[dict[str, np.ndarray], TrainState]:
    with on_mesh(config):
        checkpoints = Checkpoints(workdir)
        state, _ = checkpoints.restore(1, make_trainer(config, jax.sharding.get_mesh()).abstract_state)
        checkpoints.close()
        return leaves(state), state


@pytest.mark.parametrize("mesh", [ONE, (3, 1, 2, 1, True), (6, 1, 1, 1, True), (2, 1, 2, 1, True)], ids=str)
def test_a_checkpoint_is_read_on_any_mesh(saved: Any, mesh: Any) -> None:
    workdir, expected = saved
    found, _ = restored(workdir, of(mesh))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("mesh", [ONE, (6, 1, 1, 1, True)], ids=str)
def test_no_zeros_hide_another_model(saved: Any, mesh: Any) -> None:
    """The width of 18 is what 16 has become in the file: it is refused by the width that was declared."""
    workdir, _ = saved
    kept = json.loads((workdir / "checkpoints/1/run/metadata").read_text())["padded"]
    assert kept["layers.mlp.router_DE"] == [2, 16, 8]
    wider = of(mesh, num_heads=3, hidden_size=18, down_ratio=2 / 9)
    with pytest.raises(
        ConfigError, match=r"is of another model: its \S+ is \[.*16.*\], the config asks for \[.*18.*\]"
    ):
        restored(workdir, wider)


@pytest.mark.parametrize("then", [ONE, pytest.param((6, 1, 1, 1, True), marks=pytest.mark.full)], ids=str)
def test_some_experts_in_a_save(tmp_path: pathlib.Path, then: Any) -> None:
    """Experts of two saves, of which another mesh reads each bit for bit."""
    config, learned = of(MESHES["3 x ep 2"]), Learned(np.zeros((2, 8)))
    with on_mesh(config):
        trainer = make_trainer(config, jax.sharding.get_mesh())
        _, params, rest = split_model(random_model(config))
        state = trainer.begin(params, rest, jax.random.key(1))
        expected = leaves(state)
        checkpoints = Checkpoints(tmp_path, keep=1)
        for step in (1, 2):
            assert checkpoints.save(state, {"batches": step}, config, step, None, 3, learned)
        checkpoints.close()
    with on_mesh(other := of(then)):
        checkpoints = Checkpoints(tmp_path)
        found, _ = checkpoints.restore(2, make_trainer(other, jax.sharding.get_mesh()).abstract_state)
        checkpoints.close()
        read = leaves(found)
    for name, value in expected.items():
        assert read[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", others("3 x ep 2"))
def test_exports_imports_and_conversions(name: str, tmp_path: pathlib.Path) -> None:
    """Files are those of one device, what is read of them stands as it is trained, and a wider model is the same."""
    one, many = of(gated=True), of(MESHES[name], gated=True)
    wider = []
    for folder, config in (("one", one), ("many", many)):
        with on_mesh(config):
            export_model(config, random_model(config), tmp_path / folder / "out")
            wider.append(leaves(widen(config, random_model(config), 2, 0.0)[1]))
    for file in (tmp_path / "one/out").iterdir():
        assert file.read_bytes() == (tmp_path / "many/out" / file.name).read_bytes(), file.name
    jax.tree.map(np.testing.assert_array_equal, *wider)
    axes = zip(("data", "node", "expert", "tensor", "fsdp", "split_experts"), MESHES[name], strict=False)
    with on_mesh(many):
        _, model = import_model(tmp_path / "one/out", [f"mesh.{axis}={size}" for axis, size in axes])
        for leaf, like in named_leaves(abstract_model(many)).items():
            assert named_leaves(model)[leaf].shape == like.shape, leaf
        jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(random_model(many)))


@pytest.mark.full
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_completions(name: str, consume: bool, weights: str) -> None:
    found = []
    for config in (of(), of(MESHES[name])):
        with on_mesh(config):
            generator = Generator(config, random_model(config), consume=consume, weights=weights, max_length=8)
            found.append([c.tokens for c in generator.generate(["ab", "c"], max_tokens=4)])
    assert found[0] == found[1]
