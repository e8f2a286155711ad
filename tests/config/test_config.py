"""Every bad configuration is one line that says the rule and the values, and nothing else is ever raised."""

import contextlib
import dataclasses
import json
import math
import pathlib
import random
import re
import sys
from typing import Any

import pytest
from first_hour.pages import ROOT

from bigmac_jax.config import (
    MAY_CHANGE,
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuningConfig,
    check_resume,
    from_dict,
    load_config,
    resume_notes,
    strict_json,
    with_mesh,
    with_overrides,
)
from bigmac_jax.config.blocks import Loop, Stack
from bigmac_jax.config.errors import near_divisors, near_ranks
from bigmac_jax.config.objects import parse_object, seal, unseal
from bigmac_jax.config.reading import retrained
from bigmac_jax.config.reads import unread_for
from bigmac_jax.config.resuming import RATES_MAY_CHANGE, drop_notes
from bigmac_jax.config.section import all_field_types, flat_values
from bigmac_jax.training.workdir import read_config

YOUNGER = (
    "gather_dtype", "reduce_dtype", "compiler_options", "mamba_chunk", "resident_layers", "resident_experts",
    "offload_optimizer",
)  # fmt: skip
MINIMAL = "from bigmac_jax.config import Config\n\ndef get_config():\n    return Config()\n"


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.py"
    path.write_text(MINIMAL)
    return path


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


FIELDS = flat(dataclasses.asdict(Config()))


def refusal(path: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_defaults_load(config_file: pathlib.Path) -> None:
    assert load_config(config_file) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.top_k=8", 8),
        ("model.capacity_factor=inf", math.inf),
        ("model.capacity_factor=2", 2.0),
        ("execution.buffer_factor=1.5", 1.5),
        ("execution.buffer_factor=inf", math.inf),
        ("execution.buffer_factor=auto", "auto"),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("execution.remat=layer", "layer"),
        ("mesh.fsdp=true", True),
        ("model.gated=1", True),
        ("data.source=tfds:wiki40b/en", "tfds:wiki40b/en"),
        ("cache_dir=/tmp/a=b", "/tmp/a=b"),
        ("data.validation_source=", ""),
    ],
)
def test_overrides(config_file: pathlib.Path, override: str, value: Any) -> None:
    loaded = flat(dataclasses.asdict(load_config(config_file, [override])))[override.partition("=")[0]]
    assert loaded == value and type(loaded) is type(value)


def test_the_later_override_wins(config_file: pathlib.Path) -> None:
    assert load_config(config_file, ["model.top_k=2", "model.top_k=3"]).model.top_k == 3


INVALID = {  # overrides: what the line must contain
    # Values of one field
    "model.structure=sparse": ("model.structure='sparse'", "dense, vanilla, fine_grained, bigmac"),
    "model.norm=batch": ("'batch'", "rmsnorm, layernorm"),
    "model.positions=alibi": ("'alibi'", "rope, learned, none"),
    "model.activation=tanh": ("'tanh'", "relu2, gelu, silu"),
    "model.latent_norm=norm": ("'norm'", "pre_dispatch, post_combine"),
    "model.router_scores=linear": ("'linear'", "softmax, sigmoid"),
    "model.balance=loss": ("'loss'", "aux_loss, bias, quantile, none"),
    "execution.dtype=float16": ("'float16'", "float32, bfloat16"),
    "execution.exchange=pigeon": ("'pigeon'", "all_to_all"),
    "model.num_layers=0": ("model.num_layers=0", "at least 1"),
    "model.hidden_size=-4": ("model.hidden_size=-4", "at least 1"),
    "model.top_k=0": ("model.top_k=0", "at least 1"),
    "model.dropout=1": ("model.dropout=1.0", "below 1"),
    "model.dropout=-0.1": ("model.dropout=-0.1", "at least 0"),
    "model.rope_theta=0": ("model.rope_theta=0.0", "above 0"),
    "model.capacity_factor=0": ("model.capacity_factor=0", "above 0", "inf"),
    "execution.buffer_factor=0.9": ("execution.buffer_factor=0.9", "at least 1"),
    "execution.buffer_factor=nan": ("execution.buffer_factor=nan", "finite"),
    "execution.buffer_factor=2 execution.exchange=gather": ("buffer_factor=2", "exchange=gather", "buffer_factor=auto"),
    "execution.buffer_factor=two": ("execution.buffer_factor='two'", "type float or auto"),
    "execution.buffer_factor=": ("execution.buffer_factor=''", "type float or auto"),
    "model.z_loss_coefficient=-1": ("z_loss_coefficient=-1.0", "at least 0"),
    "mesh.expert=0": ("mesh.expert=0", "at least 1"),
    "mesh.data=-1": ("mesh.data=-1", "at least 0"),
    "mesh.tensor=0": ("mesh.tensor=0", "at least 1"),
    "mesh.tensor=3": ("data.sequence_length=256", "mesh.tensor=3", "use mesh.tensor=2 or 4"),
    "mesh.tensor=8 model.num_heads=4": ("model.num_heads=4", "mesh.tensor=8", "use mesh.tensor=4"),
    "mesh.tensor=4 model.num_heads=12 model.hidden_size=384 model.num_kv_heads=6": (
        "model.num_kv_heads=6", "use mesh.tensor=2"),
    "mesh.tensor=4 model.num_heads=4 model.expert_hidden_size=6 mesh.split_experts=True": (
        "experts' width", "=6", "use mesh.tensor=2"),
    "data.batch_size=0": ("data.batch_size=0", "at least 1"),
    "data.sequence_length=0": ("data.sequence_length=0", "at least 1"),
    "optimizer.b2=1": ("optimizer.b2=1.0", "below 1"),
    "optimizer.eps=0": ("optimizer.eps=0.0", "above 0"),
    "train.steps=0": ("train.steps=0", "at least 1"),
    "train.seed=-1": ("train.seed=-1", "at least 0"),
    "train.accumulate_steps=0": ("train.accumulate_steps=0", "at least 1"),
    # Infinities and NaN
    "optimizer.learning_rate=nan": ("optimizer.learning_rate=nan", "finite"),
    "optimizer.learning_rate=inf": ("optimizer.learning_rate=inf", "finite"),
    "model.capacity_factor=nan": ("model.capacity_factor=nan", "finite"),
    "model.down_ratio=inf": ("model.down_ratio=inf", "finite"),
    "model.hidden_size=1" + "0" * 400: ("model.hidden_size=1000",),
    # Types
    "model.top_k=four": ("model.top_k='four'", "type int"),
    "model.top_k=4.5": ("model.top_k='4.5'", "type int"),
    "model.top_k=": ("model.top_k", "type int"),
    "model.top_k": ("model.top_k needs a value",),
    "model.dropout=None": ("model.dropout='None'", "type float"),
    "model.num_layers=None": ("model.num_layers='None'", "type int"),
    "execution.remat=maybe": ("execution.remat='maybe'", "none, layer"),
    "mesh.fsdp=maybe": ("mesh.fsdp='maybe'", "type bool"),
    # Names
    "model.topk=4": ("'model.topk' is not a field", "model.top_k"),
    "model=4": ("'model' is not a field",),
    "modell.top_k=4": ("'modell.top_k' is not a field", "model.top_k"),
    "=4": ("'' is not a field",),
    "": ("'' is not a field",),
    # Combinations
    "model.hidden_size=250": ("model.hidden_size=250", "multiple of model.num_heads=4", "248"),
    "model.num_kv_heads=3": ("model.num_heads=4", "multiple of model.num_kv_heads=3"),
    "model.hidden_size=12": ("= 3 must be even", "rope"),
    "model.num_experts=30 mesh.expert=4": ("model.num_experts=30", "= 4; use model.num_experts=32, or 2 ranks"),
    "mesh.node=2 mesh.expert=3 data.batch_size=18": ("model.num_experts=32", "= 6", "use model.num_experts=36"),
    "model.top_k=33": ("model.top_k=33", "at most model.num_experts=32"),
    "data.batch_size=10 mesh.data=4": ("data.batch_size=10", "= 4", "use 12"),
    "data.batch_size=16 mesh.expert=4 mesh.data=2 train.accumulate_steps=4": ("data.batch_size=16", "= 32", "use 32"),
    "model.down_ratio=0.3": ("0.3 × 256 = 76.8", "whole number"),
    "model.down_ratio=0": ("model.down_ratio=0", "(0, 1]"),
    "model.down_ratio=1.5": ("model.down_ratio=1.5", "(0, 1]"),
    "model.structure=vanilla model.num_experts=16": ("= 1 experts", "at least 2", "model.num_experts=32"),
    "model.structure=vanilla model.num_experts=40": ("= 2.5 experts", "whole number", "model.num_experts=48"),
    "model.vanilla_top_k=3": ("model.vanilla_top_k is always 1 now", "commit d8fd857"),
    "model.structure=vanilla mesh.expert=4": ("vanilla's num_experts=2", "= 4; use model.num_experts=64, or 2 ranks"),
    "model.num_expert_groups=5": ("model.num_experts=32", "multiple of model.num_expert_groups=5; use 4 or 8 groups"),
    "model.top_groups=2": ("model.top_groups=2", "at most model.num_expert_groups=1"),
    "model.num_expert_groups=16": ("model.top_k=4", "at most the 2 experts of model.top_groups=1"),
    "model.structure=dense model.num_heads=3": ("model.hidden_size=256", "model.num_heads=3; use 2 or 4 heads"),
    "model.num_heads=12 model.num_kv_heads=5 model.head_dim=32": ("use 4 or 6 key-value heads",),
    "model.hidden_size=9 model.num_heads=3": ("= 3 must be even", "use model.hidden_size=6"),
    "mesh.expert=5": ("use model.num_experts=35, or 4 or 8 ranks",),
    "execution.overlap_chunks=3": ("must divide the 4096 tokens", "use 2 or 4"),
    "model.structure=fine_grained model.latent_norm=pre_dispatch": ("latent_norm=pre_dispatch", "structure=bigmac"),
    "model.structure=dense model.latent_norm=skip": ("latent_norm=skip", "not structure=dense"),
    "model.balance=quantile model.num_expert_groups=2 model.top_groups=1": ("balance=quantile", "use balance=bias"),
    "model.balance=bias model.balance_step=same": ("balance_step=same is for balance=quantile", "not bias"),
    "tuning.objective=dpo train.init_from=a data.source=a.jsonl data.validation_source=a.jsonl "
    "model.capacity_factor=inf model.balance=quantile model.balance_step=same":
        ("balance_step=same sends an answer", "balance_step=next"),
    "model.balance=quantile model.top_k=32": ("balance=quantile", "model.top_k=32 of 32"),
    "model.overflow=next": ("model.overflow=next", "capacity_factor=inf none is", "use overflow=drop"),
    "model.overflow=next model.capacity_factor=1.25 execution.exchange=dedup": (
        "model.overflow=next", "(auto, all_to_all), not execution.exchange=dedup", "use exchange=all_to_all"),
    "model.overflow=next model.capacity_factor=1.25 model.top_k=31": (
        "model.overflow_tries=2 must be at most 1", "model.top_k=31", "use overflow_tries=1"),
    "model.overflow=next model.capacity_factor=1.25 model.num_expert_groups=4 model.top_groups=1 model.top_k=8": (
        "must be at most 0", "use overflow=drop"),
    "model.group_scores=best": ("'best'", "top_k, top_2"),
    "model.projection_init=ones": ("'ones'", "selection, random"),
    "optimizer.projection_rate=-1": ("-1", "at least 0"),
    "optimizer.name=sgd": ("'sgd'", "adamw, muon"),
    "optimizer.schedule=step": ("'step'", "cosine, linear, constant, wsd"),
    "optimizer.average_decay=1": ("optimizer.average_decay=1.0", "below 1"),
    "optimizer.moment_dtype=bfloat16 optimizer.b2=0.999": ("optimizer.b2=0.999", "at most 0.99"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "parts"), INVALID.items(), ids=INVALID)
