"""Weights of eight bits: how many bytes they take, what they cost in quality, that decoding computes with them."""

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model.tools import abstract_model, on_mesh, random_model, split_batch, tiny
from training.tools import small, text

from bigmac_jax import restore
from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference import Generator, decoder_weights
from bigmac_jax.inference.int8_weights import Int8, dequantize, quantize, should_quantize
from bigmac_jax.inference.kv_cache import make_decoder
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.parameters import Declaration, map_declared
from bigmac_jax.run.loop import train
from bigmac_jax.training.loss import token_scores


def in_eight_bits(model: Any) -> Any:
    """The model with every weight as eight bits have it."""

    def narrow(of: Any, w: Any) -> Any:
        return dequantize(quantize(of, w), "float32") if should_quantize(of) else w

    return jax.jit(functools.partial(map_declared, narrow))(model)


FSDP = (1, 1, 2, 2, True, True)


@pytest.mark.parametrize(
    ("mesh", "unroll"),
    [pytest.param(*case, marks=pytest.mark.full) for case in ((FSDP, 1), (FSDP, 0), ((1, 1, 1), 0))] + [((1, 1, 1), 1)],
)
def test_decoding_computes_with_them(mesh: tuple[int, ...], unroll: int) -> None:
    """As with the model whose weights were rounded; layers each by itself, and in one loop."""
    config = tiny(mesh, length=32, structure="bigmac", num_shared_experts=1, unroll_layers=unroll, num_kv_heads=2)
    with on_mesh(config):
        model = random_model(config)
        prompts = [tuple(range(60 + i, 66 + i)) for i in range(3)]
        given: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
        found = Generator(config, model, weights="int8").generate(prompts, **given)
        expected = Generator(config, in_eight_bits(model)).generate(prompts, **given)
    for a, b in zip(found, expected, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def nbytes(config: Config, weights: str) -> int:
    with on_mesh(config):
        decoder = jax.eval_shape(functools.partial(make_decoder, config, weights=weights), abstract_model(config))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder))


@pytest.mark.parametrize("name", ["tiny", "small", "nemotron"])
def test_bytes(name: str) -> None:
    config = load_config(f"configs/{name}.py", ("mesh.data=1",))
    half, whole = nbytes(config, "bfloat16"), nbytes(config, "float32")
    assert half <= 0.55 * whole
    assert nbytes(config, "int8") <= 0.53 * half


def test_the_largest_of_a_channel_is_exact() -> None:
    config = tiny()
    with on_mesh(config):
        model = random_model(config)
        eight = jax.tree.leaves(
            map_declared(lambda of, w: quantize(of, w) if should_quantize(of) else w, model),
            is_leaf=lambda v: isinstance(v, Int8),
        )
    matrices = [(w, v) for w, v in zip(jax.tree.leaves(model), eight, strict=True) if isinstance(v, Int8)]
    assert len(matrices) > 5
    for w, v in matrices:
        error = np.abs(np.asarray(w) - np.asarray(v.values) * np.asarray(v.scale))
        assert (error <= np.asarray(v.scale) * 0.5001).all()
        assert v.values.dtype == np.int8 and np.abs(np.asarray(v.values)).max() == 127


@pytest.mark.full
def test_perplexity_stays(tmp_path: pathlib.Path) -> None:
    """Of a model that has learnt something: within half a percent."""
    config = small(tmp_path, "train.steps=60", "train.eval_every=0", "train.checkpoint_every=0", "train.log_every=20")
    with jax.set_mesh(make_mesh(config)):
        train(config, tmp_path / "run")
        _, model = restore(tmp_path / "run")
        ids = ByteTokenizer().encode("".join(text(30, seed=5)))
        windows = np.asarray(ids[: len(ids) // 17 * 17], np.int32).reshape(-1, 17)
        batch = jax.tree.map(split_batch, batch_from_windows(windows))
        score = jax.jit(lambda model, batch: token_scores(model, batch).nll_BL.mean())
        before, after = (float(score(m, batch)) for m in (model, in_eight_bits(model)))
    assert before < 3.5 and before != after
    assert abs(math.exp(after - before) - 1) <= 0.005


def test_other_weights_are_refused() -> None:
    config = tiny()
    with on_mesh(config), pytest.raises(ConfigError, match="weights='int4' must be float32, bfloat16 or int8"):
        make_decoder(config, abstract_model(config), weights="int4")


@pytest.mark.parametrize(
    ("shape", "table", "axis"), [((2, 3), False, -1), ((3, 2), False, -2), ((3, 3), False, -2), ((3, 2), True, -1)]
)
def test_what_a_channel_is(shape: tuple[int, int], table: bool, axis: int) -> None:
    """The shorter dimension of a matrix, an output of a square one, a row of a table; and one of zeros stays zero."""
    w = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(1, *shape) / 127
    w *= np.where(np.arange(math.prod(shape)).reshape(shape) % 2, -1, 1)
    w = np.concatenate([w, 0 * w])
    found = quantize(Declaration("XY", "mlp", 1.0, table=table), w)
    scale = np.abs(w).max(axis, keepdims=True) / 127
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(found.values, np.round(w / np.where(scale == 0, 1, scale)))
    wide = dequantize({"a": found, "b": w}, "bfloat16")
    assert wide["a"].dtype == "bfloat16" and wide["b"] is w
    np.testing.assert_allclose(np.asarray(wide["a"], np.float32), found.values * scale, rtol=2**-8)


def test_what_is_kept_in_eight_bits() -> None:
    kinds = [{}, {"table": True}, {"decays": False}, {"exact": True}, {"small": True}, {"exact": True, "small": True}]
    found = [should_quantize(Declaration("XY", "mlp", 1.0, **kind)) for kind in kinds]
    assert found == [True, True, False, False, False, False]


@pytest.mark.parametrize("layers", [0, 3])
def test_a_decoder_has_no_zeros_behind_a_parameter(layers: int) -> None:
    """Six of eight rows are the parameter's; ranks of `expert` stay apart, those of `data` hold the whole."""
    declared = Declaration("eXY", "experts", 1.0, axes=("expert",), shape=(2, 6, 4))
    w = np.arange((layers or 1) * 2 * 8 * 4, dtype=np.float32).reshape(layers or 1, 2, 8, 4)
    w = w if layers else w[0]
    with on_mesh(tiny((4, 1, 2), batch=8)):
        before = P(*[None] * bool(layers), "expert", "data", None)
        held = decoder_weights._gather(jax.device_put(w, before), declared, "bfloat16")
        assert held.dtype == jax.numpy.bfloat16 and held.sharding.spec[bool(layers)] == "expert"
    np.testing.assert_array_equal(np.asarray(held, np.float32), w[..., :6, :].astype(jax.numpy.bfloat16))
