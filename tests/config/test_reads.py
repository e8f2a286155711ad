"""Fields that a config does not read change no program; those that are set all the same are named, in one line."""

import logging
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import some

from bigmac_jax.commands import cli
from bigmac_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    TuningConfig,
    load_config,
    with_overrides,
)
from bigmac_jax.config.reading import list_shipped, load_with_base
from bigmac_jax.config.reads import _WHATEVER, READ, evaluation_notes, notes, unread_for
from bigmac_jax.config.section import all_field_types
from bigmac_jax.data.batch import Batch
from bigmac_jax.model.mesh import batch_spec, make_mesh
from bigmac_jax.run import loop, python_api
from bigmac_jax.training.optimizer import learning_rate
from bigmac_jax.training.step import make_trainer

SMALL = ("model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.vocab_size=264",
         "model.num_experts=16", "data.tokenizer=bytes", "data.sequence_length=16", "data.batch_size=8",
         "mesh.data=1")  # fmt: skip
# Another value of each field that is not always read.
OTHER = {
    "model.num_heads": 8, "model.num_kv_heads": 1, "model.head_dim": 8, "model.qk_norm": False,
    "execution.attention": "xla",
    "model.positions": "none", "model.rope_theta": 500, "model.num_experts": 64, "model.top_k": 3,
    "model.router": "frozen", "model.hyper_width": 9, "train.choices_from": 2, "train.choices_steps": 7,
    "model.first_dense_layers": 1, "model.dense_hidden_size": 8, "model.down_ratio": 0.5, "model.num_shared_experts": 2,
    "model.shared_expert_hidden_size": 24, "model.latent_norm": "post_combine", "model.projection_init": "random",
    "model.capacity_factor": 1.5, "model.overflow": "next", "model.overflow_tries": 1,
    "model.router_scores": "sigmoid", "model.router_renormalize": False,
    "model.router_scale": 3, "model.balance": "bias", "model.balance_coefficient": 0.3, "model.balance_step": "same",
    "model.balance_scope": "step", "model.balance_bias_rate": 0.2, "model.z_loss_coefficient": 0.1,
    "model.num_expert_groups": 2, "model.top_groups": 2, "model.group_scores": "top_2",
    "model.mamba_heads": 8, "model.mamba_head_dim": 16, "model.mamba_groups": 2, "model.mamba_state": 8,
    "model.mamba_conv": 3, "model.mamba_conv_bias": False, "model.mamba_bias": True, "model.mamba_least_step": 0.01,
    "model.mamba_most_step": 0.5, "execution.mamba_chunk": 8,
    "execution.gather_dtype": "bfloat16", "execution.exchange": "dedup", "execution.wire_dtype": "int8",
    "execution.wire_dtype_backward": "int8", "execution.buffer_factor": 1.1, "execution.overlap_chunks": 2,
    "execution.grouped_matmul": "batched", "mesh.fsdp": True, "mesh.split_experts": True,
    "mesh.replica_optimizer": "sharded",
    "optimizer.final_learning_rate": 2e-4, "optimizer.projection_rate": 0.5, "optimizer.decay_steps": 7,
    "optimizer.momentum": 0.5, "tuning.train_router": False, "tuning.lora_alpha": 2, "tuning.lora_dropout": 0.5,
    "tuning.lora_targets": "attention", "tuning.teacher_weight": 0.1, "tuning.hidden_weight": 0.2,
    "tuning.dpo_beta": 0.3, "model.mtp_blocks": "*-", "train.mtp_weight": 0.7,
}  # fmt: skip
# Read by the host alone.
HOST = {"data.curriculum", "data.text_field", "data.null_rows", "data.packing", "train.max_bad_steps", "train.tasks",
        "train.tasks_limit", "train.experts_per_checkpoint", "train.partial_checkpoint",
        "train.most_lost_updates", "execution.resident_layers", "execution.resident_experts",
        "tuning.bad_rows"}  # fmt: skip
