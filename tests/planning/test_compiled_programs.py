"""Counts against the compiled training step: bytes of every exchange, FLOPs, and what a plan says of a program."""

import dataclasses
import itertools
import json
import pathlib
from types import SimpleNamespace
from typing import Any, get_args

import jax
import pytest
from model.tools import some, tiny

from bigmac_jax.config import Config, ConfigError, OptimizerConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.config.model import LatentNorm
from bigmac_jax.model.counts import flops, forward_passes, parameters, passes_to_logits
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.exchange.wire import PAYLOAD, Wire
from bigmac_jax.model.memory import rank_memory
from bigmac_jax.model.mesh import ExpertGroup
from bigmac_jax.model.traffic import exchange_traffic, tensor_bytes
from bigmac_jax.planning import compiled_programs, hlo, topologies
from bigmac_jax.planning.cost import recomputed

MESHES = {"1x4": (1, 1, 4), "2x4": (2, 1, 4), "1x8": (1, 1, 8), "two machines": (1, 2, 4)}


def config(mesh: tuple[int, int, int], exchange: str, parts: int = 1, **model: Any) -> Config:
    made = tiny(mesh, exchange=exchange, batch=16, **({"capacity_factor": 1.25} | model))
    return dataclasses.replace(made, train=TrainConfig(accumulate_steps=parts))


def compiled(config: Config) -> dict[str, Any]:
    target = compiled_programs.Target(jax.devices("cpu")[: config.mesh.data * config.mesh.model_ranks])
    return compiled_programs.describe_programs(config, target, ("step",))["step"]


def devices(number: int) -> compiled_programs.Target:
    return compiled_programs.Target([None] * number)


def field_to_change(config: Config, ranks: int) -> str:
    return compiled_programs._field_to_change(config, devices(ranks), "step")


def counted(config: Config) -> tuple[int, int]:
    """(payload, metadata) bytes of a step, as the formulas have them."""
    mesh = config.mesh
    group = ExpertGroup((mesh.node, mesh.expert), "cpu", "cpu")
    traffic = exchange_traffic(config, mesh.data * mesh.expert_ranks, group)
    return round(sum(traffic.padded)), round(sum(traffic.metadata))


# Every strategy on every mesh, with both structures; `make test` takes some. Without ragged, which CPU emulates by
# gathers, so that its program sends more than is counted.
NAMES = [name for name in STRATEGIES if name != "ragged"]
QUICK = {(name, ("1x4", "1x8")[i % 2], ("fine_grained", "bigmac")[i % 2]) for i, name in enumerate(NAMES) if i % 2 == 0}
PRODUCT = [
    pytest.param(*case, marks=() if (name, mesh, structure) in QUICK else pytest.mark.full)
    for name, mesh, structure in itertools.product(NAMES, ("1x4", "2x4", "1x8"), ("fine_grained", "bigmac"))
    for case in [(name, mesh, {"structure": structure}, 1)]
]
CASES: list[tuple[Any, ...]] = [
    # The rows that come back are not asked for again.
    ("dedup", "2x4", {"remat": "layer", "structure": "fine_grained"}, 1),
    ("all_to_all", "2x4", {"capacity_factor": float("inf"), "wire_dtype": "int8"}, 1),
    ("gather", "2x4", {"remat": "layer", "wire_dtype": "bfloat16"}, 1),
    ("all_to_all", "2x4", {"capacity_factor": float("inf"), "buffer_factor": "auto", "remat": "layer"}, 1),
    ("hierarchical", "two machines", {"capacity_factor": float("inf"), "overlap_chunks": 2}, 1),
    ("all_to_all", "2x4", {"balance_scope": "part", "remat": "layer"}, 2),
    ("hierarchical", "2x4", {"wire_dtype": "bfloat16", "wire_dtype_backward": "float32"}, 1),
    ("dedup", "1x4", {"remat": "layer"}, 2),
]
FULL = [pytest.param(*case, marks=pytest.mark.full) for case in CASES]


