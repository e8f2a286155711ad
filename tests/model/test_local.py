"""The layer whose exchange is a local reshape (benchmarks.local): nothing is sent, shapes and work stay."""

import jax
import pytest

from benchmarks.local import local_exchange
from bigmac_jax.model.exchange.wire import Wire

from .program import layer
from .tools import tiny

SENDS = ("all_to_all", "all_gather", "reduce_scatter", "psum_scatter")


def program(exchange: str, dtype: str) -> tuple[str, list[tuple[int, ...]]]:
    """The traced layer with its gradients, as text, and the shapes that it gives."""
    fields = {"exchange": exchange, "hidden_size": 32, "num_experts": 8, "top_k": 2, "wire_dtype": dtype}
    config = tiny((1, 2, 2), batch=4, length=16, **fields)
    traced = layer(config, gradients=True)
    return str(traced.jaxpr), [leaf.shape for leaf in jax.tree.leaves(traced.out_info)]


@pytest.mark.parametrize(
    ("exchange", "dtype"),
    [*((name, "bfloat16") for name in ("all_to_all", "dedup", "hierarchical", "gather")), ("gather", "float32")],
)
def test_nothing_is_sent_and_shapes_stay(exchange: str, dtype: str) -> None:
    text, shapes = program(exchange, dtype)
    assert any(name in text for name in SENDS)
    with local_exchange():
        local, local_shapes = program(exchange, dtype)
    assert not any(f"{name}[" in local for name in SENDS), exchange
    assert local_shapes == shapes
    assert local.count("dot_general[") == text.count("dot_general[")  # all matmuls are there
    assert "psum" in local  # the sum of the gradients over the ranks is kept


def test_the_exchange_is_back_afterwards() -> None:
    before = dict(vars(Wire))
    with pytest.raises(KeyError), local_exchange():
        assert dict(vars(Wire)) != before
        raise KeyError
    assert dict(vars(Wire)) == before
