"""Plans of experts in host memory: bytes and times by hand, and copies read from a program's text."""

import dataclasses
import io
import pathlib
from typing import Any

import pytest
from rich.console import Console

from bigmac_jax.config import ConfigError, load_config, with_overrides
from bigmac_jax.model import counts
from bigmac_jax.planning import hlo, report, residency, topologies
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.host_copies import HostCopy, argument_bytes, host_copies
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ONE = ("mesh.expert=1", "mesh.fsdp=False", "execution.resident_layers=2")
# A layer of Qwen3-30B in bfloat16: three matrices of 2,048 × 768 for each of 128 experts.
QWEN_LAYER = 2 * 128 * 3 * 2048 * 768


def test_qwen_on_one_v6e() -> None:
    made = make_plan(load_config(f"{CONFIGS}/qwen3_30b.py", ONE), Request(topology="v6e:1x1"))
    found = made["resident"]
    assert (found["layers"], found["host_bytes"]) == (48, 48 * QWEN_LAYER)
    assert found["ring_bytes"] == 2 * QWEN_LAYER
    one, _, many = found["decode"]
    assert (one["requests"], many["requests"]) == (1, 64)
    for row in found["decode"]:  # the link is what such a step waits for, whatever the number of requests
        assert row["step_ms"] == row["copy_ms"] == pytest.approx(1e3 * 48 * QWEN_LAYER / 32e9)
        assert row["ms_per_token"] == row["step_ms"] / row["requests"]
    # Without: 8 of 128 experts, attention, norms, router and logits, and the cache of 4,096 positions are read once.
    attention, router = 2 * 2048 * 128 * (32 + 4), 2048 * 128
    norms = 2 * 2048 + 2 * 128
    dense = 48 * (attention + router + norms) + 2048 + 151936 * 2048
    cache = 48 * 4096 * 2 * 4 * 128
    read = 2 * (dense + cache) + 48 * QWEN_LAYER * 8 / 128
    assert one["on_device_ms"] == pytest.approx(1e3 * read / 1638e9)
    assert one["compute_ms"] == pytest.approx(1e3 * (read + 5 * 48 * QWEN_LAYER) / 1638e9)
    output = io.StringIO()
    report.show(made, Console(file=output, width=200, highlight=False))
    assert "experts in host memory: 54.00 GiB of 48 layers" in output.getvalue()
    assert "1,811.94 ms" in output.getvalue()


@pytest.mark.parametrize("held", ["layers", "experts"])
def test_a_decoder_has_no_next_token_modules_and_no_network_of_the_router(held: str) -> None:
    def decode(*fields: str) -> Any:
        config = load_config("tiny", [f"execution.resident_{held}=2", *fields])
        return residency.describe(config, {}, load_hardware("h100"))["decode"]

    assert decode("model.mtp_modules=1") == decode()
    assert decode("model.router=hyper") == decode("model.router=affine")


def test_each_rank_has_its_part() -> None:
    config = load_config(f"{CONFIGS}/qwen3_30b.py", ("mesh.fsdp=False", "execution.resident_layers=1"))
    assert residency.expert_numbers(config, {"expert": 4}) == 48 * QWEN_LAYER // 2 // 4
    for fsdp, ranks in (("False", 4), ("True", 4 * 2)):
        split = with_overrides(config, [f"mesh.fsdp={fsdp}"])
        assert residency.describe(split, {"data": 2, "expert": 4}, None)["host_bytes"] == 48 * QWEN_LAYER // ranks
    assert residency.describe(config, {"expert": 4}, None)["ring_bytes"] == 2 * QWEN_LAYER // 4  # two slots, at least
    unknown = dataclasses.replace(load_hardware("v6e"), host_bandwidth=None)
    with pytest.raises(ConfigError, match=r"^resident_layers=1 needs .* TPU v6 lite .*; add host_bandwidth$"):
        residency.describe(config, {"expert": 4}, unknown)


