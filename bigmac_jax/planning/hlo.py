"""Reads compiled programs: what one rank sends, multiplies and holds in one execution, from their HLO text.

`parse(compiled.as_text())` understands XLA:CPU, XLA:TPU and XLA:GPU as jax 0.10 to 0.12 print them. Everything is of
one rank and of one execution of ENTRY: a loop's body counts as often as it is known to run.
"""

import functools
import graphlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.model.exchange.rounds import FURTHER
from bigmac_jax.model.exchange.wire import METADATA, PAYLOAD

KINDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
# What holds no memory of its own, or that of another instruction.
_VIEWS = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "domain"}
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN = re.compile(_STRING + r"|/\*.*?\*/|[()\[\]{},]")
_CONTINUED = re.compile(r'\n(?="|\}\})')  # metadata of a kernel is printed over several lines
_HEAD = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")


# cuDNN's attention: products of L × L × H that its result needs; what it computes again for the gradient is left out.
_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 4}
# Pallas' attention kernels (model/attention_kernels.py): products that each computes, with what it computes again.
_ATTENTION_KERNELS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,  # TPU: [B, N, L, H]
    "mha_forward": 2, "mha_backward": 7,  # Triton: [B, L, N, H]
}  # fmt: skip
_ATTENTION_KERNEL = re.compile(r"\b(splash_mha_(?:fwd|dq|dkv)|mha_(?:forward|backward))(?:\b|_)")


class Shape(NamedTuple):
    """An array; tuples are flattened. Layouts are dropped, and with them what tiles pad."""

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
        return tuple(
            Shape(dtype, tuple(_integers(dims))) for dtype, dims in re.findall(r"\b([a-z]\w*)\[([^]]*)\]", self.result)
        )

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        parts = (part.partition("=") for part in _split(self.details)[0])
        return {name: value for name, _, value in parts}

    @functools.cached_property
    def op_name(self) -> str:
        """What jax calls it: the path of scopes and transformations; empty where XLA says none."""
        found = re.search(f"op_name=({_STRING})", self.attributes.get("metadata", ""))
        return re.sub(r"\\(.)", r"\1", found[1][1:-1]) if found else ""

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        text = self.attributes.get("backend_config", "{}")
        try:
            config = json.loads(text)
        except ValueError:  # a Triton kernel's, which holds its program
            return {}
        return json.loads(config or "{}") if isinstance(config, str) else config

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs; not those that it applies to elements, as a reduction does."""
        names = ["calls", "body", "condition", "branch_computations", "true_computation", "false_computation"]
        names += ["called_computations"] + ["to_apply"] * self.opcode.startswith("call")
        text = " ".join(self.attributes[name] for name in names if name in self.attributes)
        return tuple(name.lstrip("%") for name in re.findall(r"[\w.%-]+", text))


@dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text: the schedule's, where the module has one."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction  # its result

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    def operands(self, instruction: Instruction) -> list[Shape]:
        """The shapes of its operands."""
        return [shape for name in instruction.operands for shape in self.by_name[name].shapes]

    def constant(self, name: str) -> int | None:
        """The integer of that name, if the program knows it."""
        instruction = self.by_name[name]
        if instruction.opcode in ("copy", "bitcast"):
            return self.constant(instruction.operands[0])
        known = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0])
        return int(instruction.operands[0]) if known else None


class Loop(NamedTuple):
    """A `while` instruction."""

    name: str
    trips: int | None  # None: the program doesn't say


class Use(NamedTuple):
    """How a computation is run in one execution of ENTRY."""

    times: int
    dynamic: bool = False  # `times` counts a loop of unknown length, or a branch, once
    loops: tuple[Loop, ...] = ()  # around it, outermost first; the most, if it is run from several places
    fused: bool = False  # its intermediate results are never in memory
    asynchronous: bool = False  # between an instruction that starts it and one that waits for it


@dataclass(frozen=True)
class Module:
    """A program."""

    header: str
    entry: str
    computations: dict[str, Computation]

    @property
    def scheduled(self) -> bool:
        return "is_scheduled=true" in self.header

    @functools.cached_property
    def uses(self) -> dict[str, Use]:
        """Of every computation that is run."""
        graph = {c.name: {n for i in c.instructions for n in i.calls} for c in self.computations.values()}
        uses = {self.entry: Use(1)}
        for name in reversed(list(graphlib.TopologicalSorter(graph).static_order())):
            if name in uses:
                for instruction in self.computations[name].instructions:
                    trips = self.trips(name, instruction) if instruction.opcode == "while" else 1
                    for called in instruction.calls:
                        uses[called] = _called(uses[name], instruction, trips, uses.get(called))
        return uses

    def run(self) -> Iterator[tuple[Computation, Use, Instruction]]:
        """Every instruction that is run."""
        for name, use in self.uses.items():
            computation = self.computations[name]
            for instruction in computation.instructions:
                yield computation, use, instruction

    @property
    def dynamic_loops(self) -> list[str]:
        """Names of the loops whose length the program doesn't say; their bodies count once."""
        return [i.name for c, _, i in self.run() if i.opcode == "while" and self.trips(c.name, i) is None]

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None where the program doesn't say.

        An exchange's further rounds are none, as in every count: at uniform routing the first one sends everything.
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
        counter = condition.by_name[test.operands[0]]
        if counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attributes["index"])
        add = body.by_name[result.operands[index]]
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
            found.append(_instruction(head[1], line, head.end()))
    if entry not in computations:
        raise ValueError("no ENTRY computation in this text; pass the as_text() of a compiled program")
    return Module(text.partition("\n")[0], entry, computations)


