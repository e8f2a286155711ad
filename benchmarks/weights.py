"""What weights of fewer bits cost: python -m benchmarks.weights --workdir=DIR. Perplexity of the run's validation split
and bytes of the weights, in float32, bfloat16 and int8 (JSON lines)."""

from bigmac_jax.runtime import environment

environment.prepare()

import functools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import pathlib  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402
from jax import Array  # noqa: E402

from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import with_mesh  # noqa: E402
from bigmac_jax.data.pipeline import open_stream  # noqa: E402
from bigmac_jax.evaluation.perplexity import evaluate  # noqa: E402
from bigmac_jax.inference.int8_weights import dequantize, quantize, should_quantize  # noqa: E402
from bigmac_jax.inference.kv_cache import make_decoder  # noqa: E402
from bigmac_jax.model.parameters import Declaration, map_declared  # noqa: E402
from bigmac_jax.training.programs import evaluation_rows  # noqa: E402
from bigmac_jax.training.workdir import load_run_tokenizer, read_config  # noqa: E402
from bigmac_jax.tuning import restore  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run of train.py.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best or the number of a checkpoint.")


def main() -> None:
    workdir = pathlib.Path(_WORKDIR.value)
    config = with_mesh(read_config(workdir), cli.OVERRIDES)
    stream = open_stream(config, "validation", load_run_tokenizer(workdir, config))
    cli.enter_mesh(config, fit_batch=False)
    config, model = restore(workdir, _STEP.value, config)
    for weights in ("float32", "bfloat16", "int8"):
        decoder = jax.eval_shape(functools.partial(make_decoder, config, weights=weights), model)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder))
        rounded = _rounded(model, weights)
        score = evaluate(rounded, stream, config.data.sequence_length, evaluation_rows(config)).score
        print(json.dumps({"weights": weights, "bytes": size, "perplexity": round(score.perplexity, 4)}), flush=True)


def _rounded(model: Any, weights: str) -> Any:
    """The model, computed in its own dtype, with weights as they would be kept."""

    def narrow(of: Declaration, w: Array) -> Array:
        if weights == "float32" or not should_quantize(of):
            return w
        return (
            w.astype("bfloat16").astype(w.dtype) if weights == "bfloat16" else dequantize(quantize(of, w), w.dtype.name)
        )

    return jax.jit(functools.partial(map_declared, narrow))(model)


if __name__ == "__main__":
    cli.run(main)
