"""What a schedule hides, on hand-written programs with hand-worked seconds: a cycle is a second here, and so is a FLOP.

On the wire every exchange takes ten seconds.
"""

import dataclasses
import json
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.planning import compiled_programs
from bigmac_jax.planning.hlo import Module, parse
from bigmac_jax.planning.hlo_collectives import collectives
from bigmac_jax.planning.hlo_schedule import Overlap, Rates, overlap, parameter_collective, work_seconds

MESH = {"expert": 2}
WIRE = 10.0


def start(name: str, operand: str) -> str:
    return (
        f"%{name} = ((u16[8]{{0}}), u16[8]{{0}}, u32[]{{:S(2)}}) all-to-all-start(%{operand}), "
        'replica_groups={{0,1}}, metadata={op_name="jit(step)/exchange_payload/all_to_all"}'
    )


def done(name: str, started: str) -> str:
    return f"%{name} = u16[8]{{0}} all-to-all-done(%{started})"


def synchronous(name: str, operand: str) -> str:
    return (
        f"%{name} = u16[8]{{0}} all-to-all(%{operand}), replica_groups={{{{0,1}}}}, "
        'metadata={op_name="jit(step)/exchange_payload/all_to_all"}'
    )


def matmul(name: str, cycles: int, *operands: str) -> str:
    arguments = ", ".join(f"%{operand}" for operand in operands)
    return f"%{name} = u16[8]{{0}} fusion({arguments}), kind=kOutput, calls=%dot.in, {estimate(cycles)}"


def other(name: str, cycles: int, *operands: str) -> str:
    arguments = ", ".join(f"%{operand}" for operand in operands)
    return f"%{name} = u16[8]{{0}} add({arguments}), {estimate(cycles)}"


def loop_of(*lines: str) -> str:
    """The computations %body, of these lines on %q, and %condition of a loop."""
    body = "\n  ".join(lines)
    return f"""%body (q: u16[8]) -> u16[8] {{
  %q = u16[8]{{0}} parameter(0)
  {body}
}}

%condition (r: u16[8]) -> pred[] {{
  %r = u16[8]{{0}} parameter(0)
  ROOT %less = pred[] custom-call(%r)
}}
"""


def kernel(name: str, flops: int, *operands: str, size: int = 0) -> str:
    arguments = ", ".join(f"%{operand}" for operand in operands)
    config = json.dumps({"custom_call_config": {"cost_estimate": {"flops": str(flops), "bytes_accessed": str(size)}}})
    return (
        f'%{name} = u16[8]{{0}} custom-call({arguments}), custom_call_target="tpu_custom_call", backend_config={config}'
    )


def estimate(cycles: int) -> str:
    return f"backend_config={json.dumps({'window_config': {'estimated_cycles': str(cycles)}})}"


