"""The whole model: causality, recomputation, dropout, initial values, dtypes and sizes."""

import functools
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model import transformer
from bigmac_jax.model.layers import Norm, dropout, normalize
from bigmac_jax.model.transformer import check_length, init_model

from .program import all_to_alls, forward, payloads
from .tools import (  # fmt: skip
    PAPER,
    PRESENT,
    abstract_model,
    assert_close,
    leaves,
    loss_and_gradients,
    on_mesh,
    random_model,
    random_tokens,
    split_tokens,
    tiny,
)


@pytest.mark.parametrize(
    "model",
    [
        PRESENT | {"num_kv_heads": 1},
        pytest.param(PAPER, marks=pytest.mark.full),
        pytest.param(PRESENT | {"positions": "none", "structure": "fine_grained"}, marks=pytest.mark.full),
    ],
    ids=["rope", "learned", "none"],
)
def test_causal(model: dict[str, Any]) -> None:
    """Logits at t have a gradient to the embedding of every token up to t and to none after it."""
    config = tiny(batch=1, tie_embeddings=False, **model)
    tokens = np.arange(8, dtype=np.int32)[None]  # token t stands at position t
    projection = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 264)), jnp.float32)

    def logit(model: Any, at_L: jax.Array) -> jax.Array:
        return jnp.sum(model(tokens)[0] * projection * at_L.reshape(1, -1, 1))

    with on_mesh(config):
        gradient = jax.jit(lambda model, at_L: jax.grad(logit)(model, at_L).embedding_VD[...])
        model = random_model(config)
        reach_LL = np.stack([np.abs(gradient(model, row)).max(-1)[:8] for row in jnp.eye(8)])
    assert (reach_LL[np.tril_indices(8)] > 1e-6).all()
    assert (reach_LL[np.triu_indices(8, 1)] == 0).all()


@pytest.mark.parametrize(
    "remat", ["layer", *(pytest.param(r, marks=pytest.mark.full) for r in ("exchange", "offload"))]
)
def test_remat_changes_nothing(remat: str) -> None:
    none, again = (tiny((1, 1, 2), num_layers=1, dropout=0.3, remat=name) for name in ("none", remat))
    tokens, key = random_tokens(none), jax.random.key(1)
    (expected, of_none, _), (loss, gradients, _) = (
        loss_and_gradients(config, tokens, dropout_key=key) for config in (none, again)
    )
    assert_close({"loss": loss} | gradients, {"loss": expected} | of_none)


@pytest.mark.full
def test_offload_gives_the_bits_of_layer() -> None:
    layer, offload = (tiny((1, 1, 2), num_layers=2, dropout=0.3, remat=name) for name in ("layer", "offload"))
    (loss, gradients, _), (expected, of_layer, _) = (
        loss_and_gradients(config, random_tokens(layer), dropout_key=jax.random.key(1)) for config in (offload, layer)
    )
    assert loss == expected and gradients.keys() == of_layer.keys()
    for name, gradient in of_layer.items():
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


@pytest.mark.full
def test_remat_recomputes() -> None:
    configs = {remat: tiny((1, 1, 2), dropout=0.3, remat=remat) for remat in ("none", "layer", "exchange", "offload")}
    sent = {remat: backward(config) for remat, config in configs.items()}
    assert sent["none"][0] == 2 * 4  # two layers; forward and backward exchange twice each
    assert sent["layer"][0] == 2 * 6  # and the backward pass repeats the forward's
    assert sent["exchange"][0] == 2 * 4
    assert sent["layer"][1] < sent["exchange"][1] < sent["none"][1] / 3
    # What enters two layers is kept in host memory, and all else as with `layer`.
    entered = 2 * configs["offload"].data.batch_size * 8 * configs["offload"].model.hidden_size
    assert sent["offload"] == (sent["layer"][0], sent["layer"][1], entered)
    assert {kept[2] for remat, kept in sent.items() if remat != "offload"} == {0}


