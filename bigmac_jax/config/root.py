"""The whole config: its sections, the rules between them, and how it is saved and read back."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from bigmac_jax.config.errors import ConfigError, near_divisors, near_ranks, require
from bigmac_jax.config.execution import EXCHANGES_BY_EXPERT, ExecutionConfig, MeshConfig
from bigmac_jax.config.model import ModelConfig
from bigmac_jax.config.names import unknown_field
from bigmac_jax.config.objects import parse_object
from bigmac_jax.config.places import check_place
from bigmac_jax.config.section import Section, all_field_types
from bigmac_jax.config.training import DataConfig, OptimizerConfig, TrainConfig
from bigmac_jax.config.tuning import TuningConfig

# Tokenizers whose size is known without reading a file; `bpe` is trained to model.vocab_size.
TOKENIZER_SIZES = {"bytes": 257, "gpt2": 50257}
# Fields that were the model's, and are execution's now.
_YOUNGER = {
    "gather_dtype", "reduce_dtype", "compiler_options", "mamba_chunk", "resident_layers", "resident_experts",
    "offload_optimizer",
}  # fmt: skip
_MOVED = {f.name for f in dataclasses.fields(ExecutionConfig)} - _YOUNGER
# Fields that are gone, with their defaults, which a saved config may hold; for other values there is this commit.
_REMOVED = {"model.vanilla_top_k": 1}
_REMOVED_VALUES = {("model.latent_norm", "both"), ("model.latent_norm", "scale")}
_LAST_COMMIT = "d8fd857"
_MOST_SORTED = 2**22  # biases that a step's tokens require, [T, E], up to which they are sorted on every rank


@dataclass(frozen=True)
class Config(Section):
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    # Of tokenised corpora and compiled programs. No saved config has it: native code is loaded from there.
    cache_dir: str = os.environ.get("BIGMAC_CACHE_DIR") or "~/.cache/bigmac_jax"  # $BIGMAC_CACHE_DIR, if that is set

    @property
    def dropless(self) -> bool:
        """True if no expert drops rows in training."""
        if math.isinf(self.model.capacity_factor) or not self.model.is_moe:
            return True
        # `dedup` and `hierarchical` have room for what they send to other ranks, and only for that.
        without_room = ("gather", "ragged", *(() if self.mesh.expert_ranks > 1 else ("dedup", "hierarchical")))
        return self.execution.exchange in without_room

    @property
    def has_segments(self) -> bool:
        """True if a token attends to its own document or conversation alone."""
        return self.data.documents == "masked" or self.tuning.objective != "pretrain"

    @property
    def sorts_biases(self) -> bool:
        """True if quantile balancing sorts the biases that a step's tokens require, and does not count them in bins: of
        a batch that is small, in one part, of one replica, and has no padding."""
        entries = self.data.batch_size * self.data.sequence_length * self.model.expert_count
        padded = self.has_segments or self.model.mtp_modules > 0
        return self.train.accumulate_steps == self.mesh.replica == 1 and not padded and entries <= _MOST_SORTED

    @property
    def grows_choices(self) -> bool:
        """True if a token is sent to fewer experts than model.top_k at first."""
        return self.train.choices_from > 0 and self.model.structure not in ("dense", "vanilla")

    @property
    def projection_rate(self) -> float:
        """The learning rate of W↓ and W↑ over that of all else."""
        slow = self.model.structure == "bigmac" and self.model.projection_init == "selection"
        return self.optimizer.projection_rate or (1 / 8 if slow else 1.0)

    @property
    def mamba_chunk(self) -> int:
        """Positions that a Mamba layer computes at once in training."""
        return min(self.execution.mamba_chunk, self.data.sequence_length)

    @property
    def context_length(self) -> int:
        """Tokens that the model takes, and rows of its learned positions, whatever windows it is trained on now."""
        return max(self.model.context_length, self.data.sequence_length)

    @property
    def trains_mtp(self) -> bool:
        """True if next-token modules are trained: adapters leave them alone."""
        return self.model.mtp_modules > 0 and not self.tuning.lora_rank

    @property
    def step_model(self) -> ModelConfig:
        """The model that a training step computes: without next-token modules that it leaves alone."""
        alone = self.model.mtp_modules > 0 and not self.trains_mtp
        return dataclasses.replace(self.model, mtp_modules=0, mtp_blocks="") if alone else self.model

    def describe(self) -> str:
        """One line: the structure, its experts, the width of the exchange, and its capacity."""
        m = self.model
        blocks = f", layers {m.blocks} × {m.num_layers}" if m.blocks else ""
        blocks += f", next-token modules {m.mtp_stack.blocks} × {m.mtp_modules}" if m.mtp_modules else ""
        if not m.is_moe:
            return f"dense: one MLP of width {m.expert_width} a layer{blocks}"
        shared = f", shared experts of width {m.shared_width}" if m.shared_width else ""
        capacity = f"capacity factor {m.capacity_factor:g}"
        capacity += ", overflow to the next expert" if m.overflow == "next" else ""
        capacity = "dropless" if self.dropless else capacity
        first = f", no experts in the first {m.first_dense_layers} layers" if m.first_dense_layers else ""
        first += blocks
        norm = f", latent norm {m.latent_norm_kind}" if m.latent_norms else ""
        how = f", projection init {m.projection_init}, projection rate {self.projection_rate:g}"
        how = how if m.structure == "bigmac" else ""
        router = "" if m.router == "linear" else f", router {m.router}"
        router += f" of width {m.hyper_width}" if m.router == "hyper" else ""
        instead = f" instead of {m.hidden_size}" if m.wire_size != m.hidden_size else ""
        return (
            f"{m.structure}: {m.expert_count} experts of width {m.expert_width} a layer, top-{m.choices}{router}, "
            f"rows of {m.wire_size} numbers{instead} in the exchange{norm}{how}{shared}{first}, {capacity}"
        )

    @property
    def resolved(self) -> "Config":
        """The config with `auto` replaced by what it means today, so that a saved run stays what it was."""
        model = dataclasses.replace(self.model, latent_norm=self.model.latent_norm_kind)
        optimizer = dataclasses.replace(self.optimizer, projection_rate=self.projection_rate)
        return dataclasses.replace(self, model=model, optimizer=optimizer)

    def to_json(self) -> str:
        """The text of config.json, without cache_dir."""
        values = self.resolved.as_dict()
        del values["cache_dir"]
        return json.dumps(_spell_inf(values), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "config.json") -> "Config":
        """Reads what `to_json` wrote; raises ConfigError naming the file `name`."""
        try:
            values = parse_object(text)
        except ValueError as error:
            raise ConfigError(f"{name} is not valid JSON ({error}); restore it or start a new workdir") from None
        if {"model_type", "architectures"} & set(values):
            folder = os.path.dirname(name) or "."
            raise ConfigError(
                f"{folder} is a Hugging Face folder, not a run; make one with bigmac convert import "
                f"--checkpoint={folder} --workdir=NEW, or train from it with --config.train.init_from={folder}"
            )
        values.pop("cache_dir", None)
        return from_dict(values)

    def check(self) -> None:
        """The rules between sections that a plan needs, too; each section has checked itself, and what reads data
        checks that tokenizer and rows fit."""
        model = self.model
        require(self.cache_dir != "", "cache_dir is empty; give a folder, or leave it out")
        check_place(self.cache_dir, "cache_dir")
        self._check_tuning()
        self._check_choices()
        self._check_mtp()
        if self.mesh.tensor > 1:
            self._check_tensor()
        if model.is_moe:
            name, experts, ranks = model.count_name, model.expert_count, self.mesh.expert_ranks
            saved = self.train.experts_per_checkpoint
            require(saved < experts, f"train.experts_per_checkpoint={saved} must be below {name}={experts}; use fewer, or 0, which saves all")  # fmt: skip
            several = sum(bool(stack.experts) for stack in self.model.stacks) > 1
            require(not (saved and several), f"train.experts_per_checkpoint={saved} saves experts of one stack of layers in turn, and model.blocks={self.model.blocks} has several; use experts_per_checkpoint=0")  # fmt: skip
            require(not (saved and self.tuning.lora_rank), f"train.experts_per_checkpoint={saved} saves some of the experts, and tuning.lora_rank={self.tuning.lora_rank} trains adapters, which are small; use experts_per_checkpoint=0")  # fmt: skip
            require(experts % ranks == 0, f"{name}={experts} must be a multiple of mesh.node × mesh.expert = {ranks}; use model.num_experts={model.fitting_experts(ranks)}, or {near_ranks(experts, ranks)} ranks")  # fmt: skip

    def _check_tuning(self) -> None:
        """Tuning needs a model to begin with, and leaves alone what it freezes."""
        model, tuning, begins = self.model, self.tuning, bool(self.train.init_from)
        if model.is_moe and (frozen := tuning.frozen_router):
            require(model.balance != "quantile", f"model.balance=quantile moves the router's bias, and {frozen} leaves that alone; use balance=bias with balance_bias_rate=0")  # fmt: skip
            require(not (model.balance == "bias" and model.balance_bias_rate), f"model.balance_bias_rate={model.balance_bias_rate:g} moves the router's bias, and {frozen} leaves that alone; use balance_bias_rate=0")  # fmt: skip
        if rank := tuning.lora_rank:
            require(begins, f"tuning.lora_rank={rank} adapts a model; say which: train.init_from")
            smallest = min(model.wire_size, model.hidden_size)
            require(rank <= smallest, f"tuning.lora_rank={rank} must be at most {smallest}, the smallest width of the model; use fewer, or train the model itself (0)")  # fmt: skip
        if tuning.objective == "dpo":
            require(begins, "tuning.objective=dpo compares with the model that it begins with; give train.init_from")
            require(model.balance_step == "next", "model.balance_step=same sends an answer to other experts in training than its reference does; use balance_step=next with tuning.objective=dpo")  # fmt: skip

    def _check_choices(self) -> None:
        """Choices grow to model.top_k from fewer, whose gates still tell the router something."""
        model, first, steps = self.model, self.train.choices_from, self.train.choices_steps
        if not self.grows_choices:
            return
        given = f"train.choices_from={first}"
        require(first < model.choices, f"{given} must be below model.top_k={model.top_k}; use 0 for top_k from the first step on")  # fmt: skip
        require(steps > 0, f"{given} needs train.choices_steps, in which choices grow to model.top_k={model.top_k}; use choices_steps={self.train.steps} for the whole run")  # fmt: skip
        require(first > 1 or not model.router_renormalize, f"{given} with model.router_renormalize leaves a gate that is always 1, from which the router learns nothing; use choices_from=2")  # fmt: skip
        require(model.overflow == "drop", f"{given}: model.overflow={model.overflow} finds room for model.top_k choices, those that are not taken yet among them; use overflow=drop")  # fmt: skip
        require(model.balance != "quantile", f"{given}: model.balance=quantile solves its bias for model.top_k choices; use balance=bias or aux_loss")  # fmt: skip
        require(self.tuning.objective != "dpo", f"{given} sends an answer to fewer experts in training than its reference does; use choices_from=0 with tuning.objective=dpo")  # fmt: skip

    def _check_mtp(self) -> None:
        """What next-token modules are not trained with."""
        modules, length, saved = self.model.mtp_modules, self.data.sequence_length, self.train.experts_per_checkpoint
        given = f"model.mtp_modules={modules}"
        require(modules < length, f"{given} must be below data.sequence_length={length}, or a window has no token that the last one predicts; use mtp_modules={min(1, length - 1)}")  # fmt: skip
        instead = "use mtp_modules=0, which leaves a pretrained model's out"
        require(not modules or self.tuning.objective != "dpo", f"{given} are not trained by tuning.objective=dpo; {instead}")  # fmt: skip
        require(not modules or not self.tuning.teacher, f"{given} are not trained beside a teacher (tuning.teacher); {instead}")  # fmt: skip
        require(not (saved and self.model.mtp_stack.experts), f"train.experts_per_checkpoint={saved} saves some experts of the model's layers, and next-token modules ({given}) have experts, too; use experts_per_checkpoint=0, or model.mtp_blocks=*-")  # fmt: skip

    def _check_tensor(self) -> None:
        """Widths that are split over mesh.tensor are multiples of it."""
        model, tensor = self.model, self.mesh.tensor

        def divides(name: str, value: int) -> None:
            require(value % tensor == 0, f"{name}={value} must be a multiple of mesh.tensor={tensor}; use mesh.tensor={near_ranks(value, tensor)}")  # fmt: skip

        divides("data.sequence_length", self.data.sequence_length)
        kv = model.kv_heads
        if model.count_trained("*"):
            divides("model.num_heads", model.num_heads)
            require(kv % tensor == 0 or tensor % kv == 0, f"model.num_kv_heads={kv} must be a multiple of mesh.tensor={tensor}, or divide it; use mesh.tensor={near_ranks(kv, tensor)}")  # fmt: skip
        require(model.vocab_size % tensor == 0, f"model.vocab_size={model.vocab_size} must be a multiple of mesh.tensor={tensor}; use {-(-model.vocab_size // tensor) * tensor}, or mesh.tensor={near_ranks(model.vocab_size, tensor)}")  # fmt: skip
        if model.count_trained("M"):
            divides("model.mamba_groups", model.mamba_groups)  # of which the heads are a multiple
        if model.is_moe and model.count_trained("-"):
            divides("the MLPs' width (model.dense_hidden_size)", model.mlp_width)
        if not model.is_moe or self.mesh.split_experts:
            width = "the experts' width" if model.is_moe else "the MLP's width"
            divides(f"{width} (model.expert_hidden_size)", model.expert_width)


def check_batch(config: Config, data: int, taken: str = "") -> None:
    """Checks what training needs and evaluation doesn't: that a step's batch divides over `data` ranks of the data axis,
    that the exchange can do what model.overflow says, and that none drops what DPO compares.

    Args:
      taken: says how `data` was found, if the config does not have it.

    Raises:
      ConfigError: it does not, or overlap_chunks doesn't divide a rank's tokens.
    """
    model, exchange = config.model, config.execution.exchange
    moves = model.is_moe and model.overflow == "next"
    require(not moves or exchange in EXCHANGES_BY_EXPERT, f"model.overflow=next needs an exchange that counts room by expert ({', '.join(EXCHANGES_BY_EXPERT)}), not execution.exchange={exchange}; use exchange=all_to_all, or overflow=drop")  # fmt: skip
    dpo = config.tuning.objective == "dpo"
    require(not dpo or config.dropless, f"model.capacity_factor={model.capacity_factor:g} drops other choices of an answer in training than of its reference, and a sampler drops none; use capacity_factor=inf with tuning.objective=dpo")  # fmt: skip
    batch_size, mesh, chunks = config.data.batch_size, config.mesh, config.execution.overlap_chunks
    shards = mesh.replica * data * mesh.expert_ranks * config.train.accumulate_steps
    fix, replica = ", or set mesh.data" if taken else "", "mesh.replica × " if mesh.replica > 1 else ""
    require(batch_size % shards == 0, f"data.batch_size={batch_size} must be a multiple of {replica}mesh.data × mesh.node × mesh.expert × train.accumulate_steps = {shards}{taken}; use {-(-batch_size // shards) * shards}{fix}")  # fmt: skip
    tokens = batch_size * config.data.sequence_length // (shards * mesh.tensor)
    if tokens % chunks:
        raise ConfigError(f"execution.overlap_chunks={chunks} must divide the {tokens} tokens of a rank{taken}; use {near_divisors(tokens, chunks)}")  # fmt: skip


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a Config from nested dictionaries; raises ConfigError for unknown fields and wrong types."""
    return _build(Config, values, "")


