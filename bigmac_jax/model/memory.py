"""Bytes that a training run holds, on a rank, in host memory and in a checkpoint, counted without a device."""

import dataclasses
import math

from bigmac_jax.config import Config
from bigmac_jax.model.choose_exchange import choose_exchange
from bigmac_jax.model.counts import Parameters, Sizes, declarations, moments_of, parameters, recomputes
from bigmac_jax.model.kernels.flash_attention import attention_implementation
from bigmac_jax.model.mesh import INSIDE, ExpertGroup, describe_mesh, shard_shape
from bigmac_jax.model.parameters import stacked_spec
from bigmac_jax.model.traffic import computed_rows, exchanged_bytes, received_rows, tokens_at_a_time

MOST_OVER_EVEN = 1.1  # of a rank's parameters, over its even share, that nobody is told of


def rank_memory(config: Config, ranks: int, group: ExpertGroup, count: Parameters) -> dict[str, int]:
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
        "parameters": 4 * (count.of_a_rank + (count.trained_of_a_rank if config.tuning.lora_rank else 0)),
        # Of moments in host memory a layer's are here at a time, when activations are not.
        "optimizer": moment_bytes(config) * (count.moments_of_a_rank - _moments_in_host(config, count, platform))
        + 4 * count.trained_of_a_rank * (config.optimizer.average_decay > 0),
        "gradients": 4 * count.trained_of_a_rank * (2 if parts > 1 else 1),
    }


def host_memory(config: Config, ranks: int, count: Parameters, platform: str) -> dict[str, int]:
    """Bytes that one rank of a platform keeps in host memory, by part."""
    execution, m, parts = config.execution, config.step_model, config.train.accumulate_steps
    tokens = config.data.batch_size * config.data.sequence_length // (ranks * parts)
    entered = tokens * (m.depth + m.mtp_modules) * m.hidden_size * execution.dtype_bytes
    return {
        "optimizer": moment_bytes(config) * _moments_in_host(config, count, platform),
        "activations": entered * (execution.remat == "offload"),
    }


def describe_copies(config: Config, sizes: Sizes) -> str:
    """Says how much more parameters mesh.fsdp leaves on a rank than its even share, with the zeros behind them and the
    copies of what is too small for all ranks, and which mesh.data would not; "" where it is less than a tenth."""
    if not config.mesh.fsdp or (held := _over_even(config, sizes)) <= MOST_OVER_EVEN:
        return ""
    powers = (2 ** (sizes["data"].bit_length() + i) for i in (-1, 0))  # of two, around it
    near = [str(n) for n in powers if _over_even(config, sizes | {"data": n}) <= MOST_OVER_EVEN]
    fix = f"; mesh.data={' or '.join(near)} would not" if near else ""
    return (
        f"a rank holds {held:.1f} times its even share of parameters and optimizer state, because "
        f"{describe_mesh(sizes)} splits few of their dimensions evenly{fix}"
    )


def _over_even(config: Config, sizes: Sizes) -> float:
    """Parameters that mesh.fsdp leaves on a rank over its even share of those that it splits."""
    held = share = 0.0
    for of, shape in declarations(config.model, config.mesh.split_experts, config.data.sequence_length):
        here = math.prod(shard_shape(shape, stacked_spec(of, shape, True, sizes), sizes))
        held += here
        share += here if of.small else math.prod(shape) / math.prod(sizes[axis] for axis in INSIDE)
    return held / share


def checkpoint_bytes(config: Config, experts: int = 0) -> int:
    """Bytes of the arrays of a checkpoint, by all ranks: parameters, optimizer state and average.

    Args:
      experts: it holds so many of each layer's (`training.partial_checkpoint`); 0 = all.
    """
    m, optimizer, of = config.model, config.optimizer, config.train.partial_checkpoint
    total = 0.0
    for declaration, shape in declarations(m, config.mesh.split_experts, config.data.sequence_length):
        if not declaration.trained:  # itself alone
            total += 4 * math.prod(shape)
            continue
        share = experts / m.expert_count if experts and declaration.part == "experts" else 1
        weights = 4 * (2 if optimizer.average_decay else 1) * (1 if of == "optimizer" else share)
        kept = moment_bytes(config) * moments_of(declaration, optimizer.name == "muon")
        moments = kept * (1 if of == "weights" else share)
        total += math.prod(shape) * (weights + moments)
    return round(total)


def _moments_in_host(config: Config, count: Parameters, platform: str) -> int:
    """Moments of a rank that stand in host memory."""
    if not config.execution.offload_optimizer:
        return 0
    return count.moments_in_slices if platform == "tpu" else count.moments_of_a_rank


def moment_bytes(config: Config) -> int:
    return 2 if config.optimizer.moment_dtype == "bfloat16" else 4


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
    by_a_kernel = attention_implementation(config, group.platform) != "xla"
    scores = 0 if by_a_kernel else 2 * m.num_heads * config.data.sequence_length
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
        slots = computed_rows(exchange, tokens, m.choices)  # of experts; alone, a rank's rows stand there at once
        rows = received_rows(exchange, tokens, m.choices) / tokens if exchange.ranks > 1 else slots
        gated = 2 * m.hidden_size if "gate" in m.latent_norms else 0  # what W↑ gives, and x W_g
        computed = matrices * slots * m.expert_width
        at_full_width = m.hidden_size + gated + matrices * m.shared_width + 2 * m.expert_count
        of_branch["E"] = at_full_width + 4 * rows * m.wire_size + computed
    return sum(of_branch[branch] for branch in blocks)
