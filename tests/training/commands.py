"""Runs the commands of cases.json one after another, each in a fork of this process, which imports JAX once.

A case is {"name": …, "argv": [script, …]}; beside cases.json are written NAME.out, .err, .code and .seconds.
"""

import gc
import json
import os
import pathlib
import runpy
import sys
import time

# What the commands import, so that it is imported once; the commands' own modules define flags, each its own.
import bigmac_jax.evaluation.tasks.task_jobs
import bigmac_jax.inference
import bigmac_jax.interchange
import bigmac_jax.report.page
import bigmac_jax.run.loop
import bigmac_jax.tuning.conversion
import bigmac_jax.tuning.peft  # noqa: F401


def become(argv: list[str], out: pathlib.Path) -> None:
    """Makes this process the command `argv`, as if Python had been started with it."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def main(cases: pathlib.Path) -> None:
    gc.freeze()  # the children need not look through what was imported
    for case in json.loads(cases.read_text()):
        out, start = cases.with_name(case["name"]), time.monotonic()
        if not (child := os.fork()):
            become(case["argv"], out)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.with_suffix(".code").write_text(str(code))
        out.with_suffix(".seconds").write_text(str(time.monotonic() - start))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
