"""Plays the first hour: runs the commands of the pages, each of them, in a copy of the repository.

    python tests/first_hour/play.py --list                     # every block, and what is done with it
    python tests/first_hour/play.py README.md docs/data.md     # runs those of two pages; without a page, all
    python tests/first_hour/play.py docs/training.md:120       # one block, by the place that the list has
    python tests/first_hour/play.py --steps=20 README.md       # on a busy machine: 100 steps and more become 20

Marks in the pages say which blocks take fewer steps and which are not run (`pages.py`). Pages that use runs/tiny find a
model of a few steps there. The environment is this Python's: `make` finds it as its own.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from first_hour.pages import ROOT, Block, commands, few_steps, pages, planned, read, shortened

LIMIT = 600  # seconds of a block: two minutes on a machine that does nothing else
MODEL = Block("before", 0, "bigmac train --workdir=runs/tiny\n", steps=20)  # that pages find there
_SHORT = "first_hour_config.py"
_CONFIG = """from bigmac_jax.config import Config, load_config

def get_config() -> Config:
    return load_config("tiny", ("train.steps={steps}",))
"""


class Outcome(NamedTuple):
    block: Block
    code: int  # the exit code; 124: it took too long
    seconds: float
    output: str  # what it printed, errors included

    @property
    def good(self) -> bool:
        return self.code == self.block.exit_code

    def describe(self) -> str:
        tail = "" if self.good else "\n" + "\n".join(f"    {line}" for line in self.output.splitlines()[-12:])
        return f"{'ok ' if self.good else 'BAD'} {self.seconds:5.0f} s  {self.block.describe()}{tail}"


def copy(folder: pathlib.Path) -> None:
    """The files of the repository as they are now, without what git ignores, and an environment that make takes."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # Not a link to the environment: make would install the copy into it.
    bin = folder / f".venv-{sys.version_info.major}.{sys.version_info.minor}" / "bin"
    bin.mkdir(parents=True)
    _program(bin / "python", f'exec "{sys.executable}" "$@"')
    _program(bin / "bigmac", f'exec "{sys.executable}" -m bigmac_jax "$@"')
    (bin / "activate").write_text(f'PATH="{bin}:$PATH"\n')
    for stamp in ("installed", "installed-dev"):
        (bin.parent / stamp).touch()


def _program(path: pathlib.Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def play(blocks: list[Block], folder: pathlib.Path) -> list[Outcome]:
    """Runs blocks in a copy of the repository; each is said as soon as it has ended."""
    bin = next(folder.glob(".venv-*")) / "bin"
    environment = os.environ | {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    for name in ("BIGMAC_PREPARED", "PYTHONPATH"):  # whoever calls this may have set them for the original
        environment.pop(name, None)
    outcomes = []
    for block in blocks:
        if block.skip:
            continue
        start = time.monotonic()
        argv = (
            [sys.executable, "-c", block.code] if block.language == "python" else ["bash", "-ec", script(block, folder)]
        )
        job = subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
        try:
            output, _ = job.communicate(timeout=LIMIT)
            code = job.returncode
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)  # with what it has started
            job.wait()
            code, output = 124, f"it took over {LIMIT} s; mark it with steps=N or skip=long"
        outcomes.append(Outcome(block, code, time.monotonic() - start, output))
        print(outcomes[-1].describe(), flush=True)
    return outcomes


def script(block: Block, folder: pathlib.Path) -> str:
    """What bash is given for a block: its commands, shortened or planned as its mark says."""
    lines = commands(block.code)
    if block.plan:
        return "\n".join(planned(line, block.plan) for line in lines)
    if block.steps:
        (folder / _SHORT).write_text(_CONFIG.format(steps=block.steps))
        lines = [shortened(line, block.steps, _SHORT) for line in lines]
    return "\n".join(lines)


def chosen(names: list[str]) -> list[Block]:
    """The blocks of the pages that are named, or of all; of a page with a line, the block there."""
    wanted = [name.partition(":") for name in names] or [(str(page), "", "") for page in pages()]
    return [block for page, _, line in wanted for block in read(ROOT / page) if line in ("", str(block.line))]


def main(argv: list[str]) -> int:
    names = [name for name in argv if not name.startswith("--")]
    blocks = chosen(names)
    for most in (int(name.removeprefix("--steps=")) for name in argv if name.startswith("--steps=")):
        blocks = [block._replace(steps=most) if block.steps or not few_steps(block.code) else block for block in blocks]
    if "--list" in argv:
        print("\n".join(block.describe() for block in blocks))
        return 0
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        copy(pathlib.Path(folder))
        outcomes = play([MODEL, *blocks], pathlib.Path(folder))
    bad = [outcome for outcome in outcomes if not outcome.good]
    left_out = sum(bool(block.skip) for block in blocks)
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} blocks ran well, {left_out} were not run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
