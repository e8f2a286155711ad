"""Counts that need no device: parameters, FLOPs, bytes of the exchange, memory.

Of the model that is trained, term by term; `paper` has the paper's own formulas. B batch, L length, D hidden, R row
width, F expert hidden, E experts, K top-k.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from bigmac_jax.model.choose_exchange import choose_exchange, make_exchange
from bigmac_jax.model.exchange import AllToAll, Ragged, Strategy
from bigmac_jax.model.exchange.costs import Sent, cost
from bigmac_jax.model.exchange.wire import row_bytes
from bigmac_jax.model.mamba import token_products
from bigmac_jax.model.mesh import AXES, REPLICA, ExpertGroup, axes_of
from bigmac_jax.model.parameters import Declaration, Frozen, declared, shard_spec, state_spec
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
    updated."""
    mesh, length, muon = config.mesh, config.data.sequence_length, config.optimizer.name == "muon"
    ranks = tuple(sizes.get(axis, 1) for axis in AXES)
    sharded = mesh.replica_optimizer == "sharded"
    held, used = (
        _parameters(model, mesh.fsdp, mesh.split_experts, sharded, length, muon, ranks)
        for model in (config.model, config.step_model)
    )
    return used._replace(total=held.total, parts=held.parts, of_a_rank=held.of_a_rank)