def _instruction(name: str, line: str, at: int) -> Instruction:
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


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _called(outer: Use, caller: Instruction, trips: int | None, before: Use | None) -> Use:
    """The use of a computation that `caller` runs, added to what was known of it."""
    use = Use(
        outer.times * (1 if trips is None else trips),
        outer.dynamic or trips is None or caller.opcode == "conditional",
        (*outer.loops, Loop(caller.name, trips)) if caller.opcode == "while" else outer.loops,
        outer.fused or caller.opcode == "fusion",
        outer.asynchronous or caller.opcode.endswith("-start"),
    )
    if before is None:
        return use
    return Use(
        before.times + use.times,
        before.dynamic or use.dynamic,
        max(before.loops, use.loops, key=len),
        before.fused and use.fused,
        before.asynchronous or use.asynchronous,
    )


@dataclass(frozen=True)
class Collective:
    """One collective instruction, seen from one rank."""

    name: str
    computation: str
    kind: str  # one of KINDS
    axes: tuple[str, ...]  # of the mesh, along which its groups reach
    ranks: int  # of a group
    dtypes: tuple[str, ...]
    buffer_bytes: int  # once, with the rank's own part: an all-gather's result, the operands of the others
    times: int  # in one execution
    dynamic: bool  # `times` counts a loop of unknown length, or a branch, once
    loops: tuple[Loop, ...]  # around it, outermost first
    asynchronous: bool
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """What one rank sends to others, once. A ragged all-to-all's depends on the data: this is uniform routing's."""
        share = (self.ranks - 1) / self.ranks
        return self.buffer_bytes * {"collective-permute": 1, "all-reduce": 2 * share}.get(self.kind, share)

    @property
    def direction(self) -> str:
        """forward | recomputed | backward: by what `jax.grad` and `jax.checkpoint` write into op_name."""
        if "rematted_computation" in self.op_name:
            return "recomputed"
        return "backward" if "transpose(" in self.op_name else "forward"

    @property
    def role(self) -> str:
        """payload | metadata (of the layer's exchange) | other: by named scopes, of which metadata's may be inside."""
        scopes = {METADATA: "metadata", PAYLOAD: "payload"}
        return next((role for scope, role in scopes.items() if scope in self.op_name), "other")


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that is run.

    Args:
      mesh: axis name → size, in the order that device numbers are row-major over.

    Raises:
      ValueError: a group names a device that the mesh doesn't have.
    """
    found = []
    for computation, use, instruction in module.run():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or not use.times:
            continue
        if _keeps_a_part(computation, instruction):
            kind = "reduce-scatter"
        axes, ranks = _axes(_groups(instruction, math.prod(mesh.values())), mesh)
        operands = computation.operands(instruction)
        size = sum(shape.bytes for shape in operands)
        if kind == "all-gather":
            size *= ranks
        elif kind == "ragged-all-to-all":  # (operand, output, …): what there is room for at the roomier end is not sent
            size = min(shape.bytes for shape in operands[:2])
            operands = operands[:1]
        elif kind == "collective-permute":
            ranks = math.prod(mesh[axis] for axis in axes)
        found.append(
            Collective(
                instruction.name, computation.name, kind, axes, ranks, tuple({shape.dtype: None for shape in operands}),
                size, use.times, use.dynamic, use.loops, use.asynchronous or instruction.opcode != kind,
                instruction.op_name,
            )
        )  # fmt: skip
    return found


def _keeps_a_part(computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce is TPU's way of writing a reduce-scatter: in one fusion with the slice that a rank keeps,
    and run as such (its emitter is called AllReduceScatterFusion)."""
    root = computation.root
    fused = instruction.opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter")
    return fused and root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Its replica groups, or source and target pairs."""
    attributes = instruction.attributes
    text = attributes.get("source_target_pairs") or attributes.get("replica_groups") or "{}"
    if text.startswith("mesh"):  # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}; an axis may be a part: 'b':(1)2
        order, _, last = attributes.get("device_ids", text).rpartition(" ")
        chosen = {name: _integers(part) for name, part in re.findall(r"'([^']+)'([^,}]*)", last)}
        dims, grouped = list[int](), list[int]()
        for name, size in re.findall(r"'([^']+)'=(\d+)", text):
            before, part = chosen.get(name) or (1, int(size))
            if name in chosen:
                grouped.append(len(dims) + 1)
            dims += [before, part, int(size) // (before * part)]
        order = order if "device_ids" in attributes else f"[{math.prod(dims)}]"
        ids = np.moveaxis(_device_ids(order).reshape(dims), grouped, range(-len(grouped), 0))
        return ids.reshape(-1, math.prod(dims[axis] for axis in grouped)).tolist()
    if text.startswith("["):  # [groups,ranks]<=[4,2]T(1,0)
        shape, _, order = text.partition("<=")
        return _device_ids(order).reshape(_integers(shape)).tolist()
    return [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)] or [list(range(devices))]


def _device_ids(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0, 1, … in that shape, transposed; (0,2,1,3): as they stand."""
    dims, _, permutation = text.partition("T")
    if "[" not in text:
        return np.array(_integers(text))
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(permutation)) if permutation else ids


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which groups reach, and the ranks of the largest."""
    devices = math.prod(mesh.values())
    if (largest := max(map(max, groups))) >= devices:
        raise ValueError(f"device {largest} must be one of the {devices} of the mesh {dict(mesh)}; pass the program's")
    coordinates = [np.unravel_index(group, tuple(mesh.values())) for group in groups]
    axes = tuple(name for axis, name in enumerate(mesh) if any(np.ptp(c[axis]) > 0 for c in coordinates))
    return axes, max(map(len, groups))


class Flops(NamedTuple):
    """Of matrix products; a multiply and an add are two."""

    dots: int
    kernels: int  # of Mosaic and Triton kernels, as these estimate them, and of cuDNN's attention
    dynamic: bool  # some stand in a loop of unknown length, or a branch, which counts once

    @property
    def total(self) -> int:
        return self.dots + self.kernels


def matmul_flops(module: Module) -> Flops:
    """Of one rank in one execution."""
    dots = kernels = 0
    dynamic = False
    for computation, use, instruction in module.run():
        dot, kernel = dot_flops(computation, instruction), kernel_flops(computation, instruction)
        dots, kernels = dots + use.times * dot, kernels + use.times * kernel
        dynamic |= use.dynamic and dot + kernel > 0
    return Flops(dots, kernels, dynamic)


def kernel_flops(computation: Computation, instruction: Instruction) -> int:
    """Of a Mosaic or Triton kernel, once, as it says itself, or of attention; 0 of anything else."""
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    if target in _ATTENTION:  # of whole sequences, [B, N, L, H], without credit for causality
        B, N, L, H = instruction.shapes[0].dims
        return _ATTENTION[target] * 2 * B * N * L * L * H
    if kernel := attention_kernel(instruction):
        # Its queries are the first operand that holds no integers; on TPU a batch of one is left out.
        dims = next(shape.dims for shape in computation.operands(instruction) if shape.dtype[0] not in "su")
        B, N, L, H = (1, *dims)[-4:] if kernel.startswith("splash") else (dims[0], dims[2], dims[1], dims[3])
        return _ATTENTION_KERNELS[kernel] * _causal_product(B, L, N, H)
    if target == "__gpu$xla.gpu.triton":
        said = re.search(r"\\22flops\\22: \\22(\d+)", instruction.attributes["backend_config"])
        return int(said[1]) if said else 0
    if target != "tpu_custom_call":
        return 0
    return int(instruction.backend_config["custom_call_config"].get("cost_estimate", {}).get("flops", 0))


def attention_kernel(instruction: Instruction) -> str:
    """Which of Pallas' attention kernels it is, that say no FLOPs and carry no estimate of their time; or ""."""
    if instruction.attributes.get("custom_call_target", "").strip('"') not in (
        "tpu_custom_call",
        "__gpu$xla.gpu.triton",
    ):
        return ""
    found = _ATTENTION_KERNEL.search(instruction.op_name)
    return found[1] if found else ""


