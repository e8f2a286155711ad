"""The code blocks of the pages, and what is done with each: what a stranger types in the first hour, and what not.

A block is indented by four spaces or fenced. A comment before it, which no reader sees, may say how it is run:

    <!-- first-hour: steps=20 code=1 -->

| word | |
|---|---|
| `steps=N` | its training commands (and `make train`) take N steps, because all of them take over two minutes |
| `code=N` | its last command ends with this exit code; 0 without it |
| `plan=h100:4x8` | it needs these machines: `bigmac plan` is given its config and fields instead |
| `skip=root`, `accelerator`, `cluster` | it is not run because it needs that |
| `skip=download` | it needs the network, or a package that is not among the dependencies |
| `skip=long` | it takes over two minutes, and fewer steps don't help |
| `skip=names` | it names files or runs of the reader's own, such as DIR |
| `skip=output` | it is no command: what one prints, a formula, a file |
| `rest` | the other words are of all blocks from here to the page's end |

Without a comment a block is run as it stands, from the repository's root: as Python if it parses as that, else by bash,
where every command must be one of `COMMANDS`. Anything else is an error, so that a new block is run or says why not.
"""

import ast
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = (
    "bigmac", "python", "make", "scripts/launch_local.sh",
    "cat", "cp", "echo", "mkdir", "truncate", "for", "done", "source",
)  # fmt: skip
REASONS = ("root", "accelerator", "cluster", "download", "long", "names", "output")
_MARK = re.compile(r"<!-- first-hour: (.*?) -->")


class PageError(ValueError):
    """A block that is neither run nor marked, or a mark that says nothing."""


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    code: str
    steps: int = 0  # 0: as many as it says
    exit_code: int = 0
    plan: str = ""  # the topology that it is planned for instead of being run
    skip: str = ""  # why it is not run

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def language(self) -> str:
        return "python" if _is_python(self.code) else "bash"

    def describe(self) -> str:
        """A line of the list."""
        how = f"planned for {self.plan}" if self.plan else f"run by {self.language}"
        how = f"not run: {self.skip}" if self.skip else how
        how += f", {self.steps} steps" if self.steps else ""
        how += f", ends with {self.exit_code}" if self.exit_code else ""
        return f"{self.place:28} {how:24} {self.code.splitlines()[0].strip()[:90]}"


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """README.md first: it makes what the others use."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def read(page: pathlib.Path, root: pathlib.Path = ROOT) -> list[Block]:
    """Its blocks in order.

    Raises:
      PageError: a mark that is unknown or stands before no block, or a block that can't be run and does not say why.
    """
    name, lines = str(page.relative_to(root)), page.read_text().splitlines()
    blocks: list[Block] = []
    words, marked, number = "", 0, 0
    while number < len(lines):
        line = lines[number]
        if mark := _MARK.fullmatch(line.strip()):
            words, marked = mark[1], number + 1
        elif "first-hour:" in line:
            raise PageError(f"{name}:{number + 1}: a mark is a line of its own, <!-- first-hour: … -->")
        end = _end(lines, number)
        if end > number:
            fenced = line.startswith("```")
            code = lines[number + 1 : end - 1] if fenced else [text[4:] for text in lines[number:end]]
            block = Block(name, number + 1 + fenced, "\n".join(code).rstrip() + "\n")
            blocks.append(_checked(_marked(block, words.removesuffix(" rest"))))
            words, number = words if words.endswith(" rest") else "", end
            continue
        if words and not words.endswith(" rest") and line.strip() and number + 1 > marked:
            raise PageError(f"{name}:{marked}: the mark {words!r} stands before no block")
        number += 1
    if words and not words.endswith(" rest"):
        raise PageError(f"{name}:{marked}: the mark {words!r} stands before no block")
    return blocks


def broken_links(page: pathlib.Path) -> list[str]:
    """The relative links of a page whose file, anchor or line is not there, as "target (why)"."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_blocks(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            broken.append(f"{target} (no such file)")
        elif lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            last = int(lines[2] or lines[1])
            if not int(lines[1]) <= last <= len(path.read_text().splitlines()):
                broken.append(f"{target} (no such lines)")
        elif anchor and anchor not in anchors(path.read_text()):
            broken.append(f"{target} (no such heading)")
    return broken


