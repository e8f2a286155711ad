"""Adapters: their gradients against those of the whole matrices on one device, and what is trained, kept and merged."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interchange.tools import MODELS
from jax.sharding import PartitionSpec as P
from model.tools import (
    abstract_model,
    assert_close,
    leaf_name,
    leaves,
    loss_and_gradients,
    on_mesh,
    random_model,
    random_tokens,
    some,
    split_batch,
    tiny,
)
from safetensors.numpy import load_file
from training.tools import session

from bigmac_jax.config import Config, ConfigError, TuningConfig
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model import transformer
from bigmac_jax.model.adapters import adapted, attached, make_adapters
from bigmac_jax.model.parameters import Adapted, declared, named_leaves
from bigmac_jax.model.transformer import init_model
from bigmac_jax.training import step
from bigmac_jax.training.loss import WHOLE, loss_fn
from bigmac_jax.training.restore import Restored
from bigmac_jax.training.step import Trainer, TrainState, build_model, merge_adapters, split_model
from bigmac_jax.tuning.peft import _find_places, export_adapters

ALL = "attention,projections,shared,experts,router"
# data, node, expert, tensor, fsdp, split_experts
MESHES = {
    "1x1": (1, 1, 1, 1),
    "ep 2 x tensor 2, experts split": (1, 1, 2, 2, False, True),
    "2x2": (2, 1, 2, 1),
    "ep 8": (1, 1, 8, 1),
    "2 nodes x 2 x tensor 2, fsdp": (1, 2, 2, 2, True),
}


def with_adapters(mesh: Any = (1, 1, 1, 1), targets: str = ALL, use_bias: bool = False, **tuning: Any) -> Config:
    config = tiny(mesh, num_layers=1, num_shared_experts=1, gated=True, num_kv_heads=2, use_bias=use_bias)
    tuned = TuningConfig(lora_rank=2, lora_alpha=3.0, lora_targets=targets, **tuning)
    return dataclasses.replace(config, tuning=tuned, train=dataclasses.replace(config.train, init_from="some"))


def random_adapters(config: Config, params: nnx.State) -> nnx.State:
    """None of them zero, the same on every mesh."""
    made, draw = make_adapters(config, params, jax.random.key(0)), np.random.default_rng(1).standard_normal
    return jax.tree.map(lambda v: jax.device_put(0.3 * draw(v.shape).astype(np.float32), v.sharding), made)


def loss_of(config: Config, graphdef: Any, rest: Any, tokens: np.ndarray) -> Any:
    def loss(adapters: nnx.State, base: nnx.State) -> Any:
        model = nnx.merge(graphdef, attached(config, base, adapters), rest)
        return loss_fn(model, jax.tree.map(split_batch, batch_from_windows(tokens)), dropout_key=None, share=WHOLE)[0]

    return loss


@pytest.mark.parametrize("name", some(MESHES, every=5))
def test_gradients_are_those_of_the_whole_matrices(name: str) -> None:
    """dW of the merged model on one device gives s dW Bᵀ and s Aᵀ dW, whatever the mesh of the adapters."""
    one, config = with_adapters(), with_adapters(MESHES[name])
    tokens, scale = random_tokens(config), 3.0 / 2
    with on_mesh(config):
        graphdef, params, rest = split_model(random_model(config))
        adapters = random_adapters(config, params)
        step = jax.jit(jax.value_and_grad(loss_of(config, graphdef, rest, tokens)))
        loss, gradients = step(adapters, params)
        ours, pairs = leaves(gradients), leaves(adapters)
        matrices = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
        merged = {
            name.removesuffix(".a"): np.asarray(matrices[name.removesuffix(".a")]) + scale * a @ pairs[name[:-1] + "b"]
            for name, a in pairs.items()
            if name.endswith(".a")
        }
    assert any("experts" in name for name in merged) and any("router" in name for name in merged)
    whole, of_matrices, _ = loss_and_gradients(dataclasses.replace(one, tuning=TuningConfig()), tokens, merged)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    expected = {}
    for name in merged:
        dw = of_matrices[name]
        expected[f"{name}.a"] = scale * dw @ pairs[f"{name}.b"].swapaxes(-1, -2)
        expected[f"{name}.b"] = scale * pairs[f"{name}.a"].swapaxes(-1, -2) @ dw
    assert_close(ours, expected, 3e-5)


@pytest.mark.full
def test_gpus_compute_no_gradient_of_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a loop has several layers, gradients wait on GPU for those of the next layer's parameters: of all that are
    trained, which with adapters none is."""
    base = with_adapters(targets="attention")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, blocks="*EE", num_layers=2))
    tokens, programs = random_tokens(config), []
    with on_mesh(config):
        graphdef, params, rest = split_model(random_model(config))
        adapters = random_adapters(config, params)
        for platform in ("tpu", "gpu"):
            monkeypatch.setattr(transformer, "platform", lambda platform=platform: platform)
            gradient = jax.jit(jax.grad(loss_of(config, graphdef, rest, tokens)))
            programs.append(gradient.lower(adapters, params).compile().as_text().count(" dot("))
    assert programs[0] == programs[1] > 0


