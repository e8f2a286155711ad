"""Greedy completions are those of recomputing the prefix, the same for every batch size and mesh."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from model.tools import abstract_model, on_mesh, random_model, split_tokens, tiny
from threads_as_processes import run_as_processes
from training.tools import text

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference import Completion, Generator, Request, Sampling
from bigmac_jax.inference import generator as generator_module
from bigmac_jax.inference.decoding import DecodePrograms, make_decode_programs, round_up_length
from bigmac_jax.inference.generator import _fits_gathered
from bigmac_jax.inference.kv_cache import make_decoder
from bigmac_jax.inference.requests import (
    check_output,
    make_answer,
    open_output,
    parse_json,
    read_requests,
    share_requests,
)
from bigmac_jax.model.counts import parameters
from bigmac_jax.runtime import hosts

LENGTH, NEW = 48, 12
WORDS = text(1, seed=2)[0]
PROMPTS = [WORDS[3 * i : 4 * i + 5] for i in range(16)]  # 5 to 20 bytes


def config_on(mesh: tuple[int, ...]) -> Config:
    return tiny(mesh, length=LENGTH, num_layers=1, structure="bigmac", num_shared_experts=1)


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    config = config_on((1, 1, 1))
    with on_mesh(config):
        yield Generator(config, random_model(config))


@pytest.fixture(scope="module")
def greedy(generator: Generator) -> list[Completion]:
    return generator.generate(PROMPTS, max_tokens=NEW, ignore_eos=True)


def test_greedy_is_what_recomputing_the_prefix_gives(greedy: list[Completion]) -> None:
    config, tokenizer = config_on((1, 1, 1)), ByteTokenizer()
    with on_mesh(config):
        model = random_model(config)
        forward = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0])
        tokens_NL = np.zeros((16, LENGTH), np.int32)
        length_N = np.array([len(p) for p in PROMPTS])
        for row, prompt in enumerate(PROMPTS):
            tokens_NL[row, : length_N[row]] = tokenizer.encode(prompt)
        logprobs_NT = []
        for _ in range(NEW):
            logits_NV = np.asarray(forward(model, split_tokens(tokens_NL)))[np.arange(16), length_N - 1]
            best_N = logits_NV.argmax(-1)
            logprobs_NT.append(logits_NV.max(-1) - np.log(np.exp(logits_NV.astype(np.float64)).sum(-1)))
            tokens_NL[np.arange(16), length_N] = best_N
            length_N = length_N + 1
    for row, completion in enumerate(greedy):
        assert completion.tokens == tuple(tokens_NL[row, len(PROMPTS[row]) : length_N[row]])
        np.testing.assert_allclose(completion.logprobs, [step[row] for step in logprobs_NT], atol=2e-5)
        assert completion.finish_reason == "length" and completion.prompt_tokens == len(PROMPTS[row])
        assert completion.text == tokenizer.decode(completion.tokens)
    assert len({completion.text for completion in greedy}) > 8


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [
        pytest.param((1, 1, 1), 1, marks=pytest.mark.full),
        pytest.param((2, 1, 2), 16, marks=pytest.mark.full),
        ((1, 1, 8), 16),
        pytest.param((1, 1, 1), 5, marks=pytest.mark.full),
        pytest.param((1, 1, 8), 1, marks=pytest.mark.full),
        pytest.param((1, 2, 1, 2, True, True), 3, marks=pytest.mark.full),
    ],
)
def test_every_batch_size_and_mesh(greedy: list[Completion], mesh: tuple[int, ...], batch_size: int) -> None:
    config = config_on(mesh)
    with on_mesh(config):
        generator = Generator(config, random_model(config), batch_size=batch_size, consume=True)
        done: list[int] = []
        found = generator.generate(PROMPTS, lambda number, _: done.append(number), max_tokens=NEW, ignore_eos=True)
    assert [c.tokens for c in found] == [c.tokens for c in greedy]
    assert [c.text for c in found] == [c.text for c in greedy]
    assert sorted(done) == list(range(16))


def test_decoders_of_a_kind_share_programs() -> None:
    def made(**model: Any) -> DecodePrograms:
        config = tiny(length=LENGTH, **model)
        with on_mesh(config):
            return make_decode_programs(jax.eval_shape(partial(make_decoder, config), abstract_model(config)))

    first, again, other = made(), made(), made(activation="silu")
    assert first[1:] == again[1:] and not {*first[1:]} & {*other[1:]}
    assert len({*first[1:]}) == 4


@pytest.mark.full
def test_other_weights_are_not_compiled_again() -> None:
    """As a run's at each evaluation of its tasks; what is written is the new model's."""
    config, asked = config_on((1, 1, 1)), [tuple(prompt.encode()) for prompt in PROMPTS]
    prompts = [(ByteTokenizer().eos_id, *prompt) for prompt in asked]
    with on_mesh(config):
        model = random_model(config)
        first, second = Generator(config, model), Generator(config, jax.tree.map(lambda w: -w, model))
        before = first.generate(prompts, max_tokens=NEW, ignore_eos=True)
        programs = first._programs.prefill, first._programs.decode
        sizes = [program._jitted._cache_size() for program in programs]
        found = second.generate(prompts, max_tokens=NEW, ignore_eos=True)
        scored = second.score([(*prompt, *c.tokens) for prompt, c in zip(asked, found, strict=True)])
    assert [program._jitted._cache_size() for program in programs] == sizes and min(sizes) > 0
    assert (second._programs.prefill, second._programs.decode) == programs
    assert [c.tokens for c in found] != [c.tokens for c in before]
    for ours, completion in zip(scored, found, strict=True):  # a score is another program's
        np.testing.assert_allclose(completion.logprobs, ours.logprobs[-NEW:], atol=2e-5)


def test_settings_of_each_request(generator: Generator, greedy: list[Completion]) -> None:
    """Different lengths and stops in one batch."""
    hot = Sampling(max_tokens=NEW, temperature=3.0, ignore_eos=True, seed=1)
    stop = greedy[2].text[4:6]
    requests = [
        Request(PROMPTS[0], hot),
        Request(PROMPTS[1], Sampling(max_tokens=3, ignore_eos=True)),
        Request(PROMPTS[2], Sampling(max_tokens=NEW, stop=(stop,), ignore_eos=True)),
        Request(PROMPTS[0], hot),
    ]
    drawn, short, stopped, again = generator.generate(requests)
    assert drawn.tokens != again.tokens  # the seed is of the call, the number tells its requests apart
    assert short.tokens == greedy[1].tokens[:3] and short.finish_reason == "length"
    assert stopped.text == greedy[2].text[: greedy[2].text.index(stop)] and stopped.finish_reason == "stop"


def test_streaming_gives_the_same_in_pieces(generator: Generator, greedy: list[Completion]) -> None:
    pieces = list(generator.stream(PROMPTS[3], max_tokens=NEW, ignore_eos=True))
    tokens = tuple(ByteTokenizer().encode(PROMPTS[3]))
    assert list(generator.stream(tokens, max_tokens=NEW, ignore_eos=True)) == pieces
    assert "".join(pieces) == greedy[3].text and len(pieces) == NEW


def test_prompts_are_numbered_from_the_first(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random draws depend on the number, and errors name it."""
    run = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr(generator, "_run", run)
    with pytest.raises(InterruptedError):
        generator.generate(["a", "b"], first=7, max_tokens=2)
    assert [job.number for job in run.call_args.args[0]] == [7, 8]
    with pytest.raises(ConfigError, match="prompt 8 is empty"):
        generator.generate([""], first=7)


