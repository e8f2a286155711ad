"""The training step's loss and gradients against `oracle`, for drawn combinations.

    python -m pytest tests/oracle -m full                                  # 200 combinations
    ORACLE_SEED=7 ORACLE_CASES=50 python -m pytest tests/oracle -m full     # others

What is said of a case has its seed: ORACLE_SEED=SEED ORACLE_CASES=1 runs it alone.
"""

import gc
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from model.tools import leaf_name, leaves

from bigmac_jax.data.batch import Batch
from bigmac_jax.model.mesh import batch_spec, make_mesh, place
from bigmac_jax.training.step import make_trainer

from .draw import Case, drawn, made, sample, value
from .oracle import Expected, Given, Oracle, Sample, Values, is_router

FIRST, CASES = int(os.environ.get("ORACLE_SEED", "0")), int(os.environ.get("ORACLE_CASES", "200"))
TOLERANCE = 1e-5
# Values are drawn again, and after REDRAWS the case, where float32 can't be compared with float64 like that: a choice
# of experts hangs on less than CLEAR of a score, or a gradient moves by more than STEEP of its leaf's largest entry
# when each parameter is rounded once. The oracle alone says so; the program, which rounds after each operation, was
# within five times that.
CLEAR, STEEP, REDRAWS = 1e-4, 1.5e-6, 50
# A bias that is solved for its own step (balance_step=same) leaves a token of each expert just below the edge of being
# chosen, by up to 2e-6: there float32 has less room.
CLEAR_OF_EDGES = 5e-7


class IncomparableError(Exception):
    """No values of a case were found that can be compared."""


class Program(NamedTuple):
    """What the program makes of a case."""

    metrics: Any
    gradients: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]  # of the routers, as the step leaves them


class Checked(NamedTuple):
    """What a comparison has found."""

    worst: float  # the largest max|a - b| / max|b|
    where: str
    steep: float  # how the values were, see STEEP
    redrawn: int  # times that values were drawn again


def check(case: Case) -> Checked:
    """Compares the program with the oracle.

    Raises:
      AssertionError: which leaves differ by how much.
      IncomparableError: see CLEAR and STEEP.
    """
    clear = CLEAR if case.config.model.balance_step == "next" else CLEAR_OF_EDGES
    with jax.set_mesh(make_mesh(case.config)):
        trainer, program = make_trainer(case.config, jax.sharding.get_mesh(), case.teacher), None
        oracle = Oracle(case.config, case.teacher)
        for again in range(REDRAWS):
            draw = np.random.default_rng((case.seed, again))
            state, batch = _state(trainer.abstract_state, draw), sample(case, draw)
            placed = jax.tree.map(lambda v, of: jax.device_put(v, of.sharding), state, trainer.abstract_state)
            placed_batch = place(batch, batch_spec(2))
            if program is None:
                program = trainer.step.lower(placed, placed_batch, trainer.rate(0)).compile()
            found = _read(program(placed, placed_batch, trainer.rate(int(state.step))))
            given = leaves(state.params), _given(case, state, found), _whole(batch)
            expected = oracle(*given)
            if (
                expected.report.layers.margin >= clear
                and (steep := _steepness(case, oracle, expected, *given)) <= STEEP
            ):
                break
        else:
            raise IncomparableError(case.describe())
    differences = _differences(case, found, expected)
    wrong = [f"{name}: {how}" for name, (size, how) in differences.items() if not size <= TOLERANCE]
    assert not wrong, "\n".join(
        [case.describe(), f"a rounding of all parameters moves the gradients by {steep:.1e}", *wrong]
    )
    where = max(differences, key=lambda name: differences[name][0])
    return Checked(differences[where][0], where, steep, again)


def _steepness(case: Case, oracle: Oracle, expected: Expected, trained: Values, given: Given, batch: Sample) -> float:
    """By how much, over max|b| of its leaf, a gradient moves if every parameter is rounded."""
    draw = np.random.default_rng(0)

    def rounded(v: Any) -> Any:
        return v * (1 + 2.0**-24 * draw.choice([-1.0, 1.0], size=v.shape)) if v.dtype.kind == "f" else v

    moved = [oracle(*jax.tree.map(rounded, (trained, given)), batch).gradients for _ in range(3)]
    found = [_difference(case, name, of[name], expected.gradients[name], expected)[0] for of in moved for name in of]
    return max(found)


def _state(abstract: Any, draw: np.random.Generator) -> Any:
    """A state of NumPy arrays with drawn values; the optimizer's are zero."""

    def fill(path: Any, leaf: Any) -> np.ndarray:
        name = leaf_name(path)
        begun = name == "step" or name.startswith("opt_state")
        return np.zeros(leaf.shape, leaf.dtype) if begun else value(name, leaf.shape, draw)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def _given(case: Case, state: Any, found: Program) -> Given:
    """What the oracle is told beside the parameters that are trained."""
    of_teacher = {} if state.teacher is None else leaves(state.teacher)
    biases = {name: v for name, v in of_teacher.items() if "router_bias" in name}
    return Given(
        leaves(state.rest),
        {name: v for name, v in found.biases.items() if "router_bias" in name}
        if case.config.model.balance_step == "same"
        else {},
        {} if state.base is None else leaves(state.base),
        {name: v for name, v in of_teacher.items() if name not in biases},
        biases,
    )


def _whole(batch: Batch) -> Sample:
    """A batch with a document in each row, if it says nothing of documents."""
    nothing = np.zeros_like(batch.inputs_BL)
    segments_BL = nothing if batch.segments_BL is None else batch.segments_BL
    reference_BL = nothing.astype(np.float32) if batch.reference_BL is None else batch.reference_BL
    return Sample(batch.inputs_BL, batch.targets_BL, segments_BL, reference_BL)