@pytest.mark.full
@pytest.mark.parametrize(
    ("exchange", "mesh", "wire_dtype"),
    [
        ("all_to_all", (1, 1, 4), "float32"),
        ("dedup", (1, 1, 4), "int8"),
        ("hierarchical", (1, 2, 2), "bfloat16"),
    ],
)
def test_what_crossed_is_kept(exchange: str, mesh: tuple[int, ...], wire_dtype: str) -> None:
    """No strategy repeats an exchange, and of rows that return by choice bigmac keeps a quarter of fine_grained's."""
    kept = {}
    for structure in ("fine_grained", "bigmac"):
        fields: Any = {"structure": structure, "exchange": exchange, "wire_dtype": wire_dtype, "hidden_size": 64}
        none, layer, rows = (backward(tiny(mesh, remat=r, **fields)) for r in ("none", "layer", "exchange"))
        assert rows[0] == none[0] < layer[0]
        kept[structure] = rows[1] - layer[1]
    if exchange == "all_to_all":
        T, K, R, S = 8 * 8 // 4, 3, 16, 4
        there_and_back = 2 * S * T * min(K, 8 // S) * S  # rows that arrive, of all ranks
        plan = kept["bigmac"] - 2 * there_and_back * R
        assert 0 <= plan < 100 and kept["fine_grained"] == 2 * there_and_back * 4 * R + plan


def backward(config: Config) -> tuple[int, int, int]:
    """(exchanges of a forward and backward pass, elements that the forward scan keeps, those in host memory)."""
    with on_mesh(config):
        tokens = split_tokens(random_tokens(config)[:, :-1])
        loss = jax.grad(lambda model: jnp.square(model(tokens)[0]).mean())
        jaxpr = jax.jit(loss).trace(abstract_model(config)).jaxpr.jaxpr
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    kept = [v.aval for v in scan.outvars]
    at_host = sum(aval.size for aval in kept if aval.memory_space == jax.memory.Space.Host)
    return len(payloads(all_to_alls(jaxpr))), sum(aval.size for aval in kept), at_host


@pytest.mark.parametrize(("asked", "where", "unrolled"), [(0, "cpu", 4), (0, "tpu", 1), (2, "cpu", 2), (3, "tpu", 3)])
def test_layers_of_a_loop_that_are_unrolled(
    asked: int, where: str, unrolled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on a CPU, where a loop copies what it keeps."""
    monkeypatch.setattr(transformer, "platform", lambda: where)
    config = tiny(num_layers=4, structure="dense", unroll_layers=asked)
    with on_mesh(config):
        model, tokens = abstract_model(config), jax.ShapeDtypeStruct((8, 8), jnp.int32)
        program = jax.make_jaxpr(lambda model, tokens: model(tokens)[0])(model, tokens)
    (loop,) = (e for e in program.eqns if e.primitive.name == "scan")
    assert (loop.params["length"], loop.params["unroll"]) == (4, unrolled)


def test_dropout_keeps_the_mean() -> None:
    with on_mesh(tiny()):
        x = split_tokens(np.full((8, 64, 64), 3.0, np.float32))
        y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
        assert dropout(x, 0.1, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    np.testing.assert_allclose(np.unique(y), [0, 3 / 0.9], rtol=1e-6)
    assert y.mean() == pytest.approx(3, rel=0.01)
    assert (y == 0).mean() == pytest.approx(0.1, abs=0.01)


@functools.cache
def dropout_sums(mesh: tuple[int, int, int], seed: int | None, rate: float = 0.5) -> np.ndarray:
    """A stream of 1, branches that answer 1, norms switched off: the output counts the masks that kept an entry."""
    config = tiny(mesh, length=32, structure="dense", use_bias=True, dropout=rate, positions="none")
    zeros = {name: np.zeros_like(value) for name, value in leaves_of(config).items()}
    ones = ("embedding_VD", "layers.attention.out.b_F", "layers.mlp.down.b_F")
    given = zeros | {name: np.ones_like(zeros[name]) for name in ones}
    given["embedding_VD"] /= np.float32(math.sqrt(config.model.hidden_size))
    with on_mesh(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Norm, "__call__", lambda self, x: x)
        key = None if seed is None else jax.random.key(seed)
        run = jax.jit(lambda m, t: m.features(t, dropout_key=key, evaluating=False)[0])
        return np.asarray(run(random_model(config, given), split_tokens(random_tokens(config)[:, :-1])))


def leaves_of(config: Config) -> dict[str, np.ndarray]:
    with on_mesh(config):
        return leaves(random_model(config))


def test_dropout_masks_differ_by_place_and_step() -> None:
    """Five independent masks: the embedding's and two in each of two layers."""
    x = dropout_sums((1, 1, 1), 0) / 2
    share = [(x == n).mean() for n in range(6)]
    np.testing.assert_allclose(share, [math.comb(5, n) / 32 for n in range(6)], atol=0.015)
    assert (dropout_sums((1, 1, 1), 1) / 2 != x).mean() > 0.5


def test_no_dropout_without_a_key_or_rate() -> None:
    np.testing.assert_array_equal(dropout_sums((1, 1, 1), None), 5)
    np.testing.assert_array_equal(dropout_sums((1, 1, 1), 0, 0.0), 5)


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 4)], ids=str)
def test_dropout_masks_are_the_same_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(dropout_sums(mesh, 0), dropout_sums((1, 1, 1), 0))