def test_invalid(config_file: pathlib.Path, overrides: str, parts: tuple[str, ...]) -> None:
    message = refusal(config_file, *(overrides.split(" ")))
    for part in parts:
        assert part in message


TUNED = "train.init_from=x tuning.lora_rank=1"
DPO = "tuning.objective=dpo train.init_from=x data.source=a.jsonl data.validation_source=a.jsonl"
GROWS = "train.choices_from=2 train.choices_steps=9"
OWN = "model.structure=fine_grained model.down_ratio=0.3 model.num_shared_experts=1 model.shared_expert_hidden_size=5"
ALONE = "tuning.train_router=false"
LIMITS = [  # overrides, a field with the last value that they allow, and the first that they don't; what is said of it
    ("model.num_layers=2", f"model.blocks={'*E' * 256}", f"model.blocks={'*E' * 256}*", "513 branches"),
    ("", f"model.mtp_blocks={'M' * 511}E", f"model.mtp_blocks={'M' * 512}E", "513 branches"),
    ("", "model.mtp_blocks=M*E", "model.mtp_blocks=MEE", "must be one layer"),
    ("", "model.mtp_blocks=*-", "model.mtp_blocks=X-", "may have the letters"),
    ("model.structure=dense", "model.mtp_blocks=*-", "model.mtp_blocks=*E", "has experts (E)"),
    ("", "model.mtp_modules=16", "model.mtp_modules=17", "must be at most 16"),
    ("data.sequence_length=4", "model.mtp_modules=3", "model.mtp_modules=4", "below data.sequence_length=4"),
    ("model.num_layers=4", "model.first_dense_layers=3", "model.first_dense_layers=4", "below model.num_layers=4"),
    ("model.structure=dense", "model.first_dense_layers=0", "model.first_dense_layers=1", "with experts, not dense"),
    ("model.blocks=*E", "model.first_dense_layers=0", "model.first_dense_layers=1", "no blocks"),
    ("model.hidden_size=12", "model.positions=learned", "model.positions=rope", "= 3 must be even"),
    ("model.hidden_size=12", "model.head_dim=4", "model.head_dim=5", "model.head_dim = 5 must be even"),
    ("model.num_heads=8", "model.num_kv_heads=4", "model.num_kv_heads=5", "multiple of model.num_kv_heads=5"),
    ("", "model.down_ratio=1", "model.down_ratio=1.00390625", "must lie in (0, 1]"),
    ("", "model.down_ratio=0.00390625", "model.down_ratio=0.000001", "must be a whole number"),
    ("", "model.down_ratio=0.2500035", "model.down_ratio=0.2500042", "must be a whole number"),
    (OWN, "model.expert_hidden_size=9", "model.expert_hidden_size=0", "must be a whole number"),
    (f"{OWN} model.expert_hidden_size=9", "model.down_ratio=0.3", "model.shared_expert_hidden_size=0", "whole number"),
    (OWN.replace("0.3", "0"), "model.expert_hidden_size=9", "model.expert_hidden_size=0", "must lie in (0, 1]"),
    ("model.structure=vanilla", "model.num_experts=32", "model.num_experts=16", "at least 2"),
    ("", "model.top_k=32", "model.top_k=33", "at most model.num_experts=32"),
    ("model.num_expert_groups=4", "model.top_groups=4", "model.top_groups=5", "at most model.num_expert_groups=4"),
    ("model.num_expert_groups=4 model.top_groups=2", "model.top_k=16", "model.top_k=17", "the 16 experts"),
    ("model.top_groups=1", "model.num_expert_groups=4", "model.num_expert_groups=3", "model.num_expert_groups=3"),
    ("model.balance=quantile", "model.top_k=31", "model.top_k=32", "a free choice"),
    ("model.num_expert_groups=2 model.top_groups=1", "model.balance=bias", "model.balance=quantile", "a free choice"),
    ("model.balance_step=same", "model.balance=quantile", "model.balance=none", "is for balance=quantile"),
    ("model.overflow=next model.capacity_factor=2", "model.top_k=30", "model.top_k=31", "must be at most 1"),
    ("model.overflow=next", "model.capacity_factor=9", "model.capacity_factor=inf", "use overflow=drop"),
    ("model.structure=vanilla", "model.latent_norm=gate", "model.latent_norm=pre_dispatch", "needs structure=bigmac"),
    ("model.structure=dense", "model.latent_norm=none", "model.latent_norm=skip", "needs a layer with experts"),
    ("model.blocks=ME model.mamba_most_step=0.5", "model.mamba_least_step=0.4", "model.mamba_least_step=0.5", "below"),
    ("model.blocks=ME model.mamba_heads=6", "model.mamba_groups=3", "model.mamba_groups=4", "multiple of model"),
    ("model.blocks=ME model.hidden_size=48", "model.mamba_head_dim=32", "model.mamba_head_dim=64", "2 × model.hidden"),
    ("model.blocks=ME model.mamba_head_dim=96", "model.mamba_heads=1", "model.mamba_heads=0", "2 × model.hidden"),
    (TUNED, "tuning.lora_rank=64", "tuning.lora_rank=65", "must be at most 64"),
    ("tuning.lora_rank=8", "train.init_from=x", "train.init_from=", "say which: train.init_from"),
    (DPO, "model.balance_step=next", "model.balance=quantile model.balance_step=same", "use balance_step=next"),
    (DPO, "model.capacity_factor=inf", "model.capacity_factor=2", "use capacity_factor=inf"),
    (DPO, "train.init_from=x", "train.init_from=", "give train.init_from"),
    (DPO, "model.mtp_modules=0", "model.mtp_modules=1", "not trained by tuning.objective=dpo"),
    (DPO, "train.choices_from=0", GROWS.replace("2", "3"), "use choices_from=0"),
    (GROWS, "train.choices_from=3", "train.choices_from=4", "must be below model.top_k=4"),
    (GROWS, "train.choices_steps=1", "train.choices_steps=0", "needs train.choices_steps"),
    (GROWS, "train.choices_from=2", "train.choices_from=1", "a gate that is always 1"),
    (f"{GROWS} train.choices_from=1", "model.router_renormalize=false", "model.router_renormalize=true", "always 1"),
    (f"{GROWS} model.capacity_factor=2", "model.overflow=drop", "model.overflow=next", "finds room for model.top_k"),
    (GROWS, "model.balance=bias", "model.balance=quantile", "solves its bias for model.top_k"),
    ("", "train.experts_per_checkpoint=31", "train.experts_per_checkpoint=32", "must be below model.num_experts=32"),
    ("train.experts_per_checkpoint=1", "model.blocks=*E", "model.blocks=*E*EME", "saves experts of one stack"),
    (ALONE, "model.balance=bias model.balance_bias_rate=0", "model.balance=bias", "moves the router's bias"),
    (ALONE, "model.balance=aux_loss", "model.balance=quantile", "moves the router's bias"),
    (TUNED, "model.balance=none", "model.balance=quantile", "moves the router's bias"),
    ("", "tuning.teacher_weight=1 model.balance=quantile", "tuning.teacher_weight=1.001", "must be at most 1"),
    (DPO, "tuning.teacher=", "tuning.teacher=y", "has its own reference"),
    (DPO, "tuning.dpo_beta=0.001", "tuning.dpo_beta=0", "must be above 0"),
    (TUNED, "tuning.lora_alpha=0.001", "tuning.lora_alpha=0", "must be above 0"),
    (TUNED, "tuning.lora_targets=mlp,mamba", "tuning.lora_targets=mlp,mam", "must be some of"),
    (f"{TUNED} {ALONE}", "tuning.lora_targets=mlp", "tuning.lora_targets=mlp,router", "names the router"),
    ("tuning.teacher=y", "model.mtp_modules=0", "model.mtp_modules=1", "not trained beside a teacher"),
    ("execution.resident_layers=1", "execution.resident_experts=0", "execution.resident_experts=1", "are two ways"),
    ("execution.buffer_factor=1", "execution.exchange=dedup", "execution.exchange=gather", "needs an exchange"),
    ("execution.exchange=gather", "execution.buffer_factor=inf", "execution.buffer_factor=9", "needs an exchange"),
    ("mesh.replica_optimizer=sharded", "mesh.replica=1", "mesh.replica=2", "use it with mesh.fsdp=True"),
    ("mesh.replica_optimizer=sharded mesh.replica=2", "mesh.fsdp=true", "mesh.fsdp=false", "use it with mesh.fsdp"),
    ("train.experts_per_checkpoint=1 model.mtp_modules=1", "model.mtp_blocks=*-", "model.mtp_blocks=*E", "next-token"),
    (TUNED, "train.experts_per_checkpoint=0", "train.experts_per_checkpoint=1", "trains adapters"),
    ("train.spike_factor=0", "train.spike_factor=1.001", "train.spike_factor=1", "must be above 1"),
    ("optimizer.moment_dtype=bfloat16", "optimizer.b1=0.99", "optimizer.b1=0.9901", "must be at most 0.99"),
    ("optimizer.moment_dtype=bfloat16", "optimizer.momentum=0.99", "optimizer.momentum=0.9901", "must be at most 0.99"),
    ("train.tasks=piqa", "train.tasks_every=5", "train.tasks= train.tasks_every=5", "needs train.tasks"),
    ("data.documents=masked", "data.packing=best_fit", "data.documents=stream data.packing=best_fit", "needs data.doc"),
    ("mesh.tensor=2", "model.num_kv_heads=1", "model.num_heads=9 model.num_kv_heads=3 model.head_dim=8", "num_heads=9"),
    ("mesh.tensor=4 model.num_heads=12 model.head_dim=8", "model.num_kv_heads=4", "model.num_kv_heads=6", "or divide"),
    ("mesh.tensor=2", "model.vocab_size=300", "model.vocab_size=301", "model.vocab_size=301 must be a multiple"),
    ("mesh.tensor=2 model.blocks=ME model.mamba_heads=6", "model.mamba_groups=2", "model.mamba_groups=3", "mamba_g"),
    ("mesh.tensor=2 model.blocks=*E*-", "model.dense_hidden_size=6", "model.dense_hidden_size=7", "the MLPs' width"),
    ("mesh.tensor=2 model.structure=dense", "model.expert_hidden_size=6", "model.expert_hidden_size=7", "MLP's width"),
    ("mesh.tensor=2 model.expert_hidden_size=7", "mesh.split_experts=false", "mesh.split_experts=true", "experts'"),
    ("mesh.expert=4", "model.num_experts=36", "model.num_experts=34", "must be a multiple of mesh.node"),
    ("mesh.data=3 mesh.replica=2", "data.batch_size=12", "data.batch_size=9", "must be a multiple of mesh.replica"),
    ("data.batch_size=3 data.sequence_length=4", "execution.overlap_chunks=6", "execution.overlap_chunks=8", "the 12"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "last", "first", "part"), LIMITS, ids=[row[2][:60] for row in LIMITS])
