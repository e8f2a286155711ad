"""The reader of compiled programs, on hand-written texts with hand-worked numbers and on one that is compiled here."""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bigmac_jax.planning import hlo
from bigmac_jax.planning.hlo import Shape, largest_buffers, parse
from bigmac_jax.planning.hlo_collectives import Collective, collectives
from bigmac_jax.planning.hlo_flops import attention_kernel, matmul_flops

MESH = {"data": 2, "expert": 4}


def program(*lines: str, before: str = "") -> hlo.Module:
    """A module whose ENTRY has these instructions."""
    body = "".join(f"  {line}\n" for line in lines)
    return parse(f"HloModule test, is_scheduled=true\n\n{before}\nENTRY %main () -> f32[] {{\n{body}}}\n")


def exchange(attributes: str, kind: str = "all-to-all", mesh: dict[str, int] = MESH) -> Collective:
    """The only collective of a program, of 4 × 8 float32."""
    lines = "%x = f32[4,8]{1,0} parameter(0)", f"ROOT %c = f32[4,8]{{1,0}} {kind}(%x), channel_id=1, {attributes}"
    (found,) = collectives(program(*lines), mesh)
    return found


# The parser.

TEXT = r"""HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2,3]{1,0:T(8,128)})->f32[]}

FileNames
1 "a.py"

%region (a.1: f32[], b.1: f32[]) -> f32[] {
  %b.1 = f32[] parameter(1)
  %a.1 = f32[]{:T(128)S(7)} parameter(0)
  ROOT %sum.1 = f32[] add(%a.1, %b.1), metadata={op_name="add"}
}, execution_thread="sparsecore"

ENTRY %main.2 (x: f32[2,3]) -> (f32[], bf16[2,3]) {
  %x = f32[2,3]{1,0:T(8)S(1)} parameter(0), sharding={devices=[2,1]<=[2]}, metadata={op_name="x[\'w\'] (a=1, b={2})"}
  %k = s32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %start = ((f32[2,3]{1,0}), f32[2,3], /*index=2*/u32[]) copy-start(%x), backend_config={"a":{"n":"7(\"{"},"b":[]}
  %half = bf16[2,3]{0,1:T(8,128)(2,1)} convert(f32[2,3]{1,0} %x), backend_config="{\"n\":5}"
  %sum = f32[] reduce(%x, /*index=1*/%k), dimensions={0,1}, to_apply=%region
  ROOT %out = (f32[], bf16[2,3]{1,0}) tuple(%sum, %half)
}
"""


def test_what_an_instruction_says() -> None:
    module = parse(TEXT)
    assert module.scheduled
    assert module.entry == "main.2"
    assert list(module.computations) == ["region", "main.2"]
    main = module.computations["main.2"]
    assert [i.name for i in main.instructions] == ["x", "k", "start", "half", "sum", "out"]
    assert [i.opcode for i in main.instructions] == [
        "parameter",
        "constant",
        "copy-start",
        "convert",
        "reduce",
        "tuple",
    ]
    assert main.root.name == "out"
    assert main.by_name["start"].shapes == (Shape("f32", (2, 3)), Shape("f32", (2, 3)), Shape("u32", ()))
    assert main.by_name["start"].backend_config == {"a": {"n": '7("{'}, "b": []}
    assert main.by_name["half"].backend_config == {"n": 5}
    assert main.by_name["half"].operands == ("x",)
    assert main.by_name["sum"].operands == ("x", "k")
    assert main.by_name["sum"].attributes == {"dimensions": "{0,1}", "to_apply": "%region"}
    assert main.by_name["x"].op_name == "x['w'] (a=1, b={2})"
    assert main.by_name["x"].attributes["sharding"] == "{devices=[2,1]<=[2]}"


