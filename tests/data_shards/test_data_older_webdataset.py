"""img2dataset and open_clip's training extra need webdataset 0.2, and we run with 1.0: both versions are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OLDER = "0.2.86"
ROOT = Path(__file__).resolve().parents[2]
TESTS = (  # those that read our shards by webdataset, or compare our rules with its own
    "test_data_pack.py::test_webdataset_and_tarfile_read_the_shards",
    "test_data_pack.py::test_keys_with_dots_unicode_and_doubles",
    "test_data_verify.py::test_keys_are_cut_as_webdataset_cuts_them",
)


def test_the_tests_with_webdataset_pass_with_the_older_version(tmp_path: Path) -> None:
    """The older version is installed into a folder of its own, which comes first on the path of the tests."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path / "older", f"webdataset=={OLDER}"], check=True, timeout=120)
    assert (tmp_path / "older" / f"webdataset-{OLDER}.dist-info").is_dir()
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "older"), str(ROOT)))}
    code = "import sys, webdataset; print(webdataset.__file__); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    names = [f"tests/data_shards/{name}" for name in TESTS]
    words = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith(str(tmp_path / "older")), done.stdout[:200]
    assert "5 passed" in done.stdout  # the last one has three cases