# Refused, not named, where they are not read.
REFUSED = {"model.first_dense_layers", "model.latent_norm", "model.balance_step", "model.overflow"}
# Read by types alone: over which axes of one rank an array stands.
TYPES = {"mesh.fsdp", "mesh.split_experts"}
# A config, and some of the fields that it does not read.
CONFIGS = {
    "model.structure=dense": ("model.num_experts", "model.num_shared_experts", "model.router_scale", "model.balance"),
    "model.structure=vanilla model.num_experts=64 execution.exchange=gather mesh.expert=2": (
        "model.top_k", "model.capacity_factor", "model.router_renormalize", "mesh.split_experts"),
    "model.structure=fine_grained model.expert_hidden_size=8 model.balance=none execution.exchange=dedup "
    "model.capacity_factor=1.25": (
        "model.down_ratio", "model.capacity_factor", "model.balance_coefficient", "mesh.fsdp", "execution.wire_dtype",
        "execution.buffer_factor"),
    "model.blocks=ME model.mamba_head_dim=16": (
        "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.qk_norm", "execution.attention",
        "model.positions", "model.rope_theta", "model.dense_hidden_size", "model.balance_scope"),
    "model.balance=quantile model.capacity_factor=inf execution.dtype=bfloat16 optimizer.schedule=constant": (
        "execution.exchange", "execution.gather_dtype", "optimizer.decay_steps", "optimizer.final_learning_rate"),
    "model.balance=bias model.balance_bias_rate=0 model.positions=none train.init_from=x tuning.lora_rank=2 "
    "mesh.data=2": (
        "model.rope_theta", "optimizer.projection_rate", "model.balance_scope"),
}  # fmt: skip


def value(config: Config, name: str) -> Any:
    group, _, field = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, field)


def programs(config: Config) -> tuple[str, str, list[bytes], list[float]]:
    """What a run computes: its first state, its step, its learning rates."""
    with jax.set_mesh(mesh := make_mesh(config)):
        trainer = make_trainer(config, mesh)
        tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=jax.NamedSharding(mesh, batch_spec(2)))
        step = trainer.step.trace(trainer.abstract_state, Batch(tokens, tokens, None), trainer.rate(0))
        first = trainer.init.trace(jax.random.key(0))
        rates = [float(learning_rate(config)(step)) for step in (0, 50, 200, 2000)]
        numbers = [np.asarray(number).tobytes() for traced in (first, step) for number in traced.jaxpr.consts]
        return str(first.jaxpr), str(step.jaxpr), numbers, rates


def test_every_field_stands_in_the_table() -> None:
    """A new one needs a line there: whether it is always read, or under which condition."""
    assert list(READ) == list(dict.fromkeys(READ)) and set(READ) == set(all_field_types(Config))
    always = {f"{group}.{name}".lstrip(".") for group, names in _WHATEVER.items() for name in names.split()}
    assert set(OTHER) | HOST == set(READ) - always and not set(OTHER) & HOST


@pytest.mark.parametrize("overrides", some(CONFIGS), ids=lambda overrides: overrides.split()[0])
def test_what_is_not_read_changes_no_program(overrides: str) -> None:
    base = (*SMALL, *overrides.split())
    config = load_config("tiny", base)
    unread = [name for name in OTHER if unread_for(config, name) and name not in REFUSED]
    assert set(CONFIGS[overrides]) <= set(unread)
    changes = [f"{name}={OTHER[name]}" for name in unread]
    (line, *_) = notes(load_config("tiny", (*base, *changes)))
    assert line.startswith("set, but not read: ") and all(f"{name}=" in line for name in unread)
    changed = load_config("tiny", (*base, *(change for change in changes if change.partition("=")[0] not in TYPES)))
    assert all(value(config, name) != value(changed, name) for name in set(unread) - TYPES)
    assert programs(config) == programs(changed)