DOT = """%dot.in (p: u16[8]) -> u16[2,2] {
  %p = u16[8]{0} parameter(0)
  %a = u16[2,2]{1,0} bitcast(%p)
  ROOT %d = u16[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def program(*lines: str, before: str = "", header: str = "is_scheduled=true") -> Module:
    body = textwrap.indent("\n".join(("%x = u16[8]{0} parameter(0)", *lines)), "  ")
    return parse(f"HloModule test, {header}\n\n{DOT}\n{before}\nENTRY %main (x: u16[8]) -> u16[8] {{\n{body}\n}}\n")


def count(found: Overlap) -> tuple[int, int]:
    """(exchanges in one execution, asynchronous ones among them)."""
    runs = [(e.collective.times, e.collective.asynchronous) for e in found.exchanges]
    return sum(times for times, _ in runs), sum(times for times, asynchronous in runs if asynchronous)


def measured(module: Module) -> Overlap:
    return overlap(module, MESH, lambda collective: WIRE, Rates(clock_hz=1.0, peak_flops=1.0))


def test_one_exchange() -> None:
    """Between start and done: products of 4 and a kernel of 3, and 5 of other work."""
    found = measured(
        program(
            matmul("before", 100, "x"),
            start("s", "before"),
            matmul("m", 4, "x"),
            other("o", 5, "m", "x"),
            kernel("k", 3, "o"),
            done("d", "s"),
            matmul("after", 100, "d"),
        )
    )
    (exchange,) = found.exchanges
    assert exchange.matmuls == (("m", 4), ("k", 3))
    assert (exchange.seconds, exchange.matmul_seconds, exchange.other_seconds, exchange.hidden_seconds) == (10, 7, 5, 7)
    assert (*count(found), found.exchange_seconds, found.hidden_seconds) == (1, 1, 10, 7)
    # `before` feeds the exchange and `after` needs it: 7 are all that could ever hide.
    assert (found.hidden, found.ceiling, found.reached) == (0.7, 0.7, 1.0)


def test_no_more_is_hidden_than_there_is() -> None:
    found = measured(program(start("s", "x"), matmul("m", 7, "x"), matmul("n", 33, "x"), done("d", "s")))
    assert (found.exchanges[0].matmul_seconds, found.hidden_seconds) == (40, 10)
    assert (found.hidden, found.ceiling, found.reached) == (1, 1, 1)


def test_a_product_hides_one_exchange_at_a_time() -> None:
    """s2 ends first and takes 10 of the 14 seconds of m; s1 had 3 of its own before, and gets the other 4."""
    found = measured(
        program(
            start("s1", "x"),
            matmul("m0", 3, "x"),
            start("s2", "x"),
            matmul("m", 14, "x"),
            done("d2", "s2"),
            done("d1", "s1"),
        )
    )
    assert [e.collective.name for e in found.exchanges] == ["s2", "s1"]
    assert [e.hidden_seconds for e in found.exchanges] == [10, 3 + 4]
    assert [e.matmul_seconds for e in found.exchanges] == [14, 17]
    assert found.hidden_seconds == 17
    assert found.possible_seconds == 17


def test_a_better_schedule_is_possible() -> None:
    """Two chunks, nothing scheduled well: each one's product could run beside the other's exchange."""
    found = measured(
        program(
            start("s1", "x"),
            done("d1", "s1"),
            start("s2", "x"),
            matmul("small", 1, "x"),
            done("d2", "s2"),
            matmul("m1", 6, "d1"),
            matmul("m2", 8, "d2"),
            matmul("both", 50, "m1", "m2"),
        )
    )
    assert found.hidden_seconds == 1
    assert found.possible_seconds == 1 + 6 + 8  # not `both`, which needs the two
    assert found.ceiling == 15 / 20
    assert found.reached == pytest.approx(1 / 15)


def test_dependences_are_followed_through_other_instructions() -> None:
    """m feeds s2 through o, and needs s1 through d1: it hides neither."""
    found = measured(
        program(
            start("s1", "x"),
            done("d1", "s1"),
            other("p", 1, "d1", "x"),
            matmul("m", 6, "p"),
            other("o", 1, "m", "x"),
            start("s2", "o"),
            done("d2", "s2"),
        )
    )
    assert (found.possible_seconds, found.ceiling, found.reached) == (0, 0, 0)


def test_synchronous_exchanges_hide_nothing_but_could() -> None:
    found = measured(program(synchronous("a", "x"), matmul("m", 4, "x"), synchronous("b", "m")))
    assert (*count(found), found.exchange_seconds, found.hidden_seconds) == (2, 0, 20, 0)
    assert found.possible_seconds == 4  # beside a


def test_loops_weigh() -> None:
    """Three layers forward hide 4 of 10 seconds each; an exchange outside hides 2, and the loops can't help it."""
    layers = loop_of(start("s", "q"), matmul("m", 4, "q"), done("d", "s"), matmul("n", 1, "d"))
    loop = (
        '%loop = u16[8]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    found = measured(program(loop, start("t", "loop"), matmul("u", 2, "x"), done("v", "t"), before=layers))
    assert (*count(found), found.exchange_seconds) == (4, 4, 40)
    assert found.hidden_seconds == 3 * 4 + 2
    assert found.possible_seconds == 3 * 4 + 2
    assert found.busy_seconds == 3 * 4 + 2


def test_a_loop_of_products_hides_as_long_as_it_runs() -> None:
    inner = loop_of(matmul("m", 2, "q"))
    loop = '%l = u16[8]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert measured(program(start("s", "x"), loop, done("d", "s"), before=inner)).hidden_seconds == 6


def test_wrapped_exchanges() -> None:
    """async-start calls a computation that holds the exchange."""
    wrapped = f"%wrapped (q: u16[8]) -> u16[8] {{\n  %q = u16[8]{{0}} parameter(0)\n  {synchronous('a', 'q')}\n}}\n"
    found = measured(
        program(
            "%s = ((u16[8]{0}), u16[8]{0}, u32[]) async-start(%x), calls=%wrapped",
            matmul("m", 4, "x"),
            "%u = ((u16[8]{0}), u16[8]{0}, u32[]) async-update(%s)",
            matmul("n", 1, "x"),
            "%d = u16[8]{0} async-done(%u)",
            before=wrapped,
        )
    )
    assert (*count(found), found.hidden_seconds, found.possible_seconds) == (1, 1, 5, 5)


# A gather that TPU carries in fusions: a start, a step beside a product, a done.
CARRIED = """%start.in (p: u16[8]) -> (u16[8], u16[16]) {
  %p = u16[8]{0} parameter(0)
  %g = u16[16]{0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = (u16[8]{0}, u16[16]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: u16[8]) -> u16[8] {
  %p = u16[8]{0} parameter(0)
  %g = u16[16]{0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}
  %a = u16[2,2]{1,0} bitcast(%p)
  ROOT %d = u16[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%done.in (p: u16[8]) -> u16[16] {
  %p = u16[8]{0} parameter(0)
  %g = u16[16]{0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = u16[16]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_that_fusions_carry() -> None:
    """It is one collective of 8 bytes to the other rank; its step's product and the one behind it run beside it."""
    module = program(
        "%s = (u16[8]{0}, u16[16]{0}) fusion(%x), kind=kLoop, calls=%start.in",
        f"%m = u16[8]{{0}} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1, {estimate(4)}",
        matmul("n", 3, "m"),
        "%d = u16[16]{0} fusion(%n), kind=kLoop, calls=%done.in",
        matmul("o", 5, "d"),
        before=CARRIED,
    )
    (found,) = collectives(module, MESH)
    assert (found.kind, found.asynchronous, found.times, found.sent_bytes) == ("all-gather", True, 1, 16)
    of_parameters = overlap(
        module, MESH, lambda collective: WIRE, Rates(clock_hz=1.0, peak_flops=1.0), parameter_collective
    )
    assert (of_parameters.exchange_seconds, of_parameters.hidden_seconds) == (WIRE, 7)


def between_slices(name: str, opcode: str, kind: str, operand: str, target: str = '"{1,2}x{0:3}"') -> str:
    attributes = {"host_transfer_rendezvous": f'"{kind}.7_0"', "megascale_reduce_operation": '"SUM"',
                  "megascale_target": target, "megascale_transfer_type": f'"{kind}"'}  # fmt: skip
    text = ",".join(f"_xla_{key}={value}" for key, value in attributes.items())
    return (
        f"%{name} = (u16[8]{{0}}, u32[], token[]) {opcode}(%{operand}, %after), channel_id=2, is_host_transfer=true, "
        f"frontend_attributes={{{text}}}"
    )


@pytest.mark.parametrize(
    ("target", "axes", "ranks"),
    [
        ('"{1,2,3,4}x{0:1}"', ("replica", "data"), 4),
        # Of four slices of two: pairs of slices, and all devices.
        ("{{100000,200000},{100001,200001},{300000,400000},{300001,400001}}", ("data",), 2),
        ("{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}", ("replica",), 2),
        ("{{100000,100001,200000,200001,300000,300001,400000,400001}}", ("replica", "data", "expert"), 8),
    ],
)
def test_groups_between_slices(target: str, axes: tuple[str, ...], ranks: int) -> None:
    module = program("%after = token[] after-all()", between_slices("s", "send", "ALL_REDUCE", "x", target))
    (found,) = collectives(module, {"replica": 2, "data": 2, "expert": 2})
    assert (found.axes, found.ranks) == (axes, ranks)


@pytest.mark.parametrize(("kind", "sent"), [("ALL_REDUCE", 16), ("ALL_GATHER", 16), ("REDUCE_SCATTER", 8)])
def test_a_collective_between_slices(kind: str, sent: float) -> None:
    """Of two slices of four ranks: a send that the runtime answers with a recv, and the products before its end."""
    mesh = {"replica": 2, "data": 1, "expert": 4}
    module = program(
        "%after = token[] after-all()",
        between_slices("r", "recv", kind, "after").replace("(%after, %after)", "(%after)"),
        between_slices("s", "send", kind, "x"),
        matmul("m", 3, "x"),
        "%sd = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        matmul("n", 4, "m"),
        "%rd = (u16[8]{0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true",
        "%y = u16[8]{0} get-tuple-element(%rd), index=0",
        matmul("o", 5, "y"),
    )
    (found,) = collectives(module, mesh)
    assert (found.kind, found.axes, found.ranks) == (kind.lower().replace("_", "-"), ("replica",), 2)
    assert (found.asynchronous, found.dtypes, found.sent_bytes) == (True, ("u16",), sent)
    of_parameters = overlap(
        module, mesh, lambda collective: WIRE, Rates(clock_hz=1.0, peak_flops=1.0), parameter_collective
    )
    assert (of_parameters.exchange_seconds, of_parameters.hidden_seconds) == (WIRE, 7)


def test_what_sums_gradients_and_gathers_parameters() -> None:
    """Not the exchange, nor what the ranks of tensor gather."""
    module = program(
        synchronous("e", "x"),
        '%g = u16[16]{0} all-gather(%e), replica_groups={{0,1},{2,3}}, dimensions={0}, metadata={op_name="jit(step)"}',
        '%t = u16[16]{0} all-gather(%g), replica_groups={{0,2},{1,3}}, dimensions={0}, metadata={op_name="jit(step)"}',
        '%r = u16[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(step)"}',
    )
    found = collectives(module, {"tensor": 2, "expert": 2})
    assert [c.name for c in found if parameter_collective(c)] == ["g", "r"]


def test_what_the_compiler_does_not_estimate() -> None:
    """Its largest integer stands for an unknown number; a product then takes its FLOPs, 2·2·2·2 of a second each."""
    unknown = 2**63 - 1
    found = measured(program(start("s", "x"), other("o", unknown, "x"), matmul("m", unknown, "x"), done("d", "s")))
    (exchange,) = found.exchanges
    assert (exchange.other_seconds, exchange.matmul_seconds) == (0, 16)


def test_only_payload_counts() -> None:
    module = program(start("s", "x").replace("exchange_payload", "exchange_metadata"), done("d", "s"))
    found = measured(module)
    assert (found.exchanges, found.hidden, found.ceiling, found.reached) == ((), 0, 0, 0)


def test_an_unscheduled_program() -> None:
    with pytest.raises(ValueError, match="is_scheduled=true"):
        measured(dataclasses.replace(program(start("s", "x"), done("d", "s")), header="HloModule test"))


@pytest.mark.parametrize(("bandwidth", "seconds"), [(1e9, 2 * (2 * 8 * 8 * 4)), (1 / 16, 16 * (2 * 64))])
def test_attention_takes_time(bandwidth: float, seconds: float) -> None:
    """Its kernels carry no cycles: at half the peak, or as fast as what they read and write passes."""
    call = (
        '%k = bf16[1,1,8,4] custom-call(%q), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}, backend_config={"custom_call_config":{}}'
    )
    module = program("%q = bf16[1,1,8,4] parameter(1)", start("s", "x"), call, done("d", "s"))
    (exchange,) = overlap(module, MESH, lambda _: WIRE, Rates(1.0, 1.0, bandwidth)).exchanges
    assert exchange.matmuls == (("k", seconds),)


def test_kernels_beside_an_exchange_are_at_their_peak() -> None:
    """Whatever they read and write: three FLOPs, ten a second."""
    module = program(start("s", "x"), kernel("k", 3, "x"), done("d", "s"))
    (exchange,) = overlap(module, MESH, lambda _: WIRE, Rates(1.0, 10.0, 1.0)).exchanges
    assert exchange.matmuls == (("k", 0.3),)


UNKNOWN = 2**63 - 1  # cycles


def test_seconds_of_work() -> None:
    """Two cycles a second, four FLOPs and sixteen bytes: loops as often as they run, or once where that is not known;
    kernels at half the peak, or as fast as what they read and write passes; exchanges take none."""
    body = loop_of(matmul("m", 4, "q"))
    loop = "%l{} = u16[8]{{0}} while(%x), condition=%condition, body=%body"
    attention = (
        '%a = bf16[1,1,8,4] custom-call(%q), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}, backend_config={"custom_call_config":{}}'
    )
    seconds = {
        loop.format(1) + ', backend_config={"known_trip_count":{"n":"3"}}': 3 * 4 / 2,
        loop.format(2): 4 / 2,
        "%c = u16[8]{0} call(%x), to_apply=%body": 4 / 2,
        matmul("u", UNKNOWN, "x"): 2 * 2 * 2 * 2 / 4,
        other("o", 5, "x"): 5 / 2,
        kernel("k1", 40, "x"): 40 / 4 / 0.5,
        kernel("k2", 3, "x"): (16 + 16) / 16,
        kernel("k3", 3, "x", size=26): 26 / 16,  # of a part of what it is given
        kernel("k4", 3, "x", size=100): (16 + 16) / 16,  # some of it more than once
        "%q = bf16[1,1,8,4] parameter(1)": 0,
        attention: 2 * 8 * 8 * 4 / 4 / 0.5,
        synchronous("s", "x"): 0,
    }
    rates = Rates(2.0, 4.0, 16.0)
    for line, expected in seconds.items():
        lines = ("%q = bf16[1,1,8,4] parameter(1)", line) if line is attention else (line,)
        assert work_seconds(program(*lines, before=body), rates) == expected, line
    assert work_seconds(program(*seconds, before=body), rates) == sum(seconds.values())


@pytest.mark.parametrize("clock_hz", [2.0, None])
def test_what_a_plan_says_of_a_schedule(clock_hz: float | None) -> None:
    """Of 2 × 4 ranks. Bytes on the wire: along expert 3/4 of 16, along node 1/2; over both at once 7/8, of which the
    four ranks of the other node get four sevenths. Each byte is a second here."""
    groups = {"s": "{0,1,2,3},{4,5,6,7}", "a": "{0,4},{1,5},{2,6},{3,7}", "b": "{0,1,2,3,4,5,6,7}"}

    def along(line: str, name: str) -> str:
        return line.replace("{{0,1}}", f"{{{groups[name]}}}")

    module = program(
        along(start("s", "x"), "s"),
        matmul("m", 6, "x"),
        other("o", 4, "x"),
        done("d", "s"),
        matmul("n", 4, "x"),
        along(synchronous("a", "d"), "a"),
        along(synchronous("b", "a"), "b"),
        kernel("k1", 20, "b"),
        kernel("k2", 5, "b"),
        along("%g = (u16[8]{0}, u16[32]{0}) all-gather-start(%k2), replica_groups={{0,1}}, dimensions={0}", "s"),
        matmul("h", 2, "x"),
        "%i = u16[32]{0} all-gather-done(%g)",
        along("%r = u16[8]{0} all-reduce(%h), replica_groups={{0,1}}, to_apply=%add", "a"),
    )
    mesh, asked, rings = {"node": 2, "expert": 4}, list[Any](), list[Any]()

    def around(sent: float, ranks: int, stride: int) -> float:
        rings.append((sent, ranks, stride))
        return sent

    def exchange(sent: Sent, exchanges: int, hierarchical: bool = False) -> float:
        asked.append((sent, exchanges, hierarchical))
        return sum(sent)

    hardware = SimpleNamespace(clock_hz=clock_hz, peak_flops=2.0, memory_bandwidth=4.0)
    here: Any = SimpleNamespace(sizes=mesh, hardware=hardware, exchange=exchange, around=around)
    compiled: Any = SimpleNamespace(mesh=mesh)
    found = compiled_programs._describe_schedule(module, compiled, here)
    # A gather of four ranks' 16 bytes sends three quarters of 64, a sum of two ranks' 16 half of them twice.
    assert rings == [(48, 4, 1), (16, 2, 4)]
    assert asked == [((12, 0), 1, True), ((0, 8), 1, True), (pytest.approx((6, 8)), 1, False)]
    # A cycle is half a second; the kernels take 20 FLOPs at half the peak, and 32 bytes. Without cycles, as on a GPU,
    # nothing but kernels takes time here.
    cycles = 0.5 if clock_hz else 0.0
    work, hidden, busy, possible = 16 * cycles + 20 + 8, 6 * cycles, 10 * cycles, 12 * cycles
    beside = 2 * cycles
    parameters = {
        "collectives_in_a_step": 2,
        "asynchronous_in_a_step": 1,
        "seconds": 64,
        "hidden_seconds": beside,
        "busy_seconds": beside,
    }
    assert found.pop("parameters") == pytest.approx(parameters)
    assert found == pytest.approx(
        {
            "work_seconds": work,
            "estimated_step_seconds": work + 34 - busy + 64 - beside,
            "exchanges_in_a_layer": 3,
            "asynchronous_in_a_layer": 1,
            "exchange_seconds": 34,
            "hidden_seconds": hidden,
            "busy_seconds": busy,
            "hidden_share": hidden / 34,
            "ceiling": possible / 34,
            "reached_of_ceiling": 0.5 if clock_hz else 0,
        }
    )
