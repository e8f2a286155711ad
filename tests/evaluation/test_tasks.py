"""Tasks: rows of each data set's form give the prompts that lm-evaluation-harness scores; bad rows are one line."""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from threads_as_processes import run_as_processes
from training.tools import ROOT

from bigmac_jax.config import Config, ConfigError, DataConfig, TuningConfig, strict_json
from bigmac_jax.data.pipeline import text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation.loglikelihood import Result
from bigmac_jax.evaluation.tasks import definitions, derived_columns, task_jobs
from bigmac_jax.evaluation.tasks import needle as needle_module
from bigmac_jax.evaluation.tasks.answer_metrics import judge_answer
from bigmac_jax.evaluation.tasks.definitions import TASKS, Needle, Task, load_task
from bigmac_jax.evaluation.tasks.examples import Example, build_examples
from bigmac_jax.evaluation.tasks.needle import build_needles, draw_needles
from bigmac_jax.evaluation.tasks.scores import judge, summarise
from bigmac_jax.evaluation.tasks.task_jobs import describe_scores, flatten_scores, open_jobs, score_jobs
from bigmac_jax.evaluation.tasks.task_rows import read_rows

CONFIG = Config(data=DataConfig(tokenizer="bytes"))
ARTICLE = {"article": "It rained. Ann stayed in."}
QUESTIONS = {
    "questions": ["Ann stayed  _  .", "What fell?", "Who is she?"],
    "options": [["in", "out", "up", "off"], ["rain", "snow", "hail", "fog"], ["Ann", "Bob", "Cid", "Dan"]],
    "answers": ["A", "A", "D"],
}
PROBLEMS = [
    {"question": q, "options": o, "answer": a}
    for q, o, a in zip(QUESTIONS["questions"], QUESTIONS["options"], QUESTIONS["answers"], strict=True)
]
RACE = "Article: It rained. Ann stayed in.\n\nAnn stayed in\nQuestion: What fell?\nAnswer: rain\nWho is she?"
RACE_PAIRS = [(RACE, f" {name}") for name in ("Ann", "Bob", "Cid", "Dan")]
WIKI = (
    " = Cats = \n \n The cat 's name , 3 @.@ 5 m ( about ) . \n = = Food = = \n It 's \" fish \" . \n"
    " = Dogs = \n Bark \n"
)

ENDINGS = ["eats [x] it.", " he  runs. [title] Go"]
HOW_TO = "How to. [header] Boil it. Then"

CASES: list[tuple[str, dict[str, Any], list[tuple[str, str]], int]] = [
    # TFDS keeps the line's end; OpenAI's rows are of the column text
    ("lambada", {"passage": "he said , no way\n"}, [("he said , no", " way")], 0),
    ("lambada", {"text": "“He said\nno  way"}, [("“He said\nno ", " way")], 0),
    (
        "hellaswag",
        {"activity_label": "Cooking", "context": "A man stirs. then HE", "endings": ENDINGS, "label": 1,
         "source_id": "activitynet~v_1", "split_type": "indomain"},
        [("Cooking: A man stirs. Then he", " eats it."), ("Cooking: A man stirs. Then he", " he runs.. Go")],
        1,
    ),
    (
        "hellaswag",
        {"activity_label": "Tea", "ctx": HOW_TO, "ctx_a": HOW_TO, "ctx_b": "", "endings": ["a", "b"], "label": "0",
         "source_id": "wikihow~2"},
        [("Tea: How to. Boil it. Then", " a"), ("Tea: How to. Boil it. Then", " b")],
        0,
    ),
    (
        "piqa",
        {"goal": "Open {it}", "sol1": "push", "sol2": "pull ", "label": 1},
        [("Question: Open {it}\nAnswer:", " push"), ("Question: Open {it}\nAnswer:", " pull ")],
        1,
    ),
    (
        "winogrande",
        {"sentence": "Al beat Bo as _ was fast.", "option1": "Al", "option2": "Bo", "label": 0},  # TFDS: a number
        [("Al beat Bo as Al", " was fast."), ("Al beat Bo as Bo", " was fast.")],
        0,
    ),
    (
        "winogrande",
        {"sentence": "Al beat Bo as _ was fast.", "option1": "Al", "option2": "Bo", "answer": "2"},  # the original
        [("Al beat Bo as Al", " was fast."), ("Al beat Bo as Bo", " was fast.")],
        1,
    ),
    ("race_high", ARTICLE | QUESTIONS, RACE_PAIRS, 3),
    ("race_high", ARTICLE | {"problems": repr(PROBLEMS)}, RACE_PAIRS, 3),
    ("ptb", {"sentence": " he did n't , mr. <unk> 's \n"}, [("", " he didn't , mr. <unk>'s ")], 0),
]  # fmt: skip


def test_derived_columns_by_hand() -> None:
    """Where the parts are there they are joined; else the last sentence is what ctx_b was, where a row has one."""
    row = {"ctx_a": None, "ctx_b": None, "source_id": None}
    contexts = [
        ({"ctx_a": "A.", "ctx_b": "he RUNS", "context": "x. y"}, "A. He runs"),
        ({"ctx_a": "A.", "ctx_b": "", "context": "x. y"}, "A. "),
        ({"ctx_a": "A.", "context": "x. y Z"}, "x. Y z"),
        ({"ctx_b": "B", "context": "x. y"}, "x. Y"),
        ({"context": "x. y. zA"}, "x. y. Za"),
        ({"context": "one two"}, "one two"),
        ({"context": ". a"}, ". A"),
        ({"context": "x. y."}, "x. y."),
        ({"context": "x. y", "source_id": "wikihow~1"}, "x. y"),
        ({"context": "x. y", "source_id": "activitynet"}, "x. Y"),
    ]
    for given, context in contexts:
        assert derived_columns.hellaswag(row | given)["context"] == context, given
    blank = {"sentence": "a _ b _ c"}
    assert derived_columns.winogrande(blank) == blank | {"before": "a ", "after": "b _ c"}
    for answers in ({"text": ["b", "a", "b"], "start": [1, 2, 3]}, ["b", "a", "b"]):
        assert derived_columns.squad({"answers": answers})["texts"] == ["b", "a"]


