"""A teacher beside the model: the loss and its gradient against a plain reference, on every mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.tools import abstract_model, leaves, on_mesh, random_like, random_tokens, some, tiny

from bigmac_jax.config import Config
from bigmac_jax.data.batch import NO_TARGET, Batch, batch_from_windows
from bigmac_jax.model.mesh import batch_spec, place
from bigmac_jax.training.distillation import distilled_loss
from bigmac_jax.training.loss import WHOLE, loss_fn
from bigmac_jax.training.step import split_model

MESHES = [(1, 1, 1), (1, 2, 2), (2, 1, 1, 2)]


def student_of(mesh: tuple[int, ...], teacher_weight: float, hidden_weight: float, **fields: Any) -> Config:
    config = tiny(mesh, structure="bigmac", down_ratio=0.5, **fields)
    tuning = dataclasses.replace(config.tuning, teacher="x", teacher_weight=teacher_weight, hidden_weight=hidden_weight)
    return dataclasses.replace(config, tuning=tuning)


def pair(config: Config, same: bool = False, width: int = 0) -> tuple[Any, Any]:
    """A student, and a fine_grained teacher, perhaps of another width (or one that is the student itself)."""
    student = random_like(abstract_model(config), config)
    if same:
        return student, student
    of_teacher = {"structure": "fine_grained", "hidden_size": width or config.model.hidden_size}
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, **of_teacher))
    moved = jax.tree.map(lambda leaf: leaf * 1.3, random_like(abstract_model(wide), wide))
    return student, moved


def batch_of(config: Config) -> Batch:
    batch = batch_from_windows(random_tokens(config))
    left_out_BL = np.arange(batch.targets_BL.size).reshape(batch.targets_BL.shape) % 5 == 0
    return place(batch._replace(targets_BL=np.where(left_out_BL, NO_TARGET, batch.targets_BL)), batch_spec(2))


def value_and_gradient(config: Config, *of_pair: Any) -> tuple[float, Any, dict[str, np.ndarray]]:
    student, teacher = pair(config, *of_pair)
    graphdef, params, rest = split_model(student)

    def loss(params: Any, teacher: Any, batch: Batch) -> Any:
        return distilled_loss(nnx.merge(graphdef, params, rest), teacher, batch, dropout_key=None, share=WHOLE)

    call = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, parts), gradient = call(params, teacher, batch_of(config))
    return float(value), parts, leaves(gradient)


def reference(config: Config, width: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    """From whole logits, and layers called one after the other."""
    student, teacher = pair(config, width=width)
    graphdef, params, rest = split_model(student)
    weight, mu = config.tuning.teacher_weight, config.tuning.hidden_weight
    batch = batch_of(config)
    real_BL = batch.targets_BL != NO_TARGET

    def streams(model: Any) -> list[Any]:
        x_BLD = model.embed(batch.inputs_BL)
        found = []
        for number in range(config.model.num_layers):
            layer = jax.tree.map(lambda leaf: leaf[number], model.layers)  # noqa: B023
            x_BLD, _ = layer(x_BLD, None, True, None)
            found.append(x_BLD)
        return found

    def loss(params: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        ours, theirs = streams(model), streams(teacher)
        log_p, log_q = (
            jax.nn.log_softmax(of.logits(of.final_norm(x[-1]))) for of, x in ((model, ours), (teacher, theirs))
        )
        kl_BL = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
        kl = (kl_BL * real_BL).sum() / real_BL.sum()
        gaps = [
            (jnp.square(x - t) * real_BL[..., None]).sum() / (jnp.square(t) * real_BL[..., None]).sum()
            for x, t in zip(ours, theirs, strict=True)
            if mu
        ]
        plain, parts = loss_fn(model, batch, dropout_key=None, share=WHOLE)
        return plain - weight * parts.cross_entropy_U.mean() + weight * kl + mu * sum(gaps) / len(ours)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), leaves(gradient)


@pytest.mark.parametrize(("mesh",), some([(mesh,) for mesh in MESHES], every=3))
def test_the_loss_and_its_gradient(mesh: tuple[int, ...]) -> None:
    one = student_of((1, 1, 1), 0.7, 0.3)
    with on_mesh(one):
        wanted, gradient = reference(one)
    config = student_of(mesh, 0.7, 0.3)
    with on_mesh(config):
        value, parts, found = value_and_gradient(config)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert parts.gaps.divergence > 0.01 and (np.asarray(parts.gaps.hidden_Y) > 0.01).all()
    for name in gradient:
        np.testing.assert_allclose(found[name], gradient[name], atol=2e-5, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_a_wider_teacher(mesh: tuple[int, ...]) -> None:
    """Its predictions are learned alone."""
    config = student_of(mesh, 0.7, 0.0)
    with on_mesh(config):
        wanted, gradient = reference(config, 32)
        value, parts, found = value_and_gradient(config, False, 32)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert parts.gaps.divergence > 0.01 and parts.gaps.hidden_Y is None
    for name in gradient:
        np.testing.assert_allclose(found[name], gradient[name], atol=2e-5, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "layer", "exchange"])
def test_a_model_is_its_own_best_pupil(remat: str) -> None:
    """Nothing is to be learned, whatever is kept for the backward pass."""
    config = student_of((1, 1, 2), 1.0, 1.0, remat=remat, balance="none")
    with on_mesh(config):
        value, parts, gradient = value_and_gradient(config, True)
    assert abs(value) < 1e-6 and abs(float(parts.gaps.divergence.mean())) < 1e-6
    assert max(np.abs(leaf).max() for leaf in gradient.values()) < 1e-5