def test_what_is_computed_exactly_has_exact_adapters() -> None:
    """Those of the router: their product and both gradients are of float32 on every device, and Muon leaves them."""
    config = with_adapters()
    with on_mesh(config):
        params = jax.eval_shape(lambda: split_model(random_model(config))[1])
        made = nnx.to_flat_state(jax.eval_shape(lambda: make_adapters(config, params, jax.random.key(0))))
    routers = {declared(variable).part == "router": declared(variable) for _, variable in made}
    assert routers[True].exact and not routers[True].hidden_matrix
    assert not routers[False].exact and routers[False].hidden_matrix
    pair = Adapted(*(jnp.ones(shape) for shape in ((4, 3), (4, 2), (2, 3))))
    for exact in (True, False):
        gradient = jax.grad(lambda pair, exact=exact: pair.sum(exact).sum())
        with jax.default_matmul_precision("default"):  # tests have another
            program = str(jax.make_jaxpr(gradient)(pair))
        assert program.count("HIGHEST") == (6 if exact else 0)  # of three products, both inputs


def test_what_is_adapted() -> None:
    config = with_adapters(targets="experts,projections")
    with on_mesh(config):
        params = jax.eval_shape(lambda: split_model(random_model(config))[1])
        names = {".".join(path) for path in adapted(config, params)}
        made = jax.eval_shape(lambda: make_adapters(config, params, jax.random.key(0)))
        shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(made)[0]}
    of_experts = {f"layers.mlp.experts.{name}" for name in ("w_in_eRF", "w_gate_eRF", "w_out_eFR")}
    assert names == of_experts | {"layers.mlp.down.w_DF", "layers.mlp.up.w_DF"}
    # Each of the 8 experts has its own: R = 4, F = 16.
    assert shapes["layers.mlp.experts.w_in_eRF.a"] == (1, 8, 4, 2)
    assert shapes["layers.mlp.experts.w_in_eRF.b"] == (1, 8, 2, 16)
    with pytest.raises(ConfigError, match=r"tuning\.lora_targets=mlp are not in the model"), on_mesh(config):
        adapted(with_adapters(targets="mlp"), params)


