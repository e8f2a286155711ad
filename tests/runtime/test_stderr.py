"""Standard error without what jax's threads print where another process is lost."""

import subprocess
import sys

LOST = b"""E1128 22:50:22.112943   27702 coordination_service_agent.cc:289] Polled an error from coordination service
F1128 22:50:22.112976   27702 client.h:80] Terminating process because the JAX distributed service detected errors.
Additional GRPC error information from remote target coordination_service while calling PollForError:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}
*** Check failure stack trace: ***
    @     0x7f7b49040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
OTHERS = b"""F1128 22:50:22.112976   27702 array.cc:80] Check failed: size > 0
*** Check failure stack trace: ***
    @     0x7f7b49040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
[Gloo] Rank 0 is connected to 1 peer ranks.
"""
PROGRAM = """
import os, signal, sys
from absl import logging
from bigmac_jax.runtime import stderr
before = sys.stderr
stderr.start_filter()
os.write(2, sys.stdin.buffer.read())
print("from Python", file=sys.stderr)
assert logging.get_absl_handler().python_handler.stream is sys.stderr is not before
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_what_is_of_another_process_is_left_out() -> None:
    """To the last byte, even of a process that is killed."""
    for given in (LOST + OTHERS, OTHERS + LOST):
        run = subprocess.run([sys.executable, "-c", PROGRAM], input=given, stderr=subprocess.PIPE, timeout=60)
        assert sorted(run.stderr.splitlines()) == sorted([b"from Python", *OTHERS.splitlines()])
