"""The decoder-only model: residual branches between an embedding and logits. B batch, L length, D hidden, V vocabulary,
v of a rank, Y layers, E experts."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.blocks import name_branches
from bigmac_jax.data.batch import PADDING
from bigmac_jax.data.documents import log_once
from bigmac_jax.model.attention import Attention, Documents, find_documents
from bigmac_jax.model.balance import BALANCE_BIAS
from bigmac_jax.model.exchange.wire import EXCHANGED
from bigmac_jax.model.gathering import Weight, all_but_gathered, in_turn, on_each_rank
from bigmac_jax.model.layers import MLP, Norm, dropout
from bigmac_jax.model.mamba import Mamba
from bigmac_jax.model.mesh import HOST, TENSOR, interleave, join, platform, tensor_ranks, token_spec
from bigmac_jax.model.moe import Aux, LayerStats, MoE, empty_stats
from bigmac_jax.model.next_tokens import NextTokens
from bigmac_jax.model.parameters import Declaration, declared, leaf_name, named_leaves, parameter, weight
from bigmac_jax.model.resident import compute_layer, start
from bigmac_jax.model.router import Padding
from bigmac_jax.runtime import hosts

ENTERED = "entered"  # what enters a layer: execution.remat=offload moves it to host memory
TokenMixer = Attention | Mamba
Mixer = TokenMixer | MLP | MoE


class Block(nnx.Module):
    """A layer: some residual branches (`model.blocks`), each a norm and a mixer, as `mlp_norm` and `mlp`."""

    mlp: MLP | MoE  # the last one, if it takes each token by itself

    def __init__(self, config: Config, key: Array, blocks: str):
        self.config, self.branches = config, tuple(name_branches(blocks))
        for branch, letter, own in zip(self.branches, blocks, jax.random.split(key, len(blocks)), strict=True):
            setattr(self, f"{branch}_norm", Norm(config, config.model.hidden_size))
            setattr(self, branch, _make_mixer(config, own, letter))

    def __call__(
        self,
        x_BLD: Array,
        key: Array | None,
        evaluating: bool,
        documents: Documents | None,
        padding: Padding | None = None,
        choices: Array | None = None,
    ) -> tuple[Array, LayerStats]:
        keys = [None] * len(self.branches) if key is None else jax.random.split(key, len(self.branches))
        stats = empty_stats()
        for (norm, mixer), of_branch in zip(self.mixers(), keys, strict=True):
            h_BLD = norm(x_BLD)
            if isinstance(mixer, MoE):
                y_BLD, stats = mixer(h_BLD, evaluating, padding, choices)
            else:
                y_BLD = mixer(h_BLD) if isinstance(mixer, MLP) else mixer(h_BLD, documents)
            x_BLD = x_BLD + dropout(y_BLD, self.config.model.dropout, of_branch)
        return x_BLD, stats

    def mixers(self) -> Iterator[tuple[Norm, Mixer]]:
        """Each branch in turn: it adds mixer(norm(x)) to x."""
        for branch in self.branches:
            yield getattr(self, f"{branch}_norm"), getattr(self, branch)


def _make_mixer(config: Config, key: Array, letter: str) -> Mixer:
    if letter == "-":
        return MLP(config, key, config.model.mlp_width)
    mixers: dict[str, Callable[[Config, Array], Mixer]] = {"*": Attention, "M": Mamba, "E": MoE}
    return mixers[letter](config, key)


class Transformer(nnx.Module):
    """A token's embedding, layers, and logits of the next token. The layers of a stack (`config.model.stacks`) are one
    `Block`, whose parameters have a leading dimension."""

    resident: Any = None  # the experts of all layers, in host memory (`resident.hold`); None: the layers have their own

    def __init__(self, config: Config, key: Array):
        self.config = config
        m, keys = config.model, jax.random.split(key, 4)
        V, D = m.vocab_size, m.hidden_size
        # Small, so that logits start near zero. The embedding, which may be the same parameter, is multiplied by √D
        # where it is read (Vaswani et al., 3.4), or a token's identity would drown in what the layers add to it. One
        # that isn't multiplied, and has a parameter of its own, starts as large as that.
        std = 0.02
        own = not (m.scale_embedding or m.tie_embeddings)
        table = Declaration("VD", "embedding", std, axes=(TENSOR, None), table=True)
        embedding = dataclasses.replace(table, value=math.sqrt(D) * std) if own else table
        positions = Declaration("LD", "embedding", std, decays=False)
        self.embedding_VD = parameter(config, keys[0], (V, D), embedding)
        learned, longest = m.positions == "learned", config.context_length
        self.positions_LD = parameter(config, keys[1], (longest, D), positions) if learned else None
        keys_Y = jax.random.split(keys[2], m.depth)
        for stack in m.stacks:
            make = functools.partial(Block, config, blocks=stack.blocks)
            setattr(self, stack.name, jax.vmap(make)(_of_layers(keys_Y, stack.layers)))
        self.final_norm = Norm(config, D)
        self.unembedding_VD = None if m.tie_embeddings else parameter(config, keys[3], (V, D), table)
        own_key = jax.random.fold_in(key, len(keys))  # so that the model itself begins as it would without modules
        self.mtp = self._next_tokens(jax.random.split(own_key, m.mtp_modules)) if m.mtp_modules else None

    def _next_tokens(self, keys_K: Array) -> NextTokens:
        make_layer = functools.partial(Block, self.config, blocks=self.config.model.mtp_stack.blocks)
        return jax.vmap(functools.partial(NextTokens, self.config, make_layer))(keys_K)

    def __call__(self, tokens_BL: Array, segments_BL: Array | None = None, **options: Any) -> tuple[Array, Aux]:
        """Computes logits of the next token; arguments as for `features`.

        Returns:
          (logits_BLV in float32, aux with a leading dimension of layers with experts)
        """
        x_BLD, stats = self.features(tokens_BL, segments_BL, **options)
        return self.logits(x_BLD), Aux.of(stats)

    def features(
        self,
        tokens_BL: Array,
        segments_BL: Array | None = None,
        *,
        dropout_key: Array | None = None,
        padding: Padding | None = None,
        choices: Array | None = None,
        evaluating: bool = False,
    ) -> tuple[Array, LayerStats]:
        """Computes the normalised output of the last layer, x_BLD, and the statistics of layers with experts [Y, U, …].

        Args:
          tokens_BL: int32, L at most `config.context_length` with learned positions.
          segments_BL: documents that don't see each other (`data.batch.Batch`).
          dropout_key: no dropout without one.
          padding: what no expert sees and no statistic counts; by default what is of no document.
          choices: how many experts a token takes, if fewer than model.top_k (train.choices_from).
          evaluating: no choice is dropped, and none depends on another token.
        """
        documents = None if segments_BL is None else find_documents(segments_BL)
        if padding is None and segments_BL is not None:
            padding = Padding.of(segments_BL == PADDING)
        x_BLD, keys_Y = self.embedded(tokens_BL, None if documents is None else documents.position_BL, dropout_key)

        def step(x_BLD: Array, xs: tuple[Block, Array | None]) -> tuple[Array, LayerStats]:
            layer, key = xs
            return layer(x_BLD, key, evaluating, documents, padding, choices)

        x_BLD, stats = through_layers(self.config, step, x_BLD, self.stacks(), keys_Y, self.resident)
        return self.final_norm(x_BLD), stats

    def next_features(
        self,
        number: int,
        x_BLD: Array,
        tokens_BL: Array,
        segments_BL: Array | None,
        *,
        dropout_key: Array | None,
        padding: Padding,
        choices: Array | None,
    ) -> tuple[Array, LayerStats]:
        """Computes the features and the statistics [1, U, …] of a next-token module; other arguments are those of
        `features`.

        Args:
          number: of the module, from 0.
          x_BLD: features of the module before, of the first one the model's.
          tokens_BL: the token that stands number + 1 behind each position; any at `padding`.
          padding: with the positions that no such token follows.
        """
        config, documents = self.config, None if segments_BL is None else find_documents(segments_BL)
        # A position keeps its number, whichever token is read there.
        read_BLD = self.embed(tokens_BL, None if documents is None else documents.position_BL)
        key = None
        if dropout_key is not None and config.model.dropout:  # others than `embedded` draws
            key = jax.random.fold_in(dropout_key, 1 + config.model.depth + number)

        def step(x_BLD: Array, module: NextTokens) -> tuple[Array, LayerStats]:
            return module(x_BLD, read_BLD, key, documents, padding, choices)

        module = jax.tree.map(lambda w: jax.lax.index_in_dim(w, number, keepdims=False), self.mtp)
        x_BLD, stats = recomputed(config, step)(x_BLD, module)
        return module.final_norm(x_BLD), jax.tree.map(lambda v: v[None], stats)

    def stacks(self) -> list[Block]:
        """The layers, a stack of them each, in the order of `config.model.stacks`."""
        return [getattr(self, stack.name) for stack in self.config.model.stacks]

    def embedded(
        self, tokens_BL: Array, position_BL: Array | None, dropout_key: Array | None
    ) -> tuple[Array, Array | None]:
        """Embeds tokens, with dropout if there is a key → x_BLD, and the layers' dropout keys."""
        config, x_BLD = self.config.model, self.embed(tokens_BL, position_BL)
        if dropout_key is None or not config.dropout:
            return x_BLD, None
        drawn = jax.random.split(dropout_key, 1 + config.depth)
        return dropout(x_BLD, config.dropout, drawn[0]), drawn[1:]

    @jax.named_scope("embedding")
    def embed(self, tokens_BL: Array, position_BL: Array | None = None) -> Array:
        """Embeds tokens at their positions, by default 0 to L - 1 → x_BLD.

        Raises:
          ValueError: L exceeds the learned positions.
        """
        config, length, longest = self.config, tokens_BL.shape[1], self.config.context_length
        if self.positions_LD is not None and position_BL is None and length > longest:
            raise ValueError(f"{length} tokens exceed the {longest} learned positions (model.context_length)")
        # Gathered like all parameters, read in float32: so what many tokens send a row is added up in float32, too.
        tables = [weight(config, v, "float32") for v in (self.embedding_VD, self.positions_LD) if v is not None]
        arrays = (tokens_BL,) if position_BL is None or self.positions_LD is None else (tokens_BL, position_BL)
        arrays = tuple(jax.sharding.reshard(array, token_spec(2)) for array in arrays)
        read = functools.partial(_embed if len(arrays) == 1 else _embed_at, config.execution.dtype)
        x_BLD = on_each_rank(read, arrays, tables)
        scale = math.sqrt(config.model.hidden_size) if config.model.scale_embedding else 1.0
        return (scale * x_BLD).astype(config.execution.dtype)

    def logits(self, x_BLD: Array) -> Array:
        """Computes float32 logits_BLV from features."""
        return on_each_rank(_logits, (x_BLD,), (self.unembedding(),))

    def unembedding(self) -> Weight:
        """w_VD: logits are x wᵀ."""
        return weight(self.config, self.embedding_VD if self.unembedding_VD is None else self.unembedding_VD)


