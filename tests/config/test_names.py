"""Misspelled names: what is suggested, and that a suggestion is a question; the reference of the fields."""

import dataclasses
import json
import pathlib
import random
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest
from training.tools import ROOT

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, ExecutionConfig, from_dict, load_config
from bigmac_jax.config.field_docs import describe, list_fields
from bigmac_jax.config.names import nearest
from bigmac_jax.config.section import all_field_types

FIELDS = list(all_field_types(Config))
TINY = ROOT / "configs" / "tiny.py"


def flags_of(command: str) -> list[str]:
    """Names of the flags of a command and of all."""
    files = (ROOT / "bigmac_jax" / "commands" / f"{command}.py", ROOT / "bigmac_jax" / "commands" / "cli.py")
    return re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', "".join(file.read_text() for file in files))


FLAGS = {command: flags_of(command) for command in ("train", "eval", "generate", "serve", "plan", "convert")}


def misspelled(rng: random.Random, names: Sequence[str]) -> tuple[str, str]:
    """(one edit away, the name): a letter more, less, another, or two swapped."""
    while True:
        name = rng.choice(names)
        at, letter = rng.randrange(len(name) - 1), rng.choice("abcdefghijklmnopqrstuvwxyz_")
        wrong = rng.choice(
            [
                name[:at] + letter + name[at:],
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
        if wrong not in names:
            return wrong, name


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [f"{name}=1"])
    return str(error.value)


def suggested(message: str, prefix: str = "") -> list[str]:
    asked = re.search(r"did you mean (.*)\?", message)
    return [name.removeprefix(prefix) for name in asked[1].split(" or ")] if asked else []


def test_of_200_misspelled_names_95_percent_are_understood() -> None:
    """What is suggested is asked, never done; nothing but ConfigError is raised."""
    rng, right = random.Random(0), []
    for kind in ["field"] * 140 + ["flag"] * 60:
        names = FIELDS if kind == "field" else FLAGS[rng.choice(list(FLAGS))]
        wrong, name = misspelled(rng, names)
        message = refused(wrong) if kind == "field" else cli.unknown_flag(wrong, names)
        assert "\n" not in message and "is not a" in message and repr(wrong).strip("'") in message
        found = suggested(message, "--" if kind == "flag" else "")
        assert len(found) <= 3
        right.append(name in found or f"config.{name}" in found)
        if not found:  # then nothing is named as if it were meant
            assert re.search(r"; (see --help|its groups are|\w+ has |.*but a group)", message), message
    assert len(right) == 200 and sum(right) >= 190, sum(right)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ("model.topk", ("did you mean model.top_k?",)),
        ("train.learning_rate", ("did you mean optimizer.learning_rate?",)),  # in another group
        ("learning_rate", ("did you mean optimizer.learning_rate?",)),
        ("batch_sise", ("did you mean data.batch_size?",)),
        ("modle.top_k", ("did you mean model.top_k?",)),
        ("model.experts", ("did you mean model.num_experts?",)),
        ("model.layers", ("did you mean model.num_layers?",)),
        ("optimizer.b3", ("did you mean optimizer.b1 or optimizer.b2?",)),
        ("optimizer.nesterov", ("; optimizer has ", "learning_rate, final_learning_rate")),  # nothing is near
        ("optimizr", ("did you mean a field of optimizer? It has ", "learning_rate, ")),
        ("mesh", ("'mesh' is not a field of the config, but a group: data, node",)),
        ("quux.quuux", ("its groups are model, execution, mesh, data, optimizer, train",)),
    ],
)
def test_suggestions(wrong: str, parts: tuple[str, ...]) -> None:
    message = refused(wrong)
    for part in parts:
        assert part in message
    group, _, field = wrong.partition(".")
    if field and any(name.startswith(f"{group}.") for name in FIELDS):  # in a file as on the command line
        with pytest.raises(ConfigError) as error:
            from_dict({group: {field: 1}})
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("workdr", "did you mean --workdir?"),
        ("top_k", "did you mean --config.model.top_k?"),
        ("model.top_k", "did you mean --config.model.top_k?"),
        ("confg.model.top_k", "did you mean --config.model.top_k?"),
        ("cofnig.train.stepz", "did you mean --config.train.steps?"),
        ("zzzzzz", "see --help"),
    ],
)
def test_flags(wrong: str, said: str) -> None:
    assert cli.unknown_flag(wrong, FLAGS["train"]) == f"--{wrong} is not a flag; {said}"


def test_nearest() -> None:
    assert nearest("trian", ["train", "trains", "plan"]) == ["train"] and nearest("xyz", ["train"]) == []
    assert nearest("model.kind", ["model.kinds", "train.kind"]) == ["model.kinds"]  # in the group that was named
    assert nearest("layers", ["model.num_layers", "model.depth"]) == ["model.num_layers"]
    assert nearest("a" * 100_000, FIELDS) == []


