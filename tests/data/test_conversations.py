"""Conversations: which tokens are learned, token by token, and what becomes of rows that are bad."""

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import pickle
import re
from typing import Any

import numpy as np
import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig, TuningConfig
from bigmac_jax.data import chat_template as module
from bigmac_jax.data.batch import NO_TARGET, PADDING
from bigmac_jax.data.chat_template import DEFAULT, Chat, ChatError, PromptLimit
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import TrainIterator, count_targets, eval_batches, open_stream
from bigmac_jax.data.splits import hold_out, text_key
from bigmac_jax.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TooLongError,
    train_bpe,
)

EOS = 256
TURNS = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
# As transformers' documentation writes ChatML, without the tags that mark answers.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(path: pathlib.Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def conversations(
    folder: pathlib.Path, rows: list[Any], length: int = 64, tokenizer: Tokenizer | None = None, **tuning: Any
) -> Conversations:
    file = write(folder / "rows.jsonl", rows)
    config = Config(
        model=ModelConfig(vocab_size=512, capacity_factor=math.inf),
        data=DataConfig(source=file, validation_source=file, test_source=file, tokenizer="bytes",
                        sequence_length=length, batch_size=2),
        train=TrainConfig(init_from="some" if tuning.get("objective") == "dpo" else ""),
        tuning=TuningConfig(**{"objective": "sft"} | tuning),
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    stream = open_stream(config, "train", tokenizer or ByteTokenizer())
    assert isinstance(stream, Conversations)
    return stream


def bytes_of(sequence: np.ndarray, tokens: str = "inputs") -> list[int]:
    return sequence[0 if tokens == "inputs" else 1].tolist()


def ids(text: str) -> list[int]:
    """Bytes, with ¶ for the end of text."""
    return [EOS if character == "¶" else ord(character) for character in text]


def test_prompt_and_completion(tmp_path: pathlib.Path) -> None:
    (sequence,) = conversations(tmp_path, [{"prompt": "1+1=", "completion": "2!"}]).sequences
    assert bytes_of(sequence) == ids("1+1=2!")
    assert bytes_of(sequence, "targets") == [NO_TARGET] * 3 + ids("2!¶")
    assert sequence.dtype == np.int32


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_how_many_tokens_an_evaluation_scores(tmp_path: pathlib.Path, objective: str) -> None:
    """Else its progress ends at 106 % of 17 tokens."""
    row = {"prompt": "a", "completion": "bc", "chosen": "bc", "rejected": "d"}
    stream = conversations(tmp_path, [row] * 6, objective=objective)
    targets = sum(int((batch.targets_BL != NO_TARGET).sum()) for batch in eval_batches(stream, 64, 2))
    assert count_targets(stream) == targets == 18


def test_without_a_prompt_the_first_token_is_predicted_from_an_end(tmp_path: pathlib.Path) -> None:
    (sequence,) = conversations(tmp_path, [{"prompt": "", "completion": "ab"}]).sequences
    assert bytes_of(sequence) == ids("¶ab") and bytes_of(sequence, "targets") == ids("ab¶")


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(tmp_path: pathlib.Path) -> None:
    stream = conversations(tmp_path, [{"messages": TURNS}], 128)
    text = "System: Add.\nUser: 1+1?\nAssistant: 2¶\nUser: 2+2?\nAssistant: 4¶"
    (sequence,) = stream.sequences
    assert bytes_of(sequence) == ids(text)[:-1]
    learned = "".join("x" if target != NO_TARGET else "." for target in bytes_of(sequence, "targets"))
    # Of each token the one behind it: " 2¶" and " 4¶".
    assert learned == "".join("x" if mark == "x" else "." for mark in (
        "System: Add.\nUser: 1+1?\nAssistant: 2¶\nUser: 2+2?\nAssistant: 4¶".replace(" 2¶", "xxx").replace(" 4¶", "xxx")
    ))[1:]  # fmt: skip
    assert [t for t in bytes_of(sequence, "targets") if t != NO_TARGET] == ids(" 2¶ 4¶")
    assert (stream.num_tokens, stream.counts.documents, stream.counts.words) == (6, 1, 2)


def bpe() -> JsonTokenizer:
    """With the tokens of ChatML."""
    values = json.loads(train_bpe(["the answer is two and four", "assistant user system"] * 4, 300))
    for number, name in enumerate(("<|im_start|>", "<|im_end|>"), 300):
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        values["added_tokens"].append({"id": number, "content": name} | token)
    return JsonTokenizer(json.dumps(values))


@pytest.mark.parametrize("form", ["plain", "ours", "ChatML", "dpo"])
def test_special_tokens_are_no_text(form: str, tmp_path: pathlib.Path) -> None:
    """Bits per byte and perplexity a word are those of the same text in a stream."""
    (tmp_path / "chatml.jinja").write_text(CHATML)
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "grün "}]}
    if form in ("plain", "dpo"):
        row = {"prompt": "?", "completion": "grün ", "chosen": "grün ", "rejected": "no"}
    tuning = {"chat_template": str(tmp_path / "chatml.jinja")} if form == "ChatML" else {}
    tuning |= {"objective": "dpo"} if form == "dpo" else {}
    counts = conversations(tmp_path, [row], tokenizer=bpe(), **tuning).counts
    assert (counts.documents, counts.words, counts.bytes) == (1, 1, 6 + (form == "ours"))  # which begins with a space


