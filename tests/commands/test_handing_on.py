"""What each command hands to those that do its work: every flag in its place. Nothing is computed."""

import contextlib
import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from training.tools import small

from bigmac_jax import commands
from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, MeshConfig, load_config
from bigmac_jax.data.chat_files import read_chat_folder
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation.perplexity import Evaluation, Score
from bigmac_jax.inference import Completion, Request, Sampling
from bigmac_jax.inference.drafter import Speculation
from bigmac_jax.interchange import Trained
from bigmac_jax.planning.place import Request as PlanRequest
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.clock import Clock
from bigmac_jax.serving.limits import Limits


class Records:
    """Puts functions in the place of others; `of` has what each was called with, by the names of the parameters."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        self.of: dict[str, dict[str, Any]] = {}

    def __call__(self, owner: Any, **results: Any) -> None:
        for name, result in results.items():
            self._patch.setattr(owner, name, self._recorder(name, inspect.signature(getattr(owner, name)), result))

    def _recorder(self, name: str, signature: inspect.Signature, result: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.of[name] = dict(signature.bind(*args, **kwargs).arguments)
            return result

        call.__signature__ = signature  # type: ignore[attr-defined]  # of one that is put in this one's place
        return call


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    return Records(monkeypatch)


@pytest.fixture
def given(command: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A command behind the parsing of these flags, overrides and other arguments."""

    def parsed(name: str, *flag: str, overrides: tuple[str, ...] = (), arguments: tuple[str, ...] = ()) -> Any:
        program = command(name)
        monkeypatch.setattr(program.cli, "OVERRIDES", list(overrides))
        monkeypatch.setattr(program.cli, "ARGUMENTS", list(arguments))
        flags.FLAGS.unparse_flags()
        for known in flags.FLAGS.get_key_flags_for_module(program.__name__):
            known.unparse()
        flags.FLAGS([name, *flag])
        return program

    yield parsed
    flags.FLAGS.unparse_flags()


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run without a checkpoint, whose windows have 16 tokens."""
    small(tmp_path)
    return tmp_path


def test_a_plan_is_asked_for_what_the_flags_say(
    given: Any,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--compile", "--options", "--terms", "--paper", "--search", "--compare")
    program = given(
        "plan", *words, "--devices=24", "--topology=v6e:4x8", "--slices=3", "--hardware=h100", "--imbalance=1.3",
        "--sweep=top_k=1,2", "--headroom=0.25", "--tokens=15T", "--scale=64..128", f"--plot={tmp_path / 'a.png'}",
        "--resident_layers=2", overrides=("model.top_k=3",), arguments=("dtype=float32",),
    )  # fmt: skip
    records(program.planner, make_plan={"a": 1})
    records(program.report, show=None)
    records(program.pictures, draw=None)
    program.main()
    asked = records.of["make_plan"]
    assert asked["request"] == PlanRequest(
        24, "v6e:4x8", 3, "h100", True, True, True, "1.3", True, ("top_k=1,2", "dtype=float32"), True, 0.25, "15T",
        True, "64..128",
    )  # fmt: skip
    execution = asked["config"].execution
    assert (asked["config"].model.top_k, execution.resident_layers, execution.resident_experts) == (3, 2, 0)
    assert records.of["show"] == {"plan": {"a": 1}}
    assert records.of["draw"] == {"plan": {"a": 1}, "path": tmp_path / "a.png"}
    program = given("plan", "--json", "--resident_experts=3")
    monkeypatch.setattr(program.cli, "CPU_DEVICES", SimpleNamespace(value=2))
    records.of.clear()
    program.main()
    assert records.of.keys() == {"make_plan"} and capsys.readouterr().out == '{"a": 1}\n'
    asked = records.of["make_plan"]
    assert asked["request"] == PlanRequest(devices=2) and asked["config"].execution.resident_experts == 3


DECODING = ("--step=best", "--max_length=12", "--batch_size=3", "--weights=int8", "--exchange=gather", "--speculate=4",
            "--draft_with=local", "--local_experts=2", "--least_acceptance=0.5", "--resident_layers=1")  # fmt: skip
SPECULATION = Speculation(4, 2, 0.5, "local")


class FakeGenerator:
    """Answers prompts in the reverse of their order, with as many tokens as their place among them."""

    drafts = SimpleNamespace(drafted=8, accepted=6)

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.slots: dict[str, Any] = {}

    def stream(self, request: Request) -> Iterator[str]:
        self.asked.append(request)
        yield from ("b", "c")

    def generate(self, requests: list[Request], done: Callable[[int, Completion], None]) -> None:
        self.asked += requests
        for number in reversed(range(len(requests))):
            done(number, Completion(f"{number}", (7,) * (number + 1), (-1.0,), "length", 1))

    def engine(self, slots: int, **sizes: int) -> Any:
        self.slots = {"slots": slots, **sizes}
        return SimpleNamespace(compile=lambda: self.slots.update(compiled=True))


def test_a_model_is_decoded_as_the_flags_say(given: Any, records: Records, workdir: pathlib.Path) -> None:
    program = given("decoding_flags", f"--workdir={workdir}", *DECODING, overrides=("mesh.data=1",))
    config, mesh = program.read_run(workdir), SimpleNamespace(shape={"data": 1})
    assert config.mesh.data == 1 and program.speculation() == SPECULATION and program.max_length(config) == 12
    records(program.cli, enter_mesh=mesh)
    records(program, check_resident=None, check_length=None, restore=(config, "model"), Generator="generator")
    held = program.enter_mesh(config, Speculation())
    assert (held.execution.resident_layers, held.execution.resident_experts) == (1, 0)
    assert records.of["enter_mesh"] == {"config": held, "fit_batch": False}
    assert records.of["check_resident"] == {"config": held, "mesh": mesh}
    assert records.of["check_length"] == {"name": "max_length", "length": 12, "config": held}
    assert program.load_generator(workdir, config, SPECULATION, "tokenizer") == "generator"
    assert records.of["restore"] == {"workdir": workdir, "step": "best", "config": config, "in_host": False}
    assert records.of["Generator"] == {
        "config": config, "model": "model", "max_length": 12, "batch_size": 3, "tokenizer": "tokenizer",
        "exchange": "gather", "consume": True, "weights": "int8", "speculate": SPECULATION,
    }  # fmt: skip
    program, deep = given("decoding_flags", "--unroll_layers", "--resident_experts=4"), load_config("tiny")
    assert program.max_length(config) == 16 and program.speculation() == Speculation()
    held = program.enter_mesh(config, Speculation())
    assert held.execution.resident_experts == 4
    records(program, restore=(deep, "model"))
    program.load_generator(workdir, held, SPECULATION, "tokenizer")
    assert records.of["restore"] == {"workdir": workdir, "step": "latest", "config": held, "in_host": True}
    unrolled = dataclasses.replace(deep.execution, unroll_layers=3)
    assert records.of["Generator"]["config"] == dataclasses.replace(deep, execution=unrolled)


SAMPLING = ("--max_tokens=5", "--temperature=0.5", "--top_k=7", "--top_p=0.75", "--stop=x", "--stop=y", "--ignore_eos",
            "--seed=3")  # fmt: skip


def test_prompts_are_completed_as_the_flags_say(
    given: Any, records: Records, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text to read, or lines in the order of the prompts whatever ends first; what was decoded is told to people."""
    drawn = (5, 0.5, 7, 0.75, ("x", "y"), True)
    prompts, output = workdir / "prompts", workdir / "answers"
    prompts.write_text('{"prompt": "a", "id": 5}\n{"prompt": "bc", "seed": 9}\n')
    asked = [Request("a", Sampling(*drawn, seed=3)), Request("bc", Sampling(*drawn, seed=9))]
    for own, count, told in (
        (["--prompt=a"], 1, ""),
        (["--prompt=a", "--json"], 1, ""),
        ([f"--prompts={prompts}", f"--output={output}"], 2, "; of 8 drafted tokens 75.0% were accepted\n"),
        ([f"--prompts={prompts}", "--json"], 2, ""),
    ):
        program, generator = given("generate", f"--workdir={workdir}", *SAMPLING, *own), FakeGenerator()
        saved = program.decoding_flags.read_run(workdir)
        records(program.cli, agree=None)
        records(program.decoding_flags, enter_mesh=saved, load_generator=generator)
        records(program, encode_requests=[])
        program.main()
        shown = capsys.readouterr()
        if own == ["--prompt=a"]:
            assert shown.out == "abc\n"
        else:
            rows = map(json.loads, (output.read_text() if told else shown.out).splitlines())
            assert [(row["prompt"], len(row["tokens"])) for row in rows] == [("a", 1), ("bc", 2)][:count]
        assert generator.asked == asked[:count] and shown.err.endswith(told)
        last = shown.err.splitlines()[-1] if told else ""
        assert last.startswith("3 tokens in ") if told else " tokens in " not in shown.err
        model = {"workdir": workdir, "config": saved, "speculate": Speculation()}
        tokenizer = records.of["load_generator"].pop("tokenizer")
        assert records.of["load_generator"] == model and tokenizer.eos_id == 256
        assert records.of["enter_mesh"] == {"config": saved, "speculate": Speculation()}
        assert records.of["agree"] == {"config": saved, "command": program.__name__}
        encoded = {"requests": asked[:count], "tokenizer": tokenizer, "vocab_size": 264, "max_length": 16}
        assert records.of["encode_requests"] == encoded


