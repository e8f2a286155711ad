"""serve.py as its own process, on a model of a few steps, and plain requests to it."""

import http.client
import json
import pathlib
import signal
import time
from typing import Any

import forks
import jax
from training.runs import LIMIT
from training.tools import small

from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train

KEY = "a-key-for-tests"


def trained(folder: pathlib.Path, *overrides: str) -> pathlib.Path:
    """The workdir of a run of two steps."""
    config = small(folder, "train.steps=2", "train.eval_every=0", *overrides)
    with jax.set_mesh(make_mesh(config)):
        train(config, folder / "run")
    return folder / "run"


class Server:
    """In a `with`, which leaves no process behind."""

    def __init__(self, workdir: pathlib.Path, *arguments: str):
        key = workdir.parent / "key"
        key.write_text(KEY)
        self._log = workdir.with_suffix(".serve.log")
        command = ["serve.py", f"--workdir={workdir}", "--port=0", "--cpu_devices=1", f"--api_key_file={key}"]
        self.process = forks.start([*command, *arguments], self._log)
        end = time.monotonic() + LIMIT
        while "serving run at http://127.0.0.1:" not in self.output:
            assert self.process.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.02)
        self.port = int(self.output.rpartition(":")[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, headers; a POST if there is a body."""
        connection = self.connection()
        given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | (headers or {})
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request("GET" if body is None else "POST", path, data, given)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        kind = response.headers.get("content-type", "")
        answer = json.loads(content) if kind.startswith("application/json") else content.decode()
        return response.status, answer, {name.lower(): value for name, value in response.headers.items()}

    def metric(self, name: str) -> float:
        _, text, _ = self.ask("/metrics")
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