@pytest.mark.full
def test_parts_of_a_list_give_what_the_whole_list_gives(generator: Generator) -> None:
    requests = [Request(PROMPTS[0], Sampling(max_tokens=NEW, temperature=3.0, ignore_eos=True))] * 2
    numbers: list[int] = []
    whole = generator.generate(requests)
    later = generator.generate(requests[1:], lambda number, _: numbers.append(number), first=1)
    assert later[0].tokens == whole[1].tokens != whole[0].tokens and numbers == [1]
    with pytest.raises(ConfigError, match="prompt 8 is empty"):
        generator.generate([""], first=7)


@pytest.mark.full
def test_a_prompt_whose_bucket_exceeds_the_learned_positions() -> None:
    """And rows that go on behind the last one, because others are not done, disturb nobody."""
    config = tiny(length=40, num_layers=1, positions="learned")
    with on_mesh(config):
        model = random_model(config)
        generator = Generator(config, model)
        prompt, short = WORDS[:35], Request(WORDS[:2], Sampling(max_tokens=38, ignore_eos=True))
        long, beside = generator.generate([Request(prompt, Sampling(max_tokens=1)), short])
        (alone,) = generator.generate([short])
        tokens = np.asarray([ByteTokenizer().encode(prompt)], np.int32)
        logits_BLV, _ = jax.jit(lambda model, tokens: model(tokens, evaluating=True))(model, split_tokens(tokens))
    assert long.tokens == (int(np.asarray(logits_BLV)[0, -1].argmax()),)
    assert beside.tokens == alone.tokens


