"""What an answer says of its tokens."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from bigmac_jax.data.chat_template import DEFAULT, PLAIN, Chat
from bigmac_jax.data.tokenizer import ByteTokenizer, Tokenizer
from bigmac_jax.inference.jobs import Job, Step
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import Text
from bigmac_jax.serving.answers import Answer, name_token
from bigmac_jax.serving.api import CompletionRequest
from bigmac_jax.serving.dialogue import Dialogue

ASKED = {"role": "user", "content": "Capital of France?"}
ENDS = (
    "{% for m in messages %}{{ m.role }}\n\n{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def contents(chat: Chat, said: str) -> tuple[str, str]:
    """Of a chat's answer for which the model writes `said`: whole, and as the pieces of a stream."""
    tokenizer, sampling = ByteTokenizer(), Sampling(50)
    job = Job([1], sampling, Text(tokenizer, sampling))
    request = CompletionRequest(True, [[1]], [""], sampling, 1, True, False, False)
    answer = Answer(request, [job], "m", partial(name_token, tokenizer), Dialogue(chat).opening)
    steps = []
    for token in (*said.encode(), tokenizer.eos_id):
        steps.append(Step(job, job.text.add(token, -0.1), token, -0.1, (), job.text.finish_reason))
    chunks = [chunk for step in steps if (chunk := answer.chunk(0, step))]
    whole = answer.build([steps])["choices"][0]["message"]["content"]
    return whole, "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


@pytest.mark.parametrize(("template", "opening"), [(DEFAULT, " "), (PLAIN, " "), (ENDS, "\n\n")])
def test_the_next_turn_begins_with_this_one(template: str, opening: str) -> None:
    """What the template writes before an answer is none of it, or it would stand there twice."""
    chat = Chat(ByteTokenizer(), template)
    whole, streamed = contents(chat, f"{opening}Paris")
    assert whole == streamed == "Paris"
    turns = [ASKED, {"role": "assistant", "content": whole}, {"role": "user", "content": "And of Spain?"}]
    read = [*chat.prompt([ASKED]), *f"{opening}Paris".encode()]
    assert chat.prompt(turns)[: len(read)] == read


@pytest.mark.parametrize("said", ["Paris", "", "\n", "\nParis", "\n \nParis"])
def test_another_beginning_stays(said: str) -> None:
    assert contents(Chat(ByteTokenizer(), ENDS), said) == (said, said)


def logprobs(tokenizer: Tokenizer, tokens: Sequence[int], chat: bool = False, stream: bool = False) -> list[Any]:
    """Those of an answer, one entry for each of its chunks; every token might have been the byte 0xb0 or 0xb1, too."""
    sampling = Sampling(len(tokens), logprobs=3)
    job = Job([1], sampling, Text(tokenizer, sampling))
    request = CompletionRequest(chat, [[1]], ["" if chat else "ab"], sampling, 1, stream, False, True)
    answer = Answer(request, [job], "m", partial(name_token, tokenizer))
    steps = []
    for token in tokens:
        piece = job.text.add(token, -0.1)
        others = tuple((byte, value) for byte, value in ((0xB0, -2.5), (0xB1, -9.0)))
        steps.append(Step(job, piece, token, -0.1, ((token, -0.1), *others), job.text.finish_reason))
    answers = [answer.chunk(0, step) for step in steps] if stream else [answer.build([steps])]
    return [one["choices"][0]["logprobs"] for one in answers if one]


def test_parts_of_characters_have_names_and_places() -> None:
    (found,) = logprobs(ByteTokenizer(), "aé€".encode())
    names = [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]
    assert found["tokens"] == ["a", *names]
    assert found["text_offset"] == [2, 3, 3, 4, 4, 4]
    assert found["top_logprobs"][1] == {names[0]: -0.1, r"bytes:\xb0": -2.5, r"bytes:\xb1": -9.0}
    parts = logprobs(ByteTokenizer(), "aé€".encode(), stream=True)
    for name, values in found.items():
        assert [value for part in parts for value in part[name]] == values


def test_the_most_likely_of_equal_names_counts() -> None:
    class Unknown(ByteTokenizer):
        """Whose tokens have no bytes that are known."""

        def decode(self, ids: object) -> str:
            return "a"

        def bytes_of(self, token: int) -> None:
            return None

    (found,) = logprobs(Unknown(), [1])
    assert found["top_logprobs"] == [{"a": -0.1}]
    (found,) = logprobs(Unknown(), [1], chat=True)
    assert found["content"][0]["token"] == "a" and found["content"][0]["bytes"] is None


def test_a_chat_has_the_bytes_of_tokens() -> None:
    (found,) = logprobs(ByteTokenizer(), "é€".encode(), chat=True)
    assert bytes(byte for token in found["content"] for byte in token["bytes"]).decode() == "é€"
    assert [top["bytes"] for top in found["content"][0]["top_logprobs"]] == [[0xC3], [0xB0], [0xB1]]


def test_an_answer_whole_and_in_chunks() -> None:
    """Two completions of each prompt: a prompt is counted once, and each completion goes by its number."""
    tokenizer, sampling, echo = ByteTokenizer(), Sampling(2), ["<", "("]
    request = CompletionRequest(False, [[1, 2, 3], [4]], echo, sampling, 2, True, True, False)
    jobs = [Job([1] * size, sampling, Text(tokenizer, sampling), reused=size - 1) for size in (3, 3, 1, 1)]
    answer = Answer(request, jobs, "m", partial(name_token, tokenizer))
    chunks, steps = list(answer.first_chunks()), list[list[Step]]()
    for place, job in enumerate(jobs):
        steps.append([Step(job, job.text.add(t, -0.1), t, -0.1, (), job.text.finish_reason) for t in (65 + place, 90)])
        chunks += [chunk for step in steps[-1] if (chunk := answer.chunk(place, step))]
    whole, (last,) = answer.build(steps), answer.last_chunks()
    usage = {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert whole["usage"] == last["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 2}}
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "<AZ"), (1, "<BZ"), (2, "(CZ"), (3, "(DZ")]
    given = [(c["index"], c["text"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"]]
    assert given[:4] == [(i, echo[i // 2], None) for i in range(4)] and last["choices"] == []
    assert given[4:] == [(i, t, r) for i in range(4) for t, r in ((chr(65 + i), None), ("Z", "length"))]
    assert {chunk["id"] for chunk in (*chunks, last)} == {whole["id"]}
    silent = Answer(dataclasses.replace(request, usage=False, echo=["", ""]), jobs, "m", partial(name_token, tokenizer))
    assert not [*silent.last_chunks(), *silent.first_chunks()]
    assert silent.chunk(0, Step(jobs[0], "", 97, -0.1, (), "")) is None  # nothing is certain of its text
