"""Sends the records of metrics.jsonl to TensorBoard, and to Weights & Biases where train.wandb asks for it."""

import json
import logging
import pathlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from bigmac_jax.config import ConfigError

_log = logging.getLogger(__name__)


class Dashboard(Protocol):
    """Shows a run's records while it trains."""

    def write(self, record: dict[str, Any]) -> None:
        """Shows a record, which holds "step"."""

    def close(self) -> None: ...


def open_dashboards(folder: pathlib.Path, first_step: int, project: str, workdir: pathlib.Path) -> list[Dashboard]:
    """Opens the dashboards of a run that goes on after `first_step`; `project` is train.wandb.

    What goes wrong with one costs its records, not the run.

    Args:
      folder: where they write: `workdir`, or a folder that is copied there and then removed.
    """
    # tensorboardX imports torch and clients of stores where they are installed, which takes up to two seconds: no other
    # process of a job does.
    from bigmac_jax.training.tensorboard import TensorBoard

    boards: list[Dashboard] = [TensorBoard(folder / "tb", first_step)]
    return [*boards, WandB(folder, project, workdir)] if project else boards


def check_dashboards(project: str) -> None:
    """Raises ConfigError if train.wandb asks for a package that is not here."""
    if project:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"train.wandb={project} needs the package wandb; pip install 'bigmac_jax[wandb]', or leave it out"
            ) from None


class WandB:
    """Sends whole records to Weights & Biases, through WORKDIR/wandb; WANDB_MODE and the like are wandb's own.

    WORKDIR/wandb/id names the wandb run, which every start continues. Its axis is "step", so that a start may go back
    to an earlier one, which wandb's own count of steps can't.
    """

    def __init__(self, folder: pathlib.Path, project: str, workdir: pathlib.Path):
        self._run: Any = None
        # wandb's own last lines name `folder`, which is removed where it is a copy: they are left out there.
        self._kept = workdir / "wandb" if folder != workdir else None
        self._try(lambda: self._open(folder, project, workdir / "config.json"))

    def _open(self, folder: pathlib.Path, project: str, config: pathlib.Path) -> None:
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        file = folder / "wandb" / "id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            dir=folder,
            id=file.read_text(),
            resume="allow",
            config=json.loads(config.read_bytes()) if config.exists() else {},
            allow_val_change=True,  # of what a resume may change
            settings=wandb.Settings(console="off", silent=True) if self._kept else wandb.Settings(console="off"),
        )
        if self._kept and not self._run.offline:
            _log.info("wandb shows this run at %s", self._run.url)
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log(record))

    def close(self) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish())
        if self._run is not None and self._kept and self._run.offline:
            name = pathlib.Path(self._run.sync_dir).name
            _log.info("wandb was offline; copy %s to a disk, then: wandb sync %s", self._kept / name, name)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # of a network, an account, a disk
            cause = " ".join(str(error).split())[:300]
            _log.warning("wandb gets no more records (%s: %s); metrics.jsonl has all", type(error).__name__, cause)
            self._run = None
