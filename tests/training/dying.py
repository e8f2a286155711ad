"""train.py where one process dies between joining the job and opening its devices: dying.py ID train.py's arguments…"""

import os
import runpy
import signal
import sys
from typing import Any

import jax

_, process, *arguments = sys.argv
_initialize = jax.distributed.initialize


def _dies(**given: Any) -> None:
    _initialize(**given)
    os.kill(os.getpid(), signal.SIGKILL)


if f"--process_id={process}" in arguments:
    jax.distributed.initialize = _dies
sys.argv = ["train.py", *arguments]
runpy.run_path("train.py", run_name="__main__")