def test_the_limits_of_what_goes_together(
    config_file: pathlib.Path, overrides: str, last: str, first: str, part: str
) -> None:
    allowed = load_config(config_file, [*overrides.split(), *last.split()])
    assert allowed == with_overrides(allowed, [])
    assert part in refusal(config_file, *overrides.split(), *first.split())


FILES = {
    "raises": ("def get_config():\n    raise RuntimeError('boom\\nbang')\n", ("RuntimeError at line 2", "boom bang")),
    "exits": ("import sys\nsys.exit(3)\n", ("SystemExit at line 2",)),
    "syntax": ("def get_config(:\n", ("SyntaxError at line 1",)),
    "imports nothing": ("import no_such_module\n", ("ModuleNotFoundError at line 1", "no_such_module")),
    "no get_config": ("x = 1\n", ("broken.py has no get_config(); define one that returns a Config, as load_config(",)),
    "returns None": ("def get_config():\n    return None\n", ("NoneType, not a Config",)),
    "returns a number": ("def get_config():\n    return 7\n", ("int, not a Config",)),
    "returns the class": (MINIMAL.replace("Config()", "Config"), ("type, not a Config",)),
    "wants an argument": ("def get_config(name):\n    return name\n", ("TypeError: get_config() missing",)),
    "invalid": (
        "from bigmac_jax.config import *\ndef get_config():\n    return Config(model=ModelConfig(top_k=99))\n",
        ("model.top_k=99",),
    ),
    "unprintable error": (
        "class E(Exception):\n    def __str__(self):\n        return None\n\ndef get_config():\n    raise E\n",
        ("E at line 6",),
    ),
    "null byte": ("x = '\0'\n", ("null byte",)),
    "ConfigDict with an unknown field": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'modle': 1})\n",
        ("'modle' is not a field", "model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), FILES.values(), ids=FILES)
def test_broken_config_files(tmp_path: pathlib.Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    message = refusal(path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("write_bytecode", [True, False])
def test_a_file_is_read_as_it_is_now(
    tmp_path: pathlib.Path, write_bytecode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as it was in the same second, nor by another name; and it may hold what looks for its module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", not write_bytecode)
    path = tmp_path / "2026-01-01T10:30.py"
    text = (
        "from __future__ import annotations\nimport dataclasses\nfrom bigmac_jax.config import *\n"
        "@dataclasses.dataclass\nclass Own:\n    x: int\n"
        "def get_config():\n    return Config(model=ModelConfig(top_k={}))\n"
    )
    for top_k in (1, 2, 4):
        path.write_text(text.format(top_k))
        assert load_config(path).model.top_k == top_k
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"train": {"wandb": None}}, "train.wandb is None, and a field is a text, a number or a bool; leave it out"),
        ({"data.mixture": ["sotu=1"]}, "data.mixture is ['sotu=1'], and a field is a text"),
        ("train.steps=10", "the overrides are a text, 'train.steps=10'; give a list, ['train.steps=10'], or a dict"),
    ],
)
def test_overrides_of_no_field(overrides: Any, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    assert part in str(caught.value)


def test_other_files(tmp_path: pathlib.Path) -> None:
    assert "is not a file" in refusal(tmp_path / "missing.py")
    assert "is not a file" in refusal(tmp_path)
    assert "is not a file" in refusal("")
    (tmp_path / "binary.py").write_bytes(bytes(range(128, 256)))
    refusal(tmp_path / "binary.py")
    (tmp_path / "config.yaml").write_text(MINIMAL)
    assert "config.yaml' is neither .py nor .json; give a file of Python" in refusal(tmp_path / "config.yaml")
    # Paths that the file system itself refuses, or that would break the line.
    refusal("~no_such_user/config.py")
    refusal("x" * 5000)
    refusal("two\nlines.py")
    for text in (
        "{",
        "[]",
        "3",
        '{"model": 3}',
        '{"model": {"top_k": "4"}}',
        '{"model": {"top_k": null}}',
        '{"x": 1}',
        '{"a\\nb": 1}',
    ):
        (tmp_path / "config.json").write_text(text)
        refusal(tmp_path / "config.json")


def test_a_file_with_an_argument_and_a_config_dict(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sized.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(size):\n    return ConfigDict({'model': {'hidden_size': int(size)}})\n"
    )
    assert load_config(f"{path}:64").model.hidden_size == 64
    assert "TypeError: get_config() missing" in refusal(path)  # no line of another file


def test_a_config_file_as_the_docs_write_it(tmp_path: pathlib.Path) -> None:
    """docs/training.md: a shipped config with changes, an argument, and a partial JSON file over the defaults."""
    text = (ROOT / "docs" / "training.md").read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mine.py").write_text(text)
    config = load_config(tmp_path / "mine.py")
    assert config == load_config(f"{tmp_path}/mine.py:400") == load_config("tiny", {"train.steps": 400})
    assert load_config(f"{tmp_path}/mine.py:7").train.steps == 7
    (tmp_path / "part.json").write_text('{"train": {"steps": 7}}')
    assert load_config(tmp_path / "part.json") == load_config({"train.steps": 7})


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_a_folder_of_hugging_face_is_no_run(tmp_path: pathlib.Path, key: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"vocab_size": 7, "{key}": "x"}}')
    said = (
        f"{tmp_path} is a Hugging Face folder, not a run; make one with bigmac convert import --checkpoint={tmp_path} "
    )
    assert refusal(tmp_path / "config.json").startswith(said)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_config(tmp_path)