def check_name(name: str, value: str = "") -> None:
    """Raises ConfigError if `name` is no full name of a field, as model.top_k; it says where a moved field is now.

    Args:
      value: what follows the name on a command line, as `=4`.
    """
    if is_moved(name):
        new = f"execution.{name.removeprefix('model.')}"
        raise ConfigError(f"{name} is {new} now; use {f'--config.{new}{value}' if value else 'that'}")
    if name in _REMOVED:
        raise ConfigError(f"{name} is always {_REMOVED[name]} now; commit {_LAST_COMMIT} has the field")
    if name not in (known := list(all_field_types(Config))):
        raise ConfigError(unknown_field(name, known))


def is_moved(name: str) -> bool:
    """True if the field was moved from `model` to `execution`."""
    return name.startswith("model.") and name.removeprefix("model.") in _MOVED


def _build(cls: type[Section], values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "the config"
    require(isinstance(values, dict), f"{where}={values!r} must be a group of fields")
    kinds, parts = cls.field_types, {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if full in _REMOVED and value == _REMOVED[full]:
            continue
        if name not in kinds:
            check_name(full)
        if isinstance(value, str) and (full, value) in _REMOVED_VALUES:
            raise ConfigError(f"{full}={value} is no longer there; commit {_LAST_COMMIT} has it")
        nested = issubclass(kinds[name].kind, Section)
        parts[name] = _build(kinds[name].kind, value, f"{full}.") if nested else value
    return cls(**parts)


def _spell_inf(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spell_inf(entry) for name, entry in value.items()}
    return "inf" if value == math.inf else value
