"""Goodput: the share of a run's time that went into steps that are kept, and where the rest went, over all its starts.

The seconds of these parts add up to the time since the run began:

steps      of training that is kept, and data_wait, of steps whose batch was not there yet
compile, save, evaluate   what the loop waited for each of them (a save's writing goes on beside the steps)
start      everything else of the first start, restart of later ones, with the time in which nothing ran
lost       steps that a later start, or a rewind, did again
"""

import time
from collections.abc import Sequence
from typing import Any

from bigmac_jax.runtime.clock import clock

PARTS = ("steps", "data_wait", "compile", "save", "evaluate", "start", "restart", "lost")
_WALL, _SINCE = "goodput/wall_s", "goodput/since_unix_s"


class Goodput:
    """Counts the seconds of a run by part.

    Args:
      records: those of metrics.jsonl that earlier starts left.
      first_step: that this start goes on from; what was trained beyond is lost.
    """

    def __init__(self, records: Sequence[dict[str, Any]], first_step: int):
        own, now = clock.seconds(), time.time()
        self._base = dict.fromkeys(PARTS, 0.0)
        self._since, self._later = now - sum(own.values()), False
        self._kept: list[tuple[int, float]] = [(0, 0.0)]  # steps and the seconds that they took
        if earlier := [record for record in records if _has_all_parts(record)]:
            last, self._later = earlier[-1], True
            self._base = {part: last[f"goodput/{part}_s"] for part in PARTS}
            self._base["restart"] += self._since - last[_SINCE] - last[_WALL]
            self._since = last[_SINCE]
            self._kept += [(r["step"], r["goodput/steps_s"]) for r in earlier]
            self.go_back(first_step)

    def go_back(self, step: int, reached: int | None = None) -> None:
        """Counts the steps after this one as lost: they are done again. Between two records all take the same time.

        Args:
          reached: the step that the run is at; by default that of the last record.
        """
        if reached is not None:
            self._kept.append((reached, self._steps()))
        later = None
        while len(self._kept) > 1 and self._kept[-1][0] > step:
            later = self._kept.pop()
        begin, seconds = self._kept[-1]
        if later:
            seconds += (later[1] - seconds) * (step - begin) / (later[0] - begin)
            self._kept.append((step, seconds))
        lost = self._steps() - seconds
        self._base["steps"] -= lost
        self._base["lost"] += lost

    def record(self, step: int) -> dict[str, float]:
        """The seconds of each part so far, for metrics.jsonl."""
        parts, rest = self._base.copy(), "restart" if self._later else "start"
        for phase, seconds in clock.seconds().items():
            part = phase.replace(" ", "_")
            parts[part if part in PARTS and part != "start" else rest] += seconds
        self._kept.append((step, parts["steps"]))
        wall = time.time() - self._since
        record = {f"goodput/{part}_s": round(parts[part], 3) for part in PARTS}
        return record | {_WALL: round(wall, 3), _SINCE: self._since, "goodput/share": round(parts["steps"] / wall, 4)}

    def _steps(self) -> float:
        return self._base["steps"] + clock.seconds().get("steps", 0.0)


def _has_all_parts(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(f"goodput/{name}_s"), (int, float)) for name in (*PARTS, "wall", "since_unix"))


def start_record(step: int) -> dict[str, float]:
    """The seconds of each phase of this start, up to the end of its first step, for metrics.jsonl."""
    return {"step": step} | {
        f"start/{name.replace(' ', '_')}_s": round(value, 3) for name, value in clock.seconds().items()
    }


def describe_start(compiling: float) -> str:
    """Describes the phases of this start in a line.

    Args:
      compiling: seconds that the step was compiled for, of which the phase "compile" has only what was waited for.
    """
    phases = clock.seconds()
    named = {"other" if name == "start" else name: seconds for name, seconds in phases.items()}
    line = "start: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in named.items() if seconds >= 0.05)
    beside = compiling - phases.get("compile", 0)
    return line + (
        f"; of {compiling:.1f} s of compiling, {beside:.1f} s went on beside the rest" if beside > 0.05 else ""
    )
