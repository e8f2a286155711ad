"""The terms of the cost model, each worked by hand, and the shapes that they read."""

import dataclasses

import pytest

from bigmac_jax.config.reading import load_config
from bigmac_jax.model import counts
from bigmac_jax.planning.hardware import Hardware, Link
from bigmac_jax.planning.job import (
    Job,
    Times,
    attention_seconds,
    exposed,
    host_seconds,
    memory_seconds,
    optimizer_seconds,
    predict,
    product_seconds,
    row_passes,
)
from bigmac_jax.planning.shapes import Attention, Dense, Experts, Mamba, Shape

# Products are bound by FLOPs wherever memory is not asked about.
PLAIN = Hardware(
    "tpu", "plain", peak_flops=1e12, peak_flops_float32=1e11, matmul_efficiency=0.5, attention_efficiency=0.25,
    memory_bytes=1e10, memory_bandwidth=1e15, machine_ranks=4, overlaps=True, fast=Link(100.0, 2.0),
    slow=Link(10.0, 3.0), peak_flops_8bit=2e12,
)  # fmt: skip
DENSE = Shape(32, 96, Attention(3, 4, 2, 8), mlp=Dense(3, 64))
MOE = Shape(32, 96, Attention(3, 4, 2, 8), Experts(2, 16, 4, 24, shared=40, latent=8), Dense(1, 64))


def wide(X: int, Y: float) -> float:
    """A product's sides, each longer by what a matrix unit takes to fill."""
    return (X + 256) * (Y + 256)


def job(shape: Shape = DENSE, **fields: object) -> Job:
    return dataclasses.replace(Job(shape, length=16, tokens=1024, ranks=1), **fields)


@pytest.mark.parametrize("name", ["tiny", "modern", "qwen3_30b", "large", "latent_moe:eff", "paper/gpt3_xl"])
def test_our_shapes_are_counted_alike(name: str) -> None:
    """`counts` counts from the parameters that a model declares, `Shape` from its sizes."""
    config = load_config(name)
    length, tokens = config.data.sequence_length, config.data.sequence_length * config.data.batch_size
    shape, of_model = Shape.of(config), counts.parameters(config, {})
    assert 3 * tokens * shape.flops(length, causal=False) == pytest.approx(sum(counts.flops(config).values()))
    for part in ("attention", "experts", "shared", "projections", "router"):
        assert shape.parameters(part) == pytest.approx(of_model.parts.get(part, 0), rel=0.01), part
    assert shape.parameters() == pytest.approx(of_model.total, rel=0.01)


def test_a_hybrid_has_the_mamba_layers_of_its_config() -> None:
    """Of all layers those with an M; a chunk is no longer than a text."""
    config = load_config("nemotron3_super", ["execution.mamba_chunk=64", "model.mamba_conv=3"])
    m = config.model
    sizes = m.mamba_head_count, m.mamba_head_dim, m.mamba_groups, m.mamba_state
    assert Shape.of(config).mamba == Mamba(m.count_trained("M"), *sizes, conv=3, chunk=64)


def test_published_numbers() -> None:
    """DeepSeek-V3 by its report: 671 B parameters, 37 B a token; Qwen3-30B: 23.1 GFLOPs a token of 4,096."""
    deepseek = Shape(
        7168, 129280, Attention(61, 128, 0, 192, 128, q_rank=1536, kv_rank=512, rope_size=64),
        Experts(58, 256, 8, 2048, shared=2048), Dense(3, 18432),
    )  # fmt: skip
    assert deepseek.parameters() == pytest.approx(671e9, rel=0.001)
    active = deepseek.parameters() - deepseek.parameters("experts") * (1 - 8 / 256)
    assert active == pytest.approx(37.5e9, rel=0.01)
    qwen = Shape(2048, 151936, Attention(48, 32, 4, 128), Experts(48, 128, 8, 768))
    assert 3 * qwen.flops(4096) == pytest.approx(23.08e9, rel=0.001)
    assert 3 * qwen.flops(4096, causal=False) == pytest.approx(27.91e9, rel=0.001)


