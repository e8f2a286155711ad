"""Rules of the source text that no linter has."""

import ast
import functools
import gc
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for folder in ("bigmac_jax", "benchmarks", "tests", ".") for path in (ROOT / folder).glob("*.py"))
FILES += sorted(path for folder in ("bigmac_jax", "benchmarks", "tests") for path in (ROOT / folder).glob("*/**/*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    """Trees of all files are many objects, and each collection would look through all that a worker has compiled."""
    gc.disable()
    yield
    gc.enable()


@functools.cache
def _parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache  # of the many functions of the tests, each is asked several times
def _own(function: Function) -> list[ast.AST]:
    """The nodes of a function, those of functions inside it left out."""
    queue: list[ast.AST] = [function.body] if isinstance(function, ast.Lambda) else list(function.body)
    found = []
    while queue:
        node = queue.pop()
        found.append(node)
        if not isinstance(node, Function):
            queue += ast.iter_child_nodes(node)
    return found


def _targets(node: ast.AST) -> set[str]:
    """Names that a comprehension binds."""
    return {n.id for g in getattr(node, "generators", []) for n in ast.walk(g.target) if isinstance(n, ast.Name)}


@functools.cache
def _bound(function: Function) -> set[str]:
    """Names that are the function's own: arguments, assigned names, functions inside it."""
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    generators = [g for node in _own(function) for g in getattr(node, "generators", [])]
    in_comprehensions = {id(n) for g in generators for n in ast.walk(g.target)}
    for node in _own(function):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in in_comprehensions:
            names.add(node.id)
    return names


def shadowed(tree: ast.Module) -> list[tuple[int, str]]:
    """Comprehensions in a function whose variable has the name of one of a function around it: (line, name)."""
    found = []

    def visit(function: Function, outer: set[str]) -> None:
        free = outer - _bound(function)
        for node in _own(function):
            found.extend((node.lineno, name) for name in sorted(_targets(node) & free))
            if isinstance(node, Function):
                visit(node, free | _bound(function))

    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    inner = {function: [node for node in _own(function) if isinstance(node, Function)] for function in functions}
    inside = {node for nodes in inner.values() for node in nodes}
    for function in functions:
        if function not in inside and inner[function]:  # without a function inside nothing is free
            visit(function, set())
    return found


def test_no_comprehension_takes_the_name_of_a_free_variable() -> None:
    """CPython 3.12 and 3.13 inline comprehensions. Where one binds the name of a free variable of its function, and
    another function inside reads that, they end in an UnboundLocalError."""
    found = {str(path.relative_to(ROOT)): shadowed(_parsed(path)) for path in FILES}
    assert len(found) > 100
    assert not {path: places for path, places in found.items() if places}


def test_a_free_variable_of_the_same_name_is_found() -> None:
    source = "def f(x):\n    def g(rows):\n        a = [x for x in rows]\n        return a, x\n    return g\n"
    assert shadowed(ast.parse(source)) == [(3, "x")]
    assert not shadowed(ast.parse(source.replace("x for x", "y for y")))


def test_the_names_of_a_notebook_are_there() -> None:
    package = importlib.import_module("bigmac_jax")
    for name in package.__all__:
        assert getattr(package, name) is not None, name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: pathlib.Path) -> None:
    """Every name that a benchmark takes from the package: nobody runs most of them in the tests."""
    for node in ast.walk(_parsed(path)):
        if not (isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bigmac_jax"):
            continue
        if node.module == "bigmac_jax.evaluation.harness":  # needs lm_eval
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name) or _is_module(f"{node.module}.{alias.name}"), alias.name


_IMPORT = re.compile(r"^\s*from (bigmac_jax[\w.]*) import (\w+(?:, \w+)*)$", re.MULTILINE)


def test_programs_in_strings_import_what_there_is() -> None:
    """Tests start processes with a program in a string, which no linter reads; most of them are in the full suite."""
    strings = [
        node.value
        for path in FILES
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    found = {
        (module, name) for text in strings for module, names in _IMPORT.findall(text) for name in names.split(", ")
    }
    assert len(found) > 5
    for module, name in found:
        assert hasattr(importlib.import_module(module), name) or _is_module(f"{module}.{name}"), (module, name)


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# A package imports only from those left of it (docs/structure.md). `bigmac_jax/__init__.py`, what a notebook imports,
# stands outside.
PACKAGES = (
    "config", "runtime", "data", "model", "training", "inference", "interchange", "tuning", "evaluation", "planning",
    "report", "run", "serving", "selfcheck", "commands",
)  # fmt: skip


def imported_packages(path: pathlib.Path) -> set[str]:
    """Those of bigmac_jax that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bigmac_jax":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bigmac_jax.")}
    return found


def test_imports_run_one_way() -> None:
    package, seen = ROOT / "bigmac_jax", set()
    for path in sorted(package.rglob("*.py")):
        name, *inner = path.relative_to(package).parts
        if not inner:
            assert name in ("__init__.py", "__main__.py"), f"{name} is in no package"
            continue
        seen.add(name)
        position = PACKAGES.index("commands" if path.name == "__main__.py" else name)
        later = {other for other in imported_packages(path) if PACKAGES.index(other) > position}
        assert not later, f"{path.relative_to(ROOT)} imports from {sorted(later)}"
    assert seen == set(PACKAGES)


def test_what_takes_seconds_to_import_is_imported_by_who_uses_it() -> None:
    """tensorboardX imports torch and boto3 where they are installed: no file has the one that needs it at its top."""
    slow, found = {"tensorboardX", "bigmac_jax.training.tensorboard", "torch", "transformers", "wandb"}, {}
    for path in (ROOT / "bigmac_jax").rglob("*.py"):
        top = [node for node in _parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or alias.name for node in top for alias in node.names}
        found[str(path.relative_to(ROOT))] = {name for name in names if {name, name.partition(".")[0]} & slow}
    assert {path for path, names in found.items() if names and "/hf/" not in path} == {
        "bigmac_jax/training/tensorboard.py"
    }


def test_a_file_is_known_by_its_name() -> None:
    """A command is named as the package that does its work; else no two files have one name."""
    names = [path.name for path in (ROOT / "bigmac_jax").rglob("*.py") if path.parent.name != "commands"]
    assert {n for n in names if names.count(n) > 1} == {"__init__.py", "__main__.py"}


def test_docstrings_say_what_a_thing_is() -> None:
    """A public one does not go on from the name, as "Of …" and "That …" do."""
    going_on = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in (ROOT / "bigmac_jax").rglob("*.py")
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if (ast.get_docstring(node) or "").startswith(("Of ", "That "))
    ]
    assert going_on == []


def test_readme_links_to_the_forward_pass() -> None:
    (first, last) = map(int, re.findall(r"moe\.py#L(\d+)-L(\d+)", (ROOT / "README.md").read_text())[0])
    lines = (ROOT / "bigmac_jax" / "model" / "moe.py").read_text().splitlines()
    shown = lines[first - 1 : last]
    assert shown[0].startswith("def layer_on_rank(") and len(lines) == last
    assert [name for name in ("narrow", "routed", "widen") if f"def {name}(" in "\n".join(shown)] == [
        "narrow",
        "routed",
        "widen",
    ]


def test_the_package_chooses_no_backend_of_matplotlib() -> None:
    """pyplot and `matplotlib.use` are the notebook's: a library that calls them takes its pictures away."""
    found = [
        f"{path.name}:{number}"
        for path in (ROOT / "bigmac_jax").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "pyplot" in line or "matplotlib.use(" in line
    ]
    assert found == []


def test_json_says_whether_it_may_hold_nan() -> None:
    """`json.dumps` writes NaN where it isn't told, which no other reader of JSON takes; results go by `strict_json`."""
    silent = [
        f"{path}:{node.lineno}"
        for path in (ROOT / "bigmac_jax").rglob("*.py")
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("dump", "dumps")
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "json"
        if "allow_nan" not in {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []
