"""Opens a page in Chromium, without a screen, and tells what it sees: python -m report.browser PAGE FOLDER, in tests/.

Writes FOLDER/WIDTH.png, and prints one JSON object: messages of the console, a measurement of the page a width, and
what became of its charts as the controls were used.
"""

import pathlib
import sys
from typing import Any

from chromium import Browser, pause
from PySide6.QtCore import QUrl

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


def main(path: str, folder: str) -> None:
    browser = Browser(QUrl.fromLocalFile(str(pathlib.Path(path).resolve())), WIDTHS[0])
    seen: dict[str, Any] = {"widths": {}, "uses": {}}
    for width in WIDTHS:
        browser.view.resize(width, 900)
        pause(400)
        height = browser.evaluate(MEASURE)["height"]
        browser.view.resize(width, min(height, 12000))  # a picture of the whole page
        pause(800)
        seen["widths"][width] = browser.evaluate(MEASURE)
        browser.view.grab().save(str(pathlib.Path(folder) / f"{width}.png"))
    seen["uses"]["start"] = browser.evaluate(STATE)
    for name, script in USES.items():
        browser.evaluate(f"(() => {{ {script} }})()")
        pause(100)
        seen["uses"][name] = browser.evaluate(STATE)
    seen["messages"] = browser.page.messages
    browser.end(seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