@pytest.mark.full
def test_each_is_done_once(generator: Generator, greedy: list[Completion]) -> None:
    """Its first token and its second may be looked at together."""
    done: list[tuple[int, Completion]] = []
    generator.generate(PROMPTS, lambda *of: done.append(of), max_tokens=2, ignore_eos=True)
    assert sorted(number for number, _ in done) == list(range(16))
    assert all(completion.tokens == greedy[number].tokens[:2] for number, completion in done)


def test_nothing_asked(generator: Generator) -> None:
    assert generator.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        (["fine", ""], {}, "prompt 2 is empty"),
        (["a\udcff"], {}, "prompt 1 is not valid UTF-8"),
        (["a" * 40], {"max_tokens": 9}, "prompt 1 has 40 tokens, .* are 49, and must be at most max_length=48"),
        ([(5, 264)], {}, r"prompt 1 has the token 264, which must lie in \[0, 264\)"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ("abc", {}, "prompts must be a list"),
    ],
)
def test_bad_prompts(generator: Generator, prompts: list[Any], sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generator.generate(prompts, **sampling)


def test_a_prompt_that_the_tokenizer_drops(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator.tokenizer, "encode_batch", lambda texts: [[] for _ in texts])
    with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
        generator.generate([" "])


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"max_length": -1}])
def test_sizes_out_of_range(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(sizes))}={next(iter(sizes.values()))} must be at least"):
        Generator(tiny(), None, **sizes)  # type: ignore[arg-type]


def test_learned_positions_end() -> None:
    config = tiny(length=LENGTH, positions="learned")
    with on_mesh(config), pytest.raises(ConfigError, match="max_length=49 must be at most the 48 learned positions"):
        Generator(config, None, max_length=49)  # type: ignore[arg-type]


def test_requests_of_a_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "é", "id": 7, "top_k": 3}\n\n{"prompt": "b", "stop": ["x"], "max_tokens": 2}\n')
    (row, first), (_, second) = read_requests(str(file), Sampling(temperature=0.5))
    assert first == Request("é", Sampling(temperature=0.5, top_k=3))
    assert second == Request("b", Sampling(max_tokens=2, temperature=0.5, stop=("x",)))
    completion = Completion("t", (1,), (-0.5,), "length", 2)
    assert make_answer(row, first, completion) == {**row, **dataclasses.asdict(completion)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n\xff\n', "line 2 is not valid UTF-8"),
        (b'{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        (b'{"prompt": "a", "id": ' + b"[" * 64 + b"]" * 64 + b"}", "line 1 is not JSON: it is nested too deeply"),
        (b'["a"]\n', "line 1 must be an object with a text"),
        (b'{"prompt": 3}\n', "line 1 must be an object with a text"),
        (b'{"prompt": "a", "top_p": 2}\n', r"line 1: top_p=2 must lie in \(0, 1\]"),
        (b"\n", "holds no prompt"),
        (b'{"prompt": "a", "id": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
        (b'{"prompt": "a", "max_tokens": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"prompt": "a", "id": ' + b"[" * 200_000, "line 1 is not JSON"),
    ],
)
def test_bad_requests_of_a_file(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_requests(str(file), Sampling())


def test_a_pair_of_surrogates_is_a_character() -> None:
    for content in (rb'"\ud83d\ude00"', rb'"\uD83D\uDE00"', '"😀"'.encode()):
        assert parse_json(content) == "😀"
    for half in (rb'"\ud83d"', rb'"\uD83D"', rb'{"\ude00": 1}'):
        with pytest.raises(ValueError, match="holds half of a surrogate pair"):
            parse_json(half)


def test_processes_complete_the_same_prompts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard input is that of process 0; another one's file with other prompts, as many, is an error."""
    rows = [f'{{"prompt": "{name}", "max_tokens": 2}}\n' for name in "ab"]
    for process in range(2):
        (tmp_path / f"{process}").write_text("".join(rows))

    def read(process: int, source: str) -> Any:
        return share_requests(source, read_requests(source, Sampling(top_k=3)), Sampling(top_k=3))

    stdin = SimpleNamespace(buffer=(tmp_path / "0").open("rb"))
    monkeypatch.setattr("sys.stdin", stdin)
    requests = [Request(name, Sampling(max_tokens=2, top_k=3)) for name in "ab"]
    for given in run_as_processes(monkeypatch, 2, lambda process: read(process, "-")):
        assert [request for _, request in given] == requests
    files = [run_as_processes(monkeypatch, 2, lambda process: read(process, str(tmp_path / f"{process}")))]
    (tmp_path / "1").write_text("".join(reversed(rows)))
    files += [run_as_processes(monkeypatch, 2, lambda process: read(process, str(tmp_path / f"{process}")))]
    for given in files[0]:
        assert [request for _, request in given] == requests
    for error in files[1]:
        assert "process 1 was started with the prompts=" in str(error)


def test_files_that_are_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(str(tmp_path / "none"), Sampling())
    with pytest.raises(ConfigError, match="cannot be written"), open_output(str(tmp_path / "none" / "out")):
        pass


def test_nothing_is_lost_before_work_begins(tmp_path: pathlib.Path) -> None:
    prompts, answers = tmp_path / "prompts", tmp_path / "answers"
    prompts.write_text("precious"), answers.write_text("old")
    check_output(str(answers), str(prompts)), check_output("-", "-"), check_output(str(prompts), "-")
    assert answers.read_text() == "old"
    with pytest.raises(ConfigError, match="is the file of prompts, which would be lost"):
        check_output(str(prompts), str(prompts))
    with pytest.raises(ConfigError, match="cannot be written"):
        check_output(str(tmp_path), str(prompts))


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 1, 2), marks=pytest.mark.full)])
def test_scores_are_those_of_the_logits(mesh: tuple[int, ...]) -> None:
    """Of texts of several lengths, in batches that don't divide them; token ids count as the text that they are."""
    config, tokenizer = config_on(mesh), ByteTokenizer()
    texts = [*PROMPTS[:4], "é", tuple(tokenizer.encode(PROMPTS[5]))]
    with on_mesh(config):
        model = random_model(config)
        scored = Generator(config, model, batch_size=4).score(texts)
        tokens_NL = np.zeros((8, LENGTH), np.int32)
        tokens_NL[:, 0] = tokenizer.eos_id
        for row, score in enumerate(scored):
            tokens_NL[row, 1 : 1 + len(score.tokens)] = score.tokens
        forward = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0])
        logprobs_NLV = np.asarray(jax.nn.log_softmax(forward(model, split_tokens(tokens_NL))))
    assert [score.tokens for score in scored[:5]] == [tuple(tokenizer.encode(text)) for text in texts[:5]]
    assert [score.bytes for score in scored] == [*(len(p) for p in PROMPTS[:4]), 2, len(PROMPTS[5])]
    for row, score in enumerate(scored):
        expected_L = logprobs_NLV[row, np.arange(len(score.tokens)), list(score.tokens)]
        np.testing.assert_allclose(score.logprobs, expected_L, atol=2e-5)
        assert np.isclose(score.bits_per_byte, -expected_L.sum() / np.log(2) / score.bytes)


