"""`model`: what is computed."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, get_args

from bigmac_jax.config.blocks import BRANCHES, LONGEST, Loop, Stack, find_loops, make_stacks, split_layers
from bigmac_jax.config.errors import near_divisors, require
from bigmac_jax.config.section import Amount, Count, Positive, Range, Section, Share, Size

Structure = Literal["dense", "vanilla", "fine_grained", "bigmac"]
LatentNorm = Literal["auto", "none", "pre_dispatch", "post_combine", "skip", "gate"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
_MOST_MODULES = 16  # next-token modules


@dataclass(frozen=True)
class ModelConfig(Section):
    """The decoder-only transformer and its feed-forward structure: what is computed.

    The defaults are the present day's backbone. The paper's is norm=layernorm, positions=learned, activation=gelu,
    use_bias=True, dropout=0.1, tie_embeddings=True.
    """

    structure: Structure = "bigmac"
    num_layers: Count = 4
    # The residual branches of a layer, in order: * attention, M Mamba-2, E experts (of dense an MLP), - an MLP; empty = *E.
    # The model is num_layers times these, so a pattern that doesn't repeat is all of it, with num_layers=1.
    blocks: str = ""
    hidden_size: Count = 256  # h
    num_heads: Count = 4
    num_kv_heads: Size = 0  # 0 = num_heads; fewer is grouped-query attention
    head_dim: Size = 0  # 0 = hidden_size / num_heads
    vocab_size: Count = 8192
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Positive = 1e-6
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: Positive = 10_000.0
    context_length: Size = 0  # tokens that the model is declared to take; 0 = data.sequence_length, and never fewer
    activation: Literal["relu2", "gelu", "silu"] = "relu2"
    gated: bool = False  # experts and dense MLPs multiply by a second, linear branch
    use_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    scale_embedding: bool = True  # what is read of the embedding, learned positions with it, is multiplied by √h
    dropout: Share = 0.0  # of the embedding and of each residual branch
    # The feed-forward layer. `vanilla` turns num_experts into e·r/4 experts of width 4h, and sends a token to one.
    num_experts: Count = 32  # e
    top_k: Count = 4  # K
    first_dense_layers: Size = 0  # the first layers have an MLP in the experts' place (DeepSeek-V3)
    dense_hidden_size: Size = 0  # width of those MLPs; 0 = 4h
    down_ratio: float = 0.25  # r: wire width of bigmac and expert width of fine_grained, as a share of h
    expert_hidden_size: Size = 0  # 0 = the paper's: r·h (fine_grained), h (bigmac), 4h (vanilla, dense)
    num_shared_experts: Size = 0  # experts that every token passes, at full width
    shared_expert_hidden_size: Size = 0  # 0 = r·h: as many parameters as a routed expert
    # A norm of the exchanged rows: before they are sent (pre_dispatch), or of the sums that come back (post_combine).
    # skip: post_combine of the sum plus a learned share of the row that was sent. gate: skip, with the layer's output
    # gated by the token. auto: skip for bigmac (docs/quality.md), none for the others.
    latent_norm: LatentNorm = "auto"
    # How bigmac's W↓ and W↑ start. selection: each layer takes its own r·h of the h coordinates, and they are trained
    # slowly (optimizer.projection_rate; docs/quality.md). random: N(0, 1 / rows).
    projection_init: Literal["selection", "random"] = "selection"
    # An expert takes at most ceil(f·T·K/E) rows of a rank and drops the rest; inf = takes all.
    capacity_factor: Annotated[float, Range(may_be_inf=True)] = math.inf
    # What becomes, in training, of a choice that finds its expert full: it is dropped, or it goes to the best of the
    # token's next overflow_tries experts that has room (exchange=all_to_all; docs/exchange.md).
    overflow: Literal["drop", "next"] = "drop"
    overflow_tries: Count = 2
    # The router (always float32, full width). Logits are x W (linear) or x W + b (affine). hyper: a frozen random network
    # makes W and b from one trained vector a layer (HyperRouter). frozen: a linear one that stays as it was drawn.
    router: Literal["linear", "affine", "hyper", "frozen"] = "linear"
    hyper_width: Count = 64  # hidden width of hyper's network
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    router_renormalize: bool = True  # the chosen gates, if several, are divided by their sum
    router_scale: float = 1.0  # gates are multiplied by it
    # How experts are kept equally busy: by a loss (aux_loss), by a bias on the choice that moves by a step (bias,
    # DeepSeek-V3) or to the scores' quantiles (quantile, Kimi K3), or not at all.
    balance: Literal["aux_loss", "bias", "quantile", "none"] = "aux_loss"
    balance_coefficient: Amount = 0.001  # weight of the auxiliary loss
    balance_step: Literal["next", "same"] = "next"  # quantiles of this step's scores serve the next step, or this one
    balance_scope: Literal["step", "part"] = "part"  # the loss sees the whole step's load, or each part's (Megatron's)
    balance_bias_rate: Amount = 0.001  # step of the bias
    z_loss_coefficient: Amount = 0.0
    num_expert_groups: Count = 1  # experts are chosen from the best top_groups of these groups (node-limited routing)
    top_groups: Count = 1
    # A group is as good as its K / top_groups best experts (top_k, DeepSeek-V3's report), or its two best (top_2).
    group_scores: Literal["top_k", "top_2"] = "top_k"
    # Mamba-2 layers.
    mamba_heads: Size = 0  # N; 0 = 2h / mamba_head_dim
    mamba_head_dim: Count = 64  # P
    mamba_groups: Count = 1  # that share B and C, and are normed together
    mamba_state: Count = 128  # a head keeps P × so many numbers
    mamba_conv: Count = 4  # taps of the convolution
    mamba_conv_bias: bool = True
    mamba_bias: bool = False  # of the projections
    mamba_least_step: Amount = 0.0  # limits of Δt
    mamba_most_step: Annotated[float, Range(above=0, may_be_inf=True)] = math.inf
    # Next-token modules (MTP, DeepSeek-V3, 2.2): the k-th learns to predict the k-th token behind the next one. They are
    # trained beside the model, and no evaluation or answer needs them.
    mtp_modules: Size = 0
    mtp_blocks: str = ""  # the branches of a module's one layer, as in blocks; empty = those of the model's last layer

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def is_moe(self) -> bool:
        return self.structure != "dense"

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops that the layers are computed in."""
        if not self.blocks:
            first, others = self.first_dense_layers, Loop(("*E" if self.is_moe else "*-",), self.num_layers)
            return (Loop(("*-",), first), others._replace(trips=self.num_layers - first)) if first else (others,)
        blocks = self.blocks if self.is_moe else self.blocks.replace("E", "-")
        return (Loop(split_layers(blocks), self.num_layers),) if self.num_layers > 1 else find_loops(blocks)

    @cached_property
    def stacks_of_loops(self) -> tuple[tuple[Stack, ...], ...]:
        """The stacks of layers that each loop goes through."""
        return make_stacks(self.loops)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks of layers."""
        return tuple(stack for of_loop in self.stacks_of_loops for stack in of_loop)

    @cached_property
    def depth(self) -> int:
        """Number of layers: of branches that take each token by itself, with those before them."""
        return sum(loop.trips * len(loop.layers) for loop in self.loops)

    def count_branches(self, letters: str) -> int:
        """Number of residual branches of these kinds (`blocks`)."""
        return sum(loop.trips * sum(map("".join(loop.layers).count, letters)) for loop in self.loops)

    @cached_property
    def mtp_stack(self) -> Stack:
        """The next-token modules, as a stack of layers behind the model's; of no layers without them."""
        blocks, modules, before = self.mtp_blocks or self.loops[-1].layers[-1], self.mtp_modules, self.moe_layers
        experts = range(before, before + modules) if "E" in blocks else range(0)
        return Stack("mtp", blocks, range(self.depth, self.depth + modules), experts)

    @property
    def trained_stacks(self) -> tuple[Stack, ...]:
        """All stacks of layers, that of the next-token modules last."""
        return (*self.stacks, self.mtp_stack) if self.mtp_modules else self.stacks

    def count_trained(self, letters: str) -> int:
        """As `count_branches`, with those of the next-token modules: what a training step computes."""
        of_a_module = sum(map(self.mtp_stack.blocks.count, letters))
        return self.count_branches(letters) + self.mtp_modules * of_a_module

    @property
    def moe_layers(self) -> int:
        return self.count_branches("E")

    @property
    def mlp_layers(self) -> int:
        return self.count_branches("-")

    @property
    def mamba_layers(self) -> int:
        return self.count_branches("M")

    @property
    def mamba_head_count(self) -> int:
        return self.mamba_heads or 2 * self.hidden_size // self.mamba_head_dim

    @property
    def mamba_width(self) -> int:
        """I, the width of a Mamba layer's heads together."""
        return self.mamba_head_count * self.mamba_head_dim

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP of a layer without experts."""
        return (self.dense_hidden_size or 4 * self.hidden_size) if self.is_moe else self.expert_width

    @property
    def latent_size(self) -> int:
        """R = r·h, the width of the latent."""
        return round(self.down_ratio * self.hidden_size)

    @property
    def wire_size(self) -> int:
        """Width of the rows that cross the exchange: r·h for bigmac, h for the others."""
        return self.latent_size if self.structure == "bigmac" else self.hidden_size

    @property
    def latent_norm_kind(self) -> LatentNorm:
        """`latent_norm`, with `auto` resolved."""
        auto: LatentNorm = "skip" if self.structure == "bigmac" else "none"
        return auto if self.latent_norm == "auto" else self.latent_norm

    @property
    def latent_norms(self) -> tuple[str, ...]:
        """The parts of `latent_norm`: some of pre_dispatch, skip, post_combine and gate."""
        several = {
            "none": (),
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

    def fitting_experts(self, ranks: int) -> int:
        """The next num_experts that gives a layer a multiple of `ranks` experts, and `vanilla` at least two."""
        step, least = ranks, self.num_experts
        if self.structure == "vanilla":
            one, whole = 4 * self.hidden_size, 4 * self.hidden_size * ranks  # products of num_experts and R
            step, least = whole // math.gcd(self.latent_size, whole), max(least, -(-2 * one // self.latent_size))
        return -(-least // step) * step

    @property
    def choices(self) -> int:
        """Number of experts that a token is sent to: top_k, 1 of `vanilla`, 0 of `dense`."""
        return {"dense": 0, "vanilla": 1}.get(self.structure, self.top_k)

    @property
    def paper_width(self) -> int:
        """Hidden width of an expert in the paper (of the MLP for `dense`)."""
        return {"fine_grained": self.latent_size, "bigmac": self.hidden_size}.get(self.structure, 4 * self.hidden_size)

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert (of the MLP for `dense`)."""
        return self.expert_hidden_size or self.paper_width

    @property
    def has_latent_size(self) -> bool:
        """True if something is r·h wide: nothing is where fine_grained's experts have widths of their own."""
        shared = self.num_shared_experts > 0 and not self.shared_expert_hidden_size
        return self.is_moe and (self.structure != "fine_grained" or not self.expert_hidden_size or shared)

    @property
    def has_router_bias(self) -> bool:
        """True if a bias, which the load moves, shifts the choice of experts."""
        return self.balance in ("bias", "quantile")

    @property
    def group_best(self) -> int:
        """Number of a group's best experts whose scores are summed to rank it."""
        best = 2 if self.group_scores == "top_2" else self.choices // self.top_groups
        return max(1, min(best, self.expert_count // self.num_expert_groups))

    @property
    def counts_loads_first(self) -> bool:
        """True if a batch in parts needs the load of all parts before the gradient of the first."""
        return self.is_moe and self.balance == "aux_loss" and self.balance_scope == "step"

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together."""
        return self.num_shared_experts * (self.shared_expert_hidden_size or self.latent_size)

    @property
    def count_name(self) -> str:
        """The number of experts, as an error calls it."""
        return "vanilla's num_experts" if self.structure == "vanilla" else "model.num_experts"

    def check(self) -> None:
        first, layers, blocks = self.first_dense_layers, self.num_layers, self.blocks
        require(len(blocks) <= LONGEST, f"model.blocks has {len(blocks)} branches, which must be at most {LONGEST}; use a shorter one that model.num_layers repeats")  # fmt: skip
        require(not set(blocks) - set(BRANCHES), f"model.blocks={blocks} may have the letters {' '.join(BRANCHES)} (attention, Mamba-2, experts, an MLP); use *E")  # fmt: skip
        require(not blocks or "E" in blocks or not self.is_moe, f"model.blocks={blocks} has no experts (E), and model.structure={self.structure} has; use structure=dense")  # fmt: skip
        require(not (blocks and first), f"model.first_dense_layers={first} is for models without model.blocks, which says it itself; use first_dense_layers=0, or no blocks")  # fmt: skip
        if self.count_trained("*"):
            self._check_attention()
        require(first == 0 or (self.is_moe and first < layers), f"model.first_dense_layers={first} must be below model.num_layers={layers} of a structure with experts, not {self.structure}; use 0")  # fmt: skip
        self._check_mtp()
        require(self.is_moe or not self.latent_norms, f"model.latent_norm={self.latent_norm} needs a layer with experts, not structure=dense; use latent_norm=none")  # fmt: skip
        if self.is_moe:
            self._check_experts()
        if self.count_trained("M"):
            self._check_mamba()

    def _check_attention(self) -> None:
        h, heads, kv = self.hidden_size, self.num_heads, self.kv_heads
        require(self.head_dim > 0 or h % heads == 0, f"model.hidden_size={h} must be a multiple of model.num_heads={heads}; use {self._fitting_heads}")  # fmt: skip
        require(heads % kv == 0, f"model.num_heads={heads} must be a multiple of model.num_kv_heads={kv}; use {near_divisors(heads, kv)} key-value heads")  # fmt: skip
        require(self.positions != "rope" or self.head_size % 2 == 0, f"{'model.head_dim' if self.head_dim else 'model.hidden_size / model.num_heads'} = {self.head_size} must be even for positions=rope; use {self.head_dim + 1 if self.head_dim else self._fitting_heads}, or positions=learned")  # fmt: skip

    def _check_mtp(self) -> None:
        blocks, fix = self.mtp_blocks, f"use {'*E' if self.is_moe else '*-'}"
        require(len(blocks) <= LONGEST, f"model.mtp_blocks has {len(blocks)} branches, which must be at most {LONGEST}; {fix}")  # fmt: skip
        require(self.mtp_modules <= _MOST_MODULES, f"model.mtp_modules={self.mtp_modules} must be at most {_MOST_MODULES}: each is compiled, with an output of its own; use 1")  # fmt: skip
        require(not set(blocks) - set(BRANCHES), f"model.mtp_blocks={blocks} may have the letters {' '.join(BRANCHES)} (attention, Mamba-2, experts, an MLP); {fix}")  # fmt: skip
        require(len(split_layers(blocks)) < 2, f"model.mtp_blocks={blocks} must be one layer, as a next-token module has, which ends in E or -; {fix}")  # fmt: skip
        require(self.is_moe or "E" not in blocks, f"model.mtp_blocks={blocks} has experts (E), and model.structure={self.structure} none; {fix}")  # fmt: skip

    @property
    def _fitting_heads(self) -> str:
        """The fix where the hidden size and the number of heads don't fit: other heads, or a size as hardware likes it."""
        h, least = self.hidden_size, 2 if self.positions == "rope" else 1  # of a head
        heads = [f"{near_divisors(h // least, self.num_heads)} heads"] if h % least == 0 else []
        step = least * self.num_heads
        size = max(1, h // step) * step
        return ", or ".join(heads + ([] if heads and size % 8 else [f"model.hidden_size={size}"]))

    def _check_mamba(self) -> None:
        h, size, heads, groups = self.hidden_size, self.mamba_head_dim, self.mamba_head_count, self.mamba_groups
        require(self.mamba_heads > 0 or (2 * h % size == 0), f"2 × model.hidden_size = {2 * h} must be a multiple of model.mamba_head_dim={size}; use mamba_head_dim={near_divisors(2 * h, size)}, or give model.mamba_heads")  # fmt: skip
        require(heads % groups == 0, f"model.mamba_heads={heads} must be a multiple of model.mamba_groups={groups}; use {near_divisors(heads, groups)} groups")  # fmt: skip
        least, most = self.mamba_least_step, self.mamba_most_step
        require(least < most, f"model.mamba_least_step={least:g} must be below model.mamba_most_step={most:g}; use mamba_least_step=0")  # fmt: skip

    def _check_experts(self) -> None:
        h, r, experts, k = self.hidden_size, self.down_ratio, self.expert_count, self.choices
        read = self.has_latent_size
        require(not read or 0 < r <= 1, f"model.down_ratio={r:g} must lie in (0, 1]; use 0.25")
        # A decimal spelling such as 0.333333 is not held against a width that it can only mean.
        require(not read or (abs(r * h - round(r * h)) < 1e-3 and round(r * h) >= 1), f"model.down_ratio × model.hidden_size = {r:.8g} × {h} = {r * h:.8g} must be a whole number; use model.down_ratio={max(1, round(r * h)) / h:.8g}")  # fmt: skip
        if self.structure == "vanilla":
            share, whole = self.num_experts * r / 4, self.num_experts * self.latent_size % (4 * h) == 0
            require(whole and experts >= 2, f"structure=vanilla has model.num_experts × model.down_ratio / 4 = {self.num_experts} × {r:g} / 4 = {share:g} experts, which must be a whole number of at least 2; use model.num_experts={self.fitting_experts(1)}")  # fmt: skip
        require(k <= experts, f"model.top_k={k} must be at most {self.count_name}={experts}; use {experts}")
        groups, best = self.num_expert_groups, self.top_groups
        require(experts % groups == 0, f"{self.count_name}={experts} must be a multiple of model.num_expert_groups={groups}; use {near_divisors(experts, groups)} groups")  # fmt: skip
        require(
            best <= groups, f"model.top_groups={best} must be at most model.num_expert_groups={groups}; use {groups}"
        )
        require(k <= best * (experts // groups), f"model.top_k={k} must be at most the {best * (experts // groups)} experts of model.top_groups={best} groups; use top_groups={-(-k // (experts // groups))}")  # fmt: skip
        fewer = f", or model.top_k={experts - 1}" if groups == best and experts > 1 else ""
        require(self.balance != "quantile" or (groups == best and k < experts), f"model.balance=quantile needs a free choice of fewer experts than there are, not model.top_k={k} of {experts} in top_groups={best} of {groups} groups; use balance=bias{fewer}")  # fmt: skip
        require(self.balance == "quantile" or self.balance_step == "next", f"model.balance_step={self.balance_step} is for balance=quantile, not {self.balance}; use balance=quantile, or balance_step=next")  # fmt: skip
        require(self.capacity_factor > 0, f"model.capacity_factor={self.capacity_factor:g} must be above 0; use inf for no limit (dropless)")  # fmt: skip
        require(self.overflow == "drop" or math.isfinite(self.capacity_factor), f"model.overflow={self.overflow} moves choices that find their expert full, and with model.capacity_factor=inf none is; use overflow=drop, or a finite capacity_factor")  # fmt: skip
        left = best * (experts // groups) - k  # experts that a token may go to beside its choices
        fix = f"use overflow_tries={left}" if left else "use overflow=drop"
        require(self.overflow == "drop" or self.overflow_tries <= left, f"model.overflow_tries={self.overflow_tries} must be at most {left}, the experts that a token can choose beside its model.top_k={k}; {fix}")  # fmt: skip
        # What stands behind the combine is bigmac's control, too: is it the latent that costs quality, or the missing norm?
        narrow = self.structure == "bigmac" or set(self.latent_norms) <= {"post_combine", "skip", "gate"}
        require(narrow, f"model.latent_norm={self.latent_norm} needs structure=bigmac, not {self.structure}; use latent_norm=none, post_combine, skip or gate")  # fmt: skip
