"""The cost model of a config, worked by hand; tests/planning/test_job.py has the terms of a rank alone."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from bigmac_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from bigmac_jax.model import counts
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.model.memory import host_memory, state_memory
from bigmac_jax.model.mesh import AXES, ExpertGroup
from bigmac_jax.model.traffic import exchange_traffic, replica_bytes, tensor_bytes
from bigmac_jax.model.transformer import init_model
from bigmac_jax.planning.cluster import cluster, mesh_group, physical_group
from bigmac_jax.planning.compiled_programs import _rings
from bigmac_jax.planning.cost import (
    Setting,
    SharedBytes,
    flops_outside_kernels,
    gradient_bytes,
    make_job,
    orthogonal_flops,
    parameter_bytes,
    recomputed,
    step_time,
    sum_seconds,
)
from bigmac_jax.planning.hardware import Hardware, Link, load_hardware
from bigmac_jax.planning.job import EXACT_PASSES_OF_FLOAT32

# Machines of four, whose numbers are easy to follow.
PLAIN = Hardware(
    "gpu", "plain", peak_flops=1e12, peak_flops_float32=5e11, matmul_efficiency=0.5, attention_efficiency=0.25,
    memory_bytes=1e10, memory_bandwidth=1e11, machine_ranks=4, overlaps=True, fast=Link(100.0, 2.0),
    slow=Link(10.0, 3.0),
)  # fmt: skip
V5E, V5P = load_hardware("v5e"), load_hardware("v5p")


def wide(X: int, Y: int) -> int:
    """A product's sides, each longer by what a matrix unit takes to fill."""
    return (X + 256) * (Y + 256)


def sizes(data: int = 1, node: int = 1, expert: int = 1) -> dict[str, int]:
    return {"data": data, "node": node, "expert": expert}


def config(accumulate: int = 1, **model: Any) -> Config:
    fields: dict[str, Any] = {"structure": "fine_grained", "num_layers": 2, "hidden_size": 64, "num_heads": 4,
              "vocab_size": 257, "num_experts": 32, "top_k": 4, "capacity_factor": 1.0}  # fmt: skip
    data = DataConfig(tokenizer="bytes", sequence_length=64, batch_size=64)
    fields |= model
    execution = {f.name: fields.pop(f.name) for f in dataclasses.fields(ExecutionConfig) if f.name in fields}
    train = TrainConfig(accumulate_steps=accumulate)
    return Config(ModelConfig(**fields), ExecutionConfig(**execution), data=data, train=train)


def test_two_ranks() -> None:
    """500 bytes to the other one, in each of 3 exchanges: 3 messages of 2 s, 1,500 bytes at 100 a second."""
    assert cluster(sizes(expert=2), PLAIN).exchange(Sent(1500, 0), 3) == 3 * 2 + 15


@pytest.mark.parametrize("mesh", [sizes(expert=8), sizes(node=2, expert=4), sizes(node=4, expert=2)])
def test_eight_ranks_on_two_machines(mesh: dict[str, int]) -> None:
    """10 bytes to each of 7: three here, four there, side by side. The mesh's axes say nothing about the links."""
    here = cluster(mesh, PLAIN)
    sent = Sent(10 * (mesh["expert"] - 1), 10 * (8 - mesh["expert"]))
    assert here.by_link(sent) == Sent(30, 40)
    assert here.exchange(sent, 1) == max(3 * 2 + 30 / 100, 4 * 3 + 40 / 10)


def test_hops_follow_each_other() -> None:
    """First 10 bytes to the other machine, then 10 to each of three."""
    here = cluster(sizes(node=2, expert=4), PLAIN)
    assert here.exchange(Sent(30, 10), 1, hierarchical=True) == (3 * 2 + 30 / 100) + (3 + 10 / 10)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "hierarchical"])
def test_links_are_those_of_the_physical_group(name: str) -> None:
    mesh, c = sizes(expert=32), config(exchange=name)
    hardware = load_hardware("h100")
    physical = physical_group(mesh, hardware)
    assert physical == ExpertGroup((4, 8), "gpu", hardware.device_kind)
    assert physical_group(sizes(node=2, expert=4), hardware).sizes == (1, 8)
    logical = exchange_traffic(c, 32, mesh_group(mesh, hardware)).padded
    expected = exchange_traffic(c, 32, physical).padded
    assert logical.slow == 0 < expected.slow
    assert cluster(mesh, hardware).by_link(logical) == pytest.approx(expected)


def test_a_plane_of_chips() -> None:
    """v5e 4x8: 31 bytes from each of 32 chips put 16 · 16 over 4 links of 50 GB/s; 10 hops of a microsecond."""
    here = cluster(sizes(expert=32), V5E, (4, 8))
    assert here.exchange(Sent(31e9, 0), 1) == pytest.approx(16 * 16e9 / 4 / 50e9 + 10e-6)
    assert here == cluster(sizes(expert=32), V5E)
    # Two blocks of 4 × 4: 8 · 8 over 4 links; the mesh's node axis is no slow link.
    for mesh in (sizes(2, 1, 16), sizes(2, 2, 8)):
        sent = Sent(mesh["expert"] - 1, 16 - mesh["expert"]).times(1e9)
        assert cluster(mesh, V5E).exchange(sent, 1) == pytest.approx(8 * 8e9 / 4 / 50e9 + 6e-6)


