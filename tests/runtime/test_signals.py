"""Ctrl-C and SIGTERM at any moment of a command: one line, and nothing is swallowed."""

import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from forks import ENVIRONMENT
from training.runs import LIMIT
from training.tools import ROOT, write_config

from bigmac_jax.runtime import signals

WORDS = {signal.SIGINT: (130, "interrupted\n"), signal.SIGTERM: (143, "terminated\n")}
SAVED = re.compile(r"stopped and saved at step (\d+) of 100000; the same command resumes\n")
# Started again with what makes it fast, as a user's is.
CLEAN = {name: value for name, value in ENVIRONMENT.items() if name not in ("BIGMAC_KEEP_ENV", "BIGMAC_PREPARED")}


def stopped(folder: pathlib.Path, number: signal.Signals, seconds: float) -> float:
    """Sends the signal so many seconds after the start, and checks the end; returns how long that took."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "train.py", f"--config={folder / 'config.json'}", f"--workdir={workdir}",
               "--cpu_devices=1", "--config.train.steps=100000", "--config.train.eval_every=0",
               "--config.train.log_every=100000", "--config.train.checkpoint_every=0"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(number)
    start = time.monotonic()
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    code, line = WORDS[number]
    how = f"{number.name} after {seconds:.1f} s: {process.returncode}\n{out}\n{err}"
    lines = [line for line in err.splitlines(keepends=True) if not re.match(r"I\d{4} ", line)]  # of tokenising
    if process.returncode == 0:
        step = SAVED.search(out)
        assert step and (workdir / "checkpoints" / step[1]).is_dir() and not lines, how
    else:
        assert process.returncode == code and lines == [line], how
    return time.monotonic() - start


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.4), (signal.SIGINT, 1.2), (signal.SIGTERM, 0.8)])
def test_at_the_start(number: signal.Signals, seconds: float, tmp_path: pathlib.Path) -> None:
    """Python's own handler prints 17 to 45 lines there, or is not heard."""
    write_config(tmp_path)
    stopped(tmp_path, number, seconds)


@pytest.mark.full
@pytest.mark.parametrize("number", WORDS)
def test_at_any_moment(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    write_config(tmp_path)
    slowest = max(stopped(tmp_path, number, tenth / 10) for tenth in range(3, 81))
    assert slowest < 10


def ended(program: str) -> tuple[int, str, str]:
    start = "import ctypes, os, signal, time\nfrom bigmac_jax.runtime import signals\nsignals.install()\n"
    done = subprocess.run([sys.executable, "-c", start + program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


def test_the_loop_is_spared_one_of_each() -> None:
    """Long after it has stopped, too; the next one ends it. Within a second it is the same one, passed on."""
    program = """
with signals.stop_signals() as stopped:
    for number in 3 * (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.05)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
print(sorted(stopped), flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(10)
"""
    assert ended(program) == (130, "[2, 15]\n", "interrupted\n")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as where no shell has started this in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_whoever_is_told_gets_one_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a server behind a launcher, which makes of a ctrl-C a SIGTERM, too."""
    told = []
    with signals.stop_signals(lambda: told.append(1)) as stopped:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert told == [1] and stopped == [signal.SIGINT]
        monkeypatch.setattr(signals, "_ONE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stopped == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_leaves() -> None:
    """The loop is told once, and goes on to save; elsewhere it is an error."""
    program = """
for inside in True, False:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    with signals.stop_signals() if inside else signals.undo_on_signal(print) as stopped:
        for _ in range(3):
            with signals.tolerate_lost_output(stream):
                print("line", file=stream, flush=True)
    print(stopped == [signal.SIGPIPE], flush=True)
"""
    code, said, error = ended(program)
    assert code == 1 and said == "True\n" and "BrokenPipeError" in error


def test_lines_that_cannot_be_written() -> None:
    """On a full disk the loop goes on without them, and says more once there is room; where a terminal has gone it
    saves and ends, as where a reader has left."""
    program = """
import errno, pty
full = open("/dev/full", "w")
with signals.stop_signals() as stopped:
    for _ in range(3):
        with signals.tolerate_lost_output(full):
            print("line", file=full, flush=True)
print(stopped == [], flush=True)
leader, follower = pty.openpty()
terminal = os.fdopen(follower, "w")
os.close(leader)
with signals.stop_signals() as stopped:
    for _ in range(3):
        with signals.tolerate_lost_output(terminal):
            print("line", file=terminal, flush=True)
print(stopped == [signal.SIGPIPE], flush=True)
os._exit(0)
"""
    assert ended(program)[:2] == (0, "True\nTrue\n")


def test_a_main_thread_that_does_not_come_back() -> None:
    """As in a compilation, or waiting for another process."""
    program = """
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
c.alarm(10)
with signals.undo_on_signal(lambda: os.write(1, b"undone")):
    os.posix_spawnp("sh", ["sh", "-c", f"sleep 0.5; kill -TERM {os.getpid()}"], os.environ)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)
"""
    assert ended(program) == (143, "undone", "terminated\n")


def test_a_signal_waits_for_the_program_that_takes_this_ones_place() -> None:
    program = """
import sys
if len(sys.argv) == 1:
    with signals.block():
        os.kill(os.getpid(), signal.SIGINT)
        os.execv(sys.executable, [*sys.orig_argv, "again"])
"""
    assert ended(program) == (130, "", "interrupted\n")
