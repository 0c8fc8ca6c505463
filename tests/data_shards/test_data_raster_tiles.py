"""Scenes become tiles with the contrast of the whole scene, and with their place on the Earth."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from rasterio.warp import transform
from shapely.geometry import Point, shape
from small_data import rows
from small_rasters import reflectance, write_raster

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.rasters.georeference import place_of
from priorclip.data_shards.sources.scenes import starts

SIDE = 200
MARS = (
    'GEOGCS["Mars 2000",DATUM["D_Mars_2000",SPHEROID["Mars_2000_IAU_IAG",3396190,169.894447223612]],'
    'PRIMEM["Reference_Meridian",0],UNIT["degree",0.0174532925199433]]'
)


def options(folder: Path, output: Path, *more: str) -> list[str]:
    words = ["pack", "--source", "raster", "--images", str(folder), "--output", str(output), "--tile", "64"]
    return [*words, "--stride", "48", "--workers", "1", *more]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of four bands: one bright in the east and empty in the south, and one smaller than a tile."""
    folder = tmp_path_factory.mktemp("scenes")
    values = reflectance(4, SIDE, SIDE, 500) + np.linspace(0, 2500, SIDE) + 10
    values[:, 150:] = 0
    tags = {"TIFFTAG_DATETIME": "2020:06:04 10:20:30"}
    names = ("blue", "green", "red", "nir")
    write_raster(folder / "T33/a.tif", values.astype(np.uint16), nodata=0, names=names, tags=tags, tiled=True,
                 blockxsize=64, blockysize=64)  # fmt: skip
    small = reflectance(4, 40, 50).astype(np.uint16)
    write_raster(folder / "b.tif", small, georeferenced=False, names=names)
    (folder / "broken.tif").write_bytes(b"II*\0 not a raster")
    return folder


@pytest.fixture(scope="module")
def packed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "out"
    assert main(options(scenes, folder, "--quality", "95")) == 0
    return folder


def samples(folder: Path) -> dict:
    shards = ShardSet(str(folder))
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


def test_tiles_cover_a_scene() -> None:
    assert starts(200, 64, 48) == [0, 48, 96, 136]
    assert starts(64, 64, 48) == [0]
    assert starts(40, 64, 48) == [0]
    for length in range(1, 300, 7):
        covered = {pixel for first in starts(length, 64, 48) for pixel in range(first, min(first + 64, length))}
        assert covered == set(range(length))
        assert max(starts(length, 64, 48)) + min(64, length) == length


def test_a_tile_has_the_pixels_of_its_window_and_the_contrast_of_its_scene(scenes: Path, packed: Path) -> None:
    with rasterio.open(scenes / "T33/a.tif") as file:
        whole = file.read([3, 2, 1]).astype(float)
    valid = (whole > 0).all(0)
    found = samples(packed)
    # The rows 96 to 159 have 54 of 64 rows with data; rows 136 to 199 only 14, so that those four tiles are left out.
    expected = {f"T33/a/{y:06d}-{x:06d}" for y in (0, 48, 96) for x in (0, 48, 96, 136)} | {"b/000000-000000"}
    assert set(found) == expected
    left_out = rows(packed / "quarantine.jsonl")
    assert {(row["key"], row["reason"]) for row in left_out} == {
        *((f"T33/a/000136-{x:06d}", "too few valid pixels") for x in (0, 48, 96, 136)),
        ("broken", "unreadable image"),
    }
    skipped = json.loads((packed / "manifest.json").read_text())["skipped"]
    assert skipped == {"too few valid pixels": 4, "unreadable image": 1}
    black, white = (np.percentile(whole[:, valid], share, axis=1)[:, None, None] for share in (2, 98))
    scaled = np.clip((whole - black) / (white - black) * 255, 0, 255) * valid
    for key in expected - {"b/000000-000000"}:
        y, x = (int(part) for part in key.rpartition("/")[2].split("-"))
        picture = np.asarray(Image.open(io.BytesIO(found[key].image))).astype(float)
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture - scaled[:, y : y + 64, x : x + 64].transpose(1, 2, 0)).mean() < 4, key
        assert found[key].info["window"] == [x, y, 64, 64]
        assert found[key].info["raster"]["bands"] == ["red", "green", "blue"]
    assert found["T33/a/000000-000136"].info["raster"]["range"] == found["T33/a/000000-000000"].info["raster"]["range"]


