"""What a user means who misspells a name, calls it as elsewhere, or spells a value otherwise: 60 cases by a table."""

import dataclasses
import math
import pathlib
import random
import re
from typing import Any

import pytest
from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import (
    Config,
    ConfigError,
    OptimizerConfig,
    TrainConfig,
    load_config,
    missing_place_fix,
    with_overrides,
)
from bigmac_jax.config import names as naming
from bigmac_jax.config.other_names import _FIELDS, _FLAGS
from bigmac_jax.config.section import FieldType, Range, flat_values
from config.test_names import FIELDS, FLAGS, TINY, flags_of, misspelled

SEED = 42
CASES = [misspelled(random.Random(f"{SEED} {number}"), FIELDS) for number in range(20)]
# As in transformers' Trainer and configs, PEFT, MaxText and Megatron → the field.
NAMES = {
    "learning-rate": "optimizer.learning_rate",
    "train.per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "train.accumulate_steps",
    "train.logging_steps": "train.log_every",
    "save_total_limit": "train.keep_checkpoints",
    "lr_scheduler_type": "optimizer.schedule",
    "num_hidden_layers": "model.num_layers",
    "model.num_experts_per_tok": "model.top_k",
    "rms_norm_eps": "model.norm_eps",
    "tuning.lora_r": "tuning.lora_rank",
    "target_modules": "tuning.lora_targets",
    "base_emb_dim": "model.hidden_size",
    "max_target_length": "data.sequence_length",
    "ici_tensor_parallelism": "mesh.tensor",
    "gradient_clipping_threshold": "optimizer.clip_norm",
    "train-iters": "train.steps",
    "moe-aux-loss-coeff": "model.balance_coefficient",
    "expert_model_parallel_size": "mesh.expert",
    "recompute-granularity": "execution.remat",
    "optimizer.adam_beta2": "optimizer.b2",
}
OF_COMMANDS = {  # (command, flag) → what is asked back
    ("train", "max_steps"): "--config.train.steps",
    ("train", "output_dir"): "--workdir",
    ("generate", "max_new_tokens"): "--max_tokens",
    ("convert", "model_name_or_path"): "--workdir",
}
VALUES: dict[str, Any] = {  # FIELD=VALUE → what is asked back, or the value that it is taken as
    "model.structure=FineGrained": "fine_grained",
    "model.norm=RMS-Norm": "rmsnorm",
    "execution.dtype=BF16": "bfloat16",
    "execution.wire_dtype=fp8": "float8_e4m3",
    "execution.exchange=all-to-all": "all_to_all",
    "execution.attention=flash_attention_2": "auto",
    "execution.remat=full": "layer",
    "optimizer.schedule=cosine_with_min_lr": "cosine",
    "optimizer.name=adamw_torch_fused": "adamw",
    "data.packing=best-fit": "best_fit",
    "tuning.objective=Dpo": "dpo",
    "mesh.fsdp=on": "true",
    "optimizer.warmup_steps=0.2k": "200",
    "model.down_ratio=1/8": "0.125",
    "model.capacity_factor=unlimited": "inf",
    "data.batch_size=16.0": 16,
}


def asked(message: str) -> list[str]:
    """What a line suggests, but for what it says in brackets."""
    found = re.search(r"did you mean (.*)\?$", message)
    return [name.partition(" (")[0] for name in found[1].split(" or ")] if found else []


def answer(*overrides: str) -> str:
    try:
        load_config(TINY, overrides)
        return ""
    except ConfigError as error:
        return str(error)


