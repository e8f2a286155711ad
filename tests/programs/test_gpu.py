"""Every program, for hosts of GPUs that are not there; `make test-programs-gpu` installs their compiler."""

import pytest
from model.tools import pairwise

from .compiled import CHUNK, EXPERTS, HYBRID
from .running import (
    case_name,
    check_expert_copies,
    check_host_copies,
    check_host_memory,
    check_no_expert_is_copied,
    check_replicas,
    compiled,
    planned,
)

pytestmark = pytest.mark.gpu

# What makes a program another one: overrides where it is on. Of eight ranks.
FEATURES: dict[str, tuple[str, ...]] = {
    "fsdp, by Muon": ("mesh.fsdp=True", "optimizer.name=muon", "optimizer.moment_dtype=bfloat16"),
    "accumulate": ("train.accumulate_steps=2",),
    "tensor": ("mesh.expert=4", "mesh.tensor=2"),
    "remat, from a random start": ("execution.remat=layer", "model.projection_init=random"),
    "dropless": ("model.capacity_factor=inf",),
    "by quantiles of its own": ("model.balance=quantile", "model.balance_step=same"),
    "hybrid": HYBRID,
}
EXCHANGES = ("all_to_all", "ragged", "hierarchical")
CASES = sorted(pairwise(["h100:1x8", "b200:1x8"], *[[False, True]] * len(FEATURES), EXCHANGES))


def overrides(case: tuple) -> list[str]:
    *_, exchange = case
    on = [name for name, there in zip(FEATURES, case[1:-1], strict=True) if there]
    found = ["mesh.expert=8", f"execution.exchange={exchange}", *(o for name in on for o in FEATURES[name])]
    if exchange == "hierarchical":
        found += ["mesh.node=2", f"mesh.expert={2 if 'tensor' in on else 4}"]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case_name(FEATURES, case[:-1])}-{case[-1]}")
def test_programs(case: tuple) -> None:
    made = compiled(case[0], "", *overrides(case))
    programs = {name: made[name] for name in ("init", "step", "evaluate", "prefill", "decode")}
    for name, program in programs.items():
        assert program["memory"]["total"] + program["beside"] < made["available"], name
    for name in ("step", "evaluate"):
        assert 0 < programs[name]["logits"] <= CHUNK, name
        assert "__cudnn$fmhaSoftmax" in programs[name]["calls"], name
    on = dict(zip(FEATURES, case[1:-1], strict=True))
    rows = on["dropless"] or case[-1] != "all_to_all"  # stand as they come, not as many for each expert
    assert ("grouped_matmul_fwd" in programs["step"]["kernels"]) == rows
    assert "grouped_matmul_fwd" in programs["evaluate"]["kernels"]  # which is dropless
    # No row times every expert: that is what plain `ragged_dot` is there. A rank reserves room for all ranks' rows.
    room = 64 * 256 // (2 if on["accumulate"] else 1) * 4
    assert programs["step"]["largest_elements"] < room * EXPERTS // 8 * 256


@pytest.mark.parametrize(("topology", "expert"), [("h100:2x8", 8), ("gb200:2x16", 16), ("gb300:2x8", 8)])
def test_what_crosses_hosts_or_racks(topology: str, expert: int) -> None:
    check_replicas(topology, f"mesh.expert={expert}", "mesh.fsdp=True", "execution.reduce_dtype=bfloat16")


def test_a_decode_step_copies_no_experts() -> None:
    check_no_expert_is_copied("h100:1x8")


def test_a_next_token_module_drafts() -> None:
    made = compiled("h100:1x8", "draft_mtp,verify_mtp", *HYBRID, "mesh.expert=8")
    for name in ("draft_mtp", "verify_mtp"):
        assert made[name]["memory"]["total"] < made["available"]
        assert [c for c in made[name]["collectives"] if c[4] == "payload"]


@pytest.mark.parametrize("topology", ["h800:1x8", "b300:1x8", "gb200:2x4", "gb300:2x4"])
def test_the_other_gpus(topology: str) -> None:
    made = compiled(topology, "step", "mesh.expert=8")
    assert made["step"]["memory"]["total"] < made["available"] and "__cudnn$fmhaSoftmax" in made["step"]["calls"]


@pytest.mark.parametrize("topology", ["h100:1x8", "b200:1x8"])
def test_every_exchange_of_chunks_runs_beside_products(topology: str) -> None:
    # As wide as GPT3-XL: what is sent in no time is not worth a product beside it.
    made = compiled(
        topology, "step", "mesh.expert=8", "model.hidden_size=2048", "model.num_heads=16", "model.head_dim=128",
        "data.sequence_length=2048", "model.capacity_factor=1.0", "execution.overlap_chunks=4",
        "execution.remat=exchange",
    )  # fmt: skip
    overlap = made["step"]["overlap"]
    assert len(overlap) == 16 and all(asynchronous and products for asynchronous, products in overlap), overlap


@pytest.mark.full
def test_a_loop_of_several_layers_keeps_little_more_than_one_of_one() -> None:
    """One model, written as eight times two layers, and as two times eight."""
    one, several = (
        compiled("h100:1x8", "step", "mesh.expert=8", "mesh.fsdp=True", "execution.remat=layer",
                 "model.capacity_factor=inf", "model.hidden_size=1024", "model.first_dense_layers=0",
                 "model.mamba_groups=4", "model.mamba_state=64", f"model.blocks={'ME' * layers}",
                 f"model.num_layers={8 // layers}")["step"]["memory"]["temporaries"]
        for layers in (1, 4)
    )  # fmt: skip
    assert several < 1.35 * one  # 1.26, and 1.44 where no layer's gradients wait for the next one's


@pytest.mark.full
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_state_in_host_memory(moment_dtype: str) -> None:
    check_host_memory("h100:4x8", moment_dtype)


@pytest.mark.parametrize("ranks", [8, 32])
def test_products_of_gpt3_xl_are_the_useful_ones(ranks: int) -> None:
    """Its bigmac step without room in the experts' rows: what is multiplied is counted, or computed again."""
    made = planned(
        "configs/paper/gpt3_xl.py", f"h100:{ranks // 8}x8", f"mesh.expert={ranks}", "model.capacity_factor=1.0",
        "execution.remat=layer", f"train.accumulate_steps={64 // ranks}",
    )  # fmt: skip
    useful, output = made["flops_per_step"], made["flops"]["output"]
    again = (useful - output) / 3  # a forward pass, short of the logits
    assert made["programs"]["step"]["flops_per_step"] == pytest.approx(useful + again, rel=0.1)


def test_models_of_this_size_fit() -> None:
    on = {
        "configs/qwen3_30b.py": ("h100:1x8", "mesh.expert=8", "data.batch_size=8", "train.accumulate_steps=1"),
        "configs/paper/gpt3_6_7b.py": ("h100:1x8", "mesh.expert=8", "mesh.fsdp=True", "execution.remat=layer",
                                       "train.accumulate_steps=8"),
        "configs/large.py": ("h100:8x8", "train.accumulate_steps=8"),
    }  # fmt: skip
    for file, (topology, *fields) in on.items():
        made = planned(file, topology, *fields)
        assert made["fits"] and set(made["programs"]) == {"init", "step", "evaluate", "prefill", "decode"}, file


@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_experts_are_copied_from_host_memory_beside_products(layers: int) -> None:
    check_host_copies("h100:1x1", layers)


def test_experts_are_copied_one_by_one() -> None:
    check_expert_copies("h100:1x1", 16)