def task(name: str) -> Task:
    loaded = load_task(name)
    assert isinstance(loaded, Task)
    return loaded


@pytest.mark.parametrize(("name", "row", "pairs", "answer"), CASES)
def test_rows_become_pairs(name: str, row: dict[str, Any], pairs: list[tuple[str, str]], answer: int) -> None:
    (example,) = build_examples(task(name), [("row", row)])
    assert example.pairs == pairs and example.answer == answer
    by_length = name in ("hellaswag", "piqa", "race_high")
    assert example.lengths == (tuple(len(text) - 1 for _, text in pairs) if by_length else ())


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": WIKI}],  # the whole file
        [{"text": line} for line in WIKI.splitlines(keepends=True)],  # a row a line
        [{"page": page.removesuffix("\n")} for page in (WIKI[: WIKI.index(" = Dogs")], WIKI[WIKI.index(" = Dogs") :])],
    ],
)
def test_wikitext_is_scored_by_article(rows: list[dict[str, str]]) -> None:
    cats, dogs = build_examples(task("wikitext2"), [("row", row) for row in rows])
    text = " = Cats =\n\nThe cat's name, 3.5 m (about).\n == Food ==\nIt's \"fish\". "
    assert cats.pairs[0][1].replace(" ==", "==") == text.replace(" ==", "==")
    assert dogs.pairs == [("", " = Dogs =\nBark ")]
    of_cats = WIKI[: WIKI.index("\n = Dogs")]
    assert (cats.num_bytes, cats.words) == (len(of_cats), len(of_cats.split()) + 2)  # as the harness counts


def test_tasks_of_the_issue() -> None:
    assert {"ptb", "wikitext2", "wikitext103", "lambada", "hellaswag", "winogrande", "piqa", "race_high"} < {*TASKS}
    for name in TASKS:
        loaded = load_task(name)
        assert isinstance(loaded, Needle) or loaded.source.startswith("tfds:") == (
            loaded.kind != "perplexity" and name != "arithmetic"
        )
    assert task("wikitext103").substitutions == task("wikitext2").substitutions


def write(folder: pathlib.Path, name: str, rows: Any) -> pathlib.Path:
    path, table = folder / name, rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "file.arrow", "stream.arrow", "rows.parquet"])
def test_files_of_rows(tmp_path: pathlib.Path, name: str) -> None:
    rows = [{"text": f"é {n}", "endings": ["a", "ü"], "label": n} for n in range(3)]
    path = str(write(tmp_path, name, rows))
    assert [row for _, row in read_rows(path, "", 0, "", "x")] == rows
    assert [row for _, row in read_rows(path, "", 2, "", "x")] == rows[:2]


@pytest.mark.parametrize("name", ["file.arrow", "rows.parquet"])
def test_two_columns_of_one_name(tmp_path: pathlib.Path, name: str) -> None:
    path = write(tmp_path, name, pa.table([["a b"], ["c d"], [1]], names=["text", "text", "n"]))
    with pytest.raises(ConfigError, match=rf"{name}: 2 columns are named 'text'; rename all but one$"):
        read_rows(str(path), "", 0, "", "x")


def test_rows_of_tfds_are_plain(tmp_path: pathlib.Path) -> None:
    """Numpy's arrays, numbers and bytes, as TFDS gives them."""
    from bigmac_jax.evaluation.tasks.task_rows import _to_plain

    row = {"a": "é".encode(), "b": np.array([b"x", "é".encode()], object), "c": np.int64(1), "d": [np.array([b"y"])]}
    assert _to_plain(row, "") == {"a": "é", "b": ["x", "é"], "c": 1, "d": [["y"]]}
    assert type(_to_plain(row, "")["c"]) is int


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
OWN = 'kind = "multiple_choice"\nprompt = "{q}"\nchoices = "c"\nanswer = "a"\nsource = "own.jsonl"\n'
COLUMNS = '[columns]\nq = "question"\nc = "options"\na = "gold"\n'


def needle(old: str, new: str) -> bytes:
    """needle.toml with a change."""
    text = (ROOT / "bigmac_jax" / "evaluation" / "tasks" / "needle.toml").read_text()
    assert old in text
    return text.replace(old, new).encode()