# A config for which a field is read.
READING = {
    "model.top_k": "", "model.hyper_width": "model.router=hyper",
    "model.capacity_factor": "", "model.down_ratio": "",
    "model.balance_coefficient": "", "execution.wire_dtype": "mesh.expert=2",
    "optimizer.momentum": "optimizer.name=muon",
    "optimizer.decay_steps": "", "mesh.fsdp": "mesh.data=2",
}  # fmt: skip
MORE_READING = {
    "model.router": "", "train.choices_from": "train.choices_steps=5",
    "train.choices_steps": "train.choices_from=3 train.choices_steps=5",
    "model.positions": "", "model.rope_theta": "", "model.num_experts": "",
    "model.dense_hidden_size": "model.first_dense_layers=1",
    "model.first_dense_layers": "", "model.num_shared_experts": "model.num_shared_experts=0",
    "model.shared_expert_hidden_size": "", "model.latent_norm": "", "model.projection_init": "",
    "model.router_scores": "", "model.router_renormalize": "", "model.router_scale": "", "model.balance": "",
    "model.overflow": "model.capacity_factor=1", "model.overflow_tries": "model.capacity_factor=1 model.overflow=next",
    "model.balance_step": "model.balance=quantile", "model.balance_scope": "train.accumulate_steps=2",
    "model.balance_bias_rate": "model.balance=bias", "model.z_loss_coefficient": "",
    "model.num_expert_groups": "model.num_expert_groups=8 model.top_groups=1 model.top_k=2",
    "model.top_groups": "model.num_expert_groups=8 model.top_groups=4",
    "model.group_scores": "model.num_expert_groups=4 model.top_groups=3", "execution.gather_dtype": "",
    "execution.exchange": "mesh.expert=2", "execution.wire_dtype_backward": "mesh.expert=2",
    "execution.buffer_factor": "mesh.expert=2", "execution.overlap_chunks": "",
    "execution.grouped_matmul": "execution.grouped_matmul=blocks",
    "optimizer.final_learning_rate": "", "optimizer.projection_rate": "", "tuning.train_router": "",
    "model.mtp_blocks": "model.mtp_modules=1", "train.mtp_weight": "model.mtp_modules=1",
    "mesh.split_experts": "mesh.tensor=2", "mesh.replica_optimizer": "mesh.replica=2 mesh.fsdp=True",
}  # fmt: skip
MORE_READING |= {name: "model.blocks=ME model.mamba_head_dim=8" for name in OTHER if ".mamba_" in name}


@pytest.mark.parametrize(
    "name", [*some(READING), *(pytest.param(name, marks=pytest.mark.full) for name in MORE_READING)]
)  # fmt: skip
def test_what_is_read_changes_a_program(name: str) -> None:
    base = (*SMALL, *(READING | MORE_READING)[name].split())
    before, after = load_config("tiny", base), load_config("tiny", (*base, f"{name}={OTHER[name]}"))
    assert not unread_for(before, name) and not unread_for(after, name) and value(before, name) != value(after, name)
    assert programs(before) != programs(after)


