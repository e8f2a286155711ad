"""The estimate of a rank's memory: against compiled programs, and what it depends on."""

import math
import pathlib
from dataclasses import replace
from typing import Any

import pytest
from model.tools import tiny

from bigmac_jax.config import Config, ExecutionConfig, load_config
from bigmac_jax.model import counts
from bigmac_jax.model.memory import describe_copies, host_memory, rank_memory
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


HYBRID: dict[str, Any] = {
    "structure": "dense", "blocks": "M*-", "mtp_modules": 2, "mtp_blocks": "*-", "num_kv_heads": 2, "gated": True,
    "dense_hidden_size": 24, "expert_hidden_size": 24, "tie_embeddings": False,
    "mamba_heads": 4, "mamba_head_dim": 4, "mamba_groups": 2, "mamba_state": 6, "mamba_chunk": 4,
}  # fmt: skip
# Numbers a token, of width 16 with the sequence split in two: M 2·16 + 16 + 4·16 + 4·12 + 2·16·6/4,
# * 2·16 + 2·(4 + 2)·4 + 16, - 16 + 3·24 + 16; a module has * and -, and what its norms and its projection are given.
LAYER, MODULE = 208 + 96 + 104, 96 + 104 + 5 * 16
# Beside tables 11,896 numbers in two layers and two modules; of scores 4 numbers of 4 heads for 16 tokens and 8.
OF_LAYER, SCORES = 11_896 // 4, 4 * 4 * 16 * 8
TABLE, LOGITS = 2640 * 16 // 2, 8 * 16 * 2640  # the loss' half of a table, and logits with their softmax


@pytest.mark.parametrize(
    ("fields", "fsdp", "activations", "temporaries"),
    [
        ({}, True, 4 * ((2 + 4) * 16 + 2 * LAYER + 2 * MODULE), 4 * 16 * LAYER + 8 * OF_LAYER + 4 * SCORES),
        ({"remat": "layer", "reduce_dtype": "bfloat16"}, True, 4 * (6 * 16 + LAYER),
         4 * 16 * LAYER + 6 * OF_LAYER + 4 * SCORES),
        ({"remat": "offload"}, False, 4 * (4 * 16 + LAYER), 4 * 16 * LAYER + 4 * OF_LAYER + 4 * SCORES),
        ({"vocab_size": 2640}, True, 4 * (6 * 16 + 2 * LAYER + 2 * MODULE), LOGITS + 8 * TABLE),
        # What a layer keeps is not there yet.
        ({"vocab_size": 2640, "remat": "layer"}, False, 4 * (6 * 16 + LAYER), LOGITS + 4 * TABLE - 4 * 16 * LAYER),
    ],
)  # fmt: skip
def test_layers_and_modules_of_all_kinds(
    fields: dict[str, Any], fsdp: bool, activations: int, temporaries: int
) -> None:
    """Counted by hand, of 16 tokens a rank; with remat=offload what enters layers and modules stands in host memory."""
    config = tiny((2, 1, 1, 2, fsdp), **HYBRID | fields)
    count = counts.parameters(config, {"data": 2, "tensor": 2})
    found = rank_memory(config, 4, ExpertGroup((1, 1), "cpu", ""), count)
    assert (found["activations"], found["temporaries"]) == (16 * activations, temporaries)
    entered = 16 * 4 * (2 + 2) * 16 if fields.get("remat") == "offload" else 0
    assert host_memory(config, 4, count, "cpu") == {"optimizer": 0, "activations": entered}
    halves = replace(config, train=replace(config.train, accumulate_steps=2))
    assert host_memory(halves, 4, count, "cpu")["activations"] == entered / 2


@pytest.mark.parametrize(
    ("ranks", "remat", "rows", "exchanged"), [(1, "none", 3, 0), (2, "none", 6, 0), (2, "exchange", 6, 2 * 16 * 6 * 4)]
)
def test_experts_split_over_tensor(ranks: int, remat: str, rows: int, exchanged: int) -> None:
    """Counted by hand: alone a rank has a row of 4 numbers for each of three choices, with another one it has room for
    all that both may send. What W↑ and W_g give is kept at full width, a shared expert's rows and the router's too."""
    config = tiny((1, 1, ranks, 2, False, True), num_layers=1, latent_norm="gate", num_shared_experts=1, vocab_size=40,
                  exchange="all_to_all", remat=remat)  # fmt: skip
    count = counts.parameters(config, {"expert": ranks, "tensor": 2})
    tokens = 32 // ranks
    layer = (2 * 16 + 2 * 8 * 4 + 16) + (16 + 2 * 16 + 2 * 4 + 2 * 8 + 4 * rows * 4 + 2 * 3 * 16)
    found = rank_memory(config, 2 * ranks, ExpertGroup((1, ranks), "cpu", ""), count)
    assert found["activations"] == 4 * (tokens * (16 + layer) + exchanged)
    experts, shared = 8 * 4 * 16 * 2, 1024 + 2 * 16 * 4 + 16 * 16 + 128 + 128 + 61
    assert found["temporaries"] == 4 * (tokens * layer + experts // (2 * ranks) + shared + 4 * 4 * tokens * 8)


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