BAD: dict[str, tuple[str, str, bytes, str]] = {  # task, file, its content, what the line says
    "unknown task": ("piqua", "", b"", "--tasks=piqua is not a task; use arithmetic, cnn_dailymail, hellaswag"),
    "no rows in TFDS": ("ptb", "", b"", "ptb is not in TFDS; give its rows with --task_data=ptb=PATH"),
    "no file": ("piqa", "no.jsonl", b"", "no.jsonl is not a file"),
    "unknown kind of file": ("piqa", "rows.csv", b"a,b", "rows.csv must end in .jsonl, .arrow"),
    "empty file": ("piqa", "rows.jsonl", b"", "rows.jsonl has no rows"),
    "blank file": ("piqa", "rows.jsonl", b"\n \n", "rows.jsonl has no rows"),
    "empty text": ("ptb", "rows.txt", b" \n", "rows.txt has no text"),
    "missing column": (
        "piqa", "rows.jsonl", b'{"goal": "g", "sol1": "a", "label": 0}',
        "line 1: column 'sol2' is missing",
    ),
    "missing of two": (
        "lambada", "rows.jsonl", b'{"x": "a b"}',
        "column 'text' or 'passage' is missing, which lambada needs; it has x",
    ),
    "null": ("lambada", "rows.jsonl", b'{"text": null}', "'text' or 'passage' is missing"),
    "broken UTF-8": (
        "lambada", "rows.jsonl", b'{"text": "a b"}\n{"text": "a \xff b"}',
        "line 2 is not UTF-8 at byte 13",
    ),
    "lone surrogate": ("lambada", "rows.jsonl", b'{"text": "a \\ud800"}', "line 1 is not UTF-8"),
    "UTF-16": ("ptb", "rows.tokens", "a b".encode("utf-16-le"), "rows.tokens seems to be text as UTF-16, not"),
    "broken UTF-8 text": ("wikitext2", "rows.raw", b"a \xff", "rows.raw is not UTF-8 at byte 3"),
    "broken JSON": ("piqa", "rows.jsonl", b'{"goal": ', "line 1 is no JSON object"),
    "not an object": ("piqa", "rows.jsonl", b"[1]", "line 1 is no JSON object (it is a JSON list, no object)"),
    "broken arrow": ("piqa", "rows.arrow", b"ARROW1 no", "rows.arrow cannot be read"),
    "broken parquet": ("piqa", "rows.parquet", b"PAR1", "rows.parquet cannot be read"),
    "number for a text": ("lambada", "rows.jsonl", b'{"text": [1]}', "column 'text' holds list, not text"),
    "answer out of range": (
        "piqa", "rows.jsonl", json.dumps(PIQA | {"label": 2}).encode(),
        "label=2 must be the number of a choice, 0 to 1",
    ),
    "hidden answer": ("piqa", "rows.jsonl", json.dumps(PIQA | {"label": -1}).encode(), "label=-1 must be"),
    "empty choice": ("piqa", "rows.jsonl", json.dumps(PIQA | {"sol2": ""}).encode(), "choice 1 is empty"),
    "no last word": ("lambada", "rows.jsonl", b'{"text": "a "}', "must end in a word"),
    "no blank": (
        "winogrande", "rows.jsonl", b'{"sentence": "s", "option1": "a", "option2": "b", "answer": "1"}',
        "no blank",
    ),
    "race without questions": ("race_high", "rows.jsonl", b'{"article": "a"}', "line 1 is not a row of race_high"),
    "rows for the needle": ("needle", "rows.jsonl", b"{}", "needle makes its rows itself"),
    "not TOML": ("own.toml", "own.toml", b"kind", "own.toml is not valid TOML"),
    "TOML of no kind": ("own.toml", "own.toml", b'kind = "x"', "kind='x' must be one of multiple_choice, class"),
    "unknown field": ("own.toml", "own.toml", (OWN + "shots = 3\n" + COLUMNS).encode(), "shots is not a field"),
    "missing field": ("own.toml", "own.toml", OWN.encode(), "columns is missing"),
    "field of the wrong type": (
        "own.toml", "own.toml", ("split = 3\n" + OWN + COLUMNS).encode(),
        "split=3 must be a text",
    ),
    "bad pattern": (
        "own.toml", "own.toml", ('substitutions = [["(", ""]]\n' + OWN + COLUMNS).encode(),
        "'(' is not a regular expression",
    ),
    "bad replacement": (
        "own.toml", "own.toml", ('substitutions = [["a", "\\\\9"]]\n' + OWN + COLUMNS).encode(),
        "'a' is not a regular expression with a replacement",
    ),
    "format of a number": (
        "own.toml", "own.toml", (OWN + COLUMNS).replace("{q}", "{q:d}").encode(),
        "'{q:d}' is not a template",
    ),
    "column within a column": (
        "own.toml", "own.toml", (OWN + COLUMNS).replace("{q}", "{q:{z}}").encode(),
        "'{q:{z}}' is not a template",
    ),
    "endless answer": ("piqa", "rows.jsonl", json.dumps(PIQA | {"label": math.inf}).encode(), "label=inf must be"),
    "no sample": ("own.toml", "own.toml", needle("samples = 4", "samples = 0"), "samples=0 must be at least 1"),
    "no digit": ("own.toml", "own.toml", needle("digits = 4", "digits = 0"), "digits=0 must be at least 1"),
    "too many distractors": (
        "own.toml", "own.toml", needle("digits = 4", "digits = 1"),
        "distractors=9 must be fewer than the 9 numbers of digits=1",
    ),
    "unknown name in a needle": ("own.toml", "own.toml", needle("{number}", "{nummer}"), "is not a template with {num"),
    "unknown preparation": (
        "own.toml", "own.toml", ('prepare = "x"\n' + OWN + COLUMNS).encode(),
        "prepare='x' must be one of",
    ),
    "unknown column in a template": (
        "own.toml", "own.toml", (OWN + COLUMNS).replace("{q}", "{z}").encode(),
        "there is no 'z'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path: pathlib.Path, name: str) -> None:
    wanted, file, content, line = BAD[name]
    if file and file != "no.jsonl":
        (tmp_path / file).write_bytes(content)
    (tmp_path / "own.jsonl").write_text('{"question": "q", "options": ["a", "b"], "gold": 1}')
    tasks = [str(tmp_path / wanted) if wanted.endswith(".toml") else wanted]
    data = [] if not file or file == wanted else [f"{wanted}={tmp_path / file}"]
    with pytest.raises(ConfigError) as error:
        open_jobs(tasks, data, 0, CONFIG, ByteTokenizer(), 512)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_processes_score_the_same(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    """A file of rows, or a text, that another process has otherwise is an error, before the model is used."""
    program = command("eval")

    def score(process: int) -> Any:
        file = write(tmp_path, f"{process}.jsonl", [{"goal": "g", "sol1": f"s{process}", "sol2": "b", "label": 0}])
        jobs = open_jobs(["piqa"], [f"piqa={file}"], 0, Config(), ByteTokenizer(), 64)
        return score_jobs(jobs, None, ByteTokenizer(), tmp_path, "", 64, 1)  # type: ignore[arg-type]

    def score_text(process: int) -> Any:
        trained = program.Trained(tmp_path, Config(), ByteTokenizer(), 64, 1)
        return program._score_texts(trained, {"notes.txt": text_stream(f"text {process}", ByteTokenizer())})

    for work, name in ((score, "the rows of piqa"), (score_text, "the text of notes.txt")):
        for error in run_as_processes(monkeypatch, 2, work):
            assert f"process 1 was started with {name}=" in str(error)


def test_a_limit_is_of_what_is_counted(tmp_path: pathlib.Path) -> None:
    """Of a perplexity task documents, however many rows each has; of needles some of every length and depth."""
    file = write(tmp_path, "wiki.jsonl", [{"text": line} for line in (WIKI * 3).splitlines(keepends=True)])
    for limit, count in ((1, 1), (3, 3), (0, 6), (9, 6)):
        (job,) = open_jobs(["wikitext2"], [f"wikitext2={file}"], limit, CONFIG, ByteTokenizer(), 64)
        assert len(job.examples) == count
    (tmp_path / "hay.txt").write_text("A sentence of many. " * 80)
    text = (pathlib.Path(needle_module.__file__).parent / "needle.toml").read_text()
    (own := tmp_path / "own.toml").write_text(re.sub("haystack = .*", f'haystack = "{tmp_path}/hay.txt"', text))
    (whole,) = open_jobs([str(own)], [], 0, CONFIG, ByteTokenizer(), 600)
    cells = {example.cell for example in whole.examples}
    for limit, seen in ((len(cells), len(cells)), (7, 7), (10**6, len(cells)), (len(whole.examples) - 1, len(cells))):
        (job,) = open_jobs([str(own)], [], limit, CONFIG, ByteTokenizer(), 600)
        assert len({example.cell for example in job.examples}) == seen
        assert len(job.examples) == min(limit, len(whole.examples))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks=piqa", "--split=test"], "--split=test is of texts"),
        (["--tasks=wikitext2,piqa", "--documents=masked"], "--documents=masked is of a text"),
        (["--tasks=piqa,needle", "--stride=8"], "--stride=8 is of texts and of perplexity tasks"),
        (["--tasks=piqa,wikitext2", "--stride=8"], ""),
        (["--tasks=piqa", "--stride=0"], ""),
        (["--text_file=a.txt", "--split=train"], "--split=train is of data sets; a file is scored as a whole"),
        (["--text_file=a.txt", "--stride=8", "--documents=masked"], ""),
        (["--sources=a.txt,b", "--split=train"], "--split=train is of data sets and of the run's own sources"),
        (["--sources=a.txt,sotu", "--split=train", "--stride=8", "--documents=stream"], ""),
        (["--split=train", "--stride=8"], ""),
        (["tuned", "--stride=8"], "--stride=8 is of texts; rows of conversations are scored whole"),
        (["tuned", "--sources=a.jsonl", "--documents=stream"], "--documents=stream is of texts; rows"),
        (["tuned", "--text_file=a.txt", "--stride=8"], ""),
        (["tuned", "--tasks=wikitext2", "--stride=8"], ""),
        (["tuned", "--split=train"], ""),
    ],
)
def test_flags_that_change_nothing_are_refused(given: list[str], message: str, command: Any) -> None:
    program = command("eval")
    tuning = TuningConfig(objective="sft") if given[0] == "tuned" else TuningConfig()
    data = dataclasses.replace(CONFIG.data, documents="masked", packing="best_fit", source="a.jsonl")
    config = dataclasses.replace(CONFIG, tuning=tuning, data=data)
    flags.FLAGS(["eval", *given])
    try:
        with pytest.raises(ConfigError, match=re.escape(message)) if message else contextlib.nullcontext():
            program._check_used(config)
    finally:
        flags.FLAGS.unparse_flags()


def test_own_task(tmp_path: pathlib.Path) -> None:
    """A file beside its rows, and flags that contradict it."""
    (tmp_path / "own.toml").write_text(OWN + COLUMNS)
    (tmp_path / "own.jsonl").write_text('{"question": "q", "options": ["a", "bé"], "gold": 1}')
    (job,) = open_jobs([str(tmp_path / "own.toml")], [], 0, CONFIG, ByteTokenizer(), 512)
    assert job.task.name == "own" and job.examples[0].pairs == [("q", " a"), ("q", " bé")]
    assert [(bytes(r.context), bytes(r.continuation)) for r in job.requests] == [
        (b"q", b" a"),
        (b"q", " bé".encode()),
    ]
    for data in ("piqa=x.jsonl", "own", "own="):
        with pytest.raises(ConfigError, match="must be NAME=PATH, with a name of --tasks=own"):
            open_jobs([str(tmp_path / "own.toml")], [data], 0, CONFIG, ByteTokenizer(), 512)


LIST, TABLE, PAIRS, SHARES = tuple[str, ...], dict[str, tuple[str, ...]], tuple[tuple[str, str], ...], tuple[float, ...]
FIELDS: list[tuple[Any, Any, Any]] = [  # a field's type, a value in the file, and what it becomes; None: refused
    (LIST, "a", ("a",)), (LIST, ["a", "b"], ("a", "b")), (LIST, [], ()), (LIST, ["a", 1], None), (LIST, 3, None),
    (TABLE, {"q": "a", "c": ["b", "d"]}, {"q": ("a",), "c": ("b", "d")}), (TABLE, "a", None), (TABLE, {"q": 1}, None),
    (PAIRS, [["a", "b"], ["c", ""]], (("a", "b"), ("c", ""))), (PAIRS, [], ()), (PAIRS, [["a"]], None),
    (PAIRS, [["a", "b", "c"]], None), (PAIRS, ["ab"], None), (PAIRS, "ab", None), (PAIRS, [["a", 1]], None),
    (SHARES, [0, 0.5, 1], (0.0, 0.5, 1.0)), (SHARES, [], None), (SHARES, [1.01], None), (SHARES, [-0.01], None),
    (SHARES, [True], None), (SHARES, 0.5, None), (SHARES, ["0"], None),
    (str, "a", "a"), (str, 1, None), (bool, True, True), (bool, 1, None),
    (int, 0, 0), (int, 7, 7), (int, -1, None), (int, True, None), (int, 1.0, None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "made"), FIELDS)
def test_fields_of_a_task_file(kind: Any, value: Any, made: Any) -> None:
    if made is None:
        with pytest.raises(ConfigError, match=r"^own\.toml: x.* must be "):
            definitions._convert(kind, value, "own.toml: x")
    else:
        found = definitions._convert(kind, value, "own.toml: x")
        assert found == made and repr(found) == repr(made)


def test_files_of_tasks_at_their_limits(tmp_path: pathlib.Path) -> None:
    """As few samples and digits as may be, and one distractor less than there are other numbers; what is liked."""
    file = tmp_path / "own.toml"
    few = needle("samples = 4", "samples = 1").replace(b"digits = 4", b"digits = 1")
    file.write_bytes(few.replace(b"distractors = 9", b"distractors = 8"))
    loaded = load_task(str(file))
    assert isinstance(loaded, Needle) and (loaded.samples, loaded.digits, loaded.distractors) == (1, 1, 8)
    for distractors, refused in ((b"89", False), (b"90", True)):
        two = needle("digits = 4", "digits = 2").replace(b"distractors = 9", b"distractors = " + distractors)
        file.write_bytes(two)
        with pytest.raises(ConfigError, match="fewer than the 90 ") if refused else contextlib.nullcontext():
            load_task(str(file))
    file.write_text('like = "arithmetic"\nmax_tokens = 1')
    found, arithmetic = task(str(file)), task("arithmetic")
    assert found == dataclasses.replace(arithmetic, name="own", max_tokens=1) and arithmetic.max_tokens > 1
    assert pathlib.Path(found.source) == pathlib.Path(definitions.__file__).parent / "arithmetic.jsonl"
    file.write_text('like = "ptb"\nsource = "rows.txt"')
    assert task(str(file)).source == str(tmp_path / "rows.txt")
    (tmp_path / "piqa.toml").write_text('like = "piqa"')
    for name, text, line in (
        ("piqa", 'like = "piqa"', "like='piqa' must be another of"),
        ("own", 'like = "x"', "like='x' must be another of"),
        ("own", 'like = "arithmetic"\nprompt = ["a", "b"]', "needs one prompt"),
        ("own", 'like = "arithmetic"\nmetrics = ["f1", "x"]', "metrics='x' must be some of"),
        ("own", 'like = "wikitext2"\ndocuments = "("', "is not a regular expression"),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(ConfigError, match=line):
            load_task(str(tmp_path / f"{name}.toml"))
    (tmp_path / "own.txt").write_text('like = "piqa"')
    with pytest.raises(ConfigError, match="is not a task; use"):
        load_task(str(tmp_path / "own.txt"))


ROW = {"q": "Q", "a": "1", "n": 2, "c": ["x", "yy"], "none": None, "b": True, "f": 1.5}
CHOICES = Task("own", "multiple_choice", prompt=("{q}:",), choices=("c",), answer="a")
BUILT: list[tuple[Task, dict[str, Any], Any]] = [  # a task, what differs in ROW; (pairs, answer, lengths), or the line
    (CHOICES, {}, ([("Q:", " x"), ("Q:", " yy")], 1, (1, 2))),
    (dataclasses.replace(CHOICES, choices=("{q}", "{n}", "{f}")), {},
     ([("Q:", f" {t}") for t in ("Q", "2", "1.5")], 1, (1, 1, 3))),
    (dataclasses.replace(CHOICES, prompt=("{q}1", "{q}2"), choices=("{n}",)), {"a": 0},
     ([("Q1", " 2"), ("Q2", " 2")], 0, ())),
    (dataclasses.replace(CHOICES, prompt=("{q}1", "{q}2")), {}, ([("Q1", " x"), ("Q2", " yy")], 1, ())),
    (dataclasses.replace(CHOICES, answer_names=("z", "Q")), {"a": "Q"}, ([("Q:", " x"), ("Q:", " yy")], 1, (1, 2))),
    (dataclasses.replace(CHOICES, answer_names=("z", "Q")), {"a": "0"}, ([("Q:", " x"), ("Q:", " yy")], 0, (1, 2))),
    (dataclasses.replace(CHOICES, substitutions=(("x", "vw"), ("Q", ""))), {},
     ([(":", " vw"), (":", " yy")], 1, (2, 2))),
    (CHOICES, {"a": "2"}, "a='2' must be the number of a choice, 0 to 1$"),
    (dataclasses.replace(CHOICES, answer_names=("z",)), {"a": "no"}, "0 to 1, or one of z"),
    (CHOICES, {"c": ["x"]}, "1 prompts and 1 choices|two at least"),
    (CHOICES, {"c": ["x", ""]}, "choice 1 is empty"),
    (CHOICES, {"c": "x"}, "c holds str; it must be a list of texts"),
    (CHOICES, {"c": ["x", True]}, "column 'c' holds bool, not text"),
    (CHOICES, {"q": True}, "column 'q' holds bool, not text"),
    (dataclasses.replace(CHOICES, prompt=("1", "2", "3")), {}, "3 prompts and 2 choices must be as many"),
    (dataclasses.replace(CHOICES, prompt=("{none}",)), {}, "there is no 'none'"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "row", "built"), BUILT)
def test_choices_of_a_row(own: Task, row: dict[str, Any], built: Any) -> None:
    own = dataclasses.replace(own, optional={name: (name,) for name in ROW})
    if isinstance(built, str):
        with pytest.raises(ConfigError, match=built):
            build_examples(own, [("row", ROW | row)])
    else:
        assert build_examples(own, [("row", ROW | row)]) == [Example("row", *built)]


def test_classes_are_the_same_in_all_rows() -> None:
    own = dataclasses.replace(CHOICES, kind="classification", columns={name: (name,) for name in ("q", "a", "c")})
    rows = [("row", ROW), ("row", ROW | {"c": ["x", "y", "z"]})]
    assert len(build_examples(own, [rows[0], rows[0]])) == 2
    with pytest.raises(ConfigError, match="own has rows with 2 and with 3 choices"):
        build_examples(own, rows)
    assert len(build_examples(dataclasses.replace(own, kind="multiple_choice"), rows)) == 2


def test_right_answers_of_a_row() -> None:
    own = Task("own", "generate", prompt=("{q}:",), answer="a", columns={"q": ("q",)}, optional={"a": ("b", "a")})

    def references(right: Any, **change: Any) -> tuple[str, ...]:
        (example,) = build_examples(dataclasses.replace(own, **change), [("row", {"q": "Q", "a": right})])
        assert example == Example("row", [], prompt="Q:", references=example.references)
        return example.references

    assert references(7) == ("7",) and references("x") == ("x",) and references(["x", "", 2]) == ("x", "", "2")
    assert references("x", answer="{a}{q}") == ("xQ",)
    assert references(["x"], substitutions=(("x", "y"),)) == ("y",)
    for empty in (" ", ["", " "], []):
        with pytest.raises(ConfigError, match="a is empty; an answer needs some text"):
            references(empty)


def test_documents_of_rows() -> None:
    """Without a pattern each row is one; blank ones are none, and words are counted as the harness does."""
    own = Task("own", "perplexity", text="t", columns={"t": ("t",)}, substitutions=(("a", "bb"),))
    rows = [("one", {"t": "a ü\n"}), ("two", {"t": " "}), ("three", {"t": "c"})]
    assert build_examples(own, rows) == [
        Example("one", [("", "bb ü\n")], words=3, num_bytes=5),
        Example("three", [("", "c")], words=1, num_bytes=1),
    ]
    joined = build_examples(dataclasses.replace(own, documents="(?m)^c"), rows)
    assert joined == [
        Example("own document 1", [("", "bb ü\n ")], words=3, num_bytes=6),
        Example("own document 2", [("", "c")], words=1, num_bytes=1),
    ]
    with pytest.raises(ConfigError, match=r"^two has no text, nor have rows after it; own needs words"):
        build_examples(own, rows[1:2])


def results(*scores: float, greedy: bool = False, tokens: int = 3) -> list[Result]:
    return [Result(score, greedy, tokens) for score in scores]


def test_multiple_choice_by_hand() -> None:
    """Plain: the first is likelier, right once in three; by character: the longer one, -1 against -2 and the like."""
    examples = [Example("", [("", " a"), ("", " bbbb")], answer, (1, 4)) for answer in (0, 1, 1)]
    rows = [judge("multiple_choice", e, results(-2.0, -4.0)) for e in examples[:2]]
    rows.append(judge("multiple_choice", examples[2], results(-2.0, -16.0)))
    assert [row["right"] for row in rows] == [True, False, False]
    assert [row["right_norm"] for row in rows] == [False, True, False]
    summary = summarise("multiple_choice", rows)
    assert summary["accuracy"] == summary["accuracy_norm"] == pytest.approx(1 / 3)
    assert summary["accuracy_stderr"] == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))  # s² = p (1 − p) n / (n − 1)
    assert summary["loglikelihood"] == pytest.approx((-2 - 4 - 16) / 3) and summary["rows"] == 3
    assert describe_scores({"own": summary}) == [
        "own: accuracy 33.3 % ± 33.3, by likelihood a character 33.3 % ± 33.3 (3 rows)"
    ]
    assert summarise("multiple_choice", rows[:1])["accuracy_stderr"] is None


