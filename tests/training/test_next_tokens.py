"""Next-token modules (model.mtp_modules): their loss and all gradients are those of a float64 reference that computes
each document alone, on any mesh and with any number of parts; what does not train knows nothing of them."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import (  # fmt: skip
    abstract_model,
    assert_close,
    leaves,
    on_mesh,
    random_model,
    random_tokens,
    split_batch,
    split_tokens,
    tiny,
)
from safetensors.numpy import load_file

from bigmac_jax.config import Config, ConfigError, MeshConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.config.reads import unread_for
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.inference.kv_cache import make_decoder
from bigmac_jax.interchange import export_model, import_model
from bigmac_jax.model.counts import flops, parameters
from bigmac_jax.model.layers import dropout
from bigmac_jax.model.mesh import ExpertGroup, make_mesh
from bigmac_jax.model.next_tokens import NextTokens, look_ahead
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.model.traffic import exchange_traffic, tensor_bytes
from bigmac_jax.model.transformer import init_model, without_next_tokens
from bigmac_jax.planning import compiled_programs
from bigmac_jax.planning.shapes import Shape
from bigmac_jax.run import loop
from bigmac_jax.training.loss import WHOLE, loss_fn
from bigmac_jax.training.programs import evaluate
from bigmac_jax.training.step import TrainState, make_trainer, split_model
from bigmac_jax.tuning import restore
from bigmac_jax.tuning.pretrained import compare_models, load_parameters, open_pretrained

from .tools import leaves_of, read_records, session, small

B, L = 8, 8


def expected(*arguments: Any, **options: Any) -> Any:
    pytest.importorskip("torch")  # the reference is PyTorch's gradients in float64
    from . import next_tokens_reference

    return next_tokens_reference.expected(*arguments, **options)


MODELS: dict[str, dict[str, Any]] = {
    "experts": {"z_loss_coefficient": 0.1, "num_layers": 1},
    "dense": {"structure": "dense", "positions": "learned", "tie_embeddings": False, "norm": "layernorm"},
    "bias": {"balance": "bias", "qk_norm": False, "tie_embeddings": False, "scale_embedding": False},
}
PLAIN = (1, 1, 1)


def config_of(
    model: str, mesh: tuple[Any, ...] = PLAIN, documents: bool = True, modules: int = 2, **fields: Any
) -> Config:
    train = TrainConfig(**{name: fields.pop(name) for name in ("accumulate_steps", "mtp_weight") if name in fields})
    config = tiny(mesh, batch=B, length=L, mtp_modules=modules, **(MODELS[model] | fields))
    data = dataclasses.replace(config.data, documents="masked" if documents else "stream")
    return dataclasses.replace(config, data=data, train=train)


def batch_of(config: Config) -> Batch:
    """Rows of two to four documents, some of one token; a quarter of the targets does not count, and in a third of the
    rows the end is padding."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(config.model.vocab_size, size=(B, L + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    if not config.has_segments:
        return Batch(inputs, targets)
    segments = np.sort(draw.integers(3, size=(B, L)), axis=1).astype(np.int32)
    segments[::3, 6:] = PADDING
    targets[(draw.random((B, L)) < 0.25) | (segments == PADDING)] = NO_TARGET
    return Batch(inputs, targets, segments)


def documents_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    if batch.segments_BL is None:
        return list(zip(batch.inputs_BL, batch.targets_BL, strict=True))
    rows = zip(batch.inputs_BL, batch.targets_BL, batch.segments_BL, strict=True)
    return [(i[s == d], t[s == d]) for i, t, s in rows for d in np.unique(s) if d != PADDING]


