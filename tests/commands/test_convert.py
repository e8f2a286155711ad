"""Which flags are of which conversion, and what is refused before a model is read."""

import pathlib
from typing import Any

import pytest
from absl import flags
from model.tools import on_mesh
from training.tools import write_config

from bigmac_jax.config import ConfigError, load_config


@pytest.fixture
def convert(command: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bigmac convert` with these words; flags that were given are as before behind each call."""
    program = command("convert")

    def run(action: str, **given: Any) -> None:
        monkeypatch.setattr(program.cli, "ARGUMENTS", [action])
        before = {name: flags.FLAGS[name].value for name in given}
        flags.FLAGS.mark_as_parsed()
        for name, value in given.items():
            flags.FLAGS[name].value, flags.FLAGS[name].present = value, 1
        try:
            program.main()
        finally:
            for name, value in before.items():
                flags.FLAGS[name].value, flags.FLAGS[name].present = value, 0

    run.program = program
    return run


@pytest.mark.parametrize(
    ("action", "name", "value", "line"),
    [
        ("import", "output", "new", "--output=new is of export, latent, upcycle, widen, and not of import; import "
                                    "writes --workdir=new"),
        ("export", "ratio", 0.5, "--ratio=0.5 is of latent, and not of export; leave it out"),
        ("latent", "experts", 8, "--experts=8 is of upcycle, and not of latent; leave it out"),
        ("upcycle", "checkpoint", "here", "--checkpoint=here is of import, and not of upcycle; leave it out"),
        ("widen", "dtype", "float32", "--dtype=float32 is of export, and not of widen; leave it out"),
    ],
)  # fmt: skip
def test_a_flag_of_another_action_is_refused(convert: Any, action: str, name: str, value: Any, line: str) -> None:
    needed = {"checkpoint": "exported"} if action == "import" else {"output": "new"}
    with pytest.raises(ConfigError) as refused:
        convert(action, **(needed | {name: value}))
    assert str(refused.value) == line


def test_every_flag_is_of_an_action(convert: Any) -> None:
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[convert.program.__name__]}
    assert own == {name for names in convert.program._FLAGS.values() for name in names}


def test_an_output_that_is_there_is_refused_before_the_model_is_read(convert: Any, tmp_path: pathlib.Path) -> None:
    """The run has no checkpoint that could be read."""
    (tmp_path / "run").mkdir()
    write_config(tmp_path).rename(tmp_path / "run" / "config.json")
    for file_format in ("auto", "peft"):
        with pytest.raises(ConfigError, match=r"--output=.*run is there already; remove it, or give another one"):
            convert("export", workdir=str(tmp_path / "run"), output=str(tmp_path / "run"), format=file_format)


@pytest.mark.parametrize("file_format", ["auto", "peft"])
def test_a_run_without_a_checkpoint_is_named(
    convert: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    for name in ("agree", "enter_mesh"):
        monkeypatch.setattr(convert.program.cli, name, lambda *_, **__: None)
    (tmp_path / "run").mkdir()
    config = load_config(write_config(tmp_path).rename(tmp_path / "run" / "config.json"))
    with on_mesh(config), pytest.raises(ConfigError, match=r"run.* holds no checkpoint"):
        convert("export", workdir=str(tmp_path / "run"), output=str(tmp_path / "new"), format=file_format)
    assert not (tmp_path / "new").exists()