def _read(stepped: tuple[Any, Any]) -> Program:
    """What a step says; its gradients are the first moments (`draw.READABLE`)."""
    state, metrics = stepped
    moments = {name: v for name, v in leaves(state.opt_state).items() if re.search(r"\bmu\.", name)}
    gradients = {re.split(r"\bmu\.", name)[1]: v for name, v in moments.items()}
    return Program(jax.tree.map(np.asarray, metrics), gradients, leaves(state.rest))


def _differences(case: Case, found: Program, expected: Expected) -> dict[str, tuple[float, str]]:
    """By name: max|a - b| / max|b|, and it in words."""
    m, report, parts = case.config.model, expected.report, found.metrics.parts
    norm = np.sqrt(sum((g**2).sum() for g in expected.gradients.values()))
    pairs = {
        "loss": (found.metrics.loss, expected.loss),
        "gradient's norm": (found.metrics.grad_norm, norm),
        "loss of the text": (parts.cross_entropy, report.text),
    }
    if m.is_moe:
        assert not parts.aux.drop_rate.any(), "choices were dropped"
        pairs |= {
            "load": (parts.aux.load, report.layers.load_YE),
            "z-loss": (parts.aux.z_loss, report.layers.z_Y),
            "entropy": (parts.aux.router_entropy, report.layers.entropy_Y),
        }
        if m.balance == "aux_loss":
            pairs["balance loss"] = (parts.aux.balance_loss, report.layers.balance_Y)
    if m.balance_step == "same":
        # Each of the four steps finds a bias to 1e-6 of its range, 2 or a little more, and passes that on to the next.
        (solved_YE,) = (v for name, v in found.biases.items() if "router_bias" in name)
        np.testing.assert_allclose(solved_YE, report.layers.bias_YE, rtol=0, atol=2e-5, err_msg=case.describe())
    if parts.gaps is not None:
        pairs |= {
            "divergence": (parts.gaps.divergence, report.divergence),
            "gaps": (parts.gaps.hidden_Y, report.hidden_Y),
        }
    if parts.pairs is not None:
        pairs["accuracy"] = (parts.pairs.accuracy, report.accuracy)
        pairs["margin"] = (parts.pairs.margin, report.reward_margin)
    frozen = set() if case.config.tuning.train_router else {n for n in expected.gradients if is_router(n)}
    assert found.gradients.keys() == expected.gradients.keys() - frozen
    assert len(found.gradients) > 1 and not any(expected.gradients[name].any() for name in frozen)
    pairs |= {name: (found.gradients[name], expected.gradients[name]) for name in found.gradients}
    return {name: _difference(case, name, *pair, expected) for name, pair in pairs.items()}


def _difference(case: Case, name: str, a: Any, b: Any, expected: Expected) -> tuple[float, str]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{name}: {a.shape}, not {b.shape}; {case.describe()}"
    difference, size = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    m = case.config.model
    if name.endswith("attention.key.b_F") and m.positions != "rope" and not m.qk_norm:
        # It adds the same to all scores of a query, which a softmax does not see: zero, but for rounding. What would
        # come of a mistake is as large as the gradient of the query's bias.
        difference = max(np.abs(a).max(), size)
        size = np.abs(expected.gradients[name.replace("key", "query")]).max()
    elif name == "margin":  # a mean of numbers of both signs
        size = expected.report.reward_size
    relative = difference / size if size else 0.0 if not difference else np.inf
    return relative, f"max|a - b| = {difference:.3g}, max|b| = {size:.3g}, {relative:.3g}"


SMALL = {"hidden_size": 16, "num_heads": 2, "num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "norm_eps": 1e-2}
QUICKLY = {"unroll_layers": 1, "exchange": "gather", "attention": "xla", "grouped_matmul": "blocks"}
MADE = "two of three choices, a matrix that is made"
FIXED = {
    "padding, parts of one row, two ranks": made(
        1,
        SMALL | {"num_layers": 1, "balance_coefficient": 0.05, "z_loss_coefficient": 0.01, "down_ratio": 0.5},
        (1, 1, 2, 1),
        parts=2,
        documents="masked",
        padded=True,
        execution=QUICKLY,
    ),
    MADE: made(
        3,
        SMALL | {"num_layers": 1, "top_k": 3, "router": "hyper", "hyper_width": 6, "balance_coefficient": 0.05},
        (1, 1, 2, 1),
        parts=2,
        rows=2,
        execution=QUICKLY,
        choices_from=2,
    ),
    "dense, preferences in parts": made(
        2,
        SMALL | {"structure": "dense", "positions": "learned"},
        rows=2,
        parts=2,
        padded=True,
        tuning={"objective": "dpo", "lora_rank": 2},
        execution=QUICKLY,
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] if name == MADE else []) for name, case in FIXED.items()],
    ids=FIXED.keys(),
)  # fmt: skip
def test_fixed(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_drawn(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails with the case's seed and fields, and the leaves that differ."""
    for case in drawn(seed):
        with capsys.disabled():
            print(f"\n{1 + seed - FIRST} of {CASES}, {case.describe()}", flush=True)
            try:
                found = check(case)
            except IncomparableError:
                print("    too steep for float32: another combination", flush=True)
                continue
            again = f", values drawn {1 + found.redrawn} times" if found.redrawn else ""
            print(f"    {found.worst:.1e} at most, in {found.where}{again}", flush=True)
            break
    # Programs of other cases are of no use, and 200 of them take gigabytes.
    jax.clear_caches()
    gc.collect()
