"""Combinations of structure, router, documents, objective, mesh and parts, and values for them; each from a seed."""

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuningConfig,
    check_batch,
)
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch

VOCABULARY = 64
MESHES = {  # data, node, expert, tensor, by devices
    1: [(1, 1, 1, 1)],
    2: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    4: [(2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 4, 1), (1, 1, 2, 2), (2, 1, 1, 2), (4, 1, 1, 1)],
    8: [(2, 2, 2, 1), (2, 1, 2, 2), (1, 1, 8, 1), (8, 1, 1, 1)],
}
# The first moment of Adam's first step is the gradient itself, if b1 = 0 and nothing is clipped.
READABLE = OptimizerConfig(b1=0.0, clip_norm=0.0, warmup_steps=0)


class Case(NamedTuple):
    """What is run and compared."""

    seed: int
    config: Config
    teacher: Config | None
    padded: bool  # whether rows end in padding
    rows: int  # of a rank in a part

    def describe(self) -> str:
        """One line, of what is not a field's default."""
        said = [f"seed {self.seed}:", f"{self.rows} rows a rank and part" + (", padded" if self.padded else "")]
        plain = Config(optimizer=READABLE)
        for section in ("model", "execution", "mesh", "data", "train", "tuning"):
            own, default = getattr(self.config, section), getattr(plain, section)
            said += [f"{f.name}={getattr(own, f.name)}" for f in dataclasses.fields(own)
                     if getattr(own, f.name) != getattr(default, f.name)]  # fmt: skip
        if self.teacher is not None:
            of = self.teacher.model
            said.append(f"taught by structure={of.structure} router_scores={of.router_scores}")
        return " ".join(said)


def drawn(seed: int) -> Iterator[Case]:
    """The cases of a seed, one after the other: of its draws those that the config's own rules take."""
    draw = random.Random(seed)
    while True:
        with contextlib.suppress(ConfigError):
            yield _attempt(seed, draw)


def made(
    seed: int,
    model: dict[str, Any],
    mesh: tuple[int, ...] = (1, 1, 1, 1),
    rows: int = 1,
    parts: int = 1,
    length: int = 8,
    documents: str = "stream",
    padded: bool = False,
    tuning: dict[str, Any] | None = None,
    execution: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    replicas: bool = False,
    choices_from: int = 0,
) -> Case:
    """A case by its fields; `mesh` is data, or with `replicas` replica, node, expert, tensor, fsdp, split_experts."""
    tuning = tuning or {}
    config = Config(
        model=ModelConfig(**{"num_layers": 2, "vocab_size": VOCABULARY, "capacity_factor": math.inf} | model),
        execution=ExecutionConfig(**execution or {}),
        mesh=MeshConfig(1, *mesh[1:], replica=mesh[0]) if replicas else MeshConfig(*mesh),  # type: ignore[arg-type]
        # Nothing is read of either path.
        data=DataConfig(
            source="rows.jsonl",
            tokenizer="tokenizer.json",
            sequence_length=length,
            documents=documents,
            packing="best_fit" if padded and documents == "masked" else "stream",
            batch_size=math.prod(mesh[:3]) * parts * rows,
        ),
        optimizer=READABLE,
        train=TrainConfig(
            accumulate_steps=parts,
            init_from="model",
            choices_from=choices_from,
            choices_steps=10 if choices_from else 0,
        ),
        tuning=TuningConfig(**tuning),
    )
    check_batch(config, config.mesh.data)
    other = None
    if teacher is not None:
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **teacher), tuning=TuningConfig())
    return Case(seed, config, other, padded, rows)


