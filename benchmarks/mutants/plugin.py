"""Of pytest: which tests run which lines, and a mutant's tests in their order. `benchmarks.mutants` asks by variables.

MUTANTS_REPORTS: a file that gets a JSON line for each test when it begins, and one for each of its outcomes.
MUTANTS_RUNNING: a folder that has the test which runs, in a file test-PID.
MUTANTS_TESTS: a JSON file of [node id, most seconds]: these tests run, in this order. A test that takes longer ends the
process. Without it all run, and coverage (`sitecustomize` has started it) is told whose lines are run, here and in what
a test starts.
"""

import faulthandler
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

_reports, _tests = os.environ["MUTANTS_REPORTS"], os.environ.get("MUTANTS_TESTS")
_limits: dict[str, float] = dict(json.loads(pathlib.Path(_tests).read_text())) if _tests else {}
_file = ""


def _write(record: dict[str, Any]) -> None:
    with open(_reports, "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _tests:
        order = {name: number for number, name in enumerate(_limits)}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if _tests:
        faulthandler.dump_traceback_later(_limits[item.nodeid], exit=True)
        _write({"test": item.nodeid, "outcome": "begun"})
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
    else:
        import coverage

        global _file
        measured = coverage.Coverage.current()
        assert measured is not None
        # What is traced already is not run again: a file whose tests call it would not be among those that run it.
        if _file != item.nodeid.partition("::")[0]:
            _file = item.nodeid.partition("::")[0]
            jax.clear_caches()
        measured.switch_context(item.nodeid)
        os.environ["MUTANTS_TEST"] = item.nodeid
        pathlib.Path(os.environ["MUTANTS_RUNNING"], f"test-{os.getpid()}").write_text(item.nodeid)
        try:
            return (yield)
        finally:
            measured.switch_context("")


class _Reports:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (crash.message if crash else str(report.longrepr or "")).strip().partition("\n")[0][:200]
        _write({"test": report.nodeid, "outcome": report.outcome, "when": report.when,
                "seconds": round(report.duration, 3), "why": why})  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reports())


def pytest_sessionfinish() -> None:
    if not _tests:
        import coverage

        if measured := coverage.Coverage.current():  # a worker of xdist ends without `atexit`
            measured.stop()
            measured.save()