def test_last_word_and_perplexity_by_hand() -> None:
    pair = Example("", [("a", " b")])
    rows = [judge("last_word", pair, results(-1.0, greedy=True)), judge("last_word", pair, results(-3.0))]
    summary = summarise("last_word", rows)
    assert (summary["accuracy"], summary["perplexity"]) == (0.5, pytest.approx(math.exp(2)))
    documents = [Example("", [("", "x")], words=2, num_bytes=8), Example("", [("", "x")], words=1, num_bytes=4)]
    rows = [
        judge("perplexity", e, results(-s, tokens=t)) for e, s, t in zip(documents, (2.0, 4.0), (3, 1), strict=True)
    ]
    summary = summarise("perplexity", rows)
    assert (summary["tokens"], summary["words"], summary["bytes"], summary["rows"]) == (4, 3, 12, 2)
    assert summary["word_perplexity"] == pytest.approx(math.exp(6 / 3))
    assert summary["byte_perplexity"] == pytest.approx(math.exp(6 / 12))
    assert summary["loglikelihood"] == -6.0
    # What leaves the floats ends at e^700, which JSON can hold.
    worst = summarise("perplexity", [judge("perplexity", documents[1], results(-1e4, tokens=1))])
    names = ("perplexity", "word_perplexity", "byte_perplexity")
    assert [worst[name] for name in names] == [math.exp(700)] * 3
    assert summarise("last_word", [judge("last_word", pair, results(-1e4))])["perplexity"] == math.exp(700)


