"""Tasks that are classified or written: what is asked, and figures against hand tables and other libraries."""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.evaluation.loglikelihood import Result
from bigmac_jax.evaluation.tasks import task_answers
from bigmac_jax.evaluation.tasks.answer_metrics import METRICS, judge_answer, mean, summarise_answers
from bigmac_jax.evaluation.tasks.definitions import Task, load_task
from bigmac_jax.evaluation.tasks.examples import Example, build_examples
from bigmac_jax.evaluation.tasks.scores import judge, macro_f1, summarise
from bigmac_jax.evaluation.tasks.task_answers import Prompt, write_answers
from bigmac_jax.evaluation.tasks.task_jobs import describe_scores, flatten_scores, open_jobs
from bigmac_jax.inference.text import BROKEN

CONFIG = Config(data=DataConfig(tokenizer="bytes", sequence_length=64))


def own(folder: pathlib.Path, rows: list[dict[str, Any]], **fields: Any) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"kind": "generate", "source": "rows.jsonl", "prompt": "{q} =", "answer": "{a}", "max_tokens": 4} | fields
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (folder / "own.toml").write_text("\n".join([*lines, "[columns]", 'q = "q"', 'a = "a"']))
    return str(folder / "own.toml")


CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("squad", {"context": "It is red.", "question": "Colour?", "answers": {"text": ["red", "red"]}},
     "It is red.\nQuestion: Colour?\nAnswer:", ["red"]),
    ("cnn_dailymail", {"article": "Long.", "highlights": "Short."}, "Long.\nSummary:", ["Short."]),
    ("arithmetic", {"question": "49 plus 97", "answer": 146}, "Q: What is 49 plus 97?\nA:", ["146"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "references"), CASES)
def test_rows_become_prompts(name: str, row: dict[str, Any], prompt: str, references: list[str]) -> None:
    task = load_task(name)
    assert isinstance(task, Task)
    (example,) = build_examples(task, [("row", row)])
    assert (example.prompt, list(example.references)) == (prompt, references)


def test_the_rows_of_arithmetic_are_right() -> None:
    (job,) = open_jobs(["arithmetic"], [], 0, CONFIG, ByteTokenizer(), 64)
    assert len(job.examples) == 200
    for example in job.examples:
        first, sign, second = example.prompt.split("What is ")[1].split("?")[0].split()
        value = int(first) + (1 if sign == "plus" else -1) * int(second)
        assert example.references == (str(value),)


def test_a_prompt_keeps_its_end(tmp_path: pathlib.Path) -> None:
    (job,) = open_jobs([own(tmp_path, [{"q": "x" * 70, "a": "b"}])], [], 0, CONFIG, ByteTokenizer(), 64)
    assert bytes(job.prompts[0].prompt) == b"x" * 58 + b" ="  # type: ignore[arg-type]


def test_a_prompt_goes_through_the_chat_template(tmp_path: pathlib.Path) -> None:
    name = own(tmp_path, [{"q": "1+1", "a": "2"}], chat=True)
    (job,) = open_jobs([name], [], 0, CONFIG, ByteTokenizer(), 64)
    assert bytes(job.prompts[0].prompt) == b"User: 1+1 =\nAssistant:"  # type: ignore[arg-type]
    (tmp_path / "t.jinja").write_text("<{{ messages[0].content }}>")
    (job,) = open_jobs([name], [], 0, CONFIG, ByteTokenizer(), 64, str(tmp_path / "t.jinja"))
    assert bytes(job.prompts[0].prompt) == b"<1+1 =>"  # type: ignore[arg-type]


def test_an_answer_ends_where_the_chat_template_ends_it(tmp_path: pathlib.Path) -> None:
    values = json.loads(train_bpe(["one and two"] * 4, 300))
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 300, "content": "<|im_end|>"})
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    for chat, expected in ((True, ("!", "<|im_end|>")), (False, ("!",))):
        name = own(tmp_path, [{"q": "1+1", "a": "2"}], chat=chat, stop=["!"])
        tokenizer = JsonTokenizer(json.dumps(values))
        (job,) = open_jobs([name], [], 0, CONFIG, tokenizer, 64, str(tmp_path / "t.jinja"))
        assert job.prompts[0].sampling.stop == expected


def test_rows_are_given_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="--task_data gives piqa twice, a and b; put all rows into one file"):
        open_jobs(["piqa"], ["piqa=a", "piqa=b"], 0, CONFIG, ByteTokenizer(), 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["meteor"]}, "metrics='meteor' must be some of exact_match, "),
        ({"max_tokens": 0}, "needs one prompt, and max_tokens of at least 1"),
        ({"max_tokens": 64}, "max_tokens=64 must be below the 64 tokens of the model"),
        ({"chat": 1}, "chat=1 must be true or false"),
        ({"kind": ["generate"]}, r"kind=\['generate'\] must be one of"),
        ({"answer": "z"}, "there is no 'z'"),
    ],
)
def test_bad_definitions(tmp_path: pathlib.Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_jobs([own(tmp_path, [{"q": "1", "a": "2"}], **fields)], [], 0, CONFIG, ByteTokenizer(), 64)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "value"),
    [
        ("exact_match", " 12\n", ["12"], 1), ("exact_match", "12.", ["12"], 0), ("exact_match", "b", ["a", "b"], 1),
        ("number", "It is 1,204.", ["so #### 1204"], 1), ("number", "12 or 13", ["13"], 0), ("number", "-3", ["3"], 0),
        ("number", "none", ["3"], 0), ("number", "13 or 12", ["13"], 1), ("number", "4", ["1, 3 #### 4"], 1),
        ("f1", "The cat sat", ["a cat"], 2 / 3), ("f1", "a dog", ["cat", "big dog!"], 2 / 3), ("f1", "", ["the"], 1),
        # Of 5 and 4 words, 3 are common in ROUGE-1; of 4 and 3 pairs, 1 in ROUGE-2; "cats on mat" is in order.
        ("rouge1", "two cats sat on mat", ["cat on a mat"], 2 * 3 / 9),
        ("rouge2", "cats sat on a mat", ["cat on a mat"], 2 * 2 / 7),
        ("rougeL", "mat on sat cats", ["cats sat on mat"], 2 * 1 / 8),
    ],
)  # fmt: skip
def test_figures_by_hand(metric: str, prediction: str, references: list[str], value: float) -> None:
    assert judge_answer(prediction, references, [metric])[metric] == pytest.approx(value)


