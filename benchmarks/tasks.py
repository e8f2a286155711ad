"""Our scores of tasks beside two others: lm-evaluation-harness' own task code, and one request at a time in float64.

    pip install -e '.[lm-eval]'
    python -m benchmarks.tasks --workdir=runs/tiny --rows=FOLDER

FOLDER holds the data sets' rows as JSON lines, as they are published: lambada.jsonl, hellaswag.jsonl, piqa.jsonl,
winogrande.jsonl; those that are there are compared. V vocabulary, L length.
"""

import json
import pathlib
import tempfile
from typing import Any

import jax
import lm_eval.tasks
import numpy as np
from absl import app, flags
from lm_eval import simple_evaluate

from bigmac_jax import restore
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.evaluation.harness import BigMacLM
from bigmac_jax.evaluation.loglikelihood import score_requests
from bigmac_jax.evaluation.tasks.scores import judge, summarise
from bigmac_jax.evaluation.tasks.task_jobs import open_jobs

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run of train.py.")
_ROWS = flags.DEFINE_string("rows", None, "The folder of rows.", required=True)
_LIMIT = flags.DEFINE_integer("limit", 200, "Rows of each task.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Of ours.")

THEIRS = {  # the harness' definitions
    "lambada": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


class Plain(BigMacLM):
    """One request at a time, as its texts are split by hand; logits to log-likelihoods in float64."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        forward = jax.jit(lambda model, tokens_BL: model(tokens_BL, evaluating=True)[0])
        scores = []
        for context, continuation in (request.args for request in requests):
            spaces = context[len(context.rstrip()) :]
            before = self.tokenizer.encode(context.rstrip())
            targets = self.tokenizer.encode(context.rstrip() + spaces + continuation)[len(before) :]
            tokens = [*(before or [self.tokenizer.eos_id]), *targets][-self.length - 1 :]
            padded_BL = np.zeros((1, self.length), np.int32)
            padded_BL[0, : len(tokens) - 1] = tokens[:-1]
            logits_LV = np.asarray(forward(self.model, padded_BL), np.float64)[0, : len(tokens) - 1][-len(targets) :]
            shifted_LV = logits_LV - logits_LV.max(-1, keepdims=True)
            log_p_LV = shifted_LV - np.log(np.exp(shifted_LV).sum(-1, keepdims=True))
            greedy = bool((log_p_LV.argmax(-1) == targets).all())
            scores.append((float(log_p_LV[np.arange(len(targets)), targets].sum()), greedy))
        return scores


def main(_: Any) -> None:
    config, model = restore(_WORKDIR.value)
    length = config.data.sequence_length
    for name in THEIRS:
        file = pathlib.Path(_ROWS.value).absolute() / f"{name}.jsonl"
        if not file.exists():
            continue
        (job,) = open_jobs([name], [f"{name}={file}"], _LIMIT.value, config, load_tokenizer(config), length)
        results = iter(score_requests(model, job.requests, length, _BATCH_SIZE.value))
        rows = [judge(job.task.kind, example, [next(results) for _ in example.pairs]) for example in job.examples]
        print(f"{name}, {len(rows)} rows")
        print(f"  ours                    {_percent(summarise(job.task.kind, rows), 'accuracy', 'accuracy_norm')}")
        for title, lm in (("the harness, with ours", BigMacLM), ("the harness, plain", Plain)):
            figures, samples = _theirs(name, file, lm(config, model, length, _BATCH_SIZE.value))
            gaps = [
                abs(score - response[0][0])
                for row, sample in zip(rows, samples, strict=True)
                for score, response in zip(row["loglikelihoods"], sample["resps"], strict=True)
            ]
            accuracies = _percent(figures, "acc,none", "acc_norm,none")
            print(f"  {title:<23} {accuracies}; log-likelihoods differ by {max(gaps):.1e} at most", flush=True)


def _theirs(name: str, file: pathlib.Path, lm: BigMacLM) -> tuple[dict[str, Any], list[Any]]:
    """Figures and samples of the harness' task, which takes its rows from `file`."""
    task = {
        "include": str(pathlib.Path(lm_eval.tasks.__file__).parent / THEIRS[name]),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        "training_split": None,
        "test_split": None,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as definition:
        json.dump(task, definition)  # which is YAML too
        definition.flush()
        found = simple_evaluate(lm, tasks=[definition.name], limit=_LIMIT.value, bootstrap_iters=0)
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return found["results"][task["task"]], samples


def _percent(results: dict[str, Any], accuracy: str, norm: str) -> str:
    return ", ".join(f"{100 * results[key]:.1f} %" for key in (accuracy, norm) if key in results)


if __name__ == "__main__":
    app.run(main)
