"""The paper's formulas and figures (arXiv 2502.16927), and how near the cost model comes to them.

Table 1 states neither its model nor its batch. We take GPT3-XL with as many tokens as make the exchange as long as the
table's: one scale and one latency are fitted to its column of training exchanges. The rest follows from three
assumptions, the same for every K: the scale is in the tokens alone, so that gradients are those of all of GPT3-XL; they
are sent in two bytes; matmuls reach 70 % of the peak (at 50 % and less K = 1 misses its share by more than 5 points).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.planning.cluster import Cluster, cluster
from bigmac_jax.planning.hardware import Hardware, load_hardware
from bigmac_jax.planning.job import OPTIMIZER_BYTES, Times

RANKS = 32
# The paper trains in BF16 (Table 4), and is taken to sum gradients so; it doesn't say. In float32 the shares of Table 1
# would come out 8 to 16 points too low.
GRADIENT_BYTES = 2


@dataclass(frozen=True)
class PaperModel:
    """What the paper's formulas read of a model; by default GPT3-XL with 64 experts."""

    structure: str = "fine_grained"  # fine_grained | bigmac
    top_k: int = 8  # K
    tokens: float = 256 * 2048  # b·s of a step
    layers: int = 24  # l
    hidden: int = 2048  # h
    experts: int = 64  # e
    ratio: float = 0.25  # r
    length: int = 2048  # s
    vocab: int = 50304  # v: GPT-2's 50,257 rounded up to a multiple of 128, which gives the digits of Table 4
    ranks: int = RANKS  # ep

    @property
    def is_bigmac(self) -> bool:
        return self.structure == "bigmac"


def paper_model(config: Config) -> PaperModel:
    """What the formulas read of a config; ConfigError for a structure that they do not cover."""
    m, data = config.model, config.data
    if m.structure not in ("fine_grained", "bigmac"):
        raise ConfigError(f"--paper has formulas for fine_grained and bigmac, not for structure={m.structure}; drop it")
    tokens = data.batch_size * data.sequence_length
    return PaperModel(
        m.structure, m.top_k, tokens, m.num_layers, m.hidden_size, m.num_experts, m.down_ratio, data.sequence_length,
        m.vocab_size, config.mesh.expert_ranks,
    )  # fmt: skip


def left_out(config: Config) -> list[str]:
    """Names of the model's fields whose values the formulas do not cover."""
    m = config.model
    differs = {
        "gated": m.gated,
        "num_kv_heads": m.kv_heads != m.num_heads,
        "head_dim": m.num_heads * m.head_size != m.hidden_size,
        "tie_embeddings": not m.tie_embeddings,
        "expert_hidden_size": m.expert_width != (m.hidden_size if m.structure == "bigmac" else m.latent_size),
        "num_shared_experts": m.shared_width > 0,
        "blocks": m.blocks != "",
        "first_dense_layers": m.first_dense_layers > 0,
        "mtp_modules": m.mtp_modules > 0,
        "latent_norm": "gate" in m.latent_norms,
        "router": m.router in ("affine", "hyper"),
    }
    return [f"model.{name}" for name, different in differs.items() if different]


def paper_parameters(model: PaperModel) -> float:
    """Parameters by Table 3: (4h² + 8h + (2rh² + 2rh)e)·l + (v + e + 2)·h, and 2rlh² for W↓ and W↑."""
    h = model.hidden
    dense = (4 * h * h + 8 * h) * model.layers + (model.vocab + model.experts + 2) * h
    return dense + _expert_parameters(model) + model.is_bigmac * 2 * model.ratio * model.layers * h * h


def _expert_parameters(model: PaperModel) -> float:
    h, r = model.hidden, model.ratio
    return (2 * r * h * h + 2 * r * h) * model.experts * model.layers


def paper_flops(model: PaperModel) -> float:
    """FLOPs of a step by Table 3: 12·bs·l·h²·(2 + s/h + v/(2lh) + rK), and 12·r·bs·l·h² for W↓ and W↑."""
    h, r = model.hidden, model.ratio
    share = 2 + model.length / h + model.vocab / (2 * model.layers * h) + r * model.top_k + model.is_bigmac * r
    return 12 * model.tokens * model.layers * h * h * share


def paper_all_to_all_bytes(model: PaperModel) -> float:
    """All-to-all bytes of a step and all ranks by Table 3: 8·bs·l·h·K·(ep − 1)/ep, times r for bigmac.

    At capacity factor 1; the 8 are two bytes, two exchanges, forward and backward.
    """
    width = model.hidden * (model.ratio if model.is_bigmac else 1)
    return 8 * model.tokens * model.layers * width * model.top_k * (model.ranks - 1) / model.ranks


class Measured(NamedTuple):
    """A row of Table 1: milliseconds of the all-to-all, and its share of the whole."""

    training_ms: float
    training_share: float
    inference_ms: float
    inference_share: float


# By K; fine_grained, 64 experts, ep = 32.
TABLE_1 = {
    1: Measured(336.9, 0.599, 94.9, 0.512),
    2: Measured(535.6, 0.713, 132.9, 0.652),
    4: Measured(1089.5, 0.841, 268.7, 0.792),
    6: Measured(1692.8, 0.891, 457.0, 0.865),
    8: Measured(2383.4, 0.918, 696.5, 0.906),
}