def test_at_least_57_of_60_are_answered_with_what_was_meant() -> None:
    missed = [(wrong, name) for wrong, name in [*CASES, *NAMES.items()] if name not in asked(answer(f"{wrong}=1"))]
    for (command, flag), meant in OF_COMMANDS.items():
        if meant not in asked(cli.unknown_flag(flag, FLAGS[command])):
            missed.append((flag, meant))
    for override, meant in VALUES.items():
        message = answer(override)
        given = flat_values(load_config(TINY, [override]))[override.partition("=")[0]] if not message else None
        if meant not in asked(message) and meant != given:
            missed.append((override, meant))
    count = len(CASES) + len(NAMES) + len(OF_COMMANDS) + len(VALUES)
    assert count == 60 and count - len(missed) >= 57, missed


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.lr=1", "did you mean optimizer.learning_rate?"),
        ("max_grad_norm=1", "did you mean optimizer.clip_norm?"),
        ("model.intermediate_size=8", "did you mean model.dense_hidden_size or model.expert_hidden_size?"),
        ("model.structure=fine-grained", "did you mean fine_grained?"),
        ("tuning.objective=SFT", "did you mean sft?"),
        ("train.steps=1e3", ""),  # taken
        ("train.steps=10k", "did you mean 10000?"),
        ("train.steps=1e-3", "must be of type int, as in --config"),
        ("train.steps=1e309", "must be of type int, as in --config"),
        ("train.seed=1,234", "did you mean 1234?"),
        ("model.dropout=5%", "did you mean 0.05?"),
        ("optimizer.clip_norm=none", "did you mean 0?"),
        ("model.num_layers=none", "must be of type int, as in --config"),
        ("model.activation=swiglu", "did you mean silu (model.gated=true)?"),
        ("model.num_heads=3", "use 2 or 4 heads"),  # nothing of 126
        ("execution.wire_dtype=x", 'must be one of "", float32, bfloat16, float8_e4m3, int8'),
        ("execution.dtype=quux", "must be one of float32, bfloat16"),  # nothing is near
    ],
)
def test_answers(override: str, part: str) -> None:
    message = answer(override)
    assert message.endswith(part) if "as in" not in part else part in message, message
    assert bool(message) == bool(part)


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("train", "lr", "did you mean --config.optimizer.learning_rate?"),
        ("train", "out", "did you mean --workdir?"),
        ("generate", "out", "did you mean --output?"),
        ("eval", "model", "did you mean --workdir?"),
        ("train", "micro-batch-size", "did you mean --config.data.batch_size?"),
    ],
)
def test_flags_of_others(command: str, flag: str, said: str) -> None:
    assert cli.unknown_flag(flag, FLAGS[command]) == f"--{flag} is not a flag; {said}"


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("train", "runs/x", "did you mean --workdir=runs/x?"),
        ("train", "paper/gpt3_xl:vanilla", "did you mean --config=paper/gpt3_xl:vanilla?"),
        ("train", "my.py", "did you mean --config=my.py?"),
        ("train", "mine.jsonl", "did you mean --config.data.source=mine.jsonl?"),
        ("eval", "mine.txt", "did you mean --text_file=mine.txt?"),
        ("eval", "mine.jsonl", "did you mean --sources=mine.jsonl?"),
        ("generate", "Once upon", "did you mean --prompt='Once upon'?"),
        ("train", "model.top_k=4", "did you mean --config.model.top_k?"),
        ("train", "zzzz", "see --help"),
    ],
)
def test_what_stands_without_a_flag(command: str, argument: str, said: str) -> None:
    assert cli.meant_argument(argument, FLAGS[command]) == said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--weights=int4", "--weights=int4 must be one of float32, int8; did you mean int8?"),
        ("--weights=x: y", "--weights=x must be one of float32, int8"),
        ("--port=x", "--port=x must be an integer in the range [0, 65535]"),
        ("--port=70000", "--port=70000 must be an integer in the range [0, 65535]"),
        ("--timeout=fast", "--timeout=fast must be a number"),
        ("--json=on", "--json=on must be one of true, false; did you mean true?"),
    ],
)
def test_wrong_values_of_flags(argument: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = flags.FlagValues()
    flags.DEFINE_enum("weights", "", ["", "float32", "int8"], "", flag_values=own)
    flags.DEFINE_integer("port", 0, "", 0, 65535, flag_values=own)
    flags.DEFINE_float("timeout", 1, "", flag_values=own)
    flags.DEFINE_bool("json", False, "", flag_values=own)
    monkeypatch.setattr(flags, "FLAGS", own)
    with pytest.raises(flags.IllegalFlagValueError) as refused:
        own(["generate", argument])
    assert cli._wrong_value(str(refused.value)) == said


def test_targets_of_adapters_as_peft_names_them() -> None:
    message = answer("tuning.lora_rank=4", "tuning.lora_targets=experts,q_proj")
    assert message.endswith("with commas between; did you mean attention?")


def test_other_names_are_no_names_of_ours() -> None:
    """Else what is a name here would be answered with another one."""
    assert set(_FIELDS) <= set(FIELDS)
    own = {field.rpartition(".")[2] for field in FIELDS}
    for field, names in _FIELDS.items():
        assert not own & set(names.split()), field
    flags = {flag for names in [*FLAGS.values(), flags_of("decoding_flags")] for flag in names}
    assert set(_FLAGS) <= flags


def test_whole_numbers_in_a_file() -> None:
    assert TrainConfig(steps=1e3).steps == 1000 and type(TrainConfig(steps=1e3).steps) is int  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train.steps=1000.5 must be of type int"):
        TrainConfig(steps=1000.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"name='AdamW' must be one of adamw, muon; did you mean adamw\?"):
        OptimizerConfig(name="AdamW")  # type: ignore[arg-type]


def test_load_config_takes_dictionaries() -> None:
    """As the config, and as overrides; groups may be nested or not."""
    wanted = load_config(TINY, ["model.top_k=2", "mesh.fsdp=true", "train.steps=7", "data.validation_source="])
    values = {"model": {"top_k": 2}, "mesh.fsdp": True, "train": {"steps": 7}, "data.validation_source": ""}
    assert load_config(TINY, values) == wanted
    assert load_config(values, {"train.steps": 9}) == load_config({}, ["train.steps=9", "model.top_k=2", "mesh.fsdp=1"])
    assert load_config({}) == Config()
    for wrong, said in (
        ({"model": {"topk": 2}}, "'model.topk' is not a field of the config; did you mean model.top_k?"),
        ({"model": 2}, "'model' is not a field of the config, but a group"),
        ({"train.steps": None}, "train.steps is None, and a field is"),
        ({7: 2}, "'7' is not a field"),
    ):
        for load in (lambda values: load_config(values), lambda values: load_config(TINY, values)):
            with pytest.raises(ConfigError, match=re.escape(said)):
                load(wrong)


def test_paths_that_are_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "mine.txt").touch()
    assert missing_place_fix("runs/frist", "give one") == "did you mean runs/first?"
    assert missing_place_fix("rusn/first", "give one") == "did you mean runs/first?"
    assert missing_place_fix("mine.tx", "give one") == "did you mean mine.txt?"
    for name in ("data1", "data2", "data3", ".data"):
        (tmp_path / "several" / name).mkdir(parents=True)
    assert missing_place_fix("several/data", "give one").count(" or ") == 1  # two at most, and no hidden one
    for place in ("runs/first", "runs/x", "nothing", "gs://bucket/frist", "a/b/c/d", "", "x" * 5000, "a/\0"):
        assert missing_place_fix(place, "give one") == "give one"
    assert missing_place_fix("Qwen/Qwen3-30B-A3B", "give one") == (
        "give one; a model's name on the Hub is not downloaded: hf download Qwen/Qwen3-30B-A3B --local-dir "
        "Qwen3-30B-A3B, and give that folder"
    )
    assert missing_place_fix("a/b", "give one", hub="did you mean hf:{place}?") == "give one; did you mean hf:a/b?"
    assert missing_place_fix("a/b", "give one", hub="") == "give one"


