"""Which fields a config reads. One that is set and not read changes nothing: the commands name it at their start."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from bigmac_jax.config.root import Config

# The setting for which a field is not read; "" where it is read.
Unread = Callable[[Config], str]


def _value(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _shown(config: Config, name: str) -> str:
    value = _value(config, name)
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" if value != "" else f"no {name}"


def _always(config: Config) -> str:
    return ""


def _with(name: str, *values: Any) -> Unread:
    """Read where another field has one of these values."""
    return lambda config: "" if _value(config, name) in values else _shown(config, name)


def _without(name: str, *values: Any) -> Unread:
    """Read where another field has none of these values."""
    return lambda config: _shown(config, name) if _value(config, name) in values else ""


def _all(*conditions: Unread) -> Unread:
    return lambda config: next((why for condition in conditions if (why := condition(config))), "")


def _several_choices(config: Config) -> str:
    if config.model.structure == "vanilla":
        return _shown(config, "model.structure")
    return "" if config.model.top_k > 1 else _shown(config, "model.top_k")


def _some_groups(config: Config) -> str:
    best, groups = config.model.top_groups, config.model.num_expert_groups
    return "" if best < groups else f"model.top_groups={best} of {groups}"


def _ratio(config: Config) -> str:
    """The latent's width, which is that of fine_grained's experts unless they have their own."""
    model = config.model
    shared = model.num_shared_experts and not model.shared_expert_hidden_size
    own = model.structure == "fine_grained" and model.expert_hidden_size and not shared
    return _shown(config, "model.expert_hidden_size") if own else ""


def _several_ranks(config: Config) -> str:
    mesh = config.mesh
    return "a mesh of one rank" if mesh.data == 1 and mesh.model_ranks == 1 else ""


def _experts_elsewhere(config: Config) -> str:
    return "" if config.mesh.expert_ranks > 1 else "one rank of experts"


def _exchange(config: Config) -> str:
    """On one rank they are all the same, but for what a capacity drops."""
    return "" if math.isfinite(config.model.capacity_factor) else _experts_elsewhere(config)


def _wire(config: Config) -> str:
    """A capacity's buffers cross the wire on one rank, too."""
    of_buffers = config.execution.exchange in ("all_to_all", "auto")
    return _exchange(config) if of_buffers else _experts_elsewhere(config)


def _capacity(config: Config) -> str:
    exchange = config.execution.exchange
    if exchange in ("dedup", "hierarchical"):
        return _experts_elsewhere(config)
    return _shown(config, "execution.exchange") if exchange in ("gather", "ragged") else ""


def _named_texts(config: Config) -> str:
    """Of `sotu` the field is known."""
    data = config.data
    own = (data.source, *filter(None, (data.validation_source, data.test_source)))
    return "data.source=sotu" if not data.mixture and set(own) == {"sotu"} else ""


_MOE = _without("model.structure", "dense")
_BIGMAC = _with("model.structure", "bigmac")
_DECAYS = _without("optimizer.schedule", "constant")
_TEXTS = _with("tuning.objective", "pretrain")
_LORA = _without("tuning.lora_rank", 0)
_TEACHER = _without("tuning.teacher", "")
_TASKS = _without("train.tasks_every", 0)

