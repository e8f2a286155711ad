"""Tasks whose answers the model writes: what it is given, and what it writes."""

from collections.abc import Sequence
from typing import Any

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_template import ChatError, load_chat
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.tasks.answer_metrics import judge_answer, load_library
from bigmac_jax.evaluation.tasks.definitions import Task
from bigmac_jax.evaluation.tasks.examples import Example
from bigmac_jax.inference.generator import Generator
from bigmac_jax.inference.generator import Request as Prompt
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import BROKEN
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime.progress import Progress


def encode_prompts(
    task: Task, examples: Sequence[Example], config: Config, tokenizer: Tokenizer, length: int, chat_template: str
) -> list[Prompt]:
    """Tokens of the prompts. One that is too long with its answer loses its beginning, as in lm-evaluation-harness.

    Raises:
      ConfigError: the answers alone are too long, or a prompt that the chat template refuses.
    """
    for metric in task.metrics:
        load_library(metric)  # before anything is generated
    if task.max_tokens >= length:
        raise ConfigError(f"{task.name}: max_tokens={task.max_tokens} must be below the {length} tokens of the model")
    stop = task.stop
    if not task.chat:
        encoded = tokenizer.encode_batch([example.prompt for example in examples])
    else:
        chat, encoded = load_chat(tokenizer, chat_template, config.data.tokenizer, "the run's chat template"), []
        stop = (*stop, *(text for text in chat.stop if text not in stop))
        for example in examples:
            try:
                encoded.append(chat.prompt([{"role": "user", "content": example.prompt}]))
            except ChatError as error:
                raise ConfigError(f"{example.place}: {error}") from None
    left, sampling = length - task.max_tokens, Sampling(task.max_tokens, stop=stop)
    return [Prompt(tuple(ids[-left:] or [tokenizer.eos_id]), sampling) for ids in encoded]


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    metrics: Sequence[str],
    length: int,
    batch_size: int,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Lets the model write an answer to each prompt, greedily, and judges it → a row for each example. Where its
    activations overflow, there is none."""
    generator = Generator(model.config, model, length, batch_size, tokenizer)
    with Progress("completions", len(prompts), "prompt", silent=quiet) as bar:
        completions = generator.generate(prompts, on_done=lambda number, completion: bar.update(), may_overflow=True)
    rows = []
    for completion, example in zip(completions, examples, strict=True):
        overflows = completion.finish_reason == BROKEN  # what was written before is no answer
        row = judge_answer("" if overflows else completion.text, example.references, metrics)
        rows.append(row | ({"overflows": True} if overflows else {}))
    return rows
