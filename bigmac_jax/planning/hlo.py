"""Parses compiled programs from their HLO text, and finds how often each instruction runs.

`parse(compiled.as_text())` reads what XLA:CPU, XLA:TPU and XLA:GPU print with jax 0.10 to 0.12. All numbers are those
of one rank and one execution of ENTRY; a loop's body counts as often as the program is known to run it.
"""

import functools
import graphlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigmac_jax.model.exchange.rounds import FURTHER

# Instructions that hold no memory of their own, or that of another instruction.
_VIEWS = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "domain"}
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN = re.compile(_STRING + r"|/\*.*?\*/|[()\[\]{},]")
_CONTINUED = re.compile(r'\n(?="|\}\})')  # metadata of a kernel is printed over several lines
_HEAD = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")


class Shape(NamedTuple):
    """An array's type; layouts are dropped, and with them the padding of tiles."""

    dtype: str  # as XLA writes it: f32, bf16, s4, pred
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    operands: tuple[str, ...]  # names; a parameter's is its number, a constant's its value
    result: str  # the shape as it is printed
    details: str  # the attributes as they are printed

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the results, tuples flattened."""
        found = re.findall(r"\b([a-z]\w*)\[([^]]*)\]", self.result)
        return tuple(Shape(dtype, tuple(integers(dims))) for dtype, dims in found)

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """Attribute texts by name."""
        parts = (part.partition("=") for part in _split(self.details)[0])
        return {name: value for name, _, value in parts}

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @functools.cached_property
    def op_name(self) -> str:
        """The path of jax's scopes and transformations that made it; "" where XLA gives none."""
        found = re.search(f"op_name=({_STRING})", self.attributes.get("metadata", ""))
        return re.sub(r"\\(.)", r"\1", found[1][1:-1]) if found else ""

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        """The backend's JSON settings; {} where there are none or they are not JSON, as a Triton kernel's."""
        try:
            config = json.loads(self.attributes.get("backend_config", "{}"))
        except ValueError:
            return {}
        return json.loads(config or "{}") if isinstance(config, str) else config

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that it runs, without those that it applies to elements, as a reduction does."""
        names = ["calls", "body", "condition", "branch_computations", "true_computation", "false_computation"]
        names += ["called_computations"] + ["to_apply"] * self.opcode.startswith("call")
        text = " ".join(self.attributes[name] for name in names if name in self.attributes)
        return tuple(name.lstrip("%") for name in re.findall(r"[\w.%-]+", text))


@dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which in a scheduled module is the order in which they start."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction  # its result

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    def operands(self, instruction: Instruction) -> list[Shape]:
        """Shapes of an instruction's operands, tuples flattened."""
        return [shape for name in instruction.operands for shape in self.by_name[name].shapes]

    def original(self, name: str) -> Instruction:
        """What the instruction `name` is, or is a copy of."""
        instruction = self.by_name[name]
        copied = instruction.opcode in ("copy", "bitcast")
        return self.original(instruction.operands[0]) if copied else instruction

    def constant(self, name: str) -> int | None:
        """The integer that the instruction `name` holds, or None if the program does not fix it."""
        instruction = self.original(name)
        known = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0])
        return int(instruction.operands[0]) if known else None


