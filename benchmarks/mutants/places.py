"""Where a value of the package can be changed, and into what.

A place is an operator, a number, a truth value, a slice or the arguments of a call. What is left out changes no value
that a CPU computes: messages and what is printed, annotations, flags of commands, pictures, kernels of accelerators.
"""

import ast
import copy
import fnmatch
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Files that no CPU runs, or that the default tests can't, and files of pictures and formats.
EXCLUDED_FILES = (
    "model/kernels/*_gpu.py",  # Triton
    "interchange/hf/*",  # torch, of the extra `hf`
    "evaluation/harness.py",  # lm_eval, of the extra `lm-eval`
    "report/*", "planning/report.py", "planning/pictures.py",
)  # fmt: skip
# Functions that call the kernels of TPUs and GPUs, or draw; and so does what stands under `if platform() == "tpu"`.
EXCLUDED_FUNCTIONS = {
    "model/kernels/grouped_matmul.py": ("_gmm", "_tgmm", "_tiling"),
    "model/kernels/paged_attention.py": ("kernel",),
    "model/kernels/flash_attention.py": ("cudnn",),
    "tuning/conversion/converted_run.py": ("_draw",),
}
_SAYING = {"print", "say", "warn", "info", "warning", "error", "exception", "debug", "log", "echo", "show", "notice"}
_TYPING = {"isinstance", "issubclass", "cast", "TypeVar", "NewType", "hasattr"}
_SYMMETRIC = {"max", "min", "maximum", "minimum", "gcd", "add"}  # a swap of their arguments is no change
_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Place(NamedTuple):
    path: str  # from the root of the repository
    kind: str
    line: int
    span: tuple[int, int]  # of bytes, that a change replaces
    lines: tuple[int, int]  # of the statement, its body left out
    scope: tuple[int, int] | None  # lines of the function; None of a module or class
    changes: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}:{self.span[0]}:{self.kind}"


class Mutant(NamedTuple):
    place: Place
    text: str  # what stands there instead

    def apply(self, root: pathlib.Path) -> None:
        path = root / self.place.path
        source, (start, stop) = path.read_bytes(), self.place.span
        path.write_bytes(source[:start] + self.text.encode() + source[stop:])


def draw(places: Sequence[Place], count: int, seed: int) -> list[Mutant]:
    """Places are equally likely, and so are a place's changes. The first of a longer draw are those of a shorter."""
    chosen = random.Random(seed)
    order = chosen.sample(places, len(places))
    return [Mutant(place, random.Random(f"{seed} {place.key}").choice(place.changes)) for place in order[:count]]


def find_places(root: pathlib.Path) -> list[Place]:
    package = root / "bigmac_jax"
    found: list[Place] = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED_FILES):
            found += _Finder(
                path.relative_to(root).as_posix(), path.read_text(), EXCLUDED_FUNCTIONS.get(name, ())
            ).run()
    return found


class _Finder:
    def __init__(self, path: str, source: str, excluded: Sequence[str]):
        self._path, self._source, self._excluded = path, source, excluded
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line.encode()))
        self._places: list[Place] = []

    def run(self) -> list[Place]:
        self._statements(ast.parse(self._source).body, None)
        return self._places

    def _statements(self, body: Sequence[ast.stmt], scope: tuple[int, int] | None) -> None:
        for statement in body:
            if _silent(statement):
                continue
            inside = scope
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                if statement.name in (*self._excluded, "__repr__", "__str__"):
                    continue
                inside = statement.lineno, statement.end_lineno or statement.lineno
            bodies = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
            bodies += [case.body for case in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]]
            first = min((body[0].lineno for body in bodies if body), default=(statement.end_lineno or 0) + 1)
            lines = statement.lineno, max(statement.lineno, first - 1)
            for node in _expressions(statement):
                for kind, changed in _changes(node):
                    self._add(node, kind, changed, lines, inside)
            if isinstance(statement, ast.If) and _of_accelerators(statement.test):
                bodies = bodies[1:]
            for nested in bodies:
                self._statements(nested, inside)

    def _add(self, node: Any, kind: str, changed: list[ast.AST], lines: Any, scope: Any) -> None:
        span = (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )
        texts = [ast.unparse(ast.fix_missing_locations(new)) for new in changed]
        if isinstance(node, ast.expr) and not isinstance(node, ast.Slice | ast.Constant):
            texts = [f"({text})" for text in texts]
        self._places.append(Place(self._path, kind, node.lineno, span, lines, scope, tuple(texts)))


def _silent(statement: ast.stmt) -> bool:
    """Changes no value: raises, prints, defines a flag, or is there for a type checker."""
    if isinstance(statement, ast.If):
        return "TYPE_CHECKING" in ast.unparse(statement.test)
    value = getattr(statement, "value", None)
    saying = isinstance(statement, ast.Expr) and isinstance(value, ast.Call) and _name(value.func) in _SAYING
    return (
        isinstance(statement, ast.Raise) or saying or (isinstance(value, ast.Call) and "DEFINE_" in _name(value.func))
    )


