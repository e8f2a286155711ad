"""train.py whose phases take longer than they should: slow_phases.py PHASE=SECONDS,… train.py's arguments…

Says "in PHASE" on its standard output when it comes there.
"""

import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from bigmac_jax.data.token_shards import ShardStore
from bigmac_jax.training.checkpoint import Checkpoints

_, phases, *arguments = sys.argv
SECONDS = {name: float(value) for name, value in (item.split("=") for item in phases.split(","))}


def slowly(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Sleeps, which moves nothing and uses no processor."""

    def slow(*given: Any, **named: Any) -> Any:
        if seconds := SECONDS.pop(phase, 0.0):
            print(f"in {phase}", flush=True)
            time.sleep(seconds)
        return function(*given, **named)

    return slow


ShardStore._make = slowly("tokenise", ShardStore._make)  # type: ignore[method-assign]
jax.stages.Lowered.compile = slowly("compile", jax.stages.Lowered.compile)  # type: ignore[method-assign]
Checkpoints.restore = slowly("restore", Checkpoints.restore)  # type: ignore[method-assign]
sys.argv = ["train.py", *arguments]
runpy.run_path("train.py", run_name="__main__")
