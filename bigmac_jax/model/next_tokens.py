"""Next-token modules, which learn to predict the tokens behind the next one (MTP: DeepSeek-V3, arXiv 2412.19437, 2.2).

Of module k = 1, 2, … at position t, where h⁰ is the model's features:

    x = [norm(embedding of token t + k); norm(hᵏ⁻¹)] W
    hᵏ = norm(layer(x)),    logits of token t + k + 1 = hᵏ · the model's unembedding

Features are what stands behind the last norm, and that goes on to the next module: so Megatron-Core has it, whose order
of the two halves this is, too (eh_proj). B batch, L length, D hidden.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.attention import Documents
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.layers import Linear, Norm, dropout
from bigmac_jax.model.mesh import batch_spec
from bigmac_jax.model.moe import LayerStats
from bigmac_jax.model.router import Padding

Layer = Callable[..., tuple[Array, LayerStats]]  # a `Block`


class NextTokens(nnx.Module):
    """A next-token module. Of several, the parameters have a leading dimension.

    Args:
      make_layer: its layer from a key.
    """

    def __init__(self, config: Config, make_layer: Callable[[Array], Layer], key: Array):
        self.config, D, keys = config, config.model.hidden_size, jax.random.split(key)
        self.embedding_norm, self.hidden_norm = Norm(config, D), Norm(config, D)
        self.projection = Linear(config, keys[0], 2 * D, D, "attention", bias=False)
        self.layers = make_layer(keys[1])
        self.final_norm = Norm(config, D)

    def __call__(
        self,
        x_BLD: Array,
        read_BLD: Array,
        key: Array | None,
        documents: Documents | None,
        padding: Padding,
        choices: Array | None,
    ) -> tuple[Array, LayerStats]:
        """Computes the module's features before `final_norm`, and its layer's statistics.

        Args:
          x_BLD: the features before it.
          read_BLD: the embedding of the token that each position reads.
          key: of dropout, of the embedding and of the layer.
          documents, padding, choices: as a `Block` takes them.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        read_BLD = dropout(read_BLD, self.config.model.dropout, keys[0])
        return self.layers(self.join(x_BLD, read_BLD), keys[1], False, documents, padding, choices)

    def join(self, x_BLD: Array, read_BLD: Array) -> Array:
        """Computes what the module's layer is given, from the features before it and what each position reads."""
        both_BLX = jnp.concatenate([self.embedding_norm(read_BLD), self.hidden_norm(x_BLD)], axis=-1)
        return self.projection(both_BLX)


def look_ahead(batch: Batch, by: int) -> Batch:
    """What next-token module `by` sees of a batch: the token that stands so many behind each position, and its target.
    Where none does in the window or, if documents are kept apart, in the position's, the segment is PADDING, and there
    is no target."""

    def shift(inputs_BL: Array, targets_BL: Array, *given: Array) -> tuple[Array, Array, Array]:
        def ahead(v_BL: Array, fill: int) -> Array:
            return jnp.pad(v_BL[:, by:], ((0, 0), (0, by)), constant_values=fill)

        segments_BL = given[0] if given else jnp.zeros_like(inputs_BL)
        same_BL = ahead(segments_BL, PADDING) == segments_BL
        targets_BL = jnp.where(same_BL, ahead(targets_BL, NO_TARGET), NO_TARGET)
        return ahead(inputs_BL, 0), targets_BL, jnp.where(same_BL, segments_BL, PADDING)

    given = [jax.sharding.reshard(v, batch_spec(2)) for v in batch[:3] if v is not None]
    return Batch(*on_each_rank(shift, given, in_spec=batch_spec, out_specs=(batch_spec(2),) * 3))
