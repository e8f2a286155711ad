"""The teacher of a run: which model it may be, and what it takes of the run's config."""

import dataclasses
import pathlib
from typing import Any

import pytest
import tokenizers
from model.tools import tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.interchange.tokenizer_files import write_tokenizer
from bigmac_jax.tuning import teacher as teacher_module
from bigmac_jax.tuning.pretrained import Pretrained
from bigmac_jax.tuning.teacher import check_teacher_tokenizer, open_teacher

PLACE = "runs/large"


def with_fields(config: Config, **sections: dict[str, Any]) -> Config:
    made = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **made)


def pupil(mesh: tuple[int, ...] = (1, 1, 2), length: int = 8, hidden_weight: float = 0.0, **fields: Any) -> Config:
    config = tiny(mesh, length=length, structure="bigmac", **fields)
    return with_fields(config, tuning={"teacher": PLACE, "hidden_weight": hidden_weight})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """The teacher of a run, which is the model of a config; nothing is read."""

    def opened(there: Config, config: Config) -> Pretrained:
        def found(*given: object) -> Pretrained:
            assert given == (tmp_path, PLACE, "teacher", "tuning.teacher")
            return Pretrained(PLACE, "4", "abc", there)

        monkeypatch.setattr(teacher_module, "open_recorded", found)
        return open_teacher(tmp_path, config)

    return opened


@pytest.mark.parametrize(("length", "expected"), [(8, 16), (32, 32)])
def test_it_has_the_runs_mesh_and_execution(opened: Any, length: int, expected: int) -> None:
    """And windows as long as the longer ones; all else is its own."""
    there = tiny(length=16, structure="fine_grained", hidden_size=32)
    config = pupil((2, 1, 2), length, remat="layer", dtype="bfloat16")
    found = opened(there, config)
    assert (found.place, found.step, found.digest) == (PLACE, "4", "abc")
    assert (found.config.mesh, found.config.execution) == (config.mesh, config.execution)
    assert found.config.model == there.model and found.config.optimizer == there.optimizer
    assert found.config.data == dataclasses.replace(there.data, sequence_length=expected)


@pytest.mark.parametrize(
    ("fields", "own", "hidden_weight"),
    [
        ({"vocab_size": 272}, "model.vocab_size=264 must be the 272", 0.0),
        ({"num_layers": 3}, "model.num_layers=2 must be the 3", 0.0),
        ({"first_dense_layers": 1}, "model.first_dense_layers=0 must be the 1", 0.0),
        ({"hidden_size": 32}, "model.hidden_size=16 must be the 32", 0.5),
        ({"hidden_size": 32}, "", 0.0),  # which is compared where hidden states are
        ({"positions": "learned"}, "data.sequence_length=8 must be at most the 4", 0.0),
        ({"positions": "learned", "context_length": 8}, "", 0.0),
    ],
)
def test_models_that_cannot_be_compared(opened: Any, fields: dict[str, Any], own: str, hidden_weight: float) -> None:
    there, config = tiny(length=4, **fields), pupil(hidden_weight=hidden_weight)
    if not own:
        assert opened(there, config).config.model == there.model
        return
    with pytest.raises(ConfigError, match=rf"^{own} (of|that) tuning\.teacher={PLACE}"):
        opened(there, config)


def test_another_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    """One that its folder does not hold is not compared."""
    (tmp_path / "tokenizer.json").write_text(train_bpe(["some words that are here, and here"] * 3, 262))
    there, config = Pretrained(PLACE, "", "abc", tiny()), pupil()
    other = JsonTokenizer((tmp_path / "tokenizer.json").read_text())
    check_teacher_tokenizer(there, config, ByteTokenizer())
    with pytest.raises(ConfigError, match=rf"tuning\.teacher={PLACE} has another tokenizer than the run: its prob"):
        check_teacher_tokenizer(there, config, other)
    for file, tokenizer in (("tokenizer.json", other), ("gone/tokenizer.json", ByteTokenizer())):
        own = with_fields(there.config, data={"tokenizer": str(tmp_path / file)})
        check_teacher_tokenizer(there._replace(config=own), config, tokenizer)


def test_an_export_has_the_tokens_of_its_run(tmp_path: pathlib.Path) -> None:
    """In a file of its own; one with a token more, or less, has others."""
    text = train_bpe(["some words that are here, and here"] * 3, 262)
    more = tokenizers.Tokenizer.from_str(text)
    more.add_tokens(["more"])
    own, config = tmp_path / "tokenizer.json", pupil()
    there = Pretrained(PLACE, "", "abc", with_fields(tiny(), data={"tokenizer": str(own)}))
    for tokenizer in (JsonTokenizer(text), JsonTokenizer(more.to_str()), ByteTokenizer()):
        write_tokenizer(tmp_path, config, tokenizer, chat=NO_CHAT)
        assert JsonTokenizer(own.read_text()).fingerprint != tokenizer.fingerprint
        check_teacher_tokenizer(there, config, tokenizer)
    for one, other in (
        (JsonTokenizer(text), JsonTokenizer(more.to_str())),
        (JsonTokenizer(more.to_str()), JsonTokenizer(text)),
    ):
        write_tokenizer(tmp_path, config, one, chat=NO_CHAT)
        with pytest.raises(ConfigError, match="has another tokenizer than the run"):
            check_teacher_tokenizer(there, config, other)
