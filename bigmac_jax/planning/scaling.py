"""How far each structure scales: tokens a second of a device by the number of devices, each on its best mesh.

Weak scaling: the batch grows with the devices, so that each has as many tokens as on the fewest. Strong: it stays.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bigmac_jax.config import Config, ConfigError, MeshConfig
from bigmac_jax.planning.candidates import Axes, Machine, variants
from bigmac_jax.planning.job import exposed
from bigmac_jax.planning.search import Candidate, axes, fastest, flags
from bigmac_jax.planning.structures import alternatives

KEEPS = 0.8  # of the fewest devices' tokens a second: a structure that keeps less has stopped scaling
GROWN, BEND = 48, 0.02  # `_curve`
_MOST = 2**20  # devices


class Scale(NamedTuple):
    """What --scale asks: numbers of devices, the fewest first, and whether the batch stays as it is."""

    devices: list[int]
    strong: bool


def parse_scale(text: str) -> Scale:
    """Reads FIRST..LAST, each number twice the one before, or a list; with `:strong` behind it the batch stays.

    Raises:
      ConfigError: neither of these.
    """
    numbers, _, kind = text.partition(":")
    devices: list[int] = []
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", numbers):
        first, last = int(ends[1]), int(ends[2])
        if 0 < first <= last <= _MOST and math.log2(last / first).is_integer():
            devices = [first * 2**n for n in range(round(math.log2(last / first)) + 1)]
    elif re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", numbers):
        devices = sorted({int(number) for number in numbers.split(",")})
    if not devices or devices[-1] > _MOST or kind not in ("", "strong") or text.endswith(":"):
        raise ConfigError(
            f"--scale={text} must be numbers of devices up to {_MOST:,}, as in --scale=64..65536 (each twice the one "
            "before), 64,256,1024, or 64..1024:strong (the same batch on all)"
        )
    return Scale(devices, bool(kind))


def batches(config: Config, asked: Scale) -> dict[int, int]:
    """The batch on each number of devices.

    Raises:
      ConfigError: it does not grow as the devices do.
    """
    few, own = asked.devices[0], config.data.batch_size
    found = {n: own if asked.strong else own * n // few for n in asked.devices}
    for n, batch in found.items():
        if not asked.strong and batch * few != own * n:
            raise ConfigError(
                f"--scale: data.batch_size={own} on {few} devices is no whole number of sequences on {n}; use a "
                f"multiple of {few // math.gcd(few, n)}, or other numbers of devices"
            )
    return found


def scale(config: Config, asked: Scale, machine: Callable[[int], Machine]) -> dict[str, Any]:
    """Makes what plan.py's JSON says of each structure on each number of devices.

    Args:
      machine: of so many devices.

    Raises:
      ConfigError: a batch that does not grow as the devices do.
    """
    of = batches(config, asked)
    found: dict[str, Any] = {}
    for name, structure in alternatives(replace(config, mesh=MeshConfig(fsdp=config.mesh.fsdp))).items():
        if isinstance(structure, ConfigError):
            found[name] = {"error": str(structure)}
        else:
            points = _curve(config, [(_with_batch(structure, of[n]), machine(n)) for n in asked.devices])
            found[name] = {"points": points, "stops": where_it_stops(points)}
    return {
        "kind": "strong" if asked.strong else "weak",
        "devices": asked.devices,
        "batch_size": list(of.values()),
        "tokens_per_step": [batch * config.data.sequence_length for batch in of.values()],
        "keeps": KEEPS,
        "structures": found,
    }


def _with_batch(config: Config, batch: int) -> Config:
    return replace(config, data=replace(config.data, batch_size=batch))


def _curve(own: Config, places: Sequence[tuple[Config, Machine]]) -> list[dict[str, Any]]:
    """The best on each number of devices. Meshes grow from the GROWN best of the number before; all are tried on the
    first number on which something fits, and wherever growing loses more than BEND of a device's tokens a second."""
    points = []
    devices, best = 0, list[Candidate]()
    for config, machine in places:
        rate = best[0].times.tokens_per_s / devices if best else 0.0
        grown = _grown(best[:GROWN], machine.devices // devices) if best and machine.devices % devices == 0 else set()
        found = fastest(config, machine, grown) if grown else []
        if not found or found[0].times.tokens_per_s / machine.devices < (1 - BEND) * rate:
            found = fastest(config, machine)
        points.append(_point(own, config, machine, found))
        devices, best = machine.devices, found
    return points


def _grown(best: Sequence[Candidate], times: int) -> set[Axes]:
    """Meshes with `times` as many ranks, along any of their axes."""
    meshes = [axes(candidate) for candidate in best]
    ways = list(_products(times, 5, [n for n in range(1, times + 1) if times % n == 0]))
    return {(r * i, d * a, n * b, e * c, t * f) for r, d, n, e, t in meshes for i, a, b, c, f in ways}


def _products(number: int, factors: int, divisors: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write a number, whose divisors are among these, as a product of so many factors in their order."""
    if factors == 1:
        yield (number,)
        return
    for first in divisors:
        if number % first == 0:
            yield from ((first, *rest) for rest in _products(number // first, factors - 1, divisors))


def _point(own: Config, config: Config, machine: Machine, found: Sequence[Candidate]) -> dict[str, Any]:
    """The best on so many devices with the flags that make it of `own`, or what there is too little of."""
    if not found:
        lacks = "mesh" if next(variants(config, machine, lean=True), None) is None else "memory"
        return {"devices": machine.devices, "lacks": lacks}
    best = found[0]
    return {
        "devices": machine.devices,
        "tokens_per_s_per_device": best.times.tokens_per_s / machine.devices,
        "mesh": best.sizes,
        "flags": flags(own, best.config),
        "tokens": best.times.tokens,
        "time": best.times.as_dict(),
    }


def where_it_stops(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first number of devices with less than KEEPS of the tokens a second of a device that the fewest have, and the
    term that stops it there: the one whose seconds that nothing hides grew most, by a device's token; or `memory` or
    `mesh` where nothing fits, or no mesh is valid. None if it goes on."""
    ran = [point for point in points if "time" in point]
    if not ran:
        return {"devices": points[0]["devices"], "term": points[0]["lacks"]}
    first, *rest = points[points.index(ran[0]) :]
    for point in rest:
        if "time" not in point:
            return {"devices": point["devices"], "term": point["lacks"]}
        share = point["tokens_per_s_per_device"] / first["tokens_per_s_per_device"]
        if share < KEEPS:
            before, after = _a_token(first), _a_token(point)
            grew = {term: after[term] - before.get(term, 0.0) for term in after}
            term = max(grew, key=lambda name: grew[name])
            return {"devices": point["devices"], "term": term, "share": share, "grew": grew}
    return None


def _a_token(point: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a device for one of its tokens, by term."""
    return {term: seconds * point["devices"] / point["tokens"] for term, seconds in exposed(point["time"]).items()}
