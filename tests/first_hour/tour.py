"""Runs docs/tour.ipynb without Jupyter: its cells in one namespace, with what they print and draw.

python tests/first_hour/tour.py          # runs it in a temporary folder, and writes the outputs into the notebook
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs" / "tour.ipynb"
_DPI = 60  # pictures that are small to keep


def read(path: pathlib.Path = NOTEBOOK) -> dict[str, Any]:
    return json.loads(path.read_text())


def run(notebook: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Runs the cells in a folder; they get the outputs that Jupyter would show. Returns their namespace."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    plt.close("all")  # what others in this process have left open is not the notebook's
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with contextlib.chdir(folder):
        for number, cell in enumerate(cells, 1):
            cell["execution_count"], cell["outputs"] = number, _run("".join(cell["source"]), namespace, number)
    return namespace


def _run(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """One cell: text that it prints, the value of its last line, its figures."""
    import matplotlib.pyplot as plt

    body = ast.parse(source)
    last = ast.Expression(body.body.pop().value) if isinstance(body.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(body, f"cell {number}", "exec"), namespace)
        value = eval(compile(last, f"cell {number}", "eval"), namespace) if last else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        data = {"text/plain": [repr(value)]}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    for figure in map(plt.figure, plt.get_fignums()):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=_DPI, bbox_inches="tight")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, pathlib.Path(folder))
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{NOTEBOOK.name}: {os.path.getsize(NOTEBOOK):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