def test_from_dict_refuses_wrong_types() -> None:
    for values in ({"model": {"top_k": True}}, {"model": {"gated": 1}}, {"data": {"source": 3}}, {"cache_dir": None}):
        with pytest.raises(ConfigError, match=r"must be (of type|a) "):
            from_dict(values)


def test_nothing_but_config_error(config_file: pathlib.Path) -> None:
    """300 random overrides: a valid Config, or ConfigError with one line."""
    rng = random.Random(0)
    names = [*FIELDS, "model", "mesh", "", "model.", "nothing", "model.top_k.x", "--config.model.top_k"]
    values = ["", "0", "-1", "1", "3", "7", "0.25", "1e309", "nan", "inf", "-inf", "10" * 30, "1" + "0" * 400, "None",
              "null", "True", "x", "[1]", "{}", "1,2", "0x10", "1_000", "'", '"', "\\", "\n", "\0", "é", "=", "%s",
              "{0}", " 4", "()", "bfloat16"]  # fmt: skip
    loaded = 0
    for _ in range(300):
        overrides = [f"{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.choice((1, 1, 2)))]
        try:
            assert isinstance(load_config(config_file, overrides), Config)
            loaded += 1
        except ConfigError as error:
            assert str(error) and "\n" not in str(error), overrides
        except Exception as error:
            raise AssertionError(f"{overrides} raised {error!r}") from error
    assert 10 < loaded < 290


def test_json_round_trip(tmp_path: pathlib.Path) -> None:
    config = Config(model=ModelConfig(capacity_factor=math.inf, structure="vanilla", dropout=0.1))
    text = config.to_json()
    assert json.loads(text)["model"]["capacity_factor"] == "inf"  # JSON has no infinity
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Config.from_json(text) == config.resolved
    (tmp_path / "config.json").write_text(text)
    assert load_config(tmp_path / "config.json", ["train.steps=7"]).train.steps == 7
    with pytest.raises(ConfigError, match=r"there\.json is not valid JSON"):
        Config.from_json("{", "there.json")


def changed(name: str) -> Config:
    """The default config with the field `name` at another valid value."""
    special = {  # fields whose next number or word is not valid
        "execution.buffer_factor": 2.0, "model.capacity_factor": 2.0, "model.hidden_size": 512, "model.num_heads": 8,
        "model.num_kv_heads": 2, "model.head_dim": 32, "model.down_ratio": 0.5, "model.num_expert_groups": 2,
        "model.dropout": 0.5, "mesh.node": 2, "mesh.expert": 2, "mesh.data": 2, "data.batch_size": 32,
        "train.accumulate_steps": 2, "optimizer.b1": 0.8, "optimizer.b2": 0.9, "optimizer.projection_rate": 0.5,
        "optimizer.momentum": 0.9, "optimizer.average_decay": 0.9, "data.mixture": "x=1", "train.spike_factor": 2.0,
        "tuning.teacher_weight": 0.7, "tuning.lora_dropout": 0.5, "execution.compiler_options": "xla_a=1",
        "model.blocks": "*E*-", "model.mtp_blocks": "*-", "model.mamba_most_step": 2.0,
    }  # fmt: skip
    value, choices = FIELDS[name], all_field_types(Config)[name].choices
    if name in special:
        new = special[name]
    elif choices:
        new = next(choice for choice in choices if choice != value)
    elif isinstance(value, str):
        new = value + "x"
    else:
        new = not value if isinstance(value, bool) else value + 1
    section, _, field = name.rpartition(".")
    return from_dict({section: {field: new}} if section else {field: new})


# Fields that have no other valid value while the rest is as it is.
BOUND = ("model.top_groups", "data.packing", "data.curriculum", "train.tasks_every", "tuning.objective",
         "tuning.lora_rank", "model.balance_step", "model.overflow", "train.choices_from")  # fmt: skip


BEFORE = flat(dataclasses.asdict(Config().resolved))


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in BOUND])
def test_check_resume(name: str) -> None:
    """How a run is executed may change, and where its data lies; what is computed may not, and is refused by name."""
    allowed = {"train.steps", "train.accumulate_steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
               "train.keep_checkpoints", "train.experts_per_checkpoint", "train.partial_checkpoint",
               "train.most_lost_updates", "train.on_bad_step", "train.max_bad_steps", "train.spike_factor", "cache_dir",
               "train.wandb", "data.source", "data.validation_source", "data.test_source", "data.tokenizer",
               "data.num_workers", "data.mixture", "train.tasks", "train.tasks_limit", "model.context_length",
               "tuning.chat_template", "optimizer.clip_norm", "model.balance_scope", *RATES_MAY_CHANGE}  # fmt: skip
    if name in allowed or name.startswith(("mesh.", "execution.")):
        check_resume(Config(), changed(name))
        return
    assert name.startswith(("model.", "data.", "optimizer.", "train.", "tuning."))
    with pytest.raises(ConfigError) as error:
        check_resume(Config(), changed(name))
    message = str(error.value)
    assert message.startswith(name + "=") and "\n" not in message and repr(BEFORE[name]) in message
    assert ("train.init_from=THIS" in message) == (not name.startswith("model."))  # which takes the model as it is


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0)])
def test_clipping_stays_on_or_off(before: float, after: float) -> None:
    """The optimizer's state has a part for it, which a checkpoint must hold."""
    old, new = (Config(optimizer=OptimizerConfig(clip_norm=norm)) for norm in (before, after))
    with pytest.raises(ConfigError, match=rf"optimizer\.clip_norm={after} differs from {before}"):
        check_resume(old, new)


def test_the_step_that_quantiles_are_of_stays() -> None:
    next_, same = (Config(model=ModelConfig(balance="quantile", balance_step=step)) for step in ("next", "same"))
    with pytest.raises(ConfigError, match=r"model\.balance_step='same' differs from 'next'"):
        check_resume(next_, same)