def test_what_adapters_begin_as() -> None:
    """b is zero, and a has the variance 1 / 3X of its matrix [X, Y]; each is drawn by itself, and each expert's too."""
    base = with_adapters(targets="experts,router,projections")
    config = dataclasses.replace(base, tuning=dataclasses.replace(base.tuning, lora_rank=4))
    with on_mesh(config):
        params = jax.eval_shape(lambda: split_model(random_model(config))[1])
        made = nnx.to_flat_state(make_adapters(config, params, jax.random.key(0)))
    of_a = {path[:-1]: (declared(pair), np.asarray(pair.get_value())) for path, pair in made if path[-1] == "a"}
    assert len({tuple(np.argsort(a.ravel()[:16])) for _, a in of_a.values()}) == len(of_a) == 6
    assert all((np.asarray(pair.get_value()) == 0).all() for path, pair in made if path[-1] == "b")
    for of, a in of_a.values():
        deviation = 1 / np.sqrt(3 * a.shape[-2])
        assert of.value == pytest.approx(deviation) and a.std() == pytest.approx(deviation, rel=0.3)
        assert of.dims[-1] == "r" and of.shape[-1] == 4 and not of.constant
    (experts,) = (a for path, (_, a) in of_a.items() if path[-1] == "w_in_eRF")
    assert len({expert.tobytes() for expert in experts[0]}) == 8


@pytest.mark.parametrize("mesh", ["ep 2 x tensor 2, experts split", "2 nodes x 2 x tensor 2, fsdp"])
def test_adapters_stand_as_their_matrices(mesh: str) -> None:
    """a as the rows, b as the columns; declared of the same part, and as exact."""
    config = with_adapters(MESHES[mesh], targets="attention,experts,router")
    with on_mesh(config):
        params = jax.eval_shape(lambda: split_model(init_model(config, jax.random.key(0)))[1])
        made = nnx.to_flat_state(jax.eval_shape(lambda: make_adapters(config, params, jax.random.key(0))))
    matrices = dict(nnx.to_flat_state(params))
    for (*path, kind), pair in made:
        w, of, matrix = matrices[tuple(path)].get_value(), declared(pair), declared(matrices[tuple(path)])
        (*leading, rows, columns), (*before, X, Y) = w.sharding.spec, matrix.shape
        dims, first, last = matrix.dims[:-2], matrix.dims[-2], matrix.dims[-1]
        assert (of.part, of.exact, of.constant) == (matrix.part, matrix.exact, kind == "b")
        assert (of.dims, of.shape) == ((dims + first + "r", (*before, X, 2)) if kind == "a" else
                                       (dims + "r" + last, (*before, 2, Y)))  # fmt: skip
        assert kind == "a" or of.value == 0
        spec = pair.get_value().sharding.spec
        assert spec == P(*leading, *((rows, None) if kind == "a" else (None, columns)))
    assert len(made) == 2 * 8 and len({matrices[tuple(path)].get_value().sharding.spec for (*path, _), _ in made}) > 3


def test_biases_are_never_adapted(tmp_path: pathlib.Path) -> None:
    """Experts' biases have two dimensions, as matrices do; PEFT, too, gets the matrices' adapters alone."""
    config = with_adapters(targets="attention,experts", use_bias=True)
    with on_mesh(config):
        graphdef, params, rest = split_model(jax.eval_shape(lambda: random_model(config)))
        shapes = jax.eval_shape(lambda: make_adapters(config, params, jax.random.key(0)))
        adapters = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, np.float32)), shapes)
        names = {name.removesuffix(".a").removesuffix(".b") for name in leaves(adapters)}
        assert {name for name in names if "experts" in name} == {
            f"layers.mlp.experts.{name}" for name in ("w_in_eRF", "w_gate_eRF", "w_out_eFR")
        }
        assert not any("b_" in name for name in names)
        run = Restored(config, graphdef, adapters, rest, params, 1, None)
        export_adapters(run, tmp_path / "adapters", config, lambda: params)
    exported = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(exported) == 2 * len(names)