@pytest.mark.parametrize(("exchange", "mesh", "model", "parts"), [*PRODUCT, *FULL])
def test_exchange_bytes_are_the_counted_ones(exchange: str, mesh: str, model: dict[str, Any], parts: int) -> None:
    made = config(MESHES[mesh], exchange, parts, **model)
    found = compiled(made)
    assert (found["exchange_sent_bytes"], found["metadata_sent_bytes"]) == counted(made)
    assert found["exchange_sent_bytes"] > 0


@pytest.mark.parametrize("exchange", STRATEGIES)
def test_bigmac_sends_r_times_the_payload(exchange: str) -> None:
    """By the counts, which are the program's."""
    bigmac, fine = (counted(config(MESHES["1x4"], exchange, structure=s)) for s in ("bigmac", "fine_grained"))
    assert (4 * bigmac[0], bigmac[1]) == fine


@pytest.mark.full
def test_an_extra_collective_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = Wire._swap

    def twice(self: Wire, x_SC: jax.Array, where: Any) -> jax.Array:
        return swap(self, swap(self, swap(self, x_SC, where), where), where)

    made = config(MESHES["1x4"], "all_to_all")
    monkeypatch.setattr(Wire, "_swap", twice)
    assert compiled(made)["exchange_sent_bytes"] > counted(made)[0]


@pytest.mark.parametrize(
    ("mesh", "model"),
    some(
        [
            ((2, 1, 2, 2), {}),
            ((1, 1, 2, 4, False, True), {}),
            ((1, 1, 2, 2, False, True), {"structure": "fine_grained", "remat": "layer", "capacity_factor": 1.25}),
            ((2, 1, 1, 4), {"structure": "dense", "remat": "layer"}),
            ((2, 1, 1, 4), {"structure": "dense"}),
            ((1, 1, 2, 2, False, True), {"exchange": "dedup", "remat": "layer", "structure": "fine_grained"}),
            # Alone, a rank gathers its tokens' rows, or the room of the experts' rows.
            ((1, 1, 1, 2, False, True), {"capacity_factor": float("inf")}),
            ((1, 1, 1, 2, False, True), {"capacity_factor": 1.25}),
        ],
        every=8,
    ),
)
def test_bytes_over_tensor_are_the_counted_ones(mesh: tuple[Any, ...], model: dict[str, Any]) -> None:
    made = tiny(mesh, **({"capacity_factor": 1.0} | model))
    found = [r for r in compiled(made)["collectives"] if r["axes"] == ("tensor",) and r["kind"] != "all-reduce"]
    rows = [r for r in found if r["role"] == "other"]
    sizes = {"data": made.mesh.data, "node": made.mesh.node, "expert": made.mesh.expert, "tensor": made.mesh.tensor}
    counted = tensor_bytes(made, sizes, ExpertGroup((1, made.mesh.expert), "cpu", "cpu"))
    sent = sum(r["sent_bytes"] for r in rows)
    # Where rows do not stand by expert, their gates and experts are gathered as well.
    by_expert = made.execution.exchange == "all_to_all" and not made.dropless
    assert (sent == counted) if by_expert or not made.model.is_moe else (counted < sent < 1.5 * counted)


@pytest.mark.full
def test_dpos_reference_exchanges_too() -> None:
    made = tiny((1, 1, 2), capacity_factor=float("inf"), num_layers=1)
    tuning = TuningConfig(objective="dpo", lora_rank=2, lora_targets="attention")
    made = dataclasses.replace(made, train=TrainConfig(init_from="x"), tuning=tuning)
    assert (forward_passes(made), passes_to_logits(made)) == (2, 2)
    found = compiled(made)
    assert (found["exchange_sent_bytes"], found["metadata_sent_bytes"]) == counted(made)


