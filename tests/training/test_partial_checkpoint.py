"""Checkpoints of some of the experts: whose turn it is, what a restart takes from where, and what it loses."""

import dataclasses
import json
import pathlib
import random
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.tools import random_tokens

from bigmac_jax import tuning
from bigmac_jax.config import Config, ConfigError, TrainConfig
from bigmac_jax.data.pipeline import TrainIterator
from bigmac_jax.model.memory import checkpoint_bytes
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.parameters import Declaration, declared
from bigmac_jax.run import loop, start
from bigmac_jax.training import manifest, partial_checkpoint
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.checkpoint_arrays import DamagedError
from bigmac_jax.training.partial_checkpoint import (
    LEARNED,
    PARTS,
    WHOLE,
    Learned,
    Turn,
    join_copies,
    join_saves,
    needed_saves,
    newest_copies,
    next_turn,
    read_turn,
)
from bigmac_jax.training.step import TrainState, make_trainer
from bigmac_jax.training.workdir import write_config

from .tools import leaves_of, read_records, session, small


def turns(config: Config, shape: tuple[int, int], counts: list[int]) -> dict[int, Turn]:
    """Those of saves 1, 2, … of so many experts each."""
    saves: dict[int, Turn] = {}
    for step, count in enumerate(counts, 1):
        saves[step] = next_turn(config, saves, count, shape)
    return saves


def test_the_papers_example(tmp_path):
    """Figure 4: three experts, layers 1, 3, 5 and 7 of the model have them: 1-0, 3-1, 5-2, 7-0, then 1-1, 3-2, …"""
    config = small(tmp_path, "train.experts_per_checkpoint=1")
    saves = turns(config, (4, 3), [1, 1, 1, 1])
    assert saves[1].count == 0  # no expert has a copy before
    found = [saves[step].entries((4, 3))[1].ravel().tolist() for step in (2, 3, 4)]
    assert found == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]