# Fields that are read whatever the others are.
_WHATEVER = {
    "model": "structure num_layers hidden_size num_heads num_kv_heads head_dim vocab_size norm norm_eps positions "
    "activation gated use_bias qk_norm tie_embeddings scale_embedding dropout expert_hidden_size",
    "execution": "dtype reduce_dtype attention remat unroll_layers",
    "mesh": "data node expert tensor",
    "data": "source validation_source test_source mixture tokenizer sequence_length documents batch_size num_workers",
    "optimizer": "name schedule learning_rate warmup_steps b1 b2 eps moment_dtype average_decay weight_decay clip_norm",
    "train": "init_from steps accumulate_steps seed log_every eval_every checkpoint_every keep_checkpoints on_bad_step "
    "spike_factor wandb tasks_every",
    "tuning": "objective chat_template lora_rank teacher",
    "": "cache_dir",
}
# field: condition under which it is read. Every field stands here (tests/config/test_reads.py).
READ: dict[str, Unread] = {
    **{f"{group}.{name}".lstrip("."): _always for group, names in _WHATEVER.items() for name in names.split()},
    "model.rope_theta": _with("model.positions", "rope"),
    "model.num_experts": _MOE,
    "model.top_k": _all(_MOE, _without("model.structure", "vanilla")),
    "model.first_dense_layers": _MOE,
    "model.dense_hidden_size": _all(_MOE, _without("model.first_dense_layers", 0)),
    "model.down_ratio": _all(_MOE, _ratio),
    "model.num_shared_experts": _MOE,
    "model.shared_expert_hidden_size": _all(_MOE, _without("model.num_shared_experts", 0)),
    "model.latent_norm": _MOE,
    "model.projection_init": _BIGMAC,
    "model.capacity_factor": _all(_MOE, _capacity),
    "model.router_scores": _MOE,
    "model.router_renormalize": _all(_MOE, _several_choices),
    "model.router_scale": _MOE,
    "model.balance": _MOE,
    "model.balance_coefficient": _all(_MOE, _with("model.balance", "aux_loss")),
    "model.balance_step": _all(_MOE, _with("model.balance", "quantile")),
    "model.balance_scope": _all(_MOE, _with("model.balance", "aux_loss")),
    "model.balance_bias_rate": _all(_MOE, _with("model.balance", "bias")),
    "model.z_loss_coefficient": _MOE,
    "model.num_expert_groups": _all(_MOE, _some_groups),
    "model.top_groups": _all(_MOE, _some_groups),
    "model.group_scores": _all(_MOE, _some_groups),
    "execution.gather_dtype": _without("execution.dtype", "bfloat16"),
    "execution.exchange": _all(_MOE, _exchange),
    "execution.wire_dtype": _all(_MOE, _wire),
    "execution.wire_dtype_backward": _all(_MOE, _wire),
    "execution.buffer_factor": _all(_MOE, _experts_elsewhere),
    "execution.overlap_chunks": _MOE,
    "execution.grouped_matmul": _MOE,
    "mesh.fsdp": _several_ranks,
    "mesh.split_experts": _all(_MOE, _without("mesh.tensor", 1)),
    "data.curriculum": _without("data.mixture", ""),
    "data.text_field": _all(_TEXTS, _named_texts),
    "data.null_rows": _TEXTS,
    "data.packing": _TEXTS,
    "optimizer.final_learning_rate": _DECAYS,
    "optimizer.projection_rate": _all(_BIGMAC, _with("tuning.lora_rank", 0)),
    "optimizer.decay_steps": _DECAYS,
    "optimizer.momentum": _with("optimizer.name", "muon"),
    "train.max_bad_steps": _without("train.on_bad_step", "stop"),
    "train.tasks": _TASKS,
    "train.tasks_limit": _TASKS,
    "tuning.bad_rows": _without("tuning.objective", "pretrain"),
    "tuning.train_router": _MOE,
    "tuning.lora_alpha": _LORA,
    "tuning.lora_dropout": _LORA,
    "tuning.lora_targets": _LORA,
    "tuning.teacher_weight": _TEACHER,
    "tuning.hidden_weight": _TEACHER,
    "tuning.dpo_beta": _with("tuning.objective", "dpo"),
}
# Of what can be given to an evaluation.
_TRAINING = ("execution.remat", "execution.reduce_dtype", "execution.wire_dtype_backward")


def notes(config: Config, given: Iterable[str] = (), ranks: int = 0) -> list[str]:
    """A line for all fields that are set and not read, and one for each value that does what nobody expects of it.

    Args:
      given: names of fields that were given whatever their value; others are set where they differ from the default.
      ranks: of the data axis, where the config leaves that to the devices.
    """
    config = _with_ranks(config, ranks)
    names = [name for name in READ if name in set(given) or _value(config, name) != _value(_DEFAULT, name)]
    return [*_line({name: READ[name](config) for name in names}, config), *_of_schedule(config)]


def notes_of_evaluation(config: Config, given: Iterable[str], ranks: int = 0) -> list[str]:
    """As `notes`, of fields that are given to an evaluation, which drops nothing."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, capacity_factor=math.inf))
    config = _with_ranks(config, ranks)
    return _line({name: "no training" if name in _TRAINING else READ[name](config) for name in given}, config)


_DEFAULT = Config()


def _with_ranks(config: Config, ranks: int) -> Config:
    mesh = dataclasses.replace(config.mesh, data=config.mesh.data or ranks)
    return dataclasses.replace(config, mesh=mesh)


def _line(why: dict[str, str], config: Config) -> list[str]:
    unread: dict[str, list[str]] = {}
    for name, reason in why.items():
        if reason:
            unread.setdefault(reason, []).append(_shown(config, name))
    told = "; ".join(f"{', '.join(fields)} ({reason})" for reason, fields in unread.items())
    return [f"set, but not read: {told}"] if told else []


def _of_schedule(config: Config) -> list[str]:
    """What a learning rate does that its fields do not say."""
    optimizer, steps = config.optimizer, config.train.steps
    peak, final, warmup = optimizer.learning_rate, optimizer.final_learning_rate, optimizer.warmup_steps
    of_steps, lines = f"of train.steps={steps}: the rate", []
    if warmup >= steps:
        lines.append(f"optimizer.warmup_steps={warmup} {of_steps} does not reach learning_rate={peak:g}")
    if optimizer.schedule == "constant":
        return lines
    if final > peak:
        lines.append(f"optimizer.final_learning_rate={final:g} is above learning_rate={peak:g}: the rate rises to it")
    if optimizer.decay_steps > max(0, steps - warmup):
        what = "falls from the warm-up on" if optimizer.schedule == "wsd" else f"does not reach {final:g}"
        lines.append(f"optimizer.decay_steps={optimizer.decay_steps} behind a warm-up of {warmup} {of_steps} {what}")
    return lines