# On one rank, whose tokens are a part of the sequence, and which has v = V / tensor rows of a table of tokens.


def _embed(dtype: str, tokens_BL: Array, embedding_vD: Array, positions_LD: Array | None = None) -> Array:
    """x_BLD, float32."""
    x_BLD = _rows(dtype, embedding_vD, tokens_BL)
    if positions_LD is None:
        return x_BLD
    first = 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index(TENSOR) * tokens_BL.shape[1]
    here_LD = jax.lax.dynamic_slice_in_dim(positions_LD, first, tokens_BL.shape[1])
    return x_BLD + here_LD[None]


def _embed_at(dtype: str, tokens_BL: Array, position_BL: Array, embedding_vD: Array, positions_LD: Array) -> Array:
    return _rows(dtype, embedding_vD, tokens_BL) + positions_LD[position_BL]


def _rows(dtype: str, table_vD: Array, tokens_BL: Array) -> Array:
    """The tokens' rows, float32; between ranks in `dtype`."""
    if tensor_ranks() == 1:
        return table_vD[tokens_BL]
    # Each rank reads what it has of all ranks' tokens. Of a token's rows one is not zero, so that no sum rounds.
    tokens_BL = jax.lax.all_gather(tokens_BL, TENSOR, axis=1, tiled=True)
    row_BL, here_BL = own_rows(tokens_BL, table_vD.shape[0])
    x_BLD = jnp.where(here_BL[..., None], table_vD[row_BL], 0).astype(dtype)
    return jax.lax.psum_scatter(x_BLD, TENSOR, scatter_dimension=1, tiled=True).astype(jnp.float32)