EVERYTHING = PAPER | {
    "gated": True, "num_shared_experts": 2, "tie_embeddings": False, "qk_norm": True, "balance": "bias",
    "latent_norm": "pre_dispatch", "num_layers": 8, "hidden_size": 64, "expert_hidden_size": 48,
    "projection_init": "random",
}  # fmt: skip


@functools.cache
def initial(mesh: tuple[int, int, int], **model: Any) -> dict[str, np.ndarray]:
    config = tiny(mesh, **model)
    with on_mesh(config):
        init = jax.jit(lambda key: init_model(config, key))
        return leaves(init(jax.random.key(0)))


def test_initial_values_do_not_depend_on_the_mesh() -> None:
    one, many = initial((1, 1, 1), **EVERYTHING), initial((1, 2, 4), **EVERYTHING)
    assert one.keys() == many.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(many[name], value, err_msg=name)


def test_initial_std_of_every_parameter() -> None:
    """1/√fan-in; the last matrix of each residual branch also by 1/√(2·layers) = 1/4, once per branch."""
    h, R, F, shared = 64, 16, 48, 32
    residual = 0.25
    expected = {"embedding_VD": 0.02, "positions_LD": 0.02, "unembedding_VD": 0.02} | {
        "layers." + name: std for name, std in {
            "attention.query.w_DF": h**-0.5, "attention.key.w_DF": h**-0.5, "attention.value.w_DF": h**-0.5,
            "attention.out.w_DF": residual * h**-0.5, "mlp.router_DE": h**-0.5,
            "mlp.down.w_DF": h**-0.5, "mlp.up.w_DF": residual * R**-0.5,
            "mlp.experts.w_in_eRF": R**-0.5, "mlp.experts.w_gate_eRF": R**-0.5, "mlp.experts.w_out_eFR": F**-0.5,
            "mlp.shared.up.w_DF": h**-0.5, "mlp.shared.gate.w_DF": h**-0.5,
            "mlp.shared.down.w_DF": residual * shared**-0.5,
        }.items()
    }  # fmt: skip
    for name, value in initial((1, 1, 1), **EVERYTHING).items():
        assert value.dtype == np.float32
        if name.endswith("scale_D"):
            np.testing.assert_array_equal(value, 1, err_msg=name)
        elif "bias" in name or ".b_" in name:
            np.testing.assert_array_equal(value, 0, err_msg=name)
        else:
            std = expected.pop(name)
            assert value.std() == pytest.approx(std, rel=0.08), name
            assert abs(value.mean()) < 0.15 * std, name
    assert not expected


