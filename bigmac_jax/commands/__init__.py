"""The commands: `bigmac NAME`, of which some are scripts in the repository's root, too.

Nothing heavy is imported here, so that a missing environment is one line, and `environment.prepare` runs before jax.
"""

import difflib
import importlib
import io
import pathlib
import sys
from typing import NamedTuple, NoReturn

from bigmac_jax import __version__
from bigmac_jax.runtime import environment, signals


class Command(NamedTuple):
    """What a command does, whether it takes arguments that are no flags, and may run as several processes."""

    summary: str
    arguments: bool = False
    distributed: bool = False


# By name, which is that of a module here with a function `main`.
COMMANDS = {
    "train": Command("trains a model", distributed=True),
    "eval": Command("scores one: perplexity, downstream tasks", distributed=True),
    "generate": Command("completes prompts", distributed=True),
    "serve": Command("answers requests over HTTP, as OpenAI's interface has them", distributed=True),
    "plan": Command("says what a config costs, before it runs", arguments=True),
    "convert": Command("converts models to and from Hugging Face, and to other structures", True, distributed=True),
    "data": Command("prepares a corpus ahead: tokenises it on all cores", arguments=True),
    "report": Command("draws runs side by side", arguments=True),
    "selfcheck": Command("says whether this machine computes what it should", distributed=True),
    "fields": Command("lists the config's fields", arguments=True),
}
# Words that others have for them.
_OTHER_WORDS = {
    "train": "fit pretrain finetune fine-tune tune sft dpo lora resume",
    "eval": "evaluate score test perplexity benchmark",
    "generate": "sample complete infer inference predict chat run",
    "serve": "server api",
    "plan": "estimate cost search autotune sweep",
    "convert export": "export",
    "convert import": "import",
    "data prepare": "prepare tokenize tokenise preprocess",
    "report": "plot compare draw",
    "selfcheck": "check doctor verify",
    "fields": "config configs options",
}
_ROOT = pathlib.Path(__file__).parents[2]


def start(name: str) -> None:
    """Runs a command with the arguments in sys.argv; does not return."""
    if sys.version_info < (3, 11):  # noqa: UP036  whoever runs a script with another Python is told
        fail(f"this is Python {sys.version.split()[0]}, and 3.11, 3.12 or 3.13 is needed; {_advice()}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path that is no UTF-8 is printed as it is
    signals.install()
    with signals.block():  # until the program that takes its place has its handlers
        environment.prepare()
    try:
        cli, module = (importlib.import_module(f"bigmac_jax.commands.{module}") for module in ("cli", name))
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "bigmac_jax":
            raise
        fail(f"{sys.executable} has no package {error.name!r}; {_advice(error.name.partition('.')[0])}")
    cli.run(module.main, COMMANDS[name].arguments, COMMANDS[name].distributed)


def main() -> None:
    """`bigmac NAME [arguments]`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"bigmac {name}"]
        start(name)
    elif name == "--version":
        print(f"bigmac_jax {__version__}")
    elif name in ("--help", "-h", "help"):
        print("bigmac COMMAND [--help | arguments]\n")
        print("\n".join(f"  {command:10} {of.summary}" for command, of in COMMANDS.items()))
    else:
        near = [command for command, words in _OTHER_WORDS.items() if name.lower() in words.split()]
        near += difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        fail(f"{name!r} is not a command of bigmac; {fix}")


# Packages that an extra of this name brings.
_EXTRAS = {"serve": ("uvicorn", "starlette", "h11", "prometheus_client")}


def _advice(package: str = "") -> str:
    """How to get a Python that has what is needed."""
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"it comes with the extra: {sys.executable} -m pip install 'bigmac_jax[{extra}]'"
    for python in sorted(_ROOT.glob(".venv-*/bin/python")):
        return f"enter the environment that make has built: source {python.parent / 'activate'}"
    if (_ROOT / "Makefile").exists():
        return f"build the environment: cd {_ROOT} && make env, and enter it as that says"
    return "install bigmac_jax with its dependencies: pip install bigmac-jax"


def fail(message: str) -> NoReturn:
    """Ends the command with exit code 2, as for a bad configuration; "" where another process has printed the line."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
