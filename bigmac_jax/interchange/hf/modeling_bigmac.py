"""BigMac for transformers: a decoder whose Mixture-of-Experts layers may work at a low width (DCCA).

    x' = x W↓ ;   y' = Σ_{i ∈ top-K} p_i(x) · σ(x' W_i↑) W_i↓ ;   y = y' W↑

The router reads x at full width, in float32. No token is dropped: every one is seen by all K experts that it chose.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

B batch, L length, M length with what the cache holds, T tokens, D hidden, R width of the rows that experts take,
F hidden width of an expert or an MLP, N heads, G key-value heads, H head size, E experts, K top-k, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_bigmac import BigMacConfig

# transformers 5.24 calls `cache` what was `past_key_values`; both are taken, and its own name is given back.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Norm(nn.Module):
    """RMSNorm or LayerNorm of the last dimension, computed in float32."""

    def __init__(self, config: BigMacConfig, size: int, kind: str = ""):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if (kind or config.norm) == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.bias is not None:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def rotate(x_BLNH: Tensor, position_BL: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer): pairs (i, i + H/2) turn by position · theta^(-2i/H)."""
    half = x_BLNH.shape[-1] // 2
    frequency_H = theta ** (-torch.arange(half, dtype=torch.float32, device=x_BLNH.device) / half)
    angle_BLNH = position_BL[:, :, None, None].float() * frequency_H
    cos, sin = angle_BLNH.cos().to(x_BLNH.dtype), angle_BLNH.sin().to(x_BLNH.dtype)
    first, second = x_BLNH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal; query heads in groups that share a key-value head."""

    def __init__(self, config: BigMacConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, N, G, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, N * H, bias=config.use_bias)
        self.k_proj = nn.Linear(D, G * H, bias=config.use_bias)
        self.v_proj = nn.Linear(D, G * H, bias=config.use_bias)
        self.o_proj = nn.Linear(N * H, D, bias=config.use_bias)
        self.q_norm = Norm(config, H, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(config, H, "rmsnorm") if config.qk_norm else None

    def forward(self, x_BLD: Tensor, position_BL: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """`mask` [B or 1, 1, L, M]: what a query sees."""
        B, L, _ = x_BLD.shape
        q_BLNH, k_BLGH, v_BLGH = (
            projection(x_BLD).view(B, L, -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLGH = self.q_norm(q_BLNH), self.k_norm(k_BLGH)
        if self.config.positions == "rope":
            q_BLNH, k_BLGH = (rotate(x, position_BL, self.config.rope_theta) for x in (q_BLNH, k_BLGH))
        q_BNLH, k_BGMH, v_BGMH = (x.transpose(1, 2) for x in (q_BLNH, k_BLGH, v_BLGH))
        if cache is not None:
            # A static cache gives all of its room.
            k_BGMH, v_BGMH = (x[:, :, : mask.shape[-1]] for x in cache.update(k_BGMH, v_BGMH, self.layer))
        y_BNLH = functional.scaled_dot_product_attention(q_BNLH, k_BGMH, v_BGMH, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y_BNLH.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    """D → F → D: the dense layer, and the shared experts, side by side as one."""

    def __init__(self, config: BigMacConfig, width: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias) if config.gated else None
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(hidden)


class Router(nn.Module):
    """Which experts a token goes to, and with what weight; float32, full width."""

    def __init__(self, config: BigMacConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_logit_bias else None
        bias_E = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """gates_TK, experts_TK."""
        config = self.config
        bias_E = None if self.bias is None else self.bias.float()
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = functional.linear(x_TD.float(), self.weight.float(), bias_E)
        scores_TE = logits_TE.softmax(-1) if config.scoring_func == "softmax" else logits_TE.sigmoid()
        bias_E = self.e_score_correction_bias
        ranking_TE = self.in_best_groups(scores_TE if bias_E is None else scores_TE + bias_E.float())
        experts_TK = ranking_TE.topk(config.num_experts_per_tok).indices
        gates_TK = scores_TE.gather(1, experts_TK)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return gates_TK * config.routed_scaling_factor, experts_TK

    def in_best_groups(self, ranking_TE: Tensor) -> Tensor:
        """-inf outside the topk_group best groups (node-limited routing)."""
        config = self.config
        if config.topk_group == config.n_group:
            return ranking_TE
        grouped_TGe = ranking_TE.view(len(ranking_TE), config.n_group, -1)
        strength_TG = grouped_TGe.topk(config.group_score_topk).values.sum(-1)
        best_Tg = strength_TG.topk(config.topk_group).indices
        outside_TG = torch.ones_like(strength_TG, dtype=torch.bool).scatter(1, best_Tg, False)
        return grouped_TGe.masked_fill(outside_TG[:, :, None], -math.inf).flatten(1)


class Experts(nn.Module):
    """E_i(x') = σ(x' W_i↑) W_i↓ of every expert; matrices are [E, inputs, outputs]."""

    def __init__(self, config: BigMacConfig):
        super().__init__()
        E, R, width = config.num_experts, config.row_size, config.moe_intermediate_size

        def parameter(*shape: int, needed: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(E, *shape)) if needed else None

        self.up_proj = parameter(R, width)
        self.gate_proj = parameter(R, width, needed=config.gated)
        self.down_proj = parameter(width, R)
        self.up_bias = parameter(width, needed=config.use_bias)
        self.gate_bias = parameter(width, needed=config.use_bias and config.gated)
        self.down_bias = parameter(R, needed=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x_TR: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Sums what each row's experts make of it, weighted by the gates."""
        y_TR = torch.zeros_like(x_TR)
        for expert in experts_TK.unique().tolist():
            token, choice = torch.where(experts_TK == expert)
            gate = gates_TK[token, choice, None].to(x_TR.dtype)
            # Under torch.autocast an expert's products have another type than its input.
            y_TR.index_add_(0, token, (gate * self.expert(expert, x_TR[token])).to(y_TR.dtype))
        return y_TR

    def expert(self, i: int, x: Tensor) -> Tensor:
        def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return x @ w[i] if b is None else x @ w[i] + b[i]

        up = affine(x, self.up_proj, self.up_bias)
        gate = up if self.gate_proj is None else affine(x, self.gate_proj, self.gate_bias)
        hidden = self.activation(gate) if self.gate_proj is None else self.activation(gate) * up
        return affine(hidden, self.down_proj, self.down_bias)


