"""Takes pictures of the first page of the site, in light and in dark colours, with a real browser.

    python -m tests.site_page docs/first-page.png docs/first-page-dark.png

Needs Chromium (packages.txt). This command makes the pictures in CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from tests.browser import browser
from tests.served import served

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1280, 900)  # of the window
COLOURS = 64  # of a saved picture
SCHEMES = {"light": "default", "dark": "slate"}  # colours of browsers -> their names in mkdocs-material
READY = "document.readyState === 'complete' && document.fonts.status === 'loaded'"


def build(folder: Path) -> None:
    """Builds the site as `make docs` does. Raises RuntimeError with what mkdocs said if it fails or warns."""
    # As the Makefile does: this program does not look for modules in the working directory.
    words = [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0 or "WARNING" in done.stderr:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and prints no line for each."""

    def log_message(self, format: str, *args: object) -> None: ...


def take_pictures(site: Path, pictures: tuple[Path, Path]) -> list[str]:
    """Writes the first page in both colours, and returns the addresses that the browser asked for.

    Args:
        site: folder of the site
        pictures: PNG files, of the light and of the dark page
    Raises:
        RuntimeError: the page has errors
    """
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    with served(server):  # read from a file, the page has no search
        for (scheme, name), picture in zip(SCHEMES.items(), pictures, strict=True):
            with browser(*SIZE) as page:  # another one, because the page remembers its colours
                page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                page.open(f"http://127.0.0.1:{server.server_port}/index.html")
                page.wait(f"{READY} && document.body.dataset.mdColorScheme === '{name}'")
                page.wait("document.querySelector('[data-md-component=search]').offsetWidth > 0")
                page.screenshot(picture)
                asked += page.requests
                if page.errors:
                    raise RuntimeError(f"the first page has errors: {page.errors}")
            flat = Image.open(picture).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            flat.save(picture, optimize=True)
    return asked


def main(light: Path, dark: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        take_pictures(Path(folder), (light, dark))
    for picture in (light, dark):
        print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
