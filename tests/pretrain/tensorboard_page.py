"""Takes a screenshot of the first TensorBoard page of a run, with a real server and a real browser.

    python tests/pretrain/tensorboard_page.py runs/tiny docs/tensorboard.png

Needs Chromium (packages.txt). This command makes the picture in docs/monitoring.md.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

START_SECONDS, PAGE_SECONDS = 120, 240
# Without these options Chromium contacts its maker's hosts at every start. The last one gives the page time to draw.
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--virtual-time-budget=20000")  # fmt: skip
COLOURS = 64  # of the saved picture


class Board:
    """A TensorBoard server on the loopback address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> Any:
        """Returns the JSON of a route."""
        return json.loads(self.read(path))

    def read(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def screenshot(self, path: Path, page: str = "#custom_scalars", size: tuple[int, int] = (1560, 1130)) -> None:
        """Writes a PNG of a page. ``size`` is that of the window, in pixels."""
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            raise FileNotFoundError("chromium is not installed: apt-get install chromium")
        with tempfile.TemporaryDirectory() as profile:
            window = f"--window-size={size[0]},{size[1]}"
            command = [browser, *QUIET, f"--user-data-dir={profile}", window, f"--screenshot={path}"]
            done = subprocess.run(
                [*command, f"{self.url}/{page}"], capture_output=True, text=True, timeout=PAGE_SECONDS, check=False
            )
        if not path.is_file():
            raise RuntimeError(f"Chromium wrote no picture: {done.stderr}")


@contextmanager
def tensorboard(run: Path) -> Iterator[Board]:
    """Serves the run directory until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--samples_per_plugin", "scalars=10000,images=100"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    board = Board(f"http://127.0.0.1:{port}")
    try:
        wait_for(board, server)
        yield board
    finally:
        server.terminate()
        server.wait()


def wait_for(board: Board, server: subprocess.Popen[str]) -> None:
    """Waits until the server has read the run. Raises RuntimeError if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if board.get("data/plugin/scalars/tags"):
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    server.terminate()
    raise RuntimeError(f"TensorBoard does not show the run: {server.communicate()[0]}")


def main(run: Path, picture: Path) -> None:
    with tensorboard(run) as board:
        board.screenshot(picture)
    flat = Image.open(picture).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    flat.save(picture, optimize=True)
    print(f"{picture}: {flat.width} x {flat.height}, {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
