"""Scores of windows kept on disk, so that an evaluation that was killed goes on where it stopped."""

import json
import logging
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jax.experimental import multihost_utils

from bigmac_jax.config import parse_object, seal, unseal
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.runtime.mirror import Mirror

Score = tuple[float, bool]  # log-likelihood in nats, whether greedy decoding would give it
_log = logging.getLogger(__name__)


class ScoreLog:
    """Scores of one model by a window's key, a JSON line each; process 0 alone reads and writes the file.

    Args:
      path: is appended to; a last line that a killed run did not finish is removed.
      model: what a score depends on besides the window, such as a digest of the checkpoint; lines of another one are
        ignored.
    """

    def __init__(self, path: pathlib.Path, model: str):
        self._path, self._model = path, model
        self._known: dict[str, Score] = {}
        self._mirror = Mirror(pathlib.Path())
        if not hosts.is_first():
            return
        try:
            storage.make_folder(path.parent)
            self._mirror = Mirror(path.parent)
            self._mirror.fetch(path.name)
            self._path = self._mirror.folder / path.name
            with self._path.open("ab+") as file:
                file.seek(0)
                text = file.read()
                file.truncate(text.rfind(b"\n") + 1)
        except storage.errors() as error:
            self._give_up(path, error)
            return
        for line in text.splitlines():
            self._read(line)
        if self._known:
            _log.info("%s: %d windows were scored by an earlier run", path, len(self._known))

    def _read(self, line: bytes) -> None:
        try:
            entry = unseal(parse_object(line))
            if entry["model"] == self._model:
                self._known[str(entry["window"])] = float(entry["loglikelihood"]), bool(entry["greedy"])
        except (ValueError, KeyError, TypeError):
            pass  # a damaged line costs its window, which is scored again

    def _give_up(self, path: pathlib.Path, error: Exception) -> None:
        _log.warning("%s cannot be written (%s): if this run is killed, it starts over", path, storage.reason(error))
        self._path = pathlib.Path("/dev/null")

    def look_up(self, keys: Sequence[str]) -> dict[str, Score]:
        """The scores that are known, the same on all processes."""
        known = np.array([self._known.get(key, (np.nan, False)) for key in keys], np.float64).reshape(-1, 2)
        # As integers: jax would make float32 of them.
        shared = np.asarray(multihost_utils.broadcast_one_to_all(known.view(np.int32)), np.int32).view(np.float64)
        return {key: (float(s), bool(g)) for key, (s, g) in zip(keys, shared, strict=True) if not np.isnan(s)}

    def add(self, scores: dict[str, Score]) -> None:
        """Appends scores by key; one that is not finite is left out, and so computed again."""
        if not hosts.is_first():
            return
        entries = [
            {"window": key, "loglikelihood": score, "greedy": greedy, "model": self._model}
            for key, (score, greedy) in scores.items()
            if math.isfinite(score)
        ]
        try:
            with self._path.open("a") as file:
                file.writelines(json.dumps(seal(entry), allow_nan=False) + "\n" for entry in entries)
            self._mirror.copy_sometimes()
        except OSError as error:  # of this process alone: the others would wait for it
            self._give_up(self._path, error)

    def close(self) -> None:
        if hosts.is_first():
            self._mirror.close()
