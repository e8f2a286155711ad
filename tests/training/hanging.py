"""train.py where one process stops taking part while its threads live on: hanging.py ID BATCH train.py's arguments…"""

import runpy
import sys
import time
from collections.abc import Iterator
from typing import Any

from bigmac_jax.run import loop

_, process, last, *arguments = sys.argv
_on_device = loop._on_device


def _hangs(*given: Any) -> Iterator[Any]:
    for number, batch in enumerate(_on_device(*given)):
        if number == int(last):
            time.sleep(3600)
        yield batch


if f"--process_id={process}" in arguments:
    loop._on_device = _hangs
sys.argv = ["train.py", *arguments]
runpy.run_path("train.py", run_name="__main__")