def test_what_to_change_counts_the_sequences_of_a_rank() -> None:
    """Two with tensor=2, so halves; of one, no halves, but full sharding."""
    made = tiny((1, 1, 2, 2), batch=4, remat="layer")
    assert field_to_change(made, 4) == "--config.train.accumulate_steps=2"
    assert field_to_change(tiny((1, 1, 2, 2), batch=2, remat="layer"), 4) == "--config.mesh.fsdp=True"
    sharded = tiny((1, 1, 2, 2, True), batch=2, remat="layer")
    assert field_to_change(sharded, 4) == "--config.execution.offload_optimizer=True"
    offloaded = dataclasses.replace(sharded.execution, offload_optimizer=True)
    assert "smaller model" in field_to_change(dataclasses.replace(sharded, execution=offloaded), 4)


def test_scopes_name_the_payload() -> None:
    """Nothing of the exchange is counted under another name: all other collectives are sums of gradients or scalars."""
    found = compiled(config(MESHES["1x4"], "all_to_all"))
    assert {row["kind"] for row in found["collectives"] if row["role"] == "other"} == {"all-reduce"}
    assert (
        PAYLOAD in compiled_programs.compile_program(config(MESHES["1x4"], "all_to_all"), jax.devices("cpu")[:4]).text
    )


@pytest.mark.parametrize(("structure",), some([("bigmac",), ("fine_grained",), ("dense",)], every=3))
def test_flops_are_the_programs(structure: str) -> None:
    """Remat off, capacity factor 1, attention without the mask's discount."""
    head_dim = 6 if structure == "dense" else 0  # not the share of the width that a head has by default
    made = tiny(
        (1, 1, 4), structure=structure, capacity_factor=1.0, num_experts=8, top_k=2, attention="xla", head_dim=head_dim
    )
    found = compiled(made)
    assert found["flops_per_step"] == sum(flops(made).values())


RECOMPUTED = [*(("bigmac", norm) for norm in get_args(LatentNorm)), ("fine_grained", "skip"), ("fine_grained", "gate")]


@pytest.mark.parametrize(
    ("structure", "norm"),
    [case if case == ("bigmac", "gate") else pytest.param(*case, marks=pytest.mark.full) for case in RECOMPUTED],
)
def test_flops_of_what_is_recomputed(structure: str, norm: str) -> None:
    """Where all is recomputed but what was exchanged, it depends on the norm which products a gradient needs again."""
    made = tiny((1, 1, 4), structure=structure, latent_norm=norm, capacity_factor=1.0, num_experts=8, top_k=2,
                attention="xla", remat="exchange")  # fmt: skip
    found = compiled(made)["flops_per_step"]
    again = recomputed(made)
    assert found == sum(count * (3 + again.get(part, 0)) / 3 for part, count in flops(made).items())


def test_parameters_are_the_models() -> None:
    made = tiny((1, 1, 4), balance="bias", num_shared_experts=1, latent_norm="pre_dispatch", positions="learned")
    count = parameters(made, {"data": 1, "node": 1, "expert": 4})
    experts = 2 * 8 * 4 * 16 * 2
    assert count.parts["experts"] == experts and count.parts["projections"] == 2 * 2 * 16 * 4
    assert count.parts["shared"] == 2 * 2 * 16 * 4 and count.parts["router"] == 2 * 16 * 8
    assert count.parts["attention"] == 2 * 4 * 16 * 16 and count.parts["embedding"] == (264 + 8) * 16
    assert count.active == count.total - experts * 5 // 8
    assert count.of_a_rank == count.total - experts * 3 // 4
    assert sum(count.parts.values()) == count.total
    gated = dataclasses.replace(made, model=dataclasses.replace(made.model, latent_norm="gate"))
    assert parameters(gated, {"expert": 4}).parts["projections"] == 2 * (2 * 16 * 4 + 16 * 16)


