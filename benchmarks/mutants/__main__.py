"""Whether the tests notice a wrong value: python -m benchmarks.mutants [--seed=0 --count=200].

Values of the package (`benchmarks.mutants.places`) are changed one at a time, each in a clone of HEAD of its own, and
the tests of `make test` that run the changed line are run there, then the others of the files that run its function
(what is traced once is not run again), until one fails: first those below a second, of the cheapest files. A test that
fails must pass where nothing is changed. A test that takes ten times as long and a minute has failed.

A JSON line a mutant in --results; run again, it goes on where it ended, and --again repeats those that survived.
--equivalent=KEY --reason=TEXT says of a survivor that it computes the same; --report prints what there is. Which tests
run which lines is measured first, by one run of all (needs the package coverage), and kept in --map while the
package stays: a folder of tests that has changed is measured again.

Why not a library: mutmut changes functions in a process in which they are traced already, and neither module constants
nor what other processes of a test run; cosmic-ray runs one command for all mutants, which would be ten minutes each.
"""

import collections
import concurrent.futures
import contextlib
import fnmatch
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from benchmarks.mutants.places import Mutant, draw, find_places

_SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
_COUNT = flags.DEFINE_integer("count", 200, "Mutants.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 2, "At a time.", lower_bound=1, upper_bound=2)
_BUDGET = flags.DEFINE_float(
    "budget", 900, "Seconds of tests a mutant, as they take unchanged; the cheapest files run."
)
_RESULTS = flags.DEFINE_string("results", "", "By default runs/mutants/SEED.jsonl.")
_MAP = flags.DEFINE_string("map", "runs/mutants/map.json", "Which tests run which lines.")
_PROGRAMS = flags.DEFINE_string("programs", "runs/mutants/programs", "Compiled programs; it can be deleted.")
_TESTS = flags.DEFINE_list("tests", [], "Folders or files of tests, instead of all.")
_FILES = flags.DEFINE_list("files", ["*"], "Patterns of files that are changed, as bigmac_jax/data/*.")
_AGAIN = flags.DEFINE_bool("again", False, "Those that survived are tried again.")
_REPORT = flags.DEFINE_bool("report", False, "Prints the results and ends.")
_EQUIVALENT = flags.DEFINE_string("equivalent", "", "The key of a mutant that computes the same …")
_REASON = flags.DEFINE_string("reason", "", "… and why.")

ROOT = pathlib.Path(__file__).parents[2]
_RC = """[run]
source = {tree}/bigmac_jax
data_file = {folder}/data/coverage
parallel = true
context = ${{MUTANTS_TEST-}}
disable_warnings = no-data-collected, module-not-imported, module-not-measured
"""
# What a test starts, and what forks in it: the tests' commands are forks of a process that an earlier test has started.
_SITE = """import os
import pathlib

import coverage

coverage.process_startup()
running = pathlib.Path(os.environ["MUTANTS_RUNNING"], f"test-{os.getppid()}")


def _fork():
    if running.exists():
        os.environ["MUTANTS_TEST"] = test = running.read_text()
        coverage.Coverage.current().switch_context(test)


os.register_at_fork(after_in_child=_fork)
"""
_LONG = 1.0  # seconds of a test that waits for the shorter ones
_SLOW = "ended or too slow"  # which a busy machine may be the reason of: such a test is run once more
_checked: dict[str, bool] = {}  # tests: whether they pass alone where nothing is changed
_lock = threading.Lock()


def main(_: Any) -> None:
    results = ROOT / (_RESULTS.value or f"runs/mutants/{_SEED.value}.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    seen = {}
    if results.exists():
        seen = {record["key"]: record for record in map(json.loads, results.read_text().splitlines())}
    if _EQUIVALENT.value:
        record = seen[_EQUIVALENT.value] | {"status": "equivalent", "why": _REASON.value}
        return _append(results, record)
    if _REPORT.value:
        return report(seen.values())
    if _git("status", "--porcelain"):
        raise SystemExit("HEAD is what is tested: commit first")
    package = _git("rev-parse", "HEAD:bigmac_jax")
    if any(record["package"] != package for record in seen.values()):
        raise SystemExit(f"{results} is of another package; give another --results")
    with tree() as plain:
        places = [p for p in find_places(plain) if any(fnmatch.fnmatch(p.path, f) for f in _FILES.value)]
        mutants = draw(places, min(_COUNT.value, len(places)), _SEED.value)
        measured = read_map(plain)
        left = [
            mutant
            for mutant in mutants
            if mutant.place.key not in seen
            or (_AGAIN.value and seen[mutant.place.key]["status"] in ("survived", "uncovered"))
        ]
        tests = [choose(measured, mutant) for mutant in left]
        most = sum(sum(measured["seconds"][test] for test in chosen) for chosen in tests)
        least = sum(measured["seconds"][test] for chosen in tests for test in chosen[:1])
        hours = [(seconds + 15 * len(left)) / _JOBS.value / 3600 for seconds in (least, most)]
        print(f"{len(left)} of {len(mutants)} mutants, {hours[0]:.1f} to {hours[1]:.1f} h", flush=True)
        with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
            runs = [pool.submit(judge, plain, *job, measured) for job in zip(left, tests, strict=True)]
            for run in concurrent.futures.as_completed(runs):
                seen[run.result()["key"]] = record = run.result() | {"package": package}
                _append(results, record)
                print({name: record[name] for name in ("key", "was", "is", "status", "by", "seconds")}, flush=True)
    report(seen.values())


def report(records: Sequence[dict[str, Any]] | Any) -> None:
    counts = collections.Counter(record["status"] for record in records)
    for record in records:
        if record["status"] != "killed":
            print(f"{record['status']}: {record['key']}\n    {record['was']}\n  → {record['is']}\n    {record['why']}")
    real = sum(counts.values()) - counts["equivalent"]
    print(f"{dict(counts)}: {counts['killed']} of {real} that are not equivalent are noticed")


def judge(plain: pathlib.Path, mutant: Mutant, tests: list[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Runs a mutant's tests until one fails that passes without it."""
    began, place, tests = time.monotonic(), mutant.place, list(tests)
    start, stop = place.span
    was = (plain / place.path).read_bytes()[start:stop].decode()
    record = {"key": place.key, "was": was, "is": mutant.text, "tests": len(tests), "by": "", "why": ""}
    status = "survived" if tests else "uncovered"
    with tree() as changed:
        mutant.apply(changed)
        while tests:
            failed, why = run_tests(changed, tests, measured)
            if failed is None:
                break
            slow = why == _SLOW and run_tests(changed, [failed], measured)[0] is None
            if not slow and passes_alone(plain, failed, measured):
                status, record["by"], record["why"] = "killed", failed, why
                break
            tests.remove(failed)
    return record | {"status": status, "seconds": round(time.monotonic() - began, 1)}


def passes_alone(plain: pathlib.Path, test: str, measured: dict[str, Any]) -> bool:
    with _lock:
        if test not in _checked:
            _checked[test] = run_tests(plain, [test], measured)[0] is None
        return _checked[test]


def run_tests(root: pathlib.Path, tests: list[str], measured: dict[str, Any]) -> tuple[str | None, str]:
    """The first that fails, and why; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        limits = {test: 60 + 10 * measured["seconds"][test] for test in tests}
        chosen, reports = pathlib.Path(folder, "tests.json"), pathlib.Path(folder, "reports.jsonl")
        chosen.write_text(json.dumps(list(limits.items()), allow_nan=False))
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        for _ in range(3):
            reports.unlink(missing_ok=True)
            code = _pytest(root, {"MUTANTS_TESTS": str(chosen), "MUTANTS_REPORTS": str(reports)},
                           ["-n0", "-x", *files], 300 + sum(limits.values()))  # fmt: skip
            if code != -signal.SIGTERM:  # someone else's
                break
        lines = [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []
    for line in lines:
        if line["outcome"] == "failed":
            return line["test"], line["why"]
    if code == 0:
        return None, ""
    # It fails where the tests are collected, or has ended within one.
    return (lines[-1]["test"], _SLOW) if lines else (tests[0], "no test begins")


def choose(measured: dict[str, Any], mutant: Mutant) -> list[str]:
    """The tests that run the changed lines, and behind them the others of the files that run the function."""
    place, seconds = mutant.place, measured["seconds"]
    lines = {int(line): numbers for line, numbers in measured["lines"].get(place.path, {}).items()}

    def running(span: tuple[int, int] | None) -> set[str]:
        found = (numbers for line, numbers in lines.items() if span is None or span[0] <= line <= span[1])
        return {measured["tests"][number] for numbers in found for number in numbers} & seconds.keys()

    first = running(place.lines if place.scope else None) or running(place.scope)
    files = {name.partition("::")[0] for name in first | running(place.scope)}
    rest = {name for name in seconds if name.partition("::")[0] in files} - first
    chosen: list[str] = []
    for tests in (first, rest):
        by_file: dict[tuple[bool, str], list[str]] = {}
        for test in seconds:
            if test in tests:
                by_file.setdefault((seconds[test] > _LONG, test.partition("::")[0]), []).append(test)
        for of in sorted(by_file, key=lambda of: (of[0], sum(map(seconds.__getitem__, by_file[of])))):
            chosen += by_file[of]
    total, kept = 0.0, []
    for test in chosen:
        total += seconds[test]
        if kept and total > _BUDGET.value:
            break
        kept.append(test)
    return kept


def read_map(plain: pathlib.Path) -> dict[str, Any]:
    """{seconds: of each test that passes, tests: by number, lines: of a file, with the numbers of their tests, done:
    folders of tests, and the tree of each}, kept after each of these. A folder that has changed is measured again."""
    path, package = ROOT / _MAP.value, _git("rev-parse", "HEAD:bigmac_jax")
    measured: dict[str, Any] = {"package": package, "seconds": {}, "tests": [], "lines": {}, "done": {}}
    if path.exists() and (kept := json.loads(path.read_text()))["package"] == package:
        measured = kept
    tests = [test.relative_to(plain).as_posix() for test in sorted((plain / "tests").iterdir())]
    for target in _TESTS.value or [t for t in tests if t.startswith("tests/test_") or (plain / t).is_dir()]:
        now = _git("rev-parse", f"HEAD:{target}")
        if measured["done"].get(target) != now:
            measured["seconds"] = {
                test: seconds
                for test, seconds in measured["seconds"].items()
                if not pathlib.PurePath(test.partition("::")[0]).is_relative_to(target)
            }
            _measure(plain, target, measured)
            measured["done"][target] = now
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measured, allow_nan=False))
    return measured


def _measure(plain: pathlib.Path, target: str, measured: dict[str, Any]) -> None:
    """Runs tests, and adds to a map which lines they run."""
    import coverage

    with tempfile.TemporaryDirectory() as folder:
        site, reports, data = (pathlib.Path(folder, name) for name in ("site", "reports.jsonl", "data"))
        site.mkdir()
        data.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        (site / "rc").write_text(_RC.format(tree=plain, folder=folder))
        variables = {"MUTANTS_REPORTS": str(reports), "COVERAGE_PROCESS_START": str(site / "rc"),
                     "MUTANTS_RUNNING": folder, "PYTHONPATH": f"{plain}:{site}"}  # fmt: skip
        parallel = ["-n", str(_JOBS.value), "--dist=loadfile"] if _JOBS.value > 1 else ["-n0"]
        if (code := _pytest(plain, variables, [*parallel, target], 3600)) not in (0, 1, 5):  # 5: all are left out
            raise SystemExit(f"pytest ended with {code} in {target}")
        seconds: dict[str, float] = {}
        bad = set()
        for line in map(json.loads, reports.read_text().splitlines() if reports.exists() else []):
            seconds[line["test"]] = round(seconds.get(line["test"], 0) + line["seconds"], 3)
            if line["outcome"] != "passed":
                bad.add(line["test"])
        measured["seconds"] |= {test: value for test, value in seconds.items() if test not in bad}
        print(f"{target}: {len(seconds)} tests in {sum(seconds.values()):.0f} s; not used: {sorted(bad)}", flush=True)
        if not list(data.iterdir()):
            return
        whole = coverage.Coverage(data_file=str(data / "coverage"), config_file=False)
        whole.combine([str(data)])
        numbers = {test: number for number, test in enumerate(measured["tests"])}
        for file in whole.get_data().measured_files():
            lines = measured["lines"].setdefault(os.path.relpath(file, plain), {})
            for line, names in whole.get_data().contexts_by_lineno(file).items():
                found = {numbers.setdefault(name, len(numbers)) for name in names if name}
                lines[str(line)] = sorted(found.union(lines.get(str(line), [])))
        measured["tests"] = list(numbers)


@contextlib.contextmanager
def tree() -> Iterator[pathlib.Path]:
    """A clone of HEAD."""
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        _git("clone", "--quiet", "--shared", str(ROOT), folder)
        yield pathlib.Path(folder).resolve()


def _pytest(root: pathlib.Path, variables: dict[str, str], argv: list[str], limit: float) -> int:
    """Its exit code. What its tests have started ends with it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.mutants.plugin",
    ]
    programs = {  # most of a mutant's are those of the plain package
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / _PROGRAMS.value),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    own = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = os.environ | programs | own | variables
    process = subprocess.Popen([*command, *argv], cwd=root, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _git(*argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _append(path: pathlib.Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


if __name__ == "__main__":
    app.run(main)
