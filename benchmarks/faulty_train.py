"""train.py on a machine that goes away: python benchmarks/faulty_train.py --fault_at=STEP and the flags of train.py.

The process ends at once, with exit code 9, when the step of this number asks for its batch; 0 is never. What was being
saved then has a second to end.
"""

import os
import sys
import time
from typing import Any

from bigmac_jax.commands import start
from bigmac_jax.data.pipeline import TrainIterator

CODE = 9


def main() -> None:
    (flag,) = (argument for argument in sys.argv if argument.startswith("--fault_at="))
    sys.argv.remove(flag)
    step, given = int(flag.partition("=")[2]), TrainIterator.__next__

    def next_batch(self: TrainIterator) -> Any:
        if step and self.get_state()["batches"] >= step - 1:
            time.sleep(1)
            os._exit(CODE)
        return given(self)

    TrainIterator.__next__ = next_batch  # type: ignore[method-assign]
    start("train")


if __name__ == "__main__":
    main()
