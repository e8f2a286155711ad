"""Opens a page in Chromium (Qt WebEngine, without a screen) and tells what it sees: python browser.py PAGE FOLDER.

Writes FOLDER/WIDTH.png, and prints one JSON object: messages of the console, a measurement of the page a width, and
what became of its charts as the controls were used. Needs `pip install pyside6-webengine` and no display.
"""

import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --hide-scrollbars")

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

WIDTHS = (1280, 400)
MEASURE = """(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  return {
    inner: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    charts: all("figure.chart").filter((f) => f.offsetParent).map((f) => f.dataset.key), maps: all("canvas").length,
    readouts: all(".chart .readout").map((p) => p.textContent),
    spilt: all("svg text").filter((t) => t.getBoundingClientRect().right > innerWidth).length,
  };
})()"""
CHART = 'document.querySelector("figure.chart").querySelector("svg")'
USES = {
    "tokens": 'document.querySelector("[value=tokens]").click()',
    "hours": 'document.querySelector("[value=hours]").click()',
    "log": 'document.querySelector("[name=log]").click()',
    "smooth": 'const r = document.querySelector("[name=smoothing]"); r.value = 0.9;'
    ' r.dispatchEvent(new Event("input", {bubbles: true}))',
    "key": f'{CHART}.dispatchEvent(new KeyboardEvent("keydown", {{key: "Home"}}))',
    "zoom": f"""{{const s = {CHART}, box = s.getBoundingClientRect();
      for (const [type, at] of [["pointerdown", 0.4], ["pointermove", 0.6], ["pointerup", 0.7]])
        s.dispatchEvent(new PointerEvent(type, {{pointerId: 1, pointerType: "mouse", bubbles: true,
          clientX: box.left + at * box.width, clientY: box.top + 50}}))}}""",
    "hide": 'document.querySelector("[name=visible]")?.click()',
}
STATE = f"""({{
  curve: {CHART}.querySelector(".curve:not(.raw)").getAttribute("d"), raw: document.querySelectorAll(".raw").length,
  ticks: [...{CHART}.querySelectorAll("text")].map((t) => t.textContent),
  readout: document.querySelector(".chart .readout").textContent,
  zoomed: !document.querySelector("[name=whole]").hidden,
}})"""


class Page(QWebEnginePage):
    """Keeps what the page says to the console."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
        self.messages.append(f"{message} (line {line})")


def main(path: str, folder: str) -> None:
    app = QApplication(sys.argv[:1])
    view, page = QWebEngineView(), Page()
    view.setPage(page)
    view.resize(WIDTHS[0], 900)
    view.show()
    wait = QEventLoop()
    page.loadFinished.connect(wait.quit)
    page.load(QUrl.fromLocalFile(str(pathlib.Path(path).resolve())))
    wait.exec()
    seen: dict[str, Any] = {"widths": {}, "uses": {}}
    for width in WIDTHS:
        view.resize(width, 900)
        pause(400)
        height = evaluate(page, MEASURE)["height"]
        view.resize(width, min(height, 12000))  # a picture of the whole page
        pause(800)
        seen["widths"][width] = evaluate(page, MEASURE)
        view.grab().save(str(pathlib.Path(folder) / f"{width}.png"))
    seen["uses"]["start"] = evaluate(page, STATE)
    for name, script in USES.items():
        evaluate(page, f"(() => {{ {script} }})() ?? null")
        pause(100)
        seen["uses"][name] = evaluate(page, STATE)
    seen["messages"] = page.messages
    print(json.dumps(seen))
    view.deleteLater()
    app.processEvents()
    os._exit(0)  # Qt's own end waits for its helper processes


def evaluate(page: QWebEnginePage, script: str) -> Any:
    """The value of a JavaScript expression in the page."""
    wait, result = QEventLoop(), []

    def done(value: Any) -> None:
        result.append(value)
        wait.quit()

    page.runJavaScript(f"JSON.stringify({script})", 0, done)
    if not result:
        wait.exec()
    return json.loads(result[0] or "null")


def pause(milliseconds: int) -> None:
    wait = QEventLoop()
    QTimer.singleShot(milliseconds, wait.quit)
    wait.exec()


if __name__ == "__main__":
    main(*sys.argv[1:])