def test_scores() -> None:
    """A token of 16 sees 8 others on average; behind a window of 4 it sees 4 but for the first four."""
    a = Attention(3, 4, 2, 8)
    assert Shape(32, 96, a).score_flops(16) == 3 * 4 * 2 * 2 * 8 * 8
    assert Shape(32, 96, a).score_flops(16, causal=False) == 3 * 4 * 2 * 2 * 8 * 16
    windowed = Shape(32, 96, dataclasses.replace(a, window=4, window_layers=2))
    assert windowed.score_flops(16) == 4 * 2 * 2 * 8 * (8 + 2 * (4 * (1 - 4 / 32)))
    assert windowed.score_flops(2) == Shape(32, 96, a).score_flops(2)
    # Latent attention: keys of 24, values of 16.
    latent = Shape(32, 96, Attention(1, 4, 0, 24, 16, kv_rank=10, rope_size=8))
    assert latent.score_flops(16) == 4 * 2 * (24 + 16) * 8
    assert latent.parameters("attention") == 32 * 4 * 24 + 32 * (10 + 8) + 10 * 4 * (16 + 16) + 4 * 16 * 32


def test_products_by_flops() -> None:
    """1,024 tokens; forward once, backward twice; the table of logits is never recomputed."""
    found = product_seconds(job(), PLAIN)
    assert found == pytest.approx({
        "attention": 6 * 1024 * 3 * (wide(32, 32 + 32) + wide(32, 32)) / 5e11,
        "mlp": 6 * 1024 * 3 * (wide(32, 2 * 64) + wide(64, 32)) / 5e11,
        "output": 6 * 1024 * wide(32, 96) / 5e11,
    })  # fmt: skip
    again = product_seconds(job(again={"mlp": 0.5}, forward_passes=2), PLAIN)
    assert again["mlp"] == pytest.approx(4.5 / 3 * found["mlp"]) and again["output"] == found["output"]
    float32 = product_seconds(job(dtype="float32"), PLAIN)
    assert float32["mlp"] == pytest.approx(10 * found["mlp"])
    eight_bit = product_seconds(job(eight_bit=True), PLAIN)
    assert eight_bit["mlp"] == pytest.approx(found["mlp"] / 2) and eight_bit["output"] == found["output"]


def test_products_are_shared() -> None:
    """Twice the tokens on two ranks, of which each has half of the layers or of the experts, take as long; halves of
    matrices are narrower, and take longer."""
    one = product_seconds(job(MOE), PLAIN)
    assert product_seconds(job(MOE, stages=2, parts=2, ranks=2, tokens=2048), PLAIN) == pytest.approx(one)
    # Twice the rows of half of the experts: 512 of 8, and half a tile.
    half = product_seconds(job(MOE, experts_over=2, ranks=2, tokens=2048), PLAIN)
    assert half["experts"] == pytest.approx(one["experts"] * 8 * (512 + 128) / 16 / (256 + 128))
    assert half["mlp"] == pytest.approx(one["mlp"])
    parts = product_seconds(job(MOE, parts=2), PLAIN)
    assert parts["experts"] == pytest.approx(one["experts"] * 2 * (128 + 128) / (256 + 128))
    assert parts["mlp"] == pytest.approx(one["mlp"])
    halves = product_seconds(job(MOE, tensor=2, ranks=2, tokens=2048), PLAIN)
    assert halves["experts"] == pytest.approx(one["experts"])  # each rank has whole ones
    assert halves["mlp"] == pytest.approx(6 * 2048 * (wide(32, 64) + wide(64, 16)) / 5e11)
    split = product_seconds(job(MOE, tensor=2, ranks=2, tokens=2048, split_experts=True), PLAIN)
    assert split["experts"] == pytest.approx(6 * 2 * 16 * (512 + 128) * (wide(8, 24) + wide(24, 4)) / 5e11)