def test_what_cannot_be_scored_is_said(generator: Generator) -> None:
    assert generator.score([]) == []
    assert len(generator.score(["x" * LENGTH])[0].tokens) == LENGTH  # the longest
    for texts, message in (
        ("one text", "put the one text into brackets"),
        ([PROMPTS[0], ""], "text 2 is empty"),
        (["x" * (LENGTH + 1)], f"text 1 has {LENGTH + 1} tokens, which must be at most max_length={LENGTH}"),
        ([(1, 9999)], "text 1 has the token 9999"),
    ):
        with pytest.raises(ConfigError, match=message):
            generator.score(texts)
    consumed = Generator(config := config_on((1, 1, 1)), random_model(config), consume=True)
    with pytest.raises(ConfigError, match="consume=False"):
        consumed.score(PROMPTS[:1])


@pytest.mark.full
def test_learned_positions_that_tensor_does_not_divide() -> None:
    config = tiny((1, 1, 1, 2), length=8, num_layers=1, structure="dense", positions="learned", context_length=9)
    with on_mesh(config):
        generator = Generator(config, random_model(config), max_length=9)
        assert len(generator.score([WORDS[:8]])[0].tokens) == 8
        with pytest.raises(ConfigError, match="text 1 has 9 tokens, which must be at most 8, the learned positions"):
            generator.score([WORDS[:9]])


def test_activations_that_overflow_are_an_error(generator: Generator) -> None:
    """Of parameters that are all finite."""
    config = config_on((1, 1, 1))
    with on_mesh(config):
        huge = Generator(config, random_model(config, {"final_norm.scale_D": np.float32(3e38)}))
        for complete in (huge.generate, lambda prompts, **given: list(huge.stream(*prompts, **given))):
            with pytest.raises(ConfigError, match="prompt 1: the model gives NaN for token 1, for its activations"):
                complete(["the"], max_tokens=4)


