"""A training step of this project beside those of other trainers: python -m benchmarks.peers (see __main__).

Every case is a worker process with its own interpreter. It builds its model and warms up, says how many parameters it
trains, and then runs a round of steps for each line on its stdin. This module is what the workers share, and imports
nothing that one of their environments might lack.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What all cases have in common; float32, untied embeddings, no dropout, no capacity limit, no balance loss."""

    num_layers: int = 4
    hidden_size: int = 256  # h
    num_heads: int = 4
    vocab_size: int = 8192
    num_experts: int = 16
    top_k: int = 4
    latent_size: int = 64  # r·h: experts' width without a latent projection, their rows' width with one
    sequence_length: int = 256
    batch_size: int = 16

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


SHAPE = Shape()
LEARNING_RATE, B1, B2, WEIGHT_DECAY = 3e-4, 0.9, 0.95, 0.1


def serve(parameters: int, round_of_steps: Callable[[], float], **more: Any) -> None:
    """Answers each line of stdin with the seconds of a step, until stdin ends."""
    round_of_steps()  # warm: allocations and caches, after the compilation
    _reply({"parameters": parameters, **more})
    for _ in sys.stdin:
        _reply({"seconds": round_of_steps()})


def _reply(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)
