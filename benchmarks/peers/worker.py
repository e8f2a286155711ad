"""A case of a comparison as a process of its own, which computes only while it is asked to."""

import json
import pathlib
import signal
import subprocess
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class Worker:
    """A process `python -m module arguments`: ready once made, and called for the seconds of one round.

    It answers a JSON object when it is warm, and one with "seconds" to each line that it gets.
    """

    def __init__(self, python: str, module: str, *arguments: str):
        command = [python, "-m", module, *arguments]
        self._name = " ".join((module, *arguments))
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._answer()
        self._process.send_signal(signal.SIGSTOP)  # or threads of its pool may go on spinning while another computes

    def __call__(self) -> float:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds = self._answer()["seconds"]
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()  # ends its input, which ends it

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        raise RuntimeError(f"{self._name} ended with exit code {self._process.wait()}; its error stands above")
