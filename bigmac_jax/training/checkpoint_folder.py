"""The folder of a workdir's checkpoints: what in it is one, and where damaged ones go."""

import logging
import pathlib

import jax
from orbax.checkpoint.path import atomicity

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint_arrays import DamagedError

_log = logging.getLogger(__name__)


class CheckpointFolder:
    """workdir/checkpoints, a directory a step, and workdir/checkpoints-damaged. Process 0 alone changes them."""

    def __init__(self, workdir: pathlib.Path):
        self.path = storage.absolute(workdir) / "checkpoints"
        self._aside = self.path.with_name("checkpoints-damaged")

    def of(self, step: int) -> pathlib.Path:
        return self.path / str(step)

    def list_steps(self) -> list[int]:
        """The steps of which there is a complete checkpoint, whatever its state, ascending."""
        return manifest.list_steps(self.path.parent)

    def bytes(self) -> int:
        """Bytes of all that is there, also of saves in progress."""
        return sum(storage.list_files(self.path).values())

    def tidy(self) -> None:
        """Makes the folder; removes and sets aside what is no checkpoint: Orbax reads small files of every one when it
        starts.

        Raises:
          ConfigError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be made ({error.strerror}); remove what is there, or use a new --workdir"
            ) from None
        self.remove_unfinished()
        steps = self.list_steps()
        for step in steps:
            path = self.of(step)
            if damage := manifest.find_damage(path, thorough=False):
                if storage.is_store(path) and damage.endswith("is missing") and step != steps[-1]:
                    # A store removes a directory file by file, and whoever did so was killed.
                    _log.warning("checkpoint %d is what is left of one that was being removed; removed", step)
                    storage.remove_tree(path)
                else:
                    self.set_aside(step, damage)

    def remove_unfinished(self) -> None:
        """Removes what a failed save or a killed run has left; threads of a save may still be writing."""
        if hosts.is_first():
            for path in storage.list_folder(self.path):
                if atomicity.TMP_DIR_SUFFIX in path.name or (path.name.isdecimal() and not manifest.is_complete(path)):
                    storage.remove_tree(path)

    def set_aside(self, step: int, damage: str = "") -> None:
        """Moves a checkpoint out of the way, under a name that is free, and says so; without damage it holds experts
        alone."""
        storage.make_folder(self._aside)
        there = len(storage.list_folder(self._aside))
        names = [str(step), *(f"{step}-{n}" for n in range(2, 2 + there))]
        target = next(self._aside / name for name in names if not (self._aside / name).exists())
        storage.move(self.of(step), target)
        what = f"is damaged: {damage}" if damage else "holds experts alone, of steps that are taken again"
        _log.warning("checkpoint %d %s; it is passed over, and kept in %s", step, what, target)

    def refuse_to_start_over(self) -> None:
        """Raises ConfigError where checkpoints were set aside: a run that finds no other must not begin anew."""
        if self._aside.is_dir() and any(self._aside.iterdir()):
            raise ConfigError(
                f"no intact checkpoint is left in {self.path}, damaged ones are in {self._aside}; bring back "
                f"a good copy, or use a new --workdir (or remove {self._aside.name}) to start from the beginning"
            )

    def check(self, step: int, without: str = "") -> None:
        """Compares a checkpoint with its manifest, each process a part of the files; raises DamagedError.

        Args:
          without: the name of an item that nobody is going to read.
        """
        with hosts.raise_together():
            share = (jax.process_index(), jax.process_count()) if hosts.is_distributed() else (0, 1)
            damage = manifest.find_damage(self.of(step), without=without, share=share)
        if damage := next(filter(None, hosts.gather(damage or "")), ""):
            raise DamagedError(damage)

    def warn(self, step: int, damage: str) -> None:
        """Says that a reader passes a damaged checkpoint over."""
        _log.warning("%s is damaged: %s; it is passed over", self.of(step), damage)