def test_a_template_without_marks_is_cut_where_its_answers_are(tmp_path: pathlib.Path) -> None:
    tokenizer, template = bpe(), tmp_path / "t.jinja"
    template.write_text(CHATML)
    rows = [{"messages": [*TURNS[:2], {"role": "assistant", "content": "the answer is two"}]}]
    (sequence,) = conversations(tmp_path, rows, 200, tokenizer, chat_template=str(template)).sequences
    targets = [token for token in bytes_of(sequence, "targets") if token != NO_TARGET]
    assert tokenizer.decode(targets) == "the answer is two<|im_end|>"  # and not the end of the line behind it
    assert targets[:-1] == tokenizer.encode("the answer is two")  # a token begins where the answer does
    prompt = Chat(tokenizer, CHATML).prompt(rows[0]["messages"][:2])
    n = len(prompt) - 1
    assert bytes_of(sequence)[: n + 1] == prompt and bytes_of(sequence, "targets")[:n] == [NO_TARGET] * n


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (CHATML, ("<|im_end|>",)),
        (CHATML.replace("{% for", "<|im_start|>{% for"), ("<|im_end|>",)),
        (DEFAULT, ()),  # the end of text, where a model stops anyway
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", ()),
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", ()),  # shows no answer
        ("{{ raise_exception('no system') }}", ()),
        # What opens an answer ends none; of several the first, unless that is the end of text.
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}", ()),
        ("{% for m in messages %}{{ m.content }}!<|im_end|><|im_start|>{% endfor %}", ("<|im_end|>",)),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}<|im_end|>{% endfor %}", ()),
    ],
)
def test_the_token_that_ends_an_answer(template: str, stop: tuple[str, ...]) -> None:
    assert Chat(bpe(), template).stop == stop


