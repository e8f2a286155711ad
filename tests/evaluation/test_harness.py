"""lm-evaluation-harness through the adapter: the same figures as ours, of its own task code; its stop texts hold."""

import json
import math
import pathlib
from typing import Any

import pytest
from model.tools import on_mesh, random_model, tiny
from training.tools import text

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.full

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

from bigmac_jax.config import ConfigError  # noqa: E402
from bigmac_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from bigmac_jax.evaluation.harness import BigMacLM  # noqa: E402
from bigmac_jax.evaluation.loglikelihood import Request, Result, score_requests  # noqa: E402
from bigmac_jax.evaluation.tasks.task_jobs import open_jobs, score_jobs  # noqa: E402

CONFIG = tiny(batch=8, length=64, num_layers=1)
WORDS = [document.split() for document in text(12, seed=1)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": " ".join(w[:5]), "sol1": " ".join(w[5:8]), "sol2": " ".join(w[8:14]), "label": len(w[9]) % 2}
        for w in WORDS
    ],
    "lambada": [{"text": " ".join(w[: 5 + n])} for n, w in enumerate(WORDS)],
    "wikitext2": [{"page": f" = A{n} = \n " + " ".join(w) + " \n"} for n, w in enumerate(WORDS[:3])],
}
FORMS: dict[str, dict[str, Any]] = {
    "piqa": {"output_type": "multiple_choice", "doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_target": "label",
             "doc_to_choice": "{{[sol1, sol2]}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "lambada": {"output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
                "doc_to_target": "{{' '+text.split(' ')[-1]}}",
                "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    "wikitext2": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
                  "metric_list": [{"metric": "bits_per_byte"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> Any:
    with on_mesh(CONFIG):
        yield BigMacLM(CONFIG, random_model(CONFIG))


def test_both_score_alike(lm: Any, tmp_path: pathlib.Path) -> None:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        ConfigurableTask(
            config=form
            | {"task": name, "dataset_path": "json", "validation_split": "validation",
               "dataset_kwargs": {"data_files": {"validation": str(tmp_path / f"{name}.jsonl")}}}
        )
        for name, form in FORMS.items()
    ]  # fmt: skip
    theirs = simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0)["results"]
    data = [f"{name}={tmp_path / name}.jsonl" for name in ROWS]
    jobs = open_jobs(list(ROWS), data, 0, CONFIG, ByteTokenizer(), lm.length)
    ours = score_jobs(jobs, lm.model, ByteTokenizer(), tmp_path / "out", "", lm.length, batch_size=3)
    assert ours["piqa"]["accuracy"] == theirs["piqa"]["acc,none"]
    assert ours["piqa"]["accuracy_norm"] == theirs["piqa"]["acc_norm,none"]
    assert ours["piqa"]["accuracy_stderr"] is not None
    assert ours["lambada"]["accuracy"] == theirs["lambada"]["acc,none"]
    assert ours["lambada"]["perplexity"] == pytest.approx(theirs["lambada"]["perplexity,none"], rel=1e-4)
    # The harness' own wikitext undoes the spacing too; here nothing of it is there to undo but at the lines' ends.
    texts = next(job.examples for job in jobs if job.task.name == "wikitext2")
    requests = [Instance("loglikelihood_rolling", {}, (example.pairs[0][1],), 0) for example in texts]
    total = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
    assert ours["wikitext2"]["loss"] * ours["wikitext2"]["tokens"] == pytest.approx(total, rel=1e-6)
    bits = sum(row.num_bytes for row in texts) * ours["wikitext2"]["bits_per_byte"] * math.log(2)
    assert bits == pytest.approx(total, rel=1e-6)
    assert ours["wikitext2"]["bits_per_byte"] == pytest.approx(theirs["wikitext2"]["bits_per_byte,none"], rel=0.02)


def test_completions_end_where_they_must(lm: Any) -> None:
    """Greedy: the tokens are those that the log-likelihood calls greedy; a stop text cuts; a long context is cut."""

    def ask(context: str, **options: Any) -> str:
        request = Instance("generate_until", {}, (context, options), 0)
        return lm.generate_until([request], disable_tqdm=True)[0]

    whole = ask("the state", max_gen_toks=12)
    tokens = ByteTokenizer().encode(whole)
    if "\ufffd" not in whole:  # bytes of a random model need not be text
        (result,) = score_requests(lm.model, [Request(ByteTokenizer().encode("the state"), tokens)], lm.length, 1)
        assert result.greedy
    first = whole[0]
    assert ask("the state", max_gen_toks=12, until=[first]) == ""
    assert ask("x" * 500 + "the state", max_gen_toks=4) == ask(("x" * 500 + "the state")[-60:], max_gen_toks=4)


def test_a_prompt_has_room(lm: Any) -> None:
    """A completion as long as the window would leave it one token; a task that says nothing has the harness' 256."""
    for options, asked in (({}, 256), ({"max_gen_toks": 64}, 64)):
        with pytest.raises(ConfigError, match=rf"^max_gen_toks={asked} must be below the 64 .*max_gen_toks=32, or a"):
            lm.generate_until([Instance("generate_until", {}, ("the state", options), 0)], disable_tqdm=True)
    assert lm.generate_until([Instance("generate_until", {}, ("the state", {"max_gen_toks": 32}), 0)], True) != [""]


def test_arguments(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="must name a run"):
        BigMacLM.create_from_arg_string("step=3")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        BigMacLM.create_from_arg_obj({"workdir": str(tmp_path)}, {"batch_size": 1, "device": None})
    with pytest.raises(ConfigError, match=r"^length=long must be a whole number; 0 takes the run's$"):
        BigMacLM.create_from_arg_string("workdir=x,length=long")
    learned = tiny(length=16, positions="learned")
    with pytest.raises(ConfigError, match=r"^length=17 must be at most the 16 learned positions; use 16$"):
        BigMacLM(learned, None, length=17)  # type: ignore[arg-type]


def test_a_choice_that_is_not_finite_is_told(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not taken for the likeliest, as numpy's argmax would."""
    monkeypatch.setattr(lm, "_score", lambda requests, quiet: [Result(-1.0, True, 1), Result(math.nan, True, 1)])
    with pytest.raises(ConfigError, match=r"^1 of 2 log-likelihoods are not finite, .*; use execution\.dtype=float32"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)] * 2)