def test_the_most_used_experts_of_qwen_on_one_v6e() -> None:
    """By hand, with 16 of 128 experts of a layer on the device, of which a token takes 8 by chance."""
    config = load_config(f"{CONFIGS}/qwen3_30b.py", (*ONE[:2], "execution.resident_experts=16"))
    made = make_plan(config, Request(topology="v6e:1x1"))
    found = made["resident"]
    assert (found["host_bytes"], found["slot_bytes"]) == (48 * QWEN_LAYER, 48 * QWEN_LAYER // 8)
    one, eight, many = found["decode"]
    assert (one["chosen_experts"], one["missing_experts"]) == (8, 7)
    assert many["chosen_experts"] == pytest.approx(128 * (1 - (15 / 16) ** 64))
    for row in found["decode"]:
        assert row["missing_experts"] == pytest.approx(7 / 8 * row["chosen_experts"])
        assert row["copy_ms"] == pytest.approx(1e3 * 48 * QWEN_LAYER / 128 * row["missing_experts"] / 32e9)
        assert row["step_ms"] == pytest.approx(row["copy_ms"] + row["compute_ms"])  # nothing runs beside a copy
        assert row["ms_per_token"] == row["step_ms"] / row["requests"]
    # One round reads and writes the 16 slots of each layer, and what came was written, read and written.
    passes = (2 * 16 + 3 * 7) / 128
    assert one["compute_ms"] - one["on_device_ms"] == pytest.approx(1e3 * passes * 48 * QWEN_LAYER / 1638e9)
    passes = (2 * eight["chosen_experts"] + 3 * eight["missing_experts"]) / 128  # in rounds of 16
    assert eight["compute_ms"] - eight["on_device_ms"] == pytest.approx(1e3 * passes * 48 * QWEN_LAYER / 1638e9)
    output = io.StringIO()
    report.show(made, Console(file=output, width=200, highlight=False))
    assert "54.00 GiB of 48 layers for each rank, 6.75 GiB of 16 experts of each layer" in output.getvalue()
    unknown = dataclasses.replace(load_hardware("v6e"), host_bandwidth=None)
    with pytest.raises(ConfigError, match=r"^resident_experts=16 needs .* TPU v6 lite .*; add host_bandwidth$"):
        residency.describe(config, {}, unknown)
    with pytest.raises(ConfigError, match=r"^resident_experts=16 is for one device, .* has 4 \(mesh expert 4\); use"):
        residency.describe(config, {"expert": 4, "data": 1}, None)


def test_a_step_that_decodes_on_a_mesh() -> None:
    """Of 24 requests 3 are of each of 8 batch ranks, and each of two groups' 4 expert ranks sees those of 12; two ranks
    of `tensor` share matrices and heads. The table of tokens is looked up, and each expert's rows are read or not."""
    sizes = {"replica": 2, "data": 1, "node": 2, "expert": 2, "tensor": 2}
    fields = ("model.num_heads=4", "model.num_kv_heads=2", "model.tie_embeddings=False", "execution.dtype=bfloat16")
    config = load_config("tiny", fields)
    m, parts = config.model, counts.parameters(config, sizes).parts
    experts = parts["experts"] // 4
    dense = (sum(parts.values()) - parts["experts"] - m.vocab_size * m.hidden_size) / 2
    cache = 3 * config.data.sequence_length * 2 * 1 * m.head_size * m.num_layers
    read = dense + experts * (1 - (1 - m.choices / m.expert_count) ** 12 + 0.5) + cache
    computed = 2 * (3 * dense + 12 * m.choices / m.expert_count * experts)
    slow = dataclasses.replace(load_hardware("h100"), memory_bandwidth=1e6)
    fast = dataclasses.replace(slow, memory_bandwidth=1e30)
    assert residency.decode_seconds(config, sizes, slow, 24, passes=0.5) == pytest.approx(2 * read / 1e6)
    assert residency.decode_seconds(config, sizes, fast, 24, passes=9.0) == pytest.approx(computed / fast.peak_flops)


def test_nothing_of_it_where_all_stands_on_the_device() -> None:
    for field in ("resident_layers=0", "resident_layers=48", "resident_experts=128"):
        overrides = ("mesh.fsdp=False", f"execution.{field}")
        assert "resident" not in make_plan(load_config(f"{CONFIGS}/qwen3_30b.py", overrides), Request())


TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[4,8,8]{2,1,0:T(8,128)(2,1)S(5)}, \
f32[3]{0:S(5)}, bf16[8,8]{1,0})->(bf16[8,8]{1,0})}