DENSE, VANILLA, TWO = "model.structure=dense", "model.structure=vanilla", "mesh.expert=2"
CAPACITY, ROWS = "model.capacity_factor=2", "tuning.objective=sft data.source=a.jsonl"
LORA, SAVES = "train.init_from=x tuning.lora_rank=1", "train.checkpoint_every=5"
WHY: list[tuple[str, str, str]] = [  # overrides of the defaults, fields, and the setting for which they are not read
    ("", "model.num_heads model.positions model.rope_theta model.top_k model.first_dense_layers model.down_ratio", ""),
    ("", "model.capacity_factor model.router_renormalize model.balance_coefficient model.projection_init", ""),
    ("", "execution.gather_dtype execution.resident_layers execution.overlap_chunks train.choices_from", ""),
    ("", "data.null_rows data.packing optimizer.decay_steps optimizer.projection_rate mesh.fsdp", ""),
    ("", "model.hyper_width", "model.router=linear"),
    ("model.router=hyper", "model.hyper_width model.router", ""),
    ("", "train.choices_steps", "train.choices_from=0"),
    ("train.choices_from=2 train.choices_steps=1", "train.choices_steps", ""),
    (VANILLA, "train.choices_from train.choices_steps model.top_k model.router_renormalize", VANILLA),
    (VANILLA, "model.num_experts model.balance model.down_ratio", ""),
    (DENSE, "model.num_experts model.router model.top_k model.hyper_width model.first_dense_layers", DENSE),
    (DENSE, "model.dense_hidden_size model.down_ratio model.shared_expert_hidden_size model.overflow", DENSE),
    (DENSE, "model.overflow_tries model.router_renormalize model.balance_coefficient model.balance_scope", DENSE),
    (DENSE, "model.balance_step model.balance_bias_rate model.num_expert_groups mesh.split_experts", DENSE),
    (DENSE, "execution.resident_experts execution.exchange execution.wire_dtype execution.buffer_factor", DENSE),
    (DENSE, "train.choices_from train.choices_steps train.experts_per_checkpoint train.partial_checkpoint", DENSE),
    (DENSE, "model.projection_init optimizer.projection_rate model.capacity_factor", DENSE),
    ("model.structure=fine_grained", "model.projection_init", "model.structure=fine_grained"),
    ("model.blocks=*E", "model.first_dense_layers", "model.blocks=*E"),
    ("model.blocks=*E", "model.dense_hidden_size", "model.blocks=*E"),
    ("model.blocks=*E-", "model.dense_hidden_size", ""),
    ("", "model.dense_hidden_size", "model.first_dense_layers=0"),
    ("model.first_dense_layers=1", "model.dense_hidden_size", ""),
    ("model.expert_hidden_size=9", "model.down_ratio", ""),
    ("model.structure=fine_grained", "model.down_ratio", ""),
    ("model.structure=fine_grained model.expert_hidden_size=9", "model.down_ratio", "model.expert_hidden_size=9"),
    ("model.structure=fine_grained model.expert_hidden_size=9 model.num_shared_experts=1", "model.down_ratio", ""),
    ("model.structure=fine_grained model.expert_hidden_size=9 model.num_shared_experts=1 "
     "model.shared_expert_hidden_size=9", "model.down_ratio", "model.expert_hidden_size=9"),
    ("model.num_shared_experts=0", "model.shared_expert_hidden_size", "model.num_shared_experts=0"),
    ("model.num_shared_experts=1", "model.shared_expert_hidden_size", ""),
    (f"{CAPACITY} execution.exchange=gather", "model.capacity_factor", "execution.exchange=gather"),
    (f"{CAPACITY} execution.exchange=ragged", "model.capacity_factor", "execution.exchange=ragged"),
    (f"{CAPACITY} execution.exchange=dedup", "model.capacity_factor", "one rank of experts"),
    (f"{CAPACITY} execution.exchange=hierarchical {TWO}", "model.capacity_factor", ""),
    (f"{CAPACITY} execution.exchange=all_to_all", "model.capacity_factor execution.exchange execution.wire_dtype", ""),
    (f"{CAPACITY} execution.exchange=auto", "execution.wire_dtype_backward", ""),
    (f"{CAPACITY} execution.exchange=dedup", "execution.wire_dtype execution.buffer_factor", "one rank of experts"),
    ("", "execution.exchange execution.wire_dtype execution.buffer_factor", "one rank of experts"),
    (TWO, "execution.exchange execution.wire_dtype execution.buffer_factor", ""),
    ("mesh.node=2", "execution.exchange execution.wire_dtype_backward execution.buffer_factor", ""),
    ("", "model.overflow", "model.capacity_factor=inf"),
    (CAPACITY, "model.overflow", ""),
    (CAPACITY, "model.overflow_tries", "model.overflow=drop"),
    (f"{CAPACITY} model.overflow=next", "model.overflow_tries", ""),
    ("model.top_k=1", "model.router_renormalize", "model.top_k=1"),
    ("model.top_k=2", "model.router_renormalize", ""),
    ("model.balance=bias", "model.balance_coefficient model.balance_scope model.balance_step", "model.balance=bias"),
    ("", "model.balance_step model.balance_bias_rate", "model.balance=aux_loss"),
    ("model.balance=bias", "model.balance_bias_rate", ""),
    ("model.balance=quantile", "model.balance_step", ""),
    ("", "model.balance_scope", "train.accumulate_steps=1"),
    ("train.accumulate_steps=2", "model.balance_scope", ""),
    ("", "model.num_expert_groups model.top_groups model.group_scores", "model.top_groups=1 of 1"),
    ("model.num_expert_groups=4 model.top_groups=4", "model.num_expert_groups", "model.top_groups=4 of 4"),
    ("model.num_expert_groups=4 model.top_groups=3", "model.num_expert_groups model.group_scores", ""),
    ("", "model.mamba_heads model.mamba_conv_bias execution.mamba_chunk", "no Mamba layer"),
    ("model.blocks=ME", "model.mamba_heads model.mamba_least_step execution.mamba_chunk", ""),
    ("model.mtp_modules=1 model.mtp_blocks=ME", "model.mamba_heads", ""),
    ("model.blocks=ME", "model.num_heads execution.attention model.rope_theta model.positions", "no attention"),
    ("model.blocks=ME model.positions=learned", "model.positions", ""),
    ("model.positions=none", "model.rope_theta", "model.positions=none"),
    ("execution.dtype=bfloat16", "execution.gather_dtype", "execution.dtype=bfloat16"),
    ("mesh.data=1", "mesh.fsdp", "a mesh of one rank"),
    ("mesh.data=2", "mesh.fsdp", ""),
    (f"mesh.data=1 {TWO}", "mesh.fsdp", ""),
    ("mesh.data=1 mesh.replica=2", "mesh.fsdp", "a mesh of one rank"),
    ("mesh.data=1 mesh.replica=2 mesh.fsdp=True mesh.replica_optimizer=sharded", "mesh.fsdp", ""),
    ("", "mesh.split_experts", "mesh.tensor=1"),
    ("mesh.tensor=2", "mesh.split_experts", ""),
    ("", "mesh.replica_optimizer", "mesh.replica=1"),
    ("mesh.replica=2", "mesh.replica_optimizer", ""),
    ("", "data.curriculum", "no data.mixture"),
    ("data.mixture=a=1", "data.curriculum data.text_field", ""),
    ("", "data.text_field", "data.source=sotu"),
    ("data.validation_source=sotu", "data.text_field", "data.source=sotu"),
    ("data.test_source=a", "data.text_field", ""),
    ("data.source=a", "data.text_field", ""),
    (ROWS, "data.text_field data.null_rows data.packing tuning.dpo_beta", "tuning.objective=sft"),
    (ROWS, "tuning.bad_rows", ""),
    ("", "tuning.bad_rows tuning.dpo_beta", "tuning.objective=pretrain"),
    (f"{ROWS} tuning.objective=dpo train.init_from=x", "tuning.dpo_beta tuning.bad_rows", ""),
    ("optimizer.schedule=constant", "optimizer.decay_steps", "optimizer.schedule=constant"),
    ("optimizer.schedule=constant", "optimizer.final_learning_rate", "optimizer.schedule=constant"),
    ("", "optimizer.momentum", "optimizer.name=adamw"),
    ("optimizer.name=muon", "optimizer.momentum", ""),
    (LORA, "optimizer.projection_rate", "tuning.lora_rank=1"),
    (LORA, "tuning.lora_alpha tuning.lora_dropout tuning.lora_targets", ""),
    ("", "tuning.lora_alpha tuning.lora_dropout tuning.lora_targets", "tuning.lora_rank=0"),
    ("", "train.experts_per_checkpoint train.partial_checkpoint train.most_lost_updates", "train.checkpoint_every=0"),
    (SAVES, "train.experts_per_checkpoint", ""),
    (SAVES, "train.partial_checkpoint train.most_lost_updates", "train.experts_per_checkpoint=0"),
    (f"{SAVES} train.experts_per_checkpoint=1", "train.partial_checkpoint train.most_lost_updates", ""),
    ("", "model.mtp_blocks train.mtp_weight", "model.mtp_modules=0"),
    ("model.mtp_modules=1", "model.mtp_blocks train.mtp_weight", ""),
    (f"{LORA} model.mtp_modules=1", "train.mtp_weight", "tuning.lora_rank=1"),
    ("", "train.max_bad_steps", "train.on_bad_step=stop"),
    ("train.on_bad_step=skip", "train.max_bad_steps", ""),
    ("", "train.tasks train.tasks_limit", "train.tasks_every=0"),
    ("train.tasks=piqa train.tasks_every=1", "train.tasks train.tasks_limit", ""),
    ("", "tuning.teacher_weight tuning.hidden_weight", "no tuning.teacher"),
    ("tuning.teacher=x", "tuning.teacher_weight tuning.hidden_weight", ""),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "fields", "why"), WHY)