def test_a_box_of_chips() -> None:
    """v5p 2x4x4, no rings: 16 · 16 over 8 links of 100 GB/s; 7 hops."""
    assert cluster(sizes(expert=32), V5P).exchange(Sent(31e9, 0), 2) == pytest.approx(16 * 16e9 / 8 / 100e9 + 14e-6)


def test_hops_inside_a_slice() -> None:
    """4 × 8 as two nodes of 4 × 4: inside 8 · 8 over 4 links; between 1 byte to the fourth next, four chips a link."""
    here = cluster(sizes(node=2, expert=16), V5E)
    inside, between = 8 * 8e9 / 4 / 50e9 + 6e-6, 4 * 1e9 / 50e9 + 4e-6
    assert here.exchange(Sent(15e9, 1e9), 1, hierarchical=True) == pytest.approx(inside + between)


def test_two_slices() -> None:
    """Two chips of every four in the other slice of two: they are reached over the data centre's network."""
    here = cluster(sizes(expert=4), V5E, (1, 2))
    slow = 2 * V5E.slow.latency + 2e9 / V5E.slow.bandwidth
    assert here.exchange(Sent(3e9, 0), 1) == pytest.approx(slow)


def test_hops_of_groups_on_two_slices() -> None:
    """Inside 2 × 4 chips 4 · 4 over 2 links and 4 hops, in each of two exchanges; then a message to the other slice. Of
    two ranks of tensor each has a line of four: 2 · 2 over a link, 3 hops."""
    slow = 2 * V5E.slow.latency + 1e9 / V5E.slow.bandwidth
    here = cluster(sizes(node=2, expert=8), V5E, (2, 4))
    assert here.exchange(Sent(7e9, 1e9), 2, hierarchical=True) == pytest.approx(4 * 4e9 / 2 / 50e9 + 8e-6 + slow)
    line = cluster(sizes(node=2, expert=4) | {"tensor": 2}, V5E, (2, 4))
    assert line.exchange(Sent(3e9, 1e9), 2, hierarchical=True) == pytest.approx(2 * 2e9 / 50e9 + 6e-6 + slow)


def test_machines_that_cut_through_rows() -> None:
    """Rows of six on machines of four: two of a row are surely together, of whose other five ranks one is near."""
    here = cluster(sizes(node=2, expert=6), PLAIN)
    assert here.by_link(Sent(50, 60)) == Sent(10, 100)
    assert here.exchange(Sent(50, 60), 2) == max(2 * 1 * 2 + 10 / 100, 2 * 10 * 3 + 100 / 10)


def test_around_a_ring() -> None:
    here = cluster(sizes(2, 1, 4), PLAIN)
    # All 8: inside at 100, out of a machine at its four shares of 10. 1,000 bytes, there and back, 7/8 of them.
    assert here.all_reduce(1000, 8) == 2 * 1000 * 7 / 8 / 40
    assert here.all_reduce(1000, 4) == 2 * 1000 * 3 / 4 / 100
    # Every fourth: one to a machine, and one share.
    assert here.all_reduce(1000, 2, 4) == 1000 / 10
    assert here.all_reduce(1000, 1) == 0
    # On 16 × 16 two rings of two directions; every 16th chip has the second axis.
    pod = cluster(sizes(16, 1, 16), V5E)
    assert pod.all_reduce(1e9, 256) == pytest.approx(2e9 * 255 / 256 / 200e9)
    assert pod.all_reduce(1e9, 16, 16) == pytest.approx(2e9 * 15 / 16 / 100e9)


@pytest.mark.parametrize(
    ("hardware", "topology", "ranks", "stride", "links"),
    [
        (V5P, (8, 8, 8), 2, 1, 1),  # two neighbours, not six links
        (V5P, (8, 8, 8), 8, 1, 2),  # one axis, which is a ring
        (V5P, (8, 8, 8), 16, 1, 2 + 1),  # and two of the next, a line
        (V5P, (8, 8, 8), 8, 8, 2),  # a replica of 64: along the second axis
        (V5P, (8, 8, 8), 4, 2, 2 / 2),  # every second of one axis: half of its ring, as the others go there, too
        (V5P, (8, 8, 8), 2, 2, 1 / 2),
        (V5E, (4, 8), 4, 1, 1),
        (V5E, (4, 8), 16, 1, 2),
        (V5E, (4, 3), 6, 1, 1),  # no block of rows of four
        (V5E, (2, 3), 3, 1, 1),
    ],
)
def test_around_a_part_of_a_slice(
    hardware: Hardware, topology: tuple[int, ...], ranks: int, stride: int, links: float
) -> None:
    here = cluster(sizes(math.prod(topology)), hardware, topology)
    assert here.around(1e9, ranks, stride) == pytest.approx(1e9 / (links * hardware.fast.bandwidth))


