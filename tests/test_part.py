"""When a part of the full suite is red."""

import subprocess
import types
from typing import Any

import part
import pytest


@pytest.mark.parametrize("failed", [(), ("tests/a.py::test",)])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, 0),
        (1, 0),  # those that fail are compared with the parent, which is not there
        (2, 0),
        (3, 1),  # an error inside pytest
        (4, 1),  # a conftest.py that cannot be imported
        (5, 1),  # no test was found
        (-9, 1),
    ],
)
def test_a_tree_that_pytest_cannot_run_is_red(
    code: int, expected: int, failed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def no_parent(*arguments: str) -> str:
        raise subprocess.CalledProcessError(128, arguments, stderr="no HEAD^")

    job = types.SimpleNamespace(wait=lambda limit: code)
    started = types.SimpleNamespace(Popen=lambda *_, **__: job, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(part, "subprocess", started)
    monkeypatch.setattr(part, "git", no_parent)
    if failed:
        monkeypatch.setattr(part.pathlib.Path, "exists", lambda path: path.name == "lastfailed")
        monkeypatch.setattr(part.json, "loads", lambda text: failed)
        monkeypatch.setattr(part.pathlib.Path, "read_text", lambda path: "")
    assert part.main(3, "a tree") == expected
    assert (f"pytest ended with {code}" in capsys.readouterr().out) == bool(expected)


def test_every_file_is_the_first_of_some_order() -> None:
    files = [f"tests/test_{name}.py" for name in "abcdef"]
    first = {min(files, key=lambda file: part.place_of(file, f"{tree:x}")) for tree in range(100)}
    assert first == set(files)