class Speedup(NamedTuple):
    """How many times faster bigmac is than fine_grained: the step, and its exchanges alone."""

    step: float
    exchange: float


# By K; Figure 4 at ep = 32, tp = 1.
FIGURE_4 = {4: Speedup(2.37, 3.48), 8: Speedup(2.95, 3.72)}


class Fit(NamedTuple):
    """What is fitted to Table 1."""

    scale: float  # Table 1's tokens × layers over GPT3-XL's step of 524,288 × 24
    latency: float  # seconds of a message between machines


def fit_table1(hardware: Hardware | None = None) -> Fit:
    """Fits scale and latency to Table 1's five training exchanges, by least squares of their relative errors."""
    here = _cluster(hardware or load_hardware("paper"), latency=0.0)
    bytes_alone = [_exchange(here, PaperModel(top_k=k)) for k in TABLE_1]
    a_second_a_message = _exchange(_cluster(here.hardware, latency=1.0), PaperModel(tokens=0))
    measured = np.array([row.training_ms / 1e3 for row in TABLE_1.values()])
    terms = np.stack([bytes_alone, np.full(len(TABLE_1), a_second_a_message)], axis=1) / measured[:, None]
    scale, latency = np.linalg.lstsq(terms, np.ones(len(TABLE_1)), rcond=None)[0]
    return Fit(float(scale), float(latency))


def paper_step(structure: str, top_k: int, fit: Fit, hardware: Hardware | None = None) -> Times:
    """Predicts a step of the model of Table 1 and Figure 4, at capacity factor 1."""
    here = _cluster(hardware or load_hardware("paper"), fit.latency)
    model = PaperModel(structure, top_k)
    model = replace(model, tokens=fit.scale * model.tokens)
    h = here.hardware
    flops, experts = paper_flops(model), _expert_parameters(model)
    dense = paper_parameters(model) - experts
    return Times(
        matmul=flops / (RANKS * h.peak_flops * h.matmul_efficiency),
        exchange=_exchange(here, model),
        gradients=here.all_reduce(GRADIENT_BYTES * dense, RANKS),  # the experts are on one rank each
        optimizer=(dense + experts / RANKS) * OPTIMIZER_BYTES / h.memory_bandwidth,
        hidden=0.0,
        tokens=round(model.tokens),
        at_peak=flops / (RANKS * h.peak_flops),
    )


def _cluster(hardware: Hardware, latency: float) -> Cluster:
    hardware = replace(hardware, slow=replace(hardware.slow, latency=latency))
    return cluster({"data": 1, "node": 1, "expert": RANKS}, hardware)


def _exchange(here: Cluster, model: PaperModel) -> float:
    """Seconds of a step's exchanges: two per layer, forward and backward."""
    return here.exchange(Sent(paper_all_to_all_bytes(model) / RANKS, 0.0), 4 * model.layers)


class Row(NamedTuple):
    """A figure of the paper beside the cost model's; `fitted` if the model was fitted to it."""

    name: str
    paper: float
    model: float
    fitted: bool = False


def comparison(hardware: Hardware | None = None) -> list[Row]:
    """All figures of the paper beside the model's, in the order of its tables: ms, shares in %, speedups in times."""
    fit = fit_table1(hardware)
    rows = []
    for structure, figures in (("fine_grained", (3.73, 3490.67, 1488.0)), ("bigmac", (3.78, 3649.0, 372.0))):
        model = PaperModel(structure)
        rows += [
            Row(f"Table 4, {structure}: parameters, 1e9", figures[0], paper_parameters(model) / 1e9),
            Row(f"Table 4, {structure}: TFLOPs a step", figures[1], paper_flops(model) / 1e12),
            Row(f"Table 4, {structure}: all-to-all, GiB", figures[2], paper_all_to_all_bytes(model) / 2**30),
        ]
    for k, measured in TABLE_1.items():
        step = paper_step("fine_grained", k, fit, hardware)
        rest = measured.training_ms * (1 / measured.training_share - 1)
        # Forward alone: half of the exchanges, a third of the matmuls; of as many tokens, which the table doesn't say.
        inference, matmul = step.exchange / 2, step.matmul / 3
        rows += [
            Row(f"Table 1, K={k}: training all-to-all, ms", measured.training_ms, 1e3 * step.exchange, fitted=True),
            Row(f"Table 1, K={k}: share of the step, %", 100 * measured.training_share, 100 * step.exchange_share),
            Row(f"Table 1, K={k}: all the rest, ms", rest, 1e3 * (step.total - step.exchange)),
            Row(f"Table 1, K={k}: inference all-to-all, ms", measured.inference_ms, 1e3 * inference),
            Row(
                f"Table 1, K={k}: share of inference, %",
                100 * measured.inference_share,
                100 * inference / (inference + matmul),
            ),
        ]
    for k, speedup in FIGURE_4.items():
        fine, bigmac = (paper_step(structure, k, fit, hardware) for structure in ("fine_grained", "bigmac"))
        rows += [
            Row(f"Figure 4, K={k}: step, times", speedup.step, fine.total / bigmac.total),
            Row(f"Figure 4, K={k}: exchange alone, times", speedup.exchange, fine.exchange / bigmac.exchange),
        ]
    return rows