class Use(NamedTuple):
    """How one execution of ENTRY runs a computation."""

    times: int  # a loop of unknown length, and a branch, count as one
    loops: tuple[int | None, ...] = ()  # trips of the loops around it, outermost first; the deepest of several places
    fused: bool = False  # its intermediate results are never in memory
    asynchronous: bool = False  # it runs between an instruction that starts it and one that waits for it


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    header: str
    entry: str
    computations: dict[str, Computation]

    @property
    def scheduled(self) -> bool:
        """Whether instructions stand in the order in which they start."""
        return "is_scheduled=true" in self.header

    @functools.cached_property
    def uses(self) -> dict[str, Use]:
        """How each computation is used, by name; those that never run are left out."""
        graph = {c.name: {n for i in c.instructions for n in i.calls} for c in self.computations.values()}
        uses = {self.entry: Use(1)}
        for name in reversed(list(graphlib.TopologicalSorter(graph).static_order())):
            if name in uses:
                for instruction in self.computations[name].instructions:
                    for called in instruction.calls:
                        uses[called] = self._add_use(uses.get(called), name, uses[name], instruction)
        return uses

    def _add_use(self, known: Use | None, name: str, outer: Use, caller: Instruction) -> Use:
        """The use of a computation that `caller`, an instruction of computation `name`, runs too."""
        times, loops = outer.times, outer.loops
        if caller.opcode == "while":
            trips = self.trips(name, caller)
            times, loops = times * (1 if trips is None else trips), (*loops, trips)
        fused = outer.fused or caller.opcode == "fusion"
        asynchronous = outer.asynchronous or caller.opcode.endswith("-start")
        if known is None:
            return Use(times, loops, fused, asynchronous)
        deepest = max(known.loops, loops, key=len)
        return Use(known.times + times, deepest, known.fused and fused, known.asynchronous or asynchronous)

    def run(self) -> Iterator[tuple[Computation, Use, Instruction]]:
        """Yields every instruction that is run, with its computation and how that is used."""
        for name, use in self.uses.items():
            computation = self.computations[name]
            for instruction in computation.instructions:
                yield computation, use, instruction

    @property
    def dynamic_loops(self) -> list[str]:
        """Names of the loops whose number of trips the program does not fix; their bodies count once."""
        return [i.name for c, _, i in self.run() if i.opcode == "while" and self.trips(c.name, i) is None]

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a `while` instruction runs its body; None where the program does not fix it.

        An exchange's further rounds count 0 times, as everywhere: with uniform routing the first round sends all rows.
        """
        if FURTHER in loop.op_name:
            return 0
        if count := loop.backend_config.get("known_trip_count"):
            return int(count["n"])
        # TPU programs don't keep it: for (i = start; i < limit; i += step), i an element of the state.
        outer = self.computations[computation]
        condition, body = (self.computations[loop.attributes[name].lstrip("%")] for name in ("condition", "body"))
        state, test, result = outer.by_name[loop.operands[0]], condition.root, body.root
        if test.attributes.get("direction") != "LT" or state.opcode != "tuple" or result.opcode != "tuple":
            return None
        counter = condition.original(test.operands[0])
        if counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attributes["index"])
        add = body.original(result.operands[index])
        start, limit = outer.constant(state.operands[index]), condition.constant(test.operands[1])
        step = body.constant(add.operands[1]) if add.opcode == "add" else None
        if start is None or limit is None or step is None:
            return None
        return max(0, -((start - limit) // step))


def parse(text: str) -> Module:
    """Reads the text of a compiled program, in linear time.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    text = _CONTINUED.sub(" ", text)
    name, entry, root, found = "", "", -1, list[Instruction]()
    for line in text.splitlines():
        if not line.startswith(" "):
            if line.endswith("{") and " -> " in line:
                first, _, rest = line.partition(" ")
                name = (rest.split(" ", 1)[0] if first == "ENTRY" else first).lstrip("%")
                entry, root, found = name if first == "ENTRY" else entry, -1, []
            elif line.startswith("}"):
                computations[name] = Computation(name, tuple(found), found[root])
        elif head := _HEAD.match(line):
            root = len(found) if line.lstrip().startswith("ROOT ") else root
            found.append(_parse_instruction(head[1], line, head.end()))
    if entry not in computations:
        raise ValueError("no ENTRY computation in this text; pass the as_text() of a compiled program")
    return Module(text.partition("\n")[0], entry, computations)


def _parse_instruction(name: str, line: str, at: int) -> Instruction:
    end = _split(line, at + 1)[1] + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    operands, closing = _split(line, opening + 1)
    opcode = line[end:opening].strip()
    # An operand may be printed with its shape before its name.
    names = [part.rsplit(" ", 1)[-1].lstrip("%") for part in operands]
    return Instruction(name, opcode, tuple(names), line[at:end], line[closing + 1 :].lstrip(", "))


def _split(text: str, start: int = 0) -> tuple[list[str], int]:
    """The parts between commas up to the bracket that closes what was open at `start`, and that bracket's place."""
    parts, depth, begin, end = list[str](), 0, start, len(text)
    for token in _TOKEN.finditer(text, start):
        character = token[0][0]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                end = token.start()
                break
        elif character == "/" and depth == 0:  # /*index=5*/ before the sixth part
            begin = token.end()
        elif character == "," and depth == 0:
            parts.append(text[begin : token.start()])
            begin = token.end()
    parts.append(text[begin:end])
    return [part for part in map(str.strip, parts) if part], end


def integers(text: str) -> list[int]:
    """All runs of digits in a text, as integers."""
    return [int(number) for number in re.findall(r"\d+", text)]


class Buffer(NamedTuple):
    """A shape that instructions of a program return."""

    shape: Shape
    opcode: str  # of the first that does
    op_name: str
    instructions: int  # how many return it

    @property
    def bytes(self) -> int:
        return self.shape.bytes


def largest_buffers(module: Module, n: int) -> list[Buffer]:
    """The `n` largest distinct shapes that are in memory, largest first; not all of them at the same time."""
    found: dict[Shape, Buffer] = {}
    for computation, use, instruction in module.run():
        argument = instruction.opcode == "parameter" and computation.name == module.entry
        if use.fused or instruction.opcode.endswith("-start") or (instruction.opcode in _VIEWS and not argument):
            continue
        for shape in instruction.shapes:
            first = found.get(shape, Buffer(shape, instruction.opcode, instruction.op_name, 0))
            found[shape] = first._replace(instructions=first.instructions + 1)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:n]
