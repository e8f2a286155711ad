"""Chats in Chromium, without a screen: python -m serving.browser URL KEY, in tests/.

Prints one JSON object: messages of the console, the turns that stand on the page after a question, after one that was
stopped, and after one with a wrong key, what a new chat begins with that was asked for during an answer, and the page's
width at 400 pixels.
"""

import json
import sys
import time
from typing import Any

from chromium import Browser, pause
from PySide6.QtCore import QUrl

TURNS = '[...document.querySelectorAll(".turn")].map((turn) => [turn.className, turn.textContent])'
SEND = 'document.getElementById("send")'
CLEAR = 'document.getElementById("clear").click()'


def main(url: str, key: str) -> None:
    browser = Browser(QUrl(url), 400)
    seen: dict[str, Any] = {"width": browser.evaluate("document.documentElement.scrollWidth")}
    until(browser, 'document.getElementById("model").textContent !== "…"')
    seen["locked"] = browser.evaluate('document.getElementById("model").textContent')
    browser.page.messages.clear()  # Chromium says itself that a request was refused
    write(browser, "key", key)
    write(browser, "tokens", "20")
    ask(browser, "Peace?")
    until(browser, f'{SEND}.textContent === "Send"')
    seen["answered"] = browser.evaluate(TURNS)
    write(browser, "tokens", "400")
    ask(browser, "And war?")
    until(browser, f"({TURNS}).at(-1)[1].length > 3")
    browser.evaluate(f"{SEND}.click()")
    until(browser, f'{SEND}.textContent === "Send"')
    seen["stopped"] = browser.evaluate(TURNS)
    browser.evaluate(CLEAR)
    ask(browser, "And after it?")
    until(browser, f"({TURNS}).at(-1)[1].length > 3")
    seen["under way"] = browser.evaluate(f"{SEND}.textContent")
    browser.evaluate(CLEAR)
    seen["sends"] = browser.evaluate(f"{SEND}.textContent")
    pause(500)  # the answer has ended
    seen["new"] = browser.evaluate(f"[messages, {TURNS}]")
    write(browser, "tokens", "5")
    ask(browser, "Anew")
    until(browser, f'{SEND}.textContent === "Send"')
    seen["anew"] = browser.evaluate("messages.map((message) => message.role)")
    seen["messages"] = browser.page.messages[:]
    write(browser, "key", "wrong")
    ask(browser, "<b>Hello</b>")
    until(browser, 'document.querySelector(".error") !== null')
    seen["refused"] = browser.evaluate(TURNS)
    seen["bold"] = browser.evaluate('document.querySelectorAll("b").length')
    browser.end(seen)


def write(browser: Browser, field: str, value: str) -> None:
    browser.evaluate(f'(document.getElementById("{field}").value = {json.dumps(value)})')


def ask(browser: Browser, text: str) -> None:
    write(browser, "text", text)
    browser.evaluate(f"{SEND}.click()")
    pause(50)


def until(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 60
    while not browser.evaluate(condition):
        assert time.monotonic() < end, condition
        pause(50)


if __name__ == "__main__":
    main(*sys.argv[1:])
