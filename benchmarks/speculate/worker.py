"""One measurement of benchmarks.speculate, as one process or several: python -m benchmarks.speculate.worker --run=….

Greedy completions of prompts from the run's validation text, plain and with drafts of several lengths, by turns.
OUTPUT gets JSON lines, one for each batch size and draft length (0: plain): seconds of each round, drafted and accepted
tokens, and how many completions differ from plain decoding's, of those how many first where two tokens are as likely.
"""

from bigmac_jax.runtime import environment

environment.prepare()

import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from absl import flags  # noqa: E402

from benchmarks.timing import alternate  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import with_mesh  # noqa: E402
from bigmac_jax.data.pipeline import open_stream  # noqa: E402
from bigmac_jax.inference import Completion, Generator, Speculation  # noqa: E402
from bigmac_jax.inference.decoding import DecodePrograms  # noqa: E402
from bigmac_jax.inference.drafts import Drafts  # noqa: E402
from bigmac_jax.runtime import hosts  # noqa: E402
from bigmac_jax.runtime.clock import clock  # noqa: E402
from bigmac_jax.training.workdir import locate_workdir, read_config  # noqa: E402
from bigmac_jax.tuning import restore  # noqa: E402

_RUN = flags.DEFINE_string("run", "runs/tiny", "A run of train.py.")
_OUTPUT = flags.DEFINE_string("output", "speculate.jsonl", "Where the result goes.")
_DRAFTS = flags.DEFINE_list("drafts", "4", "Tokens of a draft.")
_LOCAL = flags.DEFINE_integer("local_experts", 0, "As of generate.py.")
_DRAFT_WITH = flags.DEFINE_string("draft_with", "auto", "As of generate.py.")
_EXCHANGE = flags.DEFINE_string("exchange", "auto", "As of generate.py.")
_BATCHES = flags.DEFINE_list("batches", "16", "Prompts at a time.")
_PROMPTS = flags.DEFINE_integer("prompts", 0, "Of a round; 0 = a batch.")
_LENGTH = flags.DEFINE_integer("length", 32, "Tokens of a prompt.")
_NEW = flags.DEFINE_integer("new", 128, "Tokens to generate.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Rounds.")
_WARM = flags.DEFINE_bool("warm", True, "One round more before them, which compiles.")
_TIE = 1e-5  # nats


def main() -> None:
    with hosts.raise_together():
        workdir = locate_workdir(_RUN.value)
        config = with_mesh(read_config(workdir), cli.OVERRIDES)
        most, lengths = max(map(int, _BATCHES.value)), [int(tokens) for tokens in _DRAFTS.value]
        ways = {tokens: Speculation(tokens, _LOCAL.value, 0.0, _DRAFT_WITH.value) for tokens in lengths}
    cli.agree(config, __name__)
    cli.enter_mesh(config, fit_batch=False)
    config, model = restore(workdir, "latest", config)
    generator = Generator(
        config, model, _LENGTH.value + _NEW.value, most, exchange=_EXCHANGE.value, consume=True,
        speculate=ways[lengths[0]],
    )  # fmt: skip
    assert generator.drafts is not None
    programs = generator.drafts.programs
    stream = open_stream(config, "validation", generator.tokenizer)
    wanted = _PROMPTS.value or most
    stride = (stream.num_tokens - _LENGTH.value) // wanted
    prompts = [tuple(stream.tokens(i * stride, i * stride + _LENGTH.value).tolist()) for i in range(wanted)]
    lines = [
        line
        for batch in map(int, _BATCHES.value)
        for line in _measured(generator, prompts[: _PROMPTS.value or batch], batch, programs, ways)
    ]
    if hosts.is_first():
        output = pathlib.Path(_OUTPUT.value)
        temporary = output.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, output)


def _measured(
    generator: Generator,
    prompts: list[tuple[int, ...]],
    batch: int,
    programs: DecodePrograms,
    ways: dict[int, Speculation],
) -> list[dict[str, Any]]:
    """The lines of a batch size."""
    drafts = {tokens: Drafts(programs, how) for tokens, how in ways.items()}
    completed: dict[int, list[Completion]] = {}

    def once(tokens: int) -> float:
        generator.batch_size, generator.drafts = batch, drafts.get(tokens)
        start = time.perf_counter()
        completed[tokens] = generator.generate(prompts, max_tokens=_NEW.value, ignore_eos=True)
        clock.tick()
        return time.perf_counter() - start

    cases: dict[str, Callable[[], float]] = {str(tokens): functools.partial(once, tokens) for tokens in (0, *ways)}
    if _WARM.value:
        for case in cases.values():
            case()
    for of in drafts.values():
        of.drafted = of.accepted = 0
    seconds = alternate(cases, _ROUNDS.value)
    lines = []
    for tokens in (0, *ways):
        differ, ties = _compared(completed[tokens], completed[0])
        counted = drafts.get(tokens)
        lines.append(
            {"batch": batch, "draft": tokens, "prompts": len(prompts), "new_tokens": len(prompts) * _NEW.value,
             "seconds": seconds[str(tokens)], "drafted": counted.drafted if counted else 0,
             "accepted": counted.accepted if counted else 0, "differ": differ, "near_ties": ties}
        )  # fmt: skip
    return lines


def _compared(found: list[Completion], plain: list[Completion]) -> tuple[int, int]:
    """How many completions differ, and of those how many first at a token that is as likely as the other's."""
    differ = ties = 0
    for a, b in zip(found, plain, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
        if first is not None:
            differ += 1
            ties += abs(a.logprobs[first] - b.logprobs[first]) <= _TIE
    return differ, ties


if __name__ == "__main__":
    cli.run(main, distributed=True)
