"""Measures how much of its collectives a compiled schedule hides behind matrix products.

Instructions of a scheduled program stand in the order in which they start. An asynchronous collective is a start and a
done; what stands between them runs meanwhile. On TPU instructions carry the compiler's estimate of their cycles, except
Mosaic kernels; their time, and on GPU that of all products, follows from their FLOPs.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bigmac_jax.planning.hlo import Computation, Instruction, Module
from bigmac_jax.planning.hlo_collectives import Collective, channel, collectives, fusion_stage, transfer
from bigmac_jax.planning.hlo_flops import attention_kernel, dot_flops, kernel_bytes, kernel_flops

_UNKNOWN = 2**63 - 1  # cycles, as the compiler writes it
KERNEL_SHARE = 0.5  # of the peak is what attention is taken to reach: softmax stands between its products


class Exchange(NamedTuple):
    """One run of a collective; times are in seconds."""

    collective: Collective
    seconds: float  # on the wire
    matmuls: tuple[tuple[str, float], ...]  # names and seconds of the matrix products between its start and its done
    other_seconds: float  # of the other instructions between them, as far as the compiler estimates them
    hidden_seconds: float  # of the exchange behind matrix products, each of which hides one exchange at a time

    @property
    def matmul_seconds(self) -> float:
        """Seconds of the matrix products between its start and its done."""
        return sum(seconds for _, seconds in self.matmuls)


@dataclass(frozen=True)
class Overlap:
    """All exchanges of one rank in one execution; sums weight each by how often it runs."""

    exchanges: tuple[Exchange, ...]  # in the order in which they end
    possible_seconds: float  # of exchange that data dependences allow to hide

    def _sum(self, value: Callable[[Exchange], float]) -> float:
        return sum(e.collective.times * value(e) for e in self.exchanges)

    @property
    def exchange_seconds(self) -> float:
        """Seconds of all exchanges on the wire."""
        return self._sum(lambda e: e.seconds)

    @property
    def hidden_seconds(self) -> float:
        """Seconds of exchange behind matrix products."""
        return self._sum(lambda e: e.hidden_seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds of exchange beside which the chip does anything at all, as far as the compiler estimates it."""
        return self._sum(lambda e: min(e.seconds, e.matmul_seconds + e.other_seconds))

    @property
    def hidden(self) -> float:
        """Share of the exchange that the schedule hides."""
        return self.hidden_seconds / self.exchange_seconds if self.exchange_seconds else 0.0

    @property
    def ceiling(self) -> float:
        """Share of the exchange that another schedule of the same instructions could hide.

        The dependences are the compiled program's: a fusion across chunks ties together what the model keeps apart.
        """
        return self.possible_seconds / self.exchange_seconds if self.exchange_seconds else 0.0

    @property
    def reached(self) -> float:
        """`hidden` as a share of `ceiling`."""
        return self.hidden_seconds / self.possible_seconds if self.possible_seconds else 0.0


class Rates(NamedTuple):
    """What turns instructions into seconds."""

    clock_hz: float  # cycles a second of the matrix units; a GPU's program counts no cycles
    peak_flops: float  # FLOPs a second, for what has FLOPs and no estimate of cycles
    memory_bandwidth: float = math.inf  # bytes a second, for kernels


def overlap(
    module: Module,
    mesh: Mapping[str, int],
    exchange_seconds: Callable[[Collective], float],
    rates: Rates,
    chosen: Callable[[Collective], bool] = lambda collective: collective.role == "payload",
    kernel_share: float = 1.0,
) -> Overlap:
    """Finds for each chosen collective which matrix products run while it is on the wire.

    Args:
      mesh: as for `collectives`.
      exchange_seconds: seconds of one run of a collective with the wire to itself.
      chosen: by default the layer's exchanges.
      kernel_share: share of the peak that kernels reach while they run beside one; at 1 none hides more than it must.

    Raises:
      ValueError: the module is not scheduled.
    """
    if not module.scheduled:
        raise ValueError("the program must be scheduled (is_scheduled=true); pass the as_text() of a compiled program")
    inside: dict[str, dict[str, Collective]] = {}
    for collective in collectives(module, mesh):
        if chosen(collective):
            inside.setdefault(collective.computation, {})[collective.name] = collective
    costs = _Costs(module, rates, kernel_share)
    exchanges, possible = list[Exchange](), 0.0
    for name, use in module.uses.items():
        if use.asynchronous or use.fused:  # its exchange is the instruction that starts it
            continue
        computation = module.computations[name]
        found = {
            position: collective
            for position, instruction in enumerate(computation.instructions)
            for collective in _started_exchanges(instruction, inside.get(name, {}), inside)
        }
        if found:
            in_flight = _in_flight(computation, found, exchange_seconds, costs)
            exchanges += in_flight
            on_wire = sum(exchange.seconds for exchange in in_flight)
            possible += use.times * min(on_wire, _independent_seconds(computation, list(found), costs))
    return Overlap(tuple(exchanges), possible)


def work_seconds(module: Module, rates: Rates) -> float:
    """Seconds that one rank computes in one execution, one instruction after the other, collectives left out.

    They are the compiler's estimates, and for kernels, which have none, their FLOPs at half the peak or their bytes,
    whichever takes longer.
    """
    costs = _Costs(module, rates, kernel_share=KERNEL_SHARE)
    entry = module.computations[module.entry]
    return sum(costs.seconds(entry, instruction) for instruction in entry.instructions)


