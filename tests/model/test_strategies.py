"""Every strategy, with the tokens in one part or several, gives the reference's loss and gradients on every mesh."""

import itertools

import numpy as np
import pytest

from bigmac_jax.model.exchange import STRATEGIES

from .test_expert_parallel import check, name
from .tools import PAPER, PRESENT, pairwise, tiny

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
    aux = check(config, {"layers.mlp.router_bias_E": favourites})
    np.testing.assert_allclose(aux.load, [favourites / favourites.sum()] * 2)
