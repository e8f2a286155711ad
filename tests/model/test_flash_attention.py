"""Attention by every implementation that runs here, Pallas' kernels interpreted, against loops in float64."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.kernels import flash_attention
from bigmac_jax.model.kernels.flash_attention import block_length, causal_attention, choose_implementation, refusal
from bigmac_jax.model.mesh import batch_spec, split_spec

from .test_grouped_matmul_gpu import h100
from .tools import assert_close, on_mesh, pairwise, some, split_batch, tiny

FUNCTIONS = {
    "splash": functools.partial(flash_attention.splash, interpret=True),
    "triton": functools.partial(flash_attention.triton, interpret=True),
    "blocks": flash_attention.blocks,
    "xla": flash_attention.xla,
}
# Documents of a row, from its first position; what is left is padding. They end inside blocks, at their ends, and one
# token behind; numbers are out of order, and 7 comes again: same number, same document.
DOCUMENTS: dict[str, list[tuple[int, int]]] = {
    "several": [(7, 100), (3, 1), (7, 1), (0, 27), (2, 64)],
    "tokens": [(n, 1) for n in range(90)],
    "whole": [(5, 10**6)],
}


def segments_of(kind: str, B: int, L: int) -> np.ndarray | None:
    """The first row's documents are those of `kind`, the others' stand the other way round."""
    if kind == "none":
        return None
    row = [number for number, length in DOCUMENTS[kind] for _ in range(min(length, L))][:L]
    row += [-1] * (L - len(row))
    return np.asarray([row] + [row[::-1]] * (B - 1), np.int32)


def expected(q: Any, k: Any, v: Any, dy: Any, segments: np.ndarray | None) -> dict[str, np.ndarray]:
    """y and the gradients, query by query."""
    q, k, v, dy = (np.asarray(a, np.float64) for a in (q, k, v, dy))
    y, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
    B, L, N, H = q.shape
    for b in range(B):
        for i in range(L):
            seen = [j for j in range(i + 1) if segments is None or segments[b, j] == segments[b, i]]
            for n in range(N):
                g = n * k.shape[2] // N
                scores = k[b, seen, g] @ q[b, i, n] / math.sqrt(H)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                y[b, i, n] = weights @ v[b, seen, g]
                d_weights = v[b, seen, g] @ dy[b, i, n]
                d_scores = weights * (d_weights - weights @ d_weights) / math.sqrt(H)
                dq[b, i, n] = d_scores @ k[b, seen, g]
                dk[b, seen, g] += d_scores[:, None] * q[b, i, n]
                dv[b, seen, g] += weights[:, None] * dy[b, i, n]
    return {"y": y, "dq": dq, "dk": dk, "dv": dv}


def draw(B: int, L: int, N: int, G: int, H: int, dtype: Any = np.float32) -> list[np.ndarray]:
    """q, k, v, dy."""
    normal = np.random.default_rng(0).standard_normal
    return [normal((B, L, heads, H)).astype(dtype) for heads in (N, G, G, N)]


def results(attention: Any, q: Any, k: Any, v: Any, dy: Any, segments: Any) -> dict[str, Any]:
    y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments), q, k, v)
    return {"y": y} | dict(zip(("dq", "dk", "dv"), pull(dy), strict=True))


compiled = jax.jit(results, static_argnums=0)


def check(name: str, kind: str, B: int, L: int, N: int, G: int, H: int) -> None:
    arrays, segments = draw(B, L, N, G, H), segments_of(kind, B, L)
    assert_close(compiled(FUNCTIONS[name], *arrays, segments), expected(*arrays, segments))


# Query heads to a key-value head; lengths of one block that is not full, of one that is, of several.
CASES = sorted(pairwise(FUNCTIONS, ["none", *DOCUMENTS], [1, 2, 4], [100, 128, 300], [64, 128]))


@pytest.mark.parametrize(("name", "kind", "share", "L", "H"), some(CASES))
def test_values_and_gradients(name: str, kind: str, share: int, L: int, H: int) -> None:
    if kind == "tokens":
        L += 60  # behind those of one token, which alone have no gradients but dv
    check(name, kind, 1 if share == 4 else 2, L, 4, 4 // share, H)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["none", "several"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("L", "H"), [(300, 256), (300, 96), (1040, 64), (1, 64)])
def test_more_shapes(name: str, kind: str, L: int, H: int) -> None:
    """Heads that are wide or no power of two; long blocks, of which keys are taken in two parts."""
    if L == 1:
        arrays = draw(2, 1, 2, 1, H)
        actual = compiled(FUNCTIONS[name], *arrays, segments_of(kind, 2, 1))
        np.testing.assert_allclose(actual["y"], arrays[2].repeat(2, axis=2), rtol=1e-6)
        assert np.abs(actual["dq"]).max() < 1e-6
    else:
        check(name, kind, 1, L, 2, 1, H)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16(name: str) -> None:
    """Scores and sums are float32. Rounded are scaled queries, weights and gradients of scores before their products,
    and results, each by 2^-9 of its size: 2^-6 of the largest leaves room for these to add up."""
    arrays, segments = draw(2, 200, 4, 2, 64, jnp.bfloat16), segments_of("several", 2, 200)
    actual = compiled(FUNCTIONS[name], *arrays, segments)
    assert all(value.dtype == jnp.bfloat16 for value in actual.values())
    assert_close(actual, expected(*arrays, segments), 2**-6)


@pytest.mark.parametrize("name", ["splash", "triton"])
def test_kernels_on_each_of_several_ranks(name: str) -> None:
    """Inside the shard_map that checks what differs from rank to rank; no gradient is summed over ranks."""
    arrays, segments = draw(4, 64, 4, 2, 64), segments_of("several", 4, 64)

    def attention(q: Any, k: Any, v: Any, segments: Any) -> Any:
        specs = [*[split_spec(4)] * 3, batch_spec(2)]
        return on_each_rank(FUNCTIONS[name], (q, k, v, segments), in_spec=specs, out_specs=split_spec(4))

    with on_mesh(tiny((2, 1, 2))):
        *heads, dy = (jax.device_put(x, split_spec(4)) for x in arrays)
        actual = compiled(attention, *heads, dy, split_batch(segments))
        y = jax.jit(attention)(*heads, split_batch(segments))  # without a gradient
    np.testing.assert_allclose(y, actual["y"], atol=1e-6)
    assert_close(actual, expected(*arrays, segments))


def test_nothing_crosses_from_a_document_to_another() -> None:
    """What stands in the first changes no bit of the second."""
    q, k, v, _ = draw(1, 160, 2, 1, 64)
    segments = np.repeat(np.asarray([[3, 9]], np.int32), 80, axis=1)
    for name, function in FUNCTIONS.items():
        moved = [x.copy() for x in (q, k, v)]
        for x in moved:
            x[:, :80] = 100 * x[:, :80] + 1
        y, other = (jax.jit(function)(*given, segments) for given in ((q, k, v), moved))
        np.testing.assert_array_equal(y[:, 80:], other[:, 80:], err_msg=name)
        assert np.abs(y[:, :80] - other[:, :80]).max() > 1


def test_what_is_chosen() -> None:
    expected = {
        ("tpu", "bfloat16", 128, 4096, True): "splash",
        ("tpu", "float32", 64, 128, False): "splash",
        ("tpu", "bfloat16", 128, 127, True): "xla",  # a block would be mostly padding
        ("tpu", "bfloat16", 512, 4096, False): "xla",
        ("tpu", "bfloat16", 256, 4096, False): "splash",
        ("tpu", "bfloat16", 257, 4096, False): "xla",
        ("gpu", "bfloat16", 128, 4096, False): "cudnn",
        ("gpu", "bfloat16", 136, 4096, False): "triton",
        ("gpu", "float32", 16, 4096, True): "triton",
        ("gpu", "float32", 15, 4096, True): "xla",
        ("gpu", "float32", 257, 4096, True): "xla",
        ("gpu", "bfloat16", 128, 4096, True): "triton",
        ("gpu", "bfloat16", 100, 4096, False): "triton",
        ("gpu", "bfloat16", 256, 4096, False): "triton",
        ("gpu", "float32", 64, 4096, False): "triton",
        ("gpu", "float32", 8, 4096, False): "xla",
        ("gpu", "bfloat16", 512, 4096, True): "xla",
        ("cpu", "bfloat16", 128, 4096, True): "blocks",
        ("cpu", "float32", 8, 1, False): "blocks",
        ("METAL", "float32", 64, 4096, False): "xla",  # a platform of somebody else
    }
    assert {case: choose_implementation(*case) for case in expected} == expected
    assert not any(refusal(name, *case[:3], case[4]) for case, name in expected.items())


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (("splash", "cpu", "float32", 64, False), "a kernel of TPUs, not of CPUs; use execution.attention=auto"),
        (("splash", "tpu", "float32", 512, False), "heads of up to 256, not of 512; use execution.attention=xla"),
        (("cudnn", "tpu", "bfloat16", 64, False), "a kernel of GPUs, not of TPUs"),
        (("cudnn", "gpu", "float32", 64, False), "needs bfloat16, not float32; use execution.dtype=bfloat16"),
        (("cudnn", "gpu", "bfloat16", 132, False), "a multiple of 8 up to 128, not of 132"),
        (("cudnn", "gpu", "bfloat16", 64, True), "does not keep documents apart; use execution.attention=triton"),
        (("triton", "gpu", "bfloat16", 8, True), "heads of 16 to 256, not of 8; use execution.attention=xla"),
        (("blocks", "gpu", "float32", 8, True), ""),
        (("xla", "tpu", "float32", 512, True), ""),
    ],
)
def test_what_is_refused(case: tuple[str, str, str, int, bool], rule: str) -> None:
    said = refusal(*case)
    assert rule in said and bool(rule) == said.startswith(f"execution.attention={case[0]}") and "\n" not in said


def test_a_refused_case_raises() -> None:
    q, k, v, _ = draw(1, 4, 2, 1, 64)
    with pytest.raises(ConfigError, match=r"execution\.attention=splash is a kernel of TPUs"):
        causal_attention(q, k, v, None, "splash")


def test_blocks_pad_little() -> None:
    lengths = (1024, 512, 256, 128)
    expected = {4096: 1024, 131072: 1024, 1000: 1024, 1100: 128, 1536: 512, 300: 128, 500: 512, 100: 128}
    assert {length: block_length(length, lengths) for length in expected} == expected


def test_a_long_causal_mask_is_not_made() -> None:
    """Blocks that are seen whole, or not at all, are one element to the library; those on the diagonal are right."""
    mask = flash_attention._Causal((2**20, 2**20))
    block = [slice(n * 1024, (n + 1) * 1024) for n in range(3)]
    assert mask[block[1], block[1]].tolist() == np.tri(1024, dtype=bool).tolist()
    assert mask[block[2], block[1]].tolist() == [[True]] and mask[block[1], block[2]].tolist() == [[False]]
    # Two queries, and keys up to the first of them, to the second, from it on, and behind it.
    of_keys = [mask[slice(10, 12), slice(first, first + 2)].tolist() for first in (9, 10, 11, 12)]
    assert of_keys == [[[True]], [[True, False], [True, True]], [[False, False], [True, False]], [[False]]]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_triton_lowers_for_gpus(dtype: str) -> None:
    shapes = [jax.ShapeDtypeStruct((2, 100, heads, 64), dtype) for heads in (4, 2, 2, 4)]
    segments = jax.ShapeDtypeStruct((2, 100), jnp.int32)
    run = functools.partial(results, functools.partial(flash_attention._triton, interpret=False))
    with h100():
        program = jax.jit(run).trace(*shapes, segments).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r'\bname = "(mha_\w+)"', program)
    assert sorted(names) == ["mha_backward", "mha_forward", "mha_preprocess_backward"]