@pytest.mark.full
def test_first_dense_layers_are_counted() -> None:
    """By hand, and as the compiled step has them."""
    made = tiny((1, 1, 4), num_layers=3, first_dense_layers=1, dense_hidden_size=24, capacity_factor=1.0, num_experts=8,
                top_k=2, attention="xla")  # fmt: skip
    assert parameters(made, {"expert": 4}).parts["mlp"] == 2 * 16 * 24
    assert flops(made)["mlp"] == 6 * 64 * 2 * 16 * 24 and flops(made)["router"] == 2 * 6 * 64 * 16 * 8
    assert compiled(made)["flops_per_step"] == sum(flops(made).values())


def test_what_the_optimizer_keeps() -> None:
    """Muon one moment of a matrix, AdamW two of all else, four bytes each, or two; an average as much as parameters."""
    made = tiny((1, 1, 4))
    count, group = parameters(made, {"expert": 4}), ExpertGroup((1, 4), "cpu", "")

    def kept(**optimizer: object) -> int:
        config = dataclasses.replace(made, optimizer=OptimizerConfig(**optimizer))
        return rank_memory(config, 4, group, parameters(config, {"expert": 4}))["optimizer"]

    rank = count.of_a_rank
    others = count.parts["embedding"] + count.parts["router"] + count.parts["norms"]
    assert kept() == 8 * rank and kept(moment_dtype="bfloat16") == 4 * rank
    assert kept(name="muon") == 4 * rank + 4 * others
    assert kept(average_decay=0.9) == 12 * rank


@pytest.mark.full
def test_a_rank_keeps_its_own_chunk() -> None:
    """The compiled buffers hold it; what is sent, and the paper's formula, do not."""
    found = compiled(config(MESHES["1x4"], "all_to_all"))
    assert found["exchange_buffer_bytes"] * 3 == found["exchange_sent_bytes"] * 4


def test_topologies() -> None:
    assert topologies.parse_topology("v5p:2x4x4") == ("v5p:2x4x4", "v5p", (2, 4, 4), 1)
    assert topologies.parse_topology("tpu7x:2x2x2").torus == (2, 2, 2)
    assert topologies.parse_topology("v6e:4x8", slices=2).chips == 64
    with pytest.raises(ConfigError, match=r"--slices=2 is of TPUs; .* use --topology=gb200:4x72"):
        topologies.parse_topology("gb200:2x72", slices=2)
    for name, part in {"v7:4x8": "v5e, v5p, v6e", "v5e": "v5e:4x8", "v5e:4x8x2": "2 sizes", "v5p:4x8": "3 sizes",
                       "tpu7x:4x8": "3 sizes, as in --topology=tpu7x:2x4x4",
                       "v6e:0x8": "2 sizes", "v6e:4x": "2 sizes", "": "one of"}.items():  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            topologies.parse_topology(name)


