"""The decoder-only transformer. B batch, L length, D hidden, V vocabulary, Y layers, E experts."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, MeshConfig, ModelConfig
from bigmac_jax.mesh import TENSOR, all_but_gathered, fully_sharded, on_each_rank, platform, spec_of, token_spec
from bigmac_jax.model.layers import MLP, Attention, Norm, dropout, normal
from bigmac_jax.model.moe import Aux, MoE, empty_aux


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: ModelConfig, key: Array):
        self.config = config
        attention, feed_forward = jax.random.split(key)
        self.attention_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config, attention)
        self.mlp_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = MoE(config, feed_forward) if config.is_moe else MLP(config, feed_forward, config.expert_width)

    def __call__(self, x_BLD: Array, key: Array | None, load_E: Array | None, dropless: bool) -> tuple[Array, Aux]:
        keys = (None, None) if key is None else jax.random.split(key)
        y_BLD, _ = self.attention(self.attention_norm(x_BLD))
        x_BLD = x_BLD + dropout(y_BLD, self.config.dropout, keys[0])
        y_BLD, aux = self.feed_forward(x_BLD, load_E, dropless)
        return x_BLD + dropout(y_BLD, self.config.dropout, keys[1]), aux

    def feed_forward(self, x_BLD: Array, load_E: Array | None, dropless: bool) -> tuple[Array, Aux]:
        """What the second branch adds to x."""
        h_BLD = self.mlp_norm(x_BLD)
        return self.mlp(h_BLD, load_E, dropless) if isinstance(self.mlp, MoE) else (self.mlp(h_BLD), empty_aux())


class Transformer(nnx.Module):
    """Layers stacked along a leading dimension and scanned."""

    def __init__(self, config: ModelConfig, max_length: int, key: Array, fsdp: bool = False):
        self.config = config
        self.max_length = max_length
        self.fsdp = fsdp
        keys = jax.random.split(key, 4)
        V, D = config.vocab_size, config.hidden_size
        # Small, so that logits start near zero. The embedding, which may be the same parameter, is multiplied by √D
        # where it is read (Vaswani et al., 3.4), or a token's identity would drown in what the layers add to it. One
        # that isn't multiplied, and has a parameter of its own, starts as large as that.
        std = 0.02
        own = not (config.scale_embedding or config.tie_embeddings)
        self.embedding_VD = normal(keys[0], (V, D), math.sqrt(D) * std if own else std)
        self.positions_LD = normal(keys[1], (max_length, D), std) if config.positions == "learned" else None
        self.layers = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[2], config.num_layers))
        self.final_norm = Norm(config.norm, D, config.norm_eps)
        self.unembedding_VD = None if config.tie_embeddings else normal(keys[3], (V, D), std)

    def __call__(
        self,
        tokens_BL: Array,
        *,
        dropout_key: Array | None = None,
        load_YE: Array | None = None,
        dropless: bool = False,
    ) -> tuple[Array, Aux]:
        """Logits of the next token.

        Args:
          tokens_BL: int32, L at most max_length with learned positions.
          dropout_key: no dropout without one.
          load_YE: loads for the balance loss, where the step is larger than this batch.
          dropless: ignore model.capacity_factor, as evaluation does.

        Returns:
          (logits_BLV in float32, aux with a leading dimension of layers)
        """
        x_BLD, aux = self.features(tokens_BL, dropout_key=dropout_key, load_YE=load_YE, dropless=dropless)
        return self.logits(x_BLD), aux

    def features(
        self,
        tokens_BL: Array,
        *,
        dropout_key: Array | None = None,
        load_YE: Array | None = None,
        dropless: bool = False,
    ) -> tuple[Array, Aux]:
        """The normalised output of the last layer, x_BLD, and aux; arguments as for the whole model."""
        config = self.config
        x_BLD, keys_Y = self.embed(tokens_BL), None
        if dropout_key is not None and config.dropout:
            keys = jax.random.split(dropout_key, 1 + config.num_layers)
            x_BLD, keys_Y = dropout(x_BLD, config.dropout, keys[0]), keys[1:]

        def step(x_BLD: Array, xs: tuple[Block, Array | None, Array | None]) -> tuple[Array, Aux]:
            layer, key, load_E = xs
            return layer(x_BLD, key, load_E, dropless)

        if config.remat:
            step = jax.checkpoint(step)
        elif self.fsdp:  # a layer's parameters are gathered again for its backward pass, not kept
            step = jax.checkpoint(step, policy=all_but_gathered)
        # On CPU a loop copies what each layer keeps for the backward pass into one array of all layers, and out again.
        unroll = config.unroll_layers or (config.num_layers if platform() == "cpu" else 1)
        x_BLD, aux = jax.lax.scan(step, x_BLD, (self.layers, keys_Y, load_YE), unroll=unroll)
        return self.final_norm(x_BLD), aux

    def embed(self, tokens_BL: Array, position_BL: Array | None = None) -> Array:
        """x_BLD of the tokens at their positions, by default 0 to L - 1.

        Raises:
          ValueError: L exceeds the learned positions.
        """
        length = tokens_BL.shape[1]
        if self.positions_LD is not None and position_BL is None and length > self.max_length:
            raise ValueError(f"{length} tokens exceed the {self.max_length} learned positions (data.sequence_length)")
        tables = [table[...] for table in (self.embedding_VD, self.positions_LD) if table is not None]
        arrays = (tokens_BL,) if position_BL is None or self.positions_LD is None else (tokens_BL, position_BL)
        arrays = tuple(jax.sharding.reshard(array, token_spec(2)) for array in arrays)
        x_BLD = on_each_rank(_embed if len(arrays) == 1 else _embed_at, arrays, tables)
        scale = math.sqrt(self.config.hidden_size) if self.config.scale_embedding else 1.0
        return (scale * x_BLD).astype(self.config.dtype)

    def logits(self, x_BLD: Array) -> Array:
        """Float32 logits_BLV of features."""
        product = functools.partial(jnp.einsum, "BLD,VD->BLV", preferred_element_type=jnp.float32)
        return on_each_rank(product, (x_BLD,), (self.unembedding().astype(x_BLD.dtype),))

    def unembedding(self) -> Array:
        """w_VD: logits are x wᵀ."""
        return (self.embedding_VD if self.unembedding_VD is None else self.unembedding_VD)[...]


def _embed(tokens_BL: Array, embedding_VD: Array, positions_LD: Array | None = None) -> Array:
    """On one rank, whose tokens are a part of the sequence."""
    x_BLD = embedding_VD[tokens_BL]
    if positions_LD is None:
        return x_BLD
    first = 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index(TENSOR) * tokens_BL.shape[1]
    return x_BLD + jax.lax.dynamic_slice_in_dim(positions_LD, first, tokens_BL.shape[1])[None]


def _embed_at(tokens_BL: Array, position_BL: Array, embedding_VD: Array, positions_LD: Array) -> Array:
    return embedding_VD[tokens_BL] + positions_LD[position_BL]


def init_model(config: Config, key: Array) -> Transformer:
    """A new model, sharded on the current mesh (`jax.set_mesh`); under `jax.eval_shape` it costs no memory."""

    def init(key: Array) -> Transformer:
        return _sharded(config.mesh, Transformer(config.model, config.data.sequence_length, key, config.mesh.fsdp))

    return jax.jit(init)(key)


# Parameters that are matrices, or tables; norms' scales and biases are small, and stay whole.
_MATRICES = ("w_", "router_DE", "embedding_VD", "unembedding_VD", "positions_LD")


def _sharded(mesh: MeshConfig, model: Transformer) -> Transformer:
    """Splits, as the mesh wants it, what modules leave whole: experts over `tensor`, everything over the axes left."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def shard(path: tuple[Any, ...], w: Array) -> Array:
        name = next(part.name for part in reversed(path) if getattr(part, "name", "value") != "value")
        dims = name.split("_")[-1]  # such as eRF, behind that of the layers
        spec = [*spec_of(w), *[None] * (w.ndim - len(spec_of(w)))]
        layers, own = spec[: w.ndim - len(dims)], P(*spec[w.ndim - len(dims) :])
        if mesh.split_experts and dims[0] == "e" and "F" in dims:
            own = P(*[TENSOR if dim == "F" else entry for dim, entry in zip(dims, own, strict=True)])
        if mesh.fsdp and name.startswith(_MATRICES):
            own = fully_sharded(w.shape[len(layers) :], own, sizes)
        return jax.sharding.reshard(w, P(*layers, *own))

    return jax.tree_util.tree_map_with_path(shard, model)