def test_the_scope_of_the_balance_loss_stays_where_there_are_parts() -> None:
    """A whole batch is its own part: a run begun when the default was the step goes on, in parts, too, as one begun now
    does, with a line."""
    (before, one), (parted, two) = (
        [
            Config(model=ModelConfig(balance_scope=scope), train=TrainConfig(accumulate_steps=parts))
            for scope in ("step", "part")
        ]
        for parts in (1, 2)
    )
    line = "with model.balance_scope=part the balance loss is of other parts from here on"
    for saved, new, told in (
        (before, one, []),
        (before, two, [f"train.accumulate_steps 1 → 2: {line}"]),
        (two, before, [f"train.accumulate_steps 2 → 1: {line}"]),
        (parted, one, []),  # the same loss
        (one, parted, []),
    ):
        check_resume(saved, new)
        assert resume_notes(saved, new, {}, {}) == told
    for saved, new, name in (parted, two, "part"), (two, parted, "step"):
        with pytest.raises(ConfigError, match=rf"^model\.balance_scope='{name}' differs from '(part|step)', which"):
            check_resume(saved, new)
    for unread in ({"balance": "bias"}, {"balance": "quantile"}, {"balance": "none"}, {"structure": "dense"}):
        check_resume(*(dataclasses.replace(c, model=dataclasses.replace(c.model, **unread)) for c in (parted, two)))


def test_what_becomes_of_an_overflow_stays() -> None:
    drop, next_ = (Config(model=ModelConfig(overflow=overflow, **FULL)) for overflow in ("drop", "next"))
    with pytest.raises(ConfigError, match=r"model\.overflow='next' differs from 'drop'"):
        check_resume(drop, next_)


FULL = {"capacity_factor": 1.25}


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ({}, {"remat": "layer", "attention": "xla", "dtype": "bfloat16"}, []),
        (FULL, {"overlap_chunks": 2}, ["execution.overlap_chunks 1 → 2: which choices find their expert full"]),
        (FULL, {"exchange": "gather"}, ["execution.exchange=gather: model.capacity_factor=1.25 is not read"]),
        (FULL, {"exchange": "dedup", "expert": 1}, ["one rank of experts: model.capacity_factor=1.25 is not read"]),
        ({}, {"exchange": "dedup", "overlap_chunks": 2, "buffer_factor": 2.0}, []),
        (FULL | {"structure": "dense"}, {"overlap_chunks": 2}, []),
        ({"balance_scope": "step"}, {"accumulate_steps": 2}, []),
        ({"dropout": 0.1}, {"accumulate_steps": 2},
         ["train.accumulate_steps 1 → 2: with model.balance_scope=part", "model.dropout draws other entries"]),
        ({"balance": "quantile", "balance_step": "same"}, {"accumulate_steps": 2},
         ["train.accumulate_steps 1 → 2: with model.balance_step=same"]),
        ({"balance": "quantile"}, {"accumulate_steps": 2},
         ["train.accumulate_steps 1 → 2: with model.balance=quantile the biases that tokens require are counted in "
          "bins, and not sorted, from here on"]),
        ({"balance": "quantile"}, {"replica": (2, 1)},
         ["mesh.replica 2 → 1: with model.balance=quantile the biases that tokens require are sorted, and not"]),
        ({"balance": "quantile"}, {"replica": (1, 2), "accumulate_steps": 2},
         ["train.accumulate_steps 1 → 2, mesh.replica 1 → 2: with model.balance=quantile"]),
        ({"balance": "quantile"}, {"replica": (2, 4)}, []),
        ({"balance": "none"}, {"accumulate_steps": 2, "lora": True},
         ["train.accumulate_steps 1 → 2: tuning.lora_dropout draws other entries from here on"]),
        ({"balance": "quantile", "mtp_modules": 1}, {"accumulate_steps": 2}, []),  # padding
        (FULL, {"expert": 4}, ["mesh.expert 2 → 4: which choices"]),
    ],
)  # fmt: skip
def test_resume_notes(model: dict[str, Any], changes: dict[str, Any], said: list[str]) -> None:
    """What changes more than rounding is said, a line each."""
    lora = TuningConfig(lora_rank=2 * changes.pop("lora", False), lora_dropout=0.5)
    train = TrainConfig(init_from="runs/a" if lora.lora_rank else "")
    before = Config(model=ModelConfig(**model), train=train, tuning=lora)
    parts = dataclasses.replace(train, accumulate_steps=changes.pop("accumulate_steps", 1))
    ranks, replicas = changes.pop("expert", 2), changes.pop("replica", (1, 1))
    after = dataclasses.replace(before, execution=ExecutionConfig(**changes), train=parts)
    # A run from before there were replicas had one.
    mesh = {"data": 1, "expert": 2} | ({"replica": replicas[0]} if replicas[0] > 1 else {})
    notes = resume_notes(before, after, mesh, {"replica": replicas[1], "data": 1, "expert": ranks})
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True)), notes
    assert not any("\n" in note for note in notes)


def test_what_another_split_drops_is_said() -> None:
    """Where a capacity is read no more, is read again, or is that of other ranks; and where neither has one."""
    sent, alone, gathered, halves = (
        load_config("tiny", ["model.capacity_factor=1.25", *fields])
        for fields in (
            ["mesh.expert=4"],
            ["execution.exchange=dedup"],
            ["mesh.expert=4", "execution.exchange=gather"],
            ["mesh.expert=4", "train.accumulate_steps=2"],
        )
    )
    unread = "model.capacity_factor=1.25 is not read, and nothing is dropped"
    assert drop_notes(sent, alone) == [f"one rank of experts: {unread}"]
    assert drop_notes(sent, gathered) == [f"execution.exchange=gather: {unread}"]
    (read,) = drop_notes(alone, sent)
    assert read == "model.capacity_factor=1.25 is read: choices that find their expert full are dropped"
    (other,) = drop_notes(sent, halves)
    assert other.startswith("train.accumulate_steps 1 → 2: which choices find their expert full")
    assert drop_notes(sent, sent) == drop_notes(alone, gathered) == []
    assert drop_notes(load_config("tiny"), load_config("tiny", ["mesh.expert=4"])) == []


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ExecutionConfig)])
def test_a_moved_field_is_one_line_with_its_new_name(config_file: pathlib.Path, name: str) -> None:
    value = getattr(ExecutionConfig(), name)
    if name in YOUNGER:  # never were the model's
        assert "is not a field" in refusal(config_file, f"model.{name}={value}")
        return
    message = refusal(config_file, f"model.{name}={value}")
    assert message == f"model.{name} is execution.{name} now; use --config.execution.{name}={value}"
    with pytest.raises(ConfigError, match=f"model.{name} is execution.{name} now"):
        from_dict({"model": {name: value}})


# What train.py of commit d8fd857 wrote for configs/tiny.py with four fields changed.
SAVED = """{"model": {"structure": "vanilla", "num_layers": 3, "hidden_size": 128, "num_heads": 2, "num_kv_heads": 0,
"head_dim": 0, "vocab_size": 8192, "norm": "rmsnorm", "norm_eps": 1e-06, "positions": "rope", "rope_theta": 10000.0,
"activation": "relu2", "gated": false, "use_bias": false, "qk_norm": true, "tie_embeddings": true,
"scale_embedding": true, "dropout": 0.0, "num_experts": 64, "top_k": 4, "vanilla_top_k": 1, "first_dense_layers": 0,
"dense_hidden_size": 0, "down_ratio": 0.25, "expert_hidden_size": 0, "num_shared_experts": 1,
"shared_expert_hidden_size": 256, "latent_norm": "none", "projection_init": "selection", "capacity_factor": 1.25,
"router_scores": "softmax", "router_renormalize": true, "router_scale": 2.0, "balance": "aux_loss",
"balance_coefficient": 0.01, "balance_step": "next", "balance_scope": "step", "balance_bias_rate": 0.001,
"z_loss_coefficient": 0.0, "num_expert_groups": 1, "top_groups": 1, "group_scores": "top_k"}, "execution":
{"dtype": "float32", "gather_dtype": "", "reduce_dtype": "float32", "exchange": "all_to_all", "wire_dtype": "",
"wire_dtype_backward": "", "buffer_factor": "inf", "overlap_chunks": 1, "attention": "auto", "grouped_matmul": "auto",
"remat": "layer", "unroll_layers": 0}, "mesh": {"data": 0, "node": 1, "expert": 1, "tensor": 1, "fsdp": false,
"split_experts": false}, "data": {"source": "sotu", "validation_source": "", "test_source": "", "mixture": "",
"curriculum": "", "text_field": "text", "tokenizer": "bpe", "sequence_length": 256, "documents": "stream",
"packing": "stream", "batch_size": 8, "num_workers": 0}, "optimizer": {"name": "adamw", "schedule": "cosine",
"learning_rate": 0.006, "final_learning_rate": 0.0001, "projection_rate": 1.0, "warmup_steps": 100, "decay_steps": 0,
"b1": 0.9, "b2": 0.98, "eps": 1e-08, "momentum": 0.95, "moment_dtype": "float32", "average_decay": 0.0,
"weight_decay": 0.1, "clip_norm": 1.0}, "train": {"init_from": "", "steps": 2400, "accumulate_steps": 1, "seed": 1234,
"log_every": 20, "eval_every": 600, "checkpoint_every": 600, "keep_checkpoints": 2, "on_bad_step": "stop",
"max_bad_steps": 10, "spike_factor": 0.0, "wandb": "", "tasks": "", "tasks_every": 0, "tasks_limit": 100}, "tuning":
{"objective": "pretrain", "chat_template": "", "bad_rows": "stop", "train_router": true, "lora_rank": 0,
"lora_alpha": 16.0, "lora_dropout": 0.0, "lora_targets": "attention,projections,shared,experts", "teacher": "",
"teacher_weight": 0.5, "hidden_weight": 0.0, "dpo_beta": 0.1}, "cache_dir": "/somewhere/else"}"""


