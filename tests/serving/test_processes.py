"""Two processes serve as one: the first answers, and both compute."""

import http.client
import json
import pathlib
import re
import signal
import threading
import time
from typing import Any

import pytest
from training.runs import LIMIT, Job

from .running import Server, trained

PATH = "/v1/completions"
ASKED = {"prompt": "the state of", "max_tokens": 12, "temperature": 1.0, "seed": 5, "ignore_eos": True, "logprobs": 1}


def ask(port: int, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    return dict(answer)


def serving(job: Job) -> int:
    """Waits for the server → its port."""
    end = time.monotonic() + 2 * LIMIT
    while not (line := re.search(r"serving run at http://127.0.0.1:(\d+)\n", job.outputs[0])):
        assert all(process.poll() is None for process in job.processes) and time.monotonic() < end, job.outputs
        time.sleep(0.05)
    return int(line[1])


@pytest.mark.full
@pytest.mark.parametrize("speculate", [0, 3])
def test_two_processes_answer_what_one_does(tmp_path: pathlib.Path, speculate: int) -> None:
    """Many at a time, one that leaves in mid-stream, a while of nothing, more; then SIGTERM to both."""
    workdir = trained(tmp_path)
    bodies = [ASKED | {"prompt": "the state of"[: 3 + i], "max_tokens": 5 + 7 * i, "seed": i} for i in range(6)]
    with Server(workdir, "--batch_size=4", "--max_length=256") as one:
        expected = [of_one["choices"][0]["logprobs"] for _, of_one, _ in (one.ask(PATH, body) for body in bodies)]
    flags = (f"--speculate={speculate}", "--least_acceptance=0") if speculate else ()
    with Job(
        2, None, workdir, "--port=0", "--cpu_devices=1", "--config.mesh.data=1", "--config.mesh.expert=2",
        "--batch_size=4", "--max_length=256", "--chunk=64", *flags, script=("serve.py",),
    ) as job:  # fmt: skip
        port = serving(job)
        found: dict[int, Any] = {}

        def one_of(i: int) -> None:
            found[i] = ask(port, bodies[i])["choices"][0]["logprobs"]

        threads = [threading.Thread(target=one_of, args=(i,)) for i in range(len(bodies))]
        for thread in threads:
            thread.start()
        leaving = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        leaving.request(
            "POST", PATH, json.dumps(ASKED | {"max_tokens": 200, "stream": True}),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        leaving.getresponse().read(100)
        leaving.close()
        for thread in threads:
            thread.join(LIMIT)
        time.sleep(6)  # longer than the first process is silent when it is idle
        one_of(0)
        assert "serving" not in job.outputs[1]
        for process in job.processes:
            process.send_signal(signal.SIGTERM)
        assert job.wait() == [0, 0], job.outputs
    for i, alone in enumerate(expected):
        assert found[i]["tokens"] == alone["tokens"]
        assert max(abs(a - b) for a, b in zip(found[i]["token_logprobs"], alone["token_logprobs"], strict=True)) <= 1e-5


@pytest.mark.full
def test_the_others_end_with_the_first(tmp_path: pathlib.Path) -> None:
    workdir = trained(tmp_path)
    with Job(
        2, None, workdir, "--port=0", "--cpu_devices=1", "--config.mesh.data=1", "--config.mesh.expert=2",
        "--peer_timeout=10", "--chunk=64", script=("serve.py",),
    ) as job:  # fmt: skip
        serving(job)
        job.processes[0].kill()
        assert job.processes[1].wait(60) == 3
        assert "process 0 " in job.outputs[1] and "has died" in job.outputs[1]
