"""Chats in Chromium (Qt WebEngine, without a screen): python browser.py URL KEY. Needs `pip install pyside6-webengine`.

Prints one JSON object: messages of the console, the turns that stand on the page after a question, after one that was
stopped, and after one with a wrong key, and its width at 400 pixels.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --hide-scrollbars")

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

TURNS = '[...document.querySelectorAll(".turn")].map((turn) => [turn.className, turn.textContent])'
SEND = 'document.getElementById("send")'


class Page(QWebEnginePage):
    """Keeps what the page says to the console."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
        self.messages.append(f"{message} (line {line})")


def main(url: str, key: str) -> None:
    app = QApplication(sys.argv[:1])
    view, page = QWebEngineView(), Page()
    view.setPage(page)
    view.resize(400, 900)
    view.show()
    wait = QEventLoop()
    page.loadFinished.connect(wait.quit)
    page.load(QUrl(url))
    wait.exec()
    seen: dict[str, Any] = {"width": evaluate(page, "document.documentElement.scrollWidth")}
    until(page, 'document.getElementById("model").textContent !== "…"')
    seen["locked"] = evaluate(page, 'document.getElementById("model").textContent')
    page.messages.clear()  # Chromium says itself that a request was refused
    write(page, "key", key)
    write(page, "tokens", "20")
    ask(page, "Peace?")
    until(page, f'{SEND}.textContent === "Send"')
    seen["answered"] = evaluate(page, TURNS)
    write(page, "tokens", "400")
    ask(page, "And war?")
    until(page, f"({TURNS}).at(-1)[1].length > 3")
    evaluate(page, f"{SEND}.click()")
    until(page, f'{SEND}.textContent === "Send"')
    seen["stopped"] = evaluate(page, TURNS)
    seen["messages"] = page.messages[:]
    write(page, "key", "wrong")
    ask(page, "<b>Hello</b>")
    until(page, 'document.querySelector(".error") !== null')
    seen["refused"] = evaluate(page, TURNS)
    seen["bold"] = evaluate(page, 'document.querySelectorAll("b").length')
    print(json.dumps(seen))
    view.deleteLater()
    app.processEvents()
    sys.stdout.flush()
    os._exit(0)  # Qt's own end waits for its helper processes


def write(page: QWebEnginePage, field: str, value: str) -> None:
    evaluate(page, f'(document.getElementById("{field}").value = {json.dumps(value)})')


def ask(page: QWebEnginePage, text: str) -> None:
    write(page, "text", text)
    evaluate(page, f"{SEND}.click()")
    pause(50)


def until(page: QWebEnginePage, condition: str) -> None:
    end = time.monotonic() + 60
    while not evaluate(page, condition):
        assert time.monotonic() < end, condition
        pause(50)


def evaluate(page: QWebEnginePage, script: str) -> Any:
    """The value of a JavaScript expression in the page."""
    wait, result = QEventLoop(), []

    def done(value: Any) -> None:
        result.append(value)
        wait.quit()

    page.runJavaScript(f"JSON.stringify({script} ?? null)", 0, done)
    if not result:
        wait.exec()
    return json.loads(result[0] or "null")


def pause(milliseconds: int) -> None:
    wait = QEventLoop()
    QTimer.singleShot(milliseconds, wait.quit)
    wait.exec()


if __name__ == "__main__":
    main(*sys.argv[1:])
