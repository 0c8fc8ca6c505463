"""img2dataset itself downloads images from a server of this machine; its tars are read as they are, and packed.

It needs webdataset below 0.3, pandas below 3 and albumentations below 2, so it lives in a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from remote_server import serving
from small_data import encoded, picture

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main

PINS = (
    "img2dataset==1.47.0", "webdataset==0.2.86", "fire==0.7.1", "termcolor==3.1.0", "exifread-nocycle==3.0.1",
    "albumentations==1.4.24", "albucore==0.0.23", "stringzilla==3.11.3", "simsimd==6.5.3",
    "opencv-python-headless==4.11.0.86",
)  # fmt: skip
DOWNLOAD = """
import sys
from img2dataset import download

download(url_list=sys.argv[1], input_format="parquet", url_col="url", caption_col="caption", output_format="webdataset",
         save_additional_columns=["lat", "lon", "time", "gsd"], output_folder="tars", resize_mode="no",
         skip_reencode=True, processes_count=1, thread_count=2, retries=0)
"""


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images and one that the server does not have, as tars."""
    folder = tmp_path_factory.mktemp("img2dataset")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*pip, "--target", str(folder / "own"), *PINS], check=True, timeout=240)
    (folder / "images").mkdir()
    for number in range(5):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(picture(number), quality=92))
    with serving(folder / "images") as server:
        table = {
            "url": [f"{server.url}/{number}.jpg" for number in range(6)],
            "caption": [f"a field, number {number}" for number in range(6)],
            "lat": [46.0 + number for number in range(6)],
            "lon": [7.0] * 6,
            "time": ["2019-07-01T12:30:00+02:00"] * 6,
            "gsd": [0.5] * 6,
        }
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "table.parquet")
        variables = {**os.environ, "PYTHONPATH": str(folder / "own"), "NO_ALBUMENTATIONS_UPDATE": "1"}
        words = [sys.executable, "-c", DOWNLOAD, str(folder / "table.parquet")]
        done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_what_img2dataset_writes_is_packed_with_its_columns(downloaded: Path, tmp_path: Path) -> None:
    words = ["pack", "--source", "webdataset", "--shards", str(downloaded / "tars"), "--output", str(tmp_path / "out")]
    assert main([*words, "--workers", "1", "--keep-columns", "lat,lon,time,gsd"]) == 0
    shards = ShardSet(str(tmp_path / "out"))
    samples = sorted((shards.read(number) for number in range(len(shards))), key=lambda sample: sample.captions)
    assert [sample.captions for sample in samples] == [[f"a field, number {number}"] for number in range(5)]
    for number, sample in enumerate(samples):
        assert sample.image == (downloaded / "images" / f"{number}.jpg").read_bytes()
        assert sample.info["footprint"] == {"type": "Point", "coordinates": [7.0, 46.0 + number]}
        assert sample.info["acquired"] == "2019-07-01T10:30:00"
        assert sample.info["gsd"] == 0.5


def test_the_tars_of_img2dataset_train_as_they_are(downloaded: Path) -> None:
    shards = ShardSet(str(downloaded / "tars"))
    captions = sorted(shards.captions(number)[0] for number in range(len(shards)))
    assert captions == [f"a field, number {number}" for number in range(5)]
