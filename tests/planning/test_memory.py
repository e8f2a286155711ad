"""The estimate of a rank's memory: against compiled programs, and what it depends on."""

import math
import pathlib
from dataclasses import replace

import pytest

from bigmac_jax.config import Config, ExecutionConfig, load_config
from bigmac_jax.model import counts
from bigmac_jax.model.memory import describe_copies, rank_memory
from bigmac_jax.model.mesh import ExpertGroup, axis_sizes
from bigmac_jax.planning.cluster import mesh_group
from bigmac_jax.planning.hardware import load_hardware

ROOT = pathlib.Path(__file__).parents[2]
GPT3 = ("mesh.fsdp=True", "execution.remat=layer", "train.accumulate_steps=8")
# GiB of the compiled step (docs/planning.md).
COMPILED = [
    ("paper/gpt3_6_7b", (*GPT3, "mesh.expert=32"), 32, "v5e", 14.73),
    ("paper/gpt3_6_7b", (*GPT3, "mesh.expert=16", "mesh.tensor=2", "train.accumulate_steps=16"), 32, "v5e", 13.99),
    ("paper/gpt3_6_7b", (*GPT3, "mesh.expert=8"), 8, "h100", 53.4),
    ("modern", (*GPT3, "mesh.expert=32"), 32, "v5e", 7.93),
    ("large", (), 512, "v5p", 16.12),
    ("large", ("train.accumulate_steps=8",), 64, "h100", 45.5),
    ("qwen3_30b", (), 32, "v6e", 28.17),
    ("qwen3_30b", ("mesh.expert=8", "data.batch_size=8", "train.accumulate_steps=1"), 8, "h100", 60.2),
    ("long", (), 64, "v5p", 26.7),
    ("long", (), 32, "h100", 57.4),
]


def memory(config: Config, devices: int, hardware: str = "h100") -> dict[str, int]:
    sizes = axis_sizes(config, devices)
    group = mesh_group(sizes, load_hardware(hardware))
    return rank_memory(config, devices, group, counts.parameters(config, sizes))


@pytest.mark.parametrize(("name", "overrides", "devices", "hardware", "compiled"), COMPILED)
def test_compiled_programs(name: str, overrides: tuple[str, ...], devices: int, hardware: str, compiled: float) -> None:
    found = memory(load_config(f"{ROOT}/configs/{name}.py", overrides), devices, hardware)
    assert -0.13 < sum(found.values()) / 2**30 / compiled - 1 < 0.22


def test_scores_are_kept_where_no_kernel_runs() -> None:
    """Two numbers a head and pair of tokens, of each layer; a kernel's memory grows with the length, not its square."""
    config = load_config(f"{ROOT}/configs/long.py")
    xla = replace(config, execution=replace(config.execution, attention="xla", remat="none"))
    auto = replace(config, execution=replace(config.execution, remat="none"))
    tokens, length = 32 * 131072 // (32 * 2), 131072
    more = memory(xla, 32)["activations"] - memory(auto, 32)["activations"]
    assert more == pytest.approx(24 * tokens * 2 * 16 * length * 2, rel=1e-6)
    half = replace(auto, data=replace(auto.data, sequence_length=length // 2))
    assert memory(auto, 32)["activations"] == pytest.approx(2 * memory(half, 32)["activations"], rel=1e-3)


def test_the_worse_of_two_moments() -> None:
    """A large vocabulary makes the loss the worse one, wide layers the backward pass."""
    config = load_config(f"{ROOT}/configs/tiny.py", ("mesh.fsdp=True", "model.structure=dense"))
    group, execution = ExpertGroup((1, 1), "gpu", ""), ExecutionConfig(remat="none")
    many = replace(config, model=replace(config.model, vocab_size=2**20), execution=execution)
    table = 2**20 * many.model.hidden_size
    count = counts.parameters(many, {"data": 8})
    logits = 2 * 4 * min(many.data.batch_size * many.data.sequence_length // 8 * 2**20, 2**27)
    assert rank_memory(many, 8, group, count)["temporaries"] == logits + table * (4 + 4)  # gathered, and its gradient
    whole = replace(many, mesh=replace(many.mesh, fsdp=False))  # the gradient is among `gradients`
    assert rank_memory(whole, 8, group, count)["temporaries"] == logits + table * 4
    half = replace(many, execution=replace(execution, dtype="bfloat16", reduce_dtype="bfloat16"))
    assert rank_memory(half, 8, group, count)["temporaries"] == logits + table * (2 + 2)
    wide = replace(config, model=replace(config.model, expert_hidden_size=2**20), execution=execution)
    wider = rank_memory(wide, 8, group, counts.parameters(wide, {"data": 8}))["temporaries"]
    assert wider > 4 * math.prod((2 if wide.model.gated else 1, 2**20, wide.model.hidden_size))


def test_a_batch_in_parts_keeps_less() -> None:
    config = load_config(f"{ROOT}/configs/large.py", ("train.accumulate_steps=1",))
    parts = replace(config, train=replace(config.train, accumulate_steps=2))
    one, two = memory(config, 512), memory(parts, 512)
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.01)
    assert two["gradients"] == 2 * one["gradients"] and two["temporaries"] < one["temporaries"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (3, ""),
        (5, ""),  # divides no dimension of Qwen3-30B: 2,048 become 2,050
        (8, ""),
        # Of the experts' [128, 2048, 768] 2,048 become 2,545.
        (509, "a rank holds 1.3 times its even share of parameters and optimizer state, because mesh data 509 × "
              "expert 8 splits few of their dimensions evenly; mesh.data=256 or 512 would not"),
    ],
)  # fmt: skip
def test_copies_that_fsdp_leaves(data: int, told: str) -> None:
    config = load_config(f"{ROOT}/configs/qwen3_30b.py", ("mesh.expert=8",))
    sizes = axis_sizes(config, 8 * data, fit_batch=False)
    assert describe_copies(config, sizes) == told
    assert not describe_copies(replace(config, mesh=replace(config.mesh, fsdp=False)), sizes)  # it asks for copies
