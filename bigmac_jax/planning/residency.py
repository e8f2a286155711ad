"""What experts in host memory cost: bytes there, and the milliseconds of a token from the link to the host beside what
the device does meanwhile."""

import dataclasses
import math
from typing import Any

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.counts import Sizes, parameters
from bigmac_jax.model.resident import check_one_rank, holds_experts
from bigmac_jax.planning.hardware import Hardware

REQUESTS = (1, 8, 64)  # at a time, of all ranks
# A layer's experts on the device: written by the copy, read and written on the way out of their slot, and read and
# written into it.
_PASSES = 5
# Of the most used experts: a round reads the slots of a layer, and writes them for its products; an expert that comes
# is written by the copy, and read and written into its slot.
_PASSES_OF_ROUND, _PASSES_OF_COPY = 2, 3


def describe(config: Config, sizes: Sizes, hardware: Hardware | None) -> dict[str, Any]:
    """Bytes of a rank in host memory and in the ring; with hardware, times of a step that decodes.

    A step copies every layer's experts once, whatever the number of requests is; the device multiplies and reads its
    memory meanwhile. Rates are those of data sheets, so that both are lower bounds.

    Raises:
      ConfigError: the hardware's file lacks what the times need; execution.resident_experts of several ranks.
    """
    if holds_experts(config):
        return _describe_experts(config, sizes, hardware)
    layers, held = config.model.moe_layers, config.execution.resident_layers
    of_layer = expert_numbers(config, sizes) // layers * config.execution.dtype_bytes
    if config.mesh.fsdp:  # which splits them over all ranks of a replica
        of_layer //= sizes.get("data", 1) * (1 if config.mesh.split_experts else sizes.get("tensor", 1))
    found: dict[str, Any] = {
        "layers": layers,
        "resident_layers": held,
        "host_bytes": layers * of_layer,
        "ring_bytes": max(2, held) * of_layer,  # of one layer, too, there are two slots
        "copied_bytes_per_step": layers * of_layer,
    }
    if hardware is None:
        return found
    copy = layers * of_layer / _host_bandwidth(hardware, f"resident_layers={held}")
    found["decode"] = []
    for requests in REQUESTS:
        compute = decode_seconds(config, sizes, hardware, requests, passes=_PASSES)
        step = max(copy, compute)
        found["decode"].append(
            {
                "requests": requests,
                "copy_ms": 1e3 * copy,
                "compute_ms": 1e3 * compute,
                "step_ms": 1e3 * step,
                "ms_per_token": 1e3 * step / requests,
                "on_device_ms": 1e3 * decode_seconds(config, sizes, hardware, requests),  # if it had the memory
            }
        )
    return found


def _describe_experts(config: Config, sizes: Sizes, hardware: Hardware | None) -> dict[str, Any]:
    """As `describe`, where the most used experts of every layer stand on the device.

    Each request is taken to choose top-k of E experts at random, and each expert to be as likely in a slot as any
    other, so that of those that are chosen N / E stand there: real routing is less even, and copies less. The copies
    wait for the router, and the layer for the copies, so that the times add up.
    """
    m, held = config.model, config.execution.resident_experts
    check_one_rank(config, sizes)
    layers, E = m.moe_layers, m.expert_count
    of_expert = expert_numbers(config, sizes) // (layers * E) * config.execution.dtype_bytes
    found: dict[str, Any] = {
        "layers": layers,
        "resident_experts": held,
        "host_bytes": layers * E * of_expert,
        "slot_bytes": layers * held * of_expert,
    }
    if hardware is None:
        return found
    bandwidth = _host_bandwidth(hardware, f"resident_experts={held}")
    found["decode"] = []
    for requests in REQUESTS:
        chosen = E * (1 - (1 - m.choices / E) ** requests)
        missing = chosen * (1 - held / E)
        passes = (_PASSES_OF_ROUND * max(1, chosen / held) * held + _PASSES_OF_COPY * missing) / E
        copy = layers * missing * of_expert / bandwidth
        compute = decode_seconds(config, sizes, hardware, requests, passes)
        found["decode"].append(
            {
                "requests": requests,
                "chosen_experts": chosen,  # of a layer
                "missing_experts": missing,
                "copy_ms": 1e3 * copy,
                "compute_ms": 1e3 * compute,
                "step_ms": 1e3 * (copy + compute),
                "ms_per_token": 1e3 * (copy + compute) / requests,
                "on_device_ms": 1e3 * decode_seconds(config, sizes, hardware, requests),
            }
        )
    return found


def _host_bandwidth(hardware: Hardware, asked: str) -> float:
    if hardware.host_bandwidth is None:
        raise ConfigError(
            f"{asked} needs the rate at which {hardware.device_kind} reads its host's memory, which its file lacks; "
            f"add host_bandwidth"
        )
    return hardware.host_bandwidth


def expert_numbers(config: Config, sizes: Sizes) -> int:
    """Parameters of a rank's routed experts in all layers, without those of next-token modules."""
    m = config.model
    ranks = math.prod(sizes.get(axis, 1) for axis in ("node", "expert"))
    ranks *= sizes.get("tensor", 1) if config.mesh.split_experts else 1
    return parameters(config, sizes).parts["experts"] * m.moe_layers // m.count_trained("E") // ranks


def decode_seconds(config: Config, sizes: Sizes, hardware: Hardware, requests: int, passes: float = 0) -> float:
    """Seconds that a device computes in a step that decodes so many requests, each with data.sequence_length tokens in
    the cache: its products, or what it reads of its memory, whichever takes longer. What ranks send is left out.

    Args:
      passes: how often all experts are read or written beside the products.
    """
    # A decoder has no next-token modules, and of a hyper router what its network makes.
    m = dataclasses.replace(config.model, mtp_modules=0, mtp_blocks="")
    itemsize = config.execution.dtype_bytes
    count, experts = parameters(dataclasses.replace(config, model=m), sizes), expert_numbers(config, sizes)
    batch = math.prod(sizes.get(axis, 1) for axis in ("replica", "data", "node", "expert"))
    groups = math.prod(sizes.get(axis, 1) for axis in ("replica", "data"))
    own, tensor = requests / batch, sizes.get("tensor", 1)
    looked_up = 0 if m.tie_embeddings else m.vocab_size * m.hidden_size  # of which a few rows are read
    dense = (count.computed - count.parts["experts"] - looked_up) / tensor
    used = 1 - (1 - m.choices / m.expert_count) ** (requests / groups)  # share of the experts, at uniform routing
    heads = max(m.kv_heads / tensor, 1)
    cache = own * config.data.sequence_length * 2 * heads * m.head_size * m.count_branches("*")
    numbers = dense + experts * (used + passes) + cache
    flops = 2 * (own * dense + requests / groups * m.choices / m.expert_count * experts)
    return max(numbers * itemsize / hardware.memory_bandwidth, flops / hardware.peak(config.execution.dtype, False))
