"""Adapters beside next-token modules, which a step of theirs leaves alone: what is counted of training is that of the
model without modules; what a rank holds is not."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import pytest
from model.tools import on_mesh, some, tiny

from bigmac_jax.config import Config, ExecutionConfig, TuningConfig
from bigmac_jax.model import counts
from bigmac_jax.model.memory import host_memory, rank_memory, state_memory
from bigmac_jax.model.mesh import ExpertGroup
from bigmac_jax.model.traffic import exchange_traffic, replica_bytes, tensor_bytes
from bigmac_jax.planning import compiled_programs
from bigmac_jax.planning.cost import gradient_bytes, make_job, step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.job import product_seconds
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan
from bigmac_jax.planning.shapes import Shape
from bigmac_jax.training.programs import step_program
from bigmac_jax.training.step import make_trainer

MAMBA = {"mamba_heads": 4, "mamba_head_dim": 4, "mamba_groups": 2, "mamba_state": 6}
HYBRID = MAMBA | {"num_layers": 1, "num_shared_experts": 1}
# Modules whose branches the model has, and some that it has none of.
MODELS: dict[str, dict[str, Any]] = {
    "experts": {"mtp_modules": 2},
    "dense": {"structure": "dense", "mtp_modules": 1},
    "hybrid": HYBRID | {"blocks": "ME*E", "mtp_modules": 2, "mtp_blocks": "*M-", "dense_hidden_size": 20},
    "Mamba in modules alone": HYBRID | {"blocks": "*-*E", "mtp_modules": 1, "mtp_blocks": "M*E"},
    "hyper": {"router": "hyper", "hyper_width": 6, "mtp_modules": 1},
}
HARDWARE = load_hardware("h100")
MESHES = [(1, 1, 1), (2, 2, 2, 1, True), (1, 1, 2, 2, False, True)]  # data, node, expert, tensor, fsdp, split_experts


def config_of(
    name: str, mesh: Any, modules: bool = True, tuning: Mapping[str, Any] | None = None, **execution: Any
) -> Config:
    fields = MODELS[name] | ({} if modules else {"mtp_modules": 0, "mtp_blocks": ""})
    config = tiny(mesh, batch=8, length=8, **fields)
    train = dataclasses.replace(config.train, init_from="some")
    lora = TuningConfig(**{"lora_rank": 2, "lora_targets": "attention,mamba"} | dict(tuning or {}))
    return dataclasses.replace(config, execution=ExecutionConfig(**execution), train=train, tuning=lora)


def trained(config: Config, sizes: dict[str, int]) -> dict[str, Any]:
    """Everything that is counted of a training step."""
    ranks, group = math.prod(sizes.values()), ExpertGroup((sizes["node"], sizes["expert"]), "gpu", "")
    count = counts.parameters(config, sizes)
    memory = rank_memory(config, ranks, group, count)
    return {
        "flops": (counts.flops(config), counts.flops(config, causal=True)),
        "exchange": exchange_traffic(config, ranks, group),
        "tensor": tensor_bytes(config, sizes, group),
        "replicas": replica_bytes(config, sizes | {"replica": 2}),
        "host": host_memory(config, ranks, count, "gpu"),
        "memory": {part: size for part, size in memory.items() if part != "parameters"},
        "parameters": count._replace(total=0, parts={}, of_a_rank=0),
        "adapted": counts.adapted_parts(config),
        "shape": Shape.of(config),
        "job": make_job(config, sizes, HARDWARE),
        "seconds": step_time(config, sizes, HARDWARE).as_dict(),
    }


@pytest.mark.parametrize(
    ("name", "mesh", "remat"),
    some(itertools.product(MODELS, MESHES, ("none", "layer", "exchange", "offload")), every=7),
)
def test_training_is_that_of_the_model_alone(name: str, mesh: Any, remat: str) -> None:
    with_, without = (config_of(name, mesh, modules, remat=remat) for modules in (True, False))
    sizes = {"replica": 1} | {axis: getattr(with_.mesh, axis) for axis in ("data", "node", "expert", "tensor")}
    assert trained(with_, sizes) == trained(without, sizes)
    whole = dataclasses.replace(with_, tuning=TuningConfig())
    outputs = 1 + with_.model.mtp_modules  # each with a gradient of its matrix, too
    assert 2 * counts.flops(whole)["output"] == 3 * outputs * counts.flops(without)["output"]
    held, group = counts.parameters(with_, sizes), ExpertGroup((sizes["node"], sizes["expert"]), "gpu", "")
    of_whole = counts.parameters(whole, sizes)
    assert (held.total, held.parts, held.of_a_rank) == (of_whole.total, of_whole.parts, of_whole.of_a_rank)
    assert rank_memory(with_, 8, group, held)["parameters"] == 4 * (of_whole.of_a_rank + held.trained_of_a_rank)
    assert held.total > counts.parameters(without, sizes).total


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_what_a_rank_trains(mesh: Any) -> None:
    """The adapters, as the trainer has them, and their moments; memory holds them beside the model."""
    config = config_of("experts", mesh, tuning={"lora_targets": "attention,experts,projections"})
    with on_mesh(config):
        state = make_trainer(config, jax.sharding.get_mesh()).abstract_state
    sizes = {"replica": 1} | {axis: getattr(config.mesh, axis) for axis in ("data", "node", "expert", "tensor")}
    count = counts.parameters(config, sizes)
    adapters, moments = (
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree) if leaf.ndim)
        for tree in (state.params, state.opt_state)
    )
    assert (count.trained_of_a_rank, count.moments_of_a_rank) == (adapters, moments)
    memory = state_memory(config, count, 1, "gpu")
    assert memory["optimizer"] == 4 * moments == 2 * memory["gradients"]
    assert memory["parameters"] == 4 * (count.of_a_rank + adapters)


def test_gradients_of_adapted_matrices_are_summed() -> None:
    """In full, whatever the adapters' rank is, and no others: of those that all ranks share, that `tensor` and that the
    expert group splits; biases have no adapters."""
    for targets, everyone, tensor, experts in (
        ("attention", 0, 4 * 16 * 16, 0),
        ("attention,shared,experts", 2 * 2 * 4 * 16, 4 * 16 * 16, 2 * 2 * 8 * 4 * 16),
        ("projections", 2 * 2 * 4 * 16, 0, 0),
    ):
        config = config_of("hybrid", MESHES[1], tuning={"lora_targets": targets})
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, use_bias=True))
        found = gradient_bytes(config, counts.parameters(config, {}))
        assert found == (4 * everyone, 4 * tensor, 4 * experts)


@pytest.mark.full
@pytest.mark.parametrize("targets", ["attention", "attention,projections,shared,experts"])
def test_gradients_that_are_summed_are_those_of_the_program(targets: str) -> None:
    """But for some scalars."""
    config = config_of("experts", (2, 1, 1), modules=False, tuning={"lora_targets": targets})
    target = compiled_programs.Target(jax.devices()[:2])
    step = compiled_programs.describe_programs(config, target, ("step",))["step"]
    summed = sum(row["sent_bytes"] for row in step["collectives"] if row["kind"] == "all-reduce")
    counted = sum(gradient_bytes(config, counts.parameters(config, {})))
    assert counted <= summed < counted + 200


@pytest.mark.full
def test_a_plan() -> None:
    """Of a machine, with the structures that it is compared to: nothing differs but the parameters that it holds."""
    held = {"parameters_total", "parameters", "parameters_per_rank", "memory", "headroom", "description"}

    def of_training(plan: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in plan.items() if name not in held | {"baselines"}}

    request = Request(devices=2, hardware="h100")
    plans = [make_plan(config_of("experts", (1, 1, 2), modules), request) for modules in (True, False)]
    columns = [[plan, *plan["baselines"].values()] for plan in plans]
    assert [of_training(column) for column in columns[0]] == [of_training(column) for column in columns[1]]
    assert plans[0]["memory"]["parameters"] > plans[1]["memory"]["parameters"]


def test_matrices_without_adapters_get_no_gradient() -> None:
    """Of their three products two are left, in FLOPs and in seconds; scores and Mamba's scan have all of theirs."""
    config = config_of("hybrid", (1, 1, 1), modules=False, tuning={"lora_targets": "experts"})
    whole, sizes = dataclasses.replace(config, tuning=TuningConfig()), {"data": 1, "node": 1, "expert": 1}
    found, of_whole = counts.flops(config), counts.flops(whole)
    of_matrices = {part: 3 * (count - found[part]) for part, count in of_whole.items()}
    scores = 6 * 64 * 2 * 8 * 16
    scan = of_whole["mamba"] - 6 * 64 * 16 * (3 * 16 + 2 * 12 + 4)
    assert of_matrices == of_whole | {
        "experts": 0, "attention": of_whole["attention"] - scores, "mamba": of_whole["mamba"] - scan
    }  # fmt: skip
    jobs = [make_job(c, sizes, HARDWARE) for c in (config, whole)]
    seconds, of_whole = (product_seconds(job, HARDWARE) for job in jobs)
    assert {part: round(seconds[part] / of_whole[part], 6) for part in seconds} == dict.fromkeys(
        seconds, round(2 / 3, 6)
    ) | {"experts": 1.0}
    alone = dataclasses.replace(whole, tuning=TuningConfig(train_router=False))
    assert 3 * counts.flops(alone)["router"] == 2 * counts.flops(whole)["router"]


