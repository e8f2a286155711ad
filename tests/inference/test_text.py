"""Tokens become text: whole characters only, nothing of a stop text, and all there is at the end."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from bigmac_jax.inference import Generator
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import BROKEN, Text, _overlap, _shortest_context


def pieces(content: bytes, **sampling: object) -> tuple[list[str], Text]:
    """What is given out byte by byte, until it ends."""
    text, given = Text(ByteTokenizer(), Sampling(**{"max_tokens": len(content), **sampling})), []  # type: ignore[arg-type]
    for byte in content:
        given.append(text.add(256 if byte == 0 else byte, -0.5))  # 0 stands for the end of text
        if text.finish_reason:
            break
    assert "".join(given) == text.text
    assert len(text.tokens) == len(given) == len(text.logprobs)
    return given, text


def test_characters_come_whole() -> None:
    given, text = pieces("aé€😀b".encode())
    assert given == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert text.finish_reason == "length"


def test_broken_bytes_do_not_hold_the_text_up() -> None:
    given, text = pieces(b"a\xff\xff\xff\xffbc")
    assert text.text == "a" + 4 * "\N{REPLACEMENT CHARACTER}" + "bc"
    assert given[-1] == "c"


@pytest.mark.parametrize("stray", [b"\xff", b"\xf0", b"\xff\xff\xff", b"\xf0\x9f"])
def test_a_character_behind_broken_bytes_is_whole(stray: bytes) -> None:
    content = b"a" + stray + "😀b".encode()
    assert pieces(content)[1].text == content.decode(errors="replace")


def test_an_unfinished_character_at_the_end() -> None:
    assert pieces(b"ab\xe2\x82")[1].text == "ab\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("content", "stop", "expected", "reason"),
    [
        (b"one two three", (" tw",), "one", "stop"),
        (b"one two three", ("\n", "three", "two"), "one ", "stop"),
        (b"aab aac", ("aac",), "aab ", "stop"),
        (b"one twx", ("two",), "one twx", "length"),  # what was held comes out
        (b"one tw", ("two",), "one tw", "length"),
        (b"one\0two", (), "one", "stop"),
        (b"on tw\0o", ("two",), "on tw", "stop"),
    ],
)
def test_stops(content: bytes, stop: tuple[str, ...], expected: str, reason: str) -> None:
    _, text = pieces(content, stop=stop)
    assert (text.text, text.finish_reason) == (expected, reason)


def test_nothing_of_a_stop_text_is_given_out_early() -> None:
    assert pieces(b"ab<end", stop=("<end>",))[0] == ["a", "b", "", "", "", "<end"]
    assert pieces(b"ab<<end>", stop=("<end>",))[0] == ["a", "b", "", "<", "", "", "", ""]


def test_ignoring_the_end_of_text() -> None:
    _, text = pieces(b"a\0b", ignore_eos=True)
    assert text.tokens == [97, 256, 98] and text.finish_reason == "length" and text.text.endswith("b")


def stream(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = (), context: tuple[int, ...] = ()) -> Text:
    text, given = Text(tokenizer, Sampling(len(tokens), stop=stop), context), ""
    for token in tokens:
        given += text.add(token, 0.0)
        if text.finish_reason:
            break
    assert given == text.text
    return text


@pytest.mark.parametrize("size", [257, 300, 400])
def test_any_cuts_give_the_text_that_the_tokens_are(size: int) -> None:
    """Also where no token ends with a character; and a stop text cuts where it first begins."""
    draw = random.Random(size)
    codes = range(0x30A1, 0x30F7), range(0x3041, 0x3055), range(0x1F600, 0x1F608)  # of katakana, hiragana, emoji
    kinds = ["ab <\n", *("".join(map(chr, some)) for some in codes)]

    def write(kind: int, length: int) -> str:
        return "".join(draw.choice(kinds[kind]) for _ in range(length))

    tokenizer = JsonTokenizer(train_bpe([write(i % 4, 30) for i in range(300)], size))
    for trial in range(40):
        tokens = tokenizer.encode(write(trial % 4, 60) + write(draw.randrange(4), 5))
        if trial % 3 == 0:  # invalid bytes
            draw.shuffle(tokens)
        whole = tokenizer.decode(tokens)
        assert stream(tokenizer, tokens).text == whole
        at = draw.randrange(len(whole))
        stop = whole[at : at + draw.randint(1, 3)]
        text = stream(tokenizer, tokens, (stop, "never"))
        assert (text.text, text.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_stop_text_that_is_complete_first_counts() -> None:
    tokenizer = JsonTokenizer(train_bpe(["abcd"] * 4, 260))
    assert len(tokenizer.encode("abcd")) == 1
    for tokens in (tokenizer.encode("abcd"), [token for letter in "abcd" for token in tokenizer.encode(letter)]):
        text = stream(tokenizer, tokens, ("abcd", "bc"))
        assert (text.text, text.finish_reason) == ("a", "stop")


def test_where_each_token_begins() -> None:
    assert pieces("aé€b".encode())[1].offsets == [0, 1, 1, 2, 2, 2, 3]
    assert pieces(b"on twx", stop=("two",))[1].offsets == [0, 1, 2, 3, 4, 5]


def llama() -> Tokenizer:
    """As of Llama 2: pieces with their space, which is dropped before the first word, and bytes for what has none."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "▁"]
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return JsonTokenizer(made.to_str())


