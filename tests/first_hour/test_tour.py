"""The notebook runs, and what is committed of it is small and whole."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import bigmac_jax
from first_hour.tour import NOTEBOOK, read, run


def test_what_is_committed() -> None:
    """Every cell was run, in order and without an error; what it showed is small, and no path of a machine."""
    notebook = read()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = NOTEBOOK.read_text()
    assert len(text) < 100_000 and not any(place in text for place in ("/home/", "/root/", "/tmp/", "/work/"))
    for name in ("load_config", "train", "metrics", "restore", "Generator", "plan"):
        assert f"bigmac_jax.{name}(" in text and name in bigmac_jax.__all__


def test_cells_share_names_and_give_what_they_show(tmp_path: pathlib.Path) -> None:
    sources = (
        "a = 2\nprint('x')",
        "import matplotlib.pyplot as plt\nplt.plot([a])\nplt.show()\na + 1",
        "open('f', 'w').close()",
    )
    notebook = {"cells": [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]}
    assert run(notebook, tmp_path)["a"] == 2 and (tmp_path / "f").exists()
    first, second, third = (cell["outputs"] for cell in notebook["cells"])
    assert first == [{"name": "stdout", "output_type": "stream", "text": ["x\n"]}]
    assert second[0]["data"] == {"text/plain": ["3"]} and second[1]["data"]["image/png"].startswith("iVBOR")
    assert third == []


@pytest.mark.full
def test_a_kernel_shows_its_pictures(tmp_path: pathlib.Path) -> None:
    """As Jupyter runs it: what sets another backend of matplotlib than the kernel's leaves a notebook without them."""
    pytest.importorskip("nbconvert", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "tour",
        "language": "python",
    }
    (tmp_path / "kernels" / "tour").mkdir(parents=True)
    (tmp_path / "kernels" / "tour" / "kernel.json").write_text(json.dumps(kernel))
    (tmp_path / NOTEBOOK.name).write_text(NOTEBOOK.read_text())
    command = [sys.executable, "-m", "nbconvert", "--to=notebook", "--execute", "--output=shown.ipynb",
               "--ExecutePreprocessor.kernel_name=tour", NOTEBOOK.name]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(NOTEBOOK.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JUPYTER_PATH": str(tmp_path),
    }
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr
    shown = json.loads((tmp_path / "shown.ipynb").read_text())
    outputs = [output for cell in shown["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.full
def test_it_runs(tmp_path: pathlib.Path) -> None:
    """In a process of its own, as a reader runs it: one device, no test's settings."""
    program = (
        "import json, pathlib, sys\nfrom first_hour.tour import read, run\nnotebook = read()\n"
        "names = run(notebook, pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps([names['result'].step, names['best']['fits'], len(names['completion'].tokens)]))"
    )
    root = NOTEBOOK.parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [100, True, 16]