def test_what_tensor_and_gather_send_goes_over_their_own_links() -> None:
    """Of v5e:4x8 `tensor` is a line of two, over which an expert group of four lies as every second chip: 2 × 4."""
    c, mesh = config(exchange="gather", vocab_size=264), sizes(4, 1, 4) | {"tensor": 2}
    job, here = make_job(c, mesh, V5E, (4, 8)), cluster(mesh, V5E, (4, 8))
    assert job.tensor_sent == pytest.approx(tensor_bytes(c, mesh, mesh_group(mesh, V5E)) / 50e9)
    traffic = exchange_traffic(c, 32, mesh_group(mesh, V5E))
    flat = here.exchange(traffic.metadata.times(1 / 32), traffic.exchanges)
    assert here.around(1, 4, 2) == pytest.approx(1 / (2 / 2 * 50e9))
    assert job.exchange == pytest.approx(here.around(sum(traffic.padded) / 32, 4, 2) + flat)
    # On GPUs, too: of two machines of four each holds two of a group's ranks, whose tensor ranks share the way out.
    mesh = sizes(expert=4) | {"tensor": 2}
    traffic = exchange_traffic(c, 8, mesh_group(mesh, PLAIN))
    flat = cluster(mesh, PLAIN).exchange(traffic.metadata.times(1 / 8), traffic.exchanges)
    assert make_job(c, mesh, PLAIN).exchange == pytest.approx(sum(traffic.padded) / 8 / (2 * 10) + flat)


def test_a_step() -> None:
    """Two ranks of one machine: 4,096 tokens, 2 layers, fine_grained with experts of 64 → 16 → 64."""
    c = config()
    times = step_time(c, sizes(expert=2), PLAIN)
    # A tile of 128 rows is half empty behind the 512 rows of each expert.
    experts = 4 * (wide(64, 16) + wide(16, 64)) * (512 + 64) / 512
    layer = wide(64, 192) + wide(64, 64) + EXACT_PASSES_OF_FLOAT32["gpu"] * wide(64, 32) + experts
    flops = 6 * 4096 * (2 * layer + wide(64, 257))
    assert times.matmul == pytest.approx(flops / (2 * 5e11 * 0.5))
    # Scores and values of half of the 64 tokens: twice forward, five times backward.
    assert times.attention == pytest.approx(7 * 2 * 4096 * 2 * 64 * 32 / (2 * 5e11 * 0.25))
    # Norms, residuals and rotary embeddings; activations and rows; in float32, thrice; the logits five times.
    passed = 2 * (5 * 64 + 2 * 2 * 64 + 5 * 64 + 4 * (2 * 16 + 7 * 64) + 64)
    assert times.memory == pytest.approx(4 * 2048 * (3 * passed + 5 * 257) / 1e11)
    # A rank sends half of its 2,048 · 4 rows of 64 float32, in 2 exchanges of 2 layers, forward and backward.
    assert times.exchange == pytest.approx(8 * 2 + 8 * 2048 * 4 / 2 * 64 * 4 / 100)
    experts = 2 * 32 * 2 * 64 * 16
    count = counts.parameters(c, sizes(expert=2))
    assert count.parts["experts"] == experts
    # The experts stand on one rank each; the embedding's gradient comes in two.
    assert times.gradients == pytest.approx(4 * (count.total - experts + 257 * 64) / 100)
    assert times.optimizer == pytest.approx(32 * (count.total - experts / 2) / 1e11)
    computing = times.matmul + times.attention + times.memory  # which is shorter than the sums
    assert times.hidden == times.bubble == 0 and times.hidden_sums == pytest.approx(0.85 * computing)
    rest = times.exchange + times.gradients + times.optimizer
    assert times.total == pytest.approx(rest + 0.15 * computing)
    assert times.exchange_share == times.exchange / times.total
    assert times.tokens_per_s == 4096 / times.total
    useful = 6 * 4096 * (2 * (4 * 64**2 + 64 * 32 + 2 * 4 * 64 * 16) + 64 * 257)
    whole, causal = (useful + 6 * 4096 * 2 * 2 * 64 * keys for keys in (64, 32))
    assert times.mfu == pytest.approx(whole / (times.total * 2 * 5e11))
    assert times.mfu_causal == pytest.approx(causal / (times.total * 2 * 5e11))


def test_on_tpu_sums_wait() -> None:
    waiting = step_time(config(), sizes(expert=2), V5E)
    assert waiting.gradients > 0 == waiting.hidden_sums


def test_who_shares_the_experts() -> None:
    """Two groups of two on a machine: the ring of an expert is fast, all four machines' ranks share the rest."""
    count = counts.parameters(config(), sizes(2, 1, 2))
    gradients = step_time(config(), sizes(2, 1, 2), PLAIN).gradients
    dense = count.total - count.parts["experts"] + 257 * 64
    assert gradients == pytest.approx(4 * (2 * 3 / 4 * dense + 2 * 1 / 2 * count.parts["experts"] / 2) / 100)
    assert step_time(config(accumulate=2), sizes(2, 1, 2), PLAIN).gradients == pytest.approx(2 * gradients)


