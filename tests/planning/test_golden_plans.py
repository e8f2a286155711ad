"""Every number of a covering set of plans is the one that is stored (tests/planning/golden_plans.py)."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from . import golden_plans

STORED = json.loads(golden_plans.FILE.read_text())


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


@pytest.mark.parametrize("case", golden_plans.CASES)
def test_a_plan_is_as_stored(case: str) -> None:
    stored, made = dict(leaves(STORED[case])), dict(leaves(golden_plans.plan(case)))
    assert made.keys() == stored.keys()
    wrong = [f"{path}: {made[path]}, stored {stored[path]}" for path in stored if not _same(made[path], stored[path])]
    assert not wrong, "\n".join(wrong)


def _same(made: Any, stored: Any) -> bool:
    if isinstance(made, float) and isinstance(stored, float):
        return made == pytest.approx(stored, rel=1e-6)
    return type(made) is type(stored) and made == stored
