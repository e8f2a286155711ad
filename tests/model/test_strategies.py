"""Every strategy, with the tokens in one part or several, gives the reference's layer and gradients on every mesh."""

import itertools

import numpy as np
import pytest

from bigmac_jax.config import Config
from bigmac_jax.model.exchange import STRATEGIES

from .test_expert_parallel import name
from .tools import PAPER, PRESENT, assert_close, expected_layer_and_gradients, layer_and_gradients, pairwise, tiny

MESHES = ((1, 1, 4), (1, 1, 8), (2, 1, 4), (1, 2, 2), (1, 2, 4))  # data, node, expert
CHUNKS = (1, 2, 4)
MODELS = {
    "bigmac": PRESENT | {"structure": "bigmac", "num_shared_experts": 1},
    "fine_grained": PAPER | {"structure": "fine_grained"},
    "gated": PRESENT | {"structure": "bigmac", "activation": "silu", "gated": True, "use_bias": True},
}
MATMULS = ("loop", "blocks")
COVERING = pairwise(STRATEGIES, MESHES, CHUNKS, MODELS, MATMULS)
REST = sorted(set(itertools.product(STRATEGIES, MESHES, CHUNKS, MODELS, MATMULS)) - set(COVERING))
FIELDS = ("exchange", "mesh", "chunks", "model", "matmul")

Case = tuple[str, tuple[int, int, int], int, str, str]


def run(exchange: str, mesh: tuple[int, int, int], chunks: int, model: str, matmul: str) -> None:
    check(tiny(mesh, exchange=exchange, overlap_chunks=chunks, grouped_matmul=matmul, **MODELS[model]))


def check(config: Config, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Compares with the reference; returns the load."""
    actual, expected = layer_and_gradients(config, given), expected_layer_and_gradients(config, given)
    for bias in actual.keys() & {"router_bias_E"}:  # chooses, and is never differentiated
        assert not actual.pop(bias).any() and not expected.pop(bias).any()
    assert_close(actual, expected)
    return actual["load"]


@pytest.mark.parametrize(FIELDS, COVERING, ids=name)
def test_equals_the_reference(exchange: str, mesh: tuple, chunks: int, model: str, matmul: str) -> None:
    run(exchange, mesh, chunks, model, matmul)


@pytest.mark.full
@pytest.mark.parametrize(FIELDS, REST, ids=name)
def test_equals_the_reference_everywhere(exchange: str, mesh: tuple, chunks: int, model: str, matmul: str) -> None:
    run(exchange, mesh, chunks, model, matmul)


@pytest.mark.parametrize("exchange", STRATEGIES)
def test_every_token_may_choose_the_same_experts(exchange: str) -> None:
    """The worst skew: all rows of all ranks go to one rank."""
    config = tiny((1, 2, 2), exchange=exchange, top_k=2, balance="bias", router_renormalize=False, overlap_chunks=2)
    favourites = np.where((np.arange(8) >= 4) & (np.arange(8) < 6), 100.0, 0.0).astype(np.float32)
    load_E = check(config, {"router_bias_E": favourites})
    np.testing.assert_allclose(load_E, favourites / favourites.sum())