class MoE(nn.Module):
    """y = (1 + x W_g) ⊙ (n(Σ_{i ∈ top-K} p_i(x) E_i(x') + α x') W↑) + shared(x), x' = x W↓.

    Without W↓ and W↑ where moe_latent_size is None; n, α and W_g are there where latent_norms says so.
    """

    def __init__(self, config: BigMacConfig):
        super().__init__()
        D, R, shared = config.hidden_size, config.row_size, config.shared_expert_intermediate_size
        latent, norms = config.moe_latent_size is not None, config.latent_norms
        self.router = Router(config)
        self.experts = Experts(config)
        self.latent_down = nn.Linear(D, R, bias=False) if latent else None
        self.latent_up = nn.Linear(R, D, bias=False) if latent else None
        self.dispatch_norm = Norm(config, R) if "pre_dispatch" in norms else None
        self.combine_norm = Norm(config, R) if "post_combine" in norms else None
        self.skip_factor = nn.Parameter(torch.ones(1)) if "skip" in norms else None
        self.output_gate = nn.Linear(D, D, bias=False) if "gate" in norms else None
        self.shared_experts = MLP(config, shared) if shared else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        gates_TK, experts_TK = self.router(x_TD)

        x_TR = x_TD if self.latent_down is None else self.latent_down(x_TD)
        x_TR = x_TR if self.dispatch_norm is None else self.dispatch_norm(x_TR)
        y_TR = self.experts(x_TR, gates_TK, experts_TK)
        y_TR = y_TR if self.skip_factor is None else y_TR + x_TR * self.skip_factor
        y_TR = y_TR if self.combine_norm is None else self.combine_norm(y_TR)
        y_TD = y_TR if self.latent_up is None else self.latent_up(y_TR)
        y_TD = y_TD if self.output_gate is None else y_TD * (1 + self.output_gate(x_TD))

        y_TD = y_TD if self.shared_experts is None else y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BLD)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: BigMacConfig, layer: int):
        super().__init__()
        dense = config.mlp_layer_types[layer] == "dense"
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = MLP(config, config.intermediate_size) if dense else MoE(config)

    def forward(self, x_BLD: Tensor, position_BL: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), position_BL, mask, cache)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class BigMacPreTrainedModel(PreTrainedModel):
    config_class = BigMacConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    # Rounding the router to bfloat16 would send tokens to other experts.
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def option(self, name: str, given: bool | None) -> bool:
        """What a call of `forward` gives, or else the config."""
        return bool(getattr(self.config, name, False) if given is None else given)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, Norm, Router)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            nn.init.zeros_(module.e_score_correction_bias)
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)


