"""Completes prompts with a trained model: bigmac generate --workdir=DIR --prompt=TEXT --max_tokens=N [--json].

Many at once: --prompts=FILE, a JSON object with "prompt" a line, which may hold any of max_tokens, temperature, top_k,
top_p, stop, ignore_eos and seed for itself; --prompts=- reads them from standard input. Answers go to standard output
or --output, a JSON object a line, in the order of the prompts.
"""

import os
import sys
import time

from absl import flags

from bigmac_jax.commands import cli, decoding_flags
from bigmac_jax.config import ConfigError, strict_json
from bigmac_jax.inference import Completion, Generator, Request, Sampling
from bigmac_jax.inference.generator import encode_requests
from bigmac_jax.inference.requests import Row, check_output, make_answer, open_output, read_requests, share_requests
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.progress import Progress, Waiting
from bigmac_jax.training.workdir import load_run_tokenizer, locate_workdir

flags.adopt_module_key_flags(decoding_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to go on from.")
_PROMPTS = flags.DEFINE_string("prompts", "", "A file of prompts, a JSON object a line; - is standard input.")
_OUTPUT = flags.DEFINE_string("output", "-", "Where the answers to --prompts go; - is standard output.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Tokens of a completion, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token each time.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens only; 0 = from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens that have this probability together.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends the completion; may be given several times.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after the end of a document.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON objects, not text.")


def main() -> None:
    with hosts.raise_together():
        workdir = locate_workdir(decoding_flags.WORKDIR.value)
        config = decoding_flags.read_run(workdir)
        prompt = _PROMPT.value
        if (prompt is None) == (not _PROMPTS.value):
            raise ConfigError("give either --prompt=TEXT or --prompts=FILE")
        sampling = Sampling(
            _MAX_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, tuple(_STOP.value), _IGNORE_EOS.value,
            _SEED.value,
        )  # fmt: skip
        speculate, tokenizer = decoding_flags.speculation(), load_run_tokenizer(workdir, config)
        requests = [({}, Request(prompt, sampling))] if prompt is not None else read_requests(_PROMPTS.value, sampling)
        if prompt is not None and not _JSON.value and _OUTPUT.value != "-":
            raise ConfigError(f"--output={_OUTPUT.value} takes the answers to --prompts; give those, or --json")
        if hosts.is_first():
            check_output(_OUTPUT.value, _PROMPTS.value if prompt is None else "-")
    cli.agree(config, __name__)
    if prompt is None:
        requests = share_requests(_PROMPTS.value, requests, sampling)
    with Waiting("reading the model", _is_quiet()):
        config, asked = decoding_flags.enter_mesh(config, speculate), [request for _, request in requests]
        encode_requests(asked, tokenizer, config.model.vocab_size, decoding_flags.max_length(config))
        generator = decoding_flags.load_generator(workdir, config, speculate, tokenizer)
    if prompt is not None and not _JSON.value:
        _show(generator, prompt, sampling)
    else:
        _answer(generator, requests)


def _show(generator: Generator, prompt: str, sampling: Sampling) -> None:
    """Prints prompt and completion as it comes."""
    shown = prompt
    with Waiting("compiling, and reading the prompt", _is_quiet()) as waiting:
        for piece in generator.stream(Request(prompt, sampling)):
            waiting.end()
            if hosts.is_first():
                print(shown + piece, end="", flush=True)
            shown = ""
            clock.tick()
    hosts.say("")


def _answer(generator: Generator, requests: list[tuple[Row, Request]]) -> None:
    """Writes answers in the order of the prompts, each as soon as those before it are there."""
    start, tokens, written = time.perf_counter(), 0, 0
    quiet = _is_quiet()
    target = _OUTPUT.value if hosts.is_first() else os.devnull
    there: dict[int, Completion] = {}
    with open_output(target) as file, Progress("completions", len(requests), "prompt", silent=quiet) as bar:

        def done(number: int, completion: Completion) -> None:
            nonlocal tokens, written
            bar.update()
            there[number] = completion
            tokens += len(completion.tokens)
            while written in there:
                line = make_answer(*requests[written], there.pop(written))
                print(strict_json(line, ensure_ascii=False), file=file, flush=True)
                written += 1

        generator.generate([request for _, request in requests], done)
    if not quiet:
        print(f"{tokens:,} tokens in {time.perf_counter() - start:.1f} s{_accepted(generator)}", file=sys.stderr)


def _is_quiet() -> bool:
    return _JSON.value or not hosts.is_first()


def _accepted(generator: Generator) -> str:
    drafts = generator.drafts
    if drafts is None or not drafts.drafted:
        return ""
    return f"; of {drafts.drafted:,} drafted tokens {drafts.accepted / drafts.drafted:.1%} were accepted"
