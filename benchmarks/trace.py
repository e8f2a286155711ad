"""Where the time of a compiled training step goes, from a trace of it: parts of the model beside what bounds them."""

import collections
import glob
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bigmac_jax.planning.hlo import Computation, Instruction, Module, parse
from bigmac_jax.planning.hlo_flops import dot_flops

# The scopes of the model's and the step's code (`jax.named_scope`), of which an instruction's innermost one counts; but
# a product inside another part is that one's.
PRODUCT = "projection"
PARTS = (
    "embedding", "norm", "rotary", "attention", PRODUCT, "router", "plan", "rows", "experts", "loss", "optimizer",
)  # fmt: skip
OTHER = "other"  # sums of residual branches and of gradients, metrics
_SCOPE = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})(?![\w.])")


class Part(NamedTuple):
    """Of one step.

    Attributes:
      products, rest: seconds in matrix products, and in everything else.
      floor: seconds of its FLOPs at the dense rate and of the bytes that all else reads and writes at the memory's.
    """

    products: float
    rest: float
    floor: float


def part_of(module: Module, instruction: Instruction) -> str:
    """A fusion's is that of its result; where that has none, of the last of its instructions that has one."""
    inside = [i for name in instruction.calls for i in reversed(module.computations[name].instructions)]
    for candidate in (instruction, *inside):
        if found := _SCOPE.findall(candidate.op_name):
            return next((name for name in reversed(found) if name != PRODUCT), PRODUCT)
    return OTHER


def breakdown(compiled: Any, run: Callable[[], Any], steps: int, rate: float, bandwidth: float) -> dict[str, Part]:
    """Part → its time, largest first.

    Args:
      compiled: of a program with one device.
      run: makes `steps` steps.
      rate, bandwidth: of dense products, FLOPs a second; of memory, bytes a second.
    """
    module = parse(compiled.as_text())
    # Of what runs others the time is theirs.
    timed = [
        (computation, use, instruction)
        for computation, use, instruction in module.run()
        if not use.fused and instruction.opcode not in ("while", "conditional", "call")
    ]
    seconds = traced(run, steps, {instruction.name for _, _, instruction in timed})
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for computation, use, instruction in timed:
        if instruction.name in seconds:
            flops = sum(dot_flops(*inner) for inner in _inside(module, computation, instruction))
            moved = sum(shape.bytes for shape in (*computation.operands(instruction), *instruction.shapes))
            total = sums[part_of(module, instruction)]
            total[0 if flops else 1] += seconds[instruction.name]
            total[2] += use.times * (flops / rate if flops else moved / bandwidth)
    return {name: Part(*sums[name]) for name in sorted(sums, key=lambda name: -sum(sums[name][:2]))}


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    called = [module.computations[name] for name in instruction.calls]
    return [(computation, instruction), *((c, i) for c in called for i in c.instructions)]


def traced(run: Callable[[], Any], steps: int, names: set[str]) -> dict[str, float]:
    """Seconds of each instruction in one step. Several run at once, so that their sum exceeds the step's."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    seconds: collections.Counter[str] = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names:
                    seconds[event.name] += event.duration_ns * 1e-9 / steps
    return seconds
