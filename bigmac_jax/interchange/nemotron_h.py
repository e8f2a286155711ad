"""transformers' NemotronH: blocks of attention, Mamba-2, experts or an MLP in any order, one norm before each.

Its blocks are our residual branches (`model.blocks`): block 5 is the branch of that number, whatever layer it is in.
Its experts are ours: a sigmoid router of full width, whose bias shifts the choice alone, relu² experts without a gate
between `fc1_latent_proj` (W↓) and `fc2_latent_proj` (W↑), and a shared expert of full width. A model without a shared
expert is written with one of zeros, because the class always has one; without W↓ and W↑, moe_latent_size is null.
Mamba's five projections are one matrix there, and its three convolutions one.

Files hold next-token modules, too, which serving engines read and transformers' class ignores. mtp.layers.3 is the
fourth of their blocks, which are numbered on from one module to the next.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.config.blocks import name_branches, split_layers
from bigmac_jax.interchange import layout
from bigmac_jax.interchange.layout import (
    Leaves,
    Tensor,
    attention_tensors,
    expert_tensors,
    make_config,
    one_behind_the_other,
)
from bigmac_jax.interchange.tensor_files import Checkpoint, Index

_ZERO_WIDTH = 64  # of the shared expert that stands for none; small, and a multiple of what tensor parallelism splits
# The class's own defaults, of fields that a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "mlp_hidden_act": "relu2", "mlp_bias": False, "sliding_window": None,
    "n_routed_experts": 8, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "layers_block_type": None,
    "hybrid_override_pattern": None, "dtype": "float32", "intermediate_size": 21504, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True,
    "use_bias": False, "time_step_min": 0.001, "mamba_hidden_act": "silu",
    "num_nextn_predict_layers": 0, "mtp_layers_block_type": None, "mtp_hybrid_override_pattern": None,
}  # fmt: skip
_OTHER_NAMES = {
    "num_local_experts": "n_routed_experts", "layer_types": "layers_block_type", "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias", "mamba_dt_min": "time_step_min",
}  # fmt: skip
# Further fields of published checkpoints: of how they are drawn or run, of rotary positions, which the class has not,
# and what the tensors say as well.
_UNREAD = (
    "attention_bias", "chunk_size", "expand", "mamba_chunk_size", "mamba_dt_init_floor", "mamba_dt_limit",
    "mamba_dt_max", "mamba_expand", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
    "n_shared_experts", "norm_eps", "num_hidden_layers", "num_logits_to_keep", "partial_rotary_factor",
    "rescale_prenorm_residual", "residual_in_fp32", "rope_theta", "time_step_floor", "time_step_limit",
    "time_step_max", "time_step_rank", "use_mamba_kernels",
)  # fmt: skip
_MTP_BLOCKS = "*E"  # the class's own, where a config.json has modules and no blocks
_KINDS = {"*": "full_attention", "M": "linear_attention", "E": "moe", "-": "mlp"}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()} | {"attention": "*", "mamba": "M"}  # and older names
# What lies one behind the other in `in_proj` and in `conv1d`.
_PROJECTED = ("gate", "inner", "b", "c", "time")
_CONVOLVED = ("inner", "b", "c")


class _Block(NamedTuple):
    """One of the class's blocks."""

    letter: str
    branch: str  # what our parameters of it begin with: layers.mlp
    layer: int  # the place in these


def _blocks(config: ModelConfig) -> Iterator[_Block]:
    """The model's blocks, in their order."""
    layers = sorted((layer, place, stack) for stack in config.stacks for place, layer in enumerate(stack.layers))
    for _, place, stack in layers:
        yield from _blocks_of_layer(stack.name, stack.blocks, place)


def _blocks_of_layer(stack: str, letters: str, place: int) -> Iterator[_Block]:
    for letter, branch in zip(letters, name_branches(letters), strict=True):
        yield _Block(letter, f"{stack}.{branch}", place)


