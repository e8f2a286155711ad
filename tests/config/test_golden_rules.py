"""What the rules say of thousands of values is what is stored (tests/config/golden_rules.py)."""

from . import golden_rules


def test_rules_are_as_stored() -> None:
    assert "\n".join(golden_rules.lines()) + "\n" == golden_rules.FILE.read_text()