def gradients(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a step finds, and the parameters that it finds it for."""
    with on_mesh(config):
        trainer, model = make_trainer(config, make_mesh(config)), random_model(config)
        _, params, rest = split_model(model)
        step = jax.jit(trainer.gradient)
        batch = jax.tree.map(split_batch, batch_of(config))
        (loss, parts), found = step(TrainState(np.int32(0), params, rest, None), batch)
        values = leaves(model)
    named = {"loss": loss, "cross_entropy": parts.cross_entropy, "next": parts.next_K, **leaves(found)}
    named |= {"load": parts.aux.load} if config.model.is_moe else {}
    return {name: np.asarray(value) for name, value in named.items()}, values


def compiled(config: Config) -> dict[str, Any]:
    target = compiled_programs.Target(jax.devices("cpu")[: config.mesh.data * config.mesh.model_ranks])
    return compiled_programs.describe_programs(config, target, ("step",))["step"]


def check(config: Config) -> None:
    found, values = gradients(config)
    right = expected(config, values, documents_of(batch_of(config)))
    named = {"loss": right.loss, "cross_entropy": right.cross_entropy, "next": right.next_K}
    named |= {"load": right.load_YE} if config.model.is_moe else {}
    named |= {name: value for name, value in right.gradients.items() if name in found}
    # A single number a layer, summed over all tokens with both signs: float32 leaves it fewer digits.
    skips = {name for name in named if name.endswith("skip_1")}
    for name in skips:
        np.testing.assert_allclose(found[name], named[name], rtol=1e-3, atol=1e-6)
    assert_close(
        {n: v for n, v in found.items() if n not in skips}, {n: v for n, v in named.items() if n not in skips}, 5e-5
    )
    assert any(name.startswith("mtp.") for name in found)


@pytest.mark.parametrize(
    ("model", "documents"),
    [
        ("experts", True),
        pytest.param("experts", False, marks=pytest.mark.full),
        pytest.param("dense", True, marks=pytest.mark.full),
        pytest.param("dense", False, marks=pytest.mark.full),
        pytest.param("bias", True, marks=pytest.mark.full),
    ],
)
def test_equals_float64(model: str, documents: bool) -> None:
    check(config_of(model, documents=documents))


@pytest.mark.full
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ((1, 1, 2), {}),
        ((1, 2, 2), {"exchange": "hierarchical"}),
        ((1, 1, 1, 2), {}),
        ((1, 1, 2, 2, False, True), {"remat": "exchange"}),
        ((2, 1, 1, 1, True), {}),
        ((2, 1, 2, 1, True), {"remat": "layer", "accumulate_steps": 2}),
        (PLAIN, {"accumulate_steps": 4}),
        (PLAIN, {"accumulate_steps": 2, "mtp_weight": 1.5}),
        (PLAIN, {"num_layers": 3, "modules": 1}),
        ("replicas", {}),
    ],
)
def test_meshes_and_parts_equal_float64(mesh: Any, fields: dict[str, Any], documents: bool) -> None:
    config = config_of("experts", PLAIN if mesh == "replicas" else mesh, documents, **fields)
    if mesh == "replicas":
        config = dataclasses.replace(config, mesh=MeshConfig(data=2, replica=2))
    check(config)


@pytest.mark.full
def test_the_model_begins_as_it_would_without() -> None:
    """Its parameters, bit by bit; the modules' are named behind `mtp.`."""
    config = config_of("bias")
    with on_mesh(config):
        model = init_model(config, jax.random.key(3))
        without = leaves(init_model(without_next_tokens(config, model)[0], jax.random.key(3)))
        found = leaves(model)
    assert {name for name in found if not name.startswith("mtp.")} == set(without)
    for name, value in without.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name in ("embedding_norm.scale_D", "hidden_norm.scale_D", "final_norm.scale_D", "layers.mlp.router_DE"):
        assert found[f"mtp.{name}"].shape[:2] == (2, 16)
    first, second = found["mtp.projection.w_DF"]
    assert first.shape == (32, 16) and (first != second).any()


@pytest.mark.parametrize("fields", [{}, {"mtp_blocks": "*-"}])
def test_the_model_without_them_is_the_rest(fields: dict[str, Any]) -> None:
    """The same arrays, of a config that asks for no module."""
    config = config_of("bias", **fields)
    with on_mesh(config):
        model = abstract_model(config)
        plain, without = without_next_tokens(config, model)
        again = without_next_tokens(plain, without)
    found, left = named_leaves(model), named_leaves(without)
    assert (plain.model.mtp_modules, plain.model.mtp_blocks) == (0, "") and again[0] is plain and again[1] is without
    assert left.keys() == {name for name in found if not name.startswith("mtp.")} < found.keys()
    assert all(left[name] is found[name] for name in left)


@pytest.mark.full
@pytest.mark.parametrize("fields", [{}, {"balance": "quantile", "mtp_blocks": "*-"}, {"structure": "dense"}])
def test_evaluation_and_decoding_leave_them_out(fields: dict[str, Any]) -> None:
    """Scores are those of the model without them; the compiled evaluation is not given them, nor is a decoder."""
    config = config_of("bias", **fields)
    with on_mesh(config):
        model = random_model(config)
        plain, without = without_next_tokens(config, model)
        batch = jax.tree.map(split_batch, batch_of(config))
        found, expected_scores = (jax.tree.map(np.asarray, evaluate(of, batch)) for of in (model, without))
        jax.tree.map(np.testing.assert_array_equal, found, expected_scores)
        decoder = make_decoder(config, model)
        assert plain.model.mtp_modules == 0 and not any("mtp" in name for name in named_leaves(decoder))
        sizes = [
            evaluate.lower(of, batch).compile().memory_analysis().argument_size_in_bytes for of in (model, without)
        ]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("documents", [False, True])
def test_what_a_module_sees_of_a_batch(documents: bool) -> None:
    """By hand: what stands one and two tokens on; in another document, or behind the window, is nothing to learn."""
    config, none, padding = tiny(batch=2, length=6), NO_TARGET, PADDING
    inputs, targets = [[10, 11, 12, 13, 14, 15]], [[11, 12, none, 14, 15, 16]]
    segments = [[0, 0, 0, 1, 1, padding]]
    with on_mesh(config):
        rows = [split_batch(np.array(2 * v, np.int32)) for v in (inputs, targets, segments)]
        batch = Batch(*rows[: 3 if documents else 2])
        found = [[np.asarray(v) for v in look_ahead(batch, by)[:3]] for by in (1, 2)]
    assert all(v.shape == (2, 6) and (v[0] == v[1]).all() for of in found for v in of)
    ahead = [[v[0].tolist() for v in of] for of in found]
    (_, *one), (_, *two) = ahead
    if documents:
        assert one == [[12, none, none, 15, none, none], [0, 0, padding, 1, padding, padding]]
        assert two == [[none, none, none, none, none, none], [0, padding, padding, padding, padding, padding]]
    else:
        assert one == [[12, none, 14, 15, 16, none], [0] * 5 + [padding]]
        assert two == [[none, 14, 15, 16, none, none], [0] * 4 + [padding] * 2]
    for by, (read, _, seen) in enumerate(ahead, 1):
        real = [at for at, segment in enumerate(seen) if segment != padding]
        assert [read[at] for at in real] == [inputs[0][at + by] for at in real]


def test_what_a_module_gives_its_layer() -> None:
    """What it reads, with dropout, before the features, each behind a norm of its own. The layer trains (choices may be
    dropped), has a key of its own, and gets documents, padding and choices as they are."""
    config, given = tiny(num_layers=1, mtp_modules=1, dropout=0.5), list[Any]()

    def layer(*arguments: Any) -> Any:
        given.extend(arguments)
        return arguments[0], None

    others: Any = tuple(object() for _ in range(3))
    draw, key = np.random.default_rng(0).standard_normal, jax.random.key(5)
    x_BLD, read_BLD = draw((2, 8, 8, 16)).astype(np.float32)
    scales = 1 + 0.5 * draw((2, 16)).astype(np.float32)
    of_embedding, of_layer = jax.random.split(key)
    with on_mesh(config):
        module = NextTokens(config, lambda key: layer, jax.random.key(0))  # type: ignore[arg-type, return-value]
        for norm, scale in zip((module.embedding_norm, module.hidden_norm), scales, strict=True):
            norm.scale_D.set_value(jax.device_put(scale, norm.scale_D.get_value().sharding))
        module(split_tokens(x_BLD), split_tokens(read_BLD), key, *others)
        read_BLD = np.asarray(dropout(split_tokens(read_BLD), 0.5, of_embedding))
        w_XD = np.asarray(module.projection.w_DF.get_value())
    halves = [
        v / np.sqrt(np.square(v).mean(-1, keepdims=True) + 1e-6) * scale
        for v, scale in zip((read_BLD, x_BLD), scales, strict=True)
    ]
    np.testing.assert_allclose(given[0], np.concatenate(halves, -1) @ w_XD, atol=1e-5)
    assert given[1] == of_layer and given[2:] == [False, *others]


@pytest.mark.full
def test_dropout_is_drawn_for_them() -> None:
    """Another key changes their loss; of the same key it is the same."""
    config = config_of("experts", dropout=0.5)
    with on_mesh(config):
        model, batch = random_model(config), jax.tree.map(split_batch, batch_of(config))
        step = jax.jit(lambda key: loss_fn(model, batch, key, share=WHOLE)[1].next_KU)
        one, again, other = (np.asarray(step(jax.random.key(seed))) for seed in (0, 0, 1))
        still = np.asarray(jax.jit(lambda: loss_fn(model, batch, dropout_key=None, share=WHOLE)[1].next_KU)())
    np.testing.assert_array_equal(one, again)
    assert (one != other).all() and (one != still).all()


@pytest.mark.full
@pytest.mark.parametrize("balance", ["bias", "quantile"])
def test_the_routers_bias_moves_by_the_modules_own_load(balance: str) -> None:
    config = config_of("bias", documents=False, balance=balance)
    with on_mesh(config), session(config) as running:
        before = leaves(running.state.rest)["mtp.layers.mlp.router_bias_E"]
        metrics = running.step(random_tokens(config))
        after = leaves(running.state.rest)["mtp.layers.mlp.router_bias_E"]
    load_KE = metrics.parts.aux.load[config.model.moe_layers :]
    assert load_KE.shape == after.shape == (2, 8)
    if balance == "bias":
        np.testing.assert_allclose(after - before, 0.001 * np.sign(1 / 8 - load_KE), atol=1e-7)
    else:
        assert (after != before).all() and abs(after.mean(-1)).max() < 1e-6


@pytest.mark.full
def test_a_run_says_their_loss_and_resumes_bit_equal(tmp_path: pathlib.Path) -> None:
    """`loss` and perplexity are of the model alone (`cross_entropy`, which the reference checks)."""
    fields = ["model.mtp_modules=2", "model.balance=bias", "model.dropout=0.1", "optimizer.schedule=constant"]
    config = small(tmp_path, *fields)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir, steps in ((whole, 6), (parts, 4), (parts, 6)):
        with jax.set_mesh(make_mesh(config)):
            train = dataclasses.replace(config.train, steps=steps)
            result = loop.train(dataclasses.replace(config, train=train), workdir)
    assert result.step == 6
    for name, value in leaves_of(config, whole, 6).items():
        np.testing.assert_array_equal(leaves_of(config, parts, 6)[name], value, err_msg=name)
    records = [record for record in read_records(whole) if "loss" in record]
    for record in records:
        assert record["mtp/loss"] == pytest.approx((record["mtp/loss_1"] + record["mtp/loss_2"]) / 2)
        assert record["perplexity"] == pytest.approx(np.exp(record["loss"])) and len(record["moe/load"]) == 3
    assert records[0]["mtp/loss"] > records[-1]["mtp/loss"]
    with jax.set_mesh(make_mesh(config)):
        _, model = restore(whole, config=config)
        assert any(name.startswith("mtp") for name in named_leaves(model))
        # A run that begins with it can leave them out, and says so.
        plain, without = without_next_tokens(config, model)
        origin = open_pretrained(str(whole))
        assert compare_models(origin, plain) == ["model.mtp_modules 2 → 0"]
        begun = leaves(load_parameters(origin, plain)[0])
        assert begun
        for name, value in begun.items():
            np.testing.assert_array_equal(value, leaves(without)[name], err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ((1, 1, 4), {}),
        ((1, 1, 4), {"mtp_blocks": "*-", "dense_hidden_size": 24}),
        ((1, 1, 1), {"structure": "dense", "capacity_factor": 1.0}),
        ((1, 1, 4), {"blocks": "*-*E", "num_layers": 1, "dense_hidden_size": 24}),
    ],
)
def test_counts_are_the_compiled_steps(mesh: tuple[Any, ...], fields: dict[str, Any]) -> None:
    given = {"capacity_factor": 1.0, "num_experts": 8, "top_k": 2, "attention": "xla", "mtp_modules": 2}
    config = tiny(mesh, **given | fields)
    found = compiled(config)
    assert found["flops_per_step"] == sum(flops(config).values())
    group = ExpertGroup((1, mesh[2]), "cpu", "cpu")
    assert found["exchange_sent_bytes"] == round(sum(exchange_traffic(config, mesh[2], group).padded))
    tokens, shape = config.data.batch_size * L, Shape.of(config)
    assert shape.mtp == 2 and 3 * tokens * shape.flops(L, causal=False) == sum(flops(config).values())
    with on_mesh(config):
        matrices = sum(v.size for n, v in leaves(random_model(config)).items() if "norm" not in n and "skip" not in n)
        assert shape.parameters() == matrices
        assert parameters(config, {"expert": mesh[2]}).total == sum(
            v.size for v in leaves(random_model(config)).values()
        )


