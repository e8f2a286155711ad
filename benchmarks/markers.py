"""What a page of docs/ says between markers is made from results; the rest of it is written by hand."""

import pathlib
from collections.abc import Iterable

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def put(page: pathlib.Path, parts: Iterable[str], title: str = "") -> None:
    """Writes them in place of what stands between the markers; a page that is not there begins with its title."""
    text = page.read_text() if page.exists() else f"{title}{BEGIN}\n{END}\n"
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{''.join(parts)}\n{END}{after}")