@pytest.mark.parametrize("name", some(MESHES, every=5))
def test_merged_is_adapted(name: str) -> None:
    """Logits of the model with adapters beside its matrices, and of the one that has them in these."""
    config = with_adapters(MESHES[name])
    biased = dataclasses.replace(config.model, balance="bias", balance_bias_rate=0.0)  # a bias is no parameter
    config = dataclasses.replace(config, model=biased)
    with on_mesh(config):
        graphdef, params, rest = split_model(random_model(config))
        beside = nnx.merge(graphdef, attached(config, params, random_adapters(config, params)), rest)
        tokens, both = split_batch(random_tokens(config)[:, :-1]), (beside, merge_adapters(beside))
        logits = [np.asarray(jax.jit(lambda m, t: m(t)[0])(model, tokens)) for model in both]
        without = np.asarray(jax.jit(lambda m, t: m(t)[0])(nnx.merge(graphdef, params, rest), tokens))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()
    assert np.abs(logits[0] - without).max() > 1e-2 * np.abs(without).max()


def test_the_model_that_is_evaluated_and_the_one_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated is the average of the parameters where there is one, with adapters merged where there are some:
    W + s A B. What learns has lost some of their inputs."""
    config, scale = with_adapters(targets="attention", lora_dropout=0.75), 3.0 / 2
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, balance="bias", balance_bias_rate=0.0))
    with on_mesh(config):
        graphdef, params, rest = split_model(random_model(config))
        adapters = random_adapters(config, params)
        average = jax.tree.map(lambda v: 2 * v, adapters)
        nothing: Any = None
        trainer = Trainer(graphdef, nothing, nothing, nothing, nothing, nothing, nothing, config)
        state = TrainState(np.int32(0), adapters, rest, None, average=average, base=params)  # type: ignore[arg-type]
        found, base, pairs = (leaves(of) for of in (trainer.plain_model(state), params, average))
        adapted_ = {name.removesuffix(".a") for name in pairs if name.endswith(".a")}
        assert len(adapted_) == 4 and len(leaves(rest)) == 1
        expected = leaves(rest) | {
            name: value + scale * pairs[f"{name}.a"] @ pairs[f"{name}.b"] if name in adapted_ else value
            for name, value in base.items()
        }
        assert_close(found, expected)
        whole = dataclasses.replace(config, tuning=TuningConfig())
        alone = dataclasses.replace(state, params=params, average=None, base=None)
        plain = trainer._replace(config=whole).plain_model(alone)
        assert all((value == (base | leaves(rest))[name]).all() for name, value in leaves(plain).items())
        dropped = leaves(build_model(config, graphdef, adapters, state, jax.random.key(3)))
        kept = leaves(attached(config, params, adapters, jax.random.key(3)))
        assert all((dropped[name] == value).all() for name, value in kept.items())
        monkeypatch.setattr(step, "loss_fn", lambda model, *_: leaves(model))
        given: Any = batch_from_windows(random_tokens(config)), jax.random.key(3), WHOLE
        learnt: Any = step._Programs(config).loss(state, adapters, *given)
        assert all((learnt[name] == value).all() for name, value in kept.items())
        # All tokens lose the same inputs of an adapter; the others count for 1 / (1 - p).
        for name, value in leaves(attached(config, params, adapters)).items():
            ratio = kept[name] / value if name.endswith("a") else np.ones(1)
            assert (ratio == ratio[..., :1]).all() and (name.endswith("a") or (kept[name] == value).all())
            assert set(np.unique(ratio)) == ({0, 4} if name.endswith("a") else {1})
        masks = [kept[name] == 0 for name in kept if name.endswith(".a") and len(kept[name][0]) == 16]
        assert 0.6 < np.mean(masks) < 0.9 and len({mask.tobytes() for mask in masks}) == len(masks) == 4


@pytest.mark.full
def test_a_step_moves_adapters_alone() -> None:
    config = with_adapters(MESHES["2x2"], lora_dropout=0.5)
    with on_mesh(config):
        from bigmac_jax.training.step import make_trainer

        trainer = make_trainer(config, jax.sharding.get_mesh())
        _, params, rest = split_model(random_model(config))
        state = trainer.begin(params, rest, jax.random.key(0))
        before, base = leaves(state.params), leaves(state.base)
        batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config)))
        for done in range(2):
            state, _ = trainer.step(state, batch, trainer.rate(done))
        assert leaves(state.base).keys() == base.keys()
        assert all((leaves(state.base)[name] == value).all() for name, value in base.items())
        moved = leaves(state.params)
        assert all((moved[name] != value).any() for name, value in before.items())
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
        adapters = sum(value.size for value in before.values())
        assert 2 * adapters <= moments < 2 * adapters + 10  # Adam's two, and counters


@pytest.mark.full
def test_dropout_is_of_inputs() -> None:
    """All tokens lose the same inputs of an adapter: a's rows are zero or larger by 1 / (1 - p)."""
    config = with_adapters(lora_dropout=0.25)
    with on_mesh(config):
        params = split_model(random_model(config))[1]
        adapters = random_adapters(config, params)
        plain_, dropped = (
            leaves(jax.jit(lambda key: attached(config, params, adapters, key))(key))
            for key in (None, jax.random.key(3))
        )
    name = next(name for name in plain_ if "w_in_eRF" in name and name.endswith("a"))
    ratio = dropped[name] / plain_[name]
    assert set(np.round(np.unique(ratio), 4)) == {0, np.float32(1.3333)}
    assert ((ratio == 0) == (ratio[..., :1] == 0)).all() and 0.1 < (ratio == 0).mean() < 0.45
    assert all((dropped[n] == v).all() for n, v in plain_.items() if not n.endswith("a"))


