"""Compiles attention, forward and backward, for accelerators that are not there, and prints what it holds as JSON.

Run by itself, as programs.compiled: python -m programs.attention TOPOLOGY CASE…; a case is the implementation, B, L, N,
G, H, dtype and whether there are documents, between commas.
"""

import json
import sys

import jax

from benchmarks.attention import compiled
from bigmac_jax.planning.topologies import absent_devices, parse_topology


def main(topology: str, *cases: str) -> None:
    device = absent_devices(parse_topology(topology))[0]
    found = {}
    for case in cases:
        implementation, *sizes, dtype, segmented = case.split(",")
        found[case] = compiled(device, implementation, *map(int, sizes), dtype, segmented == "True")
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