@pytest.mark.parametrize(
    ("length", "multiple", "expected"),
    [(1, 1, 16), (16, 1, 16), (17, 1, 32), (128, 1, 128), (129, 1, 256), (257, 1, 384),
     (5, 3, 48), (49, 3, 96), (16, 32, 32), (129, 3, 384), (385, 3, 768)],
)  # fmt: skip
def test_lengths_are_rounded_up(length: int, multiple: int, expected: int) -> None:
    """To 16, beyond 128 to 128, and to what tensor ranks divide."""
    assert round_up_length(length, multiple) == expected


@pytest.mark.parametrize(
    ("mesh", "positions", "slots", "given", "expected"),  # of the jobs; slots, positions, longest, and other sizes
    [
        ((1, 1, 1), (10, 20), 5, {}, (2, 64, 32, {"chunk": 8192})),  # 16 + 32, up to the next whole 32
        ((1, 1, 1), (20, 33, 40), 2, {"chunk": 5}, (2, 96, 48, {"chunk": 5})),  # those of the two longest
        ((1, 1, 1), (31,), 1, {"page_size": 4}, (1, 32, 32, {"chunk": 8192, "page_size": 4})),
        ((1, 1, 1), (32,), 1, {}, (1, 48, 48, {"chunk": 8192})),  # its last token needs no position, but is one
        ((2, 1, 1), (10, 20, 30, 5), 3, {}, (3, 128, 32, {"chunk": 8192})),  # 16 + 32 + 32, on two shards alike
        ((1, 1, 1), (), 3, {"reuse": False}, (3, 144, LENGTH, {"reuse": False})),
        ((1, 1, 1), (), 3, {"positions": 100}, (3, 100, LENGTH, {})),
        ((2, 1, 1), (), 3, {}, (3, 192, LENGTH, {})),  # two slots on each shard
    ],
)
def test_the_sizes_of_an_engine(
    mesh: tuple[int, ...], positions: tuple[int, ...], slots: int, given: dict[str, Any], expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the jobs need where they are known, else the longest request in every slot."""
    monkeypatch.setattr(generator_module, "Engine", lambda *made, **sizes: (made, sizes))
    jobs: Any = [SimpleNamespace(positions=number) for number in positions]
    with on_mesh(config_on(mesh)):
        own: Any = SimpleNamespace(
            mesh=jax.sharding.get_mesh(), max_length=LENGTH, _decoder="decoder", _programs="programs", drafts="drafts"
        )
        found: Any = Generator.engine(own, slots, jobs, **given)
    assert found == (("decoder", "programs", *expected[:3]), expected[3] | {"drafts": "drafts"})


@pytest.mark.parametrize(("memory", "gathered"), [(None, True), (1_000, False), (10**9, True)])
def test_a_server_gathers_what_fits(
    memory: int | None, gathered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What mesh.fsdp has split, where it takes at most half of the memory that a device says it has."""
    config = config_on((2, 1, 1, 1, True))
    with on_mesh(config):
        device = SimpleNamespace(memory_stats=lambda: memory and {"bytes_limit": memory})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        assert _fits_gathered(config, "", by_module=False) == gathered
    out, err = capsys.readouterr()
    assert ("weights stay split" in err) != gathered and not out  # of completions alone


@pytest.mark.parametrize("fields", [{"resident_layers": 1}, {"mtp_modules": 1}], ids=lambda fields: next(iter(fields)))
def test_what_no_device_holds_needs_no_room(
    fields: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts in host memory, but for the two layers of the ring, and a next-token module that drafts nothing."""
    config = tiny((2, 1, 1, 1, True), num_layers=8, num_experts=64, **fields)
    with on_mesh(config):
        parts = [parameters(of, {}).parts for of in (config, tiny(num_layers=8, num_experts=64))]
        numbers = sum(parts[1].values()) - parts[1]["experts"] * ("resident_layers" in fields) * 6 // 8
        assert numbers < sum(parts[0].values())
        for (weights, size), short in itertools.product({"float32": 4, "bfloat16": 2, "int8": 1}.items(), (0, 1)):
            device = SimpleNamespace(memory_stats=lambda memory=2 * size * numbers - short: {"bytes_limit": memory})
            monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
            assert _fits_gathered(config, weights, by_module=False) == (not short)
            assert ("weights stay split" in capsys.readouterr().err) == bool(short)


def test_the_smallest_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all processes, which would compile other programs otherwise."""
    config = config_on((2, 1, 1, 1, True))
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**9 if hosts.is_first() else 1_000})

    def work(_: int) -> bool:
        with on_mesh(config):
            return _fits_gathered(config, "", by_module=False)

    with monkeypatch.context() as patch, on_mesh(config):
        patch.setattr(jax, "local_devices", lambda: [device])
        assert run_as_processes(patch, 2, work) == [False, False]