def test_bytes_of_types() -> None:
    sizes = {"pred": 10, "s4": 5, "u8": 10, "f8e4m3fn": 10, "bf16": 20, "f32": 40, "c64": 80, "token": 0}
    assert {dtype: Shape(dtype, (2, 5)).bytes for dtype in sizes} == sizes
    assert Shape("f32", ()).bytes == 4


def test_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty\n")


def test_reading_takes_linear_time() -> None:
    """10 MB in less than 10 seconds, kernels' bodies included."""
    kernel = '%k = f32[8]{0} custom-call(%x), backend_config={"body":"' + "TWFu(){" * 20_000 + '","n":[]}'
    start = time.perf_counter()
    module = program("%x = f32[8]{0} parameter(0)", *[kernel.replace("%k", f"%k.{n}") for n in range(80)])
    assert sum("body" in i.backend_config for _, _, i in module.run()) == 80
    assert time.perf_counter() - start < 10


# How often a computation runs.

LOOPS = """%inner.body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %in = (s32[]) all-reduce(%p), replica_groups={}, to_apply=%region
}

%condition (q: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  ROOT %less = pred[] custom-call(%q)
}

%fused (r: (s32[])) -> (s32[]) {
  ROOT %r = (s32[]) parameter(0)
}

%outer.body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %first = (s32[]) while(%s), condition=%condition, body=%inner.body, backend_config={"known_trip_count":{"n":"5"}}
  %f = (s32[]) fusion(%first), kind=kLoop, calls=%fused
  ROOT %call = (s32[]) call(%f), to_apply=%fused
}

%yes (t: (s32[])) -> (s32[]) {
  ROOT %t = (s32[]) parameter(0)
}

%no (u: (s32[])) -> (s32[]) {
  ROOT %u = (s32[]) parameter(0)
}

%wrapped (v: (s32[])) -> (s32[]) {
  %v = (s32[]) parameter(0)
  ROOT %permute = (s32[]) collective-permute(%v), source_target_pairs={{0,1},{1,0}}
}
"""
NESTED = program(
    "%p.0 = (s32[]) parameter(0)",
    "%loop = (s32[]) while(%p.0), condition=%condition, body=%outer.body, "
    'backend_config={"known_trip_count":{"n":"3"}}',
    "%unknown = (s32[]) while(%loop), condition=%condition, body=%inner.body",
    "%if = (s32[]) conditional(%unknown), branch_computations={%yes, %no}",
    "%async = ((s32[]), (s32[]), u32[]) async-start(%if), calls=%wrapped",
    "ROOT %await = (s32[]) async-done(%async)",
    before=LOOPS,
)


def test_loops_multiply() -> None:
    uses = NESTED.uses
    assert uses["outer.body"] == hlo.Use(3, loops=(3,))
    assert uses["inner.body"].times == 3 * 5 + 1
    assert uses["inner.body"].loops == (3, 5)
    assert NESTED.dynamic_loops == ["unknown"]
    assert uses["fused"].times == 3 + 3
    assert not uses["fused"].fused  # a call runs it too
    assert uses["yes"] == uses["no"] == hlo.Use(1)
    assert uses["wrapped"] == hlo.Use(1, asynchronous=True)
    assert "region" not in uses  # it is applied to elements


def test_one_asynchronous_use_is_enough() -> None:
    """Of a computation that is called, too, before or after; and without a ROOT the last instruction is the result."""
    before = "%wrapped (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n  %n = f32[8]{0} negate(%p)\n}\n"
    call = "%c = f32[8]{0} call(%x), to_apply=%wrapped"
    start = "%s = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%wrapped"
    for lines in ((call, start), (start, call)):
        module = program("%x = f32[8]{0} parameter(0)", *lines, before=before)
        assert module.uses["wrapped"] == hlo.Use(2, asynchronous=True)
        assert module.computations["wrapped"].root.name == "n"


def test_collectives_in_loops() -> None:
    reduction, permute = sorted(collectives(NESTED, {"x": 2}), key=lambda c: c.kind)
    assert (reduction.times, reduction.asynchronous) == (16, False)
    assert (permute.times, permute.asynchronous) == (1, True)