class _Costs:
    """Seconds and FLOPs of instructions and of what they call.

    Args:
      kernel_share: share of the peak that kernels other than attention's reach.
    """

    def __init__(self, module: Module, rates: Rates, kernel_share: float):
        self.module, self.rates, self.kernel_share = module, rates, kernel_share
        self.flops_within = functools.cache(self._flops_within)

    def flops(self, computation: Computation, instruction: Instruction) -> int:
        """FLOPs of an instruction, and of what it calls, once."""
        own = dot_flops(computation, instruction) + kernel_flops(computation, instruction)
        return own + sum(self.flops_within(name) for name in instruction.calls)

    def seconds(self, computation: Computation, instruction: Instruction) -> float:
        cycles = int(instruction.backend_config.get("window_config", {}).get("estimated_cycles", _UNKNOWN))
        if cycles != _UNKNOWN:
            return cycles / self.rates.clock_hz
        if instruction.opcode in ("while", "call", "conditional"):
            inner = (self.module.computations[name] for name in instruction.calls)
            once = sum(self.seconds(called, i) for called in inner for i in called.instructions)
            trips = self.module.trips(computation.name, instruction) if instruction.opcode == "while" else 1
            return once * (1 if trips is None else trips)
        seconds = self.flops(computation, instruction) / self.rates.peak_flops
        if instruction.opcode != "custom-call" or not seconds:
            return seconds
        size = instruction.bytes + sum(shape.bytes for shape in computation.operands(instruction))
        size = min(size, kernel_bytes(instruction) or size)
        share = KERNEL_SHARE if attention_kernel(instruction) else self.kernel_share
        return max(seconds / share, size / self.rates.memory_bandwidth if share < 1 else 0)

    def _flops_within(self, name: str) -> int:
        computation = self.module.computations[name]
        return sum(self.flops(computation, instruction) for instruction in computation.instructions)


def parameter_collective(collective: Collective) -> bool:
    """Whether it gathers parameters or sums gradients: what is neither the exchange's nor of `tensor`'s ranks."""
    return collective.role == "other" and collective.kind != "collective-permute" and collective.axes != ("tensor",)


def other_collective(collective: Collective) -> bool:
    """Whether it is of `tensor`'s ranks, or sends to one other rank."""
    return collective.role == "other" and not parameter_collective(collective)


def _started_exchanges(
    instruction: Instruction, here: Mapping[str, Collective], inside: Mapping[str, Mapping[str, Collective]]
) -> list[Collective]:
    """The collectives that an instruction is or, as an async-start or a fusion does, wraps."""
    if instruction.name in here:
        return [here[instruction.name]]
    if instruction.opcode.endswith("-start") or instruction.opcode == "fusion":
        return [collective for name in instruction.calls for collective in inside.get(name, {}).values()]
    return []


def find_ends(module: Module, computation: Computation) -> dict[int, int]:
    """Position of each start → position of what waits for it."""
    starts, names = dict[str, int](), dict[str, str]()
    ends = {}
    for position, instruction in enumerate(computation.instructions):
        if instruction.opcode == "fusion":
            fused = module.computations[instruction.calls[0]]
            stage = fusion_stage(fused)
            if stage == "start":
                starts[channel(fused)] = position
            elif stage == "done" and channel(fused) in starts:
                ends[starts[channel(fused)]] = position
        elif between := transfer(instruction):  # what a send gives comes with the recv of its name
            starts[between.name if instruction.opcode == "send" else instruction.name] = position
            names[instruction.name] = between.name
        elif instruction.opcode == "recv-done" and instruction.operands[0] in names:
            ends[starts[names[instruction.operands[0]]]] = position
        elif instruction.opcode.endswith("-start"):
            starts[instruction.name] = position
        elif instruction.opcode.endswith(("-update", "-done")) and instruction.operands[0] in starts:
            starts[instruction.name] = starts[instruction.operands[0]]
            ends[starts[instruction.name]] = position
    return ends


def _in_flight(
    computation: Computation,
    found: Mapping[int, Collective],
    exchange_seconds: Callable[[Collective], float],
    costs: _Costs,
) -> list[Exchange]:
    """A computation's exchanges in the order in which they end, which is that in which they take products' seconds."""
    ends, free, exchanges = find_ends(costs.module, computation), dict[int, float](), list[Exchange]()
    for start in sorted(found, key=lambda start: ends.get(start, start)):
        seconds, matmuls = exchange_seconds(found[start]), list[tuple[str, float]]()
        other = hidden = 0.0
        for position in range(start + 1, ends.get(start, start)):
            instruction = computation.instructions[position]
            cost = costs.seconds(computation, instruction)
            if not costs.flops(computation, instruction):
                other += cost
                continue
            matmuls.append((instruction.name, cost))
            taken = min(seconds - hidden, free.get(position, cost))
            hidden, free[position] = hidden + taken, free.get(position, cost) - taken
        exchanges.append(Exchange(found[start], seconds, tuple(matmuls), other, hidden))
    return exchanges


def _independent_seconds(computation: Computation, exchanges: list[int], costs: _Costs) -> float:
    """Seconds of the products that neither feed nor need at least one of the exchanges at these positions."""
    places = {instruction.name: place for place, instruction in enumerate(computation.instructions)}
    needs = list[int]()  # for each instruction a bit for every place that it needs; a done needs its start
    for instruction in computation.instructions:
        operands = [places[name] for name in instruction.operands if name in places]
        needs.append(functools.reduce(operator.or_, (needs[place] | 1 << place for place in operands), 0))
    return sum(
        costs.seconds(computation, instruction)
        for place, instruction in enumerate(computation.instructions)
        if costs.flops(computation, instruction)
        and not all(needs[place] >> exchange & 1 or needs[exchange] >> place & 1 for exchange in exchanges)
    )