def test_turns_are_even(tmp_path):
    """Over the experts of each layer, and over those of all layers, whatever N, K and the number of layers."""
    draw, config = random.Random(0), small(tmp_path, "train.experts_per_checkpoint=1")
    for _ in range(50):
        experts, layers = draw.randint(2, 40), draw.randint(1, 9)
        count, number = draw.randint(1, experts - 1), draw.randint(1, 60)
        saves = turns(config, (layers, experts), [0, *[count] * number])
        saved_YE = np.zeros((layers, experts), int)
        for turn in list(saves.values())[1:]:
            assert turn.count == count
            saved_YE[turn.entries(saved_YE.shape)] += 1
        assert (saved_YE.sum(1) == count * number).all() and np.ptp(saved_YE, axis=1).max() <= 1
        assert newest_copies(saves, "weights", saved_YE.shape).min() >= max(1, number + 1 - -(-experts // count))


@pytest.mark.parametrize("of", ["weights", "optimizer", "both"])
def test_a_turn_is_of_what_is_asked_for(of, tmp_path):
    config = small(tmp_path, "train.experts_per_checkpoint=1", f"train.partial_checkpoint={of}")
    assert turns(config, (4, 3), [0, 1, 1]) == {1: Turn(0, 0, of), 2: Turn(0, 1, of), 3: Turn(1, 1, of)}


def brute_copies(saves: dict[int, Turn], part: str, shape: tuple[int, int], last: int) -> list[list[int]]:
    def has(turn: Turn, layer: int, expert: int) -> bool:
        own = {(layer + turn.first + j) % shape[1] for j in range(turn.count)}
        return turn.count == 0 or turn.of not in (part, "both") or expert in own

    return [
        [max((s for s, turn in saves.items() if s <= last and has(turn, i, e)), default=-1) for e in range(shape[1])]
        for i in range(shape[0])
    ]


def test_what_is_needed():
    """By the rule, written out: of each part of each expert the newest save that has it."""
    draw = random.Random(1)
    for _ in range(50):
        shape = draw.randint(1, 4), draw.randint(2, 9)
        steps = draw.sample(range(1, 100), draw.randint(1, 9))
        saves = {
            step: Turn(draw.randrange(shape[1]), draw.randrange(shape[1]), draw.choice(["both", *PARTS]))
            for step in steps
        }
        newest = sorted(steps)[-draw.randint(1, 3) :]
        needed = {*newest, max([step for step, turn in saves.items() if turn.count == 0], default=newest[0])}
        for part in PARTS:
            assert newest_copies(saves, part, shape).tolist() == brute_copies(saves, part, shape, 100)
            for last in newest:
                needed |= {s for row in brute_copies(saves, part, shape, last) for s in row} - {-1}
        assert needed_saves(saves, newest, shape) == needed


def test_how_many_are_saved():
    """K doubles with each restart that asks for it, until all are saved; another K begins anew."""
    learned = Learned.read(None, (2, 8), 4).asked_for(3)
    assert learned.updates_YE.tolist() == [[0.5] * 8] * 2 and learned.in_a_save == 3  # as if even until then
    doubled = learned._replace(doubled=1)
    assert doubled.in_a_save == 6 and doubled._replace(doubled=2).in_a_save == 0
    assert (
        doubled.asked_for(3) is doubled and doubled.asked_for(2).in_a_save == 2 and doubled.asked_for(0).in_a_save == 0
    )
    again = Learned.read(json.loads(json.dumps(doubled.to_json())), (2, 8), 9)
    assert again.to_json() == doubled.to_json()


def test_what_is_lost():
    """Two layers of two experts; 3 steps, a save of expert 0 alone, 1 step, another save; by hand."""
    learned = {
        1: Learned(np.array([[0.5, 0.5], [0.25, 0.75]]), asked=1),
        4: Learned(np.array([[1.5, 2.5], [1.0, 3.0]]), lost=0.5, asked=1, doubled=1),
    }
    joined = join_copies(learned, np.array([[4, 1], [1, 4]]))
    assert joined.updates_YE.tolist() == [[1.5, 0.5], [0.25, 3.0]]
    assert joined.lost == 0.5 + (2 + 0.75) / 2 and joined.doubled == 1
    assert joined.lost_share == 1.875 / (1.875 + (2 + 3.25) / 2)
    whole = join_copies(learned, np.full((2, 2), 4))  # nothing is lost
    assert whole.to_json() == learned[4].to_json()


MESHES = {
    "one": (),
    "experts": ("mesh.expert=4", "mesh.data=2", "mesh.fsdp=True"),
    "host": ("mesh.expert=2", "mesh.data=2", "execution.offload_optimizer=True"),
    "all": ("mesh.node=2", "mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=True", "mesh.split_experts=True"),
    "replicas": ("mesh.replica=2", "mesh.expert=2", "mesh.data=2", "mesh.fsdp=True", "mesh.replica_optimizer=sharded"),
}
OPTIMIZER = ("optimizer.name=muon", "optimizer.average_decay=0.5", "optimizer.moment_dtype=bfloat16")


def expert_leaves(state: Any) -> dict[str, str]:
    """The names of the experts' leaves of a state, and which part each is of; found by their declarations."""
    found = {}
    for name, tree in (("params", state.params), ("average", state.average), ("opt_state", state.opt_state)):
        is_leaf = {"is_leaf": lambda node: hasattr(node, "declaration")}
        for path, node in jax.tree_util.tree_flatten_with_path(tree, **is_leaf)[0]:
            if hasattr(node, "declaration") and declared(node).part == "experts":
                key = f"{name}{jax.tree_util.keystr(path)}"
                found[key] = "optimizer" if name == "opt_state" else "weights"
    return found


def by_name(state: Any) -> dict[str, np.ndarray]:
    names = ("step", "params", "average", "opt_state", "rest")
    return {
        f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for name in names
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, name))[0]
    }


