"""Prefill and decode of bigmac against fine_grained: python -m benchmarks.inference [--cpu_devices=8 --ranks=8].

The paper's Figure 5 (prompts of 128 to 1,024 tokens, as many tokens a batch for each) and Table 9 (1, 2, 5 and 10
tokens behind prompts of 128), scaled to the machine, through `Generator`, dropless. All cases run in one process and
alternate. JSON lines, a structure and experiment each: tokens_per_s; exchange_share, what the time is more than that of
the same programs with the exchange replaced by a local reshape (without --ranks nothing is sent); and of bigmac its
speed-up, the median over rounds of fine_grained's time over its own.

    python -m benchmarks.inference
    python -m benchmarks.inference --cpu_devices=8 --ranks=8
"""

from bigmac_jax.runtime import environment

environment.prepare()

import itertools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.local import local_exchange  # noqa: E402
from benchmarks.timing import alternate, median_ratio  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig  # noqa: E402
from bigmac_jax.inference import Generator  # noqa: E402
from bigmac_jax.model.transformer import init_model  # noqa: E402

_TOKENS = flags.DEFINE_integer("tokens", 8192, "Prompt tokens of a batch.")
_PROMPTS = flags.DEFINE_list("prompts", "128,256,512,1024", "Prompt lengths, at one token each.")
_NEW = flags.DEFINE_list("new", "1,2,5,10", "Tokens to generate, behind prompts of the first length.")
_HIDDEN = flags.DEFINE_integer("hidden", 512, "h.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Layers.")
_EXPERTS = flags.DEFINE_integer("experts", 64, "E.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "K.")
_RANKS = flags.DEFINE_integer("ranks", 1, "Expert-parallel ranks.")
_EXCHANGE = flags.DEFINE_string("exchange", "auto", "Strategy; auto takes the fastest for prefill and for decode.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; times are medians.")

STRUCTURES = ("fine_grained", "bigmac")


def main() -> None:
    experiments = [(int(length), 1) for length in _PROMPTS.value]
    experiments += [
        (int(_PROMPTS.value[0]), int(new))
        for new in _NEW.value
        if (int(_PROMPTS.value[0]), int(new)) not in experiments
    ]
    cases: dict[tuple[str, bool, int, int], Callable[[], float]] = {}
    for structure, local in itertools.product(STRUCTURES, (False, True) if _RANKS.value > 1 else (False,)):
        generator = _generator(structure)
        for length, new in experiments:
            cases[structure, local, length, new] = _case(generator, local, length, new)
    seconds = alternate(cases, _ROUNDS.value)
    for length, new in experiments:
        for structure in STRUCTURES:
            times = seconds[structure, False, length, new]
            prompts = _TOKENS.value // length
            counted = prompts * (length if new == 1 else new)
            line = {
                "name": structure,
                "prompt_tokens": length,
                "prompts": prompts,
                "new_tokens": new,
                "ms": round(1e3 * statistics.median(times), 1),
                "prefill_tokens_per_s" if new == 1 else "new_tokens_per_s": round(counted / statistics.median(times)),
            }
            if new > 1:
                first = seconds[structure, False, length, 1]
                line["decode_tokens_per_s"] = round(
                    prompts * (new - 1) / statistics.median(np.subtract(times, first).tolist())
                )
            if _RANKS.value > 1:
                line["exchange_share"] = round(1 - median_ratio(seconds[structure, True, length, new], times), 3)
            if structure == "bigmac":
                line["speed_up"] = round(median_ratio(seconds["fine_grained", False, length, new], times), 3)
            print(json.dumps(line), flush=True)


def _generator(structure: str) -> Generator:
    """Of a model with random parameters."""
    longest = max(map(int, _PROMPTS.value)) + max(map(int, _NEW.value))
    config = Config(
        model=ModelConfig(
            structure=structure,
            num_layers=_LAYERS.value,
            hidden_size=_HIDDEN.value,
            num_heads=8,
            num_experts=_EXPERTS.value,
            top_k=_TOP_K.value,
        ),
        mesh=MeshConfig(expert=_RANKS.value),
        data=DataConfig(tokenizer="bytes", sequence_length=longest, batch_size=_RANKS.value),
    )
    if jax.sharding.get_mesh().empty:
        cli.enter_mesh(config, fit_batch=False)
    model = init_model(config, jax.random.key(0))
    return Generator(config, model, batch_size=_TOKENS.value, exchange=_EXCHANGE.value, consume=True)


def _case(generator: Generator, local: bool, length: int, new: int) -> Callable[[], float]:
    """Compiled, and a function that generates once and returns the seconds."""
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(8192, size=length).tolist()) for _ in range(_TOKENS.value // length)]

    def run() -> float:
        start = time.perf_counter()
        generator.generate(prompts, max_tokens=new, ignore_eos=True)
        return time.perf_counter() - start

    if local:
        with local_exchange():
            run()
    else:
        run()
    return run


if __name__ == "__main__":
    cli.run(main)
