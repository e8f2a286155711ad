"""Every block of every page is run in the first hour, or says why not."""

import pathlib

import pytest

from first_hour.pages import Block, PageError, broken_links, few_steps, missing_files, pages, planned, read, shortened


def page(folder: pathlib.Path, text: str) -> list[Block]:
    (folder / "page.md").write_text(text)
    return read(folder / "page.md", folder)


def test_every_block_is_run_or_says_why_not() -> None:
    blocks = [block for path in pages() for block in read(path)]
    run = [block for block in blocks if not block.skip]
    assert len(blocks) > 80 and 30 < len(run) < len(blocks)
    readme = [block for block in run if block.page == "README.md"]
    assert {"python", "bash"} == {block.language for block in readme} and not any(block.steps for block in readme)


def test_links_resolve() -> None:
    assert not {path.name: links for path in pages() if (links := broken_links(path))}


def test_files_are_named_as_they_are() -> None:
    assert not {path.name: names for path in pages() if (names := missing_files(path))}


def test_a_broken_link_is_found(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.py").write_text("a\nb\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# W↓ and `W↑`, *both*\n\n`tests/first_hour/pages.py:3`, https://none.none/tests/a.py, tests/none.py.\n\n"
        "[1](page.md#w-and-w-both) [2](#none) [3](none.md) [4](https://none.none/#x) "
        "![5](a.py) [6](a.py#L1-L2) [7](a.py#L3)\n\n    # code\n    [8](none)\n"
    )
    assert broken_links(page) == ["#none (no such heading)", "none.md (no such file)", "a.py#L3 (no such lines)"]
    assert missing_files(page) == ["tests/none.py"]


def test_blocks_are_found(tmp_path: pathlib.Path) -> None:
    """Indented and fenced ones; what only looks like one is none; a mark is of the next block, or of all the rest."""
    blocks = page(
        tmp_path,
        "Text\n    goes on.\n\n    python a.py \\\n        --b\n\n    import os\n\n"
        "<!-- first-hour: steps=20 code=1 -->\n\n    bigmac train\n\n```\n    y = x\n\n    z\n```\n".replace(
            "```\n    y", "<!-- first-hour: skip=output -->\n\n```\n    y"
        )
        + "\n<!-- first-hour: skip=root rest -->\n\n    make a\n\nText\n\n    make b\n",
    )
    assert [(block.line, block.language) for block in blocks[:2]] == [(4, "bash"), (7, "python")]
    assert blocks[0].code == "python a.py \\\n    --b\n" and blocks[1].code == "import os\n"
    assert (blocks[2].steps, blocks[2].exit_code, blocks[2].skip) == (20, 1, "")
    assert blocks[3].skip == "output" and blocks[3].code == "    y = x\n\n    z\n"
    assert [block.skip for block in blocks[4:]] == ["root", "root"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n    x' = x W\n", r"page\.md:2: \"x'\" is none of bigmac, python"),
        ("\n    make a\n    pip install b\n", "'pip' is none of"),
        ("<!-- first-hour: stepz=20 -->\n\n    make a\n", "'stepz=20' is no mark; use steps=N"),
        ("<!-- first-hour: steps=all -->\n\n    make a\n", "'steps=all' is no mark"),
        ("<!-- first-hour: skip=tired -->\n\n    make a\n", r"'skip=tired' is no mark.*skip=root\|accelerator"),
        (
            "<!-- first-hour: steps=2 -->\n\nText\n\n    make a\n",
            r"page\.md:1: the mark 'steps=2' stands before no block",
        ),
        ("<!-- first-hour: steps=2 -->\n", "stands before no block"),
        ("Text <!-- first-hour: steps=2 -->\n", "a mark is a line of its own"),
    ],
)
def test_what_is_no_mark(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(PageError, match=message):
        page(tmp_path, text)


def test_commands_are_shortened() -> None:
    """Those that train, with the comment behind them; no others."""
    for command in ("python train.py --a", "bigmac train --a", "scripts/launch_local.sh 2 --a"):
        assert shortened(f"{command} # why", 20, "c.py") == f"{command} --config.train.steps=20  # why"
    assert shortened("make train", 20, "c.py") == "make train CONFIG=c.py"
    for command in ("python eval.py --workdir=runs/train", "python -m benchmarks.train_local", "make test"):
        assert shortened(command, 20, "c.py") == command


def test_few_steps_stay() -> None:
    assert few_steps("bigmac train --config.train.steps=40 --a") and few_steps("bigmac train --config.train.steps=9")
    assert not few_steps("bigmac train --config.train.steps=400") and not few_steps("bigmac train")


def test_what_needs_machines_is_planned() -> None:
    command = (
        "sbatch --nodes=4 scripts/slurm.sh --config=configs/modern.py --workdir=runs/m --config.mesh.expert=8  # why"
    )
    assert planned(command, "h100:4x8") == (
        "bigmac plan --topology=h100:4x8 --config=configs/modern.py --config.mesh.expert=8"
    )
