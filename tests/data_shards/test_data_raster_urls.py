"""Scenes of a server: only the needed parts are read, and secrets of their URLs appear nowhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from remote_server import RemoteServer, serving
from small_rasters import write_raster

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.rasters.band_file import read_bands
from priorclip.data_shards.sources.scenes import url_scenes

SIDE = 1024
SECRETS = ("hunter2", "9f8e7d")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RemoteServer, Path]]:
    """A scene of 4 MB that does not compress, in tiles of 64 pixels, behind a user name and a signature."""
    folder = tmp_path_factory.mktemp("served")
    values = np.random.default_rng(0).integers(1, 9000, (2, SIDE, SIDE), np.uint16)
    path = write_raster(folder / "north/a.tif", values, names=("red", "nir"), tiled=True, blockxsize=64, blockysize=64)
    with serving(folder) as server:
        server.behaviour.check = check
        yield server, path


def check(path: str, headers: dict[str, str]) -> int | None:
    wanted = "Basic " + base64.b64encode(b"me:hunter2").decode()
    return None if headers.get("authorization") == wanted and "sig=9f8e7d" in path else 401


def pack(url: str, output: Path, *more: str) -> int:
    words = ["pack", "--source", "raster", "--images", url, "--output", str(output), "--tile", "64", "--workers", "1"]
    return main([*words, *more])


def with_secrets(server: RemoteServer, name: str = "north/a.tif") -> str:
    return f"{server.url.replace('://', '://me:hunter2@')}/{name}?sig=9f8e7d"


def test_only_the_needed_windows_are_read_and_no_secret_is_told(
    served: tuple[RemoteServer, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, path = served
    assert pack(with_secrets(server), tmp_path / "out", "--image-format", "tiff", "--limit", "3") == 0
    sent = [row for row in server.of(r"a\.tif$") if row.status == 206]
    assert all(row.range for row in sent)
    assert sum(row.sent for row in server.asked) < path.stat().st_size / 5
    shards = ShardSet(str(tmp_path / "out"))
    assert len(shards) == 3
    with rasterio.open(path) as file:
        for number in range(3):
            sample = shards.read(number)
            x, y, wide, high = sample.info["window"]
            expected = file.read(window=((y, y + high), (x, x + wide)))
            assert np.array_equal(read_bands(sample.image, ("red", "nir"), lambda w, h: (0, 0, w, h), 10**6), expected)
            assert sample.info["scene"] == f"{server.url.removeprefix('http://')}/north/a.tif"
            assert sample.key.split("/", 1)[1] == f"north/a/{y:06d}-{x:06d}"
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    said = "".join(capfd.readouterr()) + caplog.text
    for secret in SECRETS:
        assert secret not in said
        assert secret.encode() not in written


def test_a_scene_that_a_server_does_not_give_is_named_without_secrets(
    served: tuple[RemoteServer, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, _ = served
    both = f"{with_secrets(server)},{with_secrets(server, 'north/missing.tif')}"
    assert pack(both, tmp_path / "out", "--value-range", "0,9000", "--limit", "2", "--max-bad-share", "0.5") == 0
    assert "north/missing.tif is left out" in caplog.text
    assert json.loads((tmp_path / "out/manifest.json").read_text())["samples"] >= 1
    assert pack(f"{server.url}/north/a.tif?sig=9f8e7d", tmp_path / "none") == 2  # no password
    said = "".join(capfd.readouterr()) + caplog.text
    assert "none of 1 scenes of 1 URLs can be read" in said
    assert not any(secret in said for secret in SECRETS)


def test_a_server_without_ranges_is_refused(served: tuple[RemoteServer, Path], tmp_path: Path) -> None:
    server, _ = served
    server.behaviour.ranges, server.behaviour.only = False, "none"
    try:
        assert pack(with_secrets(server).replace("sig", "other=1&sig"), tmp_path / "out") == 2
    finally:
        server.behaviour.ranges = True


def test_urls_become_names_without_secrets() -> None:
    assert url_scenes("scenes") == []
    assert url_scenes(["scenes"]) == []
    urls = "https://me:hunter2@host:8/a,b.tif?sig=1,https://other/c.tif"
    assert url_scenes(urls) == [
        ("https://me:hunter2@host:8/a,b.tif?sig=1", "host:8/a,b.tif"),
        ("https://other/c.tif", "other/c.tif"),
    ]
    for wrong in (
        "s3://bucket/a.tif",
        ["https://host/a.tif", "scenes"],
        "file:///etc/a.tif",
        "https://me:a/b@host/c.tif",
    ):
        with pytest.raises(ValueError, match=r"scenes are read from a folder, http:// and https://"):
            url_scenes(wrong)
