"""Runs with routers that are frozen in part: what is frozen stays to the last bit and costs no optimizer."""

import pathlib
from typing import Any

import chex
import jax
import numpy as np
import pytest
from model.tools import leaves, on_mesh, random_tokens

from bigmac_jax.data.batch import Batch
from bigmac_jax.model.mesh import batch_spec
from bigmac_jax.run.start import _describe
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer

from .tools import host, session, small

ROUTERS = {
    "hyper": ("model.router=hyper", "model.hyper_width=6", "model.balance=bias"),
    "frozen": ("model.router=frozen",),
}
FROZEN = {"hyper": {"hyper.in_DH", "hyper.out_DHE", "hyper.out_HE"}, "frozen": {"router_DE"}}
OPTIMIZER = ("optimizer.average_decay=0.9", "optimizer.weight_decay=0.5")


def of_routers(state: Any, part: str) -> dict[str, Any]:
    """What stands in a part of the state of the routers, by name in a layer."""
    begin = f"{part}.layers.mlp."
    return {name.removeprefix(begin): value for name, value in state.items() if name.startswith(begin)}


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_frozen_is_no_parameter_of_the_optimizer(router: str, tmp_path: pathlib.Path) -> None:
    """A step passes it on as it came, and keeps nothing for it. (Traced, not run.)"""
    config = small(tmp_path, *ROUTERS[router], *OPTIMIZER)
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
        trainer = make_trainer(config, mesh)
        tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=jax.NamedSharding(mesh, batch_spec(2)))
        jaxpr = trainer.step.trace(trainer.abstract_state, Batch(tokens, tokens, None), trainer.rate(0)).jaxpr.jaxpr
    names = list(jax.tree.leaves(jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"),
        trainer.abstract_state,
    )))  # fmt: skip
    passed = {
        name for name, given, left in zip(names, jaxpr.invars, jaxpr.outvars, strict=False) if given is left
    }  # the state comes first on both sides
    assert passed == {f"rest.layers.mlp.{name}" for name in FROZEN[router]}
    for name in FROZEN[router]:
        assert [found for found in names if found.endswith(f"mlp.{name}")] == [f"rest.layers.mlp.{name}"]
    if router == "hyper":  # two moments, the average, and itself
        assert len([name for name in names if name.endswith("mlp.hyper.vector_D")]) == 4


@pytest.mark.parametrize(
    ("router", "frozen"), [("hyper", "and 912 that are not trained, "), ("frozen", "and 128 that"), ("", ",")]
)
def test_a_start_says_what_stays(
    router: str, frozen: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 · 6 + 6 · 8 · 17 numbers are 912; eight experts."""
    config = small(tmp_path, *ROUTERS.get(router, ()))
    with on_mesh(config):
        state = make_trainer(config, jax.sharding.get_mesh()).abstract_state
        _describe(config, state, 10, 0, None)
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    out = capsys.readouterr().out
    assert f"{params:,} parameters{' ' * (router != '')}{frozen}" in out and "10 training tokens" in out
    assert (", router hyper of width 6," in out, ", router frozen," in out) == (router == "hyper", router == "frozen")


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(), ("mesh.data=2", "mesh.expert=2", "mesh.fsdp=True")], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_frozen_parts_after_100_steps(router: str, mesh: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    """Bit-equal, while all else has moved; and a run that was saved on the way and restored ends bit-equal to one that
    was left alone, with more choices on the way."""
    config = small(
        tmp_path,
        *ROUTERS[router],
        *OPTIMIZER,
        *mesh,
        "train.on_bad_step=skip",
        "model.top_k=4",
        "train.choices_from=2",
        "train.choices_steps=60",
    )
    with session(config) as run:
        begun = leaves(host(run.state))
        for step in range(100):
            if step == 30:
                checkpoints = Checkpoints(tmp_path, keep=1)
                checkpoints.save(run.state, {"batches": step}, config, step, eval_loss=None)
                checkpoints.close()
            run.step(random_tokens(config, step))
        ended = leaves(host(run.state))
        checkpoints = Checkpoints(tmp_path)
        run.state, _ = checkpoints.restore(30, run.trainer.abstract_state)
        checkpoints.close()
        choices = [int(run.step(random_tokens(config, step)).choices) for step in range(30, 100)]
        assert choices == [3] * 10 + [4] * 60  # 30 to 39: the second third of 60 steps
        chex.assert_trees_all_equal(leaves(host(run.state)), ended)
    before, after = of_routers(begun, "rest"), of_routers(ended, "rest")
    if router == "hyper":  # balancing moves its own bias, beside them
        assert (before.pop("router_bias_E") != after.pop("router_bias_E")).any()
    assert before.keys() == after.keys() == FROZEN[router]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    moved = {name for name in begun if name.startswith("params.") and (begun[name] != ended[name]).any()}
    assert moved == {name for name in begun if name.startswith("params.")}
    if router == "hyper":
        assert "params.layers.mlp.hyper.vector_D" in moved