def saved_steps(folder: pathlib.Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("mesh", "of"),
    [
        ("one", "both"),
        *(
            pytest.param(mesh, of, marks=pytest.mark.full)
            for mesh in ("experts", "host", "all", "replicas")
            for of in ("both", *PARTS)
        ),
    ],
)
def test_each_expert_is_of_the_save_that_the_rule_names(tmp_path, mesh, of):
    """Bit by bit, with both optimizers and the average; everything else is of the newest save. As many saves stay as
    are needed, and no more."""
    layers, experts, K = 2, 8, 3
    config = small(
        tmp_path, f"model.num_layers={layers}", *(OPTIMIZER if mesh != "one" else ()), *MESHES[mesh],
        f"train.experts_per_checkpoint={K}",
        f"train.partial_checkpoint={of}", "train.keep_checkpoints=1",
    )  # fmt: skip
    states, saves = {}, {}
    workdir = tmp_path / "run"
    workdir.mkdir()
    learned = Learned(np.zeros((layers, experts)))
    with session(config) as run:
        checkpoints = Checkpoints(workdir, keep=1)
        for step in range(1, 6):
            metrics = run.step(random_tokens(config, step))
            learned.add(metrics.parts.aux.load)
            checkpoints.save(run.state, {"batches": step}, config, step, None, K, learned)
            states[step] = by_name(run.state)
            # The first is whole; then layer i has (i + c·K + j) mod N.
            saves[step] = WHOLE if step == 1 else Turn((step - 2) * K % experts, K, of)
        checkpoints.wait()
        copies = {part: np.array(brute_copies(saves, part, (layers, experts), 5)) for part in PARTS}
        folder = workdir / "checkpoints"
        assert saved_steps(folder) == {int(step) for part in PARTS for step in copies[part].flat} | {1, 5}
        rest = {step for step in saved_steps(folder) if (folder / str(step) / "model").exists()}
        assert rest == ({1, 4, 5} if of == "both" else saved_steps(folder))  # of older ones the experts alone
        own = expert_leaves(run.state)
        state, position = checkpoints.restore(5, run.trainer.abstract_state)
        restored = by_name(state)
        checkpoints.close()
    assert len(own) >= 6 and restored.keys() == states[5].keys()
    for name, found in restored.items():
        if name not in own and name.removesuffix(".value") not in own:
            assert found.tobytes() == states[5][name].tobytes(), name
            continue
        part = own.get(name) or own[name.removesuffix(".value")]
        for i in range(layers):
            for e in range(experts):
                wanted = states[copies[part][i, e]][name]
                assert found[i, e].tobytes() == wanted[i, e].tobytes(), (name, i, e)
    assert position["batches"] == 5 and position["experts"]["lost"] > 0


