"""Makes experts that are copies: of a dense model's MLP (upcycle), or of the experts that a model has (widen).

E experts, K choices, c copies, D hidden, F expert hidden, Y layers.
"""

import math

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.parameters import declared_leaves
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.tuning.conversion.rebuild import rebuild_model, with_model

# A dense layer's matrices → those of each of its experts.
_MLP = {
    "up.w_DF": "w_in_eRF", "gate.w_DF": "w_gate_eRF", "down.w_DF": "w_out_eFR",
    "up.b_F": "b_in_eF", "gate.b_F": "b_gate_eF", "down.b_F": "b_out_eR",
}  # fmt: skip


def upcycled(config: Config, experts: int, top_k: int) -> Config:
    """The config of what `upcycle` makes.

    Raises:
      ConfigError: not a dense model, or numbers that don't fit.
    """
    m = config.model
    if m.structure != "dense":
        raise ConfigError(f"model.structure={m.structure} can't be upcycled, only dense; use `widen` for more experts")
    if top_k < 2:
        raise ConfigError(
            f"--top_k={top_k} must be at least 2: a single gate is not divided by itself, and the model would not "
            f"begin as the dense one"
        )
    if m.blocks:
        raise ConfigError(
            f"model.blocks={m.blocks} can't be upcycled, only attention and MLPs in turn (an empty pattern)"
        )
    return with_model(
        config, {"num_experts": "--experts", "top_k": "--top_k"},
        structure="fine_grained", num_experts=experts, top_k=top_k, expert_hidden_size=m.expert_width,
        router_renormalize=True, router_scale=1.0, num_shared_experts=0, capacity_factor=math.inf, overflow="drop",
        latent_norm="none", first_dense_layers=0, num_expert_groups=1, top_groups=1,
    )  # fmt: skip


def upcycle(config: Config, model: Transformer, experts: int, top_k: int) -> tuple[Config, Transformer]:
    """Makes a dense model fine_grained: each expert is its MLP, behind a new router (Komatsuzaki et al. 2023, "Sparse
    upcycling"). Gates are divided by their sum, so it computes what the dense model does. Errors as for `upcycled`.

    The router's gradient and the tokens that each is sent make the experts different: no noise is needed.
    """
    target = upcycled(config, experts, top_k)
    leaves = declared_leaves(model)
    given = {
        f"layers.mlp.experts.{ours}": np.repeat(np.asarray(leaves[f"layers.mlp.{theirs}"])[:, None], experts, axis=1)
        for theirs, ours in _MLP.items()
        if f"layers.mlp.{theirs}" in leaves
    }
    return target, rebuild_model(target, model, given)


def widened(config: Config, copies: int) -> Config:
    """The config of what `widen` makes.

    Raises:
      ConfigError: a model without experts, or whose experts are chosen by group.
    """
    m = config.model
    if not m.is_moe or m.structure == "vanilla":
        raise ConfigError(f"model.structure={m.structure} can't be widened, only fine_grained and bigmac")
    if m.num_expert_groups > 1:
        raise ConfigError(f"model.num_expert_groups={m.num_expert_groups} must be 1: copies would leave their group")
    if m.router == "hyper":
        raise ConfigError(
            "model.router=hyper can't be widened: its matrix is made, not stored; export and import the run"
        )
    if copies < 2:
        raise ConfigError(f"--copies={copies} must be at least 2")
    if m.top_k == 1 and m.router_renormalize:  # its gate was not divided by itself; the copies' are, by their sum
        raise ConfigError("model.top_k=1 with router_renormalize=True can't be widened: gates of several are divided")
    # A softmax over c copies divides by c itself, and so does the sum of the chosen gates.
    divides = m.router_scores == "softmax" or m.router_renormalize
    return with_model(
        config, {"num_experts": "--copies × model.num_experts"},
        num_experts=copies * m.num_experts, top_k=copies * m.top_k, expert_hidden_size=m.expert_width,
        router_scale=m.router_scale if divides else m.router_scale / copies,
    )  # fmt: skip


def widen(config: Config, model: Transformer, copies: int, noise: float = 0.01) -> tuple[Config, Transformer]:
    """Copies each expert c times, and chooses c times as many: LatentMoE's `acc` (Elango et al. 2026, arXiv 2601.18089)
    from a trained model. Errors as for `widened`.

    A token that chose an expert chooses all its copies, and their gates sum to the old one. So without noise the model
    computes what it did, and the copies, which see the same tokens, would stay equal for ever.

    Args:
      noise: N(0, noise²) times its root mean square is added to each of the experts' and the router's matrices.
    """
    target = widened(config, copies)
    softmax = config.model.router_scores == "softmax"  # what is added to its scores is divided like them
    draw = np.random.default_rng(config.train.seed).standard_normal
    given = {}
    for name, leaf in declared_leaves(model).items():
        part = name.partition(".mlp.")[2]
        axis = {"router_DE": 2, "router_bias_E": 1, "router_logit_bias_E": 1}.get(
            part, 1 if part.startswith("experts.") else None
        )
        if axis is None:
            continue
        value = np.repeat(np.asarray(leaf, np.float32), copies, axis=axis)
        if part == "router_DE" or ".w_" in part:
            size = np.sqrt(np.square(value).mean((-2, -1), keepdims=True))  # of each layer's, and of each expert's
            value += noise * size * draw(value.shape).astype(np.float32)
        given[name] = value / copies if softmax and part == "router_bias_E" else value
    return target, rebuild_model(target, model, given)
