"""Compiled programs that were cut short are written anew, with one line."""

import os
import pathlib
import re

import forks
import pytest

from bigmac_jax.runtime.kept_programs import mend

PROGRAM = """
import sys
import jax
from bigmac_jax.runtime.kept_programs import keep_programs
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", None)  # of the test that runs this
keep_programs(sys.argv[1])
jax.jit(lambda x: 2 * x)(1.0)
"""


def test_a_program_that_was_cut_short_is_written_anew(tmp_path: pathlib.Path) -> None:
    script, out, err, folder = (tmp_path / name for name in ("program.py", "out", "err", "programs"))
    script.write_text(PROGRAM)

    def start() -> list[str]:
        assert forks.start([str(script), str(tmp_path)], out, err).wait() == 0, err.read_text()
        return [text for text in err.read_text().splitlines() if "compil" in text]  # JAX speaks of missing devices, too

    assert start() == []
    (file,) = folder.glob("jit__lambda*-cache")
    whole = file.stat().st_size
    os.truncate(file, whole // 2)
    (line,) = start()
    said = rf"a compiled program, jit__lambda in {folder}, cannot be read \(.+\); it is compiled and written anew"
    assert re.search(f"{said}$", line), line
    assert abs(file.stat().st_size - whole) < 100 and start() == []


@pytest.mark.parametrize(("folder", "left"), [("programs", ["jit_step_of-1-cache"]), ("gs://bucket", None)])
def test_what_could_not_be_written_is_no_program(tmp_path: pathlib.Path, folder: str, left: list[str] | None) -> None:
    place = pathlib.Path(folder) if "://" in folder else tmp_path / folder
    if left:
        place.mkdir()
        for name in ("jit_step-1-cache", "jit_step-2-cache", *left):
            (place / name).write_bytes(b"")
        os.utime(place / "jit_step-2-cache", (0, 0))  # of another start: it is whole
        left = ["jit_step-2-cache", *left]
    full = (
        "Error writing persistent compilation cache entry for 'jit_step': OSError: [Errno 28] No space left on device"
    )
    assert mend(place, full) == (
        f"a compiled program, jit_step in {place}, cannot be written (OSError: [Errno 28] No space left on device); "
        f"the next start compiles it again"
    )
    assert left is None or sorted(file.name for file in place.iterdir()) == left
    assert mend(place, "Some donated buffers were not usable") == ""


def test_a_program_of_somebody_else_stays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: pathlib.Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    (tmp_path / "jit_step-1-cache").write_bytes(b"")
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    bad = "Error reading persistent compilation cache entry for 'jit_step': PermissionError: [Errno 13]"
    assert mend(tmp_path, bad) == (
        f"a compiled program, jit_step in {tmp_path}, cannot be read (PermissionError: [Errno 13]), nor deleted; every "
        f"start compiles it, until somebody deletes it"
    )
