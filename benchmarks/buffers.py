"""What execution.buffer_factor takes and saves: python -m benchmarks.buffers [--config=… --config.a.b=…].

Without simulated devices the loads: a model is trained, and after some steps its choices are dealt to --ranks ranks.
JSON lines with the rows of the busiest pair of ranks over those expected, and for each factor the rounds of a layer and
what is sent in them, over the rows expected (all_to_all; means over layers).

    python -m benchmarks.buffers --config.model.balance_coefficient=0.001

With them the times: after some steps of a run the same step with each case, alternating; CAPACITY or inf:BUFFER, the
last of which the run is trained with.

    python -m benchmarks.buffers --cpu_devices=8 --config.mesh.expert=8
"""

from bigmac_jax.runtime import environment

environment.prepare()

import dataclasses  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, from_dict, load_config  # noqa: E402
from bigmac_jax.data.pipeline import TrainIterator, open_stream  # noqa: E402
from bigmac_jax.data.tokenizer import load_tokenizer  # noqa: E402
from bigmac_jax.model.mesh import batch_spec, place  # noqa: E402
from bigmac_jax.training.step import make_trainer  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_RANKS = flags.DEFINE_list("ranks", "2,4,8,16,32", "Sizes of an expert group that choices are dealt to.")
_FACTORS = flags.DEFINE_list("factors", "1,1.1,1.25,1.5,2,3,4", "Buffer factors.")
_AT = flags.DEFINE_list("at", "0,10,50,100,200,400", "Steps after which is measured.")
_ROWS = flags.DEFINE_integer("rows", 64, "Windows whose choices are dealt.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", "1.25,inf:inf,inf:1.25,inf:2,inf:auto", "Cases CAPACITY or inf:BUFFER.")
_STEPS = flags.DEFINE_integer("steps", 3, "Timed steps of a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; a ratio is the median over rounds.", lower_bound=1)


def main() -> None:
    config = load_config(_CONFIG.value, cli.OVERRIDES)
    mesh, at = cli.enter_mesh(config), [int(step) for step in _AT.value]
    stream = open_stream(config, "train", load_tokenizer(config))
    trainer, batches = make_trainer(config, mesh), TrainIterator(config, stream)
    state = trainer.init(jax.random.key(config.train.seed))
    timed: dict[str, Any] = {}  # compiled steps
    step_of: Any = trainer.step
    if mesh.size == 1:
        loads = jax.jit(lambda state, tokens: trainer.model(state)(tokens)[1].load)
        L = config.data.sequence_length
        rows = TrainIterator(
            dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=_ROWS.value)), stream
        )
        texts = next(rows).inputs_BL
    for step in range(max(at) + 1):
        batch, rate = place(next(batches), batch_spec(2)), trainer.rate(step)
        if step == 0 and mesh.size > 1:
            steps = {case: make_trainer(_with(config, case), mesh).step for case in _CASES.value}
            timed = {case: made.lower(state, batch, rate).compile() for case, made in steps.items()}
            step_of = timed[_CASES.value[-1]]
        if step in at and timed:
            _times(step, state, (batch, rate), timed)
        elif step in at:
            # A row's own loads, [rows, layers, experts], in choices.
            own = np.stack([np.asarray(loads(state, place(text[None], batch_spec(2)))) for text in texts])
            _loads(step, config, own * L * config.model.choices, L)
        if step == max(at):
            break
        state, metrics = step_of(state, batch, rate)
        # Devices that share two cores wait for each other for ever where many programs are dispatched at once.
        jax.block_until_ready(metrics)


def _loads(step: int, config: Config, own: np.ndarray, length: int) -> None:
    """Prints what the choices need on groups of each size; every rank has as many windows."""
    rows, layers, experts = own.shape
    busiest = (own.sum(0) * experts / own.sum((0, 2))[:, None]).max(1)
    line: dict[str, Any] = {"step": step, "busiest_expert": round(float(busiest.mean()), 2)}
    for ranks in map(int, _RANKS.value):
        if rows % ranks or experts % ranks:
            continue
        pairs = own.reshape(ranks, rows // ranks, layers, ranks, experts // ranks).sum((1, 4))  # source, layer, target
        expected = rows // ranks * length * config.model.choices / ranks
        worst = ranks * min(1, experts // ranks / config.model.choices)
        most = pairs.max((0, 2)) / expected  # by layer
        of = {"busiest_pair": [round(float(most.mean()), 2), round(float(most.max()), 2)]}
        for factor in map(float, _FACTORS.value):
            taken = np.ceil(most / min(factor, worst) - 1e-9)
            of[f"{factor:g}"] = [round(float(taken.mean()), 2), round(float(taken.mean() * min(factor, worst)), 2)]
        line[f"{ranks} ranks"] = of
    print(json.dumps(line), flush=True)


def _times(step: int, state: Any, inputs: Any, cases: dict[str, Any]) -> None:
    """Prints the seconds of a step of each case, from this state, on these inputs, and its temporary memory."""

    def runner(step_of: Any) -> Callable[[], float]:
        def run() -> float:
            own = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
            start = time.perf_counter()
            for _ in range(_STEPS.value):
                own, metrics = step_of(own, *inputs)
                jax.block_until_ready(metrics)
            return (time.perf_counter() - start) / _STEPS.value

        return run

    runners = {case: runner(step_of) for case, step_of in cases.items()}
    for run in runners.values():
        run()
    seconds = alternate(runners, _ROUNDS.value)
    first = seconds[next(iter(seconds))]
    for case, rounds in seconds.items():
        line = {"step": step, "name": case, "ratio": round(median_ratio(rounds, first), 3)}
        line["temporary_mb"] = round(cases[case].memory_analysis().temp_size_in_bytes / 1e6)
        print(json.dumps(line | summary(rounds)), flush=True)


def _with(config: Config, case: str) -> Config:
    capacity, _, buffer = case.partition(":")
    values = dataclasses.asdict(config)
    values["model"]["capacity_factor"] = float(capacity)
    if buffer:
        values["execution"]["buffer_factor"] = buffer if buffer == "auto" else float(buffer)
    return from_dict(values)


if __name__ == "__main__":
    cli.run(main)
