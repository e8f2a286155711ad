"""The model card: README.md beside the weights, with what is known of the model and how to load it."""

import math
import pathlib
from typing import NamedTuple

import jax

from bigmac_jax.config import Config
from bigmac_jax.config.mixture import parse_mixture
from bigmac_jax.model.counts import parameters

_CARD = """---
{head}tags:
- mixture-of-experts
- {structure}
---

# {name}

A language model of bigmac_jax, exported as `{model_type}`. It predicts text; it was not trained to follow instructions.

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


class Trained(NamedTuple):
    """What a run says of the exported checkpoint."""

    step: int
    loss: float | None = None  # of the validation split, nats a token; None if it was not evaluated


def make_card(config: Config, model_type: str, trained: Trained | None, name: str, has_tokenizer: bool) -> str:
    """The card of a model that is written as `model_type` to a directory called `name`."""
    m, data, count = config.model, config.data, parameters(config, dict(jax.sharding.get_mesh().shape))
    rows = {
        "structure": config.describe(),
        "layers, hidden size": f"{m.num_layers}, {m.hidden_size}",
        "vocabulary, window": f"{m.vocab_size:,}, {data.sequence_length:,} tokens",
        "parameters": f"{count.total:,}" + (f", of which a token meets {count.active:,}" if m.is_moe else ""),
    }
    if trained is not None and trained.step:
        tokens = trained.step * data.batch_size * data.sequence_length
        source = data.source if ":" in data.source else pathlib.Path(data.source).name
        if parts := parse_mixture(data.mixture):
            source = f"a mixture: {', '.join(part.name for part in parts)}"
        rows["trained"] = f"{trained.step:,} steps on {tokens:,} tokens of {source}"
    if trained is not None and trained.loss is not None:
        rows["validation loss"] = f"{trained.loss:.4f} nats a token (perplexity {math.exp(trained.loss):.2f})"
    plain, own = model_type == "bigmac_jax", model_type == "bigmac"
    code = _PLAIN if plain else _PIPELINE if has_tokenizer else _MODEL
    return _CARD.format(
        # Without the head, for plain, the Hub offers no class.
        head="" if plain else "library_name: transformers\npipeline_tag: text-generation\n",
        structure=m.structure,
        name=name,
        model_type=model_type,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        code=code.format(name=name, trust=", trust_remote_code=True" if own else ""),
        note="\n\nIts class is in this directory: read `modeling_bigmac.py` before you trust it." if own else "",
    )
