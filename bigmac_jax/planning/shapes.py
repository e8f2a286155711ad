"""What a model computes for a token, whoever trains it: products, attention's scores, and the passes between them.

`Shape.of` takes ours from a config; those of published runs (`planning.published`) also have latent attention (MLA) and
windows, which no config of ours has. Numbers are those of a forward pass and of one token, summed
over the layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bigmac_jax.config import Config


@dataclass(frozen=True)
class Attention:
    """Attention layers. `q_rank` or `kv_rank` above 0 is latent attention, whose keys share a part of `rope_size`."""

    layers: int
    heads: int
    kv_heads: int = 0
    head_size: int = 128  # of queries and keys
    value_size: int = 0  # 0: as head_size
    q_rank: int = 0
    kv_rank: int = 0
    rope_size: int = 0
    window: int = 0  # tokens that a token sees at most, in `window_layers` of the layers
    window_layers: int = 0


@dataclass(frozen=True)
class Experts:
    """Mixture-of-Experts layers; `latent` is the width of rows, 0 for the hidden size."""

    layers: int
    experts: int
    top_k: int
    width: int
    shared: int = 0
    latent: int = 0
    gate: int = 0  # entries of W_g, where the output is gated


@dataclass(frozen=True)
class Dense:
    """Layers with an MLP of one width."""

    layers: int = 0
    width: int = 0


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 layers (arXiv 2405.21060)."""

    layers: int
    heads: int
    head_size: int
    groups: int
    state: int
    conv: int = 4
    chunk: int = 128  # positions that are computed at once

    @property
    def inner(self) -> int:
        return self.heads * self.head_size