def test_hosts_of_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As jax's compiler is asked for them: slices × hosts × GPUs, and the GPU's own file."""
    from jax.experimental import topologies as of_jax

    asked: list[dict[str, str]] = []

    def described(**given: str) -> Any:
        asked.append(given)
        return SimpleNamespace(devices=("gpu 0", "gpu 1"))

    monkeypatch.setattr(of_jax, "get_topology_desc", described)
    assert topologies._gpus(topologies.parse_topology("h200:4x8")) == ["gpu 0", "gpu 1"]
    files = pathlib.Path(topologies.__file__).parent / "hardware"
    target = (files / "h200.textproto").read_text()
    assert asked == [{"platform": "cuda", "target_config": target, "topology": "1x4x8"}]
    assert target != (files / "h100.textproto").read_text()

    def refused(**_: str) -> None:
        raise RuntimeError("no such GPU\nand more of it")

    monkeypatch.setattr(of_jax, "get_topology_desc", refused)
    with pytest.raises(ConfigError, match=r"^--topology=h100:1x8 is refused by XLA: no such GPU$"):
        topologies._gpus(topologies.parse_topology("h100:1x8"))


def test_simulated_devices_stand_for_accelerators() -> None:
    made = compiled_programs.imitate_accelerators(load_config("configs/tiny.py"))
    assert (made.execution.attention, made.execution.unroll_layers) == ("xla", 1)
    chosen = load_config("configs/tiny.py", ("execution.attention=blocks", "execution.unroll_layers=3"))
    assert compiled_programs.imitate_accelerators(chosen) == chosen


@pytest.mark.full
def test_memory_holds_what_layers_keep() -> None:
    """The hidden layers of the experts alone, of four times the tokens."""
    made = config(MESHES["1x4"], "all_to_all")
    four = dataclasses.replace(made, data=dataclasses.replace(made.data, batch_size=4 * made.data.batch_size))
    small, large = (compiled(c)["memory"]["temporaries"] for c in (made, four))
    m, tokens = made.model, 3 * made.data.batch_size * made.data.sequence_length // 4
    assert large - small > 4 * m.num_layers * tokens * m.choices * m.expert_width


@pytest.mark.full
def test_a_description_is_json() -> None:
    assert json.loads(json.dumps(compiled(config(MESHES["1x4"], "dedup"))))["memory"]["total"] > 0


@pytest.mark.full
def test_advice_names_a_field_and_the_largest_arrays() -> None:
    made = config(MESHES["1x4"], "all_to_all")
    module = hlo.parse(compiled_programs.compile_program(made, jax.devices("cpu")[:4]).text)
    advice = compiled_programs._advise(made, devices(4), "step", module)
    assert advice["change"] == "--config.execution.remat=layer"
    assert advice["largest"][0]["bytes"] >= advice["largest"][-1]["bytes"] > 0
    remat = dataclasses.replace(made, execution=dataclasses.replace(made.execution, remat="layer"))
    assert field_to_change(remat, 4) == "--config.train.accumulate_steps=2"
    nine = dataclasses.replace(remat, data=dataclasses.replace(made.data, batch_size=36))
    assert field_to_change(nine, 4) == "--config.train.accumulate_steps=3"
    assert "accumulate" not in field_to_change(nine, 36)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("step", ("execution.remat=none",), "--config.execution.remat=layer"),
        ("step", (), "--config.train.accumulate_steps=6"),  # three sequences of a rank, in two parts already
        ("evaluate", ("execution.remat=none",), "--config.train.accumulate_steps=6"),
        ("evaluate", ("data.batch_size=32",), "--config.train.accumulate_steps=4"),
        ("evaluate", ("data.batch_size=8",), "--config.mesh.fsdp=True"),
        ("decode", (), "--config.mesh.fsdp=True"),
        ("step", ("data.batch_size=8", "mesh.fsdp=True"), "--config.execution.offload_optimizer=True"),
        ("evaluate", ("data.batch_size=8", "mesh.fsdp=True"), "--config.execution.offload_optimizer=True"),
        ("step", ("data.batch_size=8", "mesh.fsdp=True", "execution.offload_optimizer=True"), "more ranks"),
        ("decode", ("mesh.fsdp=True",), "more ranks"),
    ],
)
def test_what_to_change_of_each_program(name: str, fields: tuple[str, ...], expected: str) -> None:
    own = ("execution.remat=layer", "train.accumulate_steps=2", "data.batch_size=24", "mesh.fsdp=False")
    config = load_config("tiny", (*own, *fields))
    target = compiled_programs.Target([None] * 4)
    assert compiled_programs._field_to_change(config, target, name).startswith(expected)


def test_the_first_line_of_an_error() -> None:
    assert topologies.first_line(ValueError("\n one\ntwo")) == "one"
    assert topologies.first_line(ValueError("")) == "ValueError"
    assert topologies.first_line(ValueError("x" * 301)) == "x" * 300
