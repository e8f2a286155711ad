"""Runs one of sixteen parts of the full suite: python tests/part.py [N]. Without a number it is the tree's own, by a
hash of it: landing after landing all of them are run. So is the order of the files, of which the last may not be
reached. --number prints the tree's own.

A test that fails here and fails on the parent commit too is reported and blocks nothing, nor does one that passes
alone, or could not be compared. The exit code is 1 if one fails that passes there, or is not there, or if pytest could
not run this tree, or found no test in it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

PARTS = 16
MOST = 40  # failures that the parent is asked about
COMPARING = 600  # seconds that asking may take
LIMIT = 900  # seconds of a part; what has not run by then waits for another landing
ROOT = pathlib.Path(__file__).parents[1]
_RAN = (0, 1, 2)  # pytest's exit codes where it ran: all passed, some failed, some files could not be read, or stopped


def main(number: int, tree: str) -> int:
    print(f"part {number} of {PARTS} of the full suite", flush=True)
    code, failed = run(ROOT, f"--part={number}/{PARTS}", f"--order={_digest(tree):x}", "-m", "full and not gpu",
                 "-n", "auto", "--maxprocesses=8", "--dist=loadfile", "--no-loadscope-reorder")  # fmt: skip
    if not failed:
        return int(code not in _RAN)
    since: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            git("worktree", "add", "--quiet", "--detach", folder, "HEAD^")
        except subprocess.CalledProcessError as error:
            print(f"no parent to compare with: {error.stderr.strip()}")
            return int(code not in _RAN)
        until = time.monotonic() + COMPARING
        for name in failed[:MOST]:
            if time.monotonic() > until:
                print(f"stopped comparing after {COMPARING} s")
                break
            alone = ("-n0", "-m", "full or not full")
            if not run(ROOT, name, *alone, limit=COMPARING)[1]:
                print(f"passes alone: {name}")
            elif run(pathlib.Path(folder), name, *alone, limit=COMPARING)[1]:
                print(f"fails on the parent too: {name}")
            else:
                since.append(name)
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, capture_output=True)
    for name in since:
        print(f"fails since this commit: {name}")
    return int(bool(since) or code not in _RAN)


def run(tree: pathlib.Path, *arguments: str, limit: float = LIMIT) -> tuple[int, list[str]]:
    """(pytest's exit code, the tests that fail in a tree: their node ids, or the files that can't be read)."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", *arguments, "--tb=short", "-o", f"cache_dir={cache}"]
        job = subprocess.Popen(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, start_new_session=True)
        try:
            code = job.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit} s; the failures of what has run count", flush=True)
            code = _stop(job)
        found = pathlib.Path(cache, "v/cache/lastfailed")
        failed = sorted(json.loads(found.read_text())) if found.exists() else []
    if code not in _RAN:
        print(f"pytest ended with {code} in {tree}")  # 4: no such test
    return code, failed


def _stop(job: subprocess.Popen) -> int:
    """Interrupts pytest, which then writes down what has failed; its workers end with it."""
    job.send_signal(signal.SIGINT)
    try:
        return job.wait(60)
    except subprocess.TimeoutExpired:
        return 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def part_of(name: str, parts: int = PARTS) -> int:
    return _digest(name) % parts


def place_of(file: str, order: str) -> int:
    """Where a file stands in an order: in another one for every `order`, so that each is among the first at times."""
    return _digest(order + file)


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    tree = git("ls-tree", "-r", "HEAD")
    if sys.argv[1:] == ["--number"]:
        print(part_of(tree))
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else part_of(tree), tree))
