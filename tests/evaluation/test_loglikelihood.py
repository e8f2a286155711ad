"""Log-likelihoods: equal to one request at a time in float64, whatever the batch and the mesh; cut where they must."""

import contextlib
import hashlib
import importlib
import json
import pathlib
import re
import runpy
import struct
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import on_mesh, random_model, split_tokens, tiny

from bigmac_jax.config import ConfigError
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation import loglikelihood
from bigmac_jax.evaluation.loglikelihood import Request, check_windows, cut_windows, encode_pairs, score_requests
from bigmac_jax.evaluation.score_log import ScoreLog
from bigmac_jax.runtime import environment

LENGTH = 16
MODEL = {"length": LENGTH, "num_layers": 1, "hidden_size": 16}
DRAW = np.random.default_rng(1)
# Contexts and continuations: short, as long as the model's length, longer.
SIZES = [(1, 1), (3, 2), (10, 4), (9, 7), (20, 5), (15, 16), (1, 50), (25, 35)]
REQUESTS = [Request(*(DRAW.integers(257, size=n).tolist() for n in sizes)) for sizes in SIZES]


@pytest.fixture(scope="module")
def reference() -> Any:
    """log p of each next token, float64 [l, V], of tokens [l]: one at a time, unpadded in all that it returns."""
    config = tiny(batch=1, **MODEL)
    with on_mesh(config):
        model = random_model(config)
        call = jax.jit(lambda model, tokens_BL: model(tokens_BL)[0])

        def log_p(tokens: Any) -> np.ndarray:
            padded_BL = np.zeros((1, LENGTH), np.int32)
            padded_BL[0, : len(tokens)] = tokens
            logits_LV = np.asarray(call(model, split_tokens(padded_BL)), np.float64)[0, : len(tokens)]
            logits_LV = logits_LV - logits_LV.max(-1, keepdims=True)
            return logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))

    def in_mesh(tokens: Any) -> np.ndarray:
        with on_mesh(config):
            return log_p(tokens)

    return in_mesh


def by_hand(reference: Any, request: Request, stride: int = LENGTH) -> tuple[float, bool]:
    """Each token with the context that its window leaves it, written down without `cut_windows`."""
    tokens, before = [*request.context, *request.continuation], len(request.context)
    total, greedy = 0.0, True
    end = min(len(tokens), before + max(stride, LENGTH + 1 - before))
    ends = [end, *[min(len(tokens), e + stride) for e in range(end, len(tokens), stride)]]
    first = before
    for end in ends:
        log_p_LV = reference(tokens[max(0, end - 1 - LENGTH) : end - 1])
        for t in range(first, end):
            row_V = log_p_LV[t - end]
            total += row_V[tokens[t]]
            greedy &= int(row_V.argmax()) == tokens[t]
        first = end
    return total, greedy


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [((1, 1, 1), 3), ((1, 1, 2, 2), 8), pytest.param((2, 1, 4), 1, marks=pytest.mark.full)],
)
def test_every_batch_size_and_mesh(reference: Any, mesh: tuple[int, ...], batch_size: int) -> None:
    config = tiny(mesh, capacity_factor=0.5, **MODEL)
    with on_mesh(config):
        model = random_model(config)
        likeliest = [5]
        for _ in range(3):  # a continuation that greedy decoding gives
            likeliest.append(int(reference(likeliest)[-1].argmax()))
        almost = [*likeliest[1:3], likeliest[3] ^ 1]
        requests = [*REQUESTS, Request(likeliest[:1], almost), Request(likeliest[:1], likeliest[1:]), REQUESTS[1]]
        results = score_requests(model, requests, LENGTH, batch_size)
        sliding = score_requests(model, REQUESTS[-2:], LENGTH, batch_size, stride=4)
    expected = [by_hand(reference, request) for request in requests]
    assert [result.greedy for result in results] == [greedy for _, greedy in expected]
    assert results[-2].greedy and not results[-3].greedy
    assert [result.tokens for result in results] == [len(request.continuation) for request in requests]
    np.testing.assert_allclose([result.loglikelihood for result in results], [s for s, _ in expected], atol=1e-4)
    with_more = [by_hand(reference, request, stride=4)[0] for request in REQUESTS[-2:]]
    np.testing.assert_allclose([result.loglikelihood for result in sliding], with_more, atol=1e-4)
    assert abs(with_more[0] - expected[len(REQUESTS) - 2][0]) > 1e-2  # the stride matters