def test_a_template_is_rendered_as_transformers_does() -> None:
    """Blocks take their line's indentation and end with them; loops may be left; JSON is not escaped for HTML."""
    lines = ("  {% for m in messages %}", "  {% if loop.index == 2 %}", "  {% break %}", "  {% endif %}",
             "  {{ m.content | tojson }}{{ bos_token }}|", "{% endfor %}", "{{ pad_token }}")  # fmt: skip
    messages = [{"role": "user", "content": text} for text in ("<é>", "b", "c")]
    chat = Chat(ByteTokenizer(), "\n".join(lines))
    assert [piece.text for piece in chat.pieces(messages, prompt=True)] == ['  "<é>"|\n<|endoftext|>']
    special = {"bos_token": "<|im_start|>", "pad_token": "<unknown>", "eos_token": "<|im_end|>"}
    chat = Chat(bpe(), "{{ bos_token }}{{ eos_token }}{{ pad_token }}", special)
    assert chat._special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    with pytest.raises(ConfigError, match="the chat template is not Jinja"):
        Chat(bpe(), "{% for %}")
    assert module._to_json({"a": ["é"]}, indent=1) == '{\n "a": [\n  "é"\n ]\n}'
    compact = "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
    unused = "{% if tools is not none or documents is not none %}You have tools.{% endif %}"
    (piece,) = Chat(ByteTokenizer(), unused + compact).pieces(messages, prompt=True)
    assert piece.text == '{"a":1,"b":"\\u00e9"}'


def test_a_tokenizer_of_another_kind_is_cut_at_its_end_of_text() -> None:
    """Which SentencePiece decodes to nothing, and knows by its name."""
    gemma = object.__new__(SentencePieceTokenizer)
    vars(gemma).update(pieces=["<pad>", "<eos>", "a"], eos_id=1, token_bytes=0)
    assert Chat(gemma, "{{ messages[0].content }}{{ eos_token }}").end == "<eos>"

    class Other(Tokenizer):
        vocab_size, eos_id, fingerprint = 300, 256, "other"
        name = ""

        def _encode_pieces(self, texts: Any) -> Any:
            return [list(text.encode()) for text in texts]

        def decode(self, ids: Any) -> str:
            return self.name if list(ids) == [256] else bytes(ids).decode()

    for Other.name, end in (("", "<|endoftext|>"), ("<e>", "<e>")):
        chat = Chat(Other(), "{{ messages[0].content }}{{ eos_token }}b{{ eos_token }}")
        assert chat.end == end and chat.prompt([{"role": "user", "content": "a"}]) == [97, 256, 98, 256]
        assert chat.encode_batch(["", f"a{end}"]) == [[], [97, 256]]


def test_a_prompt_at_its_limit() -> None:
    """As many messages as tokens, as many bytes as they can be at most, as many tokens as that."""
    chat = Chat(ByteTokenizer(), "{% for m in messages %}{{ m.content }}{% endfor %}")
    for count in (2, 3):
        messages = [{"role": "user", "content": "ab"}] * count
        assert chat.prompt(messages, PromptLimit(2 * count)) == [*b"ab"] * count
        for most in (2 * count - 1, count - 1):
            with pytest.raises(TooLongError) as error:
                chat.prompt(messages, PromptLimit(most))
            assert error.value.most == most
    widest = len("<|endoftext|>")  # bytes of a token
    assert chat.pieces([{"role": "user", "content": "x" * 2 * widest}], limit=PromptLimit(2))
    with pytest.raises(TooLongError):
        chat.pieces([{"role": "user", "content": "x" * (2 * widest + 1)}], limit=PromptLimit(2))


def test_marked_and_unmarked_templates_agree() -> None:
    unmarked = DEFAULT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    marked, plain = (Chat(ByteTokenizer(), template).pieces(TURNS) for template in (DEFAULT, unmarked))
    assert marked == plain and [piece.text for piece in marked if piece.answer] == [
        " 2<|endoftext|>", " 4<|endoftext|>",
    ]  # fmt: skip


def test_training_and_serving_see_the_same_tokens(tmp_path: pathlib.Path) -> None:
    """What a server gives the model before its second answer is what stood before that in training."""
    (sequence,) = conversations(tmp_path, [{"messages": TURNS}], 128).sequences
    prompt = Chat(ByteTokenizer()).prompt(TURNS[:-1])
    assert bytes_of(sequence)[: len(prompt)] == prompt