def test_products_by_bytes() -> None:
    """A narrow product reads more than it computes: rows in and out, and its matrix, thrice."""
    slow = dataclasses.replace(PLAIN, memory_bandwidth=1e6)
    logits = 2 * (1024 * (32 + 96) + 32 * 96)
    assert product_seconds(job(), slow)["output"] == pytest.approx(3 * logits / 1e6)
    assert product_seconds(job(parts=2), slow)["output"] == pytest.approx(3 * (logits + 2 * 32 * 96) / 1e6)


@pytest.mark.parametrize(("platform", "passes"), [("gpu", 3), ("tpu", 4)])
def test_our_router_is_exact(platform: str, passes: int) -> None:
    """Its products take several passes of bfloat16, and are of float32."""
    machine = dataclasses.replace(PLAIN, platform=platform)
    plain, ours = (product_seconds(job(MOE, ours=ours), machine) for ours in (False, True))
    assert ours["router"] == pytest.approx(passes * plain["router"]) and ours["mlp"] == plain["mlp"]
    plain, ours = (product_seconds(job(MOE, ours=ours, dtype="float32"), machine) for ours in (False, True))
    assert ours["router"] == pytest.approx({"gpu": 7.4, "tpu": 6}[platform] * plain["router"])
    slow = dataclasses.replace(machine, memory_bandwidth=1e6)
    plain, ours = (product_seconds(job(MOE, ours=ours), slow) for ours in (False, True))
    assert ours["router"] == pytest.approx(2 * plain["router"])


def test_grouped_products() -> None:
    """1,024 tokens of 4 choices among 16 experts: 256 rows each, and half a tile of 128 or 256."""
    matrices = 2 * 16 * (wide(8, 48) + wide(24, 8))  # of two layers, gate and up side by side
    assert product_seconds(job(MOE), PLAIN)["experts"] == pytest.approx(6 * (256 + 128) * matrices / 5e11)
    gpu = dataclasses.replace(PLAIN, platform="gpu")
    assert product_seconds(job(MOE), gpu)["experts"] == pytest.approx(6 * (256 + 64) * matrices / 5e11)
    chunked = product_seconds(job(MOE, chunks=4), gpu)
    assert chunked["experts"] == pytest.approx(6 * 4 * (64 + 64) * matrices / 5e11)
    uneven = product_seconds(job(MOE, padding=1.25, imbalance=2), gpu)
    assert uneven["experts"] == pytest.approx(6 * (640 + 64) * matrices / 5e11)


def test_attention() -> None:
    flops = 1024 * 3 * 4 * 2 * 2 * 8 * 8
    assert attention_seconds(job(), PLAIN) == pytest.approx(3.5 * flops / 2.5e11)
    assert attention_seconds(job(causal=False), PLAIN) == pytest.approx(7 * flops / 2.5e11)
    assert attention_seconds(job(again={"scores": 1.0}), PLAIN) == pytest.approx(4.5 * flops / 2.5e11)
    mamba = Shape(32, 96, Attention(0, 4), mamba=Mamba(2, heads=4, head_size=16, groups=2, state=8))
    scan = 2 * (128 * (2 * 8 + 64) + 4 * 64 * 8)
    assert attention_seconds(job(mamba), PLAIN) == pytest.approx(3 * 1024 * scan / 1.5e11)  # at 15 % of the peak