def test_the_setting_that_a_field_is_not_read_for(overrides: str, fields: str, why: str) -> None:
    config = with_overrides(Config(), overrides.split())
    assert {name: unread_for(config, name) for name in fields.split()} == dict.fromkeys(fields.split(), why)


def test_what_an_evaluation_does_not_read() -> None:
    """It drops nothing, and has no backward pass."""
    config = with_overrides(Config(), ["model.capacity_factor=2", "model.overflow=next", "mesh.data=0"])
    given = ["execution.remat", "execution.exchange", "execution.dtype", "mesh.fsdp", "model.overflow_tries"]
    (line,) = evaluation_notes(config, given, ranks=1)
    assert line == (
        "set, but not read: execution.remat=none (no training); execution.exchange=all_to_all (one rank of experts); "
        "mesh.fsdp=False (a mesh of one rank); model.overflow_tries=2 (model.overflow=drop)"
    )
    assert evaluation_notes(config, ["mesh.fsdp", "execution.dtype"], ranks=2) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("train.steps=3 train.choices_steps=9 train.choices_from=2", "choices reach 2, and evaluation takes"),
        ("train.steps=4 train.choices_steps=9 train.choices_from=2", "choices reach 3, and evaluation takes"),
        ("train.steps=9 train.choices_steps=9 train.choices_from=2", ""),
        ("optimizer.final_learning_rate=1e-3 optimizer.learning_rate=1e-3", ""),
        ("model.context_length=255", "is more than model.context_length=255: exports declare 256"),
        ("model.context_length=257", "exports still declare model.context_length=257, and this run trains on windows"),
    ],
)  # fmt: skip
def test_surprises_are_told(overrides: str, said: str) -> None:
    """Of choices, the last rate and the context, at their limits."""
    config = with_overrides(Config(), ["optimizer.warmup_steps=0", "model.num_experts=32", "model.top_k=4",
                                       *overrides.split()])  # fmt: skip
    lines = [line for line in notes(config) if not line.startswith("set, but not read")]
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_width_that_another_structure_keeps_is_told() -> None:
    config = with_overrides(Config(), ["model.structure=fine_grained", "model.expert_hidden_size=9"])
    (line,) = notes(config, ["model.structure"])
    width = config.model.hidden_size // 4
    assert "keeps the config's model.expert_hidden_size=9" in line and f"0 takes the paper's width ({width})" in line
    odd = with_overrides(config, ["model.hidden_size=90", "model.num_heads=5"])  # of which a quarter is no width
    assert "the paper's width (22)" in notes(odd, ["model.structure"])[0]
    for given in ([], ["model.structure", "model.expert_hidden_size"], ["model.expert_hidden_size"]):
        assert notes(config, given) == []
    assert notes(with_overrides(config, ["model.expert_hidden_size=0"]), ["model.structure"]) == []