@functools.lru_cache(maxsize=4096)
def _parameters(
    m: ModelConfig, fsdp: bool, split_experts: bool, sharded: bool, length: int, muon: bool, of_axes: tuple[int, ...]
) -> Parameters:
    parts, of_rank, trained, moments, in_slices, updated = dict[str, int](), 0, 0, 0, 0, 0
    shards = scattered = 0
    ranks = dict(zip(AXES, of_axes, strict=True))
    for of, shape in _declarations(m, split_experts, length):
        layers, own = shape[: -len(of.dims)], shape[-len(of.dims) :]
        parts[of.part] = parts.get(of.part, 0) + math.prod(shape)
        spec = P(*[None] * len(layers), *of.spec(own, fsdp, ranks))
        specs = spec, state_spec(of, shape, spec, sharded, ranks), shard_spec(of, shape, spec, fsdp, ranks)
        here, state, shard = (math.prod(shape) // math.prod(ranks[axis] for axis in axes_of(spec)) for spec in specs)
        of_rank += here
        if not of.trained:
            continue
        trained, updated, shards = trained + here, updated + state, shards + shard
        scattered += shard if state < here else 0
        kept = state * _moments(of, muon)
        columns = shape[-1] // math.prod(ranks[axis] for axis in axes_of(specs[1][len(shape) - 1 :]))
        moments, in_slices = moments + kept, in_slices + kept * of.sliced_in_host_memory(columns)
    total = sum(parts.values())
    idle = parts["experts"] * (m.expert_count - m.choices) // m.expert_count if m.is_moe else 0
    computed = total
    if m.is_moe and m.router == "hyper":
        computed += m.count_trained("E") * (m.hidden_size + 1) * m.expert_count - parts["router"]
    of_a_rank = of_rank, trained, moments, in_slices, updated, shards, scattered
    return Parameters(total, computed, computed - idle, parts, *of_a_rank)


def _moments(of: Declaration, muon: bool) -> int:
    """Numbers that the optimizer keeps for one of a parameter."""
    return 1 if muon and of.hidden_matrix else 2


def _moment_bytes(config: Config) -> int:
    return 2 if config.optimizer.moment_dtype == "bfloat16" else 4


def replica_bytes(config: Config, sizes: Sizes) -> float:
    """Bytes that a rank sends to other replicas in a step: its shards of the gradients, in execution.reduce_dtype, and
    with mesh.replica_optimizer=sharded the float32 parameters that it has updated."""
    count, replicas = parameters(config, sizes), sizes.get(REPLICA, 1)
    reduced = 2 if config.execution.reduce_dtype == "bfloat16" else 4
    # A sum that all have is a scatter and a gather; where parameters are updated in shards, these are gathered instead.
    whole = count.shards_of_a_rank - count.scattered_of_a_rank
    return (1 - 1 / replicas) * (2 * reduced * whole + (reduced + 4) * count.scattered_of_a_rank)


def adapted_parts(config: Config) -> list[str]:
    """Those of tuning.lora_targets that the model has matrices of; next-token modules get no adapters."""
    model = dataclasses.replace(config.model, mtp_modules=0, mtp_blocks="")
    declarations = _declarations(model, config.mesh.split_experts, config.data.sequence_length)
    parts = {of.part for of, _ in declarations if of.decays and of.trained}
    return [part for part in config.tuning.lora_targets.split(",") if part in parts]


@functools.lru_cache(maxsize=64)
def _declarations(model: ModelConfig, split_experts: bool, length: int) -> list[tuple[Declaration, tuple[int, ...]]]:
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
    """Matmul FLOPs of a training step by part: 6 a token and active parameter, attention, and what makes a hyper
    router's matrix; no padding, no rematerialisation.

    Args:
      causal: count half of attention's scores and values, as Megatron and MaxText do; a mask of documents changes
        neither count.
    """
    m, length = config.step_model, config.data.sequence_length
    seen = length / 2 if causal else length
    h, q, matrices = m.hidden_size, m.num_heads * m.head_size, 3 if m.gated else 2
    moe = m.count_trained("E")
    per_token: dict[str, float] = {
        "attention": m.count_trained("*") * (2 * h * q + 2 * h * m.kv_heads * m.head_size + 2 * seen * q)
        + 2 * h * h * m.mtp_modules,
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
    if mamba := m.count_trained("M"):
        per_token["mamba"] = mamba * sum(token_products(m, config.mamba_chunk).values())
    tokens = config.data.batch_size * length
    found = {part: 6.0 * tokens * count for part, count in per_token.items() if count}
    if m.is_moe and m.router == "frozen":  # no gradient of its matrix
        found["router"] *= 4 / 6
    if m.is_moe and m.router == "hyper":
        # Not a token's: W and b are made in each pass over a layer, and their gradient goes to the vector alone.
        network = m.hyper_width * (h + (h + 1) * m.expert_count)
        found["router"] += 4.0 * moe * config.train.accumulate_steps * network
    return found


def projections(m: ModelConfig) -> dict[str, int]:
    """Entries of the matrices between a layer's tokens and its rows, of those that it has: W↓, W↑ and W_g."""
    h, of_latent = m.hidden_size, m.hidden_size * m.latent_size
    found = {"down": of_latent, "up": of_latent} if m.structure == "bigmac" else {}
    return found | ({"gate": h * h} if "gate" in m.latent_norms else {})


def forward_passes(config: Config) -> int:
    """Forward passes of a part of the batch without recomputation: two where all parts' loads are counted first."""
    return 2 if config.model.counts_loads_first and config.train.accumulate_steps > 1 else 1


def recomputes(config: Config) -> bool:
    """Whether a layer's forward pass runs again in its backward pass, with its exchange or without."""
    return config.execution.remat != "none"


def exchanges_again(config: Config) -> bool:
    """Whether the recomputed forward pass exchanges rows again."""
    return config.execution.remat in ("layer", "offload")


def tensor_bytes(config: Config, sizes: Sizes) -> float:
    """Bytes that a rank sends to its `tensor` ranks in a training step.

    A layer's attention gathers its input and scatters its output, and their gradients the other way round; so does a
    dense MLP, and with mesh.split_experts the experts, whose rows are `wire_size` wide. Of the tables of tokens each
    rank has some rows: it reads them for all ranks' tokens and scatters the sums, and for the loss gathers tokens.
    """
    m, t, again = config.step_model, sizes.get("tensor", 1), recomputes(config)
    if t == 1:
        return 0.0
    ranks = math.prod(sizes.values())
    passes = forward_passes(config)
    tokens = config.data.batch_size * config.data.sequence_length / ranks
    # What a recomputed layer ends in is not summed again.
    moved = m.count_trained("*M") * tokens * m.hidden_size * (2 * passes + 2 + 2 * again)
    moved += m.count_trained("-") * tokens * m.hidden_size * (2 * passes + 2 + again)
    if m.is_moe and config.mesh.split_experts:
        at_a_time = tokens_at_a_time(config, ranks)
        group = ExpertGroup((sizes["node"], sizes["expert"]), "gpu", "")
        exchange = choose_exchange(config, m.capacity_factor, at_a_time, group)
        rows = tokens / at_a_time * received_rows(exchange, at_a_time, m.choices)
        # Sums that an exchange brings back are needed again with the exchange alone.
        repeated = again + (exchanges_again(config) and _back_again(config, exchange))
        moved += m.count_trained("E") * rows * m.wire_size * (2 * passes + 2 + repeated)
    tables = tokens * m.hidden_size * (passes + 3) * (1 + m.mtp_modules)
    ids = 4 * tokens * (passes + 1) * (1 + m.mtp_modules)
    return (t - 1) * (config.execution.dtype_bytes * (moved + tables) + ids)


class Traffic(NamedTuple):
    """Bytes that all ranks together send to other ranks in the exchanges of a training step, and how often."""

    payload: Sent  # rows that hold a token, at uniform routing
    padded: Sent  # rows with the room around them
    metadata: Sent  # experts, counts, gates
    exchanges: int  # payload exchanges that one rank takes part in


def exchange_traffic(config: Config, ranks: int, group: ExpertGroup, name: str = "") -> Traffic:
    """Counts a training step's exchange bytes with the strategy `name`, by default the configured one."""
    m, tokens = config.step_model, tokens_at_a_time(config, ranks)
    if not m.is_moe:
        return Traffic(Sent(0, 0), Sent(0, 0), Sent(0, 0), 0)
    if name:
        exchange = make_exchange(name, config, m.capacity_factor, group)
    else:
        exchange = choose_exchange(config, m.capacity_factor, tokens, group)
    forward, backward = (row_bytes(format, m.wire_size) for format in (exchange.forward, exchange.backward))
    # The forward pass runs again where loads are counted first, and where it is rematerialised with its exchange.
    passes, again = forward_passes(config), exchanges_again(config)
    dispatches = passes + again
    combines = passes + (again and _back_again(config, exchange))

    def rows(dispatch: Sent, combine: Sent) -> Sent:
        there = dispatch.times(dispatches * forward + backward)
        return there.plus(combine.times(combines * forward + backward))

    spent = cost(exchange, tokens, m.choices)
    parts = config.train.accumulate_steps * config.execution.overlap_chunks
    here = m.count_trained("E") * parts  # layers of a rank in a step
    return Traffic(
        rows(spent.useful, spent.useful).times(here * ranks),
        rows(spent.dispatch, spent.combine).times(here * ranks),
        spent.metadata.times(dispatches).plus(spent.metadata_gradient).times(here * ranks),
        (dispatches + combines + 2) * here,
    )


def tokens_at_a_time(config: Config, ranks: int) -> int:
    """Tokens of a rank that one exchange carries in training."""
    parts = ranks * config.train.accumulate_steps * config.execution.overlap_chunks
    return config.data.batch_size * config.data.sequence_length // parts


def memory(config: Config, ranks: int, group: ExpertGroup, count: Parameters) -> dict[str, int]:
    """Bytes on one rank, by part. Activations and temporaries are an estimate; the compiled program has what is really
    allocated."""
    m, data = config.step_model, config.data
    tokens = data.batch_size * data.sequence_length // (ranks * config.train.accumulate_steps)
    size = config.execution.dtype_bytes
    kept = {stack: _kept_by_a_layer(config, ranks, group, stack.blocks) for stack in m.trained_stacks}
    if m.mtp_modules:  # what its norms and its projection are given
        kept[m.mtp_stack] += 5 * m.hidden_size
    # Rematerialised layers keep what enters them, and one at a time all that it computes. With remat=offload what
    # enters a layer and the next one is there, while one is copied and one is used.
    largest = max(kept.values())
    layers = largest if recomputes(config) else sum(len(stack.layers) * each for stack, each in kept.items())
    entered = min(2, m.depth) + m.mtp_modules if config.execution.remat == "offload" else m.depth + 2 * m.mtp_modules
    activations = tokens * size * (entered * m.hidden_size + layers)
    if config.execution.remat == "exchange":
        activations += m.count_trained("E") * exchanged_bytes(config, ranks, group)
    return {
        **state_memory(config, count, config.train.accumulate_steps, group.platform),
        "activations": round(activations),
        "temporaries": round(_temporaries(config, tokens, tokens * size * largest, group)),
    }


def state_memory(config: Config, count: Parameters, parts: int, platform: str) -> dict[str, int]:
    """Bytes on one rank of a platform that no activation changes, with a batch in so many parts."""
    return {
        "parameters": 4 * count.of_a_rank,
        # Of moments in host memory a layer's are here at a time, when activations are not.
        "optimizer": _moment_bytes(config) * (count.moments_of_a_rank - _moments_in_host(config, count, platform))
        + 4 * count.trained_of_a_rank * (config.optimizer.average_decay > 0),
        "gradients": 4 * count.trained_of_a_rank * (2 if parts > 1 else 1),
    }


def _moments_in_host(config: Config, count: Parameters, platform: str) -> int:
    """Moments of a rank that stand in host memory."""
    if not config.execution.offload_optimizer:
        return 0
    return count.moments_in_slices if platform == "tpu" else count.moments_of_a_rank


def host_memory(config: Config, ranks: int, count: Parameters, platform: str) -> dict[str, int]:
    """Bytes that one rank of a platform keeps in host memory, by part."""
    execution, m, parts = config.execution, config.model, config.train.accumulate_steps
    tokens = config.data.batch_size * config.data.sequence_length // (ranks * parts)
    entered = tokens * (m.depth + m.mtp_modules) * m.hidden_size * execution.dtype_bytes
    return {
        "optimizer": _moment_bytes(config) * _moments_in_host(config, count, platform),
        "activations": entered * (execution.remat == "offload"),
    }


def checkpoint_bytes(config: Config, experts: int = 0) -> int:
    """Bytes of the arrays of a checkpoint, by all ranks: parameters, optimizer state and average.

    Args:
      experts: it holds so many of each layer's (`training.partial_checkpoint`); 0 = all.
    """
    m, optimizer, of = config.model, config.optimizer, config.train.partial_checkpoint
    total = 0.0
    for declaration, shape in _declarations(m, config.mesh.split_experts, config.data.sequence_length):
        if not declaration.trained:  # itself alone
            total += 4 * math.prod(shape)
            continue
        share = experts / m.expert_count if experts and declaration.part == "experts" else 1
        weights = 4 * (2 if optimizer.average_decay else 1) * (1 if of == "optimizer" else share)
        kept = _moment_bytes(config) * _moments(declaration, optimizer.name == "muon")
        moments = kept * (1 if of == "weights" else share)
        total += math.prod(shape) * (weights + moments)
    return round(total)


def _temporaries(config: Config, tokens: int, layer: float, group: ExpertGroup) -> float:
    """Bytes beside activations at the worse of two moments: a layer's backward pass, whose gradients are as large as
    what it keeps, and the loss, with a chunk of logits and its softmax. Each holds its parameters as they are computed
    with, and where mesh.fsdp gathered them, their whole gradients."""
    m, mesh, execution = config.step_model, config.mesh, config.execution
    count = parameters(dataclasses.replace(config, model=m), {})
    summed = (2 if execution.reduce_dtype == "bfloat16" else 4) if mesh.fsdp else 0
    experts, table = count.parts.get("experts", 0), m.vocab_size * m.hidden_size
    shared = count.computed - experts - table * (1 if m.tie_embeddings else 2)
    split = math.prod(group.sizes) * (mesh.tensor if mesh.split_experts else 1)
    of_layer = experts / max(1, m.count_trained("E")) / split
    of_layer += shared / (m.depth + m.mtp_modules)
    # Compiled programs hold more than what is counted here (docs/planning.md): about four numbers a head for each pair
    # of a sequence's first 4,096 tokens, however long it is and however many there are.
    pairs = min(tokens, 4096) * min(config.data.sequence_length, 4096)
    rest = 4 * m.num_heads * pairs * execution.dtype_bytes
    backward = layer + of_layer * (execution.dtype_bytes + summed) + rest
    logits = 2 * 4 * min(tokens * m.vocab_size, 2**27)
    loss = logits + table / mesh.tensor * (execution.dtype_bytes + summed)
    # What rematerialised layers keep of one at a time, which `activations` has, is not there yet at the loss.
    return max(backward, loss - (layer if recomputes(config) else 0))


def _kept_by_a_layer(config: Config, ranks: int, group: ExpertGroup, blocks: str) -> float:
    """Numbers a token that a layer of these branches keeps for its backward pass."""
    m, gathered = config.model, (config.mesh.tensor - 1) * config.model.hidden_size
    matrices = 3 if m.gated else 2
    scores = 2 * m.num_heads * config.data.sequence_length if config.execution.attention == "xla" else 0  # of no kernel
    heads = 2 * (m.num_heads + m.kv_heads) * m.head_size + scores
    of_branch = {
        "*": 2.0 * m.hidden_size + heads + gathered,
        "-": m.hidden_size + matrices * m.mlp_width + gathered,
        # What the projections, the convolutions and the scan give; of each chunk the states before it, in float32.
        "M": 2.0 * m.hidden_size
        + gathered
        + 4 * m.mamba_width
        + 4 * m.mamba_groups * m.mamba_state
        + 2 * m.mamba_width * m.mamba_state / config.mamba_chunk,
    }
    if "E" in blocks:
        tokens = tokens_at_a_time(config, ranks)
        exchange = choose_exchange(config, m.capacity_factor, tokens, group)
        rows = received_rows(exchange, tokens, m.choices) / tokens
        gated = 2 * m.hidden_size if "gate" in m.latent_norms else 0  # what W↑ gives, and x W_g
        computed = matrices * computed_rows(exchange, tokens, m.choices) * m.expert_width
        at_full_width = m.hidden_size + gated + matrices * m.shared_width + 2 * m.expert_count
        of_branch["E"] = at_full_width + 4 * rows * m.wire_size + computed
    return sum(of_branch[branch] for branch in blocks)


def _back_again(config: Config, exchange: Strategy) -> bool:
    """Whether a backward pass needs what came back: not where nothing but sums follows on it."""
    m = config.model
    return m.structure == "bigmac" or bool(m.latent_norms) or not exchange.sums_at_experts


def exchanged_bytes(config: Config, ranks: int, group: ExpertGroup) -> float:
    """Bytes that a rank receives in the exchanges of one layer's forward pass, which execution.remat=exchange keeps."""
    m, tokens = config.model, tokens_at_a_time(config, ranks)
    if not m.is_moe or math.prod(group.sizes) == 1:
        return 0.0
    exchange = choose_exchange(config, m.capacity_factor, tokens, group)
    rows = received_rows(exchange, tokens, m.choices) * config.execution.overlap_chunks
    ways = 1 + _back_again(config, exchange)
    return ways * rows * m.wire_size * config.execution.dtype_bytes


def received_rows(exchange: Strategy, tokens: int, choices: int) -> float:
    """Rows that a rank receives in one exchange, empty ones and its own included."""
    if isinstance(exchange, Ragged) and exchange.ranks > 1:  # it sends no empty row, but has room for them
        return exchange.room(tokens, choices)
    sent = sum(cost(exchange, tokens, choices).dispatch)
    return sent * exchange.ranks / (exchange.ranks - 1) if sent else tokens * choices


def computed_rows(exchange: Strategy, tokens: int, choices: int) -> float:
    """Rows a token that experts multiply: with a capacity they stand by expert, full or not."""
    if isinstance(exchange, AllToAll) and not exchange.dropless:
        return exchange.rows(tokens, choices) * exchange.ranks / tokens
    return choices