def test_a_frozen_router_stays_and_does_not_decay() -> None:
    config = tiny(num_layers=1, capacity_factor=1.5)
    config = dataclasses.replace(config, tuning=TuningConfig(train_router=False))
    with session(config) as run:
        before = leaves(run.state.params)
        metrics = run.step(random_tokens(config))
        after = leaves(run.state.params)
    (router,) = (name for name in before if "router" in name)
    assert (after[router] == before[router]).all() and np.isfinite(metrics.loss)
    assert all((after[name] != before[name]).any() for name in before if name != router)


@pytest.mark.parametrize("trained", [True, False])
def test_a_gradient_goes_to_the_router_where_it_is_trained(trained: bool) -> None:
    """Of the sum of all parameters of the model that a step builds: one, or none."""
    config = dataclasses.replace(tiny(num_layers=1), tuning=TuningConfig(train_router=trained))
    with on_mesh(config):
        graphdef, params, rest = split_model(random_model(config))
        state = TrainState(np.int32(0), params, rest, None)  # type: ignore[arg-type]

        def total(params: nnx.State) -> Any:
            return sum(leaf.sum() for leaf in jax.tree.leaves(build_model(config, graphdef, params, state)))

        found = leaves(jax.grad(total)(params))
    for name, value in found.items():
        assert (value == (trained or "router" not in name)).all(), name


def test_places_of_experts_whose_class_has_gate_and_up_in_one() -> None:
    """PEFT adapts one parameter of Qwen's experts where two of ours are, in the class' order, each once."""
    plain: Config = tiny(**MODELS["qwen"])
    train = dataclasses.replace(plain.train, init_from="some")
    tuning = TuningConfig(lora_rank=2, lora_targets="attention,experts")
    config = dataclasses.replace(plain, tuning=tuning, train=train)
    with on_mesh(config):
        _, base, _ = split_model(abstract_model(config))
        adapters = jax.eval_shape(lambda: make_adapters(config, base, jax.random.key(0)))
    found = {place.name: place.parts for place in _find_places(config, named_leaves(adapters), named_leaves(base))}
    layers = range(plain.model.num_layers)
    expected = {f"model.layers.{i}.self_attn.{name}_proj": [name] for i in layers for name in ("q", "k", "v", "o")}
    for i in layers:
        at = f"model.layers.{i}.mlp.experts"
        expected |= {f"{at}.gate_up_proj": ["gate", "up"], f"{at}.down_proj": ["down"]}
    parts = {name: [tensor.name.split(".")[-2].removesuffix("_proj") for tensor in of] for name, of in found.items()}
    assert parts == expected
