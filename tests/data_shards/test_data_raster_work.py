"""Rasters of a few kilobytes that ask for hours or for all memory, and files beside a raster that name other places."""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from remote_server import noting_server
from small_rasters import reflectance, write_raster

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image, upright_rgb
from priorclip.data_shards.rasters.values import DEFAULT
from priorclip.data_shards.sources.record import Missing, load
from priorclip.data_shards.sources.scenes import open_scene, raster, tiles
from priorclip.data_shards.sources.tile_texts import TextSource

pytestmark = pytest.mark.filterwarnings("ignore")


def sparse(path: Path, wide: int, high: int, bands: int = 1, **options: Any) -> Path:
    """A raster of which no block is stored."""
    size = {"width": wide, "height": high, "count": bands, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", sparse_ok=True, bigtiff="yes", **size, **options):
        pass
    return path


TILED = {"tiled": True, "blockxsize": 16384, "blockysize": 16384}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "a long line": ({"wide": 5_000_000, "high": 16, "blockysize": 1}, "too many pixels: 5000000 x 16, limit 4194304"),
    "a long column": ({"wide": 16, "high": 5_000_000, "blockysize": 5_000_000}, "too many pixels: 16 x 5000000"),
    "a trillion pixels": ({"wide": 1_000_000, "high": 1_000_000, **TILED}, "too many tiles: 15256836, limit 1048576"),
    "a trillion pixels of one band in blocks": ({"wide": 4_000_000, "high": 300_000, **TILED}, "too many tiles: "),
    "bands": ({"wide": 16, "high": 16, "bands": 5000}, "unsupported raster: 5000 bands, limit 4096"),
    "lines of all bands": (
        {"wide": 1_000_000, "high": 1000, "bands": 60, "interleave": "pixel", "blockysize": 1},
        r"slow to decode: \d+ MB to unpack for a tile, limit 4096 MB",
    ),
    "a block": (
        {"wide": 32768, "high": 32768, "tiled": True, "blockxsize": 32768, "blockysize": 32768},
        "too many pixels: one block",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_scene_that_would_take_hours_or_all_memory_is_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, said = BOMBS[name]
    path = sparse(tmp_path / "a.tif", **options)
    begun = time.thread_time()
    (left_out,) = tiles(tmp_path, path.name, DEFAULT, 256, 256, 90, TextSource())
    assert isinstance(left_out.image, Missing)
    assert time.thread_time() - begun < 3
    assert caplog.records[-1].getMessage().startswith("a.tif is left out: ")
    assert re.search(said, caplog.text)


def many_bands(wide: int, high: int, bands: int) -> bytes:
    """A TIFF whose lines are all the same compressed bytes."""
    line = zlib.compress(bytes(wide * bands), 9)
    offsets = struct.pack(f"<{high}I", *[8] * high)
    sizes = struct.pack(f"<{high}I", *[len(line)] * high)
    bits = struct.pack(f"<{bands}H", *[8] * bands)
    first = 8 + len(line)
    second = first + len(offsets)
    third = second + len(sizes)
    directory = third + len(bits)
    rows = [(256, 4, 1, wide), (257, 4, 1, high), (258, 3, bands, third), (259, 3, 1, 8), (262, 3, 1, 1)]
    rows += [(273, 4, high, first), (277, 3, 1, bands), (278, 4, 1, 1), (279, 4, high, second), (284, 3, 1, 1)]
    entries = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(4)
    return b"II*\0" + struct.pack("<I", directory) + line + offsets + sizes + bits + entries


def test_an_image_of_many_bands_is_refused_before_they_are_unpacked() -> None:
    data = many_bands(1000, 4000, 4000)  # 16 GB, in 44 kB
    assert len(data) < 100_000
    begun = time.thread_time()
    with pytest.raises(BadSample, match=r"slow to decode: .* 15258 MB to unpack, limit 3051 MB"), open_image(data):
        pass
    assert time.thread_time() - begun < 3
    with open_image(many_bands(40, 30, 200)) as image:
        assert upright_rgb(image).size == (40, 30)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """An address, and the requests that came to it."""
    with noting_server() as found:
        yield found


def virtual(source: str) -> str:
    band = f"<SimpleSource><SourceFilename relativeToVRT='0'>{source}</SourceFilename><SourceBand>1</SourceBand>"
    return (
        "<VRTDataset rasterXSize='80' rasterYSize='64'><VRTRasterBand dataType='Byte' band='1'>"
        f"{band}</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def hostile_texts(address: str, secret: Path) -> dict[str, str]:
    """Content of files that GDAL would follow to another file or to a server."""
    entity = f'<!DOCTYPE x [<!ENTITY e SYSTEM "{address}/entity">]>'
    return {
        "virtual": virtual(f"/vsicurl/{address}/a.tif"),
        "virtual file": virtual(str(secret)),
        "entity": f"<?xml version='1.0'?>{entity}<PAMDataset><Metadata>&e;</Metadata></PAMDataset>",
        "overview": f"<PAMDataset><Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>/vsicurl/{address}/o.tif</MDI>"
        f"</Metadata></PAMDataset>",
        "service": f"<GDAL_WMS><Service name='TMS'><ServerUrl>{address}/${{z}}</ServerUrl></Service></GDAL_WMS>",
        "python": "<VRTDataset rasterXSize='1' rasterYSize='1'><VRTRasterBand band='1' subClass='VRTDerivedRasterBand'>"
        "<PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionType>f</PixelFunctionType>"
        "<PixelFunctionCode>import os; os.mkdir('executed')</PixelFunctionCode></VRTRasterBand></VRTDataset>",
    }


NEIGHBOURS = ("a.tif.aux.xml", "a.aux.xml", "a.tif.ovr", "a.tif.msk", "a.ovr", "a.vrt", "a.tif.vrt", "a.aux", "a.imd")


@pytest.mark.parametrize("kind", ["virtual", "virtual file", "entity", "overview", "service", "python"])
def test_neither_a_scene_nor_its_neighbours_name_another_place(
    kind: str, tmp_path: Path, asked: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scene that is no raster is left out; beside another, nothing is read."""
    monkeypatch.chdir(tmp_path)
    address, requests = asked
    secret = write_raster(tmp_path / "secret.tif", np.full((1, 64, 80), 200, np.uint8))
    text = hostile_texts(address, secret)[kind]
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for folder in (alone, beside):
        write_raster(folder / "a.tif", reflectance(3, top=200).astype(np.uint8))
    for name in NEIGHBOURS:
        (beside / name).write_text(text)
    (beside / "b.tif").write_text(text)
    (beside / "c.jp2").write_text(text)
    every = [raster(folder, DEFAULT, tile=64, max_bad_share=1) for folder in (alone, beside)]
    left_out = [record.key for record in every[1] if isinstance(record.image, Missing)]
    assert sorted(left_out) == ["a", "a_tif", "b", "c"], "two virtual rasters, and two files that are no rasters"
    found = [[record for record in records if not isinstance(record.image, Missing)] for records in every]
    assert [record.key for record in found[1]] == [record.key for record in found[0]]
    pictures = [[load(record).image for record in records] for records in found]
    assert pictures[0] == pictures[1]
    for name in ("b.tif", "c.jp2"):
        with pytest.raises(BadSample, match=name), open_scene(beside, name, DEFAULT):
            pass
    with pytest.raises(BadSample), open_image(text.encode()):
        pass
    assert requests == []
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["/vsicurl/ADDRESS/a.tif", "/vsizip/ADDRESS.zip/a.tif", "GTIFF_DIR:1:secret.tif", "pipe:x"]
)
def test_a_name_out_of_a_table_is_no_path_of_gdal(name: str, tmp_path: Path, asked: tuple[str, list[str]]) -> None:
    address, requests = asked
    (tmp_path / "images").mkdir()
    write_raster(tmp_path / "images" / "good.tif", reflectance(3).astype(np.uint16))
    write_raster(tmp_path / "images" / "secret.tif", reflectance(3).astype(np.uint16))
    bad = name.replace("ADDRESS", address)
    (tmp_path / "set.csv").write_text(f"filename,caption\ngood.tif,a pond\n{bad},a pond\n")
    words = ["--source", "csv", "--csv", str(tmp_path / "set.csv"), "--images", str(tmp_path / "images")]
    assert main(["pack", *words, "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert (tmp_path / "out" / "quarantine.jsonl").read_text().count("\n") == 1
    assert requests == []
