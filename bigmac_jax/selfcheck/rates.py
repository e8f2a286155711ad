"""The machine's speeds that a plan rests on, each beside what the hardware file says.

S ranks, C rows to each of them, R row width.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmac_jax.config import Config, ConfigError, DataConfig, ExecutionConfig, MeshConfig, ModelConfig
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.model.exchange.wire import Wire
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import EXPERT_GROUP, batch_spec, make_mesh, place, rank_spec
from bigmac_jax.planning import cluster, cost
from bigmac_jax.planning.hardware import HARDWARE, Hardware, load_hardware
from bigmac_jax.training.metrics import dense_matmul_rate
from bigmac_jax.training.step import make_trainer


class Rate(NamedTuple):
    """A speed of one device.

    Attributes:
      unit: what is counted, a second.
      measure: runs on all devices, or on one.
      expected: what the hardware file says, if there is one.
    """

    name: str
    unit: str
    measure: Callable[[], float]
    expected: float | None


def find_hardware(device_kind: str) -> str:
    """Finds the name of a device's hardware file; "" if there is none."""
    return next((name for name in HARDWARE if load_hardware(name).device_kind == device_kind), "")


def all_rates(devices: Sequence[Any], hardware: Hardware | None) -> list[Rate]:
    """The rates that are measured of devices (products, memory, exchanges), each beside what their Hardware expects."""
    cpu, S = devices[0].platform == "cpu", len(devices)
    dtype, sent = ("float32", 2.0**22) if cpu else ("bfloat16", 2.0**26)
    config, sizes = training_config(S, cpu), {"data": 1, "node": 1, "expert": S, "tensor": 1}

    def expected(rate: Callable[[Hardware], float]) -> float | None:
        """The rate of one device; None for devices that are no whole machine of the file."""
        try:
            return rate(hardware) if hardware else None
        except ConfigError:
            return None

    all_to_all = Rate(
        "all-to-all",
        "B",
        functools.partial(exchange_rate, devices, sent),
        expected(lambda h: sent / cluster.cluster(sizes, h).exchange(Sent(sent, 0), exchanges=1)),
    )
    return [
        Rate(
            f"matmul {dtype}",
            "FLOP",
            functools.partial(dense_matmul_rate, dtype),
            expected(lambda h: h.flops_per_second(dtype)),
        ),
        Rate("memory", "B", functools.partial(memory_rate, cpu), expected(lambda h: h.memory_bandwidth)),
        *([all_to_all] if S > 1 else []),
        Rate(
            "training step",
            "token",
            lambda: training_rate(config, devices) / S,
            expected(lambda h: cost.step_time(config, sizes, h).tokens_per_s / S),
        ),
    ]


def memory_rate(cpu: bool) -> float:
    """Bytes a second that one device reads and writes in y ← a·x + y."""
    size = 2**24 if cpu else 2**27
    device = jax.local_devices()[0]
    with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):
        x, y = (jax.device_put(np.ones(size, np.float32), device) for _ in range(2))
        axpy = jax.jit(lambda x, y: jnp.float32(0.5) * x + y, donate_argnums=1)
        return 3 * x.nbytes / _seconds(lambda y: axpy(x, y), y, repeats=20)


def exchange_rate(devices: Sequence[Any], sent: float) -> float:
    """Bytes a second that each device sends to the others when all do, `sent` bytes each."""
    S, R = len(devices), 1024
    C = max(1, round(sent / (4 * R * (S - 1))))
    wire = Wire(EXPERT_GROUP, "float32", "float32")
    with jax.set_mesh(make_mesh(training_config(S, cpu=True), devices=devices)):
        rows = jax.jit(lambda: jnp.ones((S, S, C, R), jnp.float32, out_sharding=rank_spec(4)))()
        on_rank = functools.partial(on_each_rank, lambda x: wire.swap(x[0])[None], in_spec=rank_spec)
        swap = jax.jit(lambda rows: on_rank((rows,), out_specs=rank_spec(4)), donate_argnums=0)
        return (S - 1) * C * R * 4 / _seconds(swap, rows, repeats=10)


def training_rate(config: Config, devices: Sequence[Any]) -> float:
    """Tokens a second of a training step on all devices."""
    mesh = make_mesh(config, devices=devices)
    shape = config.data.batch_size, config.data.sequence_length + 1
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    with jax.set_mesh(mesh):
        trainer, batch = make_trainer(config, mesh), place(batch_from_windows(tokens), batch_spec(2))
        state, rate = trainer.init(jax.random.key(0)), trainer.rate(0)
        seconds = _seconds(lambda state: trainer.step(state, batch, rate)[0], state, repeats=3)
    return config.data.batch_size * config.data.sequence_length / seconds


def training_config(devices: int, cpu: bool) -> Config:
    """A bigmac model with the experts over all devices, small enough for any of them."""
    width, length, rows = (128, 128, 2) if cpu else (1024, 2048, 4)
    return Config(
        model=ModelConfig(
            num_layers=2 if cpu else 4,
            hidden_size=width,
            num_heads=max(2, width // 128),
            vocab_size=8192,
            num_experts=devices * max(1, -(-32 // devices)),
        ),
        execution=ExecutionConfig(dtype="float32" if cpu else "bfloat16"),
        mesh=MeshConfig(data=1, expert=devices),
        data=DataConfig(tokenizer="bytes", sequence_length=length, batch_size=rows * devices),
    )


def _seconds(function: Callable[[Any], Any], carry: Any, repeats: int) -> float:
    """Seconds of one call, in a chain of them; the first two, of which one compiles, don't count."""
    for _ in range(2):
        carry = function(carry)
    jax.block_until_ready(carry)
    start = time.perf_counter()
    for _ in range(repeats):
        carry = function(carry)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / repeats