@pytest.mark.parametrize(("newest", "doubled"), [(WHOLE, 1), (Turn(0, 4, "both"), 2)], ids=["whole", "half"])
def test_only_who_loses_more_saves_more(newest: Turn, doubled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lost before, above the limit though it is, has doubled K once already."""
    monkeypatch.setattr(partial_checkpoint, "expert_shape", lambda params: (2, 8))
    train = TrainConfig(experts_per_checkpoint=2, most_lost_updates=0.1)
    learned = {
        4: Learned(np.full((2, 8), 4.0), lost=9.0, asked=2, doubled=1),
        5: Learned(np.full((2, 8), 5.0), lost=9.0, asked=2, doubled=1),
    }
    items = {"model": {"params": {"scale": np.ones(3)}}}

    def read(step: int, wanted: Any) -> tuple[Any, Any]:
        return items, {LEARNED: learned[step].to_json()}

    _, position, line = join_saves(5, {4: WHOLE, 5: newest}, items, read, train)
    again = Learned.read(position[LEARNED], (2, 8), 5)
    assert (again.doubled, again.lost > 9, bool(line)) == (doubled, doubled == 2, doubled == 2)


@pytest.mark.parametrize(
    ("asked", "most", "doubled"),
    [(2, 13 / 49, 1), (2, 0.265, 2), (0, 0.1, 1), (None, 0.0, 1)],
    ids=["at the limit", "above it", "a run that saves all", "a reader"],
)
def test_what_a_restart_loses_is_a_line(
    asked: int | None, most: float, doubled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a layer's eight experts are a step older: 4 choices are lost beside 9, of 13 + 4 · 4 + 4 · 5."""
    monkeypatch.setattr(partial_checkpoint, "expert_shape", lambda params: (2, 8))
    items: Any = {"model": {"params": {"scale": np.ones(3)}}}
    train = None if asked is None else TrainConfig(experts_per_checkpoint=asked, most_lost_updates=most)

    def read(step: int, wanted: Any) -> tuple[Any, Any]:
        learned = Learned(np.full((2, 8), float(step)), lost=9.0, asked=2, doubled=1)
        return items, {"batches": step, LEARNED: learned.to_json()}

    saves = {2: WHOLE, 4: WHOLE, 5: Turn(6, 4, "both"), 6: WHOLE}
    _, position, line = join_saves(5, saves, items, read, train)
    found = Learned.read(position[LEARNED], (2, 8), 5)
    assert position["batches"] == 5 and (found.lost, found.doubled) == (13.0, doubled)
    assert found.updates_YE.tolist() == [[5, 5, 4, 4, 4, 4, 5, 5], [5, 5, 5, 4, 4, 4, 4, 5]]
    said = "8 of 16 experts are of saves before step 5, the oldest of step 4 (train.experts_per_checkpoint); 26.53% of "
    more = ", above train.most_lost_updates: from here on a save holds twice as many, or all"
    assert line == f"{said}the experts' updates so far are lost{more if doubled == 2 else ''}"
    with pytest.raises(DamagedError, match=r"holds expert 2 of layer 0 \(counted from 0\)"):
        join_saves(5, {5: Turn(6, 4, "both"), 6: WHOLE}, items, read, train)


def test_as_many_as_there_are_is_a_whole_save() -> None:
    learned = Learned.read(None, (2, 8), 4)
    assert [learned.asked_for(asked).in_a_save for asked in (0, 1, 7, 8, 9)] == [0, 1, 7, 0, 0]
    assert learned.asked_for(4)._replace(doubled=1).in_a_save == 0
    config = Config()
    counts = [next_turn(config, {3: Turn(1, 7), 2: WHOLE}, count, (2, 8)) for count in (7, 8, 9)]
    assert [(turn.first, turn.count) for turn in counts] == [(0, 7), (0, 0), (0, 0)]
    assert learned.lost_share == 0 and Learned(np.zeros((2, 8))).lost_share == 0
    assert Learned(np.zeros((0, 0)), lost=3.0).lost_share == 0  # of a model without experts
    assert Learned(np.full((2, 8), 0.25), lost=2.0).lost_share == 0.5


class FaultError(Exception):
    """The machine goes away."""


def run(config: Config, workdir: pathlib.Path, fault: int = 0) -> None:
    """Trains to the end, or until the fault, which the step of this number meets."""

    def next_batch(self: TrainIterator) -> Any:
        if fault and self.get_state()["batches"] >= fault - 1:
            raise FaultError
        return given(self)

    given = TrainIterator.__next__
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(config)):
        patch.setattr(TrainIterator, "__next__", next_batch)
        if fault:
            with pytest.raises(FaultError):
                loop.train(config, workdir)
        else:
            assert loop.train(config, workdir).finished


def count_lost(workdir: pathlib.Path, saves: dict[int, Turn], step: int, shape: tuple[int, int]) -> float:
    """The share of the choices until `step` that experts have not learned from, by the loads in metrics.jsonl."""
    loads = {r["step"]: np.array(r["moe/load"]) / shape[1] for r in read_records(workdir) if "moe/load" in r}
    copies = brute_copies(saves, "weights", shape, step)
    lost = sum(loads[s][i][e] for s in range(1, step + 1) for i in range(shape[0]) for e in range(shape[1])
               if s > copies[i][e])  # fmt: skip
    return lost / (step * shape[0])


