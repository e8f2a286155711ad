"""What experts in host memory cost: bytes there, and the milliseconds of a token from the link to the host beside what
the device does meanwhile."""

import math
from typing import Any

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.counts import Sizes, parameters
from bigmac_jax.planning.hardware import Hardware

REQUESTS = (1, 8, 64)  # at a time, of all ranks
# A layer's experts on the device: written by the copy, read and written on the way out of their slot, and read and
# written into it.
_PASSES = 5


def describe(config: Config, sizes: Sizes, hardware: Hardware | None) -> dict[str, Any]:
    """Bytes of a rank in host memory and in the ring; with hardware, times of a step that decodes.

    A step copies every layer's experts once, whatever the number of requests is; the device multiplies and reads its
    memory meanwhile. Rates are those of data sheets, so that both are lower bounds.
    """
    layers, held = config.model.moe_layers, config.execution.resident_layers
    of_layer = expert_numbers(config, sizes) // layers * config.execution.dtype_bytes
    found: dict[str, Any] = {
        "layers": layers,
        "resident_layers": held,
        "host_bytes": layers * of_layer,
        "ring_bytes": max(2, held) * of_layer,  # of one layer, too, there are two slots
        "copied_bytes_per_step": layers * of_layer,
    }
    if hardware is None:
        return found
    if hardware.host_bandwidth is None:
        raise ConfigError(
            f"resident_layers={held} needs the rate at which {hardware.device_kind} reads its host's memory, which its "
            f"file lacks; add host_bandwidth"
        )
    copy = layers * of_layer / hardware.host_bandwidth
    found["decode"] = []
    for requests in REQUESTS:
        compute = decode_seconds(config, sizes, hardware, requests, resident=True)
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


def expert_numbers(config: Config, sizes: Sizes) -> int:
    """Parameters of a rank's routed experts in all layers, without those of next-token modules."""
    m = config.model
    ranks = math.prod(sizes.get(axis, 1) for axis in ("node", "expert"))
    ranks *= sizes.get("tensor", 1) if config.mesh.split_experts else 1
    return parameters(config, sizes).parts["experts"] * m.moe_layers // m.count_trained("E") // ranks


def decode_seconds(config: Config, sizes: Sizes, hardware: Hardware, requests: int, resident: bool = False) -> float:
    """Seconds that a device computes in a step that decodes so many requests, each with data.sequence_length tokens in
    the cache: its products, or what it reads of its memory, whichever takes longer. What ranks send is left out."""
    m, itemsize = config.model, config.execution.dtype_bytes
    count, experts = parameters(config, sizes), expert_numbers(config, sizes)
    batch = math.prod(sizes.get(axis, 1) for axis in ("replica", "data", "node", "expert"))
    groups = math.prod(sizes.get(axis, 1) for axis in ("replica", "data"))
    own, tensor = requests / batch, sizes.get("tensor", 1)
    all_experts = count.parts["experts"]
    looked_up = 0 if m.tie_embeddings else m.vocab_size * m.hidden_size  # of which a few rows are read
    dense = (count.total - all_experts - looked_up) / tensor
    used = 1 - (1 - m.choices / m.expert_count) ** (requests / groups)  # share of the experts, at uniform routing
    heads = max(m.kv_heads / tensor, 1)
    cache = own * config.data.sequence_length * 2 * heads * m.head_size * m.count_branches("*")
    numbers = dense + experts * (used + (_PASSES if resident else 0)) + cache
    flops = 2 * (own * dense + requests / groups * m.choices / m.expert_count * experts)
    return max(numbers * itemsize / hardware.memory_bandwidth, flops / hardware.peak(config.execution.dtype, False))