class Product(NamedTuple):
    """A matrix X × Y that a token is multiplied with `times` times, of `matrices` such matrices of a model."""

    part: str
    X: int
    Y: int
    times: float
    matrices: float


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    hidden: int
    vocab: int
    attention: Attention
    moe: Experts | None = None
    mlp: Dense = Dense()
    mamba: Mamba | None = None
    gated: bool = True
    tied: bool = False
    mtp: int = 0  # next-token modules that are trained, each a last layer and another output

    @classmethod
    def of(cls, config: Config) -> "Shape":
        """The shape of a model of ours."""
        m, experts = config.step_model, None
        # A next-token module is counted with attention and experts, whatever its layer has.
        mtp = m.mtp_modules
        if m.is_moe:
            narrow = m.wire_size if m.structure == "bigmac" else 0
            gate = m.hidden_size**2 if "gate" in m.latent_norms else 0
            layers = m.count_trained("E") - mtp
            experts = Experts(layers, m.expert_count, m.choices, m.expert_width, m.shared_width, narrow, gate)
        mamba = Mamba(
            m.count_trained("M"), m.mamba_head_count, m.mamba_head_dim, m.mamba_groups, m.mamba_state, m.mamba_conv,
            config.mamba_chunk,
        )  # fmt: skip
        return cls(
            hidden=m.hidden_size,
            vocab=m.vocab_size,
            attention=Attention(m.count_trained("*") - mtp, m.num_heads, m.kv_heads, m.head_size),
            moe=experts,
            mlp=Dense(m.count_trained("-"), m.mlp_width),
            mamba=mamba if mamba.layers else None,
            gated=m.gated,
            tied=m.tie_embeddings,
            mtp=mtp,
        )

    @property
    def row(self) -> int:
        """Width of the rows that experts take."""
        return (self.moe.latent if self.moe else 0) or self.hidden

    def products(self) -> Iterator[Product]:
        """All products with parameters: parts are those of `counts.flops`, and mamba."""
        h, a, up = self.hidden, self.attention, 2 if self.gated else 1

        def product(part: str, X: int, Y: int, layers: float, times: float = 1, matrices: float = 1) -> Product:
            return Product(part, X, Y, layers * times, layers * matrices)

        layers = a.layers + self.mtp
        q, value = a.heads * a.head_size, a.heads * (a.value_size or a.head_size)
        if a.kv_rank:
            if a.q_rank:
                yield product("attention", h, a.q_rank, layers)
            yield product("attention", a.q_rank or h, q, layers)
            yield product("attention", h, a.kv_rank + a.rope_size, layers)
            yield product("attention", a.kv_rank, q - a.heads * a.rope_size + value, layers)
        else:
            yield product("attention", h, q + 2 * a.kv_heads * a.head_size, layers)
        yield product("attention", value, h, layers)
        if self.mtp:
            yield product("attention", 2 * h, h, self.mtp)
        if self.mlp.layers:
            yield product("mlp", h, up * self.mlp.width, self.mlp.layers)
            yield product("mlp", self.mlp.width, h, self.mlp.layers)
        if (moe := self.moe) is not None:
            layers = moe.layers + self.mtp
            yield product("router", h, moe.experts, layers)
            yield product("experts", self.row, up * moe.width, layers, moe.top_k, moe.experts)
            yield product("experts", moe.width, self.row, layers, moe.top_k, moe.experts)
            if moe.shared:
                yield product("shared", h, up * moe.shared, layers)
                yield product("shared", moe.shared, h, layers)
            if moe.latent:
                yield product("projections", h, moe.latent, layers)
                yield product("projections", moe.latent, h, layers)
            if moe.gate:
                yield product("projections", h, h, layers)
        if (b := self.mamba) is not None:
            yield product("mamba", h, 2 * b.inner + 2 * b.groups * b.state + b.heads, b.layers)
            yield product("mamba", b.inner, h, b.layers)
        yield product("output", h, self.vocab, 1 + self.mtp)

    def score_flops(self, length: int, causal: bool = True) -> float:
        """FLOPs of attention's scores and values; `causal`: without the half that the mask hides."""
        a = self.attention
        size = 2 * a.heads * (a.head_size + (a.value_size or a.head_size))
        whole = length / 2 if causal else float(length)
        seen = (a.layers - a.window_layers + self.mtp) * whole
        if a.window_layers:
            near = min(a.window, length)
            seen += a.window_layers * (near * (1 - near / length / 2) if causal else length)
        return size * seen

    def scan_flops(self) -> float:
        """FLOPs of Mamba-2's scan in chunks: scores and values inside a chunk, and the state in and out."""
        if (b := self.mamba) is None:
            return 0.0
        return b.layers * (b.chunk * (b.groups * b.state + b.inner) + 4 * b.inner * b.state)

    def flops(self, length: int, causal: bool = True) -> float:
        """FLOPs of the forward pass of a token; three times that are a training step's."""
        products = sum(2.0 * p.X * p.Y * p.times for p in self.products())
        return products + self.score_flops(length, causal) + self.scan_flops()

    def parameters(self, part: str = "") -> float:
        """Entries of the matrices of a part, or of all and the table of tokens; norms and biases are left out."""
        found = sum(p.X * p.Y * p.matrices for p in self.products() if part in ("", p.part))
        if part == "":  # the output of next-token modules is the model's own
            found -= self.vocab * self.hidden * (self.mtp + (1 if self.tied else 0)) - self.vocab * self.hidden
        return found

    def passed_numbers(self, row_passes: float) -> float:
        """Numbers that elementwise passes of a forward pass read and write, in fused kernels, but those of the loss.

        A norm reads and writes, a sum of residuals reads two and writes one, an activation reads what one or two
        products gave and writes, rotary embeddings read and write.

        Args:
          row_passes: times that an entry of an expert's row is read or written on its way there and back.
        """
        h, a, up = self.hidden, self.attention, 2 if self.gated else 1
        heads = a.heads * a.head_size + a.kv_heads * a.head_size
        passed: float = (a.layers + self.mtp) * (5 * h + 2 * heads)
        passed += self.mlp.layers * (5 * h + (up + 1) * self.mlp.width)
        if (moe := self.moe) is not None:
            row = self.row
            each = (up + 1) * moe.width + row_passes * row
            passed += (moe.layers + self.mtp) * (5 * h + (up + 1) * moe.shared + moe.top_k * each + row)
        if (b := self.mamba) is not None:  # norm and sum; convolution, and the scan's inputs and outputs; gated norm
            wide = b.inner + 2 * b.groups * b.state
            passed += b.layers * (5 * h + 4 * wide + 2 * b.inner + 4 * b.inner)
        return passed