@pytest.mark.full
def test_a_run_with_a_fault(tmp_path, capsys, caplog):
    """The saves are those of the rule; a start says what is lost, and goes on as a run from that state does; too much
    doubles K; what others read is whole, and so are the best and the last save."""
    config = small(
        tmp_path, "model.num_layers=2", "train.experts_per_checkpoint=2", "train.steps=13", "train.eval_every=8",
        "train.keep_checkpoints=2", "optimizer.decay_steps=20",
    )  # fmt: skip
    workdir = tmp_path / "run"
    run(config, workdir, fault=12)
    # Whole are the first, and the best, that of step 8, the first that was evaluated.
    saves = {2: WHOLE, 4: Turn(0, 2), 6: Turn(2, 2), 8: WHOLE, 10: Turn(4, 2)}
    folder = workdir / "checkpoints"
    assert {int(path.name): read_turn(path).count for path in folder.iterdir()} == {8: 0, 10: 2}
    with pytest.raises(ConfigError, match=r"step=10 .*some of the experts .*; use a whole one of \[8\], or go on"):
        tuning.restore(workdir, "10")
    caplog.clear()
    tuning.restore(workdir)
    assert "checkpoint 10 holds some of the experts (train.experts_per_checkpoint); 8, which is" in caplog.text

    # The same state, as a whole save of another workdir.
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, experts_per_checkpoint=0))
    shutil.copytree(workdir, tmp_path / "whole")
    with jax.set_mesh(make_mesh(config)):
        reader = Checkpoints(workdir)
        state, position = reader.restore(10, make_trainer(config, jax.sharding.get_mesh()).abstract_state)
        reader.close()
        shutil.rmtree(tmp_path / "whole" / "checkpoints")
        writer = Checkpoints(tmp_path / "whole", keep=1)
        writer.save(state, {"batches": position["batches"]}, whole, 10, None)
        writer.close()
    capsys.readouterr()
    run(config, workdir)
    share = count_lost(workdir, saves, 10, (2, 8))
    said = "12 of 16 experts are of saves before step 10, the oldest of step 8 (train.experts_per_checkpoint); "
    said += f"{share:.2%} of the experts' updates so far are lost, above train.most_lost_updates: from here on "
    assert said in capsys.readouterr().err
    (record,) = (record for record in read_records(workdir) if "checkpoint/lost_updates" in record)
    assert record["step"] == 10 and record["checkpoint/experts"] == 4
    np.testing.assert_allclose(record["checkpoint/lost_updates"], share, rtol=1e-3)
    assert {int(path.name): read_turn(path).count for path in folder.iterdir()} == {
        8: 0,
        10: 2,
        12: 4,
        13: 0,
    }  # 12 needs 10
    assert read_turn(folder / "12").first == 6
    run(whole, tmp_path / "whole")
    chex.assert_trees_all_equal(leaves_of(config, workdir, 13), leaves_of(whole, tmp_path / "whole", 13))


@pytest.mark.full
@pytest.mark.parametrize("damaged", [(3,), (4,), (5,), (3, 4, 5)])
def test_damage_to_a_save(tmp_path, caplog, capsys, damaged):
    """Another one that has the expert takes its place, at last the whole one; which, and what is lost, is said."""
    config = small(tmp_path, "train.experts_per_checkpoint=3", "train.keep_checkpoints=1", "model.num_layers=2")
    workdir, learned = tmp_path / "run", Learned(np.zeros((2, 8)))
    workdir.mkdir()
    states = {}
    with session(config) as run:
        checkpoints = Checkpoints(workdir, keep=2)
        for step in range(1, 6):
            learned.add(run.step(random_tokens(config, step)).parts.aux.load)
            checkpoints.save(run.state, {"batches": step}, config, step, None, 3, learned)
            states[step] = by_name(run.state)
        checkpoints.close()
        saves = {step: WHOLE if step == 1 else Turn((step - 2) * 3 % 8, 3) for step in range(1, 6)}
        for path in (path for step in damaged for path in (workdir / "checkpoints" / str(step)).glob("*/d/*")):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        checkpoints = Checkpoints(workdir, keep=2)
        step, state, _ = checkpoints.restore_newest(run.trainer.abstract_state)
        found = by_name(state)
        checkpoints.close()
        own = expert_leaves(run.state)
    assert step == {(5,): 4, (3, 4, 5): 1}.get(damaged, 5)  # of step 2 the experts alone are left
    for number in damaged:
        del saves[number]
        assert f"checkpoint {number} is damaged: " in caplog.text
    copies = brute_copies(saves, "weights", (2, 8), step)
    for name in own:
        key = name if name in found else f"{name}.value"
        for i in range(2):
            for e in range(8):
                assert found[key][i, e].tobytes() == states[copies[i][e]][key][i, e].tobytes()
    oldest = min(min(row) for row in copies)
    assert (f"the oldest of step {oldest} " in capsys.readouterr().out) == (oldest < step)