def test_further_rounds_of_an_exchange_are_none() -> None:
    """As in the counts: at uniform routing its first round sends everything."""
    module = program(
        "%p.0 = (s32[]) parameter(0)",
        "ROOT %rounds = (s32[]) while(%p.0), condition=%condition, body=%inner.body, "
        'metadata={op_name="jit(step)/shard_map/further_rounds/while"}',
        before=LOOPS,
    )
    assert module.uses["inner.body"].times == 0 and module.dynamic_loops == []
    assert collectives(module, {"x": 2}) == []


def counted(
    limit: str = "24", start: str = "3", step: str = "7", direction: str = "LT", result: str = "%next"
) -> hlo.Module:
    """A loop as TPU programs have it: its trip count stands nowhere."""
    return program(
        f"%c = s32[]{{:T(128)}} constant({start})",
        "%copy.1 = s32[]{:T(128)} copy(%c)",
        "%x.0 = f32[4,4]{1,0} parameter(0)",
        "%state = (f32[4,4]{1,0}, s32[]) tuple(%x.0, %copy.1)",
        "ROOT %while = (f32[4,4]{1,0}, s32[]) while(%state), condition=%cond, body=%body",
        before=f"""%cond (p: (f32[4,4], s32[])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant({limit})
  %p = (f32[4,4]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %limit), direction={direction}
}}

%body (q: (f32[4,4], s32[])) -> (f32[4,4], s32[]) {{
  %q = (f32[4,4]{{1,0}}, s32[]) parameter(0)
  %x = f32[4,4]{{1,0}} get-tuple-element(%q), index=0
  %j = s32[] get-tuple-element(%q), index=1
  %one = s32[] constant({step})
  %next = s32[] add(%j, %one)
  %copy.2 = s32[] copy(%next)
  %dot = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %r = (f32[4,4]{{1,0}}, s32[]) tuple(%dot, {result})
}}
""",
    )


@pytest.mark.parametrize(
    ("arguments", "trips"),
    [
        ({}, 3),
        ({"limit": "25"}, 4),
        ({"start": "0", "step": "1"}, 24),
        ({"limit": "3"}, 0),
        ({"result": "%copy.2"}, 3),
        ({"direction": "NE"}, None),
        ({"start": "-4"}, 4),
        ({"limit": "-40"}, 0),
        # What is no whole number, and what is no sum, is not known.
        ({"start": "0.5"}, None),
        ({"limit": "24.5"}, None),
        ({"step": "0.5"}, None),
        ({"result": "%j"}, None),
    ],
)
def test_trips_of_a_counting_loop(arguments: dict[str, str], trips: int | None) -> None:
    """3, 10, 17 < 24; 24 < 25 as well."""
    module = counted(**arguments)
    assert module.dynamic_loops == ([] if trips is not None else ["while"])
    assert matmul_flops(module) == (2 * 4 * 4 * 4 * (1 if trips is None else trips), 0)


# Groups, in every spelling.


@pytest.mark.parametrize(
    ("attributes", "axes", "ranks"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "expert"), 8),
        ("replica_groups={}, use_global_device_ids=true", ("data", "expert"), 8),
        ("use_global_device_ids=true", ("data", "expert"), 8),
        ("replica_groups=[2,4]<=[8]", ("expert",), 4),
        ("replica_groups=[1,8]<=[8]", ("data", "expert"), 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=[4,2]<=[8]", ("expert",), 2),  # half of an axis
        ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}", ("expert",), 4),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data'}", ("data",), 2),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data','expert'}", ("data", "expert"), 8),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", ("expert",), 4),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("expert",), 4),
    ],
)  # fmt: skip
def test_axes_of_groups(attributes: str, axes: tuple[str, ...], ranks: int) -> None:
    found = exchange(attributes)
    assert (found.axes, found.ranks) == (axes, ranks)


