"""A page in Chromium (Qt WebEngine), without a screen; for scripts of their own, since Qt ends with its process.

Needs `pip install pyside6-webengine` and no display.
"""

import json
import os
import sys
from typing import Any, NoReturn

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --hide-scrollbars")

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication


class Page(QWebEnginePage):
    """Keeps what the page says to the console."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
        self.messages.append(f"{message} (line {line})")


class Browser:
    """A window with a page, loaded."""

    def __init__(self, url: QUrl, width: int):
        self._app = QApplication(sys.argv[:1])
        self.view, self.page = QWebEngineView(), Page()
        self.view.setPage(self.page)
        self.view.resize(width, 900)
        self.view.show()
        wait = QEventLoop()
        self.page.loadFinished.connect(wait.quit)
        self.page.load(url)
        wait.exec()

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        wait, result = QEventLoop(), []

        def done(value: Any) -> None:
            result.append(value)
            wait.quit()

        self.page.runJavaScript(f"JSON.stringify({script} ?? null)", 0, done)
        if not result:
            wait.exec()
        return json.loads(result[0] or "null")

    def end(self, seen: dict[str, Any]) -> NoReturn:
        """Prints what was seen, and ends the process."""
        print(json.dumps(seen), flush=True)
        self.view.deleteLater()
        self._app.processEvents()
        os._exit(0)  # Qt's own end waits for its helper processes


def pause(milliseconds: int) -> None:
    wait = QEventLoop()
    QTimer.singleShot(milliseconds, wait.quit)
    wait.exec()
