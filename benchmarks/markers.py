"""What a page of docs/ says between markers is made from results; the rest of it is written by hand."""

import pathlib
from collections.abc import Iterable


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put(page: pathlib.Path, parts: Iterable[str], title: str = "", name: str = "results") -> None:
    """Replaces what stands between the markers of that name; a missing page is made and begins with the title."""
    page.parent.mkdir(parents=True, exist_ok=True)
    begin, end = markers(name)
    text = page.read_text() if page.exists() else f"{title}{begin}\n{end}\n"
    before, after = text.partition(begin)[0], text.partition(end)[2]
    page.write_text(f"{before}{begin}\n{''.join(parts)}\n{end}{after}")
