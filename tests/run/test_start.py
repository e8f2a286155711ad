"""What a start reads of the model that its run begins with."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from bigmac_jax.config import Config
from bigmac_jax.run.start import _looks_back


@pytest.mark.parametrize(
    ("now", "tuning", "saves", "expected"),
    [
        ("/base", {}, [], True),
        ("/base", {}, [["model", "experts"]], False),
        ("/base", {}, [["experts"]], True),
        ("/base", {}, [["model"], ["experts"]], False),
        ("/base", {}, [["experts"], ["model"]], False),
        ("/elsewhere", {}, [["model"]], True),
        ("/base", {"lora_rank": 2}, [["model"]], True),
        ("/base", {"objective": "dpo"}, [["model"]], True),
        ("/base", {"objective": "sft"}, [["model"]], False),
    ],
)
def test_who_opens_the_model_that_a_run_begins_with(
    now: str, tuning: dict[str, Any], saves: list[list[str]], expected: bool, tmp_path: pathlib.Path
) -> None:
    """Not who goes on from a checkpoint of all parameters, unless a step reads it, or it is said to lie elsewhere."""
    for step, items in enumerate(saves, 1):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({f"{item}/a": {"size": 1} for item in items}))
    saved = Config()
    saved = dataclasses.replace(saved, train=dataclasses.replace(saved.train, init_from="/base"))
    config = dataclasses.replace(saved, train=dataclasses.replace(saved.train, init_from=now))
    object.__setattr__(config, "tuning", dataclasses.replace(config.tuning))
    for name, value in tuning.items():
        object.__setattr__(config.tuning, name, value)
    assert _looks_back(config, saved, tmp_path) == expected
