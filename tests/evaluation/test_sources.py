"""What routers do with a source: counted by hand, padding left out."""

import dataclasses
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from model.tools import on_mesh, random_model, split_tokens, tiny
from training.tools import text

from bigmac_jax.config import Config, ConfigError, DataConfig, TuningConfig
from bigmac_jax.data.chat_files import NO_CHAT, TEMPLATE_FILE
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.pipeline import open_stream, streams_by_source, text_stream
from bigmac_jax.data.token_cache import Counts, MemoryStream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation import perplexity
from bigmac_jax.evaluation.perplexity import Evaluation, Score, evaluate
from bigmac_jax.evaluation.sources import measure_specialisation, measure_spread, open_sources, report_sources
from bigmac_jax.training.workdir import write_config, write_run

LENGTH = 16
CONFIG = {"length": LENGTH, "num_layers": 2, "hidden_size": 16}


def test_specialisation_by_hand() -> None:
    """Nothing where all use the experts alike; log 2 where each of two has its own."""
    alike, own = np.array([[[0.5, 0.5]], [[0.5, 0.5]]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert measure_specialisation(alike).tolist() == [0.0]
    assert measure_specialisation(own) == pytest.approx([math.log(2)])
    half = np.array([[[0.75, 0.25]], [[0.25, 0.75]]])
    assert measure_specialisation(half) == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    assert measure_spread(np.array([[0.5, 0.25, 0.25, 0.0]])) == pytest.approx((math.sqrt(0.5), 2.0))


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 1, 4), marks=pytest.mark.full)])
def test_loads_by_hand(mesh: tuple[int, int, int]) -> None:
    """Of a text that ends with its third batch, as the model itself counts them."""
    config = tiny(mesh, capacity_factor=0.5, **CONFIG)
    # Before a text stands an end of text, and behind it another, which is no input.
    stream = text_stream("".join(text(3, seed=5))[: 3 * 8 * LENGTH - 1], ByteTokenizer())
    tokens = stream.tokens(0, 3 * 8 * LENGTH).reshape(3, 8, LENGTH)
    with on_mesh(config):
        model = random_model(config)
        call = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[1])
        auxes = [call(model, split_tokens(part)) for part in tokens]
        reading = evaluate(model, stream, LENGTH, 8)
    load_YE = np.mean([np.asarray(aux.load, np.float64) for aux in auxes], axis=0)
    np.testing.assert_allclose(reading.load_YE, load_YE, rtol=1e-6)
    np.testing.assert_allclose(reading.load_YE.sum(1), 1, rtol=1e-6)
    entropy_Y = np.mean([np.asarray(aux.router_entropy, np.float64) for aux in auxes], axis=0)
    np.testing.assert_allclose(reading.entropy_Y, entropy_Y, rtol=1e-5)
    assert load_YE.std() > 0.005


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 1, 2, 2), marks=pytest.mark.full)])
def test_padding_does_not_count(mesh: tuple[int, ...]) -> None:
    """Of a text of half a window, whatever rows stand around it, the routers are as the model has it by itself."""
    config = tiny(mesh, **CONFIG)
    masked = dataclasses.replace(config, data=dataclasses.replace(config.data, documents="masked"))
    stream = text_stream("some words"[: LENGTH // 2 - 1], ByteTokenizer())
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=LENGTH // 2))
    tokens = stream.tokens(0, LENGTH // 2)[None].repeat(8, 0)
    with on_mesh(short):
        aux = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[1])(
            random_model(short), split_tokens(tokens)
        )
    for of, rows in itertools.product((config, masked), (1, 32)):
        with on_mesh(of):
            reading = evaluate(random_model(of), stream, LENGTH, rows)
        np.testing.assert_allclose(reading.load_YE, aux.load, rtol=1e-6)
        np.testing.assert_allclose(reading.entropy_Y, aux.router_entropy, rtol=1e-5)


@pytest.mark.parametrize("documents", ["", "masked", "stream"])
def test_documents_behind_each_other(documents: str) -> None:
    """As the model has them if nothing else is said: masked, so that each is worth what it is alone."""
    config = tiny(**CONFIG)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, documents="masked"))
    alone = [text_stream(words, ByteTokenizer()) for words in ("some words", "others")]
    first, second = (stream.tokens(0, stream.num_tokens) for stream in alone)
    tokens = np.concatenate([first, second[1:]])  # one end of text between them
    both = MemoryStream(tokens, Counts(tokens=len(tokens)), alone[0].eos_id)
    with on_mesh(config):
        model = random_model(config)
        apart = Score.combine([evaluate(model, stream, LENGTH, 32).score for stream in alone])
        found = evaluate(model, both, LENGTH, 32, documents=documents).score
    assert found.tokens == apart.tokens == len(tokens) - 1
    assert (abs(found.loss / apart.loss - 1) < 1e-6) == (documents != "stream")