def test_a_prompt_that_no_answer_follows_is_told_apart() -> None:
    """Such as a prompt to think, which is not written again before what was said. A server takes it as it is."""
    chat = Chat(ByteTokenizer(), CHATML.replace("assistant\n", "assistant\n<think>\n"))
    words = r"ends a prompt with words \(add_generation_prompt\) that it does not write before answers; put \{% gen"
    with pytest.raises(ChatError, match=words):
        chat.pieces(TURNS)
    assert bytes(chat.prompt(TURNS[:4])).endswith(b"assistant\n<think>\n")
    with pytest.raises(ChatError, match=r"writes a turn otherwise when others follow it; put \{% generation %\}"):
        Chat(ByteTokenizer(), "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}").pieces(TURNS)


def learned(stream: Conversations) -> list[str]:
    """What each sequence learns, and the text that all of it is."""
    whole = [(bytes_of(s), [t for t in bytes_of(s, "targets") if t != NO_TARGET]) for s in stream.sequences]
    return ["".join("¶" if t == EOS else chr(t) for t in tokens) for both in whole for tokens in both]


def human(*texts: str) -> list[dict[str, str]]:
    """ShareGPT's form of a conversation."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"conversations": human("1+1?", "2", "2+2?", "4")}, {"messages": said("1+1?", "2", "2+2?", "4")}),
        ({"conversations": human("1+1?", "2"), "system": "Add.", "tools": ""}, {"messages": TURNS[:3]}),
        ({"conversations": said("1+1?", "2"), "messages": None}, {"messages": said("1+1?", "2")}),
    ],
)
def test_sharegpt(row: dict[str, Any], same: dict[str, Any], tmp_path: pathlib.Path) -> None:
    assert learned(conversations(tmp_path, [row])) == learned(conversations(tmp_path, [same]))


def test_a_prompt_and_a_completion_of_messages(tmp_path: pathlib.Path) -> None:
    """As TRL has them: of the conversation the completion alone is learned."""
    rows = [
        {"prompt": TURNS[:4], "completion": TURNS[4:]},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},
        {"prompt": TURNS[:4], "completion": "4"},
        {"prompt": "2+2?", "completion": TURNS[4:]},
        {"system": "Add.", "prompt": TURNS[1:4], "completion": "4"},
        {"system": "Add.", "prompt": TURNS[1:2], "completion": TURNS[1:]},
    ]
    whole = "System: Add.\nUser: 1+1?\nAssistant: 2¶\nUser: 2+2?\nAssistant: 4"
    assert learned(conversations(tmp_path, rows, 128)) == [
        whole, " 4¶", whole, " 2¶ 4¶", whole, " 4¶", "User: 2+2?\nAssistant: 4", " 4¶", whole, " 4¶", whole, " 2¶ 4¶",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[:4], "chosen": TURNS[4:], "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": TURNS, "rejected": [*TURNS[:4], {"role": "assistant", "content": "5"}]},  # the prompt is implied
        {"chosen": TURNS, "rejected": [*TURNS[:4], {"role": "assistant", "content": "5"}], "prompt": None},
        {"prompt": TURNS[:4], "chosen": TURNS, "rejected": [*TURNS[:4], {"role": "assistant", "content": "5"}]},
        {"prompt": TURNS[:4], "chosen": "4", "rejected": "5"},
        {"prompt": TURNS[1:4], "chosen": "4", "rejected": "5", "system": "Add."},
        {"conversations": human("1+1?", "2", "2+2?"), "system": "Add.", "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}},
    ],
)  # fmt: skip
def test_preferences_between_messages(row: dict[str, Any], tmp_path: pathlib.Path) -> None:
    whole = "System: Add.\nUser: 1+1?\nAssistant: 2¶\nUser: 2+2?\nAssistant: "
    found = learned(conversations(tmp_path, [row], 256, objective="dpo"))
    assert found == [whole + "4", " 4¶", whole + "5", " 5¶"]


def test_preferences_that_begin_with_their_prompt_as_a_text(tmp_path: pathlib.Path) -> None:
    """And answers of several turns, of which those count that come behind what both share."""
    row = {"prompt": "a?", "chosen": said("a?", "b", "c?", "d"), "rejected": said("a?", "x", "c?", "y")}
    assert learned(conversations(tmp_path, [row], 256, objective="dpo"))[1::2] == [" b¶ d¶", " x¶ y¶"]
    row |= {"rejected": said("a?", "b", "c?", "y")}
    assert learned(conversations(tmp_path, [row], 256, objective="dpo"))[1::2] == [" d¶", " y¶"]


@pytest.mark.parametrize(
    ("objective", "row", "line"),
    [
        ("sft", {"prompt": "p", "chosen": "a", "rejected": "b"}, "such rows are for tuning.objective=dpo"),
        ("dpo", {"messages": TURNS}, "it has no 'prompt'; it has messages; such rows are for tuning.objective=sft"),
        ("dpo", {"prompt": "p", "completion": "b"}, "such rows are for tuning.objective=sft"),
        ("sft", {"instruction": "a", "output": "b"}, "it has no 'prompt'; it has instruction, output; a row of "
         "tuning.objective=sft has prompt and completion, messages, or ShareGPT's conversations"),
        ("dpo", {"chosen": "a", "rejected": "b"}, "it has no 'prompt'; it has chosen, rejected; a row of "
         "tuning.objective=dpo has prompt, chosen and rejected, or the last two as conversations"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_told_which_there_are(
    objective: str, row: dict[str, Any], line: str, tmp_path: pathlib.Path
) -> None:
    """To leave them out would leave none."""
    with pytest.raises(ConfigError) as error:
        conversations(tmp_path, [row, row], objective=objective)
    assert str(error.value).endswith(line)


def answered(**fields: Any) -> dict[str, Any]:
    """A row with such fields in an answer before the last one."""
    return {"messages": [TURNS[1], TURNS[2] | fields, *TURNS[3:]]}


UNREAD = [
    (answered(tool_calls=[{"id": "1"}], content=""), r"messages\[1\] has 'tool_calls', which is not read"),
    (answered(tool_calls=[{"id": "1"}], content=None), r"messages\[1\] has 'tool_calls', which is not read"),
    (answered(reasoning_content="1 and 1"), r"messages\[1\] has 'reasoning_content'"),
    (answered(weight=0), r"messages\[1\] has weight=0, and every answer is learned"),
    ({"conversations": [*human("a"), {"from": "gpt", "value": "b", "weight": 2}]}, r"conversations\[1\] has weight=2"),
    ({"prompt": "a", "completion": [TURNS[2] | {"thinking": "hm"}]}, r"completion\[0\] has 'thinking'"),
    ({"messages": TURNS, "tools": [{"type": "function"}]}, "its 'tools' is not read"),
    ({"prompt": "a", "completion": "b", "system": "Add."}, "'system' is not joined with texts; put it in front of"),
    ({"prompt": "a", "completion": "b", "label": False}, "its label is false"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), UNREAD)
def test_what_is_not_read_makes_a_row_bad(row: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    """Else an answer is learned that stood behind something else, or was not to be learned."""
    with pytest.raises(ConfigError, match=rf"rows\.jsonl line 2: .*{message}.*tuning\.bad_rows=skip"):
        conversations(tmp_path, [{"prompt": "a", "completion": "b"}, row], 256)


def test_what_says_nothing_makes_no_row_bad(tmp_path: pathlib.Path) -> None:
    """As clients write what they do not use."""
    row = answered(weight=1, tool_calls=[], function_call=None, refusal=None, reasoning="", annotations=[], name="Ann")
    row["messages"][0] = TURNS[1] | {"weight": 0}  # nobody learns a question
    assert learned(conversations(tmp_path, [row | {"tools": [], "label": True}], 256))[1] == " 2¶ 4¶"


BAD_PAIRS = [
    ({"system": "Add.", "prompt": "a", "chosen": "b", "rejected": "c"}, "'system' is not joined with texts"),
    ({"prompt": "a?", "chosen": [TURNS[2] | {"tool_calls": [1]}], "rejected": "c"}, r"chosen\[0\] has 'tool_calls'"),
    ({"prompt": "a?", "chosen": said("b?", "c"), "rejected": said("b?", "d")}, "'chosen' begins neither with"),
    ({"chosen": said("a?", "b"), "rejected": said("c?", "d")}, "do not differ first in an answer"),
    ({"chosen": said("a?", "b", "c?", "d"), "rejected": said("a?", "b")}, "do not differ first in an answer"),
    ({"chosen": said("a?", "b", "c?"), "rejected": said("a?", "x")}, "its last message is no answer"),
    ({"chosen": said("a?", "b"), "rejected": said("a?", "b")}, "are alike"),
    ({"prompt": [], "chosen": said("a?", "b"), "rejected": said("a?", "c")}, "'prompt' is no list of messages"),
    ({"chosen": [{"from": "gpt"}], "rejected": []}, r"chosen\[0\] has no texts for from and value"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_a_bad_pair_is_one_line(row: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ConfigError, match=rf"rows\.jsonl line 2: .*{message}.*tuning\.bad_rows=skip"):
        conversations(tmp_path, [good, row], 256, objective="dpo")


def test_rows_in_another_kind_of_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": TURNS}]))
    config = Config(
        data=DataConfig(source=str(tmp_path / "rows.json"), validation_source=str(tmp_path / "rows.json")),
        tuning=TuningConfig("sft"), cache_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"rows\.json is no \.jsonl file, and tuning reads rows; write it with"):
        open_stream(config, "train", ByteTokenizer())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({}, "data.source=sotu has texts, and tuning.objective=sft needs conversations; give a .jsonl file"),
        ({"source": "a.jsonl", "validation_source": "tfds:b"}, "data.validation_source=tfds:b has texts, and "),
        ({"mixture": "a.jsonl=1"}, "data.mixture is of texts, and tuning.objective=sft reads one source of rows; use "),
    ],
)
def test_texts_are_refused_before_they_are_opened(data: dict[str, str], line: str, tmp_path: pathlib.Path) -> None:
    config = Config(data=DataConfig(**data), tuning=TuningConfig("sft"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}"):
        open_stream(config, "train", ByteTokenizer())
    assert not (tmp_path / "cache").exists()


BAD = [
    ("{", "is not valid JSON"),
    ([1], "it is a JSON list; each line must be one JSON object"),
    ({"completion": "a"}, "has no 'prompt'; it has completion"),
    ({"prompt": "a"}, "has no 'completion'; it has prompt"),
    ({"prompt": "a", "completion": ""}, "its answer is empty"),
    ({"prompt": "a", "completion": 3}, "'completion' is a int, not a text"),
    ({"messages": TURNS[:2]}, "its last message is no answer of the assistant"),
    ({"messages": [{"role": "wizard", "content": "a"}, TURNS[2]]}, r"messages\[0\] has the unknown role 'wizard'"),
    ({"messages": [{"role": "user"}, TURNS[2]]}, r"messages\[0\] has no texts for role and content"),
    ({"messages": []}, "'messages' is no list of messages"),
    ({"messages": [{"role": "user", "content": "a<|endoftext|>"}, TURNS[2]]}, "holds the special token"),
    ({"prompt": "a" * 70, "completion": "b"}, "its 71 tokens are more than data.sequence_length=64"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_one_line_with_its_number(tmp_path: pathlib.Path, row: Any, message: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(ConfigError, match=rf"rows\.jsonl line 2: .*{message}.*tuning\.bad_rows=skip"):
        conversations(tmp_path, [good, row, good])


def test_an_answer_without_a_token_is_bad(tmp_path: pathlib.Path) -> None:
    """A tokenizer may strip what it is given."""
    values = json.loads(bpe().json_text) | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    tokenizer, template = JsonTokenizer(json.dumps(values)), tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("two", " ")]
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 2: the tokenizer makes no token of its answer"):
        conversations(tmp_path, rows, tokenizer=tokenizer, chat_template=str(template))
    fields = {"bad_rows": "skip", "chat_template": str(template)}
    assert conversations(tmp_path, rows, tokenizer=tokenizer, **fields).counts.documents == 1


def test_a_template_error_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no system, please') }}")
    with pytest.raises(ConfigError, match=r"line 1: the chat template does not take these messages: no system, please"):
        conversations(tmp_path, [{"messages": TURNS}], chat_template=str(tmp_path / "t.jinja"))


def test_bad_rows_are_counted_and_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row for row, _ in BAD] + [{"prompt": "a", "completion": "b"}]
    with caplog.at_level(logging.WARNING):
        assert conversations(tmp_path, rows, bad_rows="skip").counts.documents == 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert "12 rows left out: " in line and f"3 without an answer ({tmp_path / 'rows.jsonl'} line 4, " in line
    assert "1 longer than data.sequence_length" in line
    with pytest.raises(ConfigError, match="has no row to learn from"):
        conversations(tmp_path, rows[:3], bad_rows="skip")


def test_bad_rows_are_told_by_their_reasons(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """At most five places of each; a special token's name is no text of a prompt, an answer or a message."""
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no system') if messages[0].role == 'system' }}" + DEFAULT)
    rows = [
        *({"prompt": text, "completion": answer} for text, answer in (("a<|endoftext|>", "b"), ("a", "<|endoftext|>"))),
        {"messages": [{"role": "user", "content": "a<|endoftext|>"}, TURNS[2]]},
        {"messages": TURNS},
        {"prompt": "a", "completion": "b"},
        *[{"prompt": "a" * 64, "completion": "b"}]
        * 7,  # 65 tokens with the answer's end, of which the last is a target
        {"prompt": "a" * 63, "completion": "b"},
        *[{"prompt": None, "completion": "b"}] * 5,
    ]
    with caplog.at_level(logging.WARNING):
        stream = conversations(tmp_path, rows, bad_rows="skip", chat_template=str(tmp_path / "t.jinja"))
    assert stream.counts.documents == 2
    (line,) = (record.getMessage() for record in caplog.records)
    place = f"{tmp_path / 'rows.jsonl'} line "
    assert line.partition(" rows left out: ")[2].replace(place, "") == (
        "3 with a message that no template takes (1, 2, 3); 1 that the template refuses (4); "
        "5 without a prompt (14, 15, 16, 17, 18); 7 longer than data.sequence_length (6, 7, 8, 9, 10 and 2 more)"
    )


