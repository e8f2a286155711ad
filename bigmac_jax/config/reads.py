"""Which fields a run reads. A field that is set but not read changes nothing: the commands name it at their start."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from bigmac_jax.config.root import Config
from bigmac_jax.config.section import flat_values

# Names the setting for which a field is not read; "" where it is read.
Condition = Callable[[Config], str]


def _value(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _shown(config: Config, name: str) -> str:
    value = _value(config, name)
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" if value != "" else f"no {name}"


def _with(name: str, *values: Any) -> Condition:
    """Read where another field has one of these values."""
    return lambda config: "" if _value(config, name) in values else _shown(config, name)


def _without(name: str, *values: Any) -> Condition:
    """Read where another field has none of these values."""
    return lambda config: _shown(config, name) if _value(config, name) in values else ""


def _several_choices(config: Config) -> str:
    if config.model.structure == "vanilla":
        return _shown(config, "model.structure")
    return "" if config.model.top_k > 1 else _shown(config, "model.top_k")


def _some_groups(config: Config) -> str:
    best, groups = config.model.top_groups, config.model.num_expert_groups
    return "" if best < groups else f"model.top_groups={best} of {groups}"


def _ratio(config: Config) -> str:
    """The latent's width, which is that of fine_grained's experts unless they have their own."""
    return "" if config.model.has_latent_size else _shown(config, "model.expert_hidden_size")


def _attention(config: Config) -> str:
    return "" if config.model.count_trained("*") else "no attention"


def _positions(config: Config) -> str:
    """Attention has rotary ones or none; learned ones are added to the embedding, whatever reads that."""
    return "" if config.model.positions == "learned" else _attention(config)


def _mamba(config: Config) -> str:
    return "" if config.model.count_trained("M") else "no Mamba layer"


def _several_ranks(config: Config) -> str:
    """Of a replica; or one whose optimizer's state is split over replicas, which is asked for with mesh.fsdp alone."""
    mesh = config.mesh
    over_replicas = mesh.replica > 1 and mesh.replica_optimizer == "sharded"
    return "a mesh of one rank" if mesh.data == 1 and mesh.model_ranks == 1 and not over_replicas else ""


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
    """The field of `sotu` is known."""
    data = config.data
    own = (data.source, *filter(None, (data.validation_source, data.test_source)))
    return "data.source=sotu" if not data.mixture and set(own) == {"sotu"} else ""


def _some_mlps(config: Config) -> str:
    """Some layers have an MLP in the experts' place."""
    if config.model.count_trained("-"):
        return ""
    return f"model.blocks={config.model.blocks}" if config.model.blocks else "model.first_dense_layers=0"


def _trained_mtp(config: Config) -> str:
    return "" if config.trains_mtp else _shown(config, "tuning.lora_rank" if config.model.mtp_modules else _MTP)


_MTP = "model.mtp_modules"
_MOE = _without("model.structure", "dense")
_BIGMAC = _with("model.structure", "bigmac")
_TEXTS = _with("tuning.objective", "pretrain")

