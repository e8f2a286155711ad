"""The commands: bad input is one line and exit code 2, results are JSON, the environment is set once."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import forks
import jax
import numpy as np
import pytest
from first_hour.printed import unexplained
from model.tools import leaves
from training.tools import ROOT, read_records, write_config

from bigmac_jax.config import STRUCTURES, load_config
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.runtime import environment
from bigmac_jax.training.workdir import read_config
from bigmac_jax.tuning import restore

CONFIG_FILES = sorted((ROOT / "configs").rglob("*.py"))

TRAIN = ("train.py", "--config={folder}/config.json", "--workdir={folder}/run", "--cpu_devices=2")
EVAL = ("eval.py", "--workdir={folder}/run", "--cpu_devices=2")
REPORT = "bigmac_jax/report/__main__.py"
GENERATE = ("generate.py", "--workdir={folder}/run", "--cpu_devices=2", "--max_tokens=4")
FRESH = ("train.py", "--config={folder}/config.json", "--workdir={folder}/fresh", "--cpu_devices=2")
IMPORT = ("convert.py", "import", "--cpu_devices=2")
EXPORT = ("convert.py", "export", "--workdir={folder}/run", "--cpu_devices=2")

GOOD = {
    "train": (*TRAIN, "--config.mesh.expert=2", "--config.train.steps", "3"),
    "train again": (*TRAIN, "--config.mesh.expert=2", "--config.train.steps", "3"),
    "eval": (*EVAL, "--json"),
    "eval file": (*EVAL, "--text_file={folder}/test.txt", "--step=best", "--batch_size=3", "--config.mesh.expert=1"),
    "eval tasks": (
        *(*EVAL, "--tasks=piqa,{folder}/own.toml", "--task_data=piqa={folder}/piqa.jsonl", "--limit=2"),
        *("--length=40", "--stride=8", "--config.mesh.expert=1"),
    ),
    "eval tasks again": (*EVAL, "--tasks=piqa", "--task_data=piqa={folder}/piqa.jsonl", "--limit=2", "--length=40"),
    "generate": (*GENERATE, "--prompt=the state", "--stop=\0"),
    "generate lines": (*GENERATE, "--prompts={folder}/prompts.jsonl", "--config.mesh.expert=1", "--ignore_eos"),
    "notebook": ("{folder}/notebook.py", "{folder}/run"),
    "export": (*EXPORT, "--output={folder}/exported"),
    "import": (*IMPORT, "--checkpoint={folder}/exported", "--workdir={folder}/imported"),
    "report": (REPORT, "{folder}/run", "-o", "{folder}/report.html"),
}  # fmt: skip
BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what the line must contain
    "unknown flag": ((*FRESH, "--colour=red"), ("--colour is not a flag; see --help",)),
    "misspelled flag": ((*FRESH, "--confg.model.top_k=2"), ("did you mean --config.model.top_k?",)),
    "stray argument": ((*FRESH, "now"), ("'now' is not a flag",)),
    "object store": ((*FRESH[:2], "--workdir=s3://bucket/run"), ("--workdir=s3://bucket/run can't be on S3",)),
    "flag of the wrong type": ((*FRESH, "--cpu_devices=two"), ("cpu_devices", "two")),
    "negative devices": ((*FRESH, "--cpu_devices=-1"), ("cpu_devices",)),
    "unknown field": ((*FRESH, "--config.model.topk=4"), ("'model.topk' is not a field", "model.top_k")),
    "field of the wrong type": ((*FRESH, "--config.model.top_k=four"), ("model.top_k='four'", "type int")),
    "field without a value": ((*FRESH, "--config.model.top_k"), ("model.top_k needs a value",)),
    "None": ((*FRESH, "--config.model.dropout=None"), ("model.dropout='None'", "type float")),
    "invalid value": ((*FRESH, "--config.model.top_k=9"), ("model.top_k=9", "at most model.num_experts=8")),
    "config that is not there": (("train.py", "--config={folder}/no.py"), ("no.py", "is not a file")),
    "too many ranks": ((*FRESH, "--config.mesh.expert=4"), ("= 4 ranks", "2 devices", "--cpu_devices=4")),
    "data that is not there": ((*FRESH, "--config.data.source=no.txt"), ("data.source='no.txt' is not there",)),
    "bad profile": ((*FRESH, "--profile=5"), ("--profile=5 must be START:STOP",)),
    "backward profile": ((*FRESH, "--profile=3:2"), ("--profile=3:2 must be START:STOP",)),
    "no exit code": (
        (*FRESH, "--stopped_exit_code=256"),
        ("--stopped_exit_code=256 must be an integer in the range [0, 255]",),
    ),
    "changed moments": (
        (*TRAIN, "--config.mesh.expert=2", "--config.optimizer.b1=0.5"),
        ("optimizer.b1=0.5 differs from 0.9", "--workdir", "train.init_from"),
    ),
    "no run": (("eval.py", "--workdir={folder}/nothing"), ("holds no config.json",)),
    "no checkpoint": (("eval.py", "--workdir={folder}/empty", "--cpu_devices=1"), ("holds no checkpoint",)),
    "broken config.json": (("eval.py", "--workdir={folder}/broken"), ("not valid JSON",)),
    "model field": ((*EVAL, "--config.model.top_k=1"), ("config.model.top_k=1", "only mesh, execution and cache_dir")),
    "unknown split": ((*EVAL, "--split=nonsense"), ("--split=nonsense must be train, validation or test",)),
    "text that is not there": ((*EVAL, "--text_file={folder}/no.txt"), ("no.txt", "No such file")),
    "empty text": ((*EVAL, "--text_file={folder}/empty.txt"), ("empty.txt is empty",)),
    "unknown task": ((*EVAL, "--tasks=pika"), ("--tasks=pika is not a task", "lambada")),
    "task without a column": (
        (*EVAL, "--tasks=lambada", "--task_data=lambada={folder}/piqa.jsonl"),
        ("piqa.jsonl line 1: column 'text' or 'passage' is missing",),
    ),
    "stride above the length": ((*EVAL, "--stride=99"), ("--stride=99 must be at most the 16 tokens",)),
    "limit of no task": ((*EVAL, "--limit=3"), ("--tasks=NAME",)),
    "text and tasks": ((*EVAL, "--tasks=piqa", "--text_file={folder}/test.jsonl"), ("--text_file", "give one")),
    "unknown step": ((*EVAL, "--step=7"), ("step=7 is not a checkpoint", "[2, 3]")),
    "word for a step": ((*EVAL, "--step=last"), ("step=last", "latest, best")),
    "negative batch": ((*EVAL, "--batch_size=-1"), ("batch_size",)),
    "no prompt": (GENERATE, ("give either --prompt=TEXT or --prompts=FILE",)),
    "broken prompt": ((*GENERATE, "--prompt=a\udcff"), ("prompt 1 is not valid UTF-8",)),
    "long prompt": ((*GENERATE, "--prompt=thirteen byte"), ("17, and must be at most max_length=16",)),
    "checkpoint of another shape": (
        ("generate.py", "--workdir={folder}/other", "--cpu_devices=2", "--prompt=a", "--max_tokens=4"),
        ("is of another model", "[1, 8, 4, 16]", "[1, 16, 4, 16]"),
    ),
    "output of a prompt": ((*GENERATE, "--prompt=a", "--output={folder}/a"), ("--output=", "give those, or --json")),
    "answers into a folder": (
        (*GENERATE, "--prompts={folder}/prompts.jsonl", "--output={folder}"),
        ("Is a directory",),
    ),
    "neither export nor import": (
        ("convert.py", "--workdir={folder}/run"),
        ("give `import --checkpoint=DIR", "one of export, latent, upcycle and widen"),
    ),
    "no output": (EXPORT, ("--output=NEW",)),
    "no equivalent": ((*EXPORT, "--output={folder}/no", "--format=nemotron_h"), ("model.positions=rope must be none",)),
    "report of nothing": ((REPORT,), ("at least one RUN",)),
    "report of no run": ((REPORT, "{folder}/nothing"), ("nothing holds no config.json; give the --workdir",)),
    "report of an empty run": ((REPORT, "{folder}/run", "{folder}/empty"), ("empty holds no metrics.jsonl",)),
    "report into no folder": ((REPORT, "{folder}/run", "-o", "{folder}/no/a.html"), ("--output=", "No such file")),
    "eval on too many ranks": ((*EVAL, "--config.mesh.expert=8"), ("= 8 ranks", "2 devices")),
}
# Of each command one or two; the others are of the full suite.
CHEAP = (
    "misspelled flag", "unknown field", "invalid value", "too many ranks", "changed moments", "no run",
    "unknown task", "unknown step", "long prompt", "checkpoint of another shape", "no output", "report of nothing",
)  # fmt: skip
assert BAD.keys() >= {*CHEAP}
DIVERGED = (
    *("train.py", "--config={folder}/config.json", "--workdir={folder}/diverged", "--cpu_devices=1"),
    "--config.model.structure=dense",
    "--config.optimizer.learning_rate=1e30",
    "--config.train.checkpoint_every=1",
    "--config.train.eval_every=2",
)

NOTEBOOK = """
import sys
import jax
from bigmac_jax import restore
jax.config.update("jax_num_cpu_devices", 2)
config, model = restore(sys.argv[1])
print(config.mesh.expert, model(jax.numpy.zeros((2, 4), int))[0].shape)
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A config, a run of it, and workdirs and texts that are not as they should be."""
    folder = tmp_path_factory.mktemp("commands")
    config = write_config(folder)
    for name, content in (("empty", config.read_text()), ("broken", "{")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    (folder / "other").mkdir()
    (folder / "other" / "checkpoints").symlink_to(folder / "run" / "checkpoints")
    (folder / "other" / "config.json").write_text(load_config(config, ("model.num_experts=16",)).to_json())
    (folder / "prompts.jsonl").write_text('{"prompt": "the state", "id": 5}\n{"prompt": "of", "max_tokens": 2}\n')
    (folder / "empty.txt").write_text(" \n")
    rows = [{"goal": "see", "sol1": "look", "sol2": "listen", "label": label} for label in (0, 1, 0)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(folder / "test.jsonl", folder / "test.txt")
    (folder / "own.toml").write_text('kind = "perplexity"\nsource = "test.jsonl"\ntext = "t"\n[columns]\nt = "text"\n')
    (folder / "notebook.py").write_text(NOTEBOOK)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: pathlib.Path, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """The commands of the tables above that tests of this session ask for, run in turn."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    bad = {name: argv for name, (argv, _) in BAD.items() if name in asked}
    commands = GOOD | bad | {"diverged": DIVERGED}
    out, err = folder / "out", folder / "err"

    def outcome(argv: tuple[str, ...]) -> Outcome:
        own = {"BIGMAC_CACHE_DIR": str(folder / "cache")}
        code = forks.start([part.format(folder=folder) for part in argv], out, err, own).wait()
        return Outcome(code, out.read_text(), err.read_text())

    return {name: outcome(argv) for name, argv in commands.items()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in CHEAP else [pytest.mark.full]) for n in BAD])