A, B, SPACE = 258, 259, 260


def test_the_space_behind_the_prompt() -> None:
    tokenizer = llama()
    assert tokenizer.decode([A, B]) == "a b"
    assert list(map(tokenizer.bytes_of, (1, 2 + 0xE2, A))) == [b"</s>", b"\xe2", b" a"]
    assert stream(tokenizer, [A, B, SPACE, A]).text == "a b  a"
    assert stream(tokenizer, [A, B], context=(B, B)).text == " a b"
    assert stream(tokenizer, [A], context=(B, SPACE)).text == " a"  # whose own text is nothing, without one before it
    assert stream(tokenizer, [A], (" ",), (B,)).finish_reason == "stop"
    generator: Any = SimpleNamespace(tokenizer=tokenizer)
    for begins, expected in ((False, " a"), (True, "a")):
        assert Generator.job(generator, (B,), Sampling(), begins=begins).text.add(A, 0.0) == expected


@pytest.mark.parametrize("context", [(), (B,), tuple(2 + byte for byte in "ー€".encode() * 9)])
def test_bytes_that_stand_for_characters(context: tuple[int, ...]) -> None:
    """A broken one leaves alone what was whole before it."""
    content = "€😀".encode() + b"\xff" + "😀€".encode()
    tokens = [2 + byte for byte in content]
    text = stream(llama(), [*tokens, A, *tokens[:7], A], context=context).text
    assert text.startswith("€😀\N{REPLACEMENT CHARACTER}") and text.endswith(" a€😀 a")


def test_characters_that_never_end_keep_few_tokens() -> None:
    """Or each token of a model that says nothing else would decode all before it."""
    text = Text(ByteTokenizer(), Sampling(max_tokens=500))
    seen = [(text.add(0x82, -0.5), len(text._window))[1] for _ in range(400)]
    assert max(seen) <= 33 and 397 <= len(text.text) <= 400 and set(text.text) == {"\ufffd"}


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf")])
def test_a_token_of_no_number_ends_it(logprob: float) -> None:
    text = Text(ByteTokenizer(), Sampling(max_tokens=9))
    assert text.add(ord("a"), -0.5) == "a"
    assert text.add(256, logprob) == ""
    assert (text.finish_reason, text.text, text.tokens, text.logprobs) == (BROKEN, "a", [97], [-0.5])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("one tw", "two", 2), ("one t", "two", 1), ("one two", "two", 0), ("one", "two", 0), ("aaa", "aaab", 3),
     ("xaa", "aaab", 2), ("tw", "two", 2), ("", "two", 0), ("t", "t", 0), ("abab", "ababc", 4), ("ab", "ba", 1)],
)  # fmt: skip
def test_the_beginning_of_a_stop_text(text: str, stop: str, expected: int) -> None:
    """The longest that the text ends with; never the whole."""
    assert _overlap(text, stop) == expected


def test_the_context_that_a_text_continues() -> None:
    """The fewest of at most 16 tokens that are whole characters."""
    euro = list("€".encode())
    assert _shortest_context(ByteTokenizer(), [65, 66]) == ([66], "B")
    assert _shortest_context(ByteTokenizer(), [65, *euro]) == (euro, "€")
    assert _shortest_context(ByteTokenizer(), euro[:2]) == _shortest_context(ByteTokenizer(), []) == ([], "")
    stray = [0x82] * 16
    assert _shortest_context(ByteTokenizer(), [66, *stray[1:]]) == ([], "")
    spaces = [SPACE, *[1] * 14]  # which are no text by themselves
    tokenizer: Any = SimpleNamespace(decode=lambda tokens: "x" if SPACE in tokens or A in tokens else "")
    assert _shortest_context(tokenizer, [A, *spaces[1:], 1]) == ([A, *spaces[1:], 1], "x")
    assert _shortest_context(tokenizer, [A, *spaces[1:], 1, 1]) == ([], "")