def missing_files(page: pathlib.Path, root: pathlib.Path = ROOT) -> list[str]:
    """The files of the repository that a page names, in its text or its commands, and that are not there."""
    folders = "bigmac_jax|benchmarks|configs|docs|scripts|tests"
    named = re.findall(rf"(?<![\w/.:-])(?:{folders})(?:/[\w.-]+)+", page.read_text())
    return [name for name in (name.rstrip(".") for name in named) if not (root / name).exists()]


def anchors(text: str) -> list[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", _without_blocks(text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles]


def _without_blocks(text: str) -> str:
    lines, number, kept = text.splitlines(), 0, []
    while number < len(lines):
        end = _end(lines, number)
        kept += lines[number : number + (end == number)]
        number = max(end, number + 1)
    return "\n".join(kept)


def commands(code: str) -> list[str]:
    """The commands of a shell block, continued lines joined, without comments."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def shortened(command: str, steps: int, config: str) -> str:
    """A training command with so many steps; `config` is a file that `make train` takes instead of its own."""
    if re.match(r"make train\b", command):
        return f"make train CONFIG={config}"
    if re.match(r"python train\.py|bigmac train|scripts/launch_local\.sh", command):
        bare, comment = _split_comment(command)
        return f"{bare} --config.train.steps={steps}{comment}"
    return command


def few_steps(code: str) -> bool:
    """Whether a block says itself how many steps it takes, under a hundred: they may be what it is about."""
    return bool(re.search(r"train\.steps=\d\d?\b", code))


def planned(command: str, topology: str) -> str:
    """`bigmac plan` of what a command for other machines would train."""
    fields = [word for word in shlex.split(_split_comment(command)[0]) if word.startswith("--config")]
    return shlex.join(["bigmac", "plan", f"--topology={topology}", *fields])


def _split_comment(command: str) -> tuple[str, str]:
    bare, hash, comment = command.partition(" #")
    return bare.rstrip(), f"  #{comment}" if hash else ""


def _end(lines: list[str], start: int) -> int:
    """The line behind the block that begins here; `start` where none does."""
    if lines[start].startswith("```"):
        return next(i for i in range(start + 1, len(lines)) if lines[i].startswith("```")) + 1
    if not lines[start].startswith("    ") or (start and lines[start - 1].strip()):
        return start
    end = start
    while end < len(lines) and lines[end].startswith("    "):
        end += 1
    return end


def _marked(block: Block, words: str) -> Block:
    for word in words.split():
        name, _, value = word.partition("=")
        if name in ("steps", "code") and value.isdigit() and int(value):
            block = block._replace(**{{"steps": "steps", "code": "exit_code"}[name]: int(value)})
        elif name == "plan" and value:
            block = block._replace(plan=value)
        elif name == "skip" and value in REASONS:
            block = block._replace(skip=value)
        else:
            known = f"steps=N, code=N, plan=TOPOLOGY, rest or skip={'|'.join(REASONS)}"
            raise PageError(f"{block.place}: {word!r} is no mark; use {known}")
    return block


def _checked(block: Block) -> Block:
    if block.skip or block.plan or block.language == "python":
        return block
    for command in commands(block.code):
        first = re.sub(r"^(\w+=\S+ )+", "", command).split()[0]
        if first not in COMMANDS:
            raise PageError(
                f"{block.place}: {first!r} is none of {', '.join(COMMANDS)}; mark the block, as in "
                f"<!-- first-hour: skip=output -->"
            )
    return block


def _is_python(code: str) -> bool:
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
