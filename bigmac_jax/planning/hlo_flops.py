"""Counts the matrix products of a compiled program: FLOPs of one rank in one execution.

B batch, N heads, L length, H head size.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from bigmac_jax.planning.hlo import Computation, Instruction, Module, integers

# cuDNN's attention: products of L × L × H that its result needs; what it computes again for the gradient is left out.
_CUDNN_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 4}
# Pallas' attention kernels (model/kernels/flash_attention.py): products that each computes, repeated ones included.
_PALLAS_ATTENTION = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,  # TPU: [B, N, L, H]
    "mha_forward": 2, "mha_backward": 7,  # Triton: [B, L, N, H]
}  # fmt: skip
_PALLAS_NAME = re.compile(r"\b(splash_mha_(?:fwd|dq|dkv)|mha_(?:forward|backward))(?:\b|_)")
_PALLAS_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


class Flops(NamedTuple):
    """FLOPs of matrix products; a multiply and an add are two."""

    dots: int
    kernels: int  # of Mosaic and Triton kernels, as these estimate them, and of attention's

    @property
    def total(self) -> int:
        return self.dots + self.kernels


def matmul_flops(module: Module) -> Flops:
    """FLOPs of all matrix products of one rank in one execution."""
    dots = kernels = 0
    for computation, use, instruction in module.run():
        dots += use.times * dot_flops(computation, instruction)
        kernels += use.times * kernel_flops(computation, instruction)
    return Flops(dots, kernels)


def kernel_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one run of a Mosaic or Triton kernel, by its own estimate, or of an attention kernel; else 0."""
    target = instruction.target
    if target in _CUDNN_ATTENTION:  # of whole sequences, [B, N, L, H], without credit for causality
        B, N, L, H = instruction.shapes[0].dims
        return _CUDNN_ATTENTION[target] * 2 * B * N * L * L * H
    if kernel := attention_kernel(instruction):
        # Its queries are the first operand that holds no integers; on TPU a batch of one is left out.
        dims = next(shape.dims for shape in computation.operands(instruction) if shape.dtype[0] not in "su")
        B, N, L, H = (1, *dims)[-4:] if kernel.startswith("splash") else (dims[0], dims[2], dims[1], dims[3])
        return _PALLAS_ATTENTION[kernel] * B * N * L * L * H  # causal: half of L × L, and a multiply and an add are two
    return _own_estimate(instruction, "flops")


def kernel_bytes(instruction: Instruction) -> int:
    """Bytes that a Mosaic or Triton kernel reads and writes, by its own estimate; 0 if it has none. It may use a part
    of its operands, as of a stack of layers, or read some more than once."""
    return _own_estimate(instruction, "bytes_accessed")


def _own_estimate(instruction: Instruction, name: str) -> int:
    if instruction.target == "__gpu$xla.gpu.triton":
        estimate = re.search(rf"\\22{name}\\22: \\22(\d+)", instruction.attributes["backend_config"])
        return int(estimate[1]) if estimate else 0
    if instruction.target != "tpu_custom_call":
        return 0
    return int(instruction.backend_config["custom_call_config"].get("cost_estimate", {}).get(name, 0))


def attention_kernel(instruction: Instruction) -> str:
    """The name of one of Pallas' attention kernels, which estimate neither FLOPs nor time; "" for anything else."""
    found = _PALLAS_NAME.search(instruction.op_name) if instruction.target in _PALLAS_TARGETS else None
    return found[1] if found else ""


def dot_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one run of a dot, a convolution or oneDNN's matmul; else 0."""
    if instruction.opcode == "dot":
        lhs = computation.operands(instruction)[0].dims
        summed = integers(instruction.attributes.get("lhs_contracting_dims", ""))
        return 2 * math.prod(instruction.shapes[0].dims) * math.prod(lhs[axis] for axis in summed)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.target == "__onednn$matmul":
        size, other = (math.prod(shape.dims) for shape in computation.operands(instruction)[:2])
        m, n = instruction.shapes[0].dims[-2:]
        return 2 * math.isqrt(size * other * m * n)  # B·M·K × B·K·N, whichever is transposed
    return 0


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """TPU writes dots as convolutions: batch dimensions as windows of which one place in each meets an element."""
    lhs, rhs = (shape.dims for shape in computation.operands(instruction)[:2])
    result, attributes = instruction.shapes[0].dims, instruction.attributes
    labels_lhs, labels_rhs, labels_result = re.split("_|->", attributes["dim_labels"])
    window = dict(re.findall(r"(\w+)=([\w-]+)", attributes.get("window", "")))
    fields = {name: value.split("x") for name, value in window.items()}
    flops = 2 * lhs[labels_lhs.index("b")] * rhs[labels_rhs.index("i")] * result[labels_result.index("f")]
    for axis, size in enumerate(fields.get("size", [])):
        stride, dilate, base = (
            int(fields[n][axis]) if n in fields else 1 for n in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(fields["pad"][axis].split("_")[0]) if "pad" in fields else 0
        length = base * (lhs[labels_lhs.index(str(axis))] - 1) + 1
        starts = stride * np.arange(result[labels_result.index(str(axis))]) - low
        places = (starts + dilate * k for k in range(int(size)))
        flops *= sum(int(((at >= 0) & (at < length) & (at % base == 0)).sum()) for at in places)
    return flops // int(attributes.get("batch_group_count", 1))