def test_every_parameter_is_drawn_by_itself() -> None:
    """Numbers of one key stand in one order, whatever shape and deviation they get."""
    drawn = {name: value for name, value in initial((1, 1, 1), **EVERYTHING).items() if value.std()}
    rows = [(name, row) for name, value in drawn.items() for row in (value if "layers." in name else [value])]
    orders = {tuple(np.argsort(row.ravel()[:16])) for _, row in rows}
    assert len(rows) == 13 * 8 + 3 and len(orders) == len(rows)


def test_projections_that_start_as_a_selection() -> None:
    """W↓ keeps R of h coordinates as they are, W↑ writes to R of h, each layer to its own; as large as random ones."""
    model = EVERYTHING | {"projection_init": "selection"}
    one, many = initial((1, 1, 1), **model), initial((1, 2, 4), **model)
    down_YDR, up_YRD = (one[f"layers.mlp.{name}.w_DF"] for name in ("down", "up"))
    for layer in range(8):
        taken, written = down_YDR[layer].T, up_YRD[layer] / (0.25 * (64 / 16) ** 0.5)
        for rows_RD in (taken, written):
            assert set(np.unique(rows_RD.round(6))) == {0.0, 1.0}
            np.testing.assert_allclose(rows_RD @ rows_RD.T, np.eye(16), atol=1e-6)
    chosen = {matrix.tobytes() for matrix in (*down_YDR, *up_YRD.swapaxes(1, 2))}
    assert len(chosen) == 16
    for name, value in one.items():
        np.testing.assert_array_equal(many[name], value, err_msg=name)
    other = initial((1, 1, 1), **EVERYTHING)
    assert [name for name in one if (one[name] != other[name]).any()] == ["layers.mlp.down.w_DF", "layers.mlp.up.w_DF"]


@pytest.mark.parametrize("structure", ["fine_grained", "dense"])
def test_residual_scaling_where_the_branch_ends(structure: str) -> None:
    """Without W↑ the experts' (or the MLP's) second matrix ends the branch."""
    values = initial((1, 1, 1), structure=structure, num_layers=8, hidden_size=64)
    name, fan_in = {"fine_grained": ("experts.w_out_eFR", 16), "dense": ("down.w_DF", 256)}[structure]
    assert values["layers.mlp." + name].std() == pytest.approx(0.25 * fan_in**-0.5, rel=0.05)


def test_layers_and_experts_start_different() -> None:
    w_YeRF = initial((1, 1, 1), **EVERYTHING)["layers.mlp.experts.w_in_eRF"]
    assert len({matrix.tobytes() for layer in w_YeRF for matrix in layer}) == 8 * 8


@pytest.mark.full
def test_bfloat16_computes_near_float32() -> None:
    exact, half = (tiny((1, 1, 2), dtype=dtype, z_loss_coefficient=0.1) for dtype in ("float32", "bfloat16"))
    tokens = random_tokens(exact)
    value, gradients, _ = loss_and_gradients(exact, tokens)
    rounded, rounded_gradients, aux = loss_and_gradients(half, tokens)
    assert {g.dtype for g in rounded_gradients.values()} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in aux} == {np.dtype("float32")}
    assert abs(rounded - value) < 0.02 * value
    assert rounded != value
    for name, g in gradients.items():
        cosine = np.vdot(g, rounded_gradients[name]) / np.linalg.norm(g) / np.linalg.norm(rounded_gradients[name])
        assert cosine > 0.9, name
    traced = forward(half)
    assert {dtype for dtype, _ in payloads(all_to_alls(traced.jaxpr.jaxpr))} == {"uint16"}  # its bits
    assert jax.tree.leaves(traced.out_info)[0].dtype == jnp.float32  # the logits


