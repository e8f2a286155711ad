"""Programs whose collectives the CPU devices of jax up to 0.11 may mix up.

XLA:CPU runs what is ready. Of two collectives it begins the one that the schedule has first, and a collective that has
begun holds up what follows; but a loop, which begins with its first trip, does not. Collectives behind it that don't
need its results run beside those in it, and the devices of a group are all that tells two of them apart: one may get
the other's arrays, or wait for ever. jax 0.12 keeps the order.
"""

import re

import jax

_FIXED_IN = (0, 12)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*?[\s)]([a-z][\w-]*)\((.*)")
_NAME = re.compile(r"%([\w.-]+)")
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-", "ragged-all-to-all", "reduce-scatter")


def beside_loops(text: str) -> list[tuple[str, str]]:
    """(loop with collectives, collective or other such loop behind it that does not need its results).

    Args:
      text: a program compiled for CPU devices, whose instructions are in the order of the schedule.
    """
    found: list[tuple[str, str]] = []
    communicating: set[str] = set()  # computations with collectives; those that are called stand first
    loops: dict[str, set[str]] = {}  # loop with collectives → what depends on it, in this computation
    computation = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            computation, loops = begins[1], {}
        elif instruction := _INSTRUCTION.match(line):
            name, opcode, rest = instruction.groups()
            used = set(_NAME.findall(rest.partition(", metadata=")[0]))
            calls = bool(used & communicating)
            if opcode.startswith(_COLLECTIVES) or calls:
                communicating.add(computation)
                found += [(loop, name) for loop, depends in loops.items() if not used & depends]
            for depends in loops.values():
                if used & depends:
                    depends.add(name)
            if calls:
                loops[name] = {name}
    return found


def note(name: str, text: str) -> str:
    """One line on the program `name` if this jax may mix up its collectives, "" otherwise; `text` as above."""
    if jax.__version_info__ >= _FIXED_IN or not (found := beside_loops(text)):
        return ""
    loop, collective = found[0]
    return (
        f"the {name}'s numbers may be wrong: the CPU devices of jax {jax.__version__} may mix up {collective} and what "
        f"{loop} sends; Python 3.12 and later install jax 0.12, which does not"
    )