def test_nothing_is_guessed_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search makes ten thousand configs: for each field of each it had compared words, ten times as long as all the
    rest."""

    def guess(*_: Any) -> Any:
        raise AssertionError("looked for what may be meant")

    monkeypatch.setattr(naming, "nearest_choice", guess)
    config = with_overrides(load_config("tiny"), ["execution.exchange=dedup", "mesh.expert=2"])
    assert dataclasses.replace(config.execution, remat="layer").remat == "layer"
    with pytest.raises(AssertionError, match="looked"):
        dataclasses.replace(config.execution, remat="layers")


@pytest.mark.parametrize(
    ("field", "text", "meant"),
    [
        (FieldType(int), "10k", "10000"), (FieldType(int), "2.5M", "2500000"), (FieldType(int), "1b", "1000000000"),
        (FieldType(int), "1,000", "1000"), (FieldType(int), "6/3", "2"), (FieldType(int), "1/4", ""),
        (FieldType(float), "1/4", "0.25"), (FieldType(float), "25%", "0.25"), (FieldType(float), "1/0", ""),
        (FieldType(float), "1 k/8", "125"), (FieldType(float), "many", ""), (FieldType(float), "0.1/3", "0.0333333"),
        (FieldType(float, range=Range(may_be_inf=True)), "none", "inf"), (FieldType(float), "none", ""),
        (FieldType(int), "300%", "3"), (FieldType(int), "k", ""), (FieldType(float), "2/x", ""),
        (FieldType(int, range=Range(least=0)), "off", "0"), (FieldType(int, range=Range(least=1)), "off", ""),
    ],
)  # fmt: skip
def test_numbers_that_may_be_meant(field: FieldType, text: str, meant: str) -> None:
    assert field.ask(text) == (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("limits", "good", "bad"),
    [
        (Range(least=1), (1, 1.0, 2, 10**9), (0.999, 0, math.inf, -math.inf, math.nan)),
        (Range(above=0), (1e-300, 1), (0, -1, math.inf)),
        (Range(below=1), (0.999, -5), (1, 2, math.inf)),
        (Range(least=0, below=1), (0, 0.5), (1, -0.001)),
        (Range(), (-5, 0, 5), (math.nan, math.inf, -math.inf)),
        (Range(may_be_inf=True), (math.inf, 0), (math.nan,)),
        (Range(least=1, may_be_inf=True), (math.inf, 1), (0.5, -math.inf)),
    ],
)
def test_limits_of_numbers(limits: Range, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        limits.check("x", value)
    for value in bad:
        with pytest.raises(ConfigError, match=f"^x={re.escape(str(value))} must be "):
            limits.check("x", value)


def test_what_limits_are_called() -> None:
    limits = [Range(), Range(least=1), Range(above=0.5), Range(least=0, below=1), Range(least=1, may_be_inf=True)]
    assert [str(of) for of in limits] == ["", "at least 1", "above 0.5", "at least 0 and below 1", "at least 1"]
    kinds = FieldType(int), FieldType(float), FieldType(float, ("auto",)), FieldType(int, ("auto",)), FieldType(bool)
    assert [str(kind) for kind in kinds] == ["int", "float", "float or auto", "int", "bool"]


INT = FieldType(int, range=Range(least=1))
NO_LIMIT = FieldType(float, range=Range(least=0, may_be_inf=True))


@pytest.mark.parametrize(
    ("kind", "value", "held"),
    [
        (FieldType(int), 2**31 - 1, 2**31 - 1), (FieldType(int), 2**31, None), (FieldType(int), 1 - 2**31, 1 - 2**31),
        (FieldType(int), -(2**31), None), (FieldType(int), 1e3, 1000), (FieldType(int), 1.5, None),
        (FieldType(int), True, None), (FieldType(int), "1", None), (FieldType(int, ("auto",)), "auto", "auto"),
        (FieldType(float), 10**300, 1e300), (FieldType(float), 10**300 + 1, None), (FieldType(float), 1, 1.0),
        (FieldType(float), "inf", None), (NO_LIMIT, "inf", math.inf), (FieldType(float), True, None),
        (FieldType(bool), True, True), (FieldType(bool), 1, None), (FieldType(str), "x", "x"),
        (FieldType(str), 1, None),
        (FieldType(str, ("a", "b")), "b", "b"), (FieldType(str, ("a", "b")), "c", None), (INT, 1, 1), (INT, 0, None),
        (FieldType(int), 10**25, None),
    ],
)  # fmt: skip
def test_what_a_field_holds(kind: FieldType, value: Any, held: Any) -> None:
    if held is None:
        with pytest.raises(ConfigError, match=r"^x="):
            kind.check("x", value)
    else:
        found = kind.check("x", value)
        assert found == held and type(found) is type(held)


def test_large_numbers_are_shown_as_far_as_they_can_be() -> None:
    for value, shown in (
        (10**25, "x=10000000000000000000… (26 digits) "),
        (1 << 4094, "(1233 digits) "),
        (1 << 4095, "x=(4096 bits) "),
    ):
        with pytest.raises(ConfigError) as error:
            FieldType(int).check("x", value)
        assert shown in str(error.value)


def test_how_a_command_line_is_read() -> None:
    good = (int, "1e3", 1000), (int, "7", 7), (float, "1e-3", 0.001), (bool, "false", False), (str, "1", "1")
    for kind, text, value in good:
        assert FieldType(kind).parse(text) == value and type(FieldType(kind).parse(text)) is kind
    assert FieldType(float, ("auto",)).parse("auto") == "auto"
    for kind, text in ((int, "1.5"), (int, "x"), (float, "x"), (bool, "x")):
        with pytest.raises(ValueError, match=r"\S"):
            FieldType(kind).parse(text)


def test_names_that_are_near() -> None:
    """The group that was named counts, and so do words that are all there."""
    known = ["a.top_k", "b.top_k", "a.num_layers", "b.num_heads", "c"]
    assert naming.nearest("a.topk", known) == ["a.top_k"] and naming.nearest("topk", known) == ["a.top_k", "b.top_k"]
    assert naming.nearest("c.topk", known) == ["a.top_k", "b.top_k"]
    known.append("a.size_of_all_experts")
    assert naming.nearest("a.size", known) == naming.nearest("size", known) == ["a.size_of_all_experts"]
    assert naming.nearest("b.size", known) == naming.nearest("a.size_x", known) == []
    assert naming.nearest("zzz", known) == naming.nearest("x", []) == []


@pytest.mark.parametrize(
    ("text", "choices", "meant"),
    [
        ("A-B", ("ab", "abc"), ["ab"]), ("", ("", "ab"), []), ("layer norm", ("layer", "block"), ["layer"]),
        ("best", ("best_fit", "stream"), ["best_fit"]), ("best", ("best_fit", "best_of"), ["best_of"]),
        ("strem", ("best_fit", "stream"), ["stream"]), ("ab12", ("ab1x", "ab2x"), ["ab1x"]),
        ("zz", ("best_fit", "stream"), []), ("x", (), []),
    ],
)  # fmt: skip
def test_words_that_are_near(text: str, choices: tuple[str, ...], meant: list[str]) -> None:
    assert naming.nearest_choice(text, choices)[:1] == meant


def test_at_most_three_are_asked_back() -> None:
    assert naming.question(["a", "b", "c", "d"], "--") == "did you mean --a or --b or --c?"
    assert naming.question([]) == ""