def own_rows(tokens: Array, rows: int) -> tuple[Array, Array]:
    """Each token's row in this rank's part of a table, `rows` long, and whether it is there (else the row is any)."""
    place = tokens - jax.lax.axis_index(TENSOR) * rows
    return jnp.clip(place, 0, rows - 1), (place >= 0) & (place < rows)


def _logits(x_BLD: Array, w_vD: Array) -> Array:
    product = functools.partial(jnp.einsum, "BLD,VD->BLV", preferred_element_type=jnp.float32)
    if tensor_ranks() == 1:
        return product(x_BLD, w_vD)
    all_BLv = product(jax.lax.all_gather(x_BLD, TENSOR, axis=1, tiled=True), w_vD)
    return jax.lax.all_to_all(all_BLv, TENSOR, split_axis=1, concat_axis=2, tiled=True)


def through_layers(
    config: Config,
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stacks: Sequence[Any],
    keys_Y: Array | None,
    store: Any = None,
) -> tuple[Any, Any]:
    """Scans `step(carry, (layer, key))` over the layers, recomputed in the backward pass as execution.remat
    says → the last carry, and what `step` reports of the layers with experts (of all, if none has), [Y, …].

    Args:
      stacks: of layers, as `config.model.stacks` has them.
      keys_Y: of all layers.
      store: the experts that the layers lack, in host memory.
    """
    execution, m, step = config.execution, config.model, recomputed(config, step)
    # On CPU a loop copies what each layer keeps for the backward pass into one array of all layers, and out again.
    unroll = execution.unroll_layers or (m.depth if platform() == "cpu" else 1)

    def through_loop(carry: Any, xs: Sequence[Any]) -> tuple[Any, list[Any]]:
        (carry, on_device), reported = carry, []
        layers = [layer for layer, _ in xs]
        for number, (_, key) in enumerate(xs):
            if number + 1 < len(layers):
                carry, layers[number + 1] = _in_turn(config, carry, layers[number + 1])
            layer = layers[number]

            def compute(layer: Any, carry: Any = carry, key: Array | None = key) -> tuple[Any, Any]:
                return step(carry, (layer, key))

            (carry, of_layer), on_device = compute_layer(store, on_device, execution, layer, compute)
            reported.append(of_layer)
        return (carry, on_device), reported

    carry = carry, None if store is None else start(store, execution)
    found, given = [], iter(stacks)
    for loop in m.stacks_of_loops:
        keys = [None if keys_Y is None else _of_layers(keys_Y, stack.layers) for stack in loop]
        carry, reported = jax.lax.scan(through_loop, carry, [(next(given), key) for key in keys], unroll=unroll)
        kept = [of for of, stack in zip(reported, loop, strict=True) if stack.experts or not m.is_moe]
        found += [kept[0] if len(kept) == 1 else jax.tree.map(interleave, *kept)] if kept else []
    return carry[0], found[0] if len(found) == 1 else jax.tree.map(join, *found)