@pytest.mark.parametrize("score", [math.nan, -math.inf])
@pytest.mark.parametrize("kind", ["multiple_choice", "classification", "needle", "last_word", "perplexity"])
def test_what_is_not_finite_is_not_right(kind: str, score: float) -> None:
    """Whichever choice it is of, and whatever is greedy; the other row is right."""
    pairs = [("", "x")] * (1 if kind in ("last_word", "perplexity") else 2)
    example = Example("", pairs, 0, (1, 1)[: len(pairs)], words=1, num_bytes=1, cell=(16, 0.5))
    for place in range(len(pairs)):
        scores = [-1.0] * len(pairs)
        scores[place] = score
        bad, good = (
            judge(kind, example, results(*values, greedy=True)) for values in (scores, [-1.0, -2.0][: len(pairs)])
        )
        assert bad.get("prediction") is None and not any(bad.get(name) for name in ("right", "right_norm", "found"))
        summary = summarise(kind, [bad, good])
        shares = [value for name, value in summary.items() if name.startswith("accuracy") and "stderr" not in name]
        assert len(shares) == {"multiple_choice": 2, "classification": 2, "needle": 3, "last_word": 1}.get(kind, 0)
        assert set(shares) <= {0.5} and summary["not_finite"] == 1
        (line,) = describe_scores({"own": summary})
        assert line.endswith(" (2 rows, 1 of them not finite: the model's activations overflow)")
        for name in ("perplexity", "word_perplexity", "byte_perplexity"):
            assert name not in summary or math.isnan(score) == math.isnan(summary[name])
        lost = json.loads(strict_json(flatten_scores({"own": summary}) | {"rows": [bad, good]}))
        assert lost["rows"][0]["loglikelihoods"][place] is None
    if kind == "classification":
        assert summary["macro_f1"] == pytest.approx(2 / 3)  # of the two there, one was predicted
    assert "not_finite" not in summarise(kind, [good])


