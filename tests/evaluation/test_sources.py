"""What routers do with a source: counted by hand, padding left out."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import pytest
from model.tools import QUICK, on_mesh, random_model, split_tokens, tiny
from training.tools import quick, text

from bigmac_jax.config import ConfigError
from bigmac_jax.data.pipeline import text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation.perplexity import read
from bigmac_jax.evaluation.sources import Load, open_sources, report, specialisation

LENGTH = 16
CONFIG = {"length": LENGTH, "num_layers": 2, "hidden_size": 16}


def test_specialisation_by_hand() -> None:
    """Nothing where all use the experts alike; log 2 where each of two has its own."""
    alike, own = np.array([[[0.5, 0.5]], [[0.5, 0.5]]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert specialisation(alike).tolist() == [0.0] and specialisation(own) == pytest.approx([math.log(2)])
    half = np.array([[[0.75, 0.25]], [[0.25, 0.75]]])
    assert specialisation(half) == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    assert Load.of(np.array([[0.5, 0.25, 0.25, 0.0]])) == pytest.approx((math.sqrt(0.5), 2.0))


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 1, 4), marks=pytest.mark.full)])
def test_loads_by_hand(mesh: tuple[int, int, int]) -> None:
    """Of whole windows, as the model itself counts them; a last, padded batch is left out."""
    config = tiny(mesh, capacity_factor=0.5, **CONFIG)
    stream = text_stream("".join(text(3, seed=5))[: 3 * 8 * LENGTH + 40], ByteTokenizer())
    tokens = stream.tokens(0, 3 * 8 * LENGTH).reshape(3, 8, LENGTH)
    with quick(), on_mesh(config):
        model = random_model(config)
        call = jax.jit(lambda model, tokens: model(tokens, dropless=True)[1], compiler_options=QUICK)
        auxes = [call(model, split_tokens(part)) for part in tokens]
        reading = read(model, stream, LENGTH, 8)
    load_YE = np.mean([np.asarray(aux.load, np.float64) for aux in auxes], axis=0)
    np.testing.assert_allclose(reading.load_YE, load_YE, rtol=1e-6)
    np.testing.assert_allclose(reading.load_YE.sum(1), 1, rtol=1e-6)
    entropy_Y = np.mean([np.asarray(aux.router_entropy, np.float64) for aux in auxes], axis=0)
    np.testing.assert_allclose(reading.entropy_Y, entropy_Y, rtol=1e-5)
    assert load_YE.std() > 0.005


@pytest.mark.full
def test_padding_of_documents_is_taken_off() -> None:
    """With more rows of padding the loads stay, within the choices that do not divide by the experts."""
    config = tiny(**CONFIG)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, documents="masked"))
    stream = text_stream("".join(text(3, seed=5))[:500], ByteTokenizer())
    with quick(), on_mesh(config):
        model = random_model(config)
        few, many = (read(model, stream, LENGTH, rows) for rows in (32, 64))
    choices = config.model.choices * stream.num_tokens
    np.testing.assert_allclose(few.load_YE, many.load_YE, atol=4 / choices)
    np.testing.assert_allclose(few.entropy_Y, many.entropy_Y, rtol=1e-5)
    assert few.score.loss == pytest.approx(many.score.loss, rel=1e-6)


def test_what_is_scored(tmp_path: pathlib.Path) -> None:
    """A mixture's source at the split, a file as a whole; names that are none are one line."""
    config = tiny(**CONFIG)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}bcd " * 1000)
    data = dataclasses.replace(config.data, tokenizer="bytes", mixture=f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=2")
    config = dataclasses.replace(config, data=data, cache_dir=str(tmp_path / "cache"))
    found = open_sources(config, ["all", f"{tmp_path}/b.txt"], "test", ByteTokenizer())
    assert {name: stream.num_bytes for name, stream in found.items()} == {"a": 246, "b": 246, f"{tmp_path}/b.txt": 5000}
    plain = dataclasses.replace(config, data=dataclasses.replace(data, mixture=""))
    with pytest.raises(ConfigError, match=r"--sources=all is of a run with data\.mixture"):
        open_sources(plain, ["all"], "test", ByteTokenizer())
    with pytest.raises(ConfigError, match=r"--sources='nowhere' is not there"):
        open_sources(plain, ["nowhere"], "test", ByteTokenizer())


def test_a_model_without_experts() -> None:
    config = tiny(structure="dense", **CONFIG)
    with quick(), on_mesh(config):
        reading = read(random_model(config), text_stream("some text", ByteTokenizer()), LENGTH, 4)
    lines, result = report({"a": reading, "b": reading})
    assert len(lines) == 2 and "specialisation" not in result and "load" not in result["sources"]["a"]