# Fields that are read whatever the others are.
_WHATEVER = {
    "model": "structure num_layers blocks hidden_size vocab_size norm norm_eps context_length activation "
    "gated use_bias tie_embeddings scale_embedding dropout expert_hidden_size "
    "mtp_modules",
    "execution": "dtype reduce_dtype remat offload_optimizer unroll_layers compiler_options",
    "mesh": "data node expert tensor replica",
    "data": "source validation_source test_source mixture tokenizer sequence_length documents batch_size num_workers",
    "optimizer": "name schedule learning_rate warmup_steps b1 b2 eps moment_dtype average_decay weight_decay clip_norm",
    "train": "init_from steps accumulate_steps seed log_every eval_every checkpoint_every keep_checkpoints on_bad_step "
    "spike_factor wandb tasks_every",
    "tuning": "objective chat_template lora_rank teacher",
    "": "cache_dir",
}
# Other fields, and the conditions under which they are read, all of which must hold.
_CONDITIONAL: dict[str, tuple[Condition, ...]] = {
    "model.num_heads model.num_kv_heads model.head_dim model.qk_norm execution.attention": (_attention,),
    "model.positions": (_positions,),
    "model.rope_theta": (_attention, _with("model.positions", "rope")),
    "model.num_experts model.num_shared_experts model.latent_norm model.router_scores "
    "model.router_scale model.balance model.z_loss_coefficient execution.overlap_chunks execution.grouped_matmul "
    "tuning.train_router": (_MOE,),
    "model.router": (_MOE,),
    "model.hyper_width": (_MOE, _with("model.router", "hyper")),
    "train.choices_from": (_MOE, _without("model.structure", "vanilla")),
    "train.choices_steps": (_MOE, _without("model.structure", "vanilla"), _without("train.choices_from", 0)),
    "model.top_k": (_MOE, _without("model.structure", "vanilla")),
    "model.first_dense_layers": (_MOE, _with("model.blocks", "")),
    "model.dense_hidden_size": (_MOE, _some_mlps),
    "model.down_ratio": (_MOE, _ratio),
    "model.shared_expert_hidden_size": (_MOE, _without("model.num_shared_experts", 0)),
    "model.projection_init": (_BIGMAC,),
    "model.capacity_factor": (_MOE, _capacity),
    "model.overflow": (_MOE, _without("model.capacity_factor", math.inf)),
    "model.overflow_tries": (_MOE, _with("model.overflow", "next")),
    "model.router_renormalize": (_MOE, _several_choices),
    "model.balance_coefficient": (_MOE, _with("model.balance", "aux_loss")),
    "model.balance_scope": (_MOE, _with("model.balance", "aux_loss"), _without("train.accumulate_steps", 1)),
    "model.balance_step": (_MOE, _with("model.balance", "quantile")),
    "model.balance_bias_rate": (_MOE, _with("model.balance", "bias")),
    "model.num_expert_groups model.top_groups model.group_scores": (_MOE, _some_groups),
    "model.mamba_heads model.mamba_head_dim model.mamba_groups model.mamba_state model.mamba_conv "
    "model.mamba_conv_bias model.mamba_bias model.mamba_least_step model.mamba_most_step execution.mamba_chunk": (
        _mamba,
    ),
    "execution.resident_layers execution.resident_experts": (_MOE,),
    "execution.gather_dtype": (_without("execution.dtype", "bfloat16"),),
    "execution.exchange": (_MOE, _exchange),
    "execution.wire_dtype execution.wire_dtype_backward": (_MOE, _wire),
    "execution.buffer_factor": (_MOE, _experts_elsewhere),
    "mesh.fsdp": (_several_ranks,),
    "mesh.split_experts": (_MOE, _without("mesh.tensor", 1)),
    "mesh.replica_optimizer": (_without("mesh.replica", 1),),
    "data.curriculum": (_without("data.mixture", ""),),
    "data.text_field": (_TEXTS, _named_texts),
    "data.null_rows data.packing": (_TEXTS,),
    "optimizer.final_learning_rate optimizer.decay_steps": (_without("optimizer.schedule", "constant"),),
    "optimizer.projection_rate": (_BIGMAC, _with("tuning.lora_rank", 0)),
    "optimizer.momentum": (_with("optimizer.name", "muon"),),
    "train.experts_per_checkpoint": (_MOE, _without("train.checkpoint_every", 0)),
    "train.partial_checkpoint train.most_lost_updates": (
        _MOE,
        *(_without(f"train.{n}", 0) for n in ("checkpoint_every", "experts_per_checkpoint")),
    ),
    "model.mtp_blocks": (_without(_MTP, 0),),
    "train.mtp_weight": (_trained_mtp,),
    "train.max_bad_steps": (_without("train.on_bad_step", "stop"),),
    "train.tasks train.tasks_limit": (_without("train.tasks_every", 0),),
    "tuning.bad_rows": (_without("tuning.objective", "pretrain"),),
    "tuning.lora_alpha tuning.lora_dropout tuning.lora_targets": (_without("tuning.lora_rank", 0),),
    "tuning.teacher_weight tuning.hidden_weight": (_without("tuning.teacher", ""),),
    "tuning.dpo_beta": (_with("tuning.objective", "dpo"),),
}
# Every field of the config (tests/config/test_reads.py).
READ: dict[str, tuple[Condition, ...]] = {
    **{f"{group}.{name}".lstrip("."): () for group, names in _WHATEVER.items() for name in names.split()},
    **{name: conditions for names, conditions in _CONDITIONAL.items() for name in names.split()},
}
# Fields that an evaluation can be given and does not read.
_TRAINING = (
    "execution.remat",
    "execution.offload_optimizer",
    "execution.reduce_dtype",
    "execution.wire_dtype_backward",
)