def test_sentences_that_fit_by_hand() -> None:
    """Those too long are skipped, until fewer than four tokens are left."""
    for sizes, left, taken in (
        ([5, 9, 1, 1], 10, "acd"), ([5, 9, 2, 1], 10, "ac"), ([10], 10, "a"), ([11], 10, ""), ([6, 1, 1], 10, "ab"),
        ([7, 1], 10, "a"), ([1, 1], 3, "a"), ([1], 0, ""),
    ):  # fmt: skip
        names = list("abcd"[: len(sizes)])
        assert "".join(needle_module._take_fitting(names, sizes, left)) == taken, sizes


def test_needles(tmp_path: pathlib.Path) -> None:
    (tmp_path / "hay.txt").write_text(" ".join(f"Sentence {n} is one of many." for n in range(80)))
    hay = str(tmp_path / "hay.txt")
    values = {"haystack": hay, "lengths": (0.5, 1.0), "depths": (0.0, 0.5, 1.0), "samples": 2, "distractors": 3}
    loaded = load_task("needle")
    assert isinstance(loaded, Needle)
    needle = Needle(**(vars(loaded) | values))
    # a file of its own for each split holds nothing out
    examples = build_needles(needle, CONFIG, ByteTokenizer(), 400)
    # The run's own text is not looked at.
    mixed = Config(data=DataConfig(tokenizer="bytes", mixture="a.txt=1,b.txt=1", curriculum="9:b=1"))
    assert build_needles(needle, mixed, ByteTokenizer(), 400) == examples
    assert [e.cell for e in examples] == [
        (tokens, d) for tokens in (200, 400) for d in (0.0, 0.5, 1.0) for _ in range(2)
    ]
    begins = set()
    for example in examples:
        numbers = [int(n) for n in re.findall(r"Sentence (\d+) ", example.pairs[0][0])]  # in turn, from any on
        assert numbers == [(numbers[0] + i) % 80 for i in range(len(numbers))]
        begins.add(numbers[0])
        tokens, depth = example.cell or (0, 0.0)
        prompt, answer = example.pairs[0]
        body, _, rest = prompt.partition(f" The secret number is{answer}.")
        if depth == 0.0:  # nothing stands before it
            body, _, rest = prompt.partition(f"The secret number is{answer}.")
        assert prompt.endswith("\n\nThe secret number is") and prompt.count(answer.strip()) == 1
        assert tokens - 60 < len(prompt + answer) - 1 <= tokens  # bytes are tokens; a sentence more would not fit
        assert abs(len(body) - depth * (len(body) + len(rest) - 23)) < 35
        assert len({text for _, text in example.pairs}) == 4 and all(len(text) == 5 for _, text in example.pairs)
    assert len(begins) > 6
    assert len({example.pairs[0][1] for example in examples}) > 6
    with pytest.raises(ConfigError, match="do not fit into 60 tokens"):
        build_needles(needle, CONFIG, ByteTokenizer(), 120)

    rows = [
        judge("needle", e, [Result(-1.0, i % 2 == 0, 4), *results(-2.0, -2.0, -2.0)]) for i, e in enumerate(examples)
    ]
    # Some of the cells alone.
    with warnings.catch_warnings(action="error"):
        few = summarise("needle", rows[:2] + rows[8:10])["grid"]
        assert few == {"lengths": [200, 400], "depths": [0.0, 0.5], "accuracy": [[0.5, None], [None, 0.5]]}
        draw_needles(few, tmp_path / "few.png", "found")
    summary = summarise("needle", rows)
    assert summary["grid"] == {"lengths": [200, 400], "depths": [0.0, 0.5, 1.0], "accuracy": [[0.5] * 3] * 2}
    assert (summary["accuracy"], summary["accuracy_choice"]) == (0.5, 1.0)
    draw_needles(summary["grid"], tmp_path / "needle.png", "found")
    assert (tmp_path / "needle.png").stat().st_size > 5000


