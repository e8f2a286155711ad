"""Cached decoding gives the logits of the full forward pass, at every position, for prompts of different lengths."""

from typing import Any

import jax
import numpy as np
import pytest
from model.tools import PAPER, PRESENT, QUICK, on_mesh, random_model, split_batch, split_tokens, tiny

from bigmac_jax.config import Config
from bigmac_jax.decoding.cache import decode, make_decoder, prefill

ROWS, LENGTH, PROMPT, ROOM = 8, 20, 12, 24
STRUCTURES = ("dense", "vanilla", "fine_grained", "bigmac")
MESHES = {"1x1": (1, 1, 1), "2x2": (2, 1, 2), "1x8": (1, 1, 8), "tensor": (1, 1, 2, 2, True, True), "node": (1, 2, 2),
          "heads": (1, 1, 2, 4)}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "present": {**PRESENT, "num_kv_heads": 2, "num_shared_experts": 1},
    "paper": PAPER,
    "gated": {**PRESENT, "gated": True, "activation": "silu", "positions": "none", "tie_embeddings": False},
}
QUICK_CASES = [
    ("dense", "2x2", "present"),
    ("vanilla", "1x8", "paper"),
    ("fine_grained", "1x1", "gated"),
    ("fine_grained", "tensor", "paper"),
    ("bigmac", "1x8", "present"),
    ("bigmac", "2x2", "gated"),
    ("bigmac", "heads", "present"),  # two key-value heads on four ranks of tensor
]


def cases() -> list[Any]:
    product = [(s, m, b) for s in STRUCTURES for m in MESHES for b in MODELS]
    return [pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.full) for case in product]


def config_of(structure: str, mesh: str, backbone: str, **model: Any) -> Config:
    experts = 64 if structure == "vanilla" and mesh == "1x8" else 32 if structure == "vanilla" else 8
    values = {"num_experts": experts, "down_ratio": 0.5, "capacity_factor": 0.5, **MODELS[backbone], **model}
    if backbone == "gated" and structure != "dense":
        values |= {"num_layers": 3, "first_dense_layers": 1}
    return tiny(MESHES[mesh], batch=ROWS, length=LENGTH, structure=structure, **values)


def cached_and_full(config: Config, exchange: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the positions that decoding reaches, [rows and positions, V] each."""
    draw = np.random.default_rng(1)
    tokens_NL = draw.integers(config.model.vocab_size, size=(ROWS, LENGTH)).astype(np.int32)
    length_N = np.array([1, PROMPT, 3, 7, 2, 11, 5, PROMPT], np.int32)
    prompts_NP = tokens_NL[:, :PROMPT].copy()
    prompts_NP[np.arange(PROMPT) >= length_N[:, None]] = draw.integers(config.model.vocab_size)  # what pads is not read
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
        shards = int(np.prod([mesh.shape[axis] for axis in ("data", "node", "expert")]))
        model = random_model(config)
        full = jax.jit(lambda model, tokens: model(tokens, dropless=True)[0], compiler_options=QUICK)
        full_NLV = np.asarray(full(model, split_tokens(tokens_NL)))
        decoder = make_decoder(config, model, exchange)
        start = jax.jit(prefill, static_argnums=3, compiler_options=QUICK)
        step = jax.jit(decode, donate_argnums=1, compiler_options=QUICK)
        length_SB = split_batch(length_N.reshape(shards, -1))
        logits, cache = start(decoder, split_tokens(prompts_NP), length_SB, ROOM)
        cached, expected = [], []
        for at_N in length_N + np.arange(LENGTH)[:, None]:
            inside = at_N <= LENGTH
            cached.append(np.asarray(logits).reshape(ROWS, -1)[inside])
            expected.append(full_NLV[inside, at_N[inside] - 1])
            if not (at_N < LENGTH).any():
                break
            given_N = tokens_NL[np.arange(ROWS), np.minimum(at_N, LENGTH - 1)]
            logits, cache = step(decoder, cache, split_tokens(given_N.reshape(shards, -1)))
    return np.concatenate(cached), np.concatenate(expected)


@pytest.mark.parametrize(("structure", "mesh", "backbone"), cases())
def test_decoding_equals_the_full_forward_pass(structure: str, mesh: str, backbone: str) -> None:
    cached, expected = cached_and_full(config_of(structure, mesh, backbone), "auto")
    assert len(cached) == 8 * (LENGTH + 1) - 53
    assert np.abs(cached - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.full
@pytest.mark.parametrize("exchange", ["all_to_all", "dedup", "hierarchical", "gather", "ragged"])
def test_every_exchange(exchange: str) -> None:
    cached, expected = cached_and_full(config_of("bigmac", "node", "present"), exchange)
    assert np.abs(cached - expected).max() <= 1e-5 * np.abs(expected).max()
