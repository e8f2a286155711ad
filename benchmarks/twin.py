"""The twin of a run that saves some of its experts: it begins with the state that the rule names, which is put together
here by NumPy, and saves all of it."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from bigmac_jax.config import Config, MeshConfig
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.parameters import declared
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.checkpoint_arrays import read_arrays
from bigmac_jax.training.partial_checkpoint import EXPERTS, Learned, read_turn, set_apart, take_turn
from bigmac_jax.training.step import TrainState, make_trainer

_Leaves = dict[str, np.ndarray]


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path).removesuffix(".value")


def _items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of it."""
    return {
        "model": {"params": state.params, "rest": state.rest},
        "optimizer": {"opt_state": state.opt_state, "step": state.step},
    }


def _named(state: TrainState) -> list[tuple[str, Any]]:
    return [(_key(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(_items(state))[0]]


class Twin:
    """Compares a run with its twin, from kill to kill.

    Args:
      workdir: of the run.
      folder: where the twin lies; each time it is another.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, folder: pathlib.Path):
        self._config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        self._mesh = make_mesh(self._config, devices=jax.devices()[:1])
        self._workdir, self._folder = workdir, folder
        self._shape = config.model.moe_layers, config.model.expert_count
        with jax.set_mesh(self._mesh):
            self._abstract = make_trainer(self._config, self._mesh).abstract_state
        items = jax.tree_util.tree_flatten_with_path(_items(self._abstract), is_leaf=lambda v: isinstance(v, nnx.Param))
        params = {_key(path): node for path, node in items[0] if isinstance(node, nnx.Param)}
        self._own = {name for name, node in params.items() if declared(node).part == "experts"}
        self._begun = 0  # the step that the run last began with
        self._has = np.zeros(self._shape)  # what each expert's state had learned then, in steps
        self._lost = 0.0
        self._learned: dict[int, tuple[np.ndarray, float]] = {}  # by save: what each had learned, and what was lost

    def compare(self, run: Callable[[int], None]) -> dict[str, Any]:
        """Compares what the run has saved since its last start with what the twin saves at that step, and makes the
        twin of its next start.

        Args:
          run: trains the twin for so many steps in all.
        """
        steps = manifest.list_steps(self._workdir)
        newest = max(steps, default=0)
        result = {"saved": newest, "compared": 0, "unequal": 0}
        self._count(newest, steps)
        if newest > self._begun and self._begun:
            run(newest)
            mine, its = self._read(self._workdir, newest), self._read(self._folder, newest)
            result |= {"compared": 1, "unequal": int(not self._equal(mine, its, newest))}
        if newest:
            begun = self._begin(newest, steps)
            result |= begun | {"unequal": result["unequal"] + 1 - int(begun["restored"] and begun["agrees"])}
        return result

    def _count(self, newest: int, steps: list[int]) -> None:
        """Counts, by the loads that the run has logged, what each expert has learned at each save."""
        records = map(json.loads, (self._workdir / "metrics.jsonl").read_text().splitlines()) if newest else ()
        loads = {r["step"]: np.array(r["moe/load"]) / self._shape[1] for r in records if "moe/load" in r}
        for step in steps:
            if step > self._begun:
                since = [loads[number] for number in range(self._begun + 1, step + 1)]
                self._learned[step] = self._has + np.sum(since, axis=0), self._lost

    def _begin(self, newest: int, steps: list[int]) -> dict[str, Any]:
        """Makes the twin: each expert of the newest save that has it, all else of the newest."""
        saves = {step: self._read(self._workdir, step) for step in steps}
        leaves, oldest, (learned, lost) = dict(saves[newest]), newest, self._learned[newest]
        has = learned.copy()
        leaves |= {name: np.zeros((*self._shape, *leaves[name].shape[2:]), leaves[name].dtype) for name in self._own}
        for layer, expert in np.ndindex(self._shape):
            source = max(step for step in steps if self._place(step, layer, expert) is not None)
            for name in self._own:
                leaves[name][layer, expert] = saves[source][name][layer, self._place(source, layer, expert)]
            has[layer, expert] = self._learned[source][0][layer, expert]
            oldest = min(oldest, source)
        self._begun, self._has, self._lost = newest, has, lost + float((learned - has).sum(1).mean())
        position = json.loads((self._workdir / "checkpoints" / str(newest) / "data" / "metadata").read_bytes())
        self._write(leaves, position)
        with jax.set_mesh(self._mesh):
            reader = Checkpoints(self._workdir)
            state, joined = reader.restore(newest, self._abstract)
            reader.close()
        restored = all(leaves[name].tobytes() == np.asarray(leaf).tobytes() for name, leaf in _named(state))
        counted = self._lost / (self._lost + has.sum(1).mean())
        share = Learned.read(joined["experts"], self._shape, newest).lost_share
        agrees = abs(share - counted) <= 1e-3 * max(counted, 1e-2)  # loads are logged with four digits
        figures = {"oldest": oldest, "lost": round(share, 5), "counted": round(counted, 5)}
        return figures | {"restored": restored, "agrees": bool(agrees)}

    def _place(self, step: int, layer: int, expert: int) -> int | None:
        """Where a save has an expert of a layer; None if it lacks it."""
        turn = read_turn(self._workdir / "checkpoints" / str(step))
        place = (expert - layer - turn.first) % self._shape[1] if turn.count else expert
        return place if not turn.count or place < turn.count else None

    def _read(self, workdir: pathlib.Path, step: int) -> _Leaves:
        """The arrays of a save, as they lie there."""
        directory = workdir / "checkpoints" / str(step)
        with jax.set_mesh(self._mesh):
            turn = read_turn(directory)
            items = set_apart(take_turn(_items(self._abstract), turn), turn)
            left = manifest.list_items(directory)  # of an older one the experts alone
            found = read_arrays(directory, {item: tree for item, tree in items.items() if item in left})
        leaves = jax.tree_util.tree_flatten_with_path(found)[0]
        return {_key(path).removeprefix(f"['{EXPERTS}']"): np.asarray(leaf) for path, leaf in leaves}

    def _equal(self, mine: _Leaves, its: _Leaves, step: int) -> bool:
        """Whether a save has what the twin's whole one has of the same experts."""
        for name, leaf in mine.items():
            if name not in self._own:
                if leaf.tobytes() != its[name].tobytes():
                    return False
                continue
            for layer in range(self._shape[0]):
                for expert in range(self._shape[1]):
                    place = self._place(step, layer, expert)
                    if place is not None and leaf[layer, place].tobytes() != its[name][layer, expert].tobytes():
                        return False
        return True

    def _write(self, leaves: _Leaves, position: dict[str, Any]) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        for name in ("config.json", "run.json", "tokenizer.json", "metrics.jsonl"):
            if (self._workdir / name).exists():
                (self._folder / name).write_bytes((self._workdir / name).read_bytes())
        with jax.set_mesh(self._mesh):
            placed = [jax.device_put(leaves[name], leaf.sharding) for name, leaf in _named(self._abstract)]
            items = jax.tree.unflatten(jax.tree.structure(_items(self._abstract)), placed)
            model, optimizer = items["model"], items["optimizer"]
            state = TrainState(optimizer["step"], model["params"], model["rest"], optimizer["opt_state"])
            writer = Checkpoints(self._folder, keep=1)
            writer.save(state, {"batches": position["batches"]}, self._config, self._begun, None)
            writer.close()