def test_axes_of_three() -> None:
    mesh = {"data": 2, "node": 2, "expert": 2}
    assert exchange("replica_groups={{0,1,2,3},{4,5,6,7}}", mesh=mesh).axes == ("node", "expert")
    assert exchange("replica_groups={{0,1,4,5},{2,3,6,7}}", mesh=mesh).axes == ("data", "expert")
    assert exchange("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", mesh=mesh).axes == ()


def test_pairs() -> None:
    ring = exchange("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", "collective-permute")
    assert (ring.axes, ring.ranks, ring.sent_bytes) == (("expert",), 4, 128)
    assert exchange("source_target_pairs={{0,4},{4,0}}", "collective-permute").axes == ("data",)


@pytest.mark.parametrize("groups", ["[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}", "mesh['a'=2,'b'=4] {'b'}"])
def test_a_mesh_that_is_too_small(groups: str) -> None:
    with pytest.raises(ValueError, match=r"device 7 must be one of the 4 .*'data': 2, 'expert': 2"):
        exchange(f"replica_groups={groups}", mesh={"data": 2, "expert": 2})
    with pytest.raises(ValueError, match="device 4 must be one of the 4"):
        exchange("replica_groups={{0,1},{2,4}}", mesh={"data": 2, "expert": 2})


# Bytes.


@pytest.mark.parametrize(
    ("kind", "buffer", "sent"),
    [
        ("all-to-all", 128, 96),
        ("all-gather", 512, 384),
        ("reduce-scatter", 128, 96),
        ("all-reduce", 128, 192),
        ("all-reduce-start", 128, 192),
        ("all-gather-start", 512, 384),
    ],
)
def test_bytes_of_one_rank(kind: str, buffer: int, sent: float) -> None:
    """Of 4 × 8 float32 in groups of four."""
    found = exchange("replica_groups=[2,4]<=[8]", kind)
    assert (found.buffer_bytes, found.sent_bytes) == (buffer, sent)
    assert found.dtypes == ("f32",)
    assert found.asynchronous == kind.endswith("-start")


def test_tuples() -> None:
    """One operand a rank, and several collectives in one."""
    lines = [f"%p.{n} = u16[1,3]{{1,0}} parameter({n})" for n in range(4)]
    result = ", ".join(["u16[1,3]{1,0}"] * 4)
    module = program(
        *lines,
        f"%a = ({result}) all-to-all(%p.0, %p.1, %p.2, %p.3), replica_groups=[2,4]<=[8]",
        "%s = f32[5]{0} parameter(4)",
        "%r = (u16[1,3]{1,0}, f32[5]{0}) all-reduce(%p.0, %s), replica_groups=[2,4]<=[8], to_apply=%add",
    )
    exchanged, reduced = collectives(module, MESH)
    assert (exchanged.buffer_bytes, exchanged.sent_bytes, exchanged.dtypes) == (24, 18, ("u16",))
    assert (reduced.buffer_bytes, reduced.dtypes) == (6 + 20, ("u16", "f32"))


@pytest.mark.parametrize(
    ("name", "root", "kind", "sent"),
    [
        ("all-reduce-scatter.1", "dynamic-slice(%r, %i)", "reduce-scatter", 24),
        ("fused.1", "dynamic-slice(%r, %i)", "all-reduce", 48),
        ("all-reduce-scatter.1", "dynamic-slice(%p, %i)", "all-reduce", 48),  # of what is not the sum
        ("all-reduce-scatter.1", "copy(%r)", "all-reduce", 48),
    ],
)
def test_a_sum_of_which_a_rank_keeps_its_part(name: str, root: str, kind: str, sent: float) -> None:
    """In one fusion, as TPU writes it: it sends half of what a sum does, and nothing runs beside it. A gather in such a
    fusion is one."""
    lines = "%r = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add", f"ROOT %s = f32[2]{{0}} {root}"
    for reduction, expected in ((lines[0], (kind, sent)), (lines[0].replace("reduce(", "gather("), ("all-gather", 96))):
        before = f"%{name} (p: f32[8], i: s32[]) -> f32[2] {{\n  %p = f32[8]{{0}} parameter(0)\n"
        before += f"  %i = s32[] parameter(1)\n  {reduction}\n  {lines[1]}\n}}\n"
        module = program(
            "%x = f32[8]{0} parameter(0)",
            "%n = s32[] parameter(1)",
            f"ROOT %f = f32[2]{{0}} fusion(%x, %n), kind=kCustom, calls=%{name}",
            before=before,
        )
        (found,) = collectives(module, MESH)
        assert ((found.kind, found.sent_bytes), found.asynchronous) == (expected, False)


