"""Where answers begin and end is found in renders that are linear in the messages, and as if each turn was rendered."""

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from bigmac_jax.data import chat_template as module
from bigmac_jax.data.chat_files import ChatFiles
from bigmac_jax.data.chat_template import DEFAULT, PLAIN, Chat, ChatError, Messages, Piece, PromptLimit, load_chat
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, TooLongError, encode_at_most, train_bpe

# In the manner of models that are in use; none is a copy.
TEMPLATES = {
    "plain": PLAIN,
    "default": DEFAULT.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "the prompt in the loop": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + "
    "message['content'] + eos_token }}\n{% else %}\n{{ message['content'] }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "trimmed": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<' + "
    "message['role'] + '>\n\n' + message['content'] | trim + eos_token %}{% if loop.index0 == 0 %}{% set content = "
    "'^' + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<assistant>\n\n' }}{% endif %}",
    "without the first": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = "
    "messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{% if message['role'] == 'user' %}[INST] {% if loop.first and system %}<<{{ system }}>> {% endif %}"
    "{{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "without thoughts": "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content.split('</t>')[-1] }}"
    "{{ eos_token }}{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}",
    "with an end": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "<assistant>{% else %}{{ eos_token }}{% endif %}",
    "the prompt always": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "<|assistant|>",
    "no prompt": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}",
    "no end": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "twice": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "the last one otherwise": "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}",
    "turns of two": "{% for m in messages %}{% if loop.index0 % 4 == 1 %}({% endif %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "a macro": "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}  # fmt: skip
# Whose turns no loop writes one by one.
LOOSE = {"turns of two"}


def by_turns(chat: Chat, messages: Messages, prompt: bool) -> list[Piece] | None:
    """By their meaning, in a number of renders that is the square of the messages': None where turns are rewritten."""
    text, cuts = chat._render(messages, prompt), [0]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = chat._render(messages[:i], True), chat._render(messages[: i + 1], False)
            if not (after.startswith(before) and text.startswith(after)):
                return [Piece(text, False)] if prompt else None
            marks = [after.rfind(name) + len(name) for name in chat._names if name in after[len(before) :]]
            cuts += [len(before), max(marks, default=len(after))]
    parts = [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]
    return [Piece(part, n % 2 == 1) for n, part in enumerate(parts) if part]


def dialogue(draw: random.Random, size: int, answers: float = 0.5) -> list[dict[str, str]]:
    words = ["peace", " war ", "", "a</t>b", "assistant", "Assistant:", "<A>", "2\n", "<assistant>x"]
    roles = ["assistant" if draw.random() < answers else "user" for _ in range(size)]
    roles[0] = draw.choice(["system", "user"])
    return [{"role": role, "content": draw.choice(words)} for role in roles]


def bpe() -> JsonTokenizer:
    values = json.loads(train_bpe(["peace and war"] * 4, 300))
    for number, name in enumerate(("<|im_start|>", "<|im_end|>"), 300):
        values["added_tokens"].append(values["added_tokens"][0] | {"id": number, "content": name})
    return JsonTokenizer(json.dumps(values))


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_cut_as_if_each_turn_was_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where few turns are: the others follow from these."""
    monkeypatch.setattr(module, "_CHECKED", 4)
    draw, chat, cut = random.Random(0), Chat(bpe(), TEMPLATES[name]), 0
    for _ in range(60):
        messages, prompt = dialogue(draw, draw.randint(1, 24)), draw.random() < 0.5
        expected = by_turns(chat, messages, prompt)
        try:
            found = chat.pieces(messages, prompt)
        except ChatError:
            found = None
        if name in LOOSE and found != expected:
            assert found in (None, [Piece(chat._render(messages, prompt), False)])
            continue
        assert found == expected, messages
        cut += sum(piece.answer for piece in found or ())
    assert (cut > 100) == (name not in {"with an end", "the prompt always", "the last one otherwise", *LOOSE})


def test_a_dated_chat_has_one_date_in_all_that_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what ends an answer is found."""
    ends = "{{ '<|im_start|>' if strftime_now('%Y') == '2020' else '<|im_end|>' }}"
    template = f"{{% for m in messages %}}{{{{ m['content'] }}}}{ends}{{% endfor %}}"

    def loaded(dated: bool, template: str = template, date: str = "2020-02-03") -> Chat:
        monkeypatch.setattr(module, "read_chat", lambda *_: ChatFiles(template, {}, "a", date))
        return load_chat(bpe(), "", "", "", date="2031-02-03" if dated else "")

    message = [{"role": "user", "content": "a"}]
    of_then, of_now = loaded(True), loaded(False)
    assert of_then.stop == ("<|im_start|>",) and of_then.pieces(message)[0].text == "a<|im_start|>"
    assert of_now.stop == ("<|im_end|>",) and of_now.pieces(message)[0].text == "a<|im_end|>"
    assert (of_then.files.date, of_now.files.date, loaded(True, PLAIN).files.date) == ("2020-02-03", "", "")
    assert loaded(True, date="").files.date == "2031-02-03"