def test_rows_are_held_out_by_their_text(tmp_path: pathlib.Path) -> None:
    """As documents are: a row's line is its text."""
    rows = [{"prompt": f"{n:02}", "completion": "!" * (n % 5 + 1)} for n in range(30)]
    file = write(tmp_path / "rows.jsonl", rows)
    config = Config(
        data=DataConfig(source=file, tokenizer="bytes"), tuning=TuningConfig("sft"), cache_dir=str(tmp_path / "cache")
    )
    lines = pathlib.Path(file).read_text().splitlines(keepends=True)
    held, _ = hold_out([(text_key(line.strip()), len(line)) for line in lines], ("validation", "test"))
    for split in ("train", "validation", "test"):
        expected = [line[12:14] for line in lines if held.few and held.few[text_key(line.strip())] == split]
        stream = open_stream(config, split, ByteTokenizer())
        assert isinstance(stream, Conversations) and len(expected) > 0
        assert [bytes(s[0, :2].tolist()).decode() for s in stream.sequences] == expected
    few = write(tmp_path / "few.jsonl", rows[:2])
    with pytest.raises(ConfigError, match="has 2 rows, too few to hold some out"):
        open_stream(
            dataclasses.replace(config, data=DataConfig(source=few, tokenizer="bytes")), "train", ByteTokenizer()
        )


