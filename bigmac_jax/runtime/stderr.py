"""Filters from standard error what jax's threads print when another process of the job is lost.

They print half a page and call abort() before anything else can be said; the watchdog says it in one line. Run as a
program, this file is the filter: a process of its own, so that no line is lost or held up when the other one dies.
"""

import os
import re
import signal
import subprocess
import sys

_HEADER = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d")  # of a message of jax's libraries, which may have more lines
_ABOUT_PEERS = (b"coordination_service", b"JAX distributed service")
_filter: subprocess.Popen[bytes] | None = None  # as long as this process lives


def start_filter() -> None:
    """Sends what is written to descriptor 2 through the filter from now on, except what Python writes."""
    global _filter
    if _filter is not None:
        return
    own = os.dup(2)
    _filter = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=own, start_new_session=True
    )
    assert _filter.stdin is not None
    os.dup2(_filter.stdin.fileno(), 2)
    _filter.stdin.close()
    before, sys.stderr = sys.stderr, open(own, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115  to the end
    from absl import logging as absl_logging  # not where this file is the filter

    handler = absl_logging.get_absl_handler().python_handler
    if handler.stream is before:
        handler.stream = sys.stderr


def main() -> None:
    """Copies standard input to standard output, without jax's messages about other processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its input
    quiet = False
    for line in sys.stdin.buffer:
        if _HEADER.match(line):
            quiet = any(words in line for words in _ABOUT_PEERS)
        if not quiet:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
