"""Reads a compiled program's collectives: which mesh axes each runs along, and what one rank sends."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bigmac_jax.model.exchange.wire import METADATA, PAYLOAD
from bigmac_jax.planning.hlo import Computation, Instruction, Module, integers

KINDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


class Transfer(NamedTuple):
    """A TPU program's collective between slices: a send to the runtime, which does the rest, and a recv."""

    kind: str  # one of KINDS
    target: str  # its groups, as the runtime is told them
    name: str  # its send and its recv have in common


@dataclass(frozen=True)
class Collective:
    """One collective instruction, seen from one rank."""

    name: str
    computation: str
    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes along which its groups reach
    ranks: int  # of a group
    dtypes: tuple[str, ...]
    buffer_bytes: int  # of one run, with the rank's own part: an all-gather's result, the operands of the others
    times: int  # runs in one execution
    loops: tuple[int | None, ...]  # trips of the loops around it, outermost first
    asynchronous: bool
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends to others in one run; of a ragged all-to-all, those of uniform routing."""
        share = (self.ranks - 1) / self.ranks
        return self.buffer_bytes * {"collective-permute": 1, "all-reduce": 2 * share}.get(self.kind, share)

    @property
    def direction(self) -> str:
        """forward, recomputed or backward, by what `jax.grad` and `jax.checkpoint` write into op_name."""
        if "rematted_computation" in self.op_name:
            return "recomputed"
        return "backward" if "transpose(" in self.op_name else "forward"

    @property
    def role(self) -> str:
        """payload or metadata of the layer's exchange, or other, by named scopes; metadata may be inside payload."""
        scopes = {METADATA: "metadata", PAYLOAD: "payload"}
        of_kind = "payload" if self.kind == "ragged-all-to-all" else "other"  # XLA:GPU gives those no name
        return next((role for scope, role in scopes.items() if scope in self.op_name), of_kind)


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Lists every collective that is run.

    Args:
      mesh: axis name → size; device numbers are row-major over it.

    Raises:
      ValueError: a group names a device that the mesh does not have.
    """
    found = []
    for computation, use, instruction in module.run():
        kind, between = instruction.opcode.removesuffix("-start"), transfer(instruction)
        if between and instruction.opcode == "send":
            kind = between.kind
        if kind not in KINDS or not use.times:
            continue
        stage = fusion_stage(computation)
        if stage in ("step", "done"):  # counted where it starts
            continue
        if _is_reduce_scatter(computation, instruction):
            kind = "reduce-scatter"
        devices = math.prod(mesh.values())
        groups = _groups_between(between.target, devices) if between else _replica_groups(instruction, devices)
        axes, ranks = _group_axes(groups, mesh)
        operands = computation.operands(instruction)[: 1 if between else None]  # a send has a token, too
        size = sum(shape.bytes for shape in operands)
        if kind == "all-gather":
            size *= ranks
        elif kind == "ragged-all-to-all":  # (operand, output, …): what there is room for at the roomier end is not sent
            size = min(shape.bytes for shape in operands[:2])
            operands = operands[:1]
        elif kind == "collective-permute":
            ranks = math.prod(mesh[axis] for axis in axes)
        dtypes = tuple({shape.dtype: None for shape in operands})
        asynchronous = use.asynchronous or stage == "start" or instruction.opcode not in KINDS  # a send is
        found.append(
            Collective(
                instruction.name, computation.name, kind, axes, ranks, dtypes, size, use.times, use.loops, asynchronous,
                instruction.op_name,
            )
        )  # fmt: skip
    return found


def transfer(instruction: Instruction) -> Transfer | None:
    """What a send or a recv between slices is a part of; None for all other instructions."""
    text = instruction.attributes.get("frontend_attributes", "")
    if instruction.opcode not in ("send", "recv") or "_xla_megascale_transfer_type" not in text:
        return None
    found = {
        name: value
        for name, value in re.findall(r'_xla_(?:megascale|host_transfer)_(\w+)="?([^"]*?)"?(?=,_xla|}$)', text)
    }
    return Transfer(found["transfer_type"].lower().replace("_", "-"), found["target"], found["rendezvous"])


def _groups_between(target: str, devices: int) -> list[list[int]]:
    """Devices of a transfer's groups; a mesh goes through slice after slice, of which each has as many.

    {1,2}x{0:31} joins what stands at one place of slices 1 and 2, for each of 32 places. All other groups are listed:
    200003 is device 3 of slice 2.
    """
    slices, _, places = target.partition("x")
    if places:
        count = int(places.strip("{}").partition(":")[2]) + 1
        return [[(slice_ - 1) * count + place for slice_ in integers(slices.strip("{}"))] for place in range(count)]
    listed = [integers(group) for group in re.findall(r"\{([\d, ]+)\}", target)]
    count = devices // max(number // 100_000 for group in listed for number in group)
    return [[(number // 100_000 - 1) * count + number % 100_000 for number in group] for group in listed]


def fusion_stage(computation: Computation) -> str:
    """Which part of an asynchronous collective this is, if it is one of TPU's fusions that carry one between products:
    start, step (of which there may be several, each beside a product), done, or ""."""
    targets = {instruction.target for instruction in computation.instructions}
    if computation.name.startswith("async_collective_fusion"):
        return "step"
    return "start" if "AsyncCollectiveStart" in targets else "done" if "AsyncCollectiveDone" in targets else ""


def channel(computation: Computation) -> str:
    """The channel of a computation's collective, which its start, steps and done have in common."""
    return next((i.attributes["channel_id"] for i in computation.instructions if "channel_id" in i.attributes), "")


def _is_reduce_scatter(computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce is TPU's way of writing a reduce-scatter: in one fusion with the slice that a rank keeps,
    and run as such (its emitter is called AllReduceScatterFusion)."""
    root = computation.root
    fused = instruction.opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter")
    return fused and root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


def _replica_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """The groups of devices that a collective joins; of a permutation its pairs of source and target."""
    attributes = instruction.attributes
    text = attributes.get("source_target_pairs") or attributes.get("replica_groups") or "{}"
    if text.startswith("mesh"):  # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}; an axis may be a part: 'b':(1)2
        order, _, last = attributes.get("device_ids", text).rpartition(" ")
        chosen = {name: integers(part) for name, part in re.findall(r"'([^']+)'([^,}]*)", last)}
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
        return _device_ids(order).reshape(integers(shape)).tolist()
    return [integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)] or [list(range(devices))]


def _device_ids(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0, 1, … in that shape, transposed; (0,2,1,3): as they stand."""
    dims, _, permutation = text.partition("T")
    if "[" not in text:
        return np.array(integers(text))
    ids = np.arange(math.prod(integers(dims))).reshape(integers(dims))
    return ids.transpose(integers(permutation)) if permutation else ids


def _group_axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which groups reach, and the number of ranks in the largest."""
    devices = math.prod(mesh.values())
    if (largest := max(map(max, groups))) >= devices:
        raise ValueError(f"device {largest} must be one of the {devices} of the mesh {dict(mesh)}; pass the program's")
    coordinates = [np.unravel_index(group, tuple(mesh.values())) for group in groups]
    axes = tuple(name for axis, name in enumerate(mesh) if any(np.ptp(c[axis]) > 0 for c in coordinates))
    return axes, max(map(len, groups))