def test_a_mean_and_its_error_by_hand() -> None:
    """The root of the sample's variance over the count: of 1 / 2 over two, of 1 over four; one value has none."""
    assert mean("x", [0, 1]) == {"x": 0.5, "x_stderr": pytest.approx(0.5)}
    assert mean("x", [0, 0, 0, 2]) == {"x": 0.5, "x_stderr": pytest.approx(0.5)}
    assert mean("x", [3]) == {"x": 3.0, "x_stderr": None}


def test_figures_of_all_texts_are_sacrebleus() -> None:
    import sacrebleu

    predictions, right = ["the cat sat on the mat", "it rains"], [["the cat sat on a mat", "a cat sat"], ["it rains"]]
    rows = [judge_answer(p, r, ["bleu", "chrf"]) for p, r in zip(predictions, right, strict=True)]
    references = [[r[0] for r in right], ["a cat sat", None]]
    summary = summarise_answers(rows)
    assert summary["bleu"] == sacrebleu.corpus_bleu(predictions, references).score / 100
    assert summary["chrf"] == sacrebleu.corpus_chrf(predictions, references).score / 100
    assert METRICS["bleu"].words + " " in describe_scores({"t": summary})[0]


def test_classes_are_judged_by_accuracy_and_f1() -> None:
    scores = [(0, [-1.0, -2.0]), (0, [-3.0, -2.0]), (1, [-3.0, -2.0]), (1, [-5.0, -1.0])]
    rows = [
        judge(
            "classification", Example("row", [("p", " a"), ("p", " b")], answer), [Result(v, False, 1) for v in values]
        )
        for answer, values in scores
    ]
    summary = summarise("classification", rows)
    # Class 0: 1 right of 1 predicted and 2 there; class 1: 2 of 3 and 2.
    assert summary["accuracy"] == 0.75 and math.isclose(summary["macro_f1"], (2 / 3 + 4 / 5) / 2)
    assert macro_f1([0, 0], [1, 1]) == 0
    assert "F1, mean of classes, 73.3 %" in describe_scores({"t": summary})[0]


def test_answers_are_judged_in_the_order_of_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever completion ends first; the generator has the run's config, windows and batches."""
    made: list[Any] = []
    bars: list[Any] = []

    @contextlib.contextmanager
    def progress(*given: Any, silent: bool) -> Iterator[Any]:
        bars.append([*given, silent])
        yield SimpleNamespace(update=lambda: bars.append("one more"))

    class Generator:
        def __init__(self, *given: Any) -> None:
            made.append(given)

        def generate(self, prompts: list[Prompt], on_done: Any, may_overflow: bool) -> list[Any]:
            assert may_overflow  # of one prompt, which must not end a training run
            for number in reversed(range(len(prompts))):
                on_done(number, None)
            ends = {"9": BROKEN}
            return [
                SimpleNamespace(text=a, finish_reason=ends.get(a, "stop")) for a in (f"{p.prompt[0]}" for p in prompts)
            ]

    monkeypatch.setattr(task_answers, "Generator", Generator)
    monkeypatch.setattr(task_answers, "Progress", progress)
    model, tokenizer = SimpleNamespace(config=CONFIG), ByteTokenizer()
    examples = [Example("row", [], references=(reference,)) for reference in ("7", "x", "9")]
    prompts = [Prompt((number,)) for number in (7, 8, 9)]
    rows = write_answers(model, tokenizer, examples, prompts, ("exact_match",), 64, 5, True)  # type: ignore[arg-type]
    assert made == [(CONFIG, model, 64, 5, tokenizer)]
    assert bars == [["completions", 3, "prompt", True], *["one more"] * 3]
    assert [row["exact_match"] for row in rows] == [1, 0, 0] and rows[1] == judge_answer("8", ("x",), ("exact_match",))
    assert rows[2]["prediction"] == "" and summarise("generate", rows)["not_finite"] == 1
    assert "not_finite" not in summarise("generate", rows[:2])
    with pytest.raises(ValueError, match="zip"):
        write_answers(model, tokenizer, examples[:2], prompts, (), 64, 5, True)  # type: ignore[arg-type]


def test_figures_of_a_line_of_metrics() -> None:
    summaries: Any = {"a": {"accuracy": 0.5, "accuracy_stderr": 0.1, "rows": 4}, "needle": {"grid": [[1.0]], "rows": 2}}
    assert flatten_scores(summaries) == {"tasks/a/accuracy": 0.5, "tasks/a/rows": 4, "tasks/needle/rows": 2}
