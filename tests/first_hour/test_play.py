"""The first hour: what the pages tell a stranger to type is typed."""

import pathlib

import pytest

from first_hour.pages import ROOT, Block, pages, read
from first_hour.play import MODEL, copy, play, script


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("first_hour")
    copy(folder)
    return folder


def test_a_copy_runs_shell_and_python(repository: pathlib.Path) -> None:
    """In the copy, with this Python under the names that the pages use; what does not end as its mark says is told."""
    blocks = [
        Block("a.md", 1, "python -c 'import bigmac_jax as b; print(b.__file__)'\n"),
        Block("a.md", 2, "import bigmac_jax, pathlib\nprint(bigmac_jax.__file__)\n"),
        Block("a.md", 3, "cat none\necho on\n"),
        Block("a.md", 4, "cat none\n", exit_code=1),
        Block("a.md", 5, "cat none\n", skip="names"),
        Block("a.md", 6, "source .venv-3.*/bin/activate\nbigmac --version\n"),
    ]
    outcomes = play(blocks, repository)
    assert [outcome.good for outcome in outcomes] == [True, True, False, True, True]
    assert all(str(repository) in outcome.output for outcome in outcomes[:2])
    assert "cat: none" in outcomes[2].describe() and "on" not in outcomes[2].output.split()
    assert outcomes[4].output.startswith("bigmac_jax ")


def test_a_script_is_what_the_mark_says(repository: pathlib.Path) -> None:
    assert "train.py --config.train.steps=7" in script(Block("a", 1, "python train.py\n", steps=7), repository)
    assert script(Block("a", 1, "sbatch s --config=c.py\n", plan="h100:1x8"), repository).startswith("bigmac plan")


@pytest.mark.full
@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_says_runs(repository: pathlib.Path, page: pathlib.Path) -> None:
    blocks = read(page)
    if not (repository / "runs" / "tiny").exists():
        blocks = [MODEL, *blocks]
    assert not [outcome.describe() for outcome in play(blocks, repository) if not outcome.good]
