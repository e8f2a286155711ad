"""One of two processes, of which the second compiles SECONDS longer: slow_compiler.py SECONDS --coordinator=…"""

import sys
import time
from typing import Any

_, seconds, *given = sys.argv
options = dict(argument.removeprefix("--").split("=", 1) for argument in given)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bigmac_jax import hosts  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
hosts.start(options["coordinator"], int(options["num_processes"]), int(options["process_id"]), False, 120)
hosts.gather("")
mesh = jax.make_mesh((2, 2), ("process", "device"), (AxisType.Auto,) * 2)


compile_ = jax.stages.Lowered.compile


def compiles_slowly(lowered: Any, *arguments: Any) -> Any:
    if not hosts.is_first():
        time.sleep(float(seconds))
    return compile_(lowered, *arguments)


jax.stages.Lowered.compile = compiles_slowly


@hosts.Jit
def total(x_PD: Any) -> Any:
    return jax.shard_map(lambda x_PD: jax.lax.psum(x_PD, "process"), mesh=mesh, in_specs=P("process", "device"),
                         out_specs=P(None, "device"))(x_PD)  # fmt: skip


sharding = NamedSharding(mesh, P("process", "device"))
rows = np.arange(4.0).reshape(2, 2)
sums = total(jax.make_array_from_callback((2, 2), sharding, rows.__getitem__))
print([float(shard.data[0, 0]) for shard in sums.addressable_shards])