def test_the_line_is_short_and_one() -> None:
    config = Config(
        model=ModelConfig("dense", top_k=8, router_scale=2.0),
        optimizer=OptimizerConfig(momentum=0.9),
        tuning=TuningConfig(lora_alpha=8.0),
    )
    assert notes(config) == [
        "set, but not read: model.top_k=8, model.router_scale=2 (model.structure=dense); optimizer.momentum=0.9 "
        "(optimizer.name=adamw); tuning.lora_alpha=8 (tuning.lora_rank=0)"
    ]


def test_learned_positions_are_of_the_embedding() -> None:
    """Other positions are attention's alone."""
    overrides = [*SMALL, "model.blocks=ME", "model.mamba_head_dim=16", "model.num_heads=4"]
    said = {of: notes(load_config("tiny", [*overrides, f"model.positions={of}"]), ["model.positions"]) for of in
            ("rope", "none", "learned")}  # fmt: skip
    for positions in ("rope", "none"):
        assert f"model.positions={positions}" in said[positions][0] and said[positions][0].endswith("(no attention)")
    assert not any("positions" in line for line in said["learned"])


def test_a_field_that_was_given_is_set_whatever_its_value() -> None:
    config = Config()
    assert notes(config) == []
    (line,) = notes(config, ["optimizer.momentum", "model.top_k"])
    assert line == "set, but not read: optimizer.momentum=0.95 (optimizer.name=adamw)"


