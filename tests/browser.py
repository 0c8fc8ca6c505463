"""A real headless Chromium that a test drives by mouse and keyboard, over the pipe of its DevTools protocol.

    with browser(1400, 1000) as page:
        page.open("http://127.0.0.1:8008/?text=river")
        page.wait("document.querySelectorAll('#hits li').length === 24")
        page.click("#draw")
        page.drag((900, 300), (1000, 400))
        page.press("Enter")
        page.requests        addresses that the page asked for

Needs Chromium (packages.txt).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 120  # for one step on a busy machine
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe")  # fmt: skip


class Page:
    """A tab. ``requests`` are what it asked for, ``missing`` what of that it did not get, ``errors`` what went
    wrong in it."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number = to, back, b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.missing: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        return self._call(method, params, self._session)

    def _call(self, method: str, params: dict[str, Any], session: str | None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif message.get("method") == "Network.responseReceived" and told["response"]["status"] >= 400:
            self.missing.append(f"{told['response']['status']} {told['response']['url']}")
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        return message

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}; errors: {self.errors}")
            time.sleep(0.05)

    def middle(self, selector: str) -> tuple[float, float]:
        """Returns the middle of an element in the window, after it was scrolled into view."""
        place = f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "nearest"}});
            const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        x, y = self.value(place)
        return x, y

    def mouse(self, kind: str, place: tuple[float, float], buttons: int = 0) -> None:
        pressed = {"button": "left", "buttons": buttons, "clickCount": 1} if kind != "mouseMoved" or buttons else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **pressed)

    def hover(self, selector: str) -> None:
        self.mouse("mouseMoved", self.middle(selector))

    def click(self, selector: str) -> None:
        place = self.middle(selector)
        self.drag(place, place)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("mouseMoved", start)
        self.mouse("mousePressed", start, 1)
        if end != start:
            self.mouse("mouseMoved", ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), 1)
            self.mouse("mouseMoved", end, 1)
        self.mouse("mouseReleased", end)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(width: int, height: int) -> Iterator[Page]:
    """Opens a window of this size, and closes it at the end of the block."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise FileNotFoundError("chromium is not installed: apt-get install chromium")
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        shell = f'exec 3<&{to_read} 4>&{back_write}; exec "$@"'  # Chromium reads 3 and writes 4
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words], pass_fds=(to_read, back_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(back_write)
        try:
            yield Page(to_write, back_read)
        finally:
            process.terminate()
            process.wait(30)
            os.close(to_write)
            os.close(back_read)
