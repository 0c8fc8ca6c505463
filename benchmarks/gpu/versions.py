"""Versions of the packages that decide the figures, and the commit of this checkout.

versions()    # {"python": "3.11.9", "torch": "2.14.1", "open_clip_torch": None, ...}
commit()      # "d2999fb0..." or, with changes that are not committed, "d2999fb0... and changes"
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "open_clip_torch", "timm", "transformers", "triton")


def versions() -> dict[str, str | None]:
    """Returns the version of Python and of each package; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Returns the commit of this checkout, None if git does not know it."""
    folder = Path(__file__).resolve().parents[2]
    words = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*words, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} and changes" if changes.stdout.strip() else head