class BigMacModel(BigMacPreTrainedModel):
    """Tokens → the normalised output of the last layer."""

    def __init__(self, config: BigMacConfig):
        super().__init__(config)
        V, D, longest = config.vocab_size, config.hidden_size, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(V, D)
        self.embed_positions = nn.Embedding(longest, D) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config, D)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """
        Args:
          attention_mask: [B, M], 0 where a token is padding; or a ready mask [B, 1, L, M].
          position_ids: [B, L]; by default they count from what the cache holds.
          cache: of the tokens before these; `past_key_values` is its older name.
          return_dict: whether the output's parts have names; without them it is a tuple.

        Raises:
          ValueError: M exceeds the learned positions, the tokens are given twice or not at all, or something is asked
            for that the class does not give.
        """
        for name in ("output_attentions", "output_router_logits"):
            if self.option(name, others.get(name)):
                raise ValueError(f"{name} must be False, in the call and in the config: BigMac has no such output")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and self.option("use_cache", use_cache):
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        L = x_BLD.shape[1]
        if position_ids is None:
            position_ids = (torch.arange(L, device=x_BLD.device) + past)[None]
        if self.embed_positions is not None:
            if past + L > (longest := self.config.max_position_embeddings):
                raise ValueError(f"{past + L} tokens exceed the {longest} learned positions (max_position_embeddings)")
            x_BLD = x_BLD + self.embed_positions(position_ids)
        if self.config.scale_embedding:
            x_BLD = math.sqrt(self.config.hidden_size) * x_BLD
        mask, states = causal_mask(L, past, attention_mask, x_BLD.device), []
        for layer in self.layers:
            states.append(x_BLD)
            x_BLD = layer(x_BLD, position_ids, mask, cache)
        x_BLD = self.norm(x_BLD)
        hidden_states = (*states, x_BLD) if self.option("output_hidden_states", output_hidden_states) else None
        output = BaseModelOutputWithPast(last_hidden_state=x_BLD, hidden_states=hidden_states, **{_CACHE: cache})
        return output if self.option("return_dict", return_dict) else output.to_tuple()


def causal_mask(length: int, past: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, 1, L, M]: a query sees the tokens up to its own that are no padding."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    query_L1 = torch.arange(length, device=device)[:, None] + past
    key_M = torch.arange(past + length, device=device)
    seen_LM = key_M <= query_L1
    if attention_mask is None:
        return seen_LM[None, None]
    # Padding sees itself: a softmax over nothing is NaN.
    return (seen_LM & attention_mask[:, None, :].bool() | (key_M == query_L1))[:, None]


class BigMacForCausalLM(BigMacPreTrainedModel, GenerationMixin):
    """Tokens → logits of the next one."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BigMacConfig):
        super().__init__(config)
        self.model = BigMacModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `BigMacModel`; `labels` [B, L] give the mean cross-entropy of the next token, without a balance loss."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds, use_cache,
            output_hidden_states, return_dict=True, **others,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **others)
        states, cache = outputs.hidden_states, getattr(outputs, _CACHE)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{_CACHE: cache})
        return output if self.option("return_dict", return_dict) else output.to_tuple()