def test_a_config_of_an_earlier_version_is_read_as_it_was_written() -> None:
    config = Config.from_json(SAVED)
    assert config.model == ModelConfig(
        "vanilla", num_layers=3, hidden_size=128, num_heads=2, num_experts=64, num_shared_experts=1, router_scale=2.0,
        shared_expert_hidden_size=256, latent_norm="none", capacity_factor=1.25, balance_coefficient=0.01,
        balance_scope="step",
    )  # fmt: skip
    assert config.model.choices == 1 and config.cache_dir == Config.cache_dir
    assert config.execution == ExecutionConfig(remat="layer", buffer_factor=math.inf)
    written, read = json.loads(SAVED), json.loads(config.to_json())
    assert written["model"].pop("vanilla_top_k") == 1 and written.pop("cache_dir")
    assert read["data"].pop("null_rows") == "stop"  # these fields are younger
    assert read["model"].pop("context_length") == 0 and read["execution"].pop("mamba_chunk")
    mamba = {name: read["model"].pop(name) for name in list(read["model"]) if name.startswith("mamba_")}
    assert len(mamba) == 9 and mamba["mamba_most_step"] == "inf"
    assert read["model"].pop("blocks") == ""
    assert read["model"].pop("overflow") == "drop" and read["model"].pop("overflow_tries") == 2
    assert (read["model"].pop("router"), read["model"].pop("hyper_width")) == ("linear", 64)
    assert read["train"].pop("choices_from") == read["train"].pop("choices_steps") == 0
    assert read["execution"].pop("compiler_options") == "" and not read["execution"].pop("offload_optimizer")
    assert read["execution"].pop("resident_layers") == read["execution"].pop("resident_experts") == 0
    assert read["train"].pop("experts_per_checkpoint") == 0 and read["train"].pop("partial_checkpoint") == "both"
    assert read["train"].pop("most_lost_updates") == 0.0375
    assert (read["model"].pop("mtp_modules"), read["model"].pop("mtp_blocks")) == (0, "")
    assert read["train"].pop("mtp_weight") == 0.3
    assert read["mesh"].pop("replica") == 1 and read["mesh"].pop("replica_optimizer") == "copied"
    assert read == written and Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"model\.capacity_factor=inf differs from 1\.25, "):
        check_resume(
            config, dataclasses.replace(config, model=dataclasses.replace(config.model, capacity_factor=math.inf))
        )
    check_resume(config, dataclasses.replace(config, execution=ExecutionConfig()))  # with other buffers
    with pytest.raises(ConfigError, match=r"model\.vanilla_top_k is always 1 now; commit d8fd857 has the field"):
        Config.from_json(SAVED.replace('"vanilla_top_k": 1', '"vanilla_top_k": 2'))


def test_numbers_or_auto_change_to_each_other(tmp_path: pathlib.Path) -> None:
    for value, execution in (("auto", ExecutionConfig()), ("2.0", ExecutionConfig(buffer_factor=2))):
        (tmp_path / "config.json").write_text(Config(execution=execution).to_json())
        for new in ("auto", "inf", "1.5", value):
            field = f"execution.buffer_factor={new}"
            found = load_config(tmp_path / "config.json", [field]).execution.buffer_factor
            assert str(found) == new
            assert with_mesh(Config(execution=execution), [field]).execution.buffer_factor == found


def test_auto_is_saved_as_what_it_is(tmp_path: pathlib.Path) -> None:
    """A default may change."""
    for structure, norm in {"bigmac": "skip", "fine_grained": "none", "dense": "none"}.items():
        config = Config(model=ModelConfig(structure))
        assert json.loads(config.to_json())["model"]["latent_norm"] == norm
        check_resume(Config.from_json(config.to_json()), config)
    (tmp_path / "config.json").write_text(Config().to_json())  # of which the structure can still be changed alone
    assert load_config(tmp_path / "config.json", ["model.structure=fine_grained"]).model.latent_norms == ()
    before = Config(model=ModelConfig(latent_norm="post_combine"))
    with pytest.raises(ConfigError, match=r"model\.latent_norm='skip' differs from 'post_combine', "):
        check_resume(before, Config())


def test_what_w_down_and_w_up_start_as(tmp_path: pathlib.Path) -> None:
    """From a selection they move slowly, unless a rate is given."""
    random, given = ModelConfig(projection_init="random"), OptimizerConfig(projection_rate=0.5)
    for config, rate in (Config(), 0.125), (Config(random), 1.0), (Config(random, optimizer=given), 0.5):
        assert config.projection_rate == rate
        assert json.loads(config.to_json())["optimizer"]["projection_rate"] == rate
        check_resume(Config.from_json(config.to_json()), config)
    (tmp_path / "config.json").write_text(Config().to_json())
    config = load_config(tmp_path / "config.json", ["model.projection_init=random"])  # which takes the rate along
    assert config.projection_rate == 1.0
    (tmp_path / "config.json").write_text(Config(optimizer=given).to_json())
    config = load_config(tmp_path / "config.json", ["model.projection_init=random"])
    assert config.projection_rate == 0.5
    with pytest.raises(ConfigError, match=r"model\.projection_init='selection' differs from 'random', "):
        check_resume(Config(random), Config())
    # Other structures have neither.
    before = Config(ModelConfig("fine_grained", projection_init="random"))
    for init in ("random", "selection"):
        now = Config(ModelConfig("fine_grained", projection_init=init))
        assert now.projection_rate == 1.0
        check_resume(before, now)
    given_rate = dataclasses.replace(before, optimizer=given)  # its optimizer's state is another tree
    check_resume(given_rate, given_rate)
    for saved, now, value in (given_rate, before, 0.5), (before, given_rate, 1.0):
        with pytest.raises(ConfigError, match=rf"^optimizer\.projection_rate=.* was started with; keep {value}, or"):
            check_resume(saved, now)


def test_the_context_length_is_of_the_model_and_not_of_its_windows() -> None:
    """It is at least a window; learned positions alone are as many, and stay."""
    rope, learned = (Config(ModelConfig(positions=positions)) for positions in ("rope", "learned"))
    assert rope.context_length == 256 and "context_length" in json.loads(rope.to_json())["model"]
    longer, shorter = (with_overrides(learned, [f"model.context_length={length}"]) for length in (300, 200))
    assert longer.context_length == 300 and shorter.context_length == 256
    check_resume(learned, shorter)
    check_resume(rope, with_overrides(rope, ["model.context_length=300"]))  # only what exports say
    with pytest.raises(ConfigError, match=r"model\.context_length=300 differs from 256, "):
        check_resume(learned, longer)
    for given, context in (
        (["data.sequence_length=128"], 300),  # the model has learned more
        (["data.sequence_length=512"], 512),
        (["data.sequence_length=128", "model.context_length=200"], 200),
    ):
        assert retrained(longer, given).context_length == context
    assert retrained(rope, ["data.sequence_length=128"]).context_length == 256
    assert with_overrides(rope, ["data.sequence_length=128"]).context_length == 128  # of a model that is new