def test_a_template_is_kept_where_it_was_used_or_given(tmp_path: pathlib.Path) -> None:
    """A model of texts alone keeps none; a date in it is that of the run."""
    plain = [{"prompt": "a", "completion": "b"}]
    (tmp_path / "t.jinja").write_text(DEFAULT + "{{ strftime_now('%Y')[:0] }}")
    given = {"chat_template": str(tmp_path / "t.jinja")}
    templates = [
        conversations(tmp_path, rows, 128, **tuning).chat.files.template
        for rows, tuning in ((plain, {}), ([{"messages": TURNS}], {}), (plain, given))
    ]
    assert templates == ["", DEFAULT, (tmp_path / "t.jinja").read_text()]
    assert conversations(tmp_path, [{"messages": TURNS}], 128, **given).chat.files.date


def test_rows_have_a_fingerprint_and_windows_their_reference(tmp_path: pathlib.Path) -> None:
    stream = conversations(tmp_path, [{"prompt": "p", "chosen": "ab", "rejected": "c"}] * 3, 64, objective="dpo")
    digest = hashlib.sha256()
    for inputs, targets in stream.sequences:
        content = np.array([inputs, targets], "<i4").tobytes()
        digest.update(len(inputs).to_bytes(8, "big") + content)
    assert stream.rows == digest.hexdigest()
    assert stream.pack(5).describe() == "3 windows of 3 rows, 0.00% padding"
    with pytest.raises(ConfigError, match="its longest row has 5 tokens, more than the 4 of a window"):
        stream.pack(4)
    packed = stream.pack(12)
    assert packed.describe() == "2 windows of 3 rows, 37.50% padding" and packed[0].shape == (3, 12)
    assert packed[0].tolist() == [
        [*ids("pabpcpabpc"), EOS, EOS], [*ids("ab¶c¶ab¶c¶"), NO_TARGET, NO_TARGET],
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, PADDING, PADDING],
    ]  # fmt: skip
    packed.reference = np.arange(24, dtype=np.float32).reshape(2, 12) / 7
    assert packed[1].shape == (4, 12) and packed[1].dtype == np.int32
    np.testing.assert_array_equal(packed[1][3].view(np.float32), packed.reference[1])


