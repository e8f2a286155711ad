"""The model card: README.md beside the weights, with what is known of the model and how to load it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from bigmac_jax.config import Config
from bigmac_jax.model.counts import parameters
from bigmac_jax.training.history import describe_training

_CARD = """---
{head}tags:
- mixture-of-experts
- {structure}
---

# {name}

A language model of bigmac_jax, exported as `{model_type}`. {purpose}

| | |
|---|---|
{table}

## How to load it

```python
{code}
```{note}
"""
_PLAIN = 'import bigmac_jax\n\nconfig, model = bigmac_jax.import_model("{name}")'
_MODEL = (
    'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}"{trust})'
)
_PIPELINE = """from transformers import pipeline

generate = pipeline("text-generation", "{name}"{trust})
print(generate("Once", max_new_tokens=50)[0]["generated_text"])"""

_CHAT = """from transformers import pipeline

generate = pipeline("text-generation", "{name}"{trust})
messages = [{{"role": "user", "content": "Hello"}}]
print(generate(messages, max_new_tokens=50)[0]["generated_text"][-1]["content"])"""


class Trained(NamedTuple):
    """What a run says of the exported checkpoint."""

    step: int
    loss: float | None = None  # of the validation split, nats a token; None if it was not evaluated
    history: Sequence[str] | None = None  # what it had learned before (`training.history`); None if that is not known


def make_card(
    config: Config, model_type: str, trained: Trained | None, name: str, has_tokenizer: bool, chats: bool
) -> str:
    """The card of a model that is written as `model_type` to a directory called `name`."""
    m, count = config.model, parameters(config, dict(jax.sharding.get_mesh().shape))
    rows = {
        "structure": config.describe(),
        "layers, hidden size": f"{m.depth}, {m.hidden_size}",
        "vocabulary, context": f"{m.vocab_size:,}, {config.context_length:,} tokens",
        "parameters": f"{count.total:,}" + (f", of which a token meets {count.active:,}" if m.is_moe else ""),
    }
    if trained is not None and trained.history:
        rows["began with"] = "; then ".join(trained.history)
    if trained is not None and trained.step:
        rows["trained"] = describe_training(config, trained.step)
        if (length := config.data.sequence_length) < config.context_length:
            rows["vocabulary, context"] += f" (trained in windows of {length:,})"
    if trained is not None and trained.loss is not None:
        of = {"sft": " of the answers", "dpo": " of the chosen answers"}.get(config.tuning.objective, "")
        rows[f"validation loss{of}"] = f"{trained.loss:.4f} nats a token (perplexity {math.exp(trained.loss):.2f})"
    plain, own = model_type == "bigmac_jax", model_type == "bigmac"
    code = _PLAIN if plain else _MODEL if not has_tokenizer else _CHAT if chats else _PIPELINE
    return _CARD.format(
        # Without the head, for plain, the Hub offers no class.
        head="" if plain else "library_name: transformers\npipeline_tag: text-generation\n",
        structure=m.structure,
        name=name,
        model_type=model_type,
        purpose=_purpose(config, trained),
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        code=code.format(name=name, trust=", trust_remote_code=True" if own else ""),
        note="\n\nIts class is in this directory: read `modeling_bigmac.py` before you trust it." if own else "",
    )


def _purpose(config: Config, trained: Trained | None) -> str:
    """What the model was made for, as far as that is known."""
    if trained is None:
        return "How it was trained is not recorded."
    if trained.step and config.tuning.objective == "sft":
        return "It was fine-tuned on answers to prompts."
    if trained.step and config.tuning.objective == "dpo":
        return "It was tuned towards answers that were preferred to others."
    if trained.history is None:
        return "It predicts text; what it learned before is not recorded."
    if trained.history:
        return "It predicts text; what it began with is in the table."
    if trained.step and config.tuning.teacher:
        return "It predicts text, and learned from another model's predictions."
    if trained.step:
        return "It predicts text; it was not trained to follow instructions."
    return "Nothing was trained: its parameters are as they were drawn."