def attention_flops(B: int, L: int, N: int, H: int, backward: bool) -> int:
    """Of the products of Pallas' kernels, forward or backward: two, or seven of which two are computed again for each
    gradient. Causal, so half of L × L; documents in a row, which need less, are not known."""
    return (7 if backward else 2) * _causal_product(B, L, N, H)


def _causal_product(B: int, L: int, N: int, H: int) -> int:
    return 2 * B * N * L * L * H // 2


def dot_flops(computation: Computation, instruction: Instruction) -> int:
    """Of a dot, a convolution or oneDNN's matmul, once; 0 of anything else."""
    if instruction.opcode == "dot":
        lhs = computation.operands(instruction)[0].dims
        summed = _integers(instruction.attributes.get("lhs_contracting_dims", ""))
        return 2 * math.prod(instruction.shapes[0].dims) * math.prod(lhs[axis] for axis in summed)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.attributes.get("custom_call_target") == '"__onednn$matmul"':
        size, other = (math.prod(shape.dims) for shape in computation.operands(instruction)[:2])
        m, n = instruction.shapes[0].dims[-2:]
        return 2 * math.isqrt(size * other * m * n)  # B·M·K × B·K·N, whichever is transposed
    return 0


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """TPU writes dots as convolutions: batch dimensions as windows of which one place in each meets an element."""
    lhs, rhs = (shape.dims for shape in computation.operands(instruction)[:2])
    result, attributes = instruction.shapes[0].dims, instruction.attributes
    labels_lhs, labels_rhs, labels_result = re.split("_|->", attributes["dim_labels"])
    window = dict(re.findall(r"(\w+)=([\w-]+)", attributes.get("window", "")))
    fields = {name: value.split("x") for name, value in window.items()}
    flops = 2 * lhs[labels_lhs.index("b")] * rhs[labels_rhs.index("i")] * result[labels_result.index("f")]
    for axis, size in enumerate(fields.get("size", [])):
        stride, dilate, base = (
            int(fields[n][axis]) if n in fields else 1 for n in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(fields["pad"][axis].split("_")[0]) if "pad" in fields else 0
        length = base * (lhs[labels_lhs.index(str(axis))] - 1) + 1
        starts = stride * np.arange(result[labels_result.index(str(axis))]) - low
        places = (starts + dilate * k for k in range(int(size)))
        flops *= sum(int(((at >= 0) & (at < length) & (at % base == 0)).sum()) for at in places)
    return flops // int(attributes.get("batch_group_count", 1))


class Buffer(NamedTuple):
    """A shape that instructions of a program return."""

    shape: Shape
    opcode: str  # of the first that does
    op_name: str
    instructions: int  # that return it

    @property
    def bytes(self) -> int:
        return self.shape.bytes


def largest_buffers(module: Module, n: int) -> list[Buffer]:
    """The largest distinct shapes that are in memory, largest first; not all of them at the same time."""
    found: dict[Shape, Buffer] = {}
    for computation, use, instruction in module.run():
        argument = instruction.opcode == "parameter" and computation.name == module.entry
        if use.fused or instruction.opcode.endswith("-start") or (instruction.opcode in _VIEWS and not argument):
            continue
        for shape in instruction.shapes:
            first = found.get(shape, Buffer(shape, instruction.opcode, instruction.op_name, 0))
            found[shape] = first._replace(instructions=first.instructions + 1)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:n]
