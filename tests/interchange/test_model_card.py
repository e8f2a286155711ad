"""A card is true for every kind of run: it says what the run began with, what was trained and on what."""

import dataclasses
import pathlib
from typing import Any

import pytest
from model.tools import on_mesh, tiny

from bigmac_jax.config import Config
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.interchange import Trained
from bigmac_jax.interchange.model_card import make_card
from bigmac_jax.training.history import history_before, history_with, model_name
from bigmac_jax.training.workdir import write_config, write_run
from bigmac_jax.tuning.pretrained import Pretrained, history_of

UNTRAINED = "it was not trained to follow instructions"


def run_of(**fields: Any) -> Config:
    """With fields of data, train and tuning."""
    config = tiny(batch=4, structure=fields.pop("structure", "bigmac"))
    tuning = {"objective", "lora_rank", "lora_targets", "teacher", "train_router"}
    data = {"source": fields.pop("source", "sotu")}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        tuning=dataclasses.replace(config.tuning, **{k: v for k, v in fields.items() if k in tuning}),
        train=dataclasses.replace(config.train, **{k: v for k, v in fields.items() if k not in tuning}),
    )


def card(config: Config, trained: Trained | None, chats: bool = False, model_type: str = "bigmac") -> str:
    with on_mesh(config):
        return make_card(config, model_type, trained, "name", True, chats)


ROWS = "/home/somebody/rows.jsonl"
LORA = {"objective": "sft", "lora_rank": 2, "lora_targets": "attention,experts", "init_from": "/home/somebody/base"}
KINDS: dict[str, tuple[dict[str, Any], Trained, list[str]]] = {
    "pretrained": ({}, Trained(50, history=()), [UNTRAINED, "| trained | 50 steps on 1,600 tokens of sotu |"]),
    "fresh": ({}, Trained(0, history=()), ["Nothing was trained"]),
    "imported": ({}, Trained(0, history=["`q`, which was imported"]), ["| began with | `q`, which was imported |"]),
    "imported, trained further": ({}, Trained(5, history=["`q`, which was imported"]), ["what it began with is in"]),
    "older than its record": ({}, Trained(5), ["what it learned before is not recorded"]),
    "tuned on text": (
        {"init_from": "/home/somebody/base"}, Trained(5, history=["`base`"]),
        ["| trained | 5 steps on 160 tokens of sotu; all parameters |"]),
    "lora": (
        LORA | {"source": ROWS}, Trained(5, history=["`base`: 9 steps on 288 tokens of sotu"]),
        ["It was fine-tuned on answers", "| began with | `base`: 9 steps on 288 tokens of sotu |",
         "| trained | 5 steps on the answers of rows.jsonl (supervised fine-tuning); adapters (LoRA) of rank 2, "
         "alpha 16, on attention, experts |"]),
    "lora on what the model has": (  # with neither shared experts nor projections
        LORA | {"source": ROWS, "structure": "fine_grained", "lora_targets": "attention,projections,shared,experts"},
        Trained(5, 1.5, history=["`b`"]),
        ["rank 2, alpha 16, on attention, experts |",
         "| validation loss of the answers | 1.5000 nats a token (perplexity 4.48) |"]),
    "sft": (
        {"objective": "sft", "init_from": "b", "train_router": False, "source": ROWS}, Trained(5, history=["`b`"]),
        ["(supervised fine-tuning); all parameters but the router |"]),
    "dpo": (
        {"objective": "dpo", "init_from": "sft", "source": ROWS}, Trained(5, 1.5, history=["`sft`"]),
        ["| validation loss of the chosen answers | 1.5000 nats",
         "towards answers that were preferred", "5 steps on the preferences of rows.jsonl (DPO, beta 0.1); all par"]),
    "distilled": (
        {"teacher": "runs/large"}, Trained(5, history=()),
        ["learned from another model's", "160 tokens of sotu, with the predictions of `large` (distillation, "
         "weight 0.5) |"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run(kind: str) -> None:
    fields, trained, said = KINDS[kind]
    text = card(run_of(**fields), trained)
    assert all(line in text for line in said), text
    assert (UNTRAINED in text) == (kind == "pretrained") and "somebody" not in text


def test_what_nobody_recorded_is_not_claimed() -> None:
    text = card(run_of(), None)
    assert "How it was trained is not recorded." in text and UNTRAINED not in text and "| trained" not in text


def test_a_chat_is_shown_where_there_is_a_template() -> None:
    trained = Trained(5, history=())
    chat, text = card(run_of(), trained, chats=True), card(run_of(), trained)
    assert 'messages = [{"role": "user", "content": "Hello"}]' in chat and '"Once"' not in chat
    assert 'generate("Once"' in text and "messages" not in text
    assert "import_model" in card(run_of(), trained, chats=True, model_type="bigmac_jax")


def test_the_context_and_the_windows_of_training() -> None:
    config = dataclasses.replace(run_of(), model=dataclasses.replace(run_of().model, context_length=40960))
    assert "| vocabulary, context | 264, 40,960 tokens (trained in windows of 8) |" in card(config, Trained(5))
    assert "| vocabulary, context | 264, 8 tokens |" in card(run_of(), Trained(5))


def test_a_run_keeps_what_was_before_it(tmp_path: pathlib.Path) -> None:
    """Also of the models that it began with, whose folders may go; a resumed start changes nothing."""
    base, sft, old = run_of(), run_of(objective="sft", init_from=str(tmp_path / "base"), source=ROWS), tmp_path / "old"
    write_run(tmp_path / "base", base, {}, {}, ByteTokenizer(), history=history_of(None), chat=NO_CHAT, parts=0)
    assert history_before(tmp_path / "base", base) == []
    origin = Pretrained(str(tmp_path / "base" / "checkpoints" / "9"), "9", "", base)
    write_run(tmp_path / "sft", sft, {}, {}, ByteTokenizer(), history=history_of(origin), chat=NO_CHAT, parts=0)
    write_run(tmp_path / "sft", sft, {}, {}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    assert history_before(tmp_path / "sft", sft) == ["`base`: 9 steps on 288 tokens of sotu"]
    assert history_with(tmp_path / "sft", sft, 3) == [
        "`base`: 9 steps on 288 tokens of sotu",
        "`sft`: 3 steps on the answers of rows.jsonl (supervised fine-tuning); all parameters",
    ]
    assert history_of(Pretrained("far/exported", "", "", base)) == ["`exported`, of whose training its own card tells"]
    write_config(sft, old)  # by an earlier version
    assert history_before(old, sft) == ["what came before is not recorded", "`base`"]


def test_names_of_models() -> None:
    cache = "/home/x/.cache/huggingface/hub/models--Qwen--Qwen3-30B-A3B/snapshots/abc"
    names = {"runs/a": "a", "runs/a/": "a", "runs/a/checkpoints/9": "a", cache: "Qwen/Qwen3-30B-A3B", "gs://b/c": "c"}
    assert {place: model_name(place) for place in names} == names
