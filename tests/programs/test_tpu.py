"""Every program, for TPU slices that are not there: it compiles, fits, and holds nothing that a pod could not.

`make test-programs` installs libtpu and runs these.
"""

import math
from typing import Any

import pytest
from model.tools import pairwise

from .compiled import CHUNK, EXPERTS, HYBRID, VOCAB
from .running import (
    WIDE,
    case_name,
    check_expert_copies,
    check_host_copies,
    check_host_memory,
    check_no_expert_is_copied,
    check_no_stack_is_copied,
    check_replicas,
    compiled,
)

pytestmark = pytest.mark.tpu
RANKS, ROWS, LENGTH = 32, 64, 256

QUANTILES = (
    "model.balance=quantile",
    "model.router_scores=sigmoid",
    "model.first_dense_layers=1",
    "model.num_layers=3",
)
# What makes a program another one: overrides where it is on.
FEATURES: dict[str, tuple[str, ...]] = {
    "fsdp": ("mesh.fsdp=True",),
    "accumulate": ("train.accumulate_steps=2",),
    "untied, by Muon": ("model.tie_embeddings=False", "optimizer.name=muon", "optimizer.average_decay=0.99"),
    "tensor": ("mesh.expert=8", "mesh.tensor=4"),  # of more ranks than key-value heads
    "remat, from a random start": ("execution.remat=layer", "model.projection_init=random"),
    "dropless, by quantiles": ("model.capacity_factor=inf", *QUANTILES),
    "by quantiles of its own": ("model.balance_step=same", *QUANTILES),
    "hybrid": HYBRID,
}
CASES = sorted(pairwise(["v5e:4x8", "v6e:4x8"], *[[False, True]] * len(FEATURES)))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_kind(topology: str) -> None:
    """This Python's libtpu takes the default options of each: `make smoke` runs this test alone."""
    small = "model.structure=dense", "model.num_layers=1", "model.latent_norm=none", "model.num_shared_experts=0"
    made = compiled(topology, "step", *small, "mesh.expert=1", "mesh.fsdp=True")
    assert made["step"]["memory"]["total"] < made["available"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_name(FEATURES, case))
def test_programs(case: tuple[Any, ...]) -> None:
    topology, *on = case
    features = {name for name, there in zip(FEATURES, on, strict=True) if there}
    made = compiled(topology, "", *(override for name in FEATURES if name in features for override in FEATURES[name]))
    programs = {name: made[name] for name in ("init", "step", "evaluate", "prefill", "decode")}
    for name, program in programs.items():
        assert program["memory"]["total"] + program["beside"] < made["available"], name

    # Every rank draws its own shards. Whole parameters alone would be ten times the state of a rank with fsdp.
    assert programs["init"]["memory"]["total"] - programs["init"]["memory"]["code"] < 3 * made["state"]

    # Logits are in no program whole: those of training and evaluation go in chunks.
    for name in ("step", "evaluate"):
        assert 0 < programs[name]["logits"] <= CHUNK, name
    # Evaluation, which computes without a capacity, has a part of the step's batch at a time.
    rows = ROWS * LENGTH // RANKS // (2 if "accumulate" in features else 1) * EXPERTS + 256
    assert programs["evaluate"]["largest_elements"] <= rows * 256

    # The router's product and, in training, its two gradients.
    assert any(EXPERTS in shape for shape in programs["evaluate"]["exact_products"])
    assert len(programs["step"]["exact_products"]) >= 3

    if "fsdp" in features:
        table = VOCAB * 256
        scattered = [buffer for kind, _, buffer, _, _ in programs["step"]["collectives"] if kind == "reduce-scatter"]
        assert max(scattered) >= 4 * table // (4 if "tensor" in features else 1)


@pytest.mark.parametrize(
    "overrides",
    [("mesh.fsdp=True", "execution.reduce_dtype=bfloat16"), pytest.param((), marks=pytest.mark.full),
     pytest.param(("mesh.fsdp=True", "mesh.replica_optimizer=sharded"), marks=pytest.mark.full)],
    ids="-".join,
)  # fmt: skip
def test_what_crosses_slices(overrides: tuple[str, ...]) -> None:
    check_replicas("v6e:4x8 x 2", *overrides)


@pytest.mark.full
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_state_in_host_memory(moment_dtype: str) -> None:
    check_host_memory("v6e:4x8", moment_dtype)