def test_windows_hold_whole_conversations(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "c"} for n in (3, 9, 5, 11, 2, 7)]
    stream = conversations(tmp_path, rows, 16)
    windows = pickle.loads(pickle.dumps(stream.pack(16)))  # as workers get it
    seen = []
    for inputs, targets, segments in (windows[w] for w in range(len(windows))):
        for segment in range(segments.max() + 1):
            here = segments == segment
            seen.append((inputs[here].tolist(), targets[here].tolist()))
        assert (targets[segments == PADDING] == NO_TARGET).all()
    assert sorted(seen) == sorted((bytes_of(s), bytes_of(s, "targets")) for s in stream.sequences)
    assert len(windows) == 3  # 43 tokens; two windows hold 32
    targets = sum(int((batch.targets_BL != NO_TARGET).sum()) for batch in eval_batches(stream, 16, 2))
    assert targets == stream.num_tokens == 12
    batch = next(TrainIterator(stream._config, stream))
    assert batch.inputs_BL.shape == (2, 16) and batch.segments_BL is not None


def test_pairs_stand_side_by_side(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "p", "chosen": "yes", "rejected": "no"}, {"prompt": TURNS[:4], "chosen": "4", "rejected": "5"}]
    stream = conversations(tmp_path, rows, 128, objective="dpo")
    assert [bytes_of(s) for s in stream.sequences[:2]] == [ids("pyes"), ids("pno")]
    learned = [[t for t in bytes_of(s, "targets") if t != NO_TARGET] for s in stream.sequences]
    assert learned == [ids("yes¶"), ids("no¶"), ids(" 4¶"), ids(" 5¶")]  # of a conversation the last answer alone
    with pytest.raises(ConfigError, match="chosen and rejected are alike"):
        conversations(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "a"}], objective="dpo")