def test_passes_over_memory() -> None:
    """Read and written: a norm 2 numbers, a sum 3, an activation of two products 3, rotary embeddings 2."""
    passed = 3 * (5 * 32 + 2 * (32 + 16)) + 3 * (5 * 32 + 3 * 64)
    assert DENSE.passed_numbers(row_passes=7) == passed
    assert memory_seconds(job(), PLAIN) == pytest.approx(1024 * (2 * 3 * passed + 10 * 96) / 1e15)
    assert memory_seconds(job(again={"passes": 1.0}), PLAIN) == pytest.approx(1024 * (8 * passed + 960) / 1e15)
    # In 8 bits each product's input, and the gradient of its output, is read twice and written twice.
    quantized = 6 * 3 * ((32 + 64) + (32 + 32) + (32 + 128) + (64 + 32))
    assert memory_seconds(job(eight_bit=True), PLAIN) == pytest.approx(1024 * (6 * passed + 960 + quantized) / 1e15)
    # Rows of 8: gathered and summed; sorted on both sides of an exchange; many times on TPU, but for batches.
    attention, mlp = 3 * (5 * 32 + 2 * 48), 5 * 32 + 3 * 64
    gpu = dataclasses.replace(PLAIN, platform="gpu")
    for passes, machine, fields in (
        (3, gpu, {}), (7, gpu, {"experts_over": 2}), (38, PLAIN, {}), (3, PLAIN, {"grouped": False}),
    ):  # fmt: skip
        assert row_passes(job(MOE, **fields), machine) == passes
        of_moe = 5 * 32 + 3 * 40 + 8 + 4 * (3 * 24 + passes * 8)
        assert MOE.passed_numbers(passes) == attention + mlp + 2 * of_moe
    # Of our own steps on TPU all other passes take 4.4 times as long, and rows 6, or 9 around an exchange.
    for passes, fields in ((6, {}), (9, {"experts_over": 2})):
        others, rows, ours = MOE.passed_numbers(0), 2 * 4 * passes * 8, job(MOE, ours=True, **fields)
        expected = 1024 * (2 * 3 * (4.4 * others + rows) + 10 * MOE.vocab) / 1e15
        assert memory_seconds(ours, PLAIN) == pytest.approx(expected)
        assert memory_seconds(ours, gpu) == memory_seconds(dataclasses.replace(ours, ours=False), gpu)


def test_optimizer() -> None:
    assert optimizer_seconds(job(updated=1e6), PLAIN) == pytest.approx(32e6 / 1e15)
    assert optimizer_seconds(job(updated=1e6, accumulated=2e6, parts=4), PLAIN) == pytest.approx((32e6 + 64e6) / 1e15)


def test_what_is_hidden() -> None:
    """Sums by what is computed, the exchange by a share of it or of the experts."""
    plain = predict(job(MOE, gathers=1e-4, gradients=2e-4, exchange=1e-3), PLAIN)
    assert plain.hidden == plain.hidden_sums == 0
    assert plain.total == pytest.approx(plain.computing + 1.3e-3)
    hiding = predict(job(MOE, gathers=1e-9, gradients=2e-9, exchange=1e-9, hidden_exchange=0.4, hides_sums=True), PLAIN)
    assert hiding.hidden == pytest.approx(0.4e-9) and hiding.hidden_sums == pytest.approx(3e-9)
    gpu = dataclasses.replace(PLAIN, platform="gpu")  # sums take processors from what runs beside them
    sharing = predict(job(MOE, gathers=1e-9, gradients=2e-9, hides_sums=True), gpu)
    assert sharing.hidden_sums == pytest.approx(0.85 * 3e-9)
    longer = predict(job(MOE, gathers=1.0, exchange=1.0, hidden_exchange=0.4, hides_sums=True), PLAIN)
    assert longer.hidden == pytest.approx(0.4 * product_seconds(job(MOE), PLAIN)["experts"])
    assert longer.hidden_sums == longer.computing


def test_stages_wait() -> None:
    """Of 4 stages three wait for the first part of 8, and for the last; with 2 stages a rank half as long."""
    plain = predict(job(stages=4, parts=8, ranks=4, tokens=4096), PLAIN)
    assert plain.bubble == pytest.approx(plain.computing * 3 / 8)
    assert predict(job(stages=4, parts=8, virtual=2, ranks=4, tokens=4096), PLAIN).bubble == plain.bubble / 2


