"""Bytes a rank sends to other machines in a forward pass on 4 × 8 simulated devices: python -m model.slow_link."""

import json
import math

import jax

jax.config.update("jax_num_cpu_devices", 32)

from .program import collectives, layer  # noqa: E402
from .test_traffic import config  # noqa: E402

MACHINES, RANKS = 4, 8


def main() -> None:
    result = {}
    flat = collectives(layer(config("all_to_all", sizes=(MACHINES, RANKS), capacity_factor=1.1)))
    assert {c.ranks for c in flat} == {MACHINES * RANKS}
    result["all_to_all"] = sum(c.bytes for c in flat) * (MACHINES - 1) // MACHINES
    hops = collectives(layer(config("hierarchical", sizes=(MACHINES, RANKS), capacity_factor=math.inf)))
    assert {c.ranks for c in hops} == {MACHINES, RANKS}
    across = [c for c in hops if c.ranks == MACHINES]
    result["hierarchical"] = sum(c.bytes for c in across) * (MACHINES - 1) // MACHINES
    rows = [c for c in across if c.operands[0][1][-1] == 128]
    result["hierarchical payload"] = sum(c.bytes for c in rows) * (MACHINES - 1) // MACHINES
    print(json.dumps(result))


if __name__ == "__main__":
    main()