def find_obstacles(config: ModelConfig) -> list[str]:
    m, groups = config, config.num_expert_groups
    found = layout.find_violations(
        vars(m),
        structure=(m.structure != "vanilla", "bigmac, fine_grained or dense"),
        norm="rmsnorm",
        positions=(m.positions == "none", "none (its attention has no rotary embedding)"),
        activation="relu2",
        gated=False,
        use_bias=False,
        qk_norm=False,
        latent_norm=(not m.latent_norms, "none"),
    )
    if m.is_moe:
        found += layout.find_violations(
            vars(m),
            router=(m.router in ("linear", "frozen"), "linear or frozen (its router's logits have no bias)"),
            router_scores="sigmoid",
            num_experts=(m.expert_count >= 2 * groups, "at least two a group"),
            group_scores=(m.top_groups == groups or m.group_best == 2, "top_2 (its router's)"),
        )
    if m.count_trained("M"):
        found += layout.find_violations(vars(m), mamba_most_step=math.inf)
    return found


def tensors(config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
    yield Tensor("backbone.embeddings.weight", "embedding_VD", scale=scale)
    for number, block in enumerate(_blocks(config)):
        yield from _block_tensors(config, leaves, f"backbone.layers.{number}", block)
    yield Tensor("backbone.norm_f.weight", "final_norm.scale_D")
    yield Tensor("lm_head.weight", "embedding_VD" if config.tie_embeddings else "unembedding_VD")
    for module in range(config.mtp_modules):
        yield from _next_token_tensors(config, leaves, module)


def _block_tensors(config: ModelConfig, leaves: Leaves, name: str, block: _Block) -> Iterator[Tensor]:
    letter, branch, layer = block
    yield Tensor(f"{name}.norm.weight", f"{branch}_norm.scale_D", layer)
    if letter == "*":
        yield from attention_tensors(f"{name}.mixer", layer, branch)
    elif letter == "M":
        yield from _mamba_tensors(config, leaves, f"{name}.mixer", branch, layer)
    elif letter == "E":
        yield from _moe_tensors(config, leaves, f"{name}.mixer", branch, layer)
    else:
        yield from _mlp_tensors(f"{name}.mixer", branch, layer)


def _next_token_tensors(config: ModelConfig, leaves: Leaves, module: int) -> Iterator[Tensor]:
    """A module's blocks. What stands before them is the first one's, and the norm behind them the last one's."""
    letters = config.mtp_stack.blocks
    names = [f"mtp.layers.{module * len(letters) + number}" for number in range(len(letters))]
    yield Tensor(f"{names[0]}.enorm.weight", "mtp.embedding_norm.scale_D", module)
    yield Tensor(f"{names[0]}.hnorm.weight", "mtp.hidden_norm.scale_D", module)
    yield Tensor(f"{names[0]}.eh_proj.weight", "mtp.projection.w_DF", module, transposed=True)
    for name, block in zip(names, _blocks_of_layer("mtp.layers", letters, module), strict=True):
        yield from _block_tensors(config, leaves, name, block)
    yield Tensor(f"{names[-1]}.final_layernorm.weight", "mtp.final_norm.scale_D", module)


def _mlp_tensors(name: str, branch: str, layer: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.up_proj.weight", f"{branch}.up.w_DF", layer, transposed=True)
    yield Tensor(f"{name}.down_proj.weight", f"{branch}.down.w_DF", layer, transposed=True)


def _mamba_tensors(config: ModelConfig, leaves: Leaves, mixer: str, branch: str, layer: int) -> Iterator[Tensor]:
    def parts(name: str, ours: list[str], transposed: bool = False, depthwise: bool = False) -> Iterator[Tensor]:
        leaf_names = (f"{branch}.{leaf}" for leaf in ours)
        each = (Tensor(f"{mixer}.{name}", leaf, layer, None, transposed, depthwise) for leaf in leaf_names)
        return one_behind_the_other(leaves, each)

    yield from parts("in_proj.weight", [f"{name}.w_DF" for name in _PROJECTED], transposed=True)
    yield from parts("conv1d.weight", [f"conv_{name}_KF" for name in _CONVOLVED], depthwise=True)
    if config.mamba_conv_bias:
        yield from parts("conv1d.bias", [f"conv_{name}_bias_F" for name in _CONVOLVED])
    for theirs, ours in {"A_log": "a_log_N", "D": "skip_N", "dt_bias": "time_bias_N"}.items():
        yield Tensor(f"{mixer}.{theirs}", f"{branch}.{ours}", layer, exact=True)
    yield Tensor(f"{mixer}.norm.weight", f"{branch}.norm.scale_D", layer)
    yield Tensor(f"{mixer}.out_proj.weight", f"{branch}.out.w_DF", layer, transposed=True)
    if config.mamba_bias:
        yield from parts("in_proj.bias", [f"{name}.b_F" for name in _PROJECTED])
        yield Tensor(f"{mixer}.out_proj.bias", f"{branch}.out.b_F", layer)


def _moe_tensors(config: ModelConfig, leaves: Leaves, moe: str, branch: str, layer: int) -> Iterator[Tensor]:
    yield Tensor(f"{moe}.gate.weight", f"{branch}.router_DE", layer, transposed=True, exact=True)
    bias = f"{branch}.router_bias_E"
    yield Tensor(
        f"{moe}.gate.e_score_correction_bias",
        bias if bias in leaves else "",
        layer,
        exact=True,
        shape=(config.expert_count,),
    )
    if config.structure == "bigmac":
        yield Tensor(f"{moe}.fc1_latent_proj.weight", f"{branch}.down.w_DF", layer, transposed=True)
        yield Tensor(f"{moe}.fc2_latent_proj.weight", f"{branch}.up.w_DF", layer, transposed=True)
    yield from expert_tensors(config, moe, layer, {"w_in_eRF": "up_proj", "w_out_eFR": "down_proj"}, branch)
    if config.shared_width:
        yield from _mlp_tensors(f"{moe}.shared_experts", f"{branch}.shared", layer)
    else:
        shape = _ZERO_WIDTH, config.hidden_size
        yield Tensor(f"{moe}.shared_experts.up_proj.weight", "", layer, shape=shape)
        yield Tensor(f"{moe}.shared_experts.down_proj.weight", "", layer, shape=shape[::-1])


def to_json(config: Config, leaves: Leaves) -> dict[str, Any]:
    m = config.model
    pattern = "".join(block.letter for block in _blocks(m))
    fields = layout.common_json(config) | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "num_hidden_layers": len(pattern),
        # Without layers_block_type, in which serving engines have other words than transformers, or no place for it.
        "hybrid_override_pattern": pattern,
        "layer_norm_epsilon": m.norm_eps,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "attention_bias": False,
        "use_bias": m.count_trained("M") > 0 and m.mamba_bias,
        # The class ties nothing, so lm_head is there whatever this says.
        "tie_word_embeddings": m.tie_embeddings and not m.scale_embedding,
    }
    if m.mtp_modules:
        fields |= {
            "num_nextn_predict_layers": m.mtp_modules,
            "mtp_hybrid_override_pattern": m.mtp_stack.blocks,
        }
    if m.count_trained("-"):
        fields |= {"intermediate_size": m.mlp_width}
    if m.count_trained("M"):
        fields |= {
            "mamba_num_heads": m.mamba_head_count,
            "mamba_head_dim": m.mamba_head_dim,
            "n_groups": m.mamba_groups,
            "ssm_state_size": m.mamba_state,
            "conv_kernel": m.mamba_conv,
            "use_conv_bias": m.mamba_conv_bias,
            "mamba_proj_bias": m.mamba_bias,
            "mamba_hidden_act": "silu",
            "time_step_min": m.mamba_least_step,
        }
    return fields | (_moe_json(m) if m.is_moe else {})


def _moe_json(m: ModelConfig) -> dict[str, Any]:
    limited = m.top_groups < m.num_expert_groups
    return {
        "moe_latent_size": m.latent_size if m.structure == "bigmac" else None,
        "n_routed_experts": m.expert_count,
        "num_experts_per_tok": m.choices,
        "moe_intermediate_size": m.expert_width,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": m.shared_width or _ZERO_WIDTH,
        "norm_topk_prob": m.router_renormalize and m.choices > 1,
        "routed_scaling_factor": m.router_scale,
        "n_group": m.num_expert_groups if limited else 1,
        "topk_group": m.top_groups if limited else 1,
    }


def from_json(values: dict[str, Any], checkpoint: Checkpoint) -> Config:
    layout.check_known(checkpoint, values, _DEFAULTS, _OTHER_NAMES, _UNREAD)
    v = layout.fill_json(values, _DEFAULTS, _OTHER_NAMES)
    pattern = _read_pattern(v, checkpoint)
    modules, of_module = _read_next_tokens(v, checkpoint, pattern)
    everywhere = pattern + of_module
    layout.check_json(
        checkpoint,
        v,
        mlp_hidden_act="relu2",
        mlp_bias=(not v["mlp_bias"], "false"),
        sliding_window=(v["sliding_window"] is None, "null"),
    )
    model = _of_pattern(pattern) | {
        "mtp_modules": modules,
        "mtp_blocks": "" if of_module == split_layers(pattern)[-1] else of_module,
        "structure": "dense",
        "positions": "none",
        "activation": "relu2",
        "qk_norm": False,
        "norm_eps": float(v["layer_norm_epsilon"]),
        "tie_embeddings": v["tie_word_embeddings"]
        and layout.same_tensors(checkpoint, "backbone.embeddings.weight", "lm_head.weight"),
    }
    if "M" in everywhere:
        model |= _mamba_fields(v, checkpoint)
    if "E" in pattern:
        blocks = {"backbone": pattern, "mtp": of_module * modules}
        mixers = [f"{name}.layers.{i}.mixer" for name in blocks for i, kind in enumerate(blocks[name]) if kind == "E"]
        model |= _moe_fields(v, checkpoint, mixers)
    if "-" in everywhere:
        model |= {"dense_hidden_size" if "E" in pattern else "expert_hidden_size": v["intermediate_size"]}
    return make_config(v, checkpoint, **model)


def _read_pattern(v: dict[str, Any], checkpoint: Checkpoint, of: str = "") -> str:
    """The letters of `model.blocks` from a list of names, from a pattern, or from both; raises ConfigError for any
    other letter or name, or if they disagree. `of`: what the names of their fields begin with."""
    file = checkpoint.directory / "config.json"
    kinds_field, pattern_field = f"{of}layers_block_type", f"{of}hybrid_override_pattern"
    kinds, pattern, count = v[kinds_field], v[pattern_field], v.get("num_hidden_layers")
    if unknown := [kind for kind in kinds or () if kind not in _LETTERS]:
        raise ConfigError(
            f"{file}: {kinds_field} has {unknown[0]}, and may have {', '.join(_KINDS.values())}; bigmac_jax has no "
            f"such model"
        )
    known = not set(pattern or "") - set(_KINDS)
    layout.check_json(checkpoint, v, **{pattern_field: (known, f"made of {' '.join(_KINDS)}")})
    named = pattern if kinds is None else "".join(_LETTERS[kind] for kind in kinds)
    if not named:
        raise ConfigError(f"{file} has neither {kinds_field} nor {pattern_field}; get a good copy")
    wanted = {pattern_field: (not pattern or pattern == named, f"{named}, as {kinds_field} has it")}
    if not of:
        wanted["num_hidden_layers"] = count in (None, len(named)), f"{len(named)}, the number of blocks in {named}"
    if wrong := layout.find_violations(v, **wanted):
        raise ConfigError(f"{file}: {wrong[0]}; make them agree, or get a good copy")
    return named


def _read_next_tokens(v: dict[str, Any], checkpoint: Checkpoint, pattern: str) -> tuple[int, str]:
    """The number of next-token modules, and the letters of each; without any, their tensors are left out.

    Raises:
      ConfigError: none here is like that, or there are too few tensors of them.
    """
    modules = v["num_nextn_predict_layers"]
    if not modules:
        checkpoint.leave_out("mtp.")
        return 0, ""
    if not (v["mtp_layers_block_type"] or v["mtp_hybrid_override_pattern"]):
        v = v | {"mtp_layers_block_type": None, "mtp_hybrid_override_pattern": _MTP_BLOCKS}
    letters = _read_pattern(v, checkpoint, "mtp_")
    one = len(split_layers(letters)) == 1, "one layer, which ends in its experts or its MLP"
    fits = "E" in pattern or "E" not in letters, f"without experts, as {pattern} is"
    for right in (one, fits):
        layout.check_json(checkpoint, {"mtp_hybrid_override_pattern": letters}, mtp_hybrid_override_pattern=right)
    there, least = sum(name.startswith("mtp.") for name in checkpoint.names()), modules * len(letters)
    if there < least:  # each has a norm
        raise ConfigError(
            f"{checkpoint.directory / 'config.json'}: num_nextn_predict_layers={modules} asks for {least} blocks, "
            f"and {there} tensors mtp.* are there; get a good copy, or set it to 0, which reads the model without them"
        )
    return modules, letters


def _of_pattern(pattern: str) -> dict[str, Any]:
    """The fields of a model with such blocks. Attention and experts in turn, behind MLPs or not, need no pattern."""
    if turns := re.fullmatch(r"((?:\*-)*)((?:\*E)*)", pattern):
        first = len(turns[1]) // 2 if turns[2] else 0
        return {"num_layers": len(pattern) // 2, "first_dense_layers": first}
    return {"num_layers": 1, "blocks": pattern}


def _mamba_fields(v: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    layout.check_json(checkpoint, v, mamba_hidden_act="silu")
    return {
        "mamba_heads": v["mamba_num_heads"],
        "mamba_head_dim": v["mamba_head_dim"],
        "mamba_groups": v["n_groups"],
        "mamba_state": v["ssm_state_size"],
        "mamba_conv": v["conv_kernel"],
        "mamba_conv_bias": v["use_conv_bias"],
        "mamba_bias": v["use_bias"],
        # The class clamps by this one, and reads time_step_limit nowhere.
        "mamba_least_step": float(v["time_step_min"]),
    }


def _moe_fields(v: dict[str, Any], checkpoint: Checkpoint, mixers: list[str]) -> dict[str, Any]:
    groups, best_groups, experts, latent = v["n_group"], v["topk_group"], v["n_routed_experts"], v["moe_latent_size"]
    limited = best_groups < groups
    layout.check_json(
        checkpoint,
        v,
        moe_latent_size=(latent is None or latent <= v["hidden_size"], "at most hidden_size"),
        norm_topk_prob=(
            v["num_experts_per_tok"] > 1 or not v["norm_topk_prob"],
            "false where num_experts_per_tok is 1",
        ),
        n_group=(not limited or experts >= 2 * groups, "at most half of n_routed_experts"),
    )

    def all_zero(*names: str) -> bool:
        found = [f"{prefix}.{name}" for prefix in mixers for name in names if f"{prefix}.{name}" in checkpoint]
        return not any(checkpoint.read(name).any() for name in found)

    shared = not all_zero("shared_experts.up_proj.weight", "shared_experts.down_proj.weight")
    return {
        "structure": "fine_grained" if latent is None else "bigmac",
        "num_experts": experts,
        "down_ratio": min(latent or v["moe_intermediate_size"], v["hidden_size"]) / v["hidden_size"],
        "num_shared_experts": int(shared),
        "shared_expert_hidden_size": v["moe_shared_expert_intermediate_size"] if shared else 0,
        "router_scores": "sigmoid",
        "router_scale": float(v["routed_scaling_factor"]),
        "balance": "aux_loss" if all_zero("gate.e_score_correction_bias") else "bias",
        "num_expert_groups": groups if limited else 1,
        "top_groups": best_groups if limited else 1,
        "group_scores": "top_2" if limited else "top_k",
    }


def split_stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    yield from layout.split_experts(re.sub(r"^model\.", "backbone.", name), shape)  # `model.` in transformers