def _attempt(seed: int, draw: random.Random) -> Case:
    def one_of(*values: Any) -> Any:
        return draw.choice(values)

    def maybe(chance: float) -> bool:
        return draw.random() < chance

    mesh = one_of(*MESHES[draw.choices((1, 2, 4, 8), (2, 5, 4, 1))[0]])
    fsdp, split_experts = maybe(0.3), mesh[3] > 1 and maybe(0.5)
    objective = draw.choices(("pretrain", "sft", "dpo"), (5, 2, 2))[0]
    distilled, lora = objective != "dpo" and maybe(0.25), maybe(0.1 if objective == "pretrain" else 0.4)
    documents = one_of("stream", "masked") if objective == "pretrain" else "stream"
    padded = (documents == "masked" or objective != "pretrain") and maybe(0.75)
    structure = draw.choices(("dense", "vanilla", "fine_grained", "bigmac"), (2, 2, 3, 6))[0]
    heads = one_of(2, 4)
    model: dict[str, Any] = {
        "structure": structure,
        "hidden_size": one_of(16, 32),
        "num_heads": heads,
        "num_kv_heads": one_of(0, heads // 2, 1),
        "head_dim": one_of(0, 0, 6),
        "norm": one_of("rmsnorm", "layernorm"),
        "norm_eps": one_of(1e-2, 5e-2),  # rows of a few numbers may be small, and a norm makes their rounding large
        "positions": one_of("rope", "learned", "none"),
        "activation": one_of("relu2", "gelu", "silu"),
        "gated": maybe(0.4),
        "use_bias": maybe(0.4),
        "qk_norm": maybe(0.5),
        "tie_embeddings": maybe(0.5),
        "scale_embedding": maybe(0.7),
        "expert_hidden_size": one_of(8, 16, 24),
        "latent_norm": "none",
    }
    frozen = False
    if structure != "dense":
        model |= _of_experts(draw, structure)
        if structure == "bigmac" and model["hidden_size"] == 16:
            model["down_ratio"] = 0.5  # a norm of four numbers is steep
        frozen = not lora and objective == "sft" and maybe(0.3)
        if (lora or frozen) and model["balance"] == "bias":
            model["balance_bias_rate"] = 0.0
    # Each part solves a bias of its own, of which the step leaves only the mean. And an oracle can't know on which side
    # of an edge rounding puts a token, so that there should be few (`oracle.router`).
    solves = model.get("balance_step") == "same"
    if solves:
        model |= {"first_dense_layers": 1, "num_experts": 4 if structure != "vanilla" else model["num_experts"]}
    tuning: dict[str, Any] = {"objective": objective, "train_router": not frozen}
    if lora:
        everything = "attention,projections,shared,experts,mlp,router"
        targets = one_of(everything, TuningConfig.lora_targets)
        tuning |= {"lora_rank": one_of(1, 3), "lora_alpha": one_of(2.0, 4.0), "lora_targets": targets}
    if objective == "dpo":
        tuning |= {"dpo_beta": one_of(0.1, 0.5)}
    teacher = None
    if distilled:
        tuning |= {"teacher": "teacher", "teacher_weight": one_of(0.3, 1.0), "hidden_weight": one_of(0.0, 0.2)}
        teacher = {"router_scores": one_of("softmax", "sigmoid")}
        if structure == "bigmac":
            teacher |= {"structure": "fine_grained", "latent_norm": "none"}
    exchange = one_of("auto", "all_to_all", "dedup", "hierarchical", "gather", "ragged")
    execution = {
        "exchange": exchange,
        "overlap_chunks": one_of(1, 1, 2),
        "attention": one_of("auto", "blocks", "xla"),
        "grouped_matmul": one_of("auto", "batched", "blocks", "kernel"),
        "remat": one_of("none", "layer", "exchange"),
        "unroll_layers": one_of(0, 1, 1, 1),  # all at once take twice as long to compile
        "buffer_factor": math.inf if exchange in ("gather", "ragged") else one_of(math.inf, math.inf, 1.5),
    }
    rows, parts, length = one_of(1, 2, 3), 1 if solves else one_of(1, 2, 3), one_of(8, 12, 16)
    replicas = mesh[0] > 1 and maybe(0.5)
    choices_from = 0
    if structure != "dense":
        model |= {"router": one_of("linear", "linear", "hyper", "affine", "frozen"), "hyper_width": 6}
        least, most = 1 + model["router_renormalize"], model["top_k"]
        if structure != "vanilla" and least < most and model["balance"] != "quantile" and objective != "dpo":
            choices_from = one_of(0, least, least, least)
    return made(
        seed,
        model,
        (*mesh, fsdp, split_experts),
        rows=rows,
        parts=parts,
        length=length,
        documents=documents,
        padded=padded,
        tuning=tuning,
        execution=execution,
        teacher=teacher,
        replicas=replicas,
        choices_from=choices_from,
    )


def _of_experts(draw: random.Random, structure: str) -> dict[str, Any]:
    def one_of(*values: Any) -> Any:
        return draw.choice(values)

    ratio = one_of(0.25, 0.5)
    experts = one_of(4, 8)
    balance = draw.choices(("aux_loss", "bias", "quantile", "none"), (5, 2, 3, 1))[0]
    norms = ["auto", "none", "post_combine", "skip", "gate"]
    norms += ["pre_dispatch"] if structure == "bigmac" else []
    groups, top_groups = (1, 1) if balance == "quantile" else one_of((1, 1), (1, 1), (2, 1), (4, 2))
    return {
        "num_experts": round(experts * 4 / ratio) if structure == "vanilla" else experts,
        "top_k": one_of(1, 2, 3),
        "down_ratio": ratio,
        "first_dense_layers": one_of(0, 0, 1),
        "dense_hidden_size": one_of(0, 24),
        "num_shared_experts": one_of(0, 1, 2),
        "shared_expert_hidden_size": one_of(0, 12),
        "latent_norm": one_of(*norms),
        "router_scores": one_of("softmax", "sigmoid"),
        "router_renormalize": one_of(True, True, False),
        "router_scale": one_of(1.0, 2.5),
        "balance": balance,
        "balance_coefficient": 0.05,
        "balance_scope": one_of("step", "part"),
        "balance_step": one_of("next", "same") if balance == "quantile" else "next",
        "z_loss_coefficient": one_of(0.0, 0.01),
        "num_expert_groups": groups,
        "top_groups": top_groups,
        "group_scores": one_of("top_k", "top_2"),
    }


# Values.


def value(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Of a parameter: nothing is zero or one, or it would hide a mistake."""
    v = draw.standard_normal(shape)
    if "embedding" in name or "positions" in name:
        v = 0.3 * v
    elif "scale" in name or "skip" in name or "factor" in name:
        v = 1 + 0.2 * v
    elif "bias" in name or ".b_" in name:
        v = 0.1 * v
    elif name.endswith(".b"):
        v = 0.2 * v  # W + (alpha / rank) A B is of the size of W
    elif "vector" not in name:
        v = v / math.sqrt(shape[-2])
    return v.astype(np.float32)


def sample(case: Case, draw: np.random.Generator) -> Batch:
    """Rows of documents, of answers or of pairs."""
    data, objective = case.config.data, case.config.tuning.objective
    B, L = data.batch_size, data.sequence_length
    inputs_BL, targets_BL = draw.integers(VOCABULARY, size=(2, B, L), dtype=np.int32)
    if not case.config.has_segments:
        return Batch(inputs_BL, targets_BL)
    segments_BL = np.full((B, L), PADDING, np.int32)
    for number, row in enumerate(segments_BL):
        # A row without anything is what fills a last batch up.
        if case.padded and number and draw.random() < 0.1:
            continue
        pieces = int(draw.integers(1, 4)) * 2 if objective == "dpo" else int(draw.integers(1, 5))
        if objective == "dpo":
            pieces = min(pieces, L // 2 // 2 * 2)
        used = int(draw.integers(pieces, L)) if case.padded else L
        cuts = np.sort(draw.choice(np.arange(1, used), size=pieces - 1, replace=False))
        for piece, (start, stop) in enumerate(zip([0, *cuts], [*cuts, used], strict=True)):
            row[start:stop] = piece
    unlearned_BL = segments_BL == PADDING
    if objective != "pretrain":
        prompts_BL = draw.random((B, L)) < 0.4
        prompts_BL[0, 0] = False
        unlearned_BL |= prompts_BL
    targets_BL[unlearned_BL] = NO_TARGET
    reference_BL = None
    if objective == "dpo" and not case.config.tuning.lora_rank:
        reference_BL = draw.uniform(3, 8, size=(B, L)).astype(np.float32)
    return Batch(inputs_BL, targets_BL, segments_BL, reference_BL)
