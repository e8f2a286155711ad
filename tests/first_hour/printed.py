"""Which lines of a command docs/printed.md does not explain."""

import re

from first_hour.pages import ROOT


def unexplained(printed: str) -> list[str]:
    """The lines that fit no first cell of the page's tables, where … stands for anything."""
    page = (ROOT / "docs" / "printed.md").read_text()
    shown = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    forms = [re.compile(".*".join(map(re.escape, line.split("…")))) for line in shown]
    return [line for line in printed.splitlines() if line and not any(form.fullmatch(line) for form in forms)]
