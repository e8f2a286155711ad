"""The commands where they are not at home: another Python, another folder, installed."""

import ast
import errno
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from training.tools import ROOT

import bigmac_jax
from bigmac_jax import commands
from bigmac_jax.commands import cli
from bigmac_jax.config import load_config
from bigmac_jax.config.reading import list_shipped
from bigmac_jax.config.root import check_name
from bigmac_jax.runtime.clock import Clock

SCRIPTS = ("train.py", "eval.py", "generate.py", "serve.py", "plan.py", "convert.py")


@pytest.mark.parametrize("argv", [*((script,) for script in SCRIPTS), ("-m", "bigmac_jax", "selfcheck")], ids=" ".join)
def test_without_the_environment_a_line_says_what_to_do(argv: tuple[str, ...]) -> None:
    """-S: a Python without the packages that pip installed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, "-S", *argv], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith(f"error: {sys.executable} has no package '"), ended.stderr
    assert "source " in ended.stderr or "make env" in ended.stderr


def test_advice(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_ROOT", tmp_path)
    assert commands._advice("jax") == "install bigmac_jax with its dependencies: pip install bigmac-jax"
    (tmp_path / "Makefile").touch()
    assert f"cd {tmp_path} && make env" in commands._advice("jax")
    (tmp_path / ".venv-3.11" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-3.11" / "bin" / "python").touch()
    assert commands._advice("jax").endswith(f"source {tmp_path}/.venv-3.11/bin/activate")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.routing"])
def test_what_an_extra_brings_is_advised_in_any_environment(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = mock.Mock(side_effect=ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    monkeypatch.setattr(commands.importlib, "import_module", absent)
    monkeypatch.setattr(commands.signals, "install", mock.Mock())
    monkeypatch.setattr(commands.environment, "prepare", mock.Mock())
    with pytest.raises(SystemExit):
        commands.start("serve")
    assert capsys.readouterr().err.endswith(f"{sys.executable} -m pip install 'bigmac_jax[serve]'\n")


@pytest.mark.parametrize(("steps", "code"), [(0, 2), (1, 1)])
def test_what_breaks_a_run_off_is_no_wrong_config(
    steps: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever starts jobs again after exit code 1 does so after a full disk, if steps were trained."""

    def main() -> None:
        for step in range(steps):
            own.start_step(step)
        own.reset()  # as the loop's end does
        raise OSError(errno.ENOSPC, "No space left on device")

    own = Clock()
    monkeypatch.setattr(cli, "clock", own)
    monkeypatch.setattr(cli, "CPU_DEVICES", SimpleNamespace(value=0))
    assert cli._guard(main, False, ()) == code
    assert capsys.readouterr().err == "error: a file cannot be written (No space left on device); free space\n"


def commands_of(file: pathlib.Path) -> list[list[str]]:
    lines = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith(("bigmac ", "python "))]


SHIPPED = [argv for file in list_shipped().values() for argv in commands_of(file)]


@pytest.mark.parametrize("argv", SHIPPED, ids=" ".join)
def test_commands_in_docstrings_of_configs_have_such_flags(argv: list[str]) -> None:
    name, *words = argv[1:]
    sources = [ROOT / "bigmac_jax/commands" / f"{module}.py" for module in (name, "decoding_flags", "cli")]
    known = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', " ".join(source.read_text() for source in sources))
    for flag in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
        if flag.startswith("config."):
            check_name(flag.removeprefix("config."))
        else:
            assert flag in known, flag


def test_configs_show_commands() -> None:
    assert len(SHIPPED) > 12 and all(argv[0] == "bigmac" for argv in SHIPPED)


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit) as ended:
        commands.start("train")
    assert ended.value.code == 2 and "3.11, 3.12 or 3.13 is needed" in capsys.readouterr().err


def test_a_path_that_is_no_utf8_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    module = SimpleNamespace(run=lambda *of: print(os.fsdecode(b"runs/\xff"), flush=True), main=None)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(commands, "environment", SimpleNamespace(prepare=lambda: None))
        patched.setattr(commands.signals, "install", lambda: None)
        patched.setattr(commands, "importlib", SimpleNamespace(import_module=lambda name: module))
        commands.start("report")
    assert out.buffer.getvalue() == b"runs/\xff\n"


def test_bigmac(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(commands, "start", lambda name: started.append((name, list(sys.argv))))
    for argv in (["eval", "--workdir=a"], ["--version"], []):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/bigmac", *argv])
        commands.main()
    assert started == [("eval", ["bigmac eval", "--workdir=a"])]
    version, listed = capsys.readouterr().out.split("\n", 1)
    assert version == f"bigmac_jax {bigmac_jax.__version__}"
    assert all(f"\n  {name} " in listed for name in commands.COMMANDS)
    asked = {
        "trian": "train",
        "Export": "convert export",
        "finetune": "train",
        "chat": "generate",
        "prepare": "data prepare",
    }
    for wrong, said in (
        *((wrong, f"did you mean {meant}?") for wrong, meant in asked.items()),
        ("x", "use one of train, eval"),
    ):
        monkeypatch.setattr(sys, "argv", ["bigmac", wrong])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_can_be_run(name: str) -> None:
    """Not imported: each defines flags, of the same names."""
    file = ROOT / "bigmac_jax" / "commands" / f"{name}.py"
    assert "main" in [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    script = ROOT / f"{name}.py"
    assert not script.exists() or f'start("{name}")' in script.read_text()


def test_configs_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # from anywhere
    assert load_config("tiny") == load_config(ROOT / "configs" / "tiny.py")
    assert load_config("paper/gpt3_xl:vanilla").model.structure == "vanilla"
    files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.py")}
    assert list_shipped().keys() == files
    (tmp_path / "tiny").write_text("")
    with pytest.raises(ValueError, match=r"is neither \.py nor \.json"):
        load_config("tiny")  # a path comes first, as ever


def test_what_a_notebook_sees() -> None:
    assert set(bigmac_jax.__all__) == set(dir(bigmac_jax)) and "load_config" in dir(bigmac_jax)
    assert (ROOT / "bigmac_jax" / "py.typed").exists()


@pytest.mark.full
def test_installed(tmp_path: pathlib.Path) -> None:
    """A wheel of a copy, without its dependencies, used from elsewhere."""
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("bigmac_jax", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, f"--target={site}", str(source)], check=True, timeout=300)
    env = os.environ | {"PYTHONPATH": str(site)}

    def bigmac(*argv: str) -> str:
        command = [sys.executable, str(site / "bin" / "bigmac"), *argv]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert bigmac("--version") == f"bigmac_jax {bigmac_jax.__version__}\n"
    assert '"expert": 4' in bigmac("plan", "--config=paper/gpt3_xl:vanilla", "--json")
    assert bigmac("fields", "mesh").startswith("mesh: Devices by axis")
    assert (site / "bigmac_jax" / "py.typed").exists() and not (site / "configs").exists()