def test_a_server_is_started_as_the_flags_say(
    given: Any, records: Records, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "key").write_text("secret\n")
    limits = ("--max_body=11", "--queue=12", "--max_choices=13", "--timeout=14", "--arrival=15", "--drain=16")
    program = given(
        "serve", f"--workdir={workdir}", "--host=0.0.0.0", "--port=81", "--model_name=own", "--allow_host=a,b",
        f"--api_key_file={workdir / 'key'}", "--chat_template=t.jinja", "--cache_tokens=64", "--chunk=8",
        "--batch_size=3", *limits,
    )  # fmt: skip
    generator, config = FakeGenerator(), program.decoding_flags.read_run(workdir)
    monkeypatch.setattr(program.asyncio, "run", lambda answer: answer)
    records(program.cli, agree=None)
    records(program.decoding_flags, enter_mesh=config, load_generator=generator)
    records(program, listen="socket", load_dialogue="chat", count_pages=1, serve=7, follow=8)
    assert program.main() == 7
    served = records.of["serve"]
    assert served.pop("generator") is generator and served.pop("engine").compile
    assert served.pop("limits") == Limits(body=11, queue=12, choices=13, seconds=14.0, arrival=15.0, drain=16.0)
    others = {"chat": "chat", "name": "own", "listening": "socket", "key": "secret"}
    assert served == others | {"hosts": ["a", "b", "0.0.0.0"]}
    assert generator.slots == {"slots": 3, "positions": 64, "chunk": 8, "compiled": True}
    assert list(records.of["listen"].values()) == ["0.0.0.0", 81]
    assert records.of["count_pages"] == {"positions": 64, "longest": 16}
    assert records.of["enter_mesh"] == {"config": config, "speculate": Speculation()}
    model, dialogue = records.of["load_generator"], records.of["load_dialogue"]
    assert model.pop("tokenizer") is dialogue.pop("tokenizer")
    assert model == {"workdir": workdir, "config": config, "speculate": Speculation()}
    assert dialogue == {"file": "t.jinja", "tokenizer_file": "bytes", "workdir": workdir}
    assert records.of["agree"] == {"config": config, "command": program.__name__}
    program = given("serve", f"--workdir={workdir}")
    assert program.main() == 7
    assert (records.of["serve"]["name"], records.of["serve"]["key"]) == (workdir.name, "")
    assert records.of["serve"]["limits"] == Limits() and generator.slots["positions"] == 0
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    records.of.clear()
    assert program.main() == 8 and records.of["follow"]["generator"] is generator
    assert "listen" not in records.of and "serve" not in records.of


