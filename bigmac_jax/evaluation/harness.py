"""The model `bigmac_jax` for lm-evaluation-harness, which scores a run on any of its tasks:

    python -m bigmac_jax.evaluation.harness --model bigmac_jax --model_args workdir=DIR --tasks NAME,…

is `python -m lm_eval` with this model registered.
"""

from bigmac_jax.runtime import environment

if __name__ == "__main__":
    environment.prepare()

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bigmac_jax.config import Config, ConfigError, with_mesh
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.evaluation.loglikelihood import Request, Result, check_windows, encode_pairs, score_requests
from bigmac_jax.inference import Generator, Sampling
from bigmac_jax.inference.generator import Request as Prompt
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime.progress import Progress
from bigmac_jax.training.programs import evaluation_rows
from bigmac_jax.training.workdir import locate_workdir, read_config
from bigmac_jax.tuning import restore

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import simple_parse_args_string
except ImportError:
    problem = "lm-evaluation-harness is not installed; pip install 'bigmac_jax[lm-eval]'"
    if __name__ != "__main__":
        raise ConfigError(problem) from None
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


@register_model("bigmac_jax")
class BigMacLM(LM):
    """A model behind the harness' interface.

    Args:
      config, model: as `restore` gives them.
      length: tokens of a window; 0 takes data.sequence_length.
      batch_size: sequences at a time; 0 takes a part of the run's step.
    """

    def __init__(self, config: Config, model: Transformer, length: int = 0, batch_size: int = 0):
        super().__init__()
        self.config, self.model, self.tokenizer = config, model, load_tokenizer(config)
        self.length = check_windows(config, length, stride=0, name="length")
        self.batch_size = batch_size or evaluation_rows(config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BigMacLM":
        """From the command's --model_args: workdir, step, length, and overrides such as mesh.expert=2.

        Raises:
          ConfigError: no such run or checkpoint, an argument that is none, or a mesh that does not fit.
        """
        arguments: dict[str, Any] = {"step": "latest", "length": 0} | arg_dict
        if "workdir" not in arguments:
            raise ConfigError("--model_args must name a run, as in --model_args workdir=runs/tiny")
        workdir, step, length = (arguments.pop(name) for name in ("workdir", "step", "length"))
        size = str(arguments.pop("batch_size", None) or (additional_config or {}).get("batch_size") or 0)
        for name, value in (("batch_size", size), ("length", str(length))):
            if not value.isdecimal():
                raise ConfigError(f"{name}={value} must be a whole number; 0 takes the run's")
        saved = read_config(locate_workdir(str(workdir)))
        config = with_mesh(saved, [f"{name}={value}" for name, value in arguments.items()])
        jax.set_mesh(make_mesh(config, fit_batch=False))
        config, model = restore(workdir, str(step), config)
        return cls(config, model, int(length), int(size) or evaluation_rows(saved))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "BigMacLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        return f"{self.config.data.tokenizer}-{self.tokenizer.fingerprint[:16]}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding gives it.

        Raises:
          ConfigError: one is not finite: the harness would take it for the likeliest.
        """
        results = self._score(encode_pairs(self.tokenizer, [request.args for request in requests]), disable_tqdm)
        answers = [(result.loglikelihood, result.greedy) for result in results]
        if not_finite := sum(not math.isfinite(loglikelihood) for loglikelihood, _ in answers):
            raise ConfigError(
                f"{not_finite} of {len(answers)} log-likelihoods are not finite, for the model's activations "
                f"overflow; use execution.dtype=float32, or another checkpoint"
            )
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, nats: each token once, in windows that reach back as far as they can."""
        texts = [request.args[0] for request in requests]
        encoded = [Request([self.tokenizer.eos_id], self.tokenizer.encode(text)) for text in texts]
        answers = [result.loglikelihood for result in self._score(encoded, disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completes each context up to a stop text; a context that is too long loses its beginning.

        Raises:
          ConfigError: a completion may fill the window, which leaves a context no token.
        """
        generator = Generator(self.config, self.model, self.length, self.batch_size, self.tokenizer)
        prompts = []
        for context, options in (request.args for request in requests):
            options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0} | normalize_gen_kwargs(options)
            max_tokens = int(options["max_gen_toks"])
            if max_tokens >= self.length:
                raise ConfigError(
                    f"max_gen_toks={max_tokens} must be below the {self.length} tokens of a window, so that a prompt "
                    f"fits; use --gen_kwargs max_gen_toks={self.length // 2}, or a longer length in --model_args"
                )
            temperature, top_k, top_p = float(options["temperature"]), int(options["top_k"]), float(options["top_p"])
            sampling = Sampling(max_tokens, temperature, top_k, top_p, tuple(options["until"]))
            tokens = self.tokenizer.encode(context) or [self.tokenizer.eos_id]
            prompts.append(Prompt(tuple(tokens[max_tokens - self.length :]), sampling))
        with Progress("completions", len(prompts), "prompt", silent=disable_tqdm) as bar:
            completions = generator.generate(prompts, on_done=lambda number, completion: bar.update())
        for request, completion in zip(requests, completions, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [completion.text for completion in completions]

    def _score(self, requests: Sequence[Request], quiet: bool) -> list[Result]:
        title = "" if quiet else "log-likelihoods"
        return score_requests(self.model, requests, self.length, self.batch_size, title=title)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