def test_who_shares_what_tensor_splits() -> None:
    """Two groups of two, each rank of which is two tensor ranks: on two machines, and on one of eight."""
    c, mesh = config(vocab_size=264), sizes(2, 1, 2) | {"tensor": 2}
    count = counts.parameters(c, mesh)

    def seconds(c: Config, hardware: Hardware, *shared: int) -> float:
        setting = Setting(c, cluster(mesh, hardware), mesh_group(mesh, hardware), count)
        return sum_seconds(setting, SharedBytes(*shared))

    # All eight have four shares of a machine's 10; every second rank, which holds the same half, two.
    assert seconds(c, PLAIN, 8000, 0, 0) == 2 * 7 / 8 * 8000 / 40
    assert seconds(c, PLAIN, 0, 1000, 0) == 2 * 3 / 4 * (1000 / 2) / 20
    # The tensor ranks of a group's rank hold its experts whole, or a half each: whole ones are summed between them, and
    # then a half between machines.
    assert seconds(c, PLAIN, 0, 0, 600) == 2 * 1 / 2 * (600 / 2) / 100 + 2 * 1 / 2 * (600 / 2 / 2) / 10
    one = replace(PLAIN, machine_ranks=8)
    assert seconds(c, one, 0, 0, 600) == pytest.approx(2 * 3 / 4 * (600 / 2) / 100)
    assert seconds(on_mesh(c, split_experts=True), one, 0, 0, 600) == 2 * 1 / 2 * (600 / 2 / 2) / 100


def traced(c: Config, mesh: tuple[int, ...]) -> list[Any]:
    """The abstract parameters of the model on this mesh."""
    with jax.sharding.use_abstract_mesh(AbstractMesh(mesh, AXES, axis_types=(AxisType.Explicit,) * len(AXES))):
        model = jax.eval_shape(lambda: init_model(c, jax.random.key(0)))
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_what_an_optimizer_moves_and_multiplies() -> None:
    """Of one rank: a parameter is read and written, its gradient read twice, moments and the average both.
    Muon has one moment of a matrix, and five times three products of each."""
    plain = config()
    count = counts.parameters(plain, sizes(expert=1))

    def seconds(**optimizer: Any) -> float:
        changed = replace(plain, optimizer=OptimizerConfig(**optimizer))
        return step_time(changed, sizes(expert=1), PLAIN).optimizer

    assert seconds() == pytest.approx(32 * count.total / 1e11)
    assert seconds(moment_dtype="bfloat16", b2=0.9) == pytest.approx(24 * count.total / 1e11)
    assert seconds(average_decay=0.9) == pytest.approx(40 * count.total / 1e11)
    two_layers = {(64, 64): 2 * 4, (64, 16): 2 * 32, (16, 64): 2 * 32}
    matrices = sum(m * n * number for (m, n), number in two_layers.items())
    products = sum(
        number * 5 * (2 * 2 * min(side) ** 2 * max(side) + 2 * min(side) ** 3) for side, number in two_layers.items()
    )
    moved = 32 * count.total - 8 * matrices
    assert seconds(name="muon") == pytest.approx(moved / 1e11 + products / (5e11 * 0.5))


def test_ranks_share_what_can_be_dealt_out() -> None:
    """Muon deals matrices out by layers and experts: of two layers attention's to two ranks, experts' to four. Three
    data ranks divide neither, and compute alike."""
    plain = replace(config(), optimizer=OptimizerConfig(name="muon"))
    attention, experts = 2 * 4 * 5 * 6 * 64**3, 2 * 32 * 2 * 5 * 2 * 16**2 * (2 * 64 + 16)
    for mesh, expected in (
        (sizes(expert=1), attention + experts),
        (sizes(expert=2), attention / 2 + experts / 2),
        (sizes(expert=2, data=2), attention / 2 + experts / 4),
        (sizes(expert=2, data=3), attention / 2 + experts / 2),
    ):
        assert orthogonal_flops(plain, mesh) == expected
    assert orthogonal_flops(replace(plain, optimizer=OptimizerConfig()), sizes(expert=1)) == 0