def unread_for(config: Config, name: str) -> str:
    """Names the setting for which a field is not read; "" where it is read."""
    return next((why for condition in READ[name] if (why := condition(config))), "")


def notes(config: Config, given: Iterable[str] = (), ranks: int = 0, base: Config | None = None) -> list[str]:
    """Writes a line for all fields that are set and not read, and one for each surprising width, context or learning
    rate.

    Args:
      given: names of fields that were given whatever their value; others are set where they differ from the default.
      ranks: size of the data axis, where the config leaves that to the devices.
      base: the config before anything was given: what only it sets, and does read, is nobody's mistake.
    """
    given, config, base = set(given), _with_ranks(config, ranks), _with_ranks(base or config, ranks)
    values, defaults = flat_values(config), flat_values(Config())
    names = [name for name, value in values.items() if name in given or value != defaults[name]]
    why = {name: unread_for(config, name) for name in names if name in given or not _only_of(base, name, values)}
    return [
        *_line(why, config),
        *_width_notes(config, given),
        *context_notes(config),
        *_schedule_notes(config),
        *_choices_notes(config),
    ]


def evaluation_notes(config: Config, given: Iterable[str], ranks: int) -> list[str]:
    """As `notes`, for fields that are given to an evaluation, which drops nothing."""
    dropless = dataclasses.replace(config.model, capacity_factor=math.inf, overflow="drop")
    config = dataclasses.replace(config, model=dropless)
    config = _with_ranks(config, ranks)
    return _line({name: "no training" if name in _TRAINING else unread_for(config, name) for name in given}, config)


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


def _only_of(base: Config, name: str, values: Mapping[str, Any]) -> bool:
    return _value(base, name) == values[name] and not unread_for(base, name)


def _width_notes(config: Config, given: Collection[str]) -> list[str]:
    """A line if another structure was given, and the experts keep a width that was chosen for the config's own."""
    model, width = config.model, "model.expert_hidden_size"
    if not model.expert_hidden_size or "model.structure" not in given or width in given:
        return []
    return [
        f"model.structure={model.structure} keeps the config's {width}={model.expert_hidden_size}, which gives another "
        f"structure another size; 0 takes the paper's width ({model.paper_width}), and bigmac plan of the config as it "
        f"is shows the width of equal size"
    ]


def context_notes(config: Config) -> list[str]:
    """A line if training and the declared context are of different lengths."""
    declared, length = config.model.context_length, config.data.sequence_length
    if declared in (0, length):
        return []
    if length > declared:
        return [f"data.sequence_length={length} is more than model.context_length={declared}: exports declare {length}"]
    learned = "; learned positions behind that stay as they are" if config.model.positions == "learned" else ""
    return [
        f"exports still declare model.context_length={declared}, and this run trains on windows of "
        f"data.sequence_length={length}{learned}"
    ]


def _choices_notes(config: Config) -> list[str]:
    """A line if choices that grow do not come to as many as evaluation takes."""
    train, most = config.train, config.model.choices
    if not config.grows_choices or train.choices_steps <= train.steps:
        return []
    reached = train.choices_from + (train.steps - 1) * (most - train.choices_from + 1) // train.choices_steps
    return [
        f"train.choices_steps={train.choices_steps} of train.steps={train.steps}: choices reach {reached}, and "
        f"evaluation takes model.top_k={most}"
    ]


def _schedule_notes(config: Config) -> list[str]:
    """A line for each thing that the learning rate does and its fields do not say."""
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