@pytest.mark.parametrize(("structure", "saves_some"), [("bigmac", True), ("dense", False)])
def test_a_model_without_experts_is_saved_whole(tmp_path: pathlib.Path, structure: str, saves_some: bool) -> None:
    """Whatever is asked: there is no expert whose turn it could be."""
    config = small(tmp_path, f"model.structure={structure}", "train.experts_per_checkpoint=1")
    of_run: Any = SimpleNamespace(config=config, first_step=0)
    assert (loop._Run._learned(of_run, {}) is not None) == saves_some


def three_experts(step: int) -> TrainState:
    """A state of one layer with three experts, and nothing else."""
    of = Declaration("eRF", "experts", 1.0)
    w, moment = (nnx.Param(jnp.full((1, 3, 1, 1), step, jnp.float32), declaration=of) for _ in range(2))
    return TrainState(jnp.asarray(step), {"w": w}, {}, {"w": moment})


@pytest.fixture
def stripped(tmp_path: pathlib.Path) -> Iterator[tuple[Config, pathlib.Path, Checkpoints]]:
    """A run that has saved 10 (whole) to 40, of one expert: of 20 the experts alone are left, 30 and 40 are damaged."""
    config, workdir = small(tmp_path, "train.experts_per_checkpoint=1"), tmp_path / "run"
    with jax.set_mesh(make_mesh(config)):
        checkpoints = Checkpoints(workdir, keep=1)
        for step in (10, 20, 30, 40):
            save_one(checkpoints, config, step)
        folder = workdir / "checkpoints"
        assert saved_steps(folder) == {10, 20, 30, 40} and not (folder / "20" / "model").exists()
        for step in ("30", "40"):
            (folder / step / "model" / "_METADATA").unlink()
        yield config, workdir, checkpoints
        checkpoints.close()


def save_one(checkpoints: Checkpoints, config: Config, step: int) -> None:
    checkpoints.save(three_experts(step), {"batches": step}, config, step, None, 1, Learned(np.ones((1, 3)), asked=1))
    checkpoints.wait()


def restored(checkpoints: Checkpoints) -> tuple[int, list[float]]:
    """The step that a start goes on from, and what each expert is of."""
    abstract = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), three_experts(0))
    step, state, _ = checkpoints.restore_newest(abstract)
    return step, np.asarray(state.params["w"].get_value()).ravel().tolist()