def test_what_a_job_does_not_say() -> None:
    """One rank computes all, once, in 16 bits; nothing is sent, copied or hidden."""
    given = {"shape": DENSE, "length": 16, "tokens": 1024, "ranks": 2}
    ones = dict.fromkeys(("parts", "tensor", "stages", "virtual", "experts_over", "chunks"), 1)
    floats = dict.fromkeys(("forward_passes", "to_logits", "padding", "imbalance"), 1.0)
    false = dict.fromkeys(("split_experts", "eight_bit", "ours", "hides_sums"), False)
    sent = ("exchange", "tensor_sent", "gathers", "gradients", "replicas", "hidden_exchange", "moments", "entered")
    none = dict.fromkeys(("updated", "accumulated", "orthogonal", *sent), 0.0)
    others = {"dtype": "bfloat16", "grouped": True, "causal": True, "again": {}, "frozen": (), "useful": (),
              "optimizer_bytes": 32}  # fmt: skip
    assert vars(Job(**given)) == given | ones | floats | false | none | others
    of_times = dict.fromkeys(("matmul", "exchange", "gradients", "optimizer", "hidden", "tokens", "at_peak"), 1)
    optional = ("tensor", "parameters", "attention", "memory", "bubble", "replicas", "hidden_sums", "host")
    assert vars(Times(**of_times)) == of_times | dict.fromkeys((*optional, "at_peak_causal"), 0.0)


def test_tokens_and_numbers_of_a_rank() -> None:
    shared = job(ranks=8, tensor=4, stages=2, parts=16, tokens=3072)
    assert (shared.of_a_rank, shared.at_a_time) == (384, 192)  # a sixteenth of the tokens of 8 ranks, which share them
    assert [job(dtype=dtype).number for dtype in ("float32", "bfloat16")] == [4, 2]


def test_what_follows_from_the_terms() -> None:
    """Powers of two, each of a term of its own; what is hidden is no time of the step."""
    names = ("matmul", "attention", "memory", "exchange", "tensor", "parameters", "gradients", "replicas", "optimizer",
             "host", "bubble")  # fmt: skip
    seconds = {name: 2.0**n for n, name in enumerate(names)}
    times = Times(**seconds, hidden=5.0, hidden_sums=33.0, tokens=4096, at_peak=500.0, at_peak_causal=250.0)
    total = sum(seconds.values()) - 38
    found = times.as_dict()
    assert times.computing == 1 + 2 + 4 and times.total == total == 2009
    follows = {"total": total, "exchange_share": (8 - 5) / total, "tokens_per_s": 4096 / total, "mfu": 500 / total,
               "mfu_causal": 250 / total}  # fmt: skip
    assert found == seconds | {"hidden": 5.0, "hidden_sums": 33.0} | follows
    shown = exposed(found)  # of the sums, gathers were a third and are hidden by as much
    assert shown == seconds | {"exchange": 3.0, "parameters": 32 - 11.0, "gradients": 64 - 22.0}
    assert sum(shown.values()) == total
    assert exposed({"exchange": 3.0, "parameters": 2.0}) == dict.fromkeys(names, 0.0) | {
        "exchange": 3.0,
        "parameters": 2.0,
    }
    assert exposed({"hidden_sums": 7.0}) == dict.fromkeys(names, 0.0)


def test_useful_flops_at_the_peak() -> None:
    """Three forward passes of all tokens, on four ranks; that some are computed twice is no use."""
    found = predict(job(MOE, ranks=4, forward_passes=2.0), PLAIN)
    for at_peak, causal in ((found.at_peak, False), (found.at_peak_causal, True)):
        assert at_peak == pytest.approx(3 * 1024 * MOE.flops(16, causal) / 4e12)
    single = predict(job(MOE, ranks=4, dtype="float32"), PLAIN)
    assert single.at_peak == pytest.approx(10 * found.at_peak) and found.tokens == 1024
    sent = predict(job(DENSE, tensor_sent=1.0, replicas=2.0, gathers=3.0, gradients=4.0, exchange=5.0), PLAIN)
    assert (sent.tensor, sent.replicas, sent.parameters, sent.gradients, sent.exchange) == (1, 2, 3, 4, 5)
    assert (sent.hidden, sent.hidden_sums, sent.host) == (0, 0, 0)


