"""Two processes run the same engine: their completions are those of one."""

import json
import pathlib

import jax
import pytest
from training.runs import Job
from training.tools import small, text

from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train


@pytest.mark.full
def test_two_processes_complete_what_one_does(tmp_path: pathlib.Path) -> None:
    """More prompts than slots, of several lengths, some drawn: every process takes the same steps."""
    config = small(tmp_path, "train.steps=2", "train.eval_every=0")
    with jax.set_mesh(make_mesh(config)):
        train(config, tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": text(1, seed=i)[0][: 5 + 3 * i], "max_tokens": 3 + i, "temperature": float(i % 2)} for i in range(9)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = []
    for count, devices in ((1, 2), (2, 1)):
        output = tmp_path / f"{count}.jsonl"
        with Job(
            count, None, tmp_path / "run", f"--prompts={prompts}", f"--output={output}", f"--cpu_devices={devices}",
            "--config.mesh.data=1", "--config.mesh.expert=2", "--batch_size=4", "--ignore_eos", "--max_length=64",
            script=("generate.py",),
        ) as run:  # fmt: skip
            assert run.wait() == [0] * count, run.outputs
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    one, two = answers
    assert [a["tokens"] for a in one] == [a["tokens"] for a in two]
    assert [len(a["tokens"]) for a in one] == [row["max_tokens"] for row in rows]
    for a, b in zip(one, two, strict=True):
        assert max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) <= 1e-5