%sliced (p.0: bf16[4,8,8], p.1: s32[]) -> bf16[1,8,8] {
  %p.0 = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice.0 = bf16[1,8,8]{2,1,0} dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,8,8}
}

%multiplied (q.0: bf16[8,8]) -> bf16[8,8] {
  %q.0 = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.0 = bf16[8,8]{1,0} dot(%q.0, %q.0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[4,8,8], b: f32[3], x: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %b = f32[3]{0:S(5)} parameter(1)
  %x = bf16[8,8]{1,0} parameter(2)
  %i = s32[] constant(1)
  %copy-start.1 = (f32[3]{0}, f32[3]{0:S(5)}, u32[]) copy-start(%b)
  %early = ((bf16[4,8,8]{2,1,0:S(5)}, s32[]), bf16[1,8,8]{2,1,0}, u32[]) fusion-start(%a, %i), kind=kLoop, calls=%sliced
  %copy-done.1 = f32[3]{0} copy-done(%copy-start.1)
  %product = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%multiplied
  %late = bf16[1,8,8]{2,1,0} fusion-done(%early)
  %read = bf16[1,8,8]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  ROOT %add = bf16[8,8]{1,0} add(%product, %x)
}
"""


def test_copies_from_a_host() -> None:
    """One beside a product, one beside nothing, and a kernel that reads the host's memory itself."""
    module = hlo.parse(TEXT)
    assert argument_bytes(module) == 2 * 4 * 8 * 8 + 3 * 4
    assert host_copies(module) == [
        HostCopy("copy-start.1", 12, 1, True, ()),
        HostCopy("early", 128, 1, True, ("product",)),
        HostCopy("read", 128, 1, False, ()),
    ]
    assert argument_bytes(hlo.parse(TEXT.replace("S(5)", "S(1)"))) == 0


def test_copies_in_a_loop() -> None:
    """As often as it runs; no product before a copy's start is beside it, nor one behind its end."""
    body = """%body (s: (s32[], bf16[8,8], bf16[8,8])) -> (s32[], bf16[8,8], bf16[8,8]) {
  %s = (s32[], bf16[8,8]{1,0:S(5)}, bf16[8,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %held = bf16[8,8]{1,0:S(5)} get-tuple-element(%s), index=1
  %y = bf16[8,8]{1,0} get-tuple-element(%s), index=2
  %first = bf16[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %start = (bf16[8,8]{1,0}, bf16[8,8]{1,0:S(5)}, u32[]) copy-start(%held)
  %second = bf16[8,8]{1,0} dot(%first, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = bf16[8,8]{1,0} copy-done(%start)
  %third = bf16[8,8]{1,0} dot(%second, %done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], bf16[8,8]{1,0:S(5)}, bf16[8,8]{1,0}) tuple(%n, %held, %third)
}

%cond (t: (s32[], bf16[8,8], bf16[8,8])) -> pred[] {
  ROOT %t = pred[] parameter(0)
}

ENTRY"""
    trips = 'backend_config={"known_trip_count":{"n":"3"}}'
    loop = f"  %loop = bf16[8,8]{{1,0}} while(%x), condition=%cond, body=%body, {trips}\n"
    text = TEXT.replace("ENTRY", body).replace("  ROOT %add", loop + "  ROOT %add")
    (found,) = [copy for copy in host_copies(hlo.parse(text)) if copy.name == "start"]
    assert found == HostCopy("start", 128, 3, True, ("second",))


def test_one_chip_is_a_topology() -> None:
    assert topologies.parse_topology("v6e:1x1").chips == 1