def test_saves_behind_the_restored_one_are_set_aside(stripped: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where the experts alone are left of them: the run takes these steps again, and writes each save."""
    config, workdir, checkpoints = stripped
    assert restored(checkpoints) == (10, [10] * 3) and checkpoints.latest() == 10
    assert "checkpoint 20 holds experts alone, of steps that are taken again; it is passed over, and" in caplog.text
    assert saved_steps(workdir / "checkpoints-damaged") == {20, 30, 40} and saved_steps(workdir / "checkpoints") == {10}
    for step in (15, 20, 25, 30):
        save_one(checkpoints, config, step)
        assert checkpoints.latest() == step
    assert "could not be written" not in caplog.text
    assert saved_steps(workdir / "checkpoints") == {10, 20, 25, 30}
    assert not (workdir / "checkpoints" / "20" / "model").exists()
    assert restored(checkpoints) == (30, [30, 20, 25])


def test_a_run_without_a_whole_save_opens_the_model_that_it_began_with(stripped: Any, monkeypatch: Any) -> None:
    config, workdir, _ = stripped
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(workdir / "before")))
    write_config(config, workdir)
    monkeypatch.setattr(start.pretrained, "open_init_from", lambda *_: "the model")
    assert start._open_models(config, workdir) == (True, (None, None))
    for step in (10, 30, 40):  # 20 are experts alone
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert start._open_models(config, workdir) == (True, ("the model", None))


@pytest.mark.full
def test_a_run_that_begins_anew_loses_no_save(stripped: Any) -> None:
    """What is left of a run that nothing can go on from is removed, where the user has removed what was set aside."""
    config, workdir, checkpoints = stripped
    shutil.rmtree(workdir / "checkpoints" / "10")
    with pytest.raises(ConfigError, match="no intact checkpoint is left"):
        checkpoints.restore_newest(three_experts(0))
    shutil.rmtree(workdir / "checkpoints-damaged")
    assert checkpoints.restore_newest(three_experts(0)) is None and checkpoints.latest() is None
    assert not (workdir / "checkpoints-damaged").exists()
    save_one(checkpoints, config, 5)
    assert checkpoints.latest() == 5 and checkpoints.holds_all(5)


@pytest.mark.full
@pytest.mark.parametrize("of", ["both", *PARTS])
def test_bytes_on_disk(tmp_path, of):
    """C = (P_ne + K/N · P_e)(B_w + B_o), parts that are not split are whole; on the disk, and as plan.py counts."""
    config = small(
        tmp_path, "model.num_layers=2", "model.hidden_size=128", "model.num_experts=16", "model.expert_hidden_size=128",
        "train.experts_per_checkpoint=1", f"train.partial_checkpoint={of}", "model.down_ratio=0.5",
    )  # fmt: skip
    workdir, learned, sizes = tmp_path / "run", Learned(np.zeros((2, 16))), {}
    workdir.mkdir()
    with session(config) as run:
        checkpoints = Checkpoints(workdir, keep=2)
        for step in (1, 2):
            run.step(random_tokens(config, step))
            checkpoints.save(run.state, {"batches": step}, config, step, None, 1, learned)
            checkpoints.wait()
            folder = workdir / "checkpoints" / str(step)
            sizes[step] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        leaves = {name: leaf.nbytes for name, leaf in by_name(run.state).items() if not name.startswith("rest")}
        own = expert_leaves(run.state)
        checkpoints.close()
    parts = {name: own.get(name) or own.get(name.removesuffix(".value")) for name in leaves}
    whole = sum(leaves.values())
    partial = whole - 15 / 16 * sum(
        n for name, n in leaves.items() if parts[name] in (PARTS if of == "both" else (of,))
    )
    assert sum(n for name, n in leaves.items() if parts[name]) > 0.6 * whole
    np.testing.assert_allclose([checkpoint_bytes(config), checkpoint_bytes(config, 1)], [whole, partial], rtol=1e-4)
    assert sizes[2] / sizes[1] == pytest.approx(partial / whole, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("failing", [1, 3, 4])
def test_a_save_that_fails(tmp_path, monkeypatch, failing, behind):
    """It takes no copy away: after each of the saves behind it a restart finds every expert."""
    config = small(tmp_path, "train.experts_per_checkpoint=3", "model.num_layers=2")
    workdir, learned = tmp_path / "run", Learned(np.zeros((2, 8)))
    workdir.mkdir()
    write, finalize, states, made = Checkpoints.save, manifest.write, {}, {}

    def break_down(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with session(config) as run:
        checkpoints = Checkpoints(workdir, keep=1)
        for step in range(1, 8):
            learned.add(run.step(random_tokens(config, step)).parts.aux.load)
            states[step] = by_name(run.state)
            with monkeypatch.context() as patch:
                if step == failing and behind:
                    patch.setattr(manifest, "write", break_down)
                elif step == failing:
                    patch.setattr(checkpoints._manager, "save", break_down)
                write(checkpoints, run.state, {"batches": step}, config, step, None, 0 if step == 3 else 3, learned)
                checkpoints.wait()
            if step >= 2 or failing > 1:
                found = read_all(workdir, run.trainer.abstract_state)
                assert found.step == (step if step != failing else step - 1)
                made[step] = {n: turn.count for n, turn in found.turns.items()}
                assert found.state["step"] == states[found.step]["step"]
        checkpoints.close()
        own = expert_leaves(run.state)
    assert finalize is manifest.write and set(own) and made[7][7] == 3


class Found(NamedTuple):
    step: int
    turns: dict[int, Turn]
    state: dict[str, np.ndarray]


def read_all(workdir: pathlib.Path, abstract: Any) -> Found:
    """What a restart finds."""
    folder = workdir / "checkpoints"
    reader = Checkpoints(workdir)
    step = max(saved_steps(folder))
    state, _ = reader.restore(step, abstract)
    reader.close()
    return Found(step, {number: read_turn(folder / str(number)) for number in saved_steps(folder)}, by_name(state))