def test_asynchronous_pairs_count_once() -> None:
    module = program(
        "%x = u16[32,16]{1,0} parameter(0)",
        "%s = ((u16[32,16]{1,0:T(8,128)(2,1)}), u16[32,16]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) all-to-all-start(%x), "
        "replica_groups=[2,4]<=[8]",
        "ROOT %d = u16[32,16]{1,0} all-to-all-done(%s)",
    )
    (found,) = collectives(module, MESH)
    assert (found.kind, found.buffer_bytes, found.asynchronous) == ("all-to-all", 1024, True)


def test_ragged_all_to_all() -> None:
    """Room for the worst case, at one end or the other, is not sent."""
    for rows, room in ((8, 100), (100, 8)):
        module = program(
            f"%x = bf16[{rows},4]{{1,0}} parameter(0)",
            f"%y = bf16[{room},4]{{1,0}} parameter(1)",
            "%n = s32[4]{0} parameter(2)",
            f"%z = bf16[{room},4]{{1,0}} ragged-all-to-all(%x, %y, %n, %n, %n, /*index=5*/%n), "
            "replica_groups=[2,4]<=[8]",
        )
        (found,) = collectives(module, MESH)
        assert (found.kind, found.buffer_bytes, found.dtypes) == ("ragged-all-to-all", 64, ("bf16",))
        assert found.role == "payload"  # the exchange alone has them, whether or not the program says so


@pytest.mark.parametrize(
    ("op_name", "direction", "role"),
    [
        ("jit(step)/jvp()/while/body/closed_call/shard_map/exchange_payload/all_to_all", "forward", "payload"),
        (
            "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/shard_map/all_to_all",
            "recomputed",
            "other",
        ),
        (
            "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/shard_map/exchange_metadata/all_to_all",
            "backward",
            "metadata",
        ),
        ("jit(step)/(transpose(jvp())/reduce_sum:jvp()/reduce_sum)", "backward", "other"),
        ("", "forward", "other"),
    ],
)
def test_direction_and_role(op_name: str, direction: str, role: str) -> None:
    found = exchange(f'replica_groups=[2,4]<=[8], metadata={{op_name="{op_name}" stack_frame_id=3}}')
    assert (found.direction, found.role) == (direction, role)


# FLOPs.


def test_dots() -> None:
    """2·B·M·N·K, fused or not."""
    module = program(
        "%x = f32[3,5,7]{2,1,0} parameter(0)",
        "%y = f32[7,3,11]{2,1,0} parameter(1)",
        "%d = f32[3,5,11]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={1}, "
        "rhs_contracting_dims={0}",
        "ROOT %f = f32[13,17]{1,0} fusion(%x), kind=kOutput, calls=%fused",
        before="""%fused (p: f32[3,5,7]) -> f32[13,17] {
  %p = f32[3,5,7]{2,1,0} parameter(0)
  %a = f32[13,19,2]{2,1,0} custom-call(%p)
  %b = f32[19,17,2]{2,1,0} custom-call(%p)
  ROOT %dot = f32[13,17]{1,0} dot(%a, %b), lhs_contracting_dims={1,2}, rhs_contracting_dims={0,2}
}
""",
    )
    assert matmul_flops(module) == (2 * 3 * 5 * 7 * 11 + 2 * 13 * 17 * 19 * 2, 0)


