"""The configuration's fields: frozen dataclasses, validated when they are made. Nothing here touches a device."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from bigmac_jax.config.mixture import check_mixture
from bigmac_jax.config.names import field_names, unknown_field
from bigmac_jax.config.objects import parse_object
from bigmac_jax.config.rules import ConfigError, check_types, validate
from bigmac_jax.config.tuning import TuningConfig


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer and its feed-forward structure: what is computed.

    The defaults are the present day's backbone. The paper's is norm=layernorm, positions=learned, activation=gelu,
    use_bias=True, dropout=0.1, tie_embeddings=True.
    """

    structure: str = "bigmac"  # dense | vanilla | fine_grained | bigmac
    num_layers: int = 4
    hidden_size: int = 256  # h
    num_heads: int = 4
    num_kv_heads: int = 0  # 0 = num_heads; fewer is grouped-query attention
    head_dim: int = 0  # 0 = hidden_size / num_heads
    vocab_size: int = 8192
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-6
    positions: str = "rope"  # rope | learned | none
    rope_theta: float = 10_000.0
    activation: str = "relu2"  # relu2 | gelu | silu
    gated: bool = False  # experts and dense MLPs multiply by a second, linear branch
    use_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    scale_embedding: bool = True  # what is read of the embedding is multiplied by √h
    dropout: float = 0.0  # of the embedding and of each residual branch
    # The feed-forward layer. `vanilla` turns num_experts into e·r/4 experts of width 4h and top_k into vanilla_top_k.
    num_experts: int = 32  # e
    top_k: int = 4  # K
    vanilla_top_k: int = 1
    first_dense_layers: int = 0  # the first layers have an MLP in the experts' place (DeepSeek-V3)
    dense_hidden_size: int = 0  # of those MLPs: 0 = 4h
    down_ratio: float = 0.25  # r: wire width of bigmac and expert width of fine_grained, as a share of h
    expert_hidden_size: int = 0  # 0 = the paper's: r·h (fine_grained), h (bigmac), 4h (vanilla, dense)
    num_shared_experts: int = 0  # experts that every token passes, at full width
    shared_expert_hidden_size: int = 0  # 0 = r·h: as many parameters as a routed expert
    # A norm on the rows as they go out (pre_dispatch), on their sums as they come back (post_combine), or both. skip:
    # post_combine, of the sum and a learned share of the row that went out. gate: skip, and the layer's output gated by
    # the token. scale: no norm, a learned factor.
    # auto: skip for bigmac (docs/quality.md), none for the others.
    latent_norm: str = "auto"  # auto | none | pre_dispatch | post_combine | both | scale | skip | gate
    # What bigmac's W↓ and W↑ start as: r·h coordinates of h, each layer its own, which are then trained slowly
    # (optimizer.projection_rate; docs/quality.md), or N(0, 1 / rows).
    projection_init: str = "selection"  # selection | random
    capacity_factor: float = math.inf  # rows an expert takes per rank, ceil(f·T·K/E), and drops the rest; inf = all
    # The router (always float32, full width).
    router_scores: str = "softmax"  # softmax | sigmoid
    router_renormalize: bool = True  # the chosen gates, if several, are divided by their sum
    router_scale: float = 1.0  # gates are multiplied by it
    balance: str = "aux_loss"  # aux_loss | bias (DeepSeek-V3, no loss) | quantile (Kimi K3, no loss) | none
    balance_coefficient: float = 0.001  # weight of the auxiliary loss
    balance_step: str = "next"  # for which step quantiles are solved: next (by this one's scores) | same (by its own)
    balance_scope: str = "step"  # whose load it sees: step | part (of a batch in accumulate_steps parts; Megatron's)
    balance_bias_rate: float = 0.001  # step of the bias
    z_loss_coefficient: float = 0.0
    num_expert_groups: int = 1  # experts are chosen from the best top_groups of these groups (node-limited routing)
    top_groups: int = 1
    group_scores: str = "top_k"  # a group is as good as its K / top_groups best experts (DeepSeek-V3) | top_2: its two

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def is_moe(self) -> bool:
        return self.structure != "dense"

    @property
    def moe_layers(self) -> int:
        return self.num_layers - self.first_dense_layers if self.is_moe else 0

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP of a layer without experts."""
        return (self.dense_hidden_size or 4 * self.hidden_size) if self.is_moe else self.expert_width

    @property
    def latent_size(self) -> int:
        """R = r·h."""
        return round(self.down_ratio * self.hidden_size)

    @property
    def wire_size(self) -> int:
        """Width of the rows that cross the exchange: r·h for bigmac, h for the others."""
        return self.latent_size if self.structure == "bigmac" else self.hidden_size

    @property
    def latent_norm_kind(self) -> str:
        """`latent_norm`, of which `auto` is one of the others."""
        auto = "skip" if self.structure == "bigmac" else "none"
        return auto if self.latent_norm == "auto" else self.latent_norm

    @property
    def latent_norms(self) -> tuple[str, ...]:
        """What stands on the exchanged rows: of pre_dispatch, skip, post_combine, scale and gate."""
        several = {
            "none": (),
            "both": ("pre_dispatch", "post_combine"),
            "skip": ("skip", "post_combine"),
            "gate": ("skip", "post_combine", "gate"),
        }
        return several.get(self.latent_norm_kind, (self.latent_norm_kind,))

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer; `vanilla` has e·r/4, which gives it the same MoE parameters."""
        if self.structure == "vanilla":
            return round(self.num_experts * self.down_ratio / 4)
        return self.num_experts if self.is_moe else 0

    @property
    def choices(self) -> int:
        """Experts that a token is sent to."""
        if self.structure == "vanilla":
            return self.vanilla_top_k
        return self.top_k if self.is_moe else 0

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert (of the MLP for `dense`)."""
        if self.expert_hidden_size:
            return self.expert_hidden_size
        return {"fine_grained": self.latent_size, "bigmac": self.hidden_size}.get(self.structure, 4 * self.hidden_size)

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias, moved by the load, shifts the choice."""
        return self.balance in ("bias", "quantile")

    @property
    def group_best(self) -> int:
        """Experts of a group whose scores are summed to say how good it is."""
        best = 2 if self.group_scores == "top_2" else self.choices // self.top_groups
        return max(1, min(best, self.expert_count // self.num_expert_groups))

    @property
    def counts_loads_first(self) -> bool:
        """Whether a batch in parts needs the load of all parts before the gradient of the first."""
        return self.is_moe and self.balance == "aux_loss" and self.balance_scope == "step"

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together."""
        return self.num_shared_experts * (self.shared_expert_hidden_size or self.latent_size)


# Measured (docs/exchange.md): with four experts or more on a rank it takes two or three rounds in the first hundreds
# of steps, and one from then on.
AUTO_BUFFER_FACTOR = 1.5


@dataclass(frozen=True)
class ExecutionConfig:
    """How the model is executed. In exact arithmetic none of it changes the loss, but for the choices that a finite
    capacity drops; it may change between starts of a run.

    Parameters, their gradients' sums, the router, norms and the optimizer are float32 whatever `dtype` is.
    """

    dtype: str = "float32"  # of the computation: float32 | bfloat16
    gather_dtype: str = ""  # in which ranks gather parameters that are split over them, if it is narrower than dtype
    reduce_dtype: str = "float32"  # in which the ranks' gradients are summed
    exchange: str = "all_to_all"  # auto | all_to_all | dedup | hierarchical | gather | ragged (docs/exchange.md)
    wire_dtype: str = ""  # of rows between ranks: float32 | bfloat16 | float8_e4m3 | int8; "" = dtype
    wire_dtype_backward: str = ""  # of their gradients; "" = wire_dtype
    # Room of a dropless exchange over the rows expected; the rest goes in more rounds. auto: 1.5 for an exchange that
    # sends in rounds. inf: the worst case, in one round.
    buffer_factor: float | str = "auto"
    overlap_chunks: int = 1  # parts of a rank's tokens, one computed while the next is on the wire
    attention: str = "auto"  # blocks (CPU) | xla (any) | splash (TPU) | cudnn, triton (GPU); auto takes the fastest
    grouped_matmul: str = "auto"  # batched | blocks | kernel (docs/exchange.md); auto takes the backend's best
    remat: str = "none"  # layer: recompute each layer in the backward pass | exchange: all of it but the exchange
    unroll_layers: int = 0  # layers in a step of the loop over them; 0 = all on CPU, 1 elsewhere

    @property
    def room_factor(self) -> float:
        """`buffer_factor` as a number; an exchange that does not send in rounds has no use for it."""
        return AUTO_BUFFER_FACTOR if isinstance(self.buffer_factor, str) else self.buffer_factor

    @property
    def asks_for_rounds(self) -> bool:
        """Whether only an exchange that sends in rounds can have this `buffer_factor`."""
        return isinstance(self.buffer_factor, float) and math.isfinite(self.buffer_factor)

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; all but `tensor` split the batch. `node` (slow links) × `expert` share one set of experts."""

    data: int = 0  # 0 = all devices that the other axes leave
    node: int = 1
    expert: int = 1
    tensor: int = 1  # splits attention's and dense layers' matrices, tables of tokens, the sequence everywhere else
    fsdp: bool = False  # parameters and optimizer state are sharded over every axis that would replicate them
    split_experts: bool = False  # experts' matrices, too, are split over `tensor`

    @property
    def expert_ranks(self) -> int:
        return self.node * self.expert

    @property
    def model_ranks(self) -> int:
        """That hold the model once."""
        return self.expert_ranks * self.tensor

    def describe(self, data: int = 0) -> str:
        """The product of the axes, for an error; without `data` that of the others."""
        axes = {"data": data, "node": self.node, "expert": self.expert, "tensor": self.tensor}
        named = {name: size for name, size in axes.items() if (size > 0 and name != "tensor") or size > 1}
        names = " × ".join(f"mesh.{name}" for name in named)
        return f"{names} = {' × '.join(map(str, named.values()))}" if data else names


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into windows."""

    # sotu | tfds:NAME | hf:NAME[/CONFIG] | a file, folder or glob: .txt, .jsonl, .json, .csv, .parquet, .arrow, plain
    # or .gz or .zst
    source: str = "sotu"
    validation_source: str = ""  # of its own; without it a twentieth of a text without splits is held out
    test_source: str = ""
    mixture: str = ""  # instead of source: SOURCE=WEIGHT,SOURCE=WEIGHTxEPOCHS (which it is read at most), …
    curriculum: str = ""  # other weights from a step on: STEP:NAME=WEIGHT,NAME=WEIGHT;STEP:…
    text_field: str = "text"  # of rows: TFDS examples, JSON, columns
    null_rows: str = "stop"  # where that is null or missing: stop | skip (such rows are left out, and counted)
    tokenizer: str = "bpe"  # bpe (trained on the training split) | bytes | gpt2 | tokenizer.json | sentencepiece .model
    sequence_length: int = 256
    documents: str = "stream"  # stream: a token sees all before it in its window | masked: its own document alone
    packing: str = "stream"  # stream: windows cut the stream anywhere | best_fit: documents stay whole where they fit
    batch_size: int = 16  # sequences per step over all devices
    num_workers: int = 0  # Grain worker processes; 0 reads in threads


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon with AdamW beside it; a schedule after a linear warm-up."""

    name: str = "adamw"  # adamw | muon (of matrices between hidden activations; AdamW of all else)
    schedule: str = "cosine"  # cosine | linear | constant | wsd (warm-up, stable, decay)
    learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    # Of bigmac's W↓ and W↑, which all experts of a layer share, over learning_rate; 0 = 1/8 for a selection, else 1.
    projection_rate: float = 0.0
    warmup_steps: int = 100
    decay_steps: int = 0  # to the final rate: after the warm-up, 0 = to train.steps; of wsd the last ones, 0 = a fifth
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # of Muon
    moment_dtype: str = "float32"  # in which moments are kept: float32 | bfloat16
    average_decay: float = 0.0  # of the average of the parameters that is evaluated and exported, as 0.999; 0 = none
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings' positions are left alone
    clip_norm: float = 1.0  # 0 = off


@dataclass(frozen=True)
class TrainConfig:
    """The loop. 0 turns a periodic action off."""

    init_from: str = ""  # what a run begins with: a workdir, an export or a folder of Hugging Face; "" = random
    steps: int = 1000
    accumulate_steps: int = 1  # the batch is computed in this many parts
    seed: int = 1234
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0  # the last step is always saved
    keep_checkpoints: int = 2  # newest ones; the best by eval/loss is kept besides
    # A bad step: its loss or gradient is not finite, or its loss is a spike.
    on_bad_step: str = "stop"  # stop | skip (its update) | rewind (to the newest checkpoint, then past its data)
    max_bad_steps: int = 10  # that a run gets over; the next one ends it
    spike_factor: float = 0.0  # a loss above it × the median of the last 32 good ones is a spike; 0 = off
    wandb: str = ""  # a project of Weights & Biases that metrics go to besides; "" = none
    tasks: str = ""  # names of tasks, or paths of .toml files, with commas between, that are scored during training
    tasks_every: int = 0  # steps between that; the last one counts, too
    tasks_limit: int = 100  # rows of each task at most; 0 = all


@dataclass(frozen=True)
class Config:
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

    def __post_init__(self) -> None:
        check_types(self)
        validate(self)
        check_mixture(self.data.mixture, self.data.curriculum, self.data.source, DataConfig.source)

    @property
    def dropless(self) -> bool:
        """Whether no expert is ever full in training."""
        return math.isinf(self.model.capacity_factor) or self.execution.exchange in ("gather", "ragged")

    @property
    def has_segments(self) -> bool:
        """Whether a token sees its own document alone; conversations never see each other."""
        return self.data.documents == "masked" or self.tuning.objective != "pretrain"

    @property
    def projection_rate(self) -> float:
        """Of W↓ and W↑, over the learning rate of all else."""
        slow = self.model.structure == "bigmac" and self.model.projection_init == "selection"
        return self.optimizer.projection_rate or (1 / 8 if slow else 1.0)

    def describe(self) -> str:
        """One line that says what the structure resolved to."""
        m = self.model
        if not m.is_moe:
            return f"dense: one MLP of width {m.expert_width} a layer"
        shared = f", shared experts of width {m.shared_width}" if m.shared_width else ""
        capacity = "dropless" if self.dropless else f"capacity factor {m.capacity_factor:g}"
        first = f", no experts in the first {m.first_dense_layers} layers" if m.first_dense_layers else ""
        norm = f", latent norm {m.latent_norm_kind}" if m.latent_norms else ""
        how = f", projection init {m.projection_init}, projection rate {self.projection_rate:g}"
        how = how if m.structure == "bigmac" else ""
        return (
            f"{m.structure}: {m.expert_count} experts of width {m.expert_width} a layer, top-{m.choices}, "
            f"{m.wire_size} of {m.hidden_size} wide rows on the wire{norm}{how}{shared}{first}, {capacity}"
        )

    @property
    def resolved(self) -> "Config":
        """With what `auto` is today: what is saved stays what it was."""
        model = dataclasses.replace(self.model, latent_norm=self.model.latent_norm_kind)
        optimizer = dataclasses.replace(self.optimizer, projection_rate=self.projection_rate)
        return dataclasses.replace(self, model=model, optimizer=optimizer)

    def to_json(self) -> str:
        values = dataclasses.asdict(self.resolved)
        del values["cache_dir"]
        return json.dumps(_spell_inf(values), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "config.json") -> "Config":
        """Reads what `to_json` wrote; raises ConfigError naming the file `name`."""
        try:
            values = parse_object(text)
        except ValueError as error:
            raise ConfigError(f"{name} is not valid JSON ({error}); restore it or start a new workdir") from None
        return from_saved(values)


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a Config from nested dictionaries; raises ConfigError for unknown fields and wrong types."""
    return _build(Config, values, "")


def moved(name: str) -> str:
    """The new name of a field that was moved, or ""."""
    section, _, field_name = name.partition(".")
    execution = {f.name for f in dataclasses.fields(ExecutionConfig)}
    return f"execution.{field_name}" if section == "model" and field_name in execution - _NEVER_MODEL else ""


_NEVER_MODEL = {"gather_dtype", "reduce_dtype"}
_WORST_CASE: dict[str, Any] = {"buffer_factor": "inf"}  # of editions without the field


def from_saved(values: dict[str, Any]) -> Config:
    """As `from_dict`, of what `to_json` wrote, now or in an earlier edition, whose `cache_dir` is not taken."""
    values = second_edition(values)
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name != "cache_dir"}
    return from_dict(values)


def second_edition(values: Any) -> Any:
    """A config.json of an earlier edition as it would be written now: W↓ and W↑ started at random, latent_norm=auto was
    post_combine for bigmac, every buffer was of the worst case, and in the first edition `model` held what `execution`
    does."""
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return values
    values = values | {"model": {"projection_init": "random"} | values["model"]}
    if values["model"].get("latent_norm") == "auto":
        was = "post_combine" if values["model"].get("structure", ModelConfig.structure) == "bigmac" else "none"
        values["model"] |= {"latent_norm": was}
    if "execution" in values:
        execution = values["execution"]
        return values | {"execution": _WORST_CASE | execution if isinstance(execution, dict) else execution}
    model = {name: value for name, value in values["model"].items() if not moved(f"model.{name}")}
    execution = _WORST_CASE | {name: value for name, value in values["model"].items() if moved(f"model.{name}")}
    if type(remat := execution.get("remat")) is bool:
        execution["remat"] = "layer" if remat else "none"
    return values | {"model": model, "execution": execution}


def _build(cls: type, values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "the config"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}={values!r} must be a group of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if new := moved(prefix + str(name)):
            raise ConfigError(f"{prefix}{name} is {new} now; use that")
        if name not in fields:
            raise ConfigError(unknown_field(prefix + str(name), field_names(Config)))
    parts = {
        name: _build(fields[name].type, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        if dataclasses.is_dataclass(fields[name].type)
        else value
        for name, value in values.items()
    }
    return cls(**parts)


def _spell_inf(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spell_inf(entry) for name, entry in value.items()}
    return "inf" if value == math.inf else value
