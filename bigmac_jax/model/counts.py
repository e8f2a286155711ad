"""Parameters and FLOPs of the model that is trained, counted without a device; `paper` has the paper's own formulas.

B batch, L length, D hidden, R row width, F expert hidden, E experts, K top-k.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from bigmac_jax.model import adapters
from bigmac_jax.model.mamba import token_products
from bigmac_jax.model.mesh import AXES, axes_of, padded_shape
from bigmac_jax.model.parameters import Declaration, Frozen, declared, shard_spec, stacked_spec, state_spec
from bigmac_jax.model.transformer import init_model

Sizes = dict[str, int]  # ranks by axis of the mesh


class Parameters(NamedTuple):
    """`computed`: those that a pass computes with, of a router the matrix and bias, whatever makes them. `active`: of
    these, those that a token meets, all of its top-k experts included. Parts sum to `total`, frozen ones among them."""

    total: int
    computed: int
    active: int
    parts: dict[str, int]
    of_a_rank: int
    trained_of_a_rank: int  # those that get a gradient
    moments_of_a_rank: int  # numbers that the optimizer keeps
    moments_in_slices: int  # of them, those that a TPU keeps in host memory if asked to
    updated_of_a_rank: int  # parameters that the optimizer updates, with mesh.replica_optimizer=sharded a part
    shards_of_a_rank: int  # gradients that it sums with those of other replicas
    scattered_of_a_rank: int  # of them, those whose sum is scattered over replicas


def parameters(config: Config, sizes: Sizes) -> Parameters:
    """Counts parameters by part of the model, and those of a rank on a mesh with these ranks by axis. A model is traced
    once, whatever meshes it is counted for. Modules that a step leaves alone are held, and neither computed with nor
    updated; of a model with adapters (LoRA) these alone are trained."""
    mesh, length, muon = config.mesh, config.data.sequence_length, config.optimizer.name == "muon"
    ranks, by_layers = tuple(sizes.get(axis, 1) for axis in AXES), config.execution.offload_optimizer
    sharded, lora = mesh.replica_optimizer == "sharded", (config.tuning.lora_rank, config.tuning.lora_targets)
    held, used = (
        _parameters(model, mesh.fsdp, mesh.split_experts, sharded, by_layers, length, muon, lora, ranks)
        for model in (config.model, config.step_model)
    )
    return used._replace(total=held.total, parts=held.parts, of_a_rank=held.of_a_rank)


@functools.lru_cache(maxsize=4096)
def _parameters(
    m: ModelConfig,
    fsdp: bool,
    split_experts: bool,
    sharded: bool,
    by_layers: bool,
    length: int,
    muon: bool,
    lora: tuple[int, str],
    of_axes: tuple[int, ...],
) -> Parameters:
    parts, of_rank, pieces = dict[str, int](), 0, list[tuple[Declaration, tuple[int, ...], P]]()
    ranks = dict(zip(AXES, of_axes, strict=True))
    for of, shape in declarations(m, split_experts, length):
        spec = stacked_spec(of, shape, fsdp, ranks)
        parts[of.part] = parts.get(of.part, 0) + math.prod(shape)
        held = padded_shape(shape, spec, ranks)
        of_rank += _on_rank(held, spec, ranks)
        pieces += _trained(of, held, spec, *lora)
    trained = moments = in_slices = updated = shards = scattered = 0
    for of, shape, spec in pieces:
        state_of = state_spec(of, shape, spec, sharded, ranks, by_layers)
        specs = spec, state_of, shard_spec(of, shape, spec, fsdp, ranks)
        here, state, shard = (_on_rank(shape, spec, ranks) for spec in specs)
        trained, updated, shards = trained + here, updated + state, shards + shard
        scattered += shard if state < here else 0
        kept = state * moments_of(of, muon)
        columns = shape[-1] // math.prod(ranks[axis] for axis in axes_of(specs[1][len(shape) - 1 :]))
        moments, in_slices = moments + kept, in_slices + kept * of.sliced_in_host_memory(columns)
    total = sum(parts.values())
    idle = parts["experts"] * (m.expert_count - m.choices) // m.expert_count if m.is_moe else 0
    computed = total
    if m.is_moe and m.router == "hyper":
        computed += m.count_trained("E") * (m.hidden_size + 1) * m.expert_count - parts["router"]
    of_a_rank = of_rank, trained, moments, in_slices, updated, shards, scattered
    return Parameters(total, computed, computed - idle, parts, *of_a_rank)


def _on_rank(shape: tuple[int, ...], spec: P, ranks: Sizes) -> int:
    return math.prod(shape) // math.prod(ranks[axis] for axis in axes_of(spec))


def _trained(
    of: Declaration, shape: tuple[int, ...], spec: P, lora_rank: int, targets: str
) -> Iterator[tuple[Declaration, tuple[int, ...], P]]:
    """What is trained of a parameter: itself, or with adapters a [..., X, r] and b [..., r, Y] (`model.adapters`)."""
    if not lora_rank:
        if of.trained:
            yield of, shape, spec
    elif adapters.is_adapted(of, targets):
        (*leading, X, Y), (*before, rows, columns) = (
            shape,
            (spec[i] if i < len(spec) else None for i in range(len(shape))),
        )
        of_a, of_b = adapters.declare(of, 1.0, lora_rank)
        yield of_a, (*leading, X, lora_rank), P(*before, rows, None)
        yield of_b, (*leading, lora_rank, Y), P(*before, None, columns)


def moments_of(of: Declaration, muon: bool) -> int:
    """Numbers that the optimizer keeps for one of a parameter."""
    return 1 if muon and of.hidden_matrix else 2


def adapted_parts(config: Config) -> list[str]:
    """Those of tuning.lora_targets that the model has matrices of; next-token modules get no adapters."""
    model = dataclasses.replace(config.model, mtp_modules=0, mtp_blocks="")
    found = declarations(model, config.mesh.split_experts, config.data.sequence_length)
    parts = {of.part for of, _ in found if adapters.is_adapted(of, config.tuning.lora_targets)}
    return [part for part in config.tuning.lora_targets.split(",") if part in parts]


@functools.lru_cache(maxsize=64)
def declarations(model: ModelConfig, split_experts: bool, length: int) -> list[tuple[Declaration, tuple[int, ...]]]:
    """What each parameter is, and its shape; from the abstract model, which takes no memory."""
    data = DataConfig(tokenizer="", sequence_length=length)
    config = Config(model=model, mesh=MeshConfig(split_experts=split_experts), data=data)
    one = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    none = AbstractMesh((), ())  # jax lets no mesh be changed for one of another size
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(one):
        traced = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    kinds = nnx.Param, Frozen
    leaves = jax.tree.leaves(nnx.state(traced, kinds), is_leaf=lambda node: isinstance(node, kinds))
    return [(declared(leaf), jax.tree.leaves(leaf)[0].shape) for leaf in leaves]


def flops(config: Config, causal: bool = False) -> dict[str, float]:
    """Matmul FLOPs of a training step by part: 6 a token and active parameter, 4 if it is not trained, attention, and
    what makes a hyper router's matrix; no padding, no rematerialisation, nor the products of adapters.

    Args:
      causal: count half of attention's scores and values, as Megatron and MaxText do; a mask of documents changes
        neither count.
    """
    m, length = config.step_model, config.data.sequence_length
    seen = length / 2 if causal else length
    h, q, matrices = m.hidden_size, m.num_heads * m.head_size, 3 if m.gated else 2
    moe = m.count_trained("E")
    per_token: dict[str, float] = {
        "attention": m.count_trained("*") * (2 * h * q + 2 * h * m.kv_heads * m.head_size) + 2 * h * h * m.mtp_modules,
        "output": h * m.vocab_size * (1 + m.mtp_modules),
    }
    if m.is_moe:
        per_token |= {
            "router": moe * h * m.expert_count,
            "experts": moe * matrices * m.choices * m.wire_size * m.expert_width,
            "shared": moe * matrices * h * m.shared_width,
            "projections": moe * sum(projections(m).values()),
        }
    per_token["mlp"] = m.count_trained("-") * matrices * h * m.mlp_width
    of_mamba, mamba = token_products(m, config.mamba_chunk), m.count_trained("M")
    per_token["mamba"] = mamba * of_mamba.pop("projections")
    # Of activations with each other, whose products give both a gradient.
    between = {"attention": m.count_trained("*") * 2 * seen * q, "mamba": mamba * sum(of_mamba.values())}
    tokens, frozen = config.data.batch_size * length, frozen_parts(config)
    found = {
        part: 2.0 * tokens * (count * (3 - (part in frozen)) + 3 * between.get(part, 0))
        for part, count in per_token.items()
    }
    if m.is_moe and m.router == "hyper":
        # Not a token's: W and b are made in each pass over a layer, and their gradient goes to the vector alone.
        network = m.hyper_width * (h + (h + 1) * m.expert_count)
        found["router"] += 2.0 * (2 - ("router" in frozen)) * moe * config.train.accumulate_steps * network
    return {part: count for part, count in found.items() if count}


def frozen_parts(config: Config) -> frozenset[str]:
    """Parts of `flops` whose matrices a step does not train, so that its backward pass has no products for their
    gradients."""
    if config.tuning.lora_rank:
        parts = "attention", "mamba", "router", "experts", "shared", "projections", "mlp", "output"
        return frozenset(parts) - frozenset(config.tuning.lora_targets.split(","))
    return frozenset({"router"} if config.model.router == "frozen" or not config.tuning.train_router else ())


def projections(m: ModelConfig) -> dict[str, int]:
    """Entries of the matrices between a layer's tokens and its rows, of those that it has: W↓, W↑ and W_g."""
    h, of_latent = m.hidden_size, m.hidden_size * m.latent_size
    found = {"down": of_latent, "up": of_latent} if m.structure == "bigmac" else {}
    return found | ({"gate": h * h} if "gate" in m.latent_norms else {})


def counts_loads(config: Config) -> bool:
    """Whether a forward pass counts all parts' loads before the others."""
    return config.model.counts_loads_first and config.train.accumulate_steps > 1


def passes_to_logits(config: Config) -> int:
    """Forward passes of a part of the batch whose logits are read: with adapters DPO's reference is a second one, of
    the model without them."""
    return 2 if config.tuning.objective == "dpo" and config.tuning.lora_rank else 1


def forward_passes(config: Config) -> int:
    """Forward passes of a part of the batch without recomputation, that which counts loads included."""
    return passes_to_logits(config) + counts_loads(config)


def recomputes(config: Config) -> bool:
    """Whether a layer's forward pass runs again in its backward pass, with its exchange or without."""
    return config.execution.remat != "none"
