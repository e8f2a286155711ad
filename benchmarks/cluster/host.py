"""Becomes a host's command: host.py PARENT CORES COMMAND … Ends with its parent, whatever ends that."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """This process gets a signal when its parent ends; on Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it was gone before
        sys.exit(1)


if __name__ == "__main__":
    parent, cores, *command = sys.argv[1:]
    end_with(int(parent))
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]}: {error.strerror}")
