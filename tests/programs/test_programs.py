"""The programs of a run on simulated devices: what they hold, and that they are the ones that run."""

import dataclasses
import math

import jax
import pytest
from model.tools import on_mesh, tiny

from bigmac_jax.config import Config, ConfigError, DataConfig, ExecutionConfig, MeshConfig, ModelConfig
from bigmac_jax.inference.decoding import DRAFTED
from bigmac_jax.model.parameters import map_declared, named_leaves
from bigmac_jax.model.transformer import init_model
from bigmac_jax.planning import hlo
from bigmac_jax.planning.abstract_programs import NAMES, make_program
from bigmac_jax.planning.compiled_programs import DoesNotCompileError, compile_program
from bigmac_jax.planning.hlo_collectives import collectives
from bigmac_jax.runtime import environment


def nbytes(tree: object) -> int:
    """Of one rank."""
    found = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in found)


def test_a_rank_draws_its_own_shards_alone() -> None:
    """Initialisation holds the state and, beside it, no more than that and the largest parameter's shard."""
    model = ModelConfig(hidden_size=512, num_layers=8, num_heads=8, vocab_size=264)
    config = Config(
        model, mesh=MeshConfig(data=8, fsdp=True), data=DataConfig(tokenizer="bytes", sequence_length=64, batch_size=8)
    )
    compiled = compile_program(config, jax.devices(), "init")
    with on_mesh(config):
        abstract = make_program("step", config, jax.sharding.get_mesh()).arguments[0]
    state = nbytes(abstract)
    largest = max(nbytes(leaf) for leaf in jax.tree.leaves(abstract.params))
    assert state > 50e6
    outputs = compiled.memory["total"] - compiled.memory["code"] - compiled.memory["arguments"]
    assert outputs - state <= state + largest


@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1), marks=pytest.mark.full), (2, 1, 2, 2, True, True)])
def test_every_program_lowers(mesh: tuple[int, ...]) -> None:
    config = tiny(mesh, num_kv_heads=2, num_shared_experts=1)
    with on_mesh(config):
        for name in NAMES:
            assert make_program(name, config, jax.sharding.get_mesh()).lower().as_text(), name


def test_a_program_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "compiler_options", lambda *args, **_: {"xla_no_such_option": True})
    with pytest.raises(
        DoesNotCompileError, match=r"the program 'step' does not compile for cpu: \w+: .*no_such"
    ) as error:
        compile_program(tiny((1, 1, 2)), jax.devices()[:2], "step")
    assert "\n" not in str(error.value)


def test_attention_that_is_not_here_is_a_config_error() -> None:
    config = tiny((1, 1, 2))
    broken = dataclasses.replace(config, execution=dataclasses.replace(config.execution, attention="cudnn"))
    with pytest.raises(ConfigError, match=r"execution.attention=cudnn is a kernel of GPUs, not of CPUs; use"):
        compile_program(broken, jax.devices()[:2], "evaluate")


def test_decoding_in_bfloat16_reads_half_the_weights() -> None:
    """The model of configs/tiny.py: its weights are cast once, not in every step."""
    model = ModelConfig(num_layers=3, hidden_size=128, num_heads=2, top_k=4, num_shared_experts=1,
                        shared_expert_hidden_size=256)  # fmt: skip
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        config = Config(model, ExecutionConfig(dtype), MeshConfig(data=1), DataConfig(batch_size=8))
        with on_mesh(config):
            sizes[dtype] = nbytes(make_program("decode", config, jax.sharding.get_mesh()).arguments[0])
    assert sizes["bfloat16"] <= 0.55 * sizes["float32"]


def test_every_parameter_declares_itself() -> None:
    """The letters of its name are the dimensions it declares, and mesh.fsdp leaves nothing whole but what is small."""
    config = tiny((2, 1, 2, 2, True, True), use_bias=True, gated=True, norm="layernorm", positions="learned",
                  latent_norm="gate", num_shared_experts=1, tie_embeddings=False, balance="bias")  # fmt: skip
    with on_mesh(config):
        model = jax.jit(lambda key: init_model(config, key))(jax.random.key(0))
    dims, small = (named_leaves(map_declared(of, model)) for of in (lambda d, _: d.dims, lambda d, _: d.small))
    for name, leaf in named_leaves(model).items():
        if name.endswith("router_bias_E"):
            continue
        letters = name.rpartition("_")[2]
        assert dims[name] == letters, name
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert len(shard) == len(letters) + name.startswith("layers."), name
        assert (shard == leaf.shape) <= small[name], name


@pytest.mark.parametrize(
    "mesh",
    [(1, 1, 2), *(pytest.param(mesh, marks=pytest.mark.full)
                  for mesh in ((2, 2, 2), (1, 2, 1, 2, False, True), (1, 1, 4, 1, True)))],
)  # fmt: skip
def test_a_draft_exchanges_nothing(mesh: tuple[int, ...]) -> None:
    """No row leaves its rank while tokens are drafted; verifying all of them takes the exchanges of one step. Without
    `tensor` and fsdp a draft has no collective at all."""
    config = tiny(mesh, num_kv_heads=2, num_shared_experts=1, exchange="all_to_all")
    devices = jax.devices()[: math.prod(int(size) for size in mesh[:4])]
    found = {}
    for name in ("draft", "verify"):
        compiled = compile_program(config, devices, name)
        found[name] = collectives(hlo.parse(compiled.text), compiled.mesh)
    assert not [c for c in found["draft"] if c.role != "other"]
    assert config.mesh.fsdp or {axis for c in found["draft"] for axis in c.axes} <= {"tensor"}
    assert sum(c.times for c in found["verify"] if c.role == "payload") == 2 * config.model.num_layers


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 2, 2), (1, 2, 1, 2, False, True)])
def test_a_next_token_module_exchanges_as_a_layer(mesh: tuple[int, ...]) -> None:
    """Once in every program that reads tokens, and for every token of a draft but the first."""
    config = tiny(mesh, num_kv_heads=2, mtp_modules=2, exchange="all_to_all")
    devices = jax.devices()[: math.prod(int(size) for size in mesh[:4])]
    exchanges = {}
    for name in ("prefill_mtp", "decode_mtp", "draft_mtp", "verify_mtp"):
        compiled = compile_program(config, devices, name)
        found = collectives(hlo.parse(compiled.text), compiled.mesh)
        exchanges[name] = sum(c.times for c in found if c.role == "payload") / 2
    layers = config.model.num_layers + 1
    assert exchanges == {"prefill_mtp": layers, "decode_mtp": layers, "draft_mtp": DRAFTED - 1, "verify_mtp": layers}
