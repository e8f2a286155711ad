"""report.html: runs side by side in one page that needs no network and no library."""

import json
import pathlib
from collections.abc import Sequence
from html import escape

from bigmac_jax.config import ConfigError
from bigmac_jax.report import tables
from bigmac_jax.report.runs import Run
from bigmac_jax.report.series import chart_data
from bigmac_jax.runtime import storage

_WEB = pathlib.Path(__file__).parent / "web"


def write_page(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Writes the page of some runs to a file; raises ConfigError if that fails."""
    html = page(runs)
    try:
        # Not whole or nothing on a disk: the output may be a pipe. Names of folders and files may be no UTF-8.
        path.write_bytes(html.encode(errors="replace"))
    except storage.errors() as error:
        raise ConfigError(
            f"--output={path} cannot be written ({storage.reason(error)}); give a file in a folder that exists"
        ) from None


def page(runs: Sequence[Run]) -> str:
    """The whole page: style, script, tables and the curves as JSON."""
    data = {"runs": [{"letter": tables.letter(i)} | chart_data(run) for i, run in enumerate(runs)]}
    parts = {
        "style": _read("page.css"),
        "script": _read("charts.js") + _read("loads.js"),
        "title": escape(", ".join(run.name for run in runs)),
        "summary": tables.summary(runs),
        "times": tables.times(runs),
        "configuration": tables.configuration(runs),
        "data": embed_json(data),
    }
    html = _read("page.html")
    head, *pieces = html.split("{{")  # each marker once, so that nothing inside a part is taken for one
    return head + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))


def embed_json(data: object) -> str:
    """Writes JSON that may stand inside a script element: no string in it can end the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")