@pytest.mark.parametrize(
    ("kind", "ranks", "chips"),
    [("v5p", 4096, 4096), ("v5p", 6144, 6144), ("v5p", 12288, 6144), ("v5p", 8192, 4096), ("v5p", 96, 96),
     ("v5e", 512, 256), ("v5e", 384, 128), ("tpu7x", 4096, 4096)],
)  # fmt: skip
def test_slices_are_as_large_as_they_can_be(kind: str, ranks: int, chips: int) -> None:
    """Ranks of a slice: of tpu7x its cores."""
    here = cluster(sizes(data=ranks // 8, expert=8), load_hardware(kind))
    assert here.slice is not None and here.slice.chips == chips


def test_cores_are_ranks_of_a_slice() -> None:
    """24 of tpu7x, whose experts are over all of them."""
    here = cluster(sizes(expert=24), load_hardware("tpu7x"))
    assert here.slice is not None and here.slice.chips == 24


def test_no_slice_is_larger_than_the_largest() -> None:
    with pytest.raises(ConfigError, match="topology=16x24x48 must have at most the 9216 chips of a slice"):
        cluster(sizes(data=2 * 16 * 24 * 48), load_hardware("tpu7x"), (16, 24, 48))


def test_rings_of_a_group() -> None:
    """Axes that are neighbours are one ring; those apart are a ring each."""
    mesh = {"replica": 1, "data": 8, "node": 1, "expert": 4, "tensor": 2}
    found = {axes: _rings(axes.split(), mesh) for axes in ("data", "data tensor", "data expert", "expert tensor", "")}
    assert found == {
        "data": [(8, 8)], "data tensor": [(2, 1), (8, 8)], "data expert": [(32, 2)], "expert tensor": [(8, 1)], "": [],
    }  # fmt: skip


@pytest.mark.parametrize("structure", ["dense", "vanilla", "fine_grained", "bigmac"])
def test_parameters_of_a_rank_are_what_the_sharded_model_gives_it(structure: str) -> None:
    """Counted from what parameters declare, which knows of no mesh."""
    c = config(structure=structure, vocab_size=264, positions="learned", use_bias=True, num_shared_experts=1)
    for fsdp, split_experts, mesh in (
        (False, False, (1, 2, 1, 2, 1)),
        (True, False, (1, 2, 2, 1, 2)),
        (True, False, (2, 2, 1, 1, 2)),  # whose replicas hold as much as one of them alone
        (True, True, (1, 4, 1, 2, 1)),
        (False, True, (1, 2, 1, 2, 2)),
    ):
        here = on_mesh(c, fsdp=fsdp, split_experts=split_experts)
        leaves, count = traced(here, mesh), counts.parameters(here, dict(zip(AXES, mesh, strict=True)))
        assert count.total == sum(leaf.size for leaf in leaves) == sum(count.parts.values())
        assert count.of_a_rank == sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def test_replicas() -> None:
    """Two of four ranks, each a machine: a rank sends half of its shards twice, on its own share of the slow link; what
    is summed inside crosses no machine."""
    mesh = {"replica": 2, "data": 2, "node": 1, "expert": 2, "tensor": 1}
    c = replace(config(), mesh=MeshConfig(2, 1, 2, fsdp=True, replica=2))
    count = counts.parameters(c, mesh)
    assert count.of_a_rank == count.shards_of_a_rank == count.updated_of_a_rank and not count.scattered_of_a_rank
    assert replica_bytes(c, mesh) == 4 * count.of_a_rank
    assert step_time(c, mesh, PLAIN).replicas == 4 * count.of_a_rank / 10
    one = {**mesh, "replica": 1}
    for term in ("gradients", "parameters"):
        assert getattr(step_time(c, mesh, PLAIN), term) == getattr(step_time(c, one, PLAIN), term)
    # Without fsdp shards are as small, so that no two ranks of a replica send the same.
    whole = replace(c, mesh=replace(c.mesh, fsdp=False))
    assert replica_bytes(whole, mesh) == 4 * counts.parameters(whole, mesh).shards_of_a_rank
    small = counts.parameters(c, mesh).parts["norms"]
    assert replica_bytes(whole, mesh) <= 4 * ((count.total - small) / 4 + small + 4)
    # In two bytes half; where the optimizer's state is split, scattered gradients and float32 parameters.
    half = replace(c, execution=replace(c.execution, reduce_dtype="bfloat16"))
    assert replica_bytes(half, mesh) == 2 * count.of_a_rank
    split = replace(half, mesh=replace(half.mesh, replica_optimizer="sharded"))
    of_split = counts.parameters(split, mesh)
    assert of_split.scattered_of_a_rank == count.of_a_rank - small
    assert of_split.updated_of_a_rank == small + (count.of_a_rank - small) / 2
    assert of_split.moments_of_a_rank == 2 * of_split.updated_of_a_rank
    assert replica_bytes(split, mesh) == (2 + 4) / 2 * of_split.scattered_of_a_rank + 2 * small


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_in_half_precision(tied: bool) -> None:
    """Gathered in two bytes; summed in four, or with reduce_dtype in two. A table is read and written with."""
    c = config(structure="bigmac", dtype="bfloat16", tie_embeddings=tied, positions="learned", num_shared_experts=1)
    count = counts.parameters(c, sizes(expert=2))
    table, length = 257 * 64, 64 * 64
    assert count.parts["embedding"] == (table if tied else 2 * table) + length
    rest = count.parts["shared"] + count.parts["projections"] + count.parts["router"] + length
    split, experts = count.parts["attention"] + 2 * table, count.parts["experts"]
    assert gradient_bytes(c, count) == (4 * (rest + count.parts["norms"]), 4 * split, 4 * experts)
    assert parameter_bytes(c, count) == (2 * rest, 2 * split, 2 * experts)
    half = replace(c, execution=replace(c.execution, reduce_dtype="bfloat16", gather_dtype="float32"))
    assert gradient_bytes(half, count) == (2 * (rest + count.parts["norms"]), 2 * split, 2 * experts)
    assert parameter_bytes(half, count) == (2 * rest, 2 * split, 2 * experts)  # a wider gather gives the same numbers


def test_what_declares_tensor_is_split_over_it() -> None:
    """Mamba's matrices and vectors, attention but for the bias behind it, tables, and no more."""
    c = config(blocks="M*E", mamba_heads=4, mamba_head_dim=8, mamba_groups=2, mamba_state=8, use_bias=True)
    count = counts.parameters(c, sizes())
    split = count.parts["mamba"] + count.parts["attention"] - 2 * 64 + 2 * 257 * 64
    assert gradient_bytes(c, count).tensor == 4 * split
    assert sum(gradient_bytes(c, count)) == 4 * (count.total + 257 * 64)  # of the tied table both


def on_mesh(c: Config, **mesh: Any) -> Config:
    return replace(c, mesh=MeshConfig(data=1, **mesh))


def test_full_sharding() -> None:
    """Sums that stay scattered, and two gathers: three times half of what a sum that all have takes, but for norms."""
    mesh, plain = sizes(2, 1, 4), step_time(config(), sizes(2, 1, 4), PLAIN)
    sharded = step_time(on_mesh(config(), fsdp=True), mesh, PLAIN)
    norms = 4 * counts.parameters(config(), mesh).parts["norms"]
    assert sharded.gradients == pytest.approx(plain.gradients / 2)
    assert sharded.parameters == pytest.approx(plain.gradients - norms * 2 * 7 / 8 / 40)
    assert plain.parameters == 0 and sharded.total < plain.total + sharded.parameters
    rest = counts.parameters(on_mesh(config(), fsdp=True), mesh)
    assert rest.total / 8 < rest.of_a_rank < rest.total / 8 + rest.parts["norms"] + 1
    assert sharded.optimizer == pytest.approx(32 * rest.of_a_rank / 1e11)


def test_a_sequence_over_tensor() -> None:
    """Each of two ranks has 2,048 of the tokens, 64 wide: of two layers' attention four moves to the other; of the
    embedding and the loss two each, and ids."""
    mesh = sizes() | {"tensor": 2}
    moved = 4 * 2 * 2048 * 64 * 4
    tables = 4 * 2048 * 64 * 4 + 2 * 2048 * 4

    def layers(c: Config) -> float:
        return step_time(c, mesh, PLAIN).tensor - tables / 100

    assert (
        layers(config(vocab_size=264)) == moved / 100 and step_time(config(vocab_size=264), sizes(), PLAIN).tensor == 0
    )
    assert layers(config(vocab_size=264, structure="dense")) == 2 * moved / 100
    # Experts that are split take all rows of both, 4 a token.
    assert layers(on_mesh(config(vocab_size=264), split_experts=True)) == (1 + 4) * moved / 100
    assert layers(config(vocab_size=264, remat="layer")) == 1.5 * moved / 100


def test_experts_over_tensor_take_the_rows_of_the_exchange_that_the_machine_has() -> None:
    """`auto` of a config that takes `ragged` elsewhere takes `gather` on v5e, which has none."""
    mesh, sent = sizes(expert=8) | {"tensor": 2}, {}
    for name in ("auto", "gather", "ragged"):
        c = config(exchange=name, vocab_size=264, num_experts=64, top_k=8, capacity_factor=math.inf)
        sent[name] = make_job(on_mesh(c, expert=8, tensor=2, split_experts=True), mesh, V5E).tensor_sent
    assert sent["auto"] == sent["gather"] < sent["ragged"]


def test_tensor_ranks_leave_less_of_a_machine_to_an_expert_group() -> None:
    """Two of the four ranks of a machine are of one group of four: half of its peers are across."""
    one, two = (cluster(sizes(expert=4) | {"tensor": t}, PLAIN) for t in (1, 2))
    assert one.by_link(Sent(3, 0)) == Sent(3, 0) and two.by_link(Sent(3, 0)) == Sent(1, 2)
    # Eight that share a sequence fill two machines, and leave no peer on either.
    mesh = sizes(expert=4) | {"tensor": 8}
    assert cluster(mesh, PLAIN).by_link(Sent(3, 0)) == Sent(0, 3)
    assert physical_group(mesh, PLAIN).sizes == (4, 1)


def test_work_that_is_done_twice() -> None:
    assert recomputed(config()) == {}
    layer = recomputed(config(remat="layer"))
    assert "output" not in layer and set(layer.values()) == {1.0}
    # What the experts gave is kept: of their two matrices one is multiplied again, of three two; no W↑ follows.
    kept = recomputed(config(remat="exchange", gated=False))
    assert kept["experts"] == 1 / 2 and recomputed(config(remat="exchange", gated=True))["experts"] == 2 / 3
    assert kept["projections"] == 0 and kept["attention"] == 1
    plain = step_time(config(), sizes(expert=2), PLAIN)
    again = step_time(config(remat="layer"), sizes(expert=2), PLAIN)
    logits = 6 * 4096 * wide(64, 257) / (2 * 5e11 * 0.5)
    assert again.matmul - logits == pytest.approx(4 / 3 * (plain.matmul - logits))
    assert again.attention == pytest.approx(4.5 / 3.5 * plain.attention)
    # A first pass counts the loads of all parts, which takes no logits.
    jobs = [make_job(config(2, balance_scope=scope), sizes(expert=2), PLAIN) for scope in ("step", "part")]
    assert [(job.forward_passes, job.parts) for job in jobs] == [(2, 2), (1, 2)]


@pytest.mark.parametrize("model", [{}, {"router": "hyper"}, {"blocks": "M*E", "mamba_heads": 4, "mamba_head_dim": 8}])
def test_useful_flops_are_those_of_the_counts(model: dict[str, Any]) -> None:
    """And of metrics.jsonl, which takes its MFU from them, whatever the model."""
    c = config(**model)
    times = step_time(c, sizes(expert=2), PLAIN)
    for at_peak, causal in ((times.at_peak, False), (times.at_peak_causal, True)):
        assert at_peak == sum(counts.flops(c, causal).values()) / (2 * 5e11)


def test_padded_rows_are_multiplied() -> None:
    for factor, name, more in ((1.25, "all_to_all", 1.25), (1.25, "dedup", 1), (math.inf, "all_to_all", 1)):
        job = make_job(config(capacity_factor=factor, exchange=name), sizes(expert=2), PLAIN)
        assert job.padding == pytest.approx(more)


def test_overlap() -> None:
    """Three of four chunks run beside the experts, or the experts beside them, whichever is shorter."""
    quick = replace(PLAIN, fast=Link(1e12, 1e-12))
    c = config(overlap_chunks=4)
    times = step_time(c, sizes(expert=2), quick)
    assert times.hidden == pytest.approx(3 / 4 * times.exchange) and times.hidden > 0
    # Of an expert's 128 rows of a chunk comes a tile that is half empty.
    rows = 4 * 16 * (128 + 64)  # four chunks of a rank's 16 experts
    experts = 6 * 2 * rows * (wide(64, 16) + wide(16, 64)) / (5e11 * 0.5)
    slow = step_time(c, sizes(expert=2), PLAIN)
    assert slow.hidden == pytest.approx(3 / 4 * experts)
    third = replace(PLAIN, hidden_share=1 / 3)
    assert step_time(c, sizes(expert=2), third).hidden == pytest.approx(experts / 4)
    assert step_time(c, sizes(expert=2), replace(quick, overlaps=False)).hidden == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_twice_the_bandwidth(name: str) -> None:
    def exchange(fast: float, slow: float) -> float:
        hardware = replace(PLAIN, fast=Link(fast, 1e-300), slow=Link(slow, 1e-300))
        return step_time(config(exchange=name), sizes(node=2, expert=4), hardware).exchange

    assert exchange(200, 20) == pytest.approx(exchange(100, 10) / 2)
    assert exchange(1e12, 20) < exchange(1e12, 10)


def test_bigmac_sends_a_quarter() -> None:
    free = replace(PLAIN, fast=Link(100, 1e-300), slow=Link(10, 1e-300))
    fine, bigmac = (step_time(config(structure=s), sizes(expert=8), free) for s in ("fine_grained", "bigmac"))
    assert bigmac.exchange == pytest.approx(fine.exchange / 4)
    assert bigmac.matmul > fine.matmul


def test_gather_goes_around() -> None:
    """float32: all rows to the next rank, 7 times, out of each machine once for its four ranks; the gates directly."""
    c, mesh = config(exchange="gather"), sizes(expert=8)
    here, traffic = cluster(mesh, PLAIN), exchange_traffic(c, 8, mesh_group(mesh, PLAIN))
    rows = 8 * 7 * 512 * 64 * 4
    assert sum(traffic.padded) == 8 * rows
    expected = rows / 40 + here.exchange(traffic.metadata.times(1 / 8), 8)
    assert step_time(c, mesh, PLAIN).exchange == pytest.approx(expected)
    small = step_time(replace(c, execution=replace(c.execution, wire_dtype="bfloat16")), mesh, PLAIN).exchange
    half = rows / 2 / 2
    assert small == pytest.approx(half / 40 + here.exchange(Sent(half, 0).plus(traffic.metadata.times(1 / 8)), 8))


def test_a_hierarchical_step() -> None:
    c, mesh = config(exchange="hierarchical"), sizes(node=2, expert=4)
    traffic = exchange_traffic(c, 8, mesh_group(mesh, PLAIN))
    sent = traffic.padded.plus(traffic.metadata).times(1 / 8)
    inside, between = 8 * 3 * 2 + sent.fast / 100, 8 * 3 + sent.slow / 10
    assert step_time(c, mesh, PLAIN).exchange == pytest.approx(inside + between)


def test_nothing_is_sent() -> None:
    assert step_time(config(), sizes(), PLAIN).exchange == 0
    assert step_time(config(structure="dense"), sizes(8), PLAIN).exchange == 0


@pytest.mark.parametrize(
    ("mesh", "hardware", "topology", "message"),
    [
        (sizes(expert=8), PLAIN, (2, 4), "topology=2x4 is of a TPU, not of plain; leave it out"),
        (sizes(expert=8), V5E, (2, 2, 2), "topology=2x2x2 must have at most 2 axes, each at least 1"),
        (sizes(expert=8), V5E, (0, 2), "topology=0x2 must have at most 2 axes, each at least 1"),
        (sizes(8, expert=128), V5E, (32, 32), "topology=32x32 must have at most the 256 chips of a slice"),
        (sizes(expert=8), V5E, (4, 4), "the 8 ranks must be a multiple of the 16 chips of topology=4x4"),
        (sizes(2, 1, 6), V5E, (4, 3), "mesh.node × mesh.expert = 6 ranks must make a block of topology=4x3"),
        (sizes(2, 1, 6), V5E, (2, 2), "mesh.node × mesh.expert = 6 ranks must make a block of topology=2x2"),
        (
            sizes(2, 1, 3) | {"tensor": 2},
            V5E,
            (4, 3),
            "mesh.node × mesh.expert × mesh.tensor = 6 ranks must make a block of topology=4x3",
        ),
        (
            sizes(expert=8),
            load_hardware("tpu7x"),
            (2, 2, 2),
            "the 8 ranks must be a multiple of the 16 cores of topology=2x2x2",
        ),
    ],
)
def test_what_does_not_fit(mesh: dict[str, int], hardware: Hardware, topology: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        cluster(mesh, hardware, topology)


def test_moments_that_fill_no_lanes_stay_on_a_tpu() -> None:
    """Those of w_in of experts 192 wide, of which a tensor rank has 96 columns; and always those of the router's
    matrix, which has four, and of vectors."""
    whole, split = (
        Config(
            model=ModelConfig(num_layers=2, hidden_size=256, num_heads=2, vocab_size=512, num_experts=4, top_k=2,
                              num_shared_experts=0, expert_hidden_size=width, structure="fine_grained", norm="rmsnorm"),
            mesh=MeshConfig(tensor=2, split_experts=True, fsdp=False),
            execution=ExecutionConfig(offload_optimizer=True),
        )
        for width in (256, 192)
    )  # fmt: skip
    ranks, stay = {"tensor": 2}, []
    for config in (whole, split):
        count = counts.parameters(config, ranks)
        of_tpu, of_gpu = (host_memory(config, 2, count, platform)["optimizer"] for platform in ("tpu", "gpu"))
        assert of_gpu == 4 * count.moments_of_a_rank
        stay.append(state_memory(config, count, 1, "tpu")["optimizer"])
        assert stay[-1] == of_gpu - of_tpu
    norms = 2 * (2 * 256 + 2 * 128) + 256  # of two layers' branches and their heads, and the last one
    assert stay == [8 * (2 * 256 * 4 + norms), 8 * (2 * 256 * 4 + norms + 2 * 4 * 256 * 96)]


def test_copies_to_host_memory() -> None:
    """Nothing hides those of moments; of what enters layers what takes longer than the layers do is waited for."""
    slow, fast = (replace(PLAIN, host_bandwidth=rate) for rate in (1.0, 1e30))
    ranks, parts = sizes(expert=2), 2
    layer = config(parts, remat="layer")
    base = step_time(layer, ranks, PLAIN)
    count = counts.parameters(layer, ranks)
    moments = config(parts, remat="layer", offload_optimizer=True)
    copied = 4 * count.moments_of_a_rank
    assert host_memory(moments, 2, count, "gpu") == {"optimizer": copied, "activations": 0}
    found = step_time(moments, ranks, slow)
    passes = 2 * copied / PLAIN.memory_bandwidth
    assert found.host == pytest.approx(2 * copied + passes)
    assert found.total - base.total == pytest.approx(found.host)
    assert step_time(moments, ranks, fast).host == pytest.approx(passes)

    entered = config(parts, remat="offload")
    data, m = entered.data, entered.model
    tokens = data.batch_size * data.sequence_length // 2
    at_a_time = tokens // parts * m.num_layers * m.hidden_size * entered.execution.dtype_bytes
    assert host_memory(entered, 2, count, "gpu") == {"optimizer": 0, "activations": at_a_time}
    passes = 2 * parts * at_a_time / PLAIN.memory_bandwidth
    waits = 2 * parts * at_a_time - base.computing
    assert step_time(entered, ranks, slow).host == pytest.approx(waits + passes)
    assert step_time(entered, ranks, fast).host == pytest.approx(passes)
    with pytest.raises(ConfigError, match=r"has no host_bandwidth; add it, as in h100\.toml"):
        step_time(entered, ranks, replace(PLAIN, host_bandwidth=None))


@pytest.mark.parametrize("remat", ["none", "layer", "exchange"])
@pytest.mark.parametrize("gate", [False, True])
def test_products_outside_of_kernels(remat: str, gate: bool) -> None:
    """By hand, a layer of Mamba and experts and one of attention and experts, two of each; a chunk's scores both
    halves. Of what runs again the last product of a layer, which is only added, does not."""
    made = config(
        structure="bigmac", blocks="ME*E", capacity_factor=math.inf, num_shared_experts=1, shared_expert_hidden_size=24,
        activation="relu2", down_ratio=0.25, mamba_heads=4, mamba_head_dim=4, mamba_groups=2, mamba_state=6,
        mamba_chunk=16, remat=remat, latent_norm="gate" if gate else "none",
    )  # fmt: skip
    mamba, attention = 2 * 64 * (2 * 16 + 2 * 12 + 4) + 2 * 16 * 64, 2 * 64 * (3 * 64) + 2 * 64 * 64
    router, shared, projections, output = 4 * 64 * 32, 4 * 2 * 64 * 24, 4 * 2 * 64 * 16, 64 * 257
    scan = 2 * (2 * 16 * (12 + 16) + 4 * 16 * 6)
    again = mamba + attention + router + shared - 4 * 24 * 64
    if gate:  # which has a skip from W↓'s result, too
        projections += 4 * 64 * 64
        again += projections
    elif remat == "layer":
        again += 4 * 64 * 16
    if remat == "none":
        again = 0
    once = mamba + attention + router + shared + projections + output
    tokens = 64 * 64
    expected = tokens * (2 * (3 * once + again) + scan * (3 if remat == "none" else 4))
    assert flops_outside_kernels(made, "tpu") == expected
    assert flops_outside_kernels(made, "gpu") == expected
    halves = replace(made, execution=replace(made.execution, dtype="bfloat16"))
    pieces = tokens * 2 * 2 * router * (3 if remat == "none" else 4)
    assert flops_outside_kernels(halves, "gpu") == expected + pieces