def test_experts_are_checked_before_the_batch() -> None:
    """A batch that fits three ranks does not help where the experts don't."""
    with pytest.raises(ConfigError, match=r"num_experts=32 must be a multiple of mesh.node × mesh.expert = 3"):
        load_config(TINY, ["mesh.expert=3"])
    with pytest.raises(ConfigError, match=r"data.batch_size=8 must be a multiple .* = 3; use 9"):
        load_config(TINY, ["mesh.expert=3", "model.num_experts=33"])


def test_places() -> None:
    for field in ("cache_dir", "data.source", "data.validation_source", "data.tokenizer"):
        with pytest.raises(ConfigError, match=f"{field}=ftp://a/b must be a local path, or begin with gs:// or s3://"):
            load_config(TINY, [f"{field}=ftp://a/b"])
        with pytest.raises(ConfigError, match=f"{field}=gs:// names no bucket"):
            load_config(TINY, [f"{field}=gs://"])
        load_config(TINY, [f"{field}=gs://bucket/a"])
    with pytest.raises(ConfigError, match="home of a user that is not there"):
        load_config(TINY, ["cache_dir=~no_such_user/cache"])


# --- the reference ---


def test_the_reference_has_every_field(tmp_path: pathlib.Path) -> None:
    """With its default as a command line spells it, and all choices of its type."""
    fields = {field.name: field for field in list_fields()}
    assert list(fields) == FIELDS
    (tmp_path / "config.json").write_text(Config().to_json())
    assert (
        load_config(tmp_path / "config.json", [f"{field.name}={field.default}" for field in list_fields()]) == Config()
    )
    assert fields["model.norm"].choices == ("rmsnorm", "layernorm")
    assert fields["execution.wire_dtype"].choices == ("", "float32", "bfloat16", "float8_e4m3", "int8")
    assert fields["model.num_experts"].meaning.startswith("The feed-forward layer. ")  # above and behind the field
    assert fields["model.num_experts"].meaning.endswith(" e")
    assert fields["model.top_k"] == ("model.top_k", "int, at least 1", "4", "K", ())
    assert fields["execution.buffer_factor"].type == "float or auto, at least 1"
    assert fields["optimizer.b1"].type == "float, at least 0 and below 1"
    chosen = {name for name, field in fields.items() if field.choices}
    assert {f"execution.{f.name}" for f in dataclasses.fields(ExecutionConfig) if f.name.endswith("dtype")} <= chosen


def test_describe() -> None:
    text = describe(["mesh"])
    assert text.startswith("mesh: Devices by axis") and "--config.mesh.fsdp=False  (bool)\n      parameters and" in text
    assert "model." not in text
    assert "One of" not in describe(["data.documents"])  # its comment lists them
    assert 'One of "", float32, bfloat16.' in describe(["execution.gather_dtype"])
    assert len(re.findall(r"^  --config\.", describe(), re.MULTILINE)) == len(FIELDS)
    with pytest.raises(ConfigError, match="did you mean a field of optimizer"):
        describe(["optimizr"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["train.py", "--workdr=x"], 2, "--workdr is not a flag; did you mean --workdir?"),
        (["train.py", "--config.model.topk=4"], 2, "did you mean model.top_k?"),
        (["train.py", "model.top_k=4"], 2, "did you mean --config.model.top_k?"),
        (["eval.py", "--task=piqa"], 2, "did you mean --tasks?"),
        (["generate.py", "--workdir=ftp://a/b", "--prompt=a"], 2, "--workdir=ftp://a/b must be a local path"),
        (["train.py", "--config=tinny"], 2, "did you mean tiny?"),
        (["train.py", "runs/x"], 2, "'runs/x' is not a flag; did you mean --workdir=runs/x?"),
        (
            ["generate.py", "--weights=int4"],
            2,
            "--weights=int4 must be one of float32, bfloat16, int8; did you",
        ),
        (["convert.py", "import", "--checkpoint=Qwen/Qwen3-30B-A3B"], 2, "hf download Qwen/Qwen3-30B-A3B --local-dir"),
        (["plan.py", "large:258b"], 2, "did you mean --config=large:258b?"),
        (["train.py", "--help"], 0, "--config.GROUP.FIELD=VALUE"),
        (["eval.py", "--help"], 0, "--cpu_devices"),
        (["plan.py", "--config.mesh.help"], 0, "--config.mesh.tensor=1"),
        (["-m", "bigmac_jax", "fields", "train"], 0, "--config.train.steps=1000"),
        (["-m", "bigmac_jax", "plan", "--config=paper/gpt3_xl:vanilla", "--json"], 0, '"devices": 4'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_end_to_end(argv: list[str], code: int, said: str, tmp_path: pathlib.Path) -> None:
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    shown = ended.stderr if code else ended.stdout
    assert ended.returncode == code and said in shown, ended.stderr
    assert "Traceback" not in ended.stderr and (not code or ended.stderr.count("\n") == 1)
    if "--json" in argv:
        json.loads(ended.stdout)