@pytest.mark.parametrize(
    ("lhs", "rhs", "result", "attributes", "flops"),
    [
        # [12, 8] by [8, 3], and a projection of [2, 6, 8].
        ("12,8", "8,3", "12,3", "dim_labels=bf_io->bf", 2 * 12 * 8 * 3),
        ("2,6,8", "1,8,3", "2,6,3", "window={size=1}, dim_labels=b0f_0io->b0f", 2 * 2 * 6 * 8 * 3),
        # A weight gradient: the sum is over the batch, a spatial dimension here, as well as the feature.
        ("2,512,6", "2,6,4", "512,4,1", "window={size=2}, dim_labels=0bf_0io->bf0", 2 * 512 * 4 * 2 * 6),
        # Five products of 6 × 8 by 8 × 3: one place of each window is not a hole.
        ("5,6,8", "5,8,3", "5,6,3", "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf", 10 * 6 * 8 * 3),
        # A convolution proper: at the edges 2 of 3 places are inside.
        ("1,4,2", "3,2,5", "1,4,5", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (2 + 3 + 3 + 2) * 2 * 5),
        # Every second place, from two before the first: one of three inside, then all.
        ("1,4,2", "3,2,5", "1,2,5", "window={size=3 stride=2 pad=2_0}, dim_labels=b0f_0io->b0f", 2 * (1 + 3) * 2 * 5),
        # A window with a hole: at the far edge one of its two places is inside.
        ("1,4,2", "2,2,5", "1,3,5", "window={size=2 pad=0_1 rhs_dilate=2}, dim_labels=b0f_0io->b0f", 100),
        # Two groups of features, and two of the batch.
        ("6,8", "4,10", "6,10", "dim_labels=bf_io->bf, feature_group_count=2", 2 * 6 * 4 * 10),
        ("6,8", "8,10", "3,10", "dim_labels=bf_io->bf, batch_group_count=2", 2 * 3 * 8 * 10),
    ],
)  # fmt: skip
def test_convolutions(lhs: str, rhs: str, result: str, attributes: str, flops: int) -> None:
    module = program(
        f"%x = bf16[{lhs}] parameter(0)",
        f"%w = bf16[{rhs}] parameter(1)",
        f"ROOT %c = bf16[{result}] convolution(%x, %w), {attributes}",
    )
    assert matmul_flops(module).dots == flops


def test_kernels_by_their_own_estimate() -> None:
    config = {"custom_call_config": {"body": "TUz(", "cost_estimate": {"flops": "1000", "transcendentals": "0"}}}
    module = program(
        "%x = bf16[8,8]{1,0} parameter(0)",
        '%k = bf16[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        f"backend_config={json.dumps(config)}",
        '%other = bf16[8,8]{1,0} custom-call(%k), custom_call_target="AllocateBuffer"',
    )
    assert matmul_flops(module) == (0, 1000)
    silent = program('ROOT %k = bf16[8] custom-call(), custom_call_target="tpu_custom_call", '
                     'backend_config={"custom_call_config":{}}')  # fmt: skip
    assert matmul_flops(silent) == (0, 0)


@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 4)])
def test_cudnn_attention_computes_whole_squares(target: str, products: int) -> None:
    """Of two rows of three heads, seven queries of width five: each product has 7 × 7 of them."""
    module = program(f'ROOT %k = (bf16[2,3,7,5], u8[8]) custom-call(), custom_call_target="{target}"')
    assert matmul_flops(module) == (0, products * 2 * 2 * 3 * 7 * 7 * 5)


def attention_call(shape: str, target: str, path: str, extra: str = "") -> str:
    return (
        f"%k = (f32[8,128], bf16[{shape}]) custom-call(%table, %q, %x), "
        f'custom_call_target="{target}"{extra}, metadata={{op_name="jit(step)/jvp(attend)/{path}/pallas_call"}}'
    )


