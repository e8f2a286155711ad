"""`execution` and `mesh`: how the model is executed."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from bigmac_jax.config.compiler_options import parse_options
from bigmac_jax.config.errors import require
from bigmac_jax.config.section import Count, Range, Section, Size

WireFormat = Literal["", "float32", "bfloat16", "float8_e4m3", "int8"]
Remat = Literal["none", "layer", "exchange", "offload"]
_SELDOM = ("replica", "tensor")  # axes that an error leaves out where they split nothing
EXCHANGES_IN_ROUNDS = ("auto", "all_to_all", "dedup", "hierarchical", "ragged")  # that take a finite buffer_factor
EXCHANGES_BY_EXPERT = ("auto", "all_to_all")  # that count room by expert, as model.overflow=next needs
# Measured (docs/exchange.md): with four experts or more on a rank it takes two or three rounds in the first hundreds
# of steps, and one from then on.
AUTO_BUFFER_FACTOR = 1.5


@dataclass(frozen=True)
class ExecutionConfig(Section):
    """How the model is executed. In exact arithmetic none of it changes the loss, but for the choices that a finite
    capacity drops; it may change between starts of a run.

    Parameters, their gradients' sums, the router, norms and the optimizer are float32 whatever `dtype` is.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    # In which ranks gather parameters that are split over them, if it is narrower than dtype.
    gather_dtype: Literal["", "float32", "bfloat16"] = ""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # in which the ranks' gradients are summed
    exchange: Literal["auto", "all_to_all", "dedup", "hierarchical", "gather", "ragged"] = "all_to_all"
    wire_dtype: WireFormat = ""  # of rows between ranks; "" = dtype
    wire_dtype_backward: WireFormat = ""  # of their gradients; "" = wire_dtype
    # Rows that a dropless exchange has buffers for, over the rows expected; the rest goes in more rounds. auto: 1.5 for
    # an exchange that sends in rounds. inf: the worst case, in one round.
    buffer_factor: Annotated[float, Range(least=1, may_be_inf=True)] | Literal["auto"] = "auto"
    overlap_chunks: Count = 1  # parts of a rank's tokens, one computed while the next is on the wire
    # blocks is for CPU, xla for any device, splash for TPU, cudnn and triton for GPU; auto takes the fastest.
    attention: Literal["auto", "blocks", "xla", "cudnn", "splash", "triton"] = "auto"
    grouped_matmul: Literal["auto", "batched", "blocks", "kernel"] = "auto"  # docs/exchange.md
    mamba_chunk: Count = 256  # positions that a Mamba layer computes at once
    # What the backward pass recomputes: nothing, each layer (layer), all of it but the exchange (exchange), or each
    # layer from what entered it, which waits in host memory (offload).
    remat: Remat = "none"
    offload_optimizer: bool = False  # moments are kept in host memory, and updated layer by layer
    # Of eval, generate and serve: the experts of all layers stand in host memory, so many layers of them on the device;
    # 0 = all on the device.
    resident_layers: Size = 0
    # Likewise, but so many experts of every layer on the device, those that are used most; for one device.
    resident_experts: Size = 0
    unroll_layers: Size = 0  # layers in a step of the loop over them; 0 = all on CPU, 1 elsewhere
    # XLA's for the training step, as "xla_NAME=VALUE …", over those that `bigmac plan --options` shows.
    compiler_options: str = ""

    @property
    def room_factor(self) -> float:
        """`buffer_factor` as a number, for exchanges that send in rounds."""
        return AUTO_BUFFER_FACTOR if isinstance(self.buffer_factor, str) else self.buffer_factor

    @property
    def asks_for_rounds(self) -> bool:
        """True if only an exchange that sends in rounds can have this `buffer_factor`."""
        return isinstance(self.buffer_factor, float) and math.isfinite(self.buffer_factor)

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    def check(self) -> None:
        parse_options(self.compiler_options)
        require(not (self.resident_layers and self.resident_experts), f"resident_layers={self.resident_layers} and resident_experts={self.resident_experts} are two ways to keep experts in host memory; set one of them to 0")  # fmt: skip
        require(not self.asks_for_rounds or self.exchange in EXCHANGES_IN_ROUNDS, f"execution.buffer_factor={self.room_factor:g} needs an exchange that sends in rounds ({', '.join(EXCHANGES_IN_ROUNDS)}), not exchange={self.exchange}; use buffer_factor=auto")  # fmt: skip


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices by axis; all but `tensor` split the batch. `node` (slow links) × `expert` share one set of experts."""

    data: Size = 0  # 0 = all devices that the other axes leave
    node: Count = 1
    expert: Count = 1
    tensor: Count = 1  # splits attention's and dense layers' matrices, tables of tokens, the sequence everywhere else
    fsdp: bool = False  # parameters and optimizer state are sharded over every axis of a replica that has copies
    split_experts: bool = False  # experts' matrices, too, are split over `tensor`
    # Slices or racks, with slow links between: parameters are sharded inside each, gradients summed across once a step.
    replica: Count = 1
    replica_optimizer: Literal["copied", "sharded"] = "copied"  # its state: a copy in each replica, or split over them

    def check(self) -> None:
        require(self.fsdp or self.replica_optimizer == "copied" or self.replica == 1, "mesh.replica_optimizer=sharded splits over replicas what each has split over its ranks; use it with mesh.fsdp=True")  # fmt: skip

    @property
    def expert_ranks(self) -> int:
        return self.node * self.expert

    @property
    def model_ranks(self) -> int:
        """Devices that hold the experts once."""
        return self.expert_ranks * self.tensor

    @property
    def fixed_ranks(self) -> int:
        """The product of all axes but `data`."""
        return self.replica * self.model_ranks

    def describe(self, data: int = 0) -> str:
        """The product of the axes, for an error: `mesh.data × mesh.expert = 2 × 4`, or the names alone without `data`."""
        axes = {"replica": self.replica, "data": data, "node": self.node, "expert": self.expert, "tensor": self.tensor}
        named = {name: size for name, size in axes.items() if (size > 0 and name not in _SELDOM) or size > 1}
        names = " × ".join(f"mesh.{name}" for name in named)
        return f"{names} = {' × '.join(map(str, named.values()))}" if data else names
