"""What is read from a peer's program and from ours, on programs written by hand."""

import json
import pathlib

import pytest

from benchmarks.peers.programs import OURS, commands, draw, fastest, measure, reason, rows, table
from bigmac_jax.config import load_config
from bigmac_jax.planning.topologies import parse_topology

# A gather of 2 GiB over all chips, beside a product of 4e9 cycles; behind it one of 2e9, and a sum that waits.
PROGRAM = """HloModule test, is_scheduled=true

%dot.in (p: f32[8]) -> f32[2,2] {
  %p = f32[8]{0} parameter(0)
  %a = f32[2,2]{1,0} bitcast(%p)
  ROOT %d = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[134217728]) -> f32[8] {
  %x = f32[134217728]{0} parameter(0)
  %g = (f32[134217728]{0}, f32[536870912]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %m = f32[8]{0} fusion(%x), calls=%dot.in, backend_config={"window_config":{"estimated_cycles":"4000000"}}
  %h = f32[536870912]{0} all-gather-done(%g)
  %n = f32[8]{0} fusion(%m), calls=%dot.in, backend_config={"window_config":{"estimated_cycles":"2000000"}}
  ROOT %r = f32[8]{0} all-reduce(%n), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_program_is_measured(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "row.txt"
    file.write_text(PROGRAM)
    about = {"memory": 3 * 2**29, "seconds": 7.5, "versions": {"jax": "1"}}
    file.with_suffix(".json").write_text(json.dumps(about))
    found = measure(file, "v6e:2x2")
    # 1.75 GHz; a ring of the slice has two links of 100 GB/s, over which three quarters of the gather go.
    assert found["work_s"] == pytest.approx(6e6 / 1.75e9, abs=1e-4)
    seconds = found["collectives_s"]
    assert seconds == pytest.approx(0.75 * 2**31 / 200e9, abs=1e-4)
    assert found["exposed_s"] == pytest.approx(seconds - 4e6 / 1.75e9, abs=1e-4)
    assert (found["memory_gib"], found["compile_s"], found["versions"]) == (1.5, 7.5, {"jax": "1"})
    assert found["flops"] == 2 * 16


def test_the_fastest_settings_of_a_peer_stand(tmp_path: pathlib.Path) -> None:
    cases = {
        "ours": {"work_s": 1.0, "exposed_s": 0.5, "collectives_s": 0.75, "memory_gib": 10.0},
        "ours, bfloat16 sums": {"work_s": 1.0, "exposed_s": 0.25, "collectives_s": 0.5, "memory_gib": 9.0},
        "ring": {"work_s": 1.0, "exposed_s": 1.0, "collectives_s": 1.5, "memory_gib": 12.0},
        "ragged": {"work_s": 1.5, "exposed_s": 0.25, "collectives_s": 0.5, "memory_gib": 11.0},
    }
    assert fastest(cases) == "ragged" and fastest({"ours": cases["ours"]}) == ""
    lines = table({"a": cases, "b": {"ours": cases["ours"]}}).splitlines()
    assert lines[2:] == [
        "| a | this project | 1.000 s | 0.500 of 0.750 s | 10.0 GiB | 1.500 s |",
        "|  | this project, bfloat16 sums | 1.000 s | 0.250 of 0.500 s | 9.0 GiB | 1.250 s |",
        "|  | MaxText, ragged | 1.500 s | 0.250 of 0.500 s | 11.0 GiB | 1.750 s |",
        "| b | this project | 1.000 s | 0.500 of 0.750 s | 10.0 GiB | 1.500 s |",
    ]
    draw({"a": cases}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_case_of_ours_has_its_own_fields_and_file(tmp_path: pathlib.Path) -> None:
    row = next(iter(rows()))
    found = commands(row, ["execution.overlap_chunks=8"], tmp_path, "python-of-maxtext")
    assert [case for case in found if case.startswith("ours")] == [*OURS, "ours, execution.overlap_chunks=8"]
    assert [[word for word in command if word.startswith("--field=")] for command in found.values()] == [
        [], ["--field=execution.reduce_dtype=bfloat16"], ["--field=execution.overlap_chunks=8"], [],
    ]  # fmt: skip
    assert len({command[command.index("--ours") + 1] for command in found.values() if "--ours" in command}) == 3
    assert list(commands(row, [], tmp_path, "")) == [*OURS, *row.peers]


def test_an_error_is_the_line_that_names_it() -> None:
    text = "Traceback …\n  File …\nValueError: no such slice\n--------\nFor simplicity, JAX has removed frames."
    assert reason(text) == "ValueError: no such slice"
    assert reason("") == "no message"


def test_rows_are_valid_and_as_large_as_their_slices() -> None:
    found = list(rows())
    assert len({row.name for row in found}) == len(found) == 12
    for row in found:
        config, chips = load_config("qwen3_30b", row.fields), 1
        sums = [load_config("qwen3_30b", (*row.fields, *fields)).execution.reduce_dtype for fields in OURS.values()]
        assert sums == ["float32", "bfloat16"]
        for size in parse_topology(row.topology).shape:
            chips *= size
        assert config.data.batch_size == chips and config.data.sequence_length == 4096
        assert config.mesh.fsdp and config.execution.remat == "layer"
        for settings in row.peers.values():
            given = dict(setting.split("=") for setting in settings)
            ranks = int(given["ici_expert_parallelism"])
            assert ranks == config.mesh.expert and ranks * int(given["ici_fsdp_parallelism"]) == chips