def test_more_tokens_than_learned_positions_are_refused() -> None:
    config = tiny(positions="learned")
    with on_mesh(config), pytest.raises(ValueError, match="9 tokens exceed the 8 learned positions"):
        jax.eval_shape(lambda model: model(split_tokens(np.zeros((8, 9), np.int32))), abstract_model(config))


def test_windows_up_to_what_the_model_is_made_for(caplog: pytest.LogCaptureFixture) -> None:
    """Up to that length nothing is said; of a longer one a line, or where positions are learned an error."""
    with caplog.at_level(logging.WARNING):
        for positions in ("rope", "learned"):
            for length in (1, 7, 8):
                check_length("window", length, tiny(positions=positions))
        assert not caplog.messages
        check_length("window", 9, tiny(positions="none"))
    assert caplog.messages == ["window=9 is more than the 8 tokens that the model was made for"]
    with pytest.raises(ConfigError, match=r"^window=9 must be at most the 8 learned positions; use 8$"):
        check_length("window", 9, tiny(positions="learned"))


@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_norms_and_their_least_denominator(bias: bool, scale: float) -> None:
    """Against NumPy: eps stands beside the mean square, which it is as large as here; of bfloat16 all is float32."""
    rng = np.random.default_rng(0)
    x, (gain, shift) = rng.standard_normal((2, 3, 8)).astype(np.float32), rng.standard_normal((2, 8))
    config = tiny(norm_eps=0.5 * scale).model
    y = x - x.mean(-1, keepdims=True) if bias else x
    expected = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 0.5 * scale) * gain + (shift if bias else 0)
    given = [jnp.asarray(v, jnp.float32) for v in ((gain, shift) if bias else (gain,))]
    np.testing.assert_allclose(normalize(config, jnp.asarray(x), *given), expected, rtol=1e-5, atol=1e-6)
    rounded = normalize(config, jnp.asarray(x, jnp.bfloat16), *given)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("structure", "paper"), [("fine_grained", 3.73e9), ("bigmac", 3.78e9)])
def test_gpt3_xl_has_the_papers_parameters(structure: str, paper: float) -> None:
    """Table 4, by shapes alone."""
    layers, h, s, v, e, r = 24, 2048, 2048, 50257, 64, 0.25
    config = tiny(length=s, structure=structure, num_layers=layers, hidden_size=h, num_heads=16, vocab_size=v,
                  num_experts=e, top_k=8, down_ratio=r, latent_norm="none", **PAPER)  # fmt: skip
    with on_mesh(config):
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)))
    formula = (4 * h**2 + 8 * h + (2 * r * h**2 + 2 * r * h) * e) * layers + (v + e + 2) * h
    formula += 2 * r * layers * h**2 if structure == "bigmac" else 0
    assert formula == pytest.approx(paper, rel=0.0015)
    # What the paper's formula leaves out: each layer's router (it counts one for all layers), the learned positions,
    # and part of the experts' biases, which are r·h and h wide (it counts 2·r·h).
    routers, positions, biases = (layers - 1) * e * h, s * h, layers * e * (1 - r) * h
    assert count == formula + routers + positions + biases
    assert count == pytest.approx(formula, rel=0.005)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 1, 2)])
def test_logits_are_summed_in_float32(mesh: tuple[int, ...]) -> None:
    config = tiny(mesh, dtype="bfloat16")
    with on_mesh(config):
        model, tokens = abstract_model(config), split_tokens(random_tokens(config)[:, :-1])
        program = jax.make_jaxpr(lambda model, tokens: model(tokens)[0])(model, tokens)
    assert program.out_avals[0].dtype == np.float32
    products = re.findall(r":(\w+)\[[^\n]* = dot_general\[.*?preferred_element_type=(\w+)", str(program), re.S)
    assert products[-1] == ("f32", "float32")