@pytest.mark.parametrize(
    ("before", "after", "stride", "expected"),  # (first input, target after the last, scored)
    [
        (1, 3, 0, [(0, 4, 3)]),
        (3, 3, 0, [(1, 6, 3)]),  # too long by one: the context's first token goes
        (1, 10, 0, [(0, 5, 4), (4, 9, 4), (6, 11, 2)]),  # the harness' own example of rolling windows
        (1, 10, 1, [(0, 5, 4), *[(n - 5, n, 1) for n in range(6, 12)]]),
        (9, 6, 2, [(6, 11, 2), (8, 13, 2), (10, 15, 2)]),  # a context that is there is used from the start
    ],
)
def test_windows(before: int, after: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    request = Request(list(range(before)), list(range(before, before + after)))
    cut = list(cut_windows(request, 4, stride))
    assert [(int(w.tokens[0]), int(w.tokens[-1]) + 1, w.scored) for w in cut] == expected
    assert sum(w.scored for w in cut) == after


class Words(ByteTokenizer):
    """Words with the space before them, as far as they are known, else characters."""

    names = ("ab", " ab", " abc", "abc", "a", "b", "c", " ", "\n")

    def _encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        found = []
        for text in texts:
            ids: list[int] = []
            while text:
                name = max((name for name in self.names if text.startswith(name)), key=len)
                ids.append(self.names.index(name))
                text = text[len(name) :]
            found.append(ids)
        return found


def test_pairs_are_split_where_the_context_ends() -> None:
    ids = {name: i for i, name in enumerate(Words.names)}
    pairs = [("ab", " ab"), ("ab ", "ab"), ("ab\n ", "c"), ("", "ab"), (" ", "ab"), ("ab ab", "cab")]
    expected = [
        ([ids["ab"]], [ids[" ab"]]),
        ([ids["ab"]], [ids[" ab"]]),  # the space moves
        ([ids["ab"]], [ids["\n"], ids[" "], ids["c"]]),
        ([256], [ids["ab"]]),  # the end of text stands for no context
        ([256], [ids[" ab"]]),
        ([ids["ab"], ids[" ab"]], [ids["ab"]]),  # " abc" is one token of the whole: its place is the context's
    ]
    assert [tuple(request) for request in encode_pairs(Words(), pairs)] == expected
    with pytest.raises(ConfigError, match="'c' after 'ab' has no token of its own"):
        encode_pairs(Words(), [("ab", "c")])


def test_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, few padded lengths, equal windows once."""
    calls: list[tuple[int, list[int]]] = []

    def scores(model: Any, batch: Any, padded: int, batch_size: int) -> list[tuple[float, bool]]:
        calls.append((padded, [len(window.tokens) - 1 for window in batch]))
        return [(-1.0, True)] * len(batch)

    monkeypatch.setattr(loglikelihood, "_score_batch", scores)
    requests = [Request([0] * n, [n]) for n in (3, 3, 70, 17, 64, 65, 100, 40)]
    results = score_requests(None, requests, 80, batch_size=2)  # type: ignore[arg-type]
    assert calls == [(80, [80, 70]), (80, [65]), (64, [64, 40]), (32, [17]), (16, [3])]
    assert [result.loglikelihood for result in results] == [-1.0] * 8
    repeated = Request([0], [0] * 30)  # ten windows, of which nine are equal
    assert score_requests(None, [repeated], 3, 2)[0] == (-10.0, True, 30)  # type: ignore[arg-type]
    # A bar counts the windows.
    shown: list[Any] = []

    @contextlib.contextmanager
    def bar(*given: Any, **named: Any) -> Any:
        shown.append((given, named))
        yield SimpleNamespace(update=shown.append)

    monkeypatch.setattr(loglikelihood, "Progress", bar)
    score_requests(None, requests, 80, batch_size=4, title="t")  # type: ignore[arg-type]
    assert shown == [(("t", 7, "window", 0), {"silent": False}), 3, 2, 1, 1]


@pytest.mark.parametrize(("tensor", "inputs", "length", "expected"), [
    (1, 1, 80, 16), (1, 16, 80, 16), (1, 17, 80, 32), (1, 65, 80, 80), (1, 3, 9, 9), (2, 3, 9, 10), (2, 17, 80, 32),
])  # fmt: skip
def test_padded_lengths(tensor: int, inputs: int, length: int, expected: int) -> None:
    with on_mesh(tiny((1, 1, 1, tensor))):
        assert loglikelihood._bucket(inputs, length) == expected


def test_a_window_keeps_its_key() -> None:
    """Or the scores in an earlier run's log would be computed again."""
    (window,) = cut_windows(Request([1, 2], [3, 4, 5]), 8)
    assert loglikelihood._key(window) == hashlib.sha256(struct.pack("<5i", 1, 2, 3, 4, 5) + b"3").hexdigest()[:32]


def test_a_killed_run_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is not scored again; half a line costs its window; another model's scores are not used."""
    asked: list[int] = []

    def scores(model: Any, batch: Any, padded: int, batch_size: int) -> list[tuple[float, bool]]:
        if len(asked) >= 4:
            raise KeyboardInterrupt
        asked.extend(int(window.tokens[0]) for window in batch)
        return [(-0.1 * int(window.tokens[0]), True) for window in batch]

    monkeypatch.setattr(loglikelihood, "_score_batch", scores)
    path, requests = tmp_path / "tasks" / "t.windows.jsonl", [Request([n], [n]) for n in range(6)]

    def run(model: str = "A") -> list[float]:
        results = score_requests(None, requests, 8, 2, log=ScoreLog(path, model))  # type: ignore[arg-type]
        return [result.loglikelihood for result in results]

    with pytest.raises(KeyboardInterrupt):
        run()
    whole = path.read_text()
    assert len(whole.splitlines()) == 4
    path.write_text(whole[:-30])
    first, asked[:] = list(asked), []
    assert run() == [-0.1 * n for n in range(6)]
    assert len(asked) == 3 and len({*first[:3], *asked}) == 6
    assert all(json.loads(line)["model"] == "A" for line in path.read_text().splitlines())
    asked[:] = []
    assert run() == [-0.1 * n for n in range(6)] and not asked
    with pytest.raises(KeyboardInterrupt):
        run("B")
    assert len(asked) == 4


def test_scores_come_back_as_they_were(tmp_path: pathlib.Path) -> None:
    """To the last bit, also of a token that is not the likeliest; what is no number is left out, and a damaged line."""
    path = tmp_path / "t.jsonl"
    kept = {"a": (-0.1, True), "b": (-1e9 / 3, False), "c": (0.0, False)}
    log = ScoreLog(path, "A")
    log.add(kept | {"d": (float("nan"), True), "e": (float("-inf"), True)})
    log.close()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_text("".join([*lines[:2], lines[2].replace("0.0", "1.0"), "no JSON\n"]))
    again = ScoreLog(path, "A").look_up([*"abcde"])
    assert again == {name: kept[name] for name in "ab"}
    assert ScoreLog(path, "B").look_up([*"ab"]) == {} and ScoreLog(path, "A").look_up([]) == {}


def test_where_nothing_can_be_written(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    log = ScoreLog(tmp_path / "file" / "t.jsonl", "A")
    log.add({"k": (-1.0, True)})
    assert log.look_up(["k"]) == {} and "cannot be written" in caplog.text
    caplog.clear()
    log = ScoreLog(tmp_path / "folder" / "t.jsonl", "A")
    (tmp_path / "folder" / "t.jsonl").unlink(), (tmp_path / "folder").rmdir()  # writing failed later
    log.add({"k": (-1.0, True)})
    log.add({"l": (-1.0, True)})
    assert caplog.text.count("cannot be written") == 1


def test_lengths_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    learned, rope = tiny(length=16, positions="learned"), tiny(length=16, positions="rope")
    assert (check_windows(rope, 64, 8), check_windows(learned, 0, 16), check_windows(learned, 8, 0)) == (64, 16, 8)
    assert caplog.messages == ["--length=64 is more than the 16 tokens that the model was made for"]
    assert check_windows(tiny(length=16, context_length=64), 64, 8) == 64 and len(caplog.messages) == 1
    with pytest.raises(ConfigError, match="--length=17 must be at most"):
        check_windows(learned, 17, 0)
    with pytest.raises(ConfigError, match="--stride=9 must be at most the 8 tokens"):
        check_windows(rope, 8, 9)
    with pytest.raises(ConfigError, match=r"--length=15 must be a multiple of mesh.tensor=2; use 16"):
        check_windows(tiny((1, 1, 1, 2), length=16), 15, 0)
    with pytest.raises(ConfigError, match=r"--length=17 must be a multiple of mesh.tensor=2; use 16"):
        check_windows(tiny((1, 1, 1, 2), length=16, positions="learned", context_length=17), 17, 0)
    # The next longer one where there are positions for it.
    with pytest.raises(ConfigError, match=r"--length=15 must be a multiple of mesh.tensor=2; use 16"):
        check_windows(tiny((1, 1, 1, 2), length=16, positions="learned"), 15, 0)
    with pytest.raises(ConfigError, match=r"size=17 must be a multiple of mesh.tensor=2; use 18"):
        check_windows(tiny((1, 1, 1, 2), length=16, positions="rope"), 17, 0, "size")
    with pytest.raises(ConfigError, match="--stride=17 must be at most the 16 tokens"):
        check_windows(rope, 0, 17)


def test_the_harness_is_missed_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a command, and to a program that imports it."""
    name = "bigmac_jax.evaluation.harness"
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    said = "lm-evaluation-harness is not installed; pip install 'bigmac_jax[lm-eval]'"
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"
    with pytest.raises(ConfigError, match=re.escape(said)):
        importlib.import_module(name)