def test_bad_input_is_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    code, out, err = outcomes[name]
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    for part in BAD[name][1]:
        assert part in err


def test_generate(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    """Text to the terminal, JSON lines to a program; the same completion by both."""
    code, out, err = outcomes["generate"]
    assert code == 0, err
    code, lines, err = outcomes["generate lines"]
    assert code == 0, err
    first, second = map(json.loads, lines.splitlines())
    assert out == "the state" + first["text"] + "\n"
    assert first["id"] == 5 and len(first["tokens"]) == len(first["logprobs"]) == 4 and len(second["tokens"]) == 2
    assert "6 tokens in" in err


def test_programs_are_kept_where_the_environment_says(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    assert outcomes["train"].code == 0 and (folder / "cache" / "programs").exists() == (not own)
    assert list(pathlib.Path(own or folder / "cache" / "programs").glob("jit_step*"))


def test_train(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    """Two simulated devices, without an environment variable; both spellings of an override."""
    code, out, err = outcomes["train"]
    assert code == 0, err
    assert "bigmac: 8 experts of width 16 a layer, top-2, rows of 4 numbers instead of 16 in" in out
    assert " training tokens, mesh expert 2, " in out
    assert out.splitlines()[-1] == (
        f"trained to step 3, saved in {folder}/run; {folder}/run/report.png has its curves; next: "
        f"bigmac eval --workdir={folder}/run --cpu_devices=2, "
        f"bigmac generate --workdir={folder}/run --cpu_devices=2 --prompt=TEXT"
    )
    assert unexplained(out + err) == []
    assert f"reads data.source={folder}/train.jsonl, which {folder}/config.json names" in out.splitlines()
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("step 3 of 3: loss ")] and "\r" not in err  # a file, no terminal
    assert not [line for line in lines if line.startswith("W") or "tracked_metric" in line]
    code, out, err = outcomes["train again"]
    assert unexplained(out + err) == [] == unexplained(outcomes["generate"].err)
    assert code == 0 and f"{folder}/run is finished: it has 3 of 3 steps" in out and "--config.train.steps=6" in out
    assert not (ROOT / "gs:").exists()
    saved = json.loads((folder / "run" / "config.json").read_text())
    assert (saved["train"]["steps"], saved["mesh"]["expert"]) == (3, 2)


KEYS = ["loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens", "words", "bytes", "documents"]


def test_eval_prints_json(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    code, out, err = outcomes["eval"]
    assert code == 0, err
    (line,) = out.splitlines()  # --json: nothing else
    score = json.loads(line)
    assert list(score) == KEYS
    words = json.loads((folder / "test.jsonl").read_text())["text"]
    assert (score["tokens"], score["words"], score["bytes"]) == (len(words) + 1, 60, len(words))
    assert 1 < score["perplexity"] < 257


def test_eval_of_a_file_on_another_mesh(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    code, out, err = outcomes["eval file"]
    assert code == 0, err
    score, size = json.loads(out.splitlines()[-1]), (folder / "test.txt").stat().st_size
    assert list(score) == KEYS and score["bytes"] == size
    assert f"perplexity {score['perplexity']:.3f}" in out


def test_eval_of_tasks(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    """A known task with rows of our own, and one of our own; what was scored once is not scored again."""
    code, out, err = outcomes["eval tasks"]
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    piqa, own = result["tasks"]["piqa"], result["tasks"]["own"]
    assert result["step"] == 3 and list(result["tasks"]) == ["piqa", "own"]
    assert (piqa["rows"], piqa["accuracy"], own["rows"]) == (2, 0.5, 1)
    assert own["tokens"] == own["bytes"] == (len(json.loads((folder / "test.jsonl").read_text())["text"]))
    assert "piqa: accuracy 50.0 % ± 50.0" in out and "own: perplexity" in out and "piqa" in err  # a bar
    rows = [json.loads(line) for line in (folder / "run" / "tasks" / "3" / "piqa.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [0, 1] and rows[0]["loglikelihoods"] == rows[1]["loglikelihoods"]
    code, out, err = outcomes["eval tasks again"]
    assert "2 windows were scored by an earlier run" in err and json.loads(out.splitlines()[-1])["tasks"] == {
        "piqa": piqa
    }


def test_export_and_import(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    """What is written comes back as a run; it says how transformers loads it, and what is known of the run."""
    for name in ("export", "import"):
        assert outcomes[name].code == 0, outcomes[name].err
    assert "bigmac, float32; transformers loads it with trust_remote_code=True" in outcomes["export"].out
    card = (folder / "exported" / "README.md").read_text()
    (score,) = (record for record in read_records(folder / "run") if "eval/loss" in record)
    assert "| trained | 3 steps on " in card and f"| validation loss | {score['eval/loss']:.4f} nats a token" in card
    assert "bigmac: 8 experts of width 16" in outcomes["import"].out
    with jax.set_mesh(make_mesh(read_config(folder / "run"))):
        (before, model), (after, copy) = restore(folder / "run"), restore(folder / "imported")
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
    assert after.model == before.model


def test_restore_without_a_mesh(outcomes: dict[str, Outcome]) -> None:
    """As in a notebook: the mesh of the run becomes current."""
    code, out, err = outcomes["notebook"]
    assert (code, out.strip()) == (0, "2 (2, 4, 264)"), err


def test_report(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    code, out, err = outcomes["report"]
    assert code == 0, err
    assert out.startswith(f"{folder}/report.html: 1 run, ")
    html = (folder / "report.html").read_text()
    last = [record for record in read_records(folder / "run") if "loss" in record][-1]
    assert f"{last['loss']:.4f}" in html and html.endswith("</html>\n")


def test_a_run_that_diverges(outcomes: dict[str, Outcome], folder: pathlib.Path) -> None:
    """It ends at the first step that is not finite; the checkpoint before it can be loaded, the report is drawn."""
    code, _, err = outcomes["diverged"]
    assert code == 1, err
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    message = re.fullmatch(r"error: step (\d+): loss .*; the checkpoint of step (\d+) is kept; lower .*", line)
    assert message, line
    step, kept, workdir = int(message[1]), message[2], folder / "diverged"
    with jax.set_mesh(make_mesh(read_config(workdir))):
        _, model = restore(workdir, kept)
    assert int(kept) == step - 1 and all(np.isfinite(leaf).all() for leaf in leaves(model).values())
    assert (workdir / "report.png").stat().st_size > 1000
    training = [record for record in read_records(workdir) if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, step))
    assert not any(name.startswith("moe/") for name in training[-1])  # it is dense


SHOW = """
import os, pathlib, runpy, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
runpy.run_path(sys.argv[2])["prepare"]()
print(os.environ.get("GLIBC_TUNABLES"), len(starts.read_text()), sys.argv[3:])
"""


TUNABLES = environment.SETTINGS["GLIBC_TUNABLES"][0]
CLEARED = ("GLIBC_TUNABLES", "BIGMAC_KEEP_ENV", "BIGMAC_PREPARED")


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are of glibc")
@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ({}, TUNABLES + " 2 ['a b', '--c=d']"),  # started again, once, with the same arguments
        ({"BIGMAC_KEEP_ENV": "1"}, "None 1 ['a b', '--c=d']"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0 1 ['a b', '--c=d']"),
    ],
)
def test_environment(tmp_path: pathlib.Path, given: dict[str, str], printed: str) -> None:
    starts, script = tmp_path / "starts", tmp_path / "show.py"
    starts.write_text("")
    script.write_text(SHOW)
    clean = {name: value for name, value in os.environ.items() if name not in CLEARED}
    command: list[Any] = [sys.executable, script, starts, environment.__file__, "a b", "--c=d"]
    result = subprocess.run(command, env=clean | given, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == printed


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_configs_load(file: pathlib.Path, structure: str) -> None:
    # Of a pod's mesh vanilla's few experts fill a part, and only bigmac has a latent.
    overrides = [f"model.structure={structure}", "mesh.expert=1", "model.latent_norm=none"]
    assert load_config(file).model.num_layers > 0 and load_config(file, overrides).model.structure == structure


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("KeyboardInterrupt", 130, "interrupted\n"),
        ("BrokenPipeError", 141, ""),
        ("jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 40018591 bytes.')", 2, "memory"),
        ("MemoryError('Unable to allocate 40018591 bytes for an array')", 2, "memory"),
    ],
)
def test_what_ends_a_command_from_outside(error: str, code: int, line: str) -> None:
    """Ctrl-C, a reader such as head that has seen enough, memory: no traceback."""
    start = "import jax\nfrom bigmac_jax.commands import cli\n"
    program = f"{start}def main():\n    print('out')\n    raise {error}\ncli.run(main)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if line == "memory":
        line = ended.stderr
        assert line.startswith(
            "error: memory does not suffice (an array of 40018591 bytes); use fewer tokens at a time"
        )
        assert line.count("\n") == 1
    assert (ended.returncode, ended.stderr) == (code, line)