def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The messages of each render from here on."""
    seen: list[int] = []
    render = Chat._render

    def counted(self: Chat, messages: Sequence[dict[str, str]], *given: Any) -> str:
        seen.append(len(messages))
        return render(self, messages, *given)

    monkeypatch.setattr(Chat, "_render", counted)
    return seen


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("roles", [("user", "assistant"), ("assistant",), ("user",) * 9 + ("assistant",)])
def test_renders_are_linear_in_messages(roles: tuple[str, ...], prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(ByteTokenizer(), PLAIN)
    seen = rendered(monkeypatch)
    for size in (200, 2000):
        messages = [{"role": roles[i % len(roles)], "content": "a"} for i in range(size)]
        seen.clear()
        pieces = chat.pieces(messages, prompt)
        assert sum(piece.answer for piece in pieces) == size // len(roles) and "".join(p.text for p in pieces)
        assert sum(seen) <= 10 * size + 2 * module._CHECKED and len(seen) < 100


def test_turns_are_rendered_until_a_thousand_messages_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a hundred, by the first six turns; of the others those at twice the place of the last one, and the end."""
    monkeypatch.setattr(module, "_CHECKED", 100)
    chat = Chat(ByteTokenizer(), PLAIN)
    seen = rendered(monkeypatch)
    chat.pieces([{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(64)], False)
    assert seen == [64, *range(1, 13), 23, 24, 47, 48, 63, 64, 64]  # first the whole, at last with marks


def test_what_is_too_long_is_not_rendered_or_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, seen, encoded = Chat(bpe(), PLAIN), rendered(monkeypatch), []
    monkeypatch.setattr(chat, "encode_batch", encoded.append)
    with pytest.raises(TooLongError):
        chat.prompt([{"role": "user", "content": ""}] * 101, PromptLimit(100))
    assert not seen
    with pytest.raises(TooLongError):
        chat.prompt(
            [{"role": "user", "content": "a " * 10_000}, {"role": "assistant", "content": "a"}], PromptLimit(100)
        )
    assert seen == [2] and not encoded


def test_a_text_is_encoded_as_far_as_there_is_room() -> None:
    """The same tokens as ever, or no more than a few pieces."""
    tokenizer, done = bpe(), []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        done.extend(map(len, texts))
        return tokenizer.encode_batch(texts)

    text = "peace and war, " * 40_000
    assert encode_at_most(encode, [text, "b"], 10**6, 0, check=lambda: None) == tokenizer.encode(
        text
    ) + tokenizer.encode("b")
    done.clear()
    with pytest.raises(TooLongError):
        encode_at_most(encode, [text], 1000, 0, check=lambda: None)
    assert sum(done) < len(text) / 3
    done.clear()
    with pytest.raises(TooLongError):
        encode_at_most(encode, [text], 1000, tokenizer.token_bytes, check=lambda: None)
    assert not done


def test_what_fills_its_room_is_taken() -> None:
    """And one more is refused: tokens, messages, and characters of a text before its answers are looked for."""
    tokenizer, checks = ByteTokenizer(), list[int]()
    for token_bytes in (0, 1):
        given = tokenizer.encode_batch, ["ab", "c"]
        assert encode_at_most(*given, 3, token_bytes, lambda: checks.append(1)) == [*b"abc"]
        with pytest.raises(TooLongError, match="more than 2 tokens"):
            encode_at_most(*given, 2, token_bytes, lambda: None)
    assert len(checks) == 4  # before each text
    message, counting = {"role": "user", "content": "a" * 9}, Chat(tokenizer, "{{ messages | length }}")
    assert counting.prompt([message], PromptLimit(1)) == [*b"1"]
    with pytest.raises(TooLongError):
        counting.prompt([message] * 2, PromptLimit(1))
    plain = Chat(tokenizer, PLAIN)  # whose longest token is the name of the end, of 13 bytes
    text = f"User: {'a' * 9}\nAssistant:"
    assert len(text) == 26 and plain.pieces([message], True, PromptLimit(2)) == [(text, False)]
    with pytest.raises(TooLongError):
        plain.pieces([message | {"content": "a" * 10}], True, PromptLimit(2))


def test_how_long_a_token_may_be() -> None:
    values = json.loads(bpe().json_text)
    assert ByteTokenizer().token_bytes == 1
    longest = max(len(bytes(bpe().decode([i]), "utf-8")) for i in range(300))
    assert bpe().token_bytes == longest == len("<|endoftext|>")

    def of(change: dict[str, Any]) -> int:
        return JsonTokenizer(json.dumps(values | change)).token_bytes

    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    byte_level = values["pre_tokenizer"]
    assert of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}) == longest
    removing = [split | {"behavior": "Removed"}, byte_level]
    absorbing = [values["added_tokens"][0], values["added_tokens"][1] | {"lstrip": True}]
    for change in (
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": removing}},
        {"pre_tokenizer": None},
        {"added_tokens": absorbing},
    ):
        assert of(change) == 0