@pytest.mark.full
def test_flops_are_the_programs() -> None:
    """But for the adapters' own, and what the first layer's inputs would get."""
    config = config_of("experts", (1, 1, 1), modules=False, tuning={"lora_targets": "attention"}, attention="xla")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, capacity_factor=1.0, top_k=2, num_layers=4),
        data=dataclasses.replace(config.data, sequence_length=32, batch_size=64),
    )
    step = compiled_programs.describe_programs(config, compiled_programs.Target(jax.devices()[:1]), ("step",))["step"]
    assert step["flops_per_step"] == pytest.approx(sum(counts.flops(config).values()), rel=0.03)


@pytest.mark.full
@pytest.mark.parametrize("name", ["experts", "hybrid"])
def test_compiled(name: str) -> None:
    """The compiled step does as much work with modules as without, and holds their parameters."""
    flops, held = [], []
    for modules in (True, False):
        config = config_of(name, (1, 1, 1), modules)
        with on_mesh(config):
            trainer = make_trainer(config, jax.sharding.get_mesh())
            compiled = step_program(config, jax.sharding.get_mesh(), trainer).lower().compile()
        flops.append(compiled.cost_analysis()["flops"])
        held.append(sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.base)))
        assert held[-1] == counts.parameters(config, {}).total
    assert flops[0] == pytest.approx(flops[1], rel=1e-3) and held[0] > held[1]