def _in_turn(config: Config, carry: Any, later: Any) -> tuple[Any, Any]:
    """Returns both, what enters a layer and the next layer. On GPU the gradients of the first wait for those of the
    other's parameters.

    Nothing else in the backward pass does: XLA:GPU would compute and sum those of all layers of a loop's body at its
    end, and keep until then what they are computed from (docs/gpu.md). Left out is what a run may not train, so that
    its gradient is not computed for this alone: routers, a model with adapters, a teacher beside its student.
    """
    if platform() != "gpu" or config.tuning.lora_rank or not isinstance(later, Block):
        return carry, later
    graphdef, params, *rest = nnx.split(later, _is_waited_for, ...)
    carry, params = in_turn(carry, params)
    return carry, nnx.merge(graphdef, params, *rest)


def _is_waited_for(_: Any, variable: Any) -> bool:
    return isinstance(variable, nnx.Param) and declared(variable).part != "router"


def recomputed(config: Config, step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The step through a layer, computed again in the backward pass as execution.remat says."""
    remat, names = config.execution.remat, jax.checkpoint_policies.save_only_these_names
    if remat == "exchange":
        return jax.checkpoint(step, policy=names(EXCHANGED, BALANCE_BIAS))
    if remat == "layer":
        return jax.checkpoint(step, policy=names(BALANCE_BIAS))
    if remat == "offload":
        return jax.checkpoint(_entered(step), policy=_OFFLOAD)
    # With mesh.fsdp a layer's parameters are gathered again for its backward pass, not kept.
    return jax.checkpoint(step, policy=all_but_gathered) if config.mesh.fsdp else step


# Of a layer its input alone is kept, in host memory: XLA copies it there and back beside the layers around it.
_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[BALANCE_BIAS],
    names_which_can_be_offloaded=[ENTERED],
    offload_src="device",
    offload_dst=HOST,
)


def _entered(step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The step with a name on what enters the layer."""
    return lambda carry, xs: step(checkpoint_name(carry, ENTERED), xs)


def _of_layers(values_Y: Array, layers: range) -> Array:
    return values_Y[layers.start : layers.stop : layers.step]


def init_model(config: Config, key: Array) -> Transformer:
    """A new model, sharded on the current mesh (`jax.set_mesh`); under `jax.eval_shape` it costs no memory."""
    return jax.jit(functools.partial(Transformer, config))(key)


def without_next_tokens(config: Config, model: Transformer) -> tuple[Config, Transformer]:
    """The model without next-token modules, as it decodes. Arrays are shared with `model`, which may be abstract."""
    if not config.model.mtp_modules:
        return config, model
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_modules=0, mtp_blocks=""))
    leaves, abstract = named_leaves(model), jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    return config, jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], abstract)


def check_length(name: str, length: int, config: Config) -> None:
    """Says in a line that a window which somebody asks for is longer than the model is declared to take; raises
    ConfigError where it has no positions for it. `name` is the setting."""
    longest = config.context_length
    if length > longest and config.model.positions == "learned":
        raise ConfigError(f"{name}={length} must be at most the {longest} learned positions; use {longest}")
    if length > longest and hosts.is_first():
        log_once(logging.WARNING, f"{name}={length} is more than the {longest} tokens that the model was made for")