def _of_accelerators(test: ast.expr) -> bool:
    text = ast.unparse(test)
    return "platform" in text and "!=" not in text and not text.startswith("not") and ("tpu" in text or "gpu" in text)


def _expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement that hold values, those of statements inside it left out."""
    queue: list[ast.AST] = [statement]
    while queue:
        node = queue.pop()
        yield node
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "msg", "bases", "type_params", "pattern"):
                continue
            children = child if isinstance(child, list) else [child]
            if name == "decorator_list":
                children = [c for c in children if "dataclass" not in ast.unparse(c)]
            queue += [c for c in children if isinstance(c, ast.AST) and not isinstance(c, ast.stmt) and not _unread(c)]


def _unread(node: ast.AST) -> bool:
    """Text that people read, or checks of types."""
    if isinstance(node, ast.JoinedStr | ast.ExceptHandler | ast.match_case):
        return True
    if not isinstance(node, ast.Call):
        return False
    text = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant | ast.JoinedStr)
    return text or _name(node.func) in _TYPING | _SAYING or _name(node.func).endswith(("Error", "Warning"))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _has_no_bits(node: ast.AST) -> bool:
    """A dictionary or a type: `&` in the place of `|` would be an error and not another value."""
    if isinstance(node, ast.Subscript | ast.Attribute):
        return isinstance(node, ast.Subscript) or node.attr[:1].isupper()
    name = isinstance(node, ast.Name) and (node.id[:1].isupper() or node.id in ("int", "float", "str", "bytes", "bool"))
    return name or isinstance(node, ast.Dict | ast.DictComp) or (isinstance(node, ast.Constant) and node.value is None)


def _changes(node: ast.AST) -> Iterator[tuple[str, list[ast.AST]]]:
    """What a node may be instead: (kind, nodes) of each place in it."""
    if isinstance(node, ast.BinOp):
        sides = node.left, node.right
        if not any(_is_text(side) or (isinstance(node.op, ast.BitOr) and _has_no_bits(side)) for side in sides):
            if isinstance(node.op, ast.MatMult):
                yield "@", [ast.BinOp(node.right, node.op, node.left)]
            else:
                yield type(node.op).__name__, [ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)]
    elif isinstance(node, ast.AugAssign):
        if type(node.op) in _OPERATORS and not _is_text(node.value):
            yield f"{type(node.op).__name__}=", [ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value)]
    elif isinstance(node, ast.BoolOp):
        yield type(node.op).__name__, [ast.BoolOp(_OPERATORS[type(node.op)](), node.values)]
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], _OPERATORS[type(op)](), *node.ops[i + 1 :]]
            yield f"{type(op).__name__}{i}", [ast.Compare(node.left, ops, node.comparators)]
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub | ast.Not):
            yield type(node.op).__name__, [node.operand]
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "bool", [ast.Constant(not node.value)]
        elif isinstance(node.value, int):
            yield "int", [ast.Constant(node.value + 1), *([ast.Constant(node.value - 1)] if node.value > 0 else [])]
        elif isinstance(node.value, float):
            yield "float", [ast.Constant(node.value + 1), ast.Constant(node.value * 2 or -1.0)]
    elif isinstance(node, ast.Slice):
        bounds = [name for name in ("lower", "upper", "step") if getattr(node, name)]
        if bounds:
            yield "slice", [_without(node, name) for name in bounds]
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _without(node: ast.Slice, name: str) -> ast.Slice:
    new = copy.copy(node)
    setattr(new, name, None)
    return new


def _calls(node: ast.Call) -> Iterator[tuple[str, list[ast.AST]]]:
    """Two arguments swapped, or one left out, where that is not sure to be a TypeError: f() for f(x) would be."""
    args, keywords = node.args, node.keywords
    pairs = [i for i in range(len(args) - 1) if ast.dump(args[i]) != ast.dump(args[i + 1])]
    if pairs and _name(node.func) not in _SYMMETRIC:
        swapped = [[*args[:i], args[i + 1], args[i], *args[i + 2 :]] for i in pairs]
        yield "swap", [ast.Call(node.func, new, keywords) for new in swapped]
    dropped: list[ast.AST] = []
    axis = len(args) == 1 and isinstance(args[0], ast.Constant | ast.UnaryOp | ast.Tuple) and not _is_text(args[0])
    if len(args) > 1 or axis:
        dropped.append(ast.Call(node.func, args[:-1], keywords))
    dropped += [ast.Call(node.func, args, [*keywords[:i], *keywords[i + 1 :]]) for i in range(len(keywords))]
    if dropped:
        yield "drop", dropped
