"""The line of metrics.jsonl for a step, by hand."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from bigmac_jax.model.moe import Aux, empty_stats
from bigmac_jax.training.loss import LossParts
from bigmac_jax.training.metrics import moe_record, step_record
from bigmac_jax.training.step import StepMetrics


def test_rates_of_a_step() -> None:
    """4,096 tokens and 6e12 FLOPs in two seconds, of a machine that does 1e13 a second."""
    run: Any = SimpleNamespace(
        tokens_per_step=4096, flops_per_step=6e12, causal_flops_per_step=4e12, peak_flops=1e13, wire_bytes=0
    )
    parts = LossParts(jnp.float32(2.0), Aux(jnp.zeros(()), *empty_stats()))
    step = StepMetrics(jnp.float32(2.0), parts, jnp.float32(0.5), jnp.float32(1e-3), jnp.asarray(False))
    record = step_record(3, step, 2.0, run)
    assert (record["step"], record["tokens"], record["step_time_s"]) == (3, 3 * 4096, 2.0)
    assert record["tokens_per_s"] == 2048
    assert (record["mfu"], record["mfu_causal"]) == pytest.approx((0.3, 0.2))
    assert record["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert (record["grad_norm"], record["learning_rate"]) == pytest.approx((0.5, 1e-3))
    mean = Aux(jnp.ones(2), *(jnp.full((2, *v.shape[1:]), 0.5) for v in empty_stats()))
    moving = mean._replace(load=jnp.full((2, 4), 0.25), moved_rate=jnp.asarray([[0.25], [0.125]]))
    without = mean._replace(load=moving.load)
    assert moe_record(moving, run)["moe/moved_rate"] == 0.1875 and "moe/moved_rate" not in moe_record(without, run)
    assert not any(name.startswith(("moe/", "dpo/", "teacher/")) for name in record)


def test_fewer_choices_are_fewer_flops() -> None:
    """Two of four choices, of 1e12 FLOPs each: the other two are not done, and don't count."""
    run: Any = SimpleNamespace(
        tokens_per_step=4096, flops_per_step=6e12, causal_flops_per_step=4e12, peak_flops=1e13, wire_bytes=0,
        choices=4, flops_per_choice=1e12,
    )  # fmt: skip
    parts = LossParts(jnp.float32(2.0), Aux(jnp.zeros(()), *empty_stats()))
    values = jnp.float32(2.0), parts, jnp.float32(0.5), jnp.float32(1e-3), jnp.asarray(False)
    record = step_record(3, StepMetrics(*values, choices=jnp.int32(2)), 2.0, run)
    assert record["moe/choices"] == 2 and (record["mfu"], record["mfu_causal"]) == pytest.approx((0.2, 0.1))
    assert "moe/choices" not in step_record(3, StepMetrics(*values), 2.0, run)
