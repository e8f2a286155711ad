"""What a refusal says to use instead: given that, a config is not refused by the same rule again."""

import random
import re

import pytest

from bigmac_jax.config import Config, ConfigError, check_batch, load_config, with_overrides
from bigmac_jax.config.section import all_field_types

BASE = load_config("tiny", [])
FIELDS = all_field_types(Config)
NUMBERS = {int: (0, 1, 2, 3, 6, 20, 24, 768), float: (0, 0.3, 0.375, 0.3333, 1, 1.25, "inf"), bool: (True, False)}
TEXTS = {"model.blocks": ("ME", "*-*E", "**"), "model.mtp_blocks": ("*E", "E", "-"), "train.init_from": ("x",)}
DRAWN = [name for name in FIELDS if name.split(".")[0] in ("model", "mesh", "execution")]
DRAWN += ["data.sequence_length", "data.batch_size", "train.init_from", "train.accumulate_steps", "train.choices_from",
          "train.choices_steps", "train.experts_per_checkpoint", "tuning.objective", "tuning.lora_rank"]  # fmt: skip
UNITS = {"key-value heads": "model.num_kv_heads", "heads": "model.num_heads", "ranks": "mesh.expert"}
CASES = [
    {"model.hidden_size": 768, "model.down_ratio": 0.3},
    {"model.hidden_size": 768, "model.down_ratio": 0.3333},
    {"model.hidden_size": 65536, "model.down_ratio": 0.3333},
    {"model.structure": "vanilla", "model.down_ratio": 0.375, "model.num_experts": 20},
    {"model.structure": "vanilla", "mesh.expert": 4},
    {"model.structure": "vanilla", "mesh.expert": 2, "model.down_ratio": 0.375},
    {"model.mtp_modules": 1, "data.sequence_length": 1},
    {"model.num_expert_groups": 8, "model.top_groups": 1, "model.top_k": 9},
    {"model.balance": "quantile", "model.top_k": 32},
]


def refusal(given: dict[str, object]) -> str:
    try:
        config = with_overrides(BASE, [f"{name}={value}" for name, value in given.items()])
        check_batch(config, max(1, config.mesh.data))
    except ConfigError as error:
        return str(error)
    return ""


def rule(message: str) -> str:
    """A refusal without its numbers and its fix."""
    return re.sub(r"\d[\d.e+-]*", "#", message.rpartition("; ")[0])


def fixes(message: str) -> list[dict[str, str]]:
    """Each that the line names: FIELD=VALUE, a number of something, or a value of the field that it begins with."""
    what, _, fix = message.rpartition("; ")
    named = [name for name in re.findall(r"[a-z_]+\.[a-z_0-9]+", what) if name in FIELDS]
    found = []
    for part in re.split(r", or |, ", fix.removeprefix("use ")) if named else ():
        fields = {full_name(short): value for short, value in re.findall(r"([a-z_.0-9]+)=([^\s,;]+)", part)}
        if fields and all(fields):
            found.append(fields)
        elif number := re.fullmatch(r"([\d.e-]+)(?: or ([\d.e-]+))?(?: ([a-z- ]+))?", part):
            name = named[-1] if number[3] == "groups" else UNITS.get(number[3], named[0])
            alone = {"mesh.node": "1"} if name == "mesh.expert" else {}
            found += [{name: value, **alone} for value in number.groups()[:2] if value]
    return found


def full_name(short: str) -> str:
    return min((name for name in FIELDS if f".{name}".endswith(f".{short}")), key=len, default="")


def drawn(draw: random.Random) -> dict[str, object]:
    """Some fields with values that may be right."""
    kinds = {name: FIELDS[name] for name in draw.sample(DRAWN, draw.choice([2, 3, 4]))}
    values = {name: kind.choices or NUMBERS.get(kind.kind) or TEXTS.get(name) for name, kind in kinds.items()}
    return {name: draw.choice(of) for name, of in values.items() if of}


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.full)])
def test_a_fix_is_one(count: int) -> None:
    draw, met = random.Random(0), set[str]()
    for given in [*CASES, *(drawn(draw) for _ in range(count))]:
        message = refusal(given)
        for fix in fixes(message):
            met.add(rule(message))
            again = refusal(given | fix)
            assert rule(again) != rule(message), (given, message, fix, again)
    assert len(met) > 12