def test_what_is_scored(tmp_path: pathlib.Path) -> None:
    """A mixture's source at the split, a file as a whole; names that are none are one line."""
    config = tiny(**CONFIG)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}bcd " * 1000)
    data = dataclasses.replace(config.data, tokenizer="bytes", mixture=f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=2")
    config = dataclasses.replace(config, data=data, cache_dir=str(tmp_path / "cache"))
    write_config(config, tmp_path)
    found = open_sources(tmp_path, config, ["all", f"{tmp_path}/b.txt"], "test", ByteTokenizer())
    sizes = {name: stream.counts.bytes for name, stream in found.items()}
    assert sizes == {"a": 246, "b": 246, f"{tmp_path}/b.txt": 5000}
    shared = dataclasses.replace(config, data=dataclasses.replace(data, test_source=f"{tmp_path}/b.txt"))
    with pytest.raises(ConfigError, match=r"data\.test_source=.* is the test text of all sources"):
        open_sources(tmp_path, shared, ["a"], "test", ByteTokenizer())
    plain = dataclasses.replace(config, data=dataclasses.replace(data, mixture=""))
    with pytest.raises(ConfigError, match=r"--sources=all is of a run with data\.mixture"):
        open_sources(tmp_path, plain, ["all"], "test", ByteTokenizer())
    with pytest.raises(ConfigError, match=r"--sources='nowhere' is not there"):
        open_sources(tmp_path, plain, ["nowhere"], "test", ByteTokenizer())


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["{}/other/a.txt", "a"], ["{}/other/a.txt", "a"]),
        (["{}/other/a.txt", "all"], ["{}/other/a.txt", "a", "b"]),
        (["{}/other/sotu.txt", "{}/other/c.txt", "{}/c.txt"], ["sotu", "c", "{}/c.txt"]),
        (["c.txt.txt", "c", "c.txt"], ["c.txt.txt", "c", "c.txt"]),
    ],
)
def test_sources_that_share_a_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, given: list[str], labels: list[str]
) -> None:
    """None replaces another one, in whatever order they stand."""
    monkeypatch.setattr("bigmac_jax.evaluation.sources.open_stream", lambda config, *_, **__: config.data.source)
    data = dataclasses.replace(tiny(**CONFIG).data, mixture=f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=2")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some words " * 500)
    names, labels = ([name.format(tmp_path) for name in entries] for entries in (given, labels))
    config = dataclasses.replace(tiny(**CONFIG), data=data, cache_dir=str(tmp_path / "cache"))
    write_config(config, tmp_path)
    found = open_sources(tmp_path, config, names, "test", ByteTokenizer())
    assert list(found) == labels
    own = {"a": f"{tmp_path}/a.txt", "b": f"{tmp_path}/b.txt"}
    asked = [n for name in names for n in (own.values() if name == "all" else [own.get(name, name)])]
    assert list(found.values()) == asked


