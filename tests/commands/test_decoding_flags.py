"""What `bigmac generate` and `bigmac serve` refuse before they read a model."""

import pathlib
from typing import Any

import pytest

from bigmac_jax.config import Config, ConfigError


@pytest.mark.parametrize("name", ["generate", "serve"])
@pytest.mark.parametrize("field", ["exchange=gather", "overlap_chunks=4", "remat=layer"])
def test_what_only_training_reads(
    command: Any, name: str, field: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(Config().to_json())
    program = command(name)
    monkeypatch.setattr(program.decoding_flags, "WORKDIR", type("Flag", (), {"value": str(tmp_path)}))
    monkeypatch.setattr(program.cli, "OVERRIDES", [f"execution.{field}"])
    with pytest.raises(ConfigError, match=f"^--config.execution.{field} is of training; completions take --exchange, "):
        program.main()
