"""A server's prompts: whose template counts, and what a client is told."""

import json
import pathlib
from typing import Any

import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import Text
from bigmac_jax.serving.dialogue import load_dialogue
from bigmac_jax.serving.limits import ApiError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Peace?"}]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}<|assistant|>"


def test_without_a_template(tmp_path: pathlib.Path) -> None:
    chat = load_dialogue(ByteTokenizer(), "", "bytes", tmp_path)
    assert bytes(chat.prompt(MESSAGES)) == b"System: Be brief.\nUser: Peace?\nAssistant:"
    assert chat.stop == ("\nUser:",)


def test_the_template_beside_the_tokenizer(tmp_path: pathlib.Path) -> None:
    settings = {"chat_template": TEMPLATE, "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = JsonTokenizer(train_bpe(["peace and brief messages"] * 4, 300))
    file, run = str(tmp_path / "tokenizer.json"), tmp_path / "run"
    chat = load_dialogue(tokenizer, "", file, run)
    ids = chat.prompt(MESSAGES)
    assert tokenizer.decode(ids) == "<|system|>Be brief.<|endoftext|>\n<|user|>Peace?<|endoftext|>\n<|assistant|>"
    assert ids.count(tokenizer.eos_id) == 2 and chat.stop == ()
    with pytest.raises(ApiError, match=r"holds the special token '<\|endoftext\|>'"):
        chat.prompt([{"role": "user", "content": "a<|endoftext|>b"}])
    run.mkdir()
    (run / "chat_template.jinja").write_text("{{ messages[1].content }}?")  # of the run: it was tuned with this one
    assert tokenizer.decode(load_dialogue(tokenizer, "", file, run).prompt(MESSAGES)) == "Peace??"
    given = tmp_path / "given.jinja"
    given.write_text("{{ messages[0].content }}!")
    assert tokenizer.decode(load_dialogue(tokenizer, str(given), file, run).prompt(MESSAGES)) == "Be brief.!"


def test_an_answer_ends_where_the_template_ends_it(tmp_path: pathlib.Path) -> None:
    values = json.loads(train_bpe(["peace"] * 4, 300))
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 300, "content": "<|im_end|>"})
    tokenizer = JsonTokenizer(json.dumps(values))
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", "<|im_end|>"))
    stop = load_dialogue(tokenizer, "", "", tmp_path).stop
    text = Text(tokenizer, Sampling(20, stop=stop))
    for token in (*tokenizer.encode("peace"), tokenizer.vocab_size - 1, *tokenizer.encode("and more")):
        text.add(token, 0.0)
        if text.finish_reason:
            break
    assert (text.text, text.finish_reason) == ("peace", "stop")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_cannot_do(template: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ApiError, match="the chat template does not take these messages"):
        load_dialogue(ByteTokenizer(), "", "bytes", tmp_path).prompt(MESSAGES)


def test_little_of_an_error_is_told(tmp_path: pathlib.Path) -> None:
    """It may hold everything that the template was given."""
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no ' * 1000) }}")
    with pytest.raises(ApiError, match="no no no") as error:
        load_dialogue(ByteTokenizer(), "", "bytes", tmp_path).prompt(MESSAGES)
    assert (len(error.value.message), error.value.status, error.value.param) == (500, 400, "messages")


@pytest.mark.parametrize(("content", "message"), [("{% for %}", "is not Jinja"), (None, "cannot be read")])
def test_bad_templates(tmp_path: pathlib.Path, content: Any, message: str) -> None:
    if content:
        (tmp_path / "t.jinja").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_dialogue(ByteTokenizer(), str(tmp_path / "t.jinja"), "bytes", tmp_path)