@pytest.mark.full
@pytest.mark.parametrize("fields", [{}, {"structure": "dense", "remat": "layer"}])
def test_bytes_over_tensor_are_the_counted_ones(fields: dict[str, Any]) -> None:
    config = tiny((2, 1, 1, 4) if fields else (2, 1, 2, 2), capacity_factor=1.0, mtp_modules=1, **fields)
    rows = [row for row in compiled(config)["collectives"] if row["axes"] == ("tensor",) and row["role"] == "other"]
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "node", "expert", "tensor")}
    counted = tensor_bytes(config, sizes, ExpertGroup((1, config.mesh.expert), "cpu", "cpu"))
    assert sum(row["sent_bytes"] for row in rows if row["kind"] != "all-reduce") == counted


@pytest.mark.full
def test_exports_hold_them_or_say_so(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("experts", documents=False)
    with on_mesh(config):
        model = random_model(config)
        assert export_model(config, model, tmp_path / "plain", format="plain") == "bigmac_jax"
        again, copy = import_model(tmp_path / "plain")
        assert not caplog.records and again.model.mtp_modules == 2
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
        assert "mtp.1.projection.w_DF" in load_file(tmp_path / "plain" / "model.safetensors")
        assert export_model(config, model, tmp_path / "bigmac") == "bigmac"
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("bigmac has no place for next-token modules (model.mtp_modules=2)")
        plain, copy = import_model(tmp_path / "bigmac")
        assert plain.model.mtp_modules == 0
        for name, value in leaves(copy).items():
            np.testing.assert_array_equal(value, leaves(model)[name], err_msg=name)


@pytest.mark.full
def test_adapters_leave_them_alone() -> None:
    config = config_of("bias", documents=False, balance_bias_rate=0.0)
    tuning = TuningConfig(lora_rank=2, train_router=False)
    config = dataclasses.replace(config, tuning=tuning, train=dataclasses.replace(config.train, init_from="x"))
    assert not config.trains_mtp and unread_for(config, "train.mtp_weight") == "tuning.lora_rank=2"
    with on_mesh(config):
        trainer = make_trainer(config, make_mesh(config))
        assert trainer.abstract_state.base is not None
        assert not any("mtp" in name for name in named_leaves(trainer.abstract_state.params))
        assert any("mtp" in name for name in named_leaves(trainer.abstract_state.base))
        begun = trainer.begin(*split_model(random_model(config))[1:], jax.random.key(0))
        batch = jax.tree.map(split_batch, batch_of(config))
        _, metrics = trainer.step(begun, batch, trainer.rate(np.int32(0)))
    assert metrics.parts.next_K is None and len(metrics.parts.aux.load) == 2


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("model.mtp_blocks=*EX", "model.mtp_blocks=*EX may have the letters * M E - ("),
        ("model.mtp_blocks=*E*E", "model.mtp_blocks=*E*E must be one layer, as a next-token module has"),
        ("model.structure=dense model.mtp_blocks=*E", "model.mtp_blocks=*E has experts (E), and model"),
        ("model.mtp_modules=16", "model.mtp_modules=16 must be below data.sequence_length=16, or a window has no"),
        ("train.mtp_weight=0", "train.mtp_weight=0.0 must be above 0"),
        ("tuning.teacher=x", "model.mtp_modules=1 are not trained beside a teacher (tuning.teacher); use"),
        ("tuning.objective=dpo train.init_from=x", "model.mtp_modules=1 are not trained by tuning.objective=dpo; use"),
        ("train.experts_per_checkpoint=2 train.checkpoint_every=2",
         "train.experts_per_checkpoint=2 saves some experts of the model's layers, and next-token modules"),
    ],
)  # fmt: skip
def test_what_they_are_not_for(given: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("tiny", ("model.mtp_modules=1", "data.sequence_length=16", *given.split()))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_what_a_module_has_by_default() -> None:
    """The model's last layer; a dense layer after experts only by its pattern."""

    def blocks(*given: str) -> str:
        return load_config("tiny", ("model.mtp_modules=1", *given)).model.mtp_stack.blocks

    assert blocks() == "*E" and blocks("model.structure=dense") == "*-" and blocks("model.mtp_blocks=*-") == "*-"
    assert blocks("model.blocks=*E**E*-", "model.num_layers=1") == "*-"
