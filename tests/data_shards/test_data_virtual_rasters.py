"""Virtual rasters join files below their own folder; a hostile one opens nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rasterio.shutil import copy
from rasterio.transform import from_origin
from remote_server import noting_server
from small_data import rows
from small_rasters import reflectance, write_raster

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.rasters.gdal import open_file

SIDE = 64
SOURCE = """<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename><SourceBand>{band}</SourceBand>
<SrcRect xOff="0" yOff="0" xSize="64" ySize="64"/>
<DstRect xOff="{left}" yOff="0" xSize="64" ySize="64"/></SimpleSource>"""
VRT = """<VRTDataset rasterXSize="128" rasterYSize="64"><SRS>EPSG:32633</SRS>
<GeoTransform>500000, 10, 0, 5000000, 0, -10</GeoTransform>{bands}</VRTDataset>"""


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return (reflectance(3, SIDE, 2 * SIDE) + 1).astype(np.uint16)


@pytest.fixture
def folder(tmp_path: Path, values: np.ndarray) -> Path:
    """Two neighbours, and beside the folder a secret that has the same form."""
    for number, name in enumerate(("scenes/parts/west.tif", "scenes/parts/east.tif", "secret.tif")):
        left = number % 2 * SIDE
        write_raster(tmp_path / name, values[:, :, left : left + SIDE], georeferenced=False, crs="EPSG:32633",
                     transform=from_origin(500_000 + 10 * left, 5_000_000, 10, 10))  # fmt: skip
    return tmp_path / "scenes"


def mosaic(west: str = "parts/west.tif", east: str = "parts/east.tif", inside: str = "", kind: str = "") -> str:
    bands = ""
    for band in (1, 2, 3):
        sources = [SOURCE.format(name=name, band=band, left=left) for name, left in ((west, 0), (east, SIDE))]
        bands += f'<VRTRasterBand dataType="UInt16" band="{band}"{kind}>{inside}{"".join(sources)}</VRTRasterBand>'
    return VRT.format(bands=bands)


def test_a_mosaic_is_one_scene(folder: Path, values: np.ndarray, tmp_path: Path) -> None:
    (folder / "all.vrt").write_text(mosaic())
    with open_file(folder / "all.vrt") as dataset:
        assert np.array_equal(dataset.read(), values)
    words = ["pack", "--source", "raster", "--images", str(folder), "--tile", "64", "--stride", "32", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    shards = ShardSet(str(tmp_path / "out"))
    assert {shards.key(row) for row in range(len(shards))} == {f"all/000000-{x:06d}" for x in (0, 32, 64)}
    seam = shards.read([shards.key(row) for row in range(3)].index("all/000000-000032")).info
    assert (seam["scene"], seam["crs"], seam["transform"][2]) == ("all.vrt", "EPSG:32633", 500_320)


def test_what_gdal_writes_is_read(folder: Path, values: np.ndarray) -> None:
    copy(folder / "parts/west.tif", folder / "west.vrt", driver="VRT")
    with open_file(folder / "west.vrt") as dataset:
        assert np.array_equal(dataset.read(), values[:, :, :SIDE])
        assert dataset.crs.to_epsg() == 32633


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a secret, and the paths that its server was asked for."""
    with noting_server() as (url, paths):
        yield f"{url}/secret.tif", paths


def test_a_hostile_one_opens_nothing_else(folder: Path, asked: tuple[str, list[str]], tmp_path: Path) -> None:
    url, paths = asked
    secret = tmp_path / "secret.tif"
    (folder / "inner.vrt").write_text(mosaic())
    shutil.copyfile(folder / "inner.vrt", folder / "disguised.tif")
    code = "<PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode>x</PixelFunctionCode>"
    derived = ' subClass="VRTDerivedRasterBand"'
    raw = ' subClass="VRTRawRasterBand"'
    texts = {
        "another folder": mosaic(west="../secret.tif"),
        "an absolute path": mosaic(west=str(secret)),
        "a device": mosaic(west="/dev/zero"),
        "a url": mosaic(west=url),
        "a url by GDAL": mosaic(west=f"/vsicurl/{url}"),
        "a zip": mosaic(west=f"/vsizip/{secret}"),
        "a prefix": mosaic(west=f"GTIFF_DIR:1:{secret}"),
        "another vrt": mosaic(west="inner.vrt"),
        "a vrt in disguise": mosaic(west="disguised.tif"),
        "xml as a name": mosaic(west="&lt;VRTDataset/&gt;"),
        "a missing file": mosaic(west="parts/north.tif"),
        "code": mosaic(inside=code, kind=derived),
        "code without class": mosaic(inside=code),
        "raw bytes": mosaic(kind=raw),
        "options": mosaic().replace("<SourceBand>", "<OpenOptions><OOI key='a'>b</OOI></OpenOptions><SourceBand>", 1),
        "an overview": mosaic().replace(
            "<SRS>", f"<Overview><SourceFilename>{secret}</SourceFilename></Overview><SRS>"
        ),
        "two names": mosaic().replace("<SourceBand>", f"<SourceFilename>{secret}</SourceFilename><SourceBand>", 1),
        "a warp": mosaic().replace("<VRTDataset ", '<VRTDataset subClass="VRTWarpedDataset" '),
        "an entity": f'<!DOCTYPE a [<!ENTITY b SYSTEM "file://{secret}">]>' + mosaic(west="&b;"),
        "depth": "<VRTDataset>" + "<Metadata>" * 20_000,
        "another root": "<OGRVRTDataSource/>",
        "no xml": "II*\0",
        "nothing": "",
    }
    for name, text in texts.items():
        (folder / "a.vrt").write_text(text)
        with pytest.raises(BadSample, match="refused virtual raster"), open_file(folder / "a.vrt"):
            pytest.fail(name)
    assert paths == []


def test_a_refused_one_is_counted_and_its_parts_are_cut(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.vrt").write_text(mosaic(east="../secret.tif"))
    words = ["pack", "--source", "raster", "--images", str(folder), "--tile", "64", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    shards = ShardSet(str(tmp_path / "out"))
    assert {shards.key(row).split("/")[1] for row in range(len(shards))} == {"east", "west"}
    left_out = rows(tmp_path / "out/quarantine.jsonl")
    assert [(row["key"], row["reason"]) for row in left_out] == [("bad", "refused virtual raster")]