@pytest.mark.parametrize("name", [*list_shipped(), "nemotron3_nano:v6e", "nemotron3_super:v5p"])
def test_what_is_shipped_sets_nothing_that_it_does_not_read(name: str) -> None:
    assert notes(load_config(name)) == []


def test_a_recipe_lies_on_a_machine() -> None:
    here, there = load_config("nemotron3_super"), load_config("nemotron3_super:v5p", ["mesh.expert=64"])
    assert (here.mesh.node, here.mesh.expert, here.execution.exchange) == (8, 8, "hierarchical")
    assert (there.mesh.node, there.mesh.expert, there.execution.exchange) == (1, 64, "dedup")
    assert here.model == there.model
    with pytest.raises(ConfigError, match="there is no layout for 'h200'; use h100 or v5p"):
        load_config("nemotron3_super:h200")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("tiny", "model.num_shared_experts=0", ""),  # tiny sets their width, and reads it
        ("tiny", "model.num_shared_experts=0 model.shared_expert_hidden_size=64", "set, but not read: model.shared_"),
        ("tiny", "model.num_shared_experts=0 model.top_k=2 optimizer.momentum=0.9", "set, but not read: optimizer.mom"),
        ("tiny", "model.structure=fine_grained", ""),  # its width is the paper's
        ("qwen3_30b", "model.structure=bigmac",
         "model.structure=bigmac keeps the config's model.expert_hidden_size=768, which gives another structure another"
         " size; 0 takes the paper's width (2048), and bigmac plan of the config as it is shows the width of equal"),
        ("qwen3_30b", "model.structure=bigmac model.expert_hidden_size=3056", ""),
        ("qwen3_30b:bigmac", "", ""),
    ],
)  # fmt: skip
def test_what_a_flag_makes_of_a_config(name: str, given: str, said: str) -> None:
    overrides = given.split()
    config, base = load_with_base(name, overrides)
    found = notes(config, [override.partition("=")[0] for override in overrides], base=base)
    assert len(found) == 1 and found[0].startswith(said) if said else not found


def test_what_a_file_of_ones_own_sets_for_nothing() -> None:
    own = {"model.structure": "dense", "model.top_k": 7}
    config, base = load_with_base(own, ["train.seed=7"])
    assert notes(config, ["train.seed"], base=base) == ["set, but not read: model.top_k=7 (model.structure=dense)"]


def test_a_saved_config_says_what_its_own_said(tmp_path: pathlib.Path) -> None:
    """`auto` is saved as what it was, which nobody has set."""
    for structure in ("bigmac", "fine_grained", "vanilla"):
        config = load_config("tiny", [f"model.structure={structure}"])
        (tmp_path / "config.json").write_text(config.to_json())
        assert notes(load_config(tmp_path / "config.json")) == notes(config)