def test_a_picture_of_needles_by_hand(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths to the right, depths downwards, both in order; a cell without a needle has no number."""
    saved: list[Any] = []
    monkeypatch.setattr(needle_module, "save_figure", lambda *given: saved.append(given))
    grid = {"lengths": [200, 4000], "depths": [0.0, 0.5, 1.0], "accuracy": [[0.1, 0.25, None], [0.9, 0.5, 0.75]]}
    draw_needles(grid, tmp_path / "needle.png", "found")
    ((figure, path),) = saved
    axis, bar = figure.axes
    (image,) = axis.images
    assert path == tmp_path / "needle.png" and image.get_clim() == (0, 100)
    assert image.get_array().filled(-1).tolist() == [[10, 90], [25, 50], [-1, 75]]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(0, 0): "10", (1, 0): "90", (0, 1): "25", (1, 1): "50", (1, 2): "75"}
    ticks = [
        ([*of.get_ticklocs()], [label.get_text() for label in of.get_ticklabels()]) for of in (axis.xaxis, axis.yaxis)
    ]
    assert ticks == [([0, 1], ["200", "4,000"]), ([0, 1, 2], ["0", "50", "100"])]
    assert (axis.get_title(), bar.get_ylabel()) == ("found", "found, %")


def test_what_each_task_is_scored_with(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows overlap in perplexity tasks alone; a choice has its own score; the files have a line a row."""
    piqa = write(tmp_path, "piqa.jsonl", [PIQA, PIQA | {"label": 1}])
    (tmp_path / "ptb.txt").write_text("one two")
    file = str(tmp_path / "own.toml")
    (tmp_path / "own.toml").write_text(OWN.replace("multiple_choice", "generate").replace("choices", "stop") + COLUMNS)
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "q", "options": "o", "gold": "a"}, allow_nan=False))
    jobs = open_jobs(
        ["piqa", "ptb", file], [f"piqa={piqa}", f"ptb={tmp_path}/ptb.txt"], 0, CONFIG, ByteTokenizer(), 512
    )
    assert [job.task.name for job in jobs] == ["piqa", "ptb", "own"]
    model: Any = dataclasses.make_dataclass("Model", ["config"])(CONFIG)
    asked: list[Any] = []

    def scored(held: Any, requests: Any, length: int, batch: int, stride: int, log: Any, title: str) -> list[Result]:
        asked.append((held, requests, length, batch, stride, log._path.name, title))
        log.add({"k": (-1.0, True)})
        return [Result(-1.0 - i, False, 3) for i in range(len(requests))]

    def written(*given: Any) -> list[dict[str, Any]]:
        asked.append(given)
        return [judge_answer("a", ["a"], ["exact_match"])]

    holds: list[Any] = []
    monkeypatch.setattr(task_jobs, "hold", lambda config, of: holds.append((config, of)) or "held")  # type: ignore[func-returns-value]
    monkeypatch.setattr(task_jobs, "score_requests", scored)
    monkeypatch.setattr(task_jobs, "write_answers", written)
    tokenizer, folder = ByteTokenizer(), tmp_path / "a" / "tasks"
    for quiet, identity in ((True, "A"), (False, "A"), (True, "B")):
        asked.clear()
        found = score_jobs(jobs, model, tokenizer, folder, identity, 512, 4, 8, quiet)
        titles = ["", ""] if quiet else ["piqa", "ptb"]
        assert asked == [
            ("held", jobs[0].requests, 512, 4, 0, "piqa.windows.jsonl", titles[0]),
            ("held", jobs[1].requests, 512, 4, 8, "ptb.windows.jsonl", titles[1]),
            (model, tokenizer, jobs[2].examples, jobs[2].prompts, ("exact_match",), 512, 4, quiet),
        ]
    assert holds == [(CONFIG, model)] * 3  # once for all tasks
    assert list(found) == ["piqa", "ptb", "own"] and found["piqa"]["accuracy"] == 0.5  # -1 and -2, -3 and -4
    assert (found["ptb"]["tokens"], found["ptb"]["words"], found["ptb"]["loglikelihood"]) == (3, 2, -1.0)
    assert (found["own"]["exact_match"], found["own"]["rows"]) == (1, 1)
    rows = [json.loads(line) for line in (folder / "piqa.jsonl").read_text().splitlines()]
    assert [(row["row"], row["loglikelihoods"], row["right"]) for row in rows] == [
        (f"{piqa} line 1", [-1, -2], True),
        (f"{piqa} line 3", [-3, -4], False),
    ]
    models = [json.loads(line)["model"] for line in (folder / "piqa.windows.jsonl").read_text().splitlines()]
    assert models[0] == models[1] != models[2]  # one model's scores are none of another's
