"""Where a step's time goes: every part of the model is named, and no instruction is counted twice."""

import jax
import pytest
from model.tools import on_mesh, tiny

from benchmarks.stepper import Stepper
from benchmarks.trace import OTHER, PARTS, breakdown, part_of
from bigmac_jax.planning.hlo import parse


@pytest.mark.full
def test_a_step_is_told_apart() -> None:
    config = tiny(positions="rope", qk_norm=True, num_shared_experts=1)
    with on_mesh(config):
        run = Stepper(config, jax.sharding.get_mesh(), steps=3)
        parts = breakdown(run.compiled, run, run.steps, rate=1e11, bandwidth=1e10)
        seconds = run()
    assert set(PARTS) <= parts.keys()
    products = {name for name, part in parts.items() if part.products}
    assert {"attention", "projection", "experts", "loss"} <= products
    assert all(part.floor > 0 for part in parts.values())
    assert parts[OTHER].products + parts[OTHER].rest < sum(p.products + p.rest for p in parts.values()) / 2
    assert 0 < sum(p.products + p.rest for p in parts.values()) < 8 * seconds


def test_the_innermost_scope_counts() -> None:
    """But a product that another part makes is that part's, and a fusion is what its result is."""
    module = parse(
        """HloModule m
fused (a: f32[8]) -> f32[8] {
  a = f32[8]{0} parameter(0)
  b = f32[8]{0} exponential(a), metadata={op_name="jit(step)/norm/exp"}
  ROOT c = f32[8]{0} negate(b)
}
ENTRY main (x: f32[8]) -> f32[8] {
  x = f32[8]{0} parameter(0)
  one = f32[8]{0} exponential(x), metadata={op_name="jit(step)/experts/rows/exp"}
  two = f32[8]{0} exponential(one), metadata={op_name="jit(step)/transpose(jvp(loss))/projection/exp"}
  three = f32[8]{0} exponential(two), metadata={op_name="jit(step)/projection/exp"}
  four = f32[8]{0} fusion(three), kind=kLoop, calls=fused
  ROOT five = f32[8]{0} exponential(four), metadata={op_name="jit(step)/normal/exp"}
}
"""
    )
    found = {i.name: part_of(module, i) for i in module.computations["main"].instructions}
    assert [found[name] for name in ("one", "two", "three", "four", "five")] == [
        "rows",
        "loss",
        "projection",
        "norm",
        OTHER,
    ]