def test_check_resume_lists_fields_that_exist() -> None:
    for prefix in MAY_CHANGE:
        assert any(name.startswith(prefix) for name in FIELDS), prefix
    check_resume(Config(), Config())


def test_resolved_sizes() -> None:
    bigmac = ModelConfig(hidden_size=256, num_experts=32, top_k=4, down_ratio=0.25)
    assert (bigmac.wire_size, bigmac.expert_width, bigmac.expert_count, bigmac.choices) == (64, 256, 32, 4)
    fine = dataclasses.replace(bigmac, structure="fine_grained")
    assert (fine.wire_size, fine.expert_width, fine.expert_count, fine.choices) == (256, 64, 32, 4)
    vanilla = dataclasses.replace(bigmac, structure="vanilla")
    assert (vanilla.wire_size, vanilla.expert_width, vanilla.expert_count, vanilla.choices) == (256, 1024, 2, 1)
    # The three have equal expert parameters.
    assert len({2 * m.wire_size * m.expert_width * m.expert_count for m in (bigmac, fine, vanilla)}) == 1
    dense = dataclasses.replace(bigmac, structure="dense")
    assert (dense.wire_size, dense.expert_width, dense.expert_count, dense.choices) == (256, 1024, 0, 0)


BASE = {"hidden_size": 96, "num_heads": 6, "num_experts": 32, "top_k": 3, "down_ratio": 0.25, "num_layers": 4}
GROUPS = {"num_expert_groups": 4, "top_groups": 2, "top_k": 8}
VANILLA = {"structure": "vanilla"}
DENSE = {"structure": "dense", "latent_norm": "none"}
SIZES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # fields of a model of `BASE`: what it makes of them
    ({}, {"head_size": 16, "kv_heads": 6, "latent_size": 24, "wire_size": 24, "expert_width": 96, "expert_count": 32,
          "choices": 3, "mlp_width": 384, "shared_width": 0, "mamba_head_count": 3, "mamba_width": 192, "depth": 4,
          "latent_norms": ("skip", "post_combine"), "has_router_bias": False, "counts_loads_first": False}),
    ({"head_dim": 20, "num_kv_heads": 2}, {"head_size": 20, "kv_heads": 2}),
    ({"mamba_head_dim": 32}, {"mamba_head_count": 6, "mamba_width": 192}),
    ({"mamba_head_dim": 32, "mamba_heads": 10}, {"mamba_head_count": 10, "mamba_width": 320}),
    ({"dense_hidden_size": 100}, {"mlp_width": 100}),
    (DENSE | {"dense_hidden_size": 100}, {"mlp_width": 384, "expert_count": 0, "choices": 0, "is_moe": False}),
    (DENSE | {"expert_hidden_size": 50}, {"mlp_width": 50, "moe_layers": 0, "mlp_layers": 4}),
    ({"down_ratio": 0.333333}, {"latent_size": 32}),
    ({"structure": "fine_grained"}, {"wire_size": 96, "expert_width": 24, "latent_norms": (), "choices": 3}),
    (VANILLA, {"wire_size": 96, "expert_width": 384, "expert_count": 2, "choices": 1, "latent_norms": ()}),
    (VANILLA | {"down_ratio": 0.5}, {"expert_count": 4, "count_name": "vanilla's num_experts"}),
    ({"expert_hidden_size": 50}, {"expert_width": 50, "count_name": "model.num_experts"}),
    ({"num_shared_experts": 3}, {"shared_width": 72}),
    ({"num_shared_experts": 3, "shared_expert_hidden_size": 50}, {"shared_width": 150}),
    ({"balance": "bias"}, {"has_router_bias": True}),
    ({"balance": "quantile"}, {"has_router_bias": True}),
    ({"balance": "none", "balance_scope": "step"}, {"has_router_bias": False, "counts_loads_first": False}),
    ({"balance_scope": "step"}, {"counts_loads_first": True}),
    (DENSE | {"balance_scope": "step"}, {"counts_loads_first": False}),
    ({"latent_norm": "none"}, {"latent_norms": ()}),
    ({"latent_norm": "pre_dispatch"}, {"latent_norms": ("pre_dispatch",)}),
    ({"latent_norm": "gate"}, {"latent_norms": ("skip", "post_combine", "gate")}),
    (GROUPS, {"group_best": 4}),
    (GROUPS | {"group_scores": "top_2"}, {"group_best": 2}),
    (GROUPS | {"num_experts": 8, "top_k": 4, "top_groups": 4}, {"group_best": 1}),
    (GROUPS | {"num_experts": 4, "top_k": 2, "group_scores": "top_2"}, {"group_best": 1}),
    (GROUPS | {"top_k": 1}, {"group_best": 1}),
    (GROUPS | {"top_k": 16, "num_experts": 24, "top_groups": 3}, {"group_best": 5}),
    ({"first_dense_layers": 1}, {"loops": (Loop(("*-",), 1), Loop(("*E",), 3)), "moe_layers": 3, "mlp_layers": 1}),
    ({"blocks": "ME*E", "num_layers": 2}, {"loops": (Loop(("ME", "*E"), 2),), "moe_layers": 4, "mamba_layers": 2}),
    ({"blocks": "*E*E", "num_layers": 1}, {"loops": (Loop(("*E",), 2),), "depth": 2}),
    (DENSE | {"blocks": "*EM-", "num_layers": 1}, {"loops": (Loop(("*-", "M-"), 1),), "mlp_layers": 2}),
    ({"mtp_modules": 2}, {"mtp_stack": Stack("mtp", "*E", range(4, 6), range(4, 6))}),
    ({"blocks": "MM*E-ME", "mtp_modules": 2}, {"mtp_stack": Stack("mtp", "ME", range(12, 14), range(8, 10))}),
    ({"mtp_blocks": "M-", "mtp_modules": 2}, {"mtp_stack": Stack("mtp", "M-", range(4, 6), range(0))}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sizes"), SIZES)
def test_sizes_by_hand(fields: dict[str, Any], sizes: dict[str, Any]) -> None:
    model = ModelConfig(**BASE | fields)
    assert {name: getattr(model, name) for name in sizes} == sizes


def test_what_is_trained_has_the_next_token_modules() -> None:
    model = ModelConfig(**BASE, blocks="MM*E-ME", mtp_modules=2, mtp_blocks="MM*-")
    assert [model.count_trained(letters) for letters in ("M", "*", "E", "-", "M*")] == [16, 6, 8, 6, 22]
    assert [model.count_branches(letters) for letters in ("M", "*", "E", "-", "M*")] == [12, 4, 8, 4, 16]
    assert model.trained_stacks == (*model.stacks, model.mtp_stack)
    assert ModelConfig(**BASE).trained_stacks == ModelConfig(**BASE).stacks


def test_how_many_experts_fit_ranks() -> None:
    """vanilla has e·R / 4h: of R = 24 and h = 96 a multiple of 16 · ranks / (what ranks share with nothing)."""
    assert [ModelConfig(**BASE | {"num_experts": 30}).fitting_experts(ranks) for ranks in (1, 4, 7)] == [30, 32, 35]
    vanilla = ModelConfig(**BASE | VANILLA | {"num_experts": 48})
    assert [vanilla.fitting_experts(ranks) for ranks in (1, 2, 3, 5)] == [48, 64, 48, 80]
    assert ModelConfig(**BASE | VANILLA | {"down_ratio": 0.375}).fitting_experts(1) == 32  # 36 · 32 / 384 = 3


def test_sizes_of_a_mesh_and_of_buffers_by_hand() -> None:
    mesh = MeshConfig(data=7, node=2, expert=3, tensor=5, replica=11)
    assert (mesh.expert_ranks, mesh.model_ranks, mesh.fixed_ranks) == (6, 30, 330)
    assert [ExecutionConfig(dtype=dtype).dtype_bytes for dtype in ("float32", "bfloat16")] == [4, 2]
    rounds = [ExecutionConfig(buffer_factor=factor) for factor in ("auto", 2.0, math.inf)]
    assert [(made.room_factor, made.asks_for_rounds) for made in rounds] == [
        (1.5, False), (2.0, True), (math.inf, False),
    ]  # fmt: skip


PARTS: list[tuple[list[str], dict[str, Any]]] = [  # overrides of the defaults: what the whole makes of them
    ([], {"dropless": True, "has_segments": False, "sorts_biases": True, "grows_choices": False, "trains_mtp": False,
          "projection_rate": 0.125, "context_length": 256, "mamba_chunk": 256}),
    (["model.capacity_factor=2", "execution.exchange=gather"], {"dropless": True}),
    (["model.capacity_factor=2", "execution.exchange=dedup"], {"dropless": True}),
    (["model.capacity_factor=2", "execution.exchange=dedup", "mesh.expert=2"], {"dropless": False}),
    (["model.capacity_factor=2", "execution.exchange=all_to_all"], {"dropless": False}),
    (["model.capacity_factor=2", "model.structure=dense", "model.latent_norm=none"], {"dropless": True}),
    (["data.documents=masked"], {"has_segments": True, "sorts_biases": False}),
    (["tuning.objective=sft"], {"has_segments": True}),
    (["data.sequence_length=8192"], {"sorts_biases": True}),
    (["data.sequence_length=8192", "data.batch_size=17"], {"sorts_biases": False}),
    (["train.accumulate_steps=2"], {"sorts_biases": False}),
    (["mesh.replica=2"], {"sorts_biases": False}),
    (["model.mtp_modules=1"], {"sorts_biases": False, "trains_mtp": True}),
    (["model.mtp_modules=1", "train.init_from=x", "tuning.lora_rank=1"], {"trains_mtp": False}),
    (["train.choices_from=2", "train.choices_steps=5"], {"grows_choices": True}),
    (["train.choices_from=2", "model.structure=vanilla"], {"grows_choices": False}),
    (["model.projection_init=random"], {"projection_rate": 1.0}),
    (["model.structure=fine_grained"], {"projection_rate": 1.0}),
    (["optimizer.projection_rate=0.5"], {"projection_rate": 0.5}),
    (["data.sequence_length=100"], {"mamba_chunk": 100}),
    (["execution.mamba_chunk=32"], {"mamba_chunk": 32}),
    (["model.context_length=300"], {"context_length": 300}),
    (["model.context_length=100"], {"context_length": 256}),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "parts"), PARTS)