def test_each_tile_says_where_and_when_it_is(packed: Path) -> None:
    info = samples(packed)["T33/a/000048-000096"].info
    assert (info["scene"], info["crs"], info["acquired"]) == ("T33/a.tif", "EPSG:32633", "2020-06-04T10:20:30")
    assert info["transform"] == [10, 0, 500_960, 0, -10, 4_999_520]
    corners = [(500_960, 4_999_520), (501_600, 4_999_520), (501_600, 4_998_880), (500_960, 4_998_880)]
    lon, lat = transform("EPSG:32633", "EPSG:4326", *zip(*corners, strict=True))
    outline = shape(info["footprint"])
    assert outline.geom_type == "Polygon"
    assert outline.bounds == pytest.approx((min(lon), min(lat), max(lon), max(lat)), abs=2e-7)
    assert all(outline.exterior.distance(Point(point)) < 2e-7 for point in zip(lon, lat, strict=True))
    assert outline.exterior.is_ccw
    assert info["gsd"] == pytest.approx(10 / 0.9996, rel=1e-4)  # UTM shrinks by 0.9996 on its central meridian
    lost = samples(packed)["b/000000-000000"].info
    assert not {"crs", "transform", "footprint", "gsd", "acquired"} & set(lost)


def test_tiles_have_no_text_until_somebody_gives_them_one(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    assert (manifest["samples"], manifest["captions"], manifest["classes"]) == (13, 0, [])
    assert main(["verify", str(packed), "--workers", "1"]) == 0


def test_workers_change_no_byte(scenes: Path, packed: Path, tmp_path: Path) -> None:
    words = [word if word != "1" else "2" for word in options(scenes, tmp_path / "out", "--quality", "95")]
    words[-2:-2] = ["--shard-size", "1000"]
    assert main(words) == 0
    for path in sorted(packed.iterdir()):
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256((tmp_path / "out" / path.name).read_bytes()).digest()
        )