@pytest.mark.parametrize(
    ("path", "products"), [("splash_mha_fwd_residuals", 2), ("splash_mha_fwd_segmented_no_residuals", 2),
                           ("splash_mha_dq_no_residuals", 3), ("splash_mha_dkv_segmented_no_residuals", 4),
                           ("mha_forward", 2), ("transpose(jvp(mha_backward))", 7),
                           ("mha_preprocess_backward", 0), ("other_mha_backward", 0)],
)  # fmt: skip
def test_kernels_of_attention(path: str, products: int) -> None:
    """Two rows of four positions, three heads of five; a result may have fewer heads. A product of every query with the
    positions up to it and, for half of it, itself: 0.5 + 1.5 + 2.5 + 3.5."""
    on_tpu = path.startswith("splash")
    target, shape, keys = (
        ("tpu_custom_call", "2,3,4,5", "2,1,4,5") if on_tpu else ("__gpu$xla.gpu.triton", "2,4,3,5", "2,4,1,5")
    )
    config = ', backend_config={"custom_call_config":{}}' if on_tpu else ', backend_config={ir = "ML"}'
    module = program(
        "%table = s8[1,2,2] parameter(0)", f"%q = bf16[{shape}] parameter(1)", f"%x = bf16[{keys}] parameter(2)",
        attention_call(keys, target, path, config),
    )  # fmt: skip
    once = 2 * 2 * 3 * 5 * sum(0.5 + query for query in range(4))
    assert matmul_flops(module) == (0, products * once)


def test_attention_of_one_row() -> None:
    """On TPU without the dimension of the batch."""
    module = program(
        "%table = s8[1,2,2] parameter(0)", "%q = bf16[3,4,5] parameter(1)", "%x = bf16[1,4,5] parameter(2)",
        attention_call("3,4,5", "tpu_custom_call", "splash_mha_fwd", ', backend_config={"custom_call_config":{}}'),
    )  # fmt: skip
    assert matmul_flops(module).kernels == 2 * 3 * 4 * 4 * 5  # two products, each of half of 2·N·L·L·H


def test_metadata_of_a_kernel_stands_in_lines_of_its_own() -> None:
    lines = ', frontend_attributes={kernel_metadata={\n"a":"{\\"block\\": 1}",\n"b":"2"\n}}'
    config = ', backend_config={"custom_call_config":{}}'
    module = program(
        "%table = s8[1,2,2] parameter(0)", "%q = bf16[2,3,4,5] parameter(1)", "%x = bf16[2,3,4,5] parameter(2)",
        attention_call("2,3,4,5", "tpu_custom_call", "splash_mha_dq", lines + config),
        "ROOT %y = bf16[2,3,4,5] get-tuple-element(%k), index=1",
    )  # fmt: skip
    computation = module.computations[module.entry]
    assert [i.name for i in computation.instructions] == ["table", "q", "x", "k", "y"]
    assert computation.root.name == "y"
    assert attention_kernel(computation.by_name["k"]) == "splash_mha_dq"


def test_matmuls_of_libraries() -> None:
    """oneDNN's 3 × [5, 7] by [7, 11], and 3 × [7, 5] transposed; what is added multiplies nothing."""
    for lhs in ("3,5,7", "3,7,5"):
        module = program(
            f"%x = f32[{lhs}]{{2,1,0}} parameter(0)",
            "%y = f32[3,7,11]{2,1,0} parameter(1)",
            "%b = f32[11]{0} parameter(2)",
            'ROOT %m = f32[3,5,11]{2,1,0} custom-call(%x, %y, %b), custom_call_target="__onednn$matmul"',
        )
        assert matmul_flops(module).total == 2 * 3 * 5 * 7 * 11


