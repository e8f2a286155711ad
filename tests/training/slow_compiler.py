"""One of four processes, of which all but the first compile SECONDS longer: slow_compiler.py SECONDS --coordinator=…"""

import sys
import time
from typing import Any

_, seconds, *given = sys.argv
options = dict(argument.removeprefix("--").split("=", 1) for argument in given)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bigmac_jax.runtime import hosts  # noqa: E402

jax.config.update("jax_num_cpu_devices", 1)
hosts.connect(options["coordinator"], int(options["num_processes"]), int(options["process_id"]), False, 120)
hosts.gather("")
mesh = jax.make_mesh((2, 2), ("group", "rank"), (AxisType.Auto,) * 2)
compile_ = jax.stages.Lowered.compile


def compiles_slowly(lowered: Any) -> Any:
    if not hosts.is_first():
        time.sleep(float(seconds))
    return compile_(lowered)


jax.stages.Lowered.compile = compiles_slowly


@hosts.Jit
def total(x_N: Any) -> Any:
    """Within groups, which have not been connected yet."""
    split = P(("group", "rank"))
    return jax.shard_map(lambda x_N: jax.lax.psum(x_N, "group"), mesh=mesh, in_specs=split, out_specs=P("rank"))(x_N)


sharding = NamedSharding(mesh, P(("group", "rank")))
sums = total(jax.make_array_from_callback((4,), sharding, np.arange(4.0).__getitem__))
print(float(sums.addressable_shards[0].data[0]))
