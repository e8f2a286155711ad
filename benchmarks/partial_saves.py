"""Seconds and bytes of a save that holds some of the experts: python -m benchmarks.partial_saves [--config.a.b=…].

One process, the state of a config with random parameters and moments; saves of all experts and of K a layer alternate.
JSON lines: the seconds that training waits (the state is copied), those until the save has its name, and its bytes;
medians over rounds, and the ratio to a whole save of the same round.

    python -m benchmarks.partial_saves --config.model.expert_hidden_size=1024     experts are most of this model
"""

from bigmac_jax.runtime import environment

environment.prepare()

import dataclasses  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.timing import alternate, median_ratio  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, load_config  # noqa: E402
from bigmac_jax.training.checkpoint import Checkpoints  # noqa: E402
from bigmac_jax.training.partial_checkpoint import Learned, expert_shape  # noqa: E402
from bigmac_jax.training.step import TrainState, make_trainer  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_EXPERTS = flags.DEFINE_list("experts", ["0", "4", "2", "1"], "Of a layer in a save; 0 = all.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Saves of each kind.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "", "Where checkpoints are written; by default where temporary files are.")


class _Saves:
    """The saves of one kind. Called, it makes one, and returns the seconds until that has its name.

    Attributes:
      waited: seconds of each until training could have gone on.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, state: TrainState, experts: int):
        self.waited: list[float] = []
        self._workdir, self._config, self._state, self._experts = workdir, config, state, experts
        self._step, self._checkpoints = 0, Checkpoints(workdir, keep=1)
        self()  # whole, because no expert has a copy; and it compiles
        self()
        self.waited.clear()

    def __call__(self) -> float:
        self._step += 1
        learned = Learned(np.zeros(expert_shape(self._state.params))) if self._experts else None
        start = time.perf_counter()
        self._checkpoints.save(self._state, {}, self._config, self._step, None, self._experts, learned)
        self.waited.append(time.perf_counter() - start)
        self._checkpoints.wait()
        return time.perf_counter() - start

    def close(self) -> int:
        """Bytes of the newest save."""
        self._checkpoints.close()
        folder = self._workdir / "checkpoints" / str(self._step)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    config = load_config(_CONFIG.value, cli.OVERRIDES)
    trainer = make_trainer(config, cli.enter_mesh(config, fit_batch=False))
    state = _fill(trainer.init(jax.random.key(0)))
    with tempfile.TemporaryDirectory(dir=_FOLDER.value or None) as folder:
        kinds = {name: _Saves(pathlib.Path(folder) / name, config, state, int(name)) for name in _EXPERTS.value}
        cases: dict[str, Callable[[], float]] = dict(kinds)
        seconds = alternate(cases, _ROUNDS.value)
        sizes = {name: saves.close() for name, saves in kinds.items()}
    first = _EXPERTS.value[0]
    for name, saves in kinds.items():
        line: dict[str, Any] = {
            "experts": int(name) or config.model.num_experts,
            "bytes": sizes[name],
            "bytes_over_first": round(sizes[name] / sizes[first], 3),
            "waited_s": round(statistics.median(saves.waited), 4),
            "seconds": round(statistics.median(seconds[name]), 4),
            "seconds_over_first": round(median_ratio(seconds[name], seconds[first]), 3),
        }
        print(json.dumps(line), flush=True)


def _fill(state: TrainState) -> TrainState:
    """The state with moments that are not zero, which would compress to nothing."""
    draw = np.random.default_rng(0)

    def fill(leaf: jax.Array) -> jax.Array:
        values = draw.standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding) if leaf.ndim else leaf

    return dataclasses.replace(state, opt_state=jax.tree.map(fill, state.opt_state))


if __name__ == "__main__":
    cli.run(main)