def test_largest_buffers() -> None:
    module = program(
        '%w = f32[100]{0} parameter(0), metadata={op_name="weights"}',
        '%f = bf16[300]{0} fusion(%w), kind=kLoop, calls=%fused, metadata={op_name="made"}',
        "%g = bf16[300]{0} bitcast(%f)",
        "%h = bf16[300]{0} copy(%g)",
        "%s = (bf16[300]{0}, bf16[300]{0}, u32[9999]{0}) copy-start(%h)",
        "%t = (f32[8]{0}, f32[1000]{0}) tuple(%w, %w)",
        before="%fused (p: f32[100]) -> bf16[300] {\n  ROOT %b = f32[5000]{0} constant({...})\n}\n",
    )
    assert largest_buffers(module, 1) == [hlo.Buffer(Shape("bf16", (300,)), "fusion", "made", 2)]
    assert [(b.bytes, b.op_name) for b in largest_buffers(module, 9)] == [(600, "made"), (400, "weights")]


# A real program.


def test_a_compiled_program() -> None:
    """Three steps of a scan that sends, multiplies and is differentiated, on a mesh of 2 × 2 × 2."""
    axes = ("data", "node", "expert")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Explicit,) * 3)
    T, D, STEPS = 16, 8, 3

    def on_rank(x_TD: jax.Array, w_DD: jax.Array) -> jax.Array:
        def step(x_TD: jax.Array, _: Any) -> tuple[jax.Array, None]:
            with jax.named_scope("exchange_payload"):
                y_TD = jax.lax.all_to_all(x_TD, ("node", "expert"), 0, 0, tiled=True)
            y_TD = jnp.tanh(y_TD @ w_DD)
            with jax.named_scope("exchange_metadata"):
                return jax.lax.all_to_all(y_TD, "expert", 0, 0, tiled=True), None

        x_TD, _ = jax.lax.scan(jax.checkpoint(step), x_TD, None, length=STEPS)
        return x_TD

    def loss(x_TD: jax.Array, w_DD: jax.Array) -> jax.Array:
        split = P(axes, None)
        y_TD = jax.shard_map(on_rank, mesh=mesh, in_specs=(split, P(None, None)), out_specs=split)(x_TD, w_DD)
        return jnp.square(y_TD).sum()

    with jax.set_mesh(mesh):
        x_TD = jax.device_put(np.ones((8 * T, D), np.float32), P(axes, None))
        w_DD = jax.device_put(np.eye(D, dtype=np.float32), P(None, None))
        text = jax.jit(jax.grad(loss, (0, 1))).lower(x_TD, w_DD).compile().as_text()
    module = parse(text)
    assert module.dynamic_loops == []

    sent: dict[Any, float] = {}
    for c in collectives(module, {"data": 2, "node": 2, "expert": 2}):
        if c.kind == "all-to-all":
            assert (c.ranks, c.buffer_bytes) == ({"payload": 4, "metadata": 2}[c.role], 4 * T * D)
        key = c.kind, c.axes, c.role, c.direction
        sent[key] = sent.get(key, 0) + c.times * c.sent_bytes
    there, back = ("node", "expert"), ("expert",)
    exchanged = {key[1:]: value for key, value in sent.items() if key[0] == "all-to-all"}
    payload, metadata = STEPS * 4 * T * D * 3 / 4, STEPS * 4 * T * D / 2
    assert exchanged == {
        (there, "payload", "forward"): payload,
        (there, "payload", "recomputed"): payload,
        (there, "payload", "backward"): payload,
        (back, "metadata", "forward"): metadata,
        (back, "metadata", "backward"): metadata,
    }
    # The weights' gradient is summed over all ranks, at least once and at most in every step.
    (reduced,) = (value for key, value in sent.items() if key[:2] == ("all-reduce", axes))
    assert 2 * 7 / 8 * 4 * D * D <= reduced <= 1.1 * STEPS * 2 * 7 / 8 * 4 * D * D
    # Forward, recomputed, and the gradients of rows and weights.
    assert matmul_flops(module) == (STEPS * 4 * 2 * T * D * D, 0)
