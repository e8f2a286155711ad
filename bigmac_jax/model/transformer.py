"""The decoder-only transformer. B batch, L length, D hidden, V vocabulary, Y layers, E experts."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.mesh import batch_spec, platform
from bigmac_jax.model.layers import MLP, Attention, Norm, dropout, normal
from bigmac_jax.model.moe import Aux, MoE, empty_aux


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: ModelConfig, key: Array):
        self.config = config
        attention, feed_forward = jax.random.split(key)
        self.attention_norm = Norm(config.norm, config.hidden_size)
        self.attention = Attention(config, attention)
        self.mlp_norm = Norm(config.norm, config.hidden_size)
        self.mlp = MoE(config, feed_forward) if config.is_moe else MLP(config, feed_forward, config.expert_width)

    def __call__(self, x_BLD: Array, key: Array | None, load_E: Array | None, dropless: bool) -> tuple[Array, Aux]:
        keys = (None, None) if key is None else jax.random.split(key)
        x_BLD = x_BLD + dropout(self.attention(self.attention_norm(x_BLD)), self.config.dropout, keys[0])
        h_BLD, aux = self.mlp_norm(x_BLD), empty_aux()
        if isinstance(self.mlp, MoE):
            y_BLD, aux = self.mlp(h_BLD, load_E, dropless)
        else:
            y_BLD = self.mlp(h_BLD)
        return x_BLD + dropout(y_BLD, self.config.dropout, keys[1]), aux


class Transformer(nnx.Module):
    """Layers stacked along a leading dimension and scanned."""

    def __init__(self, config: ModelConfig, max_length: int, key: Array):
        self.config = config
        self.max_length = max_length
        keys = jax.random.split(key, 4)
        V, D = config.vocab_size, config.hidden_size
        # Small, so that logits start near zero. The embedding, which may be the same parameter, is multiplied by √D
        # where it is read (Vaswani et al., 3.4), or a token's identity would drown in what the layers add to it.
        std = 0.02
        self.embedding_VD = normal(keys[0], (V, D), std)
        self.positions_LD = normal(keys[1], (max_length, D), std) if config.positions == "learned" else None
        self.layers = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[2], config.num_layers))
        self.final_norm = Norm(config.norm, D)
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
        w_VD = self.unembedding().astype(x_BLD.dtype)
        return jnp.einsum("BLD,VD->BLV", x_BLD, w_VD, preferred_element_type=jnp.float32), aux

    def features(
        self,
        tokens_BL: Array,
        *,
        dropout_key: Array | None = None,
        load_YE: Array | None = None,
        dropless: bool = False,
    ) -> tuple[Array, Aux]:
        """The normalised output of the last layer, x_BLD, and aux; arguments as for the whole model."""
        config, length = self.config, tokens_BL.shape[1]
        x_BLD = self.embedding_VD[...].at[tokens_BL].get(out_sharding=batch_spec(3))
        if self.positions_LD is not None:
            if length > self.max_length:
                raise ValueError(
                    f"{length} tokens exceed the {self.max_length} learned positions (data.sequence_length)"
                )
            x_BLD = x_BLD + self.positions_LD[...][None, :length]
        x_BLD = (math.sqrt(config.hidden_size) * x_BLD).astype(config.dtype)
        keys_Y = None
        if dropout_key is not None and config.dropout:
            keys = jax.random.split(dropout_key, 1 + config.num_layers)
            x_BLD, keys_Y = dropout(x_BLD, config.dropout, keys[0]), keys[1:]

        def step(x_BLD: Array, xs: tuple[Block, Array | None, Array | None]) -> tuple[Array, Aux]:
            layer, key, load_E = xs
            return layer(x_BLD, key, load_E, dropless)

        if config.remat:
            step = jax.checkpoint(step)
        # On CPU a loop copies what each layer keeps for the backward pass into one array of all layers, and out again.
        unroll = config.unroll_layers or (config.num_layers if platform() == "cpu" else 1)
        x_BLD, aux = jax.lax.scan(step, x_BLD, (self.layers, keys_Y, load_YE), unroll=unroll)
        return self.final_norm(x_BLD), aux

    def unembedding(self) -> Array:
        """w_VD: logits are x wᵀ."""
        return (self.embedding_VD if self.unembedding_VD is None else self.unembedding_VD)[...]


def init_model(config: Config, key: Array) -> Transformer:
    """A new model, sharded on the current mesh (`jax.set_mesh`); under `jax.eval_shape` it costs no memory."""
    return jax.jit(lambda k: Transformer(config.model, config.data.sequence_length, k))(key)