def test_an_evaluation_names_what_it_is_given() -> None:
    config = load_config("tiny", ["model.structure=dense", "optimizer.momentum=0.9"])
    assert evaluation_notes(config, [], ranks=0) == []
    given = ["execution.overlap_chunks", "execution.remat", "execution.dtype"]
    assert evaluation_notes(config, given, ranks=0) == [
        "set, but not read: execution.overlap_chunks=1 (model.structure=dense); execution.remat=none (no training)"
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("learning_rate=1e-5",
         "optimizer.final_learning_rate=0.0001 is above learning_rate=1e-05: the rate rises to it"),
        ("decay_steps=5000",
         "optimizer.decay_steps=5000 behind a warm-up of 100 of train.steps=2400: the rate does not reach 0.0001"),
        ("decay_steps=2301", "does not reach 0.0001"),
        ("decay_steps=2300", ""),
        ("schedule=wsd optimizer.decay_steps=2301", "the rate falls from the warm-up on"),
        ("warmup_steps=2400",
         "optimizer.warmup_steps=2400 of train.steps=2400: the rate does not reach learning_rate=0.006"),
        ("warmup_steps=2399", ""),
        ("schedule=constant optimizer.learning_rate=1e-5", "optimizer.final_learning_rate=0.0001 (optimizer.schedule="),
    ],
)  # fmt: skip
def test_a_rate_that_does_what_nobody_expects(overrides: str, line: str) -> None:
    found = notes(load_config("tiny", f"optimizer.{overrides}".split()))
    assert line in found[0] and len(found) == 1 if line else not found


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("", ""),
        ("model.context_length=256", ""),
        ("model.context_length=300", "exports still declare model.context_length=300, and this run trains on windows"),
        ("model.context_length=300 model.positions=learned", "; learned positions behind that stay as they are"),
        ("model.context_length=100",
         "data.sequence_length=256 is more than model.context_length=100: exports declare 256"),
    ],
)  # fmt: skip
def test_a_context_that_is_not_what_is_trained(overrides: str, line: str) -> None:
    found = notes(load_config("tiny", overrides.split()))
    assert line in found[0] and len(found) == 1 if line else not found


def test_a_notebook_sees_them_in_a_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A config alone is silent."""
    monkeypatch.setattr(python_api.loop, "train", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        config = load_config("tiny", ["optimizer.momentum=0.9", "mesh.data=1"])
        assert not caplog.messages
        python_api.train(config, tmp_path)
    assert caplog.messages == ["set, but not read: optimizer.momentum=0.9 (optimizer.name=adamw)"]


def test_the_command_names_what_it_was_given(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: Any
) -> None:
    """Also what the default is; and a mesh that has one rank because there is one device."""
    program = command("train")
    monkeypatch.setattr(cli, "OVERRIDES", ["optimizer.momentum=0.95", "mesh.fsdp=true"])
    monkeypatch.setattr(cli, "agree", lambda *_: None)
    monkeypatch.setattr(cli, "enter_mesh", lambda config: make_mesh(config, devices=jax.devices()[:1]))
    monkeypatch.setattr(program, "locate_workdir", lambda _: tmp_path)
    monkeypatch.setattr(program, "_config", lambda _: (*load_with_base("tiny", cli.OVERRIDES), ""))
    monkeypatch.setattr(program, "train", lambda *_: loop.Result(7, True, None))
    for flag in (program._WORKDIR, program._PROFILE):
        monkeypatch.setattr(type(flag), "value", "")
    assert program.main() == 0
    assert caplog.messages == [
        "set, but not read: mesh.fsdp=True (a mesh of one rank); optimizer.momentum=0.95 (optimizer.name=adamw)"
    ]


@pytest.mark.parametrize(
    ("asked", "has"), [(60, "it has 60 of 60 steps,"), (40, "it has 60 steps, more than train.steps=40,")]
)
def test_a_run_that_has_ended(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, command: Any, asked: int, has: str
) -> None:
    """One that learned dialogues is used in a chat: `generate` takes its prompt as it is."""
    program = command("train")
    monkeypatch.setattr(program, "_WORKDIR", SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(cli, "CPU_DEVICES", SimpleNamespace(value=0))
    line = program._finished(asked, 60)
    assert has in line and f"generate --workdir={tmp_path} --prompt=TEXT" in line
    (tmp_path / "chat_template.jinja").touch()
    for line in (program._finished(asked, 60), program._done(60)):
        assert line.endswith(f"bigmac eval --workdir={tmp_path}, bigmac serve --workdir={tmp_path}")