def test_a_mixture_whose_text_has_changed(tmp_path: pathlib.Path) -> None:
    """It is not scored as what the run was trained on; another file is scored all the same."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name}bcd " * 1000)
    data = dataclasses.replace(tiny(**CONFIG).data, tokenizer="bytes", mixture=f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=2")
    config = Config(data=data, cache_dir=str(tmp_path / "cache"))
    known = {"train": open_documents(data, "train", config.cache_dir).fingerprint}
    write_run(tmp_path / "run", config, known, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    assert len(open_sources(tmp_path / "run", config, ["all"], "test", ByteTokenizer())) == 2
    (tmp_path / "b.txt").write_text("abcd " * 1000)
    for names in (["all"], ["a"]):
        with pytest.raises(ConfigError, match=r"^data\.mixture=.* holds other data than .*was trained with"):
            open_sources(tmp_path / "run", config, names, "test", ByteTokenizer())
    assert open_sources(tmp_path / "run", config, [f"{tmp_path}/c.txt"], "test", ByteTokenizer()).keys() == {"c"}


def test_a_data_set_of_the_run_is_cut_as_it_was_for_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that it was trained on is scored, by whatever name; where the split has a text of its own, it is refused.
    Another data set is cut by itself."""
    files: dict[str, dict[pathlib.Path, int]] = {}
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i} " + "word " * 40}) + "\n" for i in range(60)))
        files |= {name: {path: path.stat().st_size}}
    monkeypatch.setattr("bigmac_jax.data.hub._load_files", lambda rest, name: {"train": files[rest]})
    (tmp_path / "held.txt").write_text("held out by the user")
    single = {"source": "hf:a", "validation_source": f"{tmp_path}/held.txt"}
    mixed = single | {"source": "sotu", "mixture": f"hf:a=1,{tmp_path}/b.jsonl=1"}
    for own in (single, mixed):
        data = dataclasses.replace(tiny(**CONFIG).data, tokenizer="bytes", **own)
        config, workdir = Config(data=data, cache_dir=str(tmp_path / "cache")), tmp_path / f"run{bool(data.mixture)}"
        known = {"train": open_documents(data, "train", config.cache_dir).fingerprint}
        write_run(workdir, config, known, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
        alone = dataclasses.replace(data, mixture="", source="hf:a")
        found = open_sources(workdir, config, ["hf:a"], "test", ByteTokenizer())
        expected = {"a": open_documents(alone, "test", config.cache_dir).fingerprint}
        assert {name: stream.text for name, stream in found.items()} == expected
        with pytest.raises(ConfigError, match=r"^data\.validation_source=.* is the validation text of all sources"):
            open_sources(workdir, config, ["hf:a"], "validation", ByteTokenizer())
        assert open_sources(workdir, config, ["hf:b"], "validation", ByteTokenizer())["b"].counts.documents == 3
    both = dataclasses.replace(config, data=dataclasses.replace(data, mixture="hf:a=1,hf:b=1", validation_source=""))
    write_run(tmp_path / "both", both, {}, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    found = open_sources(tmp_path / "both", both, ["hf:b", "a", "hf:a"], "test", ByteTokenizer())
    assert list(found) == ["b", "a"]
    write_run(
        tmp_path / "changed",
        both,
        {"train": "of another text"},
        {"data": 1},
        ByteTokenizer(),
        chat=NO_CHAT,
        history=None,
        parts=0,
    )
    with pytest.raises(ConfigError, match="holds other data than"):
        open_sources(tmp_path / "changed", both, ["hf:b"], "test", ByteTokenizer())


def test_sources_of_a_tuned_run(tmp_path: pathlib.Path) -> None:
    """They are written with the template that the run was tuned with, whatever its file says now."""
    given, row = tmp_path / "given.jinja", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    given.write_text(template.replace("|", "/"))
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": row}) + "\n") * 40)
    tuning = TuningConfig(objective="sft", chat_template=str(given))
    data = DataConfig(source=f"{tmp_path}/rows.jsonl", tokenizer="bytes")
    config = Config(data=data, tuning=tuning, cache_dir=str(tmp_path / "cache"))
    write_run(tmp_path / "run", config, {}, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    (tmp_path / "run" / TEMPLATE_FILE).write_text(template)
    found = open_sources(tmp_path / "run", config, [f"{tmp_path}/rows.jsonl"], "test", ByteTokenizer())
    assert found["rows"].chat.template == template


@pytest.mark.full
def test_a_mixture_is_scored_source_by_source(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eval/loss of its run, which has the same loss for eval.py; windows do not reach from one into the next."""
    for name, rows in (("a", 90), ("b", 40)):
        (tmp_path / f"{name}.txt").write_text("".join(text(rows, seed=rows)))
    config = tiny(**CONFIG)
    own = {"tokenizer": "bytes", "mixture": f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=2"}
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, **own), cache_dir=str(tmp_path / "cache")
    )
    stream = open_stream(config, "validation", ByteTokenizer())
    with on_mesh(config):
        model = random_model(config)
        score = evaluate(model, stream, LENGTH, 8).score
        apart = [evaluate(model, part, LENGTH, 8).score for part in streams_by_source(stream).values()]
        monkeypatch.setattr(perplexity, "streams_by_source", lambda stream: {"": stream})
        across = evaluate(model, stream, LENGTH, 8).score
    assert len(apart) == 2 and score == pytest.approx(Score.combine(apart), rel=1e-12)
    assert across.bytes == score.bytes and across.tokens == score.tokens + 1  # the first one of b
    assert across.loss != pytest.approx(score.loss, rel=1e-6)


def test_a_report_by_hand() -> None:
    """Two layers of four experts: in the first each source has its own two, in the second all use all alike."""
    evaluations = {}
    for name, nll, load in (("a", 4 * math.log(2), [0.5, 0.5, 0, 0]), ("longer", 8 * math.log(2), [0, 0, 0.75, 0.25])):
        score = Score.from_sums(nll, 4, 2, 8)
        evaluations[name] = Evaluation(score, np.array([load, [0.25] * 4]), np.array([1.0, 1.5]))
    lines, result = report_sources(evaluations)
    assert lines == [
        "a       perplexity     2.000, 0.5000 bits per byte, load: deviation 0.500, busiest 1.50 × the mean",
        "longer  perplexity     4.000, 1.0000 bits per byte, load: deviation 0.612, busiest 2.00 × the mean",
        "an expert tells of the source, by layer: 100.0%, 0.0% of what there is to know",
    ]
    assert result["specialisation"] == [round(math.log(2), 6), 0.0] and list(result["sources"]) == ["a", "longer"]
    last = result["sources"]["longer"]
    assert (last["loss"], last["load_cv"], last["max_load"]) == pytest.approx((2 * math.log(2), math.sqrt(6) / 4, 2.0))
    assert (last["router_entropy"], last["load"]) == ([1.0, 1.5], [[0, 0, 3, 1], [1] * 4])
    alone, of_one = report_sources({"a": evaluations["a"]})
    assert len(alone) == 1 and "specialisation" not in of_one and "load" in of_one["sources"]["a"]


def test_a_model_without_experts() -> None:
    config = tiny(structure="dense", **CONFIG)
    with on_mesh(config):
        reading = evaluate(random_model(config), text_stream("some text", ByteTokenizer()), LENGTH, 4)
    lines, result = report_sources({"a": reading, "b": reading})
    assert len(lines) == 2 and "specialisation" not in result and "load" not in result["sources"]["a"]