def test_wrong_options(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for more, message in (
        (("--stride", "65"), "--stride must be 1 to the side of a tile (64)"),
        (("--tile", "8"), "--tile must be a side in pixels"),
        (("--bands", "swir1"), "none of 3 scenes"),
        (("--json", "x.json"), "--source raster does not take --json"),
        (("--max-bad-share", "0.2"), "1 of 3 scenes below"),
        (("--max-bad-share", "2"), "--max-bad-share must be a share"),
    ):
        assert main(options(scenes, tmp_path / "o", *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


def placed(path: Path, crs: str | None, left: float, top: float, pixel: float, side: int = 64, **more: object) -> dict:
    """Returns the place of a raster of side x side pixels with this CRS and upper left corner."""
    profile = {"crs": crs, "transform": from_origin(left, top, pixel, pixel)} if crs else {}
    write_raster(path, np.ones((1, side, side), np.uint8), georeferenced=False, **profile, **more)
    with rasterio.open(path) as dataset:
        return place_of(dataset, 0, 0, side, side)


PLACES = {  # CRS, left, top, pixel: across the dateline, around a pole, near one, at the equator
    "utm across the dateline": ("EPSG:32660", 800_000, 100_000, 1_000),
    "degrees beyond 180": ("EPSG:4326", 179.5, 10, 0.02),
    "mercator across the dateline": ("EPSG:3832", 3_300_000, 100_000, 2_000),
    "north pole": ("EPSG:3413", -64_000, 64_000, 2_000),
    "south pole": ("EPSG:3031", -32_000, 96_000, 2_000),
    "polar across the dateline": ("EPSG:3413", -1_500_000, 1_500_000, 8_000),
    "polar inside": ("EPSG:3413", -2_000_000, 100_000, 2_000),
    "equator": ("EPSG:32633", 500_000, 32_000, 1_000),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_footprint_holds_the_points_of_its_window_and_no_others(name: str, tmp_path: Path) -> None:
    """Random points of the globe are inside the footprint exactly if their pixel is inside the raster."""
    crs, left, top, pixel = PLACES[name]
    outline = shape(placed(tmp_path / "a.tif", crs, left, top, pixel)["footprint"])
    assert outline.is_valid
    west, south, east, north = outline.bounds
    assert -180 <= west <= east <= 180
    assert -90 <= south <= north <= 90
    rng = np.random.default_rng(0)
    x = left + rng.uniform(-1, 2, 600) * 64 * pixel
    y = top - rng.uniform(-1, 2, 600) * 64 * pixel
    lon, lat = (np.array(each) for each in transform(crs, "EPSG:4326", x, y))
    lon = (lon + 180) % 360 - 180
    column, line = (x - left) / pixel, (top - y) / pixel
    inside = (column > 0.3) & (column < 63.7) & (line > 0.3) & (line < 63.7)
    outside = (column < -0.3) | (column > 64.3) | (line < -0.3) | (line > 64.3)
    held = np.array([outline.covers(Point(point)) for point in zip(lon, lat, strict=True)])
    sure = (np.abs(lon) < 179.99) & (inside | outside)
    assert sure.sum() > 500
    assert np.array_equal(held[sure], inside[sure])


def test_ground_distance_is_on_the_ground(tmp_path: Path) -> None:
    """Web Mercator stretches by 1 / cos(latitude); a degree of the equator has 111,320 m by 110,574 m."""
    top = 6_446_276.0  # latitude 50
    found = placed(tmp_path / "a.tif", "EPSG:3857", 0, top, 10)["gsd"]
    assert found == pytest.approx(10 * np.cos(np.radians(50)), rel=4e-3)
    degrees = placed(tmp_path / "b.tif", "EPSG:4326", 20, 0.32, 0.01)["gsd"]
    assert degrees == pytest.approx(np.sqrt(1113.2 * 1105.74), rel=1e-4)


def test_control_points_place_a_raster_and_another_planet_does_not(tmp_path: Path) -> None:
    points = [
        GroundControlPoint(row, col, 500_000 + 10 * col, 5_000_000 - 10 * row) for row in (0, 64) for col in (0, 64)
    ]
    path = write_raster(tmp_path / "a.tif", np.ones((1, 64, 64), np.uint8), False, gcps=points, crs="EPSG:32633")
    with rasterio.open(path) as dataset:
        found = place_of(dataset, 0, 0, 64, 64)
    same = placed(tmp_path / "b.tif", "EPSG:32633", 500_000, 5_000_000, 10)
    assert found["transform"] == pytest.approx(same["transform"], abs=1e-6)
    assert shape(found["footprint"]).symmetric_difference(shape(same["footprint"])).area < 1e-9
    assert "footprint" not in placed(tmp_path / "c.tif", MARS, 0, 0, 0.01)


def test_tiles_of_a_copied_scene_and_of_evaluation_images_are_left_out(
    scenes: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("a.tif", "copy of a.tif"):
        shutil.copyfile(scenes / "T33/a.tif", folder / name)
    alone = [key for key in samples(packed) if "b.tif" not in key and not key.startswith("b")]
    assert main(options(folder, tmp_path / "both")) == 0
    assert len(samples(tmp_path / "both")) == 2 * len(alone)
    assert main(options(folder, tmp_path / "once", "--duplicates", "drop")) == 0
    assert len(samples(tmp_path / "once")) == len(alone)
    assert f"{len(alone)} x exact" in capsys.readouterr().out
    assert main(options(folder, tmp_path / "none", "--exclude", str(packed), "--quality", "95")) == 2
    assert "none of 8 records could be packed" in capsys.readouterr().err  # those without enough valid pixels
