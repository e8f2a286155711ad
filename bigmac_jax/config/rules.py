"""What a configuration must hold. Every error is a `ConfigError` with one line: the rule, the values, the fix."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bigmac_jax.config.tuning import validate_tuning

if TYPE_CHECKING:
    from bigmac_jax.config.sections import Config, MeshConfig, ModelConfig

STRUCTURES = ("dense", "vanilla", "fine_grained", "bigmac")
EXCHANGES = ("auto", "all_to_all", "dedup", "hierarchical", "gather", "ragged")
EXCHANGES_IN_ROUNDS = ("auto", "all_to_all", "dedup", "hierarchical")  # that take a finite execution.buffer_factor
LATENT_NORMS = ("auto", "none", "pre_dispatch", "post_combine", "both", "scale", "skip", "gate")
WIRE_FORMATS = ("float32", "bfloat16", "float8_e4m3", "int8")
STORES = ("gs", "s3")  # schemes that `storage` reads and writes
# Tokenizers whose size is known without reading a file; `bpe` is trained to model.vocab_size.
TOKENIZER_SIZES = {"bytes": 257, "gpt2": 50257}
_MAY_BE_INF = ("model.capacity_factor", "execution.buffer_factor")
OR_AUTO = ("execution.buffer_factor",)  # numbers, or the word
_LARGEST_INT = 2**31 - 1  # steps and sizes are int32 on the device
_LARGEST_FLOAT = 10**300  # that an integer may stand for
_SLOWEST_BFLOAT16 = 0.99
_LONGEST_LINE = 2000  # characters; a damaged file may hold any value
_MIN_BPE_VOCAB = 257  # 256 bytes and the end-of-text token


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: rule, values, fix."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


def check_place(place: str, name: str) -> str:
    """The scheme of the path that a flag, a field or an argument `name` gives, one of STORES; "" on a local disk.

    Raises:
      ConfigError: another scheme, a store without a bucket, or the home of a user that is not there.
    """
    scheme, mark, rest = place.partition("://")
    if mark and scheme not in STORES:
        known = " or ".join(f"{store}://" for store in STORES)
        raise ConfigError(f"{name}={place} must be a local path, or begin with {known}; mount other stores")
    if mark and not rest.strip("/"):
        raise ConfigError(f"{name}={place} names no bucket; use {scheme}://BUCKET/FOLDER")
    if not mark:
        try:
            pathlib.Path(place).expanduser()
        except RuntimeError:
            raise ConfigError(f"{name}={place} is in the home of a user that is not there; give another path") from None
    return scheme if mark else ""


def check_types(config: Config) -> None:
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not isinstance(value, section.type):  # type: ignore[arg-type]
            raise ConfigError(f"{section.name}={value!r} must be a {section.type.__name__}")  # type: ignore[union-attr]
        if not dataclasses.is_dataclass(value):
            continue
        for f in dataclasses.fields(value):
            name, entry = f"{section.name}.{f.name}", getattr(value, f.name)
            if type(entry) is int and abs(entry) > (_LARGEST_FLOAT if f.type is float else _LARGEST_INT):
                bits = entry.bit_length()  # Python refuses to print very large ones
                shown = f"{str(entry)[:20]}… ({len(str(abs(entry)))} digits)" if bits < 4096 else f"({bits} bits)"
                raise ConfigError(f"{name}={shown} must be at most {_LARGEST_INT}")
            kind = float if name in OR_AUTO else f.type
            if kind is float and (type(entry) is int or entry == "inf"):
                entry = float(entry)
                object.__setattr__(value, f.name, entry)  # 1 is a fine way to write 1.0, and JSON has no infinity
            if name in OR_AUTO and entry == "auto":
                continue
            if type(entry) is not kind:
                or_auto = " or auto" if name in OR_AUTO else ""
                raise ConfigError(f"{name}={entry!r} must be of type {kind.__name__}{or_auto}")  # type: ignore[union-attr]
            if kind is float and (math.isnan(entry) or (math.isinf(entry) and name not in _MAY_BE_INF)):
                raise ConfigError(f"{name}={entry} must be a finite number")


def validate(config: Config) -> None:
    model, execution, mesh, data = config.model, config.execution, config.mesh, config.data
    optimizer, train, tuning, factor = config.optimizer, config.train, config.tuning, execution.room_factor

    def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} must be one of {', '.join(allowed)}")

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    def at_least(section: str, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(getattr(config, section), name)
            require(value >= minimum, f"{section}.{name}={value} must be at least {minimum:g}")

    one_of("model.structure", model.structure, STRUCTURES)
    one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
    one_of("model.positions", model.positions, ("rope", "learned", "none"))
    one_of("model.activation", model.activation, ("relu2", "gelu", "silu"))
    one_of("model.latent_norm", model.latent_norm, LATENT_NORMS)
    one_of("model.router_scores", model.router_scores, ("softmax", "sigmoid"))
    one_of("model.balance", model.balance, ("aux_loss", "bias", "quantile", "none"))
    one_of("model.balance_step", model.balance_step, ("next", "same"))
    one_of("model.projection_init", model.projection_init, ("selection", "random"))
    one_of("model.group_scores", model.group_scores, ("top_k", "top_2"))
    one_of("model.balance_scope", model.balance_scope, ("step", "part"))
    one_of("execution.attention", execution.attention, ("auto", "blocks", "xla", "cudnn", "splash", "triton"))
    one_of("execution.dtype", execution.dtype, ("float32", "bfloat16"))
    one_of("execution.gather_dtype", execution.gather_dtype, ("", "float32", "bfloat16"))
    one_of("execution.reduce_dtype", execution.reduce_dtype, ("float32", "bfloat16"))
    one_of("execution.remat", execution.remat, ("none", "layer", "exchange"))
    one_of("execution.exchange", execution.exchange, EXCHANGES)
    one_of("execution.grouped_matmul", execution.grouped_matmul, ("auto", "batched", "blocks", "kernel"))
    one_of("data.documents", data.documents, ("stream", "masked"))
    one_of("data.packing", data.packing, ("stream", "best_fit"))
    one_of("data.null_rows", data.null_rows, ("stop", "skip"))
    one_of("optimizer.name", optimizer.name, ("adamw", "muon"))
    one_of("optimizer.schedule", optimizer.schedule, ("cosine", "linear", "constant", "wsd"))
    one_of("optimizer.moment_dtype", optimizer.moment_dtype, ("float32", "bfloat16"))
    one_of("train.on_bad_step", train.on_bad_step, ("stop", "skip", "rewind"))
    one_of("tuning.objective", tuning.objective, ("pretrain", "sft", "dpo"))
    one_of("tuning.bad_rows", tuning.bad_rows, ("stop", "skip"))
    one_of("execution.wire_dtype", execution.wire_dtype, ("", *WIRE_FORMATS))
    one_of("execution.wire_dtype_backward", execution.wire_dtype_backward, ("", *WIRE_FORMATS))

    at_least("model", 1, "num_layers", "hidden_size", "num_heads", "vocab_size", "num_experts", "top_k",
             "vanilla_top_k", "num_expert_groups", "top_groups")  # fmt: skip
    at_least("execution", 1, "overlap_chunks")
    at_least("execution", 0, "unroll_layers")
    at_least("model", 0, "num_kv_heads", "head_dim", "expert_hidden_size", "num_shared_experts", "shared_expert_hidden_size",
             "first_dense_layers", "dense_hidden_size",
             "balance_coefficient", "balance_bias_rate", "z_loss_coefficient", "dropout")  # fmt: skip
    at_least("mesh", 0, "data")
    at_least("mesh", 1, "node", "expert", "tensor")
    at_least("data", 1, "sequence_length", "batch_size")
    at_least("data", 0, "num_workers")
    at_least("optimizer", 0, "learning_rate", "final_learning_rate", "projection_rate", "warmup_steps", "decay_steps", "b1", "b2",
             "momentum", "average_decay", "weight_decay", "clip_norm")  # fmt: skip
    at_least("train", 1, "steps", "accumulate_steps", "keep_checkpoints", "max_bad_steps")
    at_least("train", 0, "log_every", "eval_every", "checkpoint_every", "seed", "tasks_every", "tasks_limit")
    at_least("tuning", 0, "teacher_weight", "hidden_weight", "lora_rank", "lora_alpha", "lora_dropout", "dpo_beta")

    require(factor >= 1, f"execution.buffer_factor={factor:g} must be at least 1")
    require(not execution.asks_for_rounds or execution.exchange in EXCHANGES_IN_ROUNDS, f"execution.buffer_factor={factor:g} needs an exchange that sends in rounds ({', '.join(EXCHANGES_IN_ROUNDS)}), not exchange={execution.exchange}; use buffer_factor=auto")  # fmt: skip

    h, heads, kv = model.hidden_size, model.num_heads, model.kv_heads
    require(model.dropout < 1, f"model.dropout={model.dropout} must be below 1")
    require(model.rope_theta > 0, f"model.rope_theta={model.rope_theta} must be above 0")
    require(model.norm_eps > 0, f"model.norm_eps={model.norm_eps} must be above 0")
    require(model.head_dim > 0 or h % heads == 0, f"model.hidden_size={h} must be a multiple of model.num_heads={heads}; use {h // heads * heads or heads}, or {math.gcd(h, heads)} heads")  # fmt: skip
    require(heads % kv == 0, f"model.num_heads={heads} must be a multiple of model.num_kv_heads={kv}; use {math.gcd(heads, kv)} key-value heads")  # fmt: skip
    require(model.positions != "rope" or model.head_size % 2 == 0, f"{'model.head_dim' if model.head_dim else 'model.hidden_size / model.num_heads'} = {model.head_size} must be even for positions=rope; use {model.head_dim + 1 if model.head_dim else f'{max(1, heads // 2)} heads'}, or positions=learned")  # fmt: skip
    require(optimizer.eps > 0, f"optimizer.eps={optimizer.eps} must be above 0")
    for name in ("b1", "b2", "momentum", "average_decay"):
        value = getattr(optimizer, name)
        require(value < 1, f"optimizer.{name}={value} must be below 1")
        # A moment in bfloat16, of 8 bits, that should shrink by less than half of its last bit does not.
        kept = name == "average_decay" or optimizer.moment_dtype == "float32" or value <= _SLOWEST_BFLOAT16
        require(kept, f"optimizer.{name}={value} must be at most {_SLOWEST_BFLOAT16} with moment_dtype=bfloat16, which rounds smaller changes away; use moment_dtype=float32")  # fmt: skip

    require(data.packing == "stream" or data.documents == "masked", f"data.packing={data.packing} needs data.documents=masked, not {data.documents}: its documents have nothing to do with each other; set it, or use packing=stream")  # fmt: skip
    spike = train.spike_factor
    require(spike == 0 or spike > 1, f"train.spike_factor={spike:g} must be above 1, as in 2, or 0 (off)")

    check_place(config.cache_dir, "cache_dir")
    check_place(train.init_from, "train.init_from")
    check_place(tuning.teacher, "tuning.teacher")
    for name in ("source", "validation_source", "test_source", "tokenizer"):
        check_place(getattr(data, name), f"data.{name}")
    size = TOKENIZER_SIZES.get(data.tokenizer, _MIN_BPE_VOCAB if data.tokenizer == "bpe" else 1)
    require(model.vocab_size >= size, f"model.vocab_size={model.vocab_size} must be at least the tokenizer's {size} (data.tokenizer={data.tokenizer}); use {-(-size // 128) * 128}")  # fmt: skip

    validate_tuning(config, require)
    if mesh.tensor > 1:
        _validate_tensor(config, require)
    first, layers = model.first_dense_layers, model.num_layers
    require(first == 0 or (model.is_moe and first < layers), f"model.first_dense_layers={first} must be below model.num_layers={layers} of a structure with experts, not {model.structure}; use 0")  # fmt: skip
    norm = model.latent_norm
    require(model.is_moe or not model.latent_norms, f"model.latent_norm={norm} needs a layer with experts, not structure=dense; use latent_norm=none")  # fmt: skip
    if model.is_moe:
        _validate_moe(model, mesh, require)


def check_batch(config: Config, data: int, taken: str = "") -> None:
    """Whether a step's batch divides over so many ranks of the data axis, as training needs.

    Args:
      taken: how many that are, if the config does not say it.

    Raises:
      ConfigError: it does not, or overlap_chunks doesn't divide a rank's tokens.
    """
    batch_size, mesh, chunks = config.data.batch_size, config.mesh, config.execution.overlap_chunks
    shards = data * mesh.expert_ranks * config.train.accumulate_steps
    if batch_size % shards:
        raise ConfigError(
            f"data.batch_size={batch_size} must be a multiple of mesh.data × mesh.node × mesh.expert × "
            f"train.accumulate_steps = {shards}{taken}; use {-(-batch_size // shards) * shards}"
            + (", or set mesh.data" if taken else "")
        )
    tokens = batch_size * config.data.sequence_length // (shards * mesh.tensor)
    if tokens % chunks:
        raise ConfigError(
            f"execution.overlap_chunks={chunks} must divide the {tokens} tokens of a rank{taken}; "
            f"use {math.gcd(chunks, tokens)}"
        )


def _validate_tensor(config: Config, require: Any) -> None:
    """What is split over mesh.tensor is a multiple of it."""
    model, tensor = config.model, config.mesh.tensor

    def divides(name: str, value: int) -> None:
        require(value % tensor == 0, f"{name}={value} must be a multiple of mesh.tensor={tensor}; use mesh.tensor={math.gcd(value, tensor)}")  # fmt: skip

    divides("data.sequence_length", config.data.sequence_length)
    divides("model.num_heads", model.num_heads)
    kv = model.kv_heads
    require(kv % tensor == 0 or tensor % kv == 0, f"model.num_kv_heads={kv} must be a multiple of mesh.tensor={tensor}, or divide it; use mesh.tensor={math.gcd(kv, tensor)}")  # fmt: skip
    require(model.vocab_size % tensor == 0, f"model.vocab_size={model.vocab_size} must be a multiple of mesh.tensor={tensor}; use {-(-model.vocab_size // tensor) * tensor}, or mesh.tensor={math.gcd(model.vocab_size, tensor)}")  # fmt: skip
    if model.first_dense_layers:
        divides("the first MLPs' width (model.dense_hidden_size)", model.mlp_width)
    if not model.is_moe or config.mesh.split_experts:
        divides("the experts' width (model.expert_hidden_size)" if model.is_moe else "the MLP's width (model.expert_hidden_size)", model.expert_width)  # fmt: skip


def _validate_moe(model: ModelConfig, mesh: MeshConfig, require: Any) -> None:
    h, r, experts, k, ranks = model.hidden_size, model.down_ratio, model.expert_count, model.choices, mesh.expert_ranks
    require(0 < r <= 1, f"model.down_ratio={r:g} must lie in (0, 1]")
    # A decimal spelling such as 0.3333 is not held against a width that it can only mean.
    require(abs(r * h - round(r * h)) < 1e-6 and round(r * h) >= 1, f"model.down_ratio × model.hidden_size = {r:g} × {h} = {r * h:g} must be a whole number; use {max(1, round(r * h)) / h:g}")  # fmt: skip
    if model.structure == "vanilla":
        share = model.num_experts * r / 4
        require(abs(share - round(share)) < 1e-6 and share >= 2, f"structure=vanilla has model.num_experts × model.down_ratio / 4 = {model.num_experts} × {r:g} / 4 = {share:g} experts, which must be a whole number of at least 2; use model.num_experts={max(2, math.ceil(share)) * math.ceil(4 / r)}")  # fmt: skip
    names = ("vanilla's num_experts", "model.vanilla_top_k") if model.structure == "vanilla" else ("model.num_experts", "model.top_k")  # fmt: skip
    require(k <= experts, f"{names[1]}={k} must be at most {names[0]}={experts}; use {experts}")
    require(experts % ranks == 0, f"{names[0]}={experts} must be a multiple of mesh.node × mesh.expert = {ranks}; use {-(-experts // ranks) * ranks}, or {math.gcd(experts, ranks)} ranks")  # fmt: skip
    groups, best = model.num_expert_groups, model.top_groups
    require(experts % groups == 0, f"{names[0]}={experts} must be a multiple of model.num_expert_groups={groups}; use {math.gcd(experts, groups)} groups")  # fmt: skip
    require(best <= groups, f"model.top_groups={best} must be at most model.num_expert_groups={groups}; use {groups}")
    require(k <= best * (experts // groups), f"{names[1]}={k} must be at most the {best * (experts // groups)} experts of model.top_groups={best} groups; use more groups")  # fmt: skip
    require(model.balance != "quantile" or (groups == best and k < experts), f"model.balance=quantile needs a free choice of fewer experts than there are, not {names[1]}={k} of {experts} in top_groups={best} of {groups} groups; use balance=bias")  # fmt: skip
    require(model.balance == "quantile" or model.balance_step == "next", f"model.balance_step={model.balance_step} is for balance=quantile, not {model.balance}; use balance=quantile, or balance_step=next")  # fmt: skip
    require(model.capacity_factor > 0, f"model.capacity_factor={model.capacity_factor:g} must be above 0; use inf for no limit (dropless)")  # fmt: skip
    # What stands behind the combine is bigmac's control, too: is it the latent that costs quality, or the missing norm?
    narrow = model.structure == "bigmac" or set(model.latent_norms) <= {"post_combine", "skip", "gate"}
    require(narrow, f"model.latent_norm={model.latent_norm} needs structure=bigmac, not {model.structure}; use latent_norm=none, post_combine, skip or gate")  # fmt: skip