def test_the_gradient_of_a_table_whose_shards_are_no_tiles_is_scattered() -> None:
    """50,304 rows over 32 ranks: 1,572 each."""
    V, D = 50304, 256
    made = compiled("v5e:4x8", "step", "mesh.fsdp=True", f"model.vocab_size={V}", "data.batch_size=32")
    large = [c for c in made["step"]["collectives"] if c[2] >= 4 * V * D // 2]
    assert "reduce-scatter" in {kind for kind, *_ in large}
    assert "all-reduce" not in {kind for kind, *_ in large}


def test_a_vocabulary_of_a_quarter_million_fits() -> None:
    V, fields = 262144, ("model.hidden_size=4096", "model.head_dim=128", "model.tie_embeddings=False")
    on = ("mesh.fsdp=True", "mesh.expert=16", "mesh.tensor=4", "data.sequence_length=4096", "execution.remat=layer")
    made = compiled("v5p:4x4x4", "init,step,evaluate", *fields, *on, f"model.vocab_size={V}", "data.batch_size=64")
    for name in ("init", "step", "evaluate"):
        program = made[name]
        assert program["memory"]["total"] + program["beside"] < made["available"], name


def test_compilation_takes_as_long_for_many_layers() -> None:
    few, many = (compiled("v5e:4x8", "prefill,decode", f"model.num_layers={layers}") for layers in (4, 24))
    for name in ("prefill", "decode"):
        assert many[name]["largest_elements"] > 0
        assert math.isclose(many[name]["memory"]["code"], few[name]["memory"]["code"], rel_tol=0.3), name


def test_a_decode_step_copies_no_experts() -> None:
    check_no_expert_is_copied("v6e:2x4")
    check_no_stack_is_copied("v6e:2x4")


def test_no_copy_of_all_layers_parameters_is_kept() -> None:
    """Each is cast where its layer is computed, not once for all in front of the loop."""
    wide, on = (*WIDE, "model.num_layers=5", "execution.remat=layer"), ("mesh.expert=4", "mesh.fsdp=True")
    programs = compiled("v6e:4x8", "step,evaluate", *wide, *on, "data.batch_size=32")
    of_rank = 5 * EXPERTS // 4 * 512 * 2048 // 8  # W_in of all layers
    for name in ("step", "evaluate"):
        made = programs[name]["made"]
        assert made and not [s for s in made if s[0] == "bf16" and s[1][0] == 5 and math.prod(s[1]) >= of_rank], made
    assert "f32" in {dtype for dtype, dims in programs["step"]["made"] if math.prod(dims) == of_rank}  # its gradient


@pytest.mark.parametrize(("topology", "ranks"), [("v6e:2x4", 8), ("v6e:8x8", 64)])
def test_rounds_need_a_fraction_of_the_worst_case(topology: str, ranks: int) -> None:
    """A loop with collectives in it compiles; its buffers, of 1.5 times the rows expected, are all that there are."""
    made = compiled(
        topology, "evaluate", "model.capacity_factor=inf", "model.num_experts=128", "model.top_k=8",
        f"mesh.expert={ranks}", f"data.batch_size={8 * ranks}", "execution.buffer_factor=1.5",
    )["evaluate"]  # fmt: skip
    # In bfloat16, 64 wide between ranks and 256 in the experts.
    worst = ranks * 8 * LENGTH * min(8, 128 // ranks)
    buffers = [size for _, _, size, _, role in made["collectives"] if role == "payload"]
    assert buffers and 4 * max(buffers) <= worst * 64 * 2
    assert 4 * made["largest_elements"] <= worst * 256


@pytest.mark.full
@pytest.mark.parametrize("topology", ["v5e:4x8", "v6e:4x8"])
def test_decoding_reads_pages_by_jaxs_kernel_where_it_takes_the_heads(topology: str) -> None:
    """One kernel more in the loop over layers than with other heads; rows of several tokens have none."""
    wide, narrow = (compiled(topology, "decode,draft,verify", f"model.head_dim={head}") for head in (128, 64))
    kernels = [
        {name: made[name]["calls"]["tpu_custom_call"] for name in ("decode", "draft", "verify")}
        for made in (wide, narrow)
    ]
    more = {name: kernels[0][name] - kernels[1][name] for name in kernels[0]}
    assert more == {"decode": 1, "draft": 1, "verify": 0}
    # Nothing leaves its rank while tokens are drafted.
    assert not wide["draft"]["collectives"]
    assert [c for c in wide["verify"]["collectives"] if c[4] == "payload"]


def test_a_next_token_module_drafts() -> None:
    """A hybrid's, with attention and experts: jax's kernel reads its pages, and its experts exchange."""
    made = compiled("v6e:4x8", "draft_mtp,verify_mtp", *HYBRID, "model.head_dim=128")
    narrow = compiled("v6e:4x8", "draft_mtp", *HYBRID)["draft_mtp"]
    for name in ("draft_mtp", "verify_mtp"):
        assert made[name]["memory"]["total"] < made["available"]
        assert [c for c in made[name]["collectives"] if c[4] == "payload"]
    assert made["draft_mtp"]["calls"]["tpu_custom_call"] == narrow["calls"]["tpu_custom_call"] + 1


def test_heads_split_over_tensor_read_pages_by_the_kernel() -> None:
    made = compiled("v5e:4x8", "decode", "model.head_dim=128", "mesh.expert=8", "mesh.tensor=4")
    assert made["decode"]["calls"]["tpu_custom_call"] >= 3


@pytest.mark.full
def test_both_cores_of_a_chip_are_ranks() -> None:
    """Eight of four chips, with a core's memory each."""
    made = compiled("tpu7x:2x2x1", "step", "mesh.expert=8")
    assert made["available"] == 96e9 > made["step"]["memory"]["total"]
    assert [c for c in made["step"]["collectives"] if c[4] == "payload"]


@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_experts_are_copied_from_host_memory_beside_products(layers: int) -> None:
    check_host_copies("v6e:1x1", layers)


def test_experts_are_copied_one_by_one() -> None:
    check_expert_copies("v6e:1x1", 16)