SCORE = Score(1.0, 2.0, 3.0, 4.0, 5, 6, 7)


@pytest.mark.parametrize(
    ("flag", "name"), [("--text_file={}/a.txt", "{}/a.txt"), ("--split=train", "train"), ("--sources=b,c", "b")]
)
def test_texts_are_scored_as_the_flags_say(
    flag: str, name: str, given: Any, records: Records, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, name = flag.format(workdir), name.format(workdir)
    (workdir / "a.txt").write_text("a text")
    program = given(
        "eval", f"--workdir={workdir}", "--step=best", "--length=12", "--stride=4", "--batch_size=3",
        "--documents=masked", "--resident_experts=4", flag, overrides=("mesh.data=1",),
    )  # fmt: skip
    stream, mesh = text_stream(workdir / "a.txt", ByteTokenizer()), SimpleNamespace(shape={"data": 1})
    records(program.cli, agree=None, enter_mesh=mesh)
    records(program, check_resident=None, restore=("config", "model"), hold="held", say_data_place=None)
    records(program, text_stream=stream, open_run_stream=stream, open_sources={"b": stream}, has_own_sources=False)
    records(program, evaluate=Evaluation(SCORE, np.zeros(0), np.zeros(0)), report_sources=(["lines"], {"b": 1}))
    program.main()
    config = records.of["agree"]["config"]
    run = {"workdir": workdir, "config": config}
    assert config.execution.resident_experts == 4 and config.mesh.data == 1
    assert records.of["agree"]["command"] == program.__name__
    assert records.of["enter_mesh"] == {"config": config, "fit_batch": False}
    assert records.of["check_resident"] == {"config": config, "mesh": mesh}
    assert records.of["restore"] == run | {"step": "best", "in_host": True}
    assert records.of["hold"] == {"config": config, "model": "model"}
    scored = records.of["evaluate"]
    assert scored.pop("on_batch") and scored == {
        "model": "held", "stream": stream, "sequence_length": 12, "batch_size": 3, "stride": 4, "documents": "masked",
    }  # fmt: skip
    lines, several = capsys.readouterr().out.splitlines(), name == "b"
    assert json.loads(lines[-1]) == ({"b": 1} if several else SCORE._asdict()) | {"documents": "masked"}
    assert lines[0] == ("lines" if several else f"{name}, each document by itself: {SCORE.describe()}")
    split = {"split": "train"}
    expected = {"open_sources": run | {"split": "test", "names": ["b", "c"]}, "open_run_stream": run | split}
    expected["text_stream"] = {"text_or_path": workdir / "a.txt"}
    (call,) = expected.keys() & records.of.keys()
    asked = records.of[call]
    assert asked.pop("tokenizer").eos_id == 256 and asked == expected[call]
    assert records.of.get("say_data_place") == (run | split if call == "open_run_stream" else None)


def test_how_documents_are_read_is_said_of_texts_alone(
    given: Any, records: Records, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, rows = given("eval", f"--workdir={workdir}"), Conversations.__new__(Conversations)
    rows.text = "f" * 64
    records(program.cli, agree=None, enter_mesh=SimpleNamespace(shape={"data": 1}))
    records(program, restore=("config", "model"), hold="held", say_data_place=None, open_run_stream=rows)
    records(program, count_targets=1, evaluate=Evaluation(SCORE, np.zeros(0), np.zeros(0)))
    program.main()
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"test, answers alone: {SCORE.describe()}" and json.loads(last) == SCORE._asdict()


def test_tasks_are_scored_as_the_flags_say(
    given: Any, records: Records, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = given(
        "eval", f"--workdir={workdir}", "--step=best", "--stride=4", "--tasks=piqa,wikitext2", "--task_data=piqa=a",
        "--limit=2", "--json",
    )  # fmt: skip
    records(program.cli, agree=None, enter_mesh=SimpleNamespace(shape={"data": 1}))
    config = program.read_config(workdir)
    templated = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, chat_template="t"))
    records(program, use_saved_template=templated, open_jobs=["jobs"], find_checkpoint=(7, "id"))
    records(program, restore=("config", "model"), score_jobs={"piqa": 1}, describe_scores=["lines"])
    program.main()
    assert json.loads(capsys.readouterr().out) == {"step": 7, "tasks": {"piqa": 1}}
    assert records.of["use_saved_template"] == {"workdir": workdir, "config": config}
    assert records.of["find_checkpoint"] == {"workdir": workdir, "step": "best"}
    assert records.of["restore"] == {"workdir": workdir, "step": "7", "config": config, "in_host": False}
    opened, scored = records.of["open_jobs"], records.of["score_jobs"]
    assert opened.pop("tokenizer") is scored.pop("tokenizer")
    assert opened == {
        "names": ["piqa", "wikitext2"], "data": ["piqa=a"], "limit": 2, "config": templated, "length": 16,
        "chat_template": "t",
    }  # fmt: skip
    assert scored == {
        "jobs": ["jobs"], "model": "model", "folder": workdir / "tasks" / "7", "identity": "id", "length": 16,
        "batch_size": 8, "stride": 4, "quiet": True,
    }  # fmt: skip


def test_a_run_is_trained_as_the_flags_say(given: Any, records: Records, workdir: pathlib.Path) -> None:
    """Of more replicas than are here it has fewer, and keeps what was asked for."""
    file, run, fields = workdir / "config.json", workdir / "run", ("mesh.replica=2", "train.steps=9")
    program = given("train", f"--config={file}", f"--workdir={run}", "--profile=2:3", overrides=fields)
    asked = load_config(file, fields)
    fitted = dataclasses.replace(asked, mesh=dataclasses.replace(asked.mesh, replica=1))
    records(program.cli, agree=None, enter_mesh=SimpleNamespace(shape={"data": 1}))
    records(program, fit_replicas=(fitted, ""), train=SimpleNamespace(finished=False, step=3), saved_places=["a", "b"])
    records(program, _read_saved=("saved", {"data": 3}))
    assert program.main() == 0
    assert records.of["agree"] == {"config": asked, "command": program.__name__}
    assert list(records.of["fit_replicas"].values()) == [asked, "saved", {"data": 3}, jax.device_count()]
    assert records.of["enter_mesh"]["config"] == fitted
    assert list(records.of["saved_places"].values()) == [fitted, list(fields)]
    lines = [f"reads {place}, which {file} names" for place in ("a", "b")]
    trained = {"workdir": run, "profile": (2, 3), "notes": lines, "asked": asked}
    assert records.of["train"] == {"config": fitted} | trained


def test_a_model_is_exported_as_the_flags_say(given: Any, records: Records, workdir: pathlib.Path) -> None:
    program = given(
        "convert", f"--workdir={workdir}", f"--output={workdir / 'new'}", "--step=best", "--format=plain",
        "--dtype=float16", "--max_shard_size=1GB", overrides=("mesh.data=1",), arguments=("export",),
    )  # fmt: skip
    records(program.cli, agree=None, enter_mesh=None)
    records(program, restore_step=(None, "model", 7, 0.5), export_model="plain", history_before=["before"])
    program.main()
    saved, meshed = program.read_config(workdir), records.of["agree"]["config"]
    assert meshed.mesh.data == 1 and records.of["agree"]["command"] == program.__name__
    assert records.of["enter_mesh"] == {"config": meshed, "fit_batch": False}
    assert records.of["restore_step"] == {"workdir": workdir, "step": "best", "config": meshed}
    assert records.of["history_before"] == {"workdir": workdir, "config": saved}
    exported = records.of["export_model"]
    assert exported.pop("tokenizer").eos_id == 256 and exported.pop("chat") == read_chat_folder(workdir)
    assert exported.pop("trained") == Trained(7, 0.5, ["before"])
    named = {"format": "plain", "dtype": "float16", "max_shard_size": "1GB"}
    assert exported == {"config": saved, "model": "model", "output": str(workdir / "new")} | named


def test_processes_compare_config_and_flags(given: Any, records: Records) -> None:
    """But for where each machine has the config and the cache."""
    own = ("--config=mine", "--workdir=all", "--num_processes=2", "--peer_timeout=7")
    program = given("train")
    program.cli._define_host_flags()
    given("train", *own, overrides=("mesh.data=1",))
    records(program.cli.hosts, check_same=None)
    config = dataclasses.replace(Config(), cache_dir="elsewhere")
    for of, more in ((None, {"overrides": ["mesh.data=1"]}), (config, {"model.top_k": config.model.top_k})):
        program.cli.agree(of, program.__name__)
        told = records.of["check_same"]["fields"]
        known = {"--workdir": "all", "--stopped_exit_code": 0, "--num_processes": 2, "--peer_timeout": 7}
        assert told | known | more == told and told["jax"] == jax.__version__
        assert not {"--config", "cache_dir"} & set(told) and ("overrides" in told) == (of is None)


def test_flags_of_a_job_reach_those_that_connect_it(
    given: Any, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    given("generate")
    cli._define_host_flags()
    given("generate", "--coordinator=a:1", "--num_processes=2", "--process_id=1", "--peer_timeout=7")
    monkeypatch.setattr(cli, "clock", Clock())
    monkeypatch.setattr(cli, "CPU_DEVICES", SimpleNamespace(value=0))
    records(cli.hosts, connect=None)
    records(cli.watchdog, watch_job=contextlib.nullcontext())
    assert cli._guard(lambda: 5, True, ()) == 5
    assert records.of["connect"] == {
        "coordinator": "a:1", "num_processes": 2, "process_id": 1, "detect": False, "peer_timeout": 7,
    }  # fmt: skip
    assert records.of.pop("watch_job") == {"timeout": 7} and records.of.pop("connect")
    assert cli._guard(lambda: None, False, ()) is None
    assert records.of == {"watch_job": {"timeout": 0}}
    updated: list[tuple[str, Any]] = []
    monkeypatch.setattr(cli, "CPU_DEVICES", SimpleNamespace(value=3))
    monkeypatch.setattr(cli.jax.config, "update", lambda name, value: updated.append((name, value)))
    cli._guard(lambda: None, False, ())
    assert updated == [("jax_platforms", "cpu"), ("jax_num_cpu_devices", 3)]


def test_a_mesh_is_entered_with_its_replicas(records: Records, tmp_path: pathlib.Path) -> None:
    """A batch that no mesh divides is of training alone; a mesh of one replica belongs to nothing."""
    records(cli, keep_programs=None)
    records(cli.watchdog, belong_to=None)
    records(cli.jax, set_mesh=None)
    config = dataclasses.replace(small(tmp_path, "data.batch_size=9"), mesh=MeshConfig(data=2))
    with pytest.raises(ConfigError, match=r"data\.batch_size=9"):
        cli.enter_mesh(config)
    mesh = cli.enter_mesh(config, fit_batch=False)
    assert records.of["set_mesh"] == {"mesh": mesh} and mesh.shape["data"] == 2
    assert records.of["keep_programs"] == {"cache_dir": config.cache_dir} and "belong_to" not in records.of
    cli.enter_mesh(dataclasses.replace(config, mesh=MeshConfig(data=1, replica=3)))
    assert records.of["belong_to"] == {"parts": ["replica 0", "replica 1", "replica 2"]}  # of one process


@pytest.mark.parametrize(
    ("words", "overrides", "rest"),
    [
        (["--config.a.b=1", "-config.c=x=y", "--config=tiny", "d"], ["a.b=1", "c=x=y"], ["--config=tiny", "d"]),
        (["--config.a.b", "1", "2", "--config.c", "3"], ["a.b=1", "c=3"], ["2"]),
        (["--config.a.b", "--seed=1", "config.c=1"], ["a.b"], ["--seed=1", "config.c=1"]),
        (["--config.a.b", "-1", "--config.c=", "e"], ["a.b=-1", "c="], ["e"]),
        (["--config.a.b"], ["a.b"], []),
    ],
)
def test_fields_are_taken_from_the_command_line(
    words: list[str], overrides: list[str], rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their values behind them or beside them, in the order in which they were given."""
    monkeypatch.setattr(cli, "OVERRIDES", [])
    assert cli._take_overrides(["--config.program=1", *words]) == ["--config.program=1", *rest]
    assert overrides == cli.OVERRIDES


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_commands_take_what_they_read(name: str, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that are no flags where they read such, and a job's flags where processes are told apart."""
    source = (pathlib.Path(commands.__file__).parent / f"{name}.py").read_text()
    module = SimpleNamespace(run=cli.run, main=len)
    records(module, run=None)
    records(commands.signals, install=None)
    records(commands.environment, prepare=None)
    monkeypatch.setattr(commands.importlib, "import_module", lambda _: module)
    commands.start(name)
    assert records.of["run"] == {"main": len, "arguments": "cli.ARGUMENTS" in source, "distributed": "hosts." in source}
