"""Orbax checkpoints: parameters, optimizer, data position, config and what run.json says; a directory a step, written
in the background. It may hold some of the experts (`partial_checkpoint`).

Before one is read its files are compared with its manifest, and while they are read its arrays with their checksums; a
damaged one is named and passed over.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from bigmac_jax.config import Config, ConfigError, TrainConfig
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.runtime.clock import clock
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint_arrays import (
    DamagedError,
    check_shapes,
    describe_padding,
    find_nonfinite,
    os_code,
    read_arrays,
)
from bigmac_jax.training.checkpoint_folder import CheckpointFolder
from bigmac_jax.training.orbax_manager import METRIC, open_manager
from bigmac_jax.training.partial_checkpoint import (
    EXPERTS,
    LEARNED,
    TURN,
    WHOLE,
    Items,
    Learned,
    Turn,
    expert_shape,
    join_saves,
    needed_saves,
    next_turn,
    read_turn,
    set_apart,
    take_turn,
)
from bigmac_jax.training.step import TrainState, evaluated_params
from bigmac_jax.training.workdir import read_run_json

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a workdir. A directory appears under its final name only when it is complete.

    Args:
      keep: so many of the newest are kept, with those that they take experts from, and the best. None is for a reader:
        it moves and removes nothing, not even what a process that trains is just writing.
    """

    def __init__(self, workdir: pathlib.Path, keep: int | None = None):
        self._folder = CheckpointFolder(workdir)
        self._keep = keep
        self._saving: int | None = None  # the step of the save in progress
        self._shape = (0, 0)  # layers with experts, and experts
        self._stripped = set[int]()  # saves of which the experts alone are left
        if keep is not None:
            hosts.run_on_first(self._folder.tidy)
        self._turns = self._read_turns()
        self._manager = self._open()

    def _read_turns(self) -> dict[int, Turn]:
        """Which experts each save holds."""

        def read() -> list[Any]:
            steps = self._folder.list_steps()
            return [(step, dataclasses.astuple(read_turn(self._folder.of(step)))) for step in steps]

        return {step: Turn(*turn) for step, turn in hosts.run_on_first(read)}

    def _saves(self, steps: Iterable[int]) -> dict[int, Turn]:
        return {step: self._turns.get(step, WHOLE) for step in steps}

    def _keep_experts_alone(self, kept: list[int]) -> None:
        """Removes everything but the experts of saves that are older than the newest."""
        for step in kept[: -(self._keep or len(kept))]:
            if self._turns.get(step, WHOLE).splits_all and step not in self._stripped:
                self._stripped.add(step)
                try:
                    manifest.remove_items(self._folder.of(step), ("model", "optimizer"))
                except storage.errors(ValueError) as error:  # it takes room, and nothing else
                    _log.warning("checkpoint %d keeps more than its experts (%s)", step, storage.reason(error))

    def _needed(self, steps: Sequence[int]) -> set[int]:
        """Which of the saves that there are stay."""
        return needed_saves(self._saves(steps), steps[-self._keep :] if self._keep else steps, self._shape)

    def _open(self) -> ocp.CheckpointManager:
        return open_manager(self._folder.path, ("model", "optimizer", EXPERTS), self._needed, reads=self._keep is None)

    def save(
        self,
        state: TrainState,
        data_state: Any,
        config: Config,
        step: int,
        eval_loss: float | None,
        experts: int = 0,
        learned: Learned | None = None,
    ) -> bool:
        """Copies the state to the host, and writes it in the background. A failure is logged, not raised.

        Returns False if it has failed already, or there is one of the step.

        Args:
          experts: so many of each layer's are saved, by turns; 0 = all. All are where one would have no copy.
          learned: what they have learned, of a run that saves some.
        """
        self.wait()
        kept: list[int] = hosts.broadcast(sorted(self._manager.all_steps()))  # a save is of all processes
        if step in kept:
            return False
        self._shape = expert_shape(state.params)
        turn, run = WHOLE, dict[str, Any](read_run_json(self._folder.path.parent)) | {manifest.STEP: step}
        if learned is not None:
            turn = next_turn(config, self._saves(kept), experts, self._shape)
            run |= {TURN: dataclasses.astuple(turn)}
            data_state = data_state | {LEARNED: learned.to_json()}
        if hosts.is_first():
            self._keep_experts_alone(kept)
        items = set_apart(take_turn({"model": _model_item(state), "optimizer": _optimizer_item(state)}, turn), turn)
        run |= describe_padding(items["model"])
        self._folder.remove_unfinished()
        self._saving, self._turns[step] = step, turn
        self._stripped.discard(step)  # one of its number may have been, which was set aside
        try:
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.PyTreeSave(tree) for item, tree in items.items()},
                    data=ocp.args.JsonSave(data_state),
                    config=ocp.args.JsonSave(json.loads(config.to_json())),
                    run=ocp.args.JsonSave(run),
                ),
                metrics={METRIC: eval_loss} if eval_loss is not None and math.isfinite(eval_loss) else None,
            )
            if not written:  # Orbax says no more
                raise RuntimeError(f"there is one of step {self._manager.latest_step()}")
        except Exception as error:
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Waits for the save in progress. If it failed, one line says so, older checkpoints stay, and it returns
        False."""
        try:
            with clock.watching(self._folder.bytes):  # it may take as long as somebody writes
                self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return False
        if self._saving is not None and not storage.is_store(self._folder.path):
            with contextlib.suppress(OSError):  # of NFS, where one is still read; the next time takes it
                self._folder.remove_unfinished()  # and the older ones that Orbax has set apart
        self._saving = None
        return True

    def _failed(self, error: Exception) -> None:
        if hosts.is_distributed():
            raise error  # the others wait for this process inside Orbax: better that the job ends and is restarted
        code = os_code(error)
        cause = os.strerror(code) if code else f"{type(error).__name__}: {error}"[:300]
        _log.warning(
            "the checkpoint of step %d could not be written (%s); older ones are kept, the next save tries again",
            self._saving,
            " ".join(cause.split()),
        )
        with contextlib.suppress(Exception):
            self._manager.close()  # what else went wrong in it would count as a failure of the next save
        self._folder.remove_unfinished()
        self._manager = self._open()

    def latest(self) -> int | None:
        """The newest checkpoint by name, whatever its state."""
        return self._manager.latest_step()

    def restore_newest(
        self, abstract: TrainState, train: TrainConfig | None = None
    ) -> tuple[int, TrainState, Any] | None:
        """Restores the newest intact checkpoint → its number, and what `restore` returns; None if there is none.

        Damaged ones are named and moved to workdir/checkpoints-damaged.

        Raises:
          ConfigError: all checkpoints that there were are damaged; or as `restore`.
        """
        while (step := self.newest_intact()) is not None:
            try:
                state, position = self.restore(step, abstract, train)
            except DamagedError as error:
                damaged = step if error.step is None else error.step
                hosts.run_on_first(functools.partial(self._folder.set_aside, damaged, str(error)))
            else:
                self._give_up_behind(step)
                return step, state, position
        self._give_up_behind(None)
        return None

    def _give_up_behind(self, step: int | None) -> None:
        """Sets aside the saves behind the one that a run goes on from; of a run that begins anew, removes them.

        Of all of them the experts alone are left, and below them Orbax would write no other.
        """

        def give_up() -> bool:
            behind = [n for n in self._folder.list_steps() if step is None or n > step]
            for number in behind:
                if step is None:  # nothing can be brought back: what was set aside has been removed
                    storage.remove_tree(self._folder.of(number))
                else:
                    self._folder.set_aside(number)
            return bool(behind)

        if hosts.run_on_first(give_up):
            self._turns = self._read_turns()
            self._manager.reload()

    def newest_intact(self) -> int | None:
        """The number of the newest checkpoint that fits its manifest; damage to arrays is found when they are read.
        Damaged ones are moved as by `restore_newest`."""

        def newest() -> int | None:
            found = reversed(self._folder.list_steps())
            return next((number for number in found if not manifest.is_stripped(self._folder.of(number))), None)

        while (step := hosts.run_on_first(newest)) is not None:
            try:
                self._folder.check(step)
                break
            except DamagedError as error:
                hosts.run_on_first(functools.partial(self._folder.set_aside, step, str(error)))
        if step is None:
            hosts.run_on_first(self._folder.refuse_to_start_over)
        self._manager.reload()
        return step

    def holds_all(self, step: int) -> bool:
        """Whether a checkpoint holds every expert."""
        return not self._turns.get(step, WHOLE).count

    def loss(self, step: int) -> float | None:
        """eval/loss of a checkpoint, if it was evaluated."""
        return (self._manager.metrics(step) or {}).get(METRIC)

    def best_loss(self) -> float:
        """eval/loss of the best checkpoint, inf if none was evaluated."""
        losses = [self.loss(step) for step in self._manager.all_steps()]
        return min((loss for loss in losses if loss is not None), default=math.inf)

    def resolve(self, step: str) -> int:
        """The number of the checkpoint 'latest', 'best' or 'N', chosen as by `restore_model`, but no array is read."""
        return self._choose(step, lambda number: None)[0]

    def restore_model(self, step: str, abstract: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Restores {"params": …, "rest": …} of the checkpoint 'latest', 'best' or 'N' → its number, and these. Damaged
        ones are named, and passed over for 'latest' and 'best'.

        Raises:
          ConfigError: there is no such checkpoint, or no intact one, or it is of a model of another shape.
        """

        def read(number: int) -> dict[str, Any]:
            check_shapes(self._folder.path, number, abstract)
            return _check_finite(read_arrays(self._folder.of(number), {"model": abstract})["model"])

        return self._choose(step, read)

    def _choose(self, step: str, read: Callable[[int], _T]) -> tuple[int, _T]:
        """Finds the first intact checkpoint that `step` may mean → its number, and what `read` makes of it."""
        damaged: dict[int, str] = {}
        while True:
            number: int = hosts.run_on_first(functools.partial(self._candidate, step, damaged))
            try:
                self._folder.check(number, without="optimizer")
                return number, read(number)
            except DamagedError as error:
                if step not in ("latest", "best"):
                    others = sorted(set(self._manager.all_steps()) - {number})
                    raise ConfigError(
                        f"step={step} of {self._folder.path} is damaged: {error}; use another one"
                        + (f" of {others}" if others else "")
                    ) from None
                damaged[number] = str(error)
                if hosts.is_first():
                    self._folder.warn(number, str(error))

    def _candidate(self, step: str, damaged: dict[int, str]) -> int:
        """The checkpoint that `step` asks for, on process 0; none of `damaged`, to which it adds what it finds."""
        found = sorted(self._manager.all_steps())
        steps = [number for number in found if self.holds_all(number)]
        if not found:
            raise ConfigError(f"{self._folder.path} holds no checkpoint; train first")
        if not steps or (step.isdecimal() and int(step) in {*found} - {*steps}):
            raise ConfigError(
                f"step={step} of {self._folder.path} holds some of the experts (train.experts_per_checkpoint); use "
                + (f"a whole one of {steps}, or " if steps else "")
                + f"{'' if steps else 'none: '}go on with the run, which saves all where it stops"
            )
        if step == "latest" and steps[-1] < found[-1]:
            _log.warning(
                "checkpoint %d holds some of the experts (train.experts_per_checkpoint); %d, which is whole, is taken",
                found[-1],
                steps[-1],
            )
        if step not in ("latest", "best"):
            if not step.isdecimal() or int(step) not in steps:
                raise ConfigError(
                    f"step={step} is not a checkpoint of {self._folder.path}; use latest, best or one of {steps}"
                )
            return int(step)
        candidates = [number for number in steps[::-1] if number not in damaged]
        if step == "best":
            for number in candidates:  # a loss is a small file, which may be damaged itself
                if damage := manifest.find_damage(self._folder.of(number), thorough=False):
                    damaged[number] = damage
                    self._folder.warn(number, damage)
            # A stable sort leaves those without a loss at the end, newest first.
            candidates = [number for number in candidates if number not in damaged]
            candidates.sort(key=lambda number: math.inf if (loss := self.loss(number)) is None else loss)
        if not candidates:
            raise ConfigError(
                f"no checkpoint of {self._folder.path} is intact, of {steps} "
                f"({max(damaged)}: {damaged[max(damaged)]}); bring back a good copy"
            )
        return candidates[0]

    def restore(self, step: int, abstract: TrainState, train: TrainConfig | None = None) -> tuple[TrainState, Any]:
        """Restores the state, sharded as `abstract`, and the data position.

        Args:
          train: of a run that goes on from there; a reader has none.

        Raises:
          DamagedError: an array differs from its checksums, or the model holds NaN or infinity.
          ConfigError: the checkpoint is of a model of another shape.
        """
        check = {"model": _model_item(abstract), "optimizer": _optimizer_item(abstract)}
        turn = self._turns.get(step, WHOLE)
        check_shapes(self._folder.path, step, set_apart(take_turn(check, turn), turn)["model"])
        items, position = self._read_joined(step, check, train) if turn.count else self._read(step, check)
        model, optimizer = _check_finite(items["model"]), items["optimizer"]
        state = TrainState(optimizer["step"], model["params"], model["rest"], optimizer["opt_state"])
        if abstract.average is not None:
            params = _check_finite({"params": optimizer["params"]})["params"]
            state = dataclasses.replace(state, params=params, average=model["params"])
        return state, position

    def _read(self, step: int, abstract: Items) -> tuple[Items, Any]:
        """Reads the items that hold arrays, and the data position."""
        directory = self._folder.of(step)
        needed = {item: tree for item, tree in abstract.items() if any(v is not ... for v in jax.tree.leaves(tree))}
        items = abstract | read_arrays(directory, needed)
        return items, hosts.run_on_first(lambda: ocp.JsonCheckpointHandler().restore(directory / "data"))

    def _read_joined(self, step: int, abstract: Items, train: TrainConfig | None) -> tuple[Items, Any]:
        """Reads a save of some experts, with the others from older ones; a line says what that loses."""

        def read(source: int, wanted: Items) -> tuple[Items, Any]:
            try:
                if source < step:
                    self._folder.check(source)
                return self._read(source, wanted)
            except DamagedError as error:
                raise DamagedError(str(error), source) from None

        steps = hosts.run_on_first(self._folder.list_steps)
        items, position, line = join_saves(step, self._saves(steps), abstract, read, train)
        if line:
            hosts.say(line, sys.stderr)  # results of an evaluation stand on the other one
        return items, position

    def close(self, lost: bool = False) -> None:
        """Waits for the save in progress, and ends Orbax's threads.

        Args:
          lost: the folder was moved or removed: a failure of that save is no matter, and nothing is tidied up.
        """
        with contextlib.suppress(Exception) if lost else contextlib.nullcontext():
            if not lost:
                self.wait()
            self._manager.close()


def _check_finite(model: dict[str, Any]) -> dict[str, Any]:
    """Raises DamagedError for a model that holds NaN or infinity: neither a step nor an answer could come of it."""
    if name := find_nonfinite(model):
        raise DamagedError(f"{name.partition('.')[2]} holds NaN or infinity")
    return model


def _model_item(state: TrainState) -> dict[str, Any]:
    """The item that a reader needs: the parameters that the run is judged by."""
    return {"params": evaluated_params(state), "rest": state.rest}


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """The item that a resumed run needs besides."""
    own = {} if state.average is None else {"params": state.params}
    return {"opt_state": state.opt_state, "step": state.step} | own
