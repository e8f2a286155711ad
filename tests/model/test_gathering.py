"""What a layer that is not recomputed keeps for its backward pass."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bigmac_jax.model.gathering import all_but_gathered


@pytest.mark.parametrize(
    ("name", "parameters", "kept"),
    [
        ("all_gather", {"axis_name": ("data",)}, False),
        ("all_gather", {"axis_name": ("data", "tensor")}, False),
        ("all_gather", {"axis_name": "expert"}, False),
        ("all_gather", {"axis_name": ("tensor",)}, True),  # of the sequence
        ("pvary", {"axes": ("data",)}, False),
        ("pad", {"padding_config": ((0, 0, 0), (0, -2, 0))}, False),  # cuts off the zeros behind it
        ("pad", {"padding_config": ((0, 0, 0), (0, 2, 0))}, True),
        ("dot_general", {}, True),
        ("psum", {"axis_name": ("data",)}, True),
        ("convert_element_type", {"new_dtype": jnp.dtype("float32")}, False),  # a wider copy
        ("convert_element_type", {"new_dtype": jnp.dtype("bfloat16")}, True),
    ],
)
def test_all_but_gathered_parameters_are_kept(name: str, parameters: dict[str, Any], kept: bool) -> None:
    given = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert all_but_gathered(SimpleNamespace(name=name), given, **parameters) == kept