def test_copies_to_a_host() -> None:
    """What enters layers goes there in the forward pass, a third of what is computed (a quarter where it is computed
    again), and comes back in the rest; moments come and go beside nothing. Device memory is read and written twice."""
    host = dataclasses.replace(PLAIN, host_bandwidth=1e3, memory_bandwidth=1e6)
    assert host_seconds(job(), PLAIN, 1.0) == 0.0
    assert host_seconds(job(moments=3e3), host, 9.0) == pytest.approx(2 * 3 + 2 * 3e-3)
    for entered, waits in ((2e3, 0.0), (3e3, 1.0), (5e3, 3.0 + 1.0)):
        found = host_seconds(job(entered=entered), host, 6.0)  # two seconds forward, four backward
        assert found == pytest.approx(waits + 2 * entered / 1e6), entered
    again = job(entered=3e3, moments=1e3, again={"passes": 1.0})
    assert host_seconds(again, host, 8.0) == pytest.approx(2 + 1.0 + 8e-3)  # of 8 seconds two are forward
    assert host_seconds(job(entered=3e3, forward_passes=2.0), host, 6.0) == pytest.approx(2 * 3e3 / 1e6)
    assert predict(job(moments=3e3), host).host == pytest.approx(6 + 6e-3)


def test_modules_for_the_next_token_are_layers_and_outputs() -> None:
    """A layer of attention and of experts each, what joins two rows, and another product with the same table."""
    two = dataclasses.replace(MOE, mtp=2)
    longer = dataclasses.replace(
        MOE, attention=dataclasses.replace(MOE.attention, layers=5), moe=dataclasses.replace(MOE.moe, layers=4)
    )
    assert two.passed_numbers(7) == longer.passed_numbers(7)
    assert two.score_flops(16) == longer.score_flops(16)
    joined, output = 2 * (2 * 32) * 32, 32 * 96
    assert two.flops(16) == longer.flops(16) + 2 * joined + 2 * 2 * output
    assert two.parameters() == longer.parameters() + joined and two.parameters("output") == 3 * output
    assert dataclasses.replace(two, tied=True).parameters() == two.parameters() - output
    plain = dataclasses.replace(MOE, moe=None, mlp=Dense())
    assert plain.parameters() == plain.parameters("attention") + 2 * output
    assert (plain.row, MOE.row, dataclasses.replace(MOE, moe=Experts(2, 16, 4, 24)).row) == (32, 8, 32)


def test_passes_of_mamba_and_of_what_is_not_gated() -> None:
    """A norm and a sum; the convolution and the scan read and write x, B and C; and the gated norm reads more."""
    mamba = Shape(32, 96, Attention(0, 4), mamba=Mamba(2, heads=4, head_size=16, groups=3, state=8))
    assert mamba.passed_numbers(7) == 2 * (5 * 32 + 4 * (64 + 2 * 3 * 8) + 6 * 64)
    products = {(p.X, p.Y, p.times, p.matrices) for p in mamba.products() if p.part == "mamba"}
    assert products == {(32, 2 * 64 + 2 * 3 * 8 + 4, 2, 2), (64, 32, 2, 2)}
    assert (mamba.mamba.conv, mamba.mamba.chunk) == (4, 128)
    single = dataclasses.replace(MOE, gated=False, moe=dataclasses.replace(MOE.moe, gate=1))
    found = sorted((p.part, p.X, p.Y, p.times, p.matrices) for p in single.products())
    assert found == sorted([
        ("attention", 32, 32 + 32, 3, 3), ("attention", 32, 32, 3, 3), ("mlp", 32, 64, 1, 1), ("mlp", 64, 32, 1, 1),
        ("router", 32, 16, 2, 2), ("experts", 8, 24, 8, 32), ("experts", 24, 8, 8, 32), ("shared", 32, 40, 2, 2),
        ("shared", 40, 32, 2, 2), ("projections", 32, 8, 2, 2), ("projections", 8, 32, 2, 2),
        ("projections", 32, 32, 2, 2), ("output", 32, 96, 1, 1),
    ])  # fmt: skip
    assert single.passed_numbers(7) == 3 * (5 * 32 + 2 * 48) + 5 * 32 + 2 * 64 + 2 * (
        5 * 32 + 2 * 40 + 4 * (2 * 24 + 7 * 8) + 8
    )
