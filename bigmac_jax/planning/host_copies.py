"""Reads from a compiled program what stands in host memory, and which products run while it is copied to the device."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from bigmac_jax.planning.hlo import Computation, Instruction, Module, Shape, integers
from bigmac_jax.planning.hlo_flops import dot_flops, kernel_flops
from bigmac_jax.planning.hlo_schedule import find_ends

_HOST = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]\{[^}]*S\(5\)\}")  # XLA's memory space of a host that a device copies from
_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier")


class HostCopy(NamedTuple):
    """A copy from host memory to the device."""

    name: str
    bytes: int  # of one run
    times: int  # runs in one execution of the program
    asynchronous: bool
    products: tuple[str, ...]  # instructions with matrix products between its start and what waits for it


def argument_bytes(module: Module) -> int:
    """Bytes of the arguments that the program's layout puts into host memory."""
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", module.header)
    return sum(Shape(dtype, tuple(integers(dims))).bytes for dtype, dims in _HOST.findall(layout[1] if layout else ""))


def host_copies(module: Module) -> list[HostCopy]:
    """Lists the copies from host memory, in the order of a scheduled program."""
    found = []
    for name, use in module.uses.items():
        if not (use.fused or use.asynchronous):
            found += [copy._replace(times=use.times) for copy in _copies(module, module.computations[name])]
    return found


def _copies(module: Module, computation: Computation) -> Iterator[HostCopy]:
    ends = find_ends(module, computation)
    for start, instruction in enumerate(computation.instructions):
        if instruction.opcode in _VIEWS or not _reads_host(computation, instruction):
            continue
        end = ends.get(start, start)
        between = computation.instructions[start + 1 : end]
        products = tuple(i.name for i in between if _multiplies(module, computation, i))
        yield HostCopy(instruction.name, computation.instructions[end].bytes, 1, end > start, products)


def _reads_host(computation: Computation, instruction: Instruction) -> bool:
    operands = (computation.by_name.get(name) for name in instruction.operands)
    return any(of is not None and of.opcode in _VIEWS and _is_host(of.result) for of in operands)


def _is_host(result: str) -> bool:
    """Whether a result, no tuple, is in host memory."""
    return not result.startswith("(") and _HOST.search(result) is not None


def _multiplies(module: Module, computation: Computation, instruction: Instruction) -> bool:
    if dot_flops(computation, instruction) or kernel_flops(computation, instruction):
        return True
    called = (module.computations[name] for name in instruction.calls)
    return any(_multiplies(module, of, i) for of in called for i in of.instructions)
