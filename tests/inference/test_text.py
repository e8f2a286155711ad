"""Tokens become text: whole characters only, nothing of a stop text, and all there is at the end."""

import pytest

from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import BROKEN, Text


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


class Spaces:
    """As SentencePiece does: the space before the first word is left out."""

    eos_id = 0

    def decode(self, ids: list[int]) -> str:
        return " ".join("abc"[i - 1] for i in ids)


def test_a_tokenizer_that_drops_the_first_space() -> None:
    text = Text(Spaces(), Sampling(max_tokens=4))  # type: ignore[arg-type]
    assert [text.add(i, 0.0) for i in (1, 2, 3, 1)] == ["a", " b", " c", " a"]


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf")])
def test_a_token_of_no_number_ends_it(logprob: float) -> None:
    text = Text(ByteTokenizer(), Sampling(max_tokens=9))
    assert text.add(ord("a"), -0.5) == "a"
    assert text.add(256, logprob) == ""
    assert (text.finish_reason, text.text, text.tokens, text.logprobs) == (BROKEN, "a", [97], [-0.5])