def test_what_the_sections_make_together(overrides: list[str], parts: dict[str, Any]) -> None:
    config = with_overrides(Config(), overrides)
    assert {name: getattr(config, name) for name in parts} == parts
    alone = config.model.mtp_modules and not config.trains_mtp
    assert config.step_model == (dataclasses.replace(config.model, mtp_modules=0) if alone else config.model)


@pytest.mark.parametrize(
    ("fields", "exchange", "ranks", "end"),
    [
        (FULL, "all_to_all", 1, "capacity factor 1.25"),
        (FULL | {"overflow": "next"}, "all_to_all", 1, "capacity factor 1.25, overflow to the next expert"),
        ({}, "all_to_all", 1, "dropless"),
        (FULL, "gather", 1, "dropless"),  # whatever the factor says
        (FULL, "ragged", 1, "dropless"),
        (FULL, "dedup", 1, "dropless"),
        (FULL, "hierarchical", 1, "dropless"),
        (FULL, "ragged", 2, "dropless"),
        (FULL, "dedup", 2, "capacity factor 1.25"),
        (FULL, "hierarchical", 2, "capacity factor 1.25"),
    ],
)
def test_describe_says_whether_rows_are_dropped(fields: dict, exchange: str, ranks: int, end: str) -> None:
    execution, mesh = ExecutionConfig(exchange=exchange), MeshConfig(expert=ranks)
    config = Config(model=ModelConfig(**fields), execution=execution, mesh=mesh)
    assert bool(fields and unread_for(config, "model.capacity_factor")) == (bool(fields) and end == "dropless")
    described = config.describe()
    how = "latent norm skip, projection init selection, projection rate 0.125"
    assert described.endswith(f"rows of 64 numbers instead of 256 in the exchange, {how}, {end}")


def test_vanilla_says_what_it_resolved_to() -> None:
    """e·r/4 experts of width 4h, one of them a token."""
    model = ModelConfig(structure="vanilla", num_experts=64, down_ratio=0.25, hidden_size=32, num_heads=4)
    described = Config(model=model).describe()
    assert described.startswith("vanilla: 4 experts of width 128 a layer, top-1, rows of 32 numbers in the exchange, ")


def test_evaluation_on_a_tensor_axis_is_not_held_to_the_training_batch() -> None:
    trained = Config(data=DataConfig(batch_size=2, sequence_length=20), execution=ExecutionConfig(overlap_chunks=8))
    assert with_mesh(trained, ["mesh.tensor=2"]).mesh.tensor == 2
    with pytest.raises(ConfigError, match=r"data\.sequence_length=20 must be a multiple of mesh\.tensor=3"):
        with_mesh(trained, ["mesh.tensor=3"])


def test_divisors_that_are_near() -> None:
    """The next below, or the number itself, and the next above."""
    cases = {(12, 5): "4 or 6", (12, 4): "4 or 6", (12, 12): "12", (12, 99): "12", (7, 0): "1", (1, 1): "1",
             (16, 5): "4 or 8", (36, 5): "4 or 6", (36, 7): "6 or 9", (36, 1): "1 or 2"}  # fmt: skip
    assert {case: near_divisors(*case) for case in cases} == cases
    ranks = {(12, 8): "4", (12, 2): "2", (9, 2): "1 or 3", (35, 6): "5 or 7"}
    assert {case: near_ranks(*case) for case in ranks} == ranks


def test_a_line_has_an_end() -> None:
    assert len(str(ConfigError("x" * 2000))) == 2000
    assert str(ConfigError("x" * 2001)) == "x" * 2000 + "…" and str(ConfigError(" a\nb ")) == "a b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"a": {"[" * 63}{"]" * 63}}}', ""),
        (f'{{"a": {"[" * 64}{"]" * 64}}}', "nested too deeply"),
        (f'{{"a": [{", ".join(["[]"] * 99)}]}}', ""),
        (f'{{"a": {"9" * 20}}}', ""),
        (f'{{"a": {"9" * 21}}}', "an integer of 21 digits"),
        (f'{{"a": -{"9" * 20}}}', "an integer of 21 digits"),
        ("\ufeff{}", ""),
        ("[]", "it is a JSON list, no object"),
    ],
)
def test_objects_at_their_limits(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        assert parse_object(text) == parse_object(text.encode()) == json.loads(text.removeprefix("\ufeff"))


def test_a_seal_notices_a_change() -> None:
    """Whatever the order of what was sealed."""
    sealed = seal({"a": 1, "b": [2]})
    assert unseal(dict(reversed(sealed.items()))) == {"a": 1, "b": [2]}
    for changed in ({"a": 2}, {"c": 1}, {"seal": "x"}):
        with pytest.raises(ValueError, match="it has changed since it was written"):
            unseal(sealed | changed)


def test_results_have_no_nan() -> None:
    values = {"loss": math.nan, "by": [{"a": (math.inf, 1.5)}, -math.inf], "n": 3, "word": "NaN", "none": None}
    read = json.loads(strict_json(values), parse_constant=pytest.fail)
    assert read == {"loss": None, "by": [{"a": [None, 1.5]}, None], "n": 3, "word": "NaN", "none": None}


def test_a_base_model_of_the_paper() -> None:
    """Table 5; what is not listed is as by default."""
    values, defaults = flat_values(load_config("paper/gpt3_xl")), flat_values(Config())
    assert {name: value for name, value in values.items() if value != defaults[name]} == {
        "model.num_layers": 24, "model.hidden_size": 2048, "model.num_heads": 16, "model.vocab_size": 50304,
        "model.norm": "layernorm", "model.positions": "learned", "model.activation": "gelu", "model.use_bias": True,
        "model.qk_norm": False, "model.dropout": 0.1, "model.num_experts": 64, "model.top_k": 8,
        "model.latent_norm": "none", "model.projection_init": "random", "model.capacity_factor": 1.2,
        "model.router_renormalize": False, "execution.dtype": "bfloat16",
        "mesh.expert": 4, "data.source": "tfds:wikipedia/20230601.en", "data.tokenizer": "gpt2",
        "data.sequence_length": 2048, "data.batch_size": 256, "optimizer.warmup_steps": 1200,
        "optimizer.decay_steps": 5200, "train.steps": 6400, "train.eval_every": 400, "train.checkpoint_every": 400,
    }  # fmt: skip
    same = {
        "model.structure": "bigmac", "model.down_ratio": 0.25, "model.tie_embeddings": True,
        "model.balance_coefficient": 0.001, "model.balance_scope": "part",
        "optimizer.learning_rate": 3e-4, "optimizer.final_learning_rate": 3e-5,
        "optimizer.b1": 0.9, "optimizer.b2": 0.95, "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.1,
        "optimizer.clip_norm": 1.0, "train.seed": 1234, "train.log_every": 10,
    }  # fmt: skip
    assert values | same == values
