"""Drawn scenes with coordinates: what the GeoJSON says is in the pixels, in near infrared too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.warp import transform_geom
from shapely.geometry import box, shape
from small_data import write_tar

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.synthetic import draw_scene, label_of

SEED, CELL, ALONG, MARGIN = 4, 80, 5, 8
WORDS = ["synthetic", "--count", "2", "--size", str(CELL * ALONG), "--cell", str(CELL), "--seed", str(SEED)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "scenes"
    assert main([*WORDS, "--output", str(folder), "--gsd", "0.5", "--first-index", "10"]) == 0
    return folder


def features(folder: Path) -> list[dict]:
    content = json.loads((folder / "places.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    return content["features"]


def test_each_place_has_the_drawn_scene_that_the_geojson_names(deep: Path) -> None:
    found = features(deep)
    assert len(found) == 2 * ALONG**2
    for number, feature in enumerate(found):
        facts = feature["properties"]
        left, top, _, _ = facts["window"]
        assert facts["scene"] == f"scene-{number // ALONG**2:03d}.tif"
        assert facts["label"] == label_of(SEED, 10 + number)
        with rasterio.open(deep / facts["scene"]) as file:
            pixels = file.read([1, 2, 3]).transpose(1, 2, 0)[top : top + CELL, left : left + CELL]
            outline = shape(transform_geom("EPSG:4326", file.crs, feature["geometry"]))
            corners = file.transform @ (left, top), file.transform @ (left + CELL, top + CELL)
        own = box(*corners[0], *corners[1])
        assert outline.symmetric_difference(own).area < 0.01 * own.area
        drawn = draw_scene(SEED, 10 + number, CELL + 2 * MARGIN)
        assert facts["captions"] == drawn.fine
        assert facts["caption"] == drawn.fine[0]
        inside = slice(2 * MARGIN, CELL)  # in the drawn picture: without the part that fades into the neighbours
        expected = drawn.image[inside, inside].astype(float) * 3000 / 256
        here = pixels[MARGIN : CELL - MARGIN, MARGIN : CELL - MARGIN]
        assert (here >= expected - 1).all()
        assert (here <= expected + 3000 / 256).all()


def test_files_have_coordinates_bands_and_time(deep: Path) -> None:
    for number, (left, day) in enumerate([(500_000, "01"), (500_400, "02")]):
        with rasterio.open(deep / f"scene-{number:03d}.tif") as file:
            assert (file.width, file.height, file.count, set(file.dtypes)) == (400, 400, 4, {"uint16"})
            assert file.descriptions == ("red", "green", "blue", "nir")
            assert (file.crs.to_epsg(), tuple(file.transform)[:6]) == (32632, (0.5, 0, left, 0, -0.5, 5_400_000))
            assert file.tags()["TIFFTAG_DATETIME"] == f"2024:06:{day} 10:30:00"


def test_plants_are_bright_and_water_is_dark_in_near_infrared(deep: Path) -> None:
    values: dict[str, list[np.ndarray]] = {}
    for feature in features(deep):
        facts = feature["properties"]
        x, y, wide, high = facts["window"]
        with rasterio.open(deep / facts["scene"]) as file:
            values.setdefault(facts["label"], []).append(file.read()[:, y : y + high, x : x + wide] / 10_000)
    index = {
        label: np.median([(cell[3] - cell[0]) / (cell[3] + cell[0]) for cell in values[label]])
        for label in ("forest", "desert")
    }
    assert index["forest"] > 0.4  # of vegetation
    assert index["desert"] < 0.3
    for label in ("lake", "harbour"):
        for cell in values[label]:
            blue, dark = cell[2, 20:60, 20:60], cell[3, 20:60, 20:60]
            water = dark < 0.05
            assert water.mean() > 0.3, label
            assert np.median(blue[water]) > 2 * np.median(dark[water])
    for cell in values["tennis court"]:  # a green court is paint
        assert cell[3, 30:50, 30:50].mean() < 0.42


def test_eight_bits_without_infrared_are_the_same_every_time(tmp_path: Path) -> None:
    words = [*WORDS[:1], "--count", "1", "--size", "160", "--cell", "80", "--bands", "rgb", "--type", "uint8"]
    for name in ("a", "b"):
        assert main([*words, "--output", str(tmp_path / name), "--crs", "EPSG:3857", "--gsd", "2.5"]) == 0
    with rasterio.open(tmp_path / "a/scene-000.tif") as file:
        assert (file.count, file.dtypes[0], file.crs.to_epsg(), file.transform.a) == (3, "uint8", 3857, 2.5)
        middle = file.read()[:, 8:72, 8:72].transpose(1, 2, 0)
    assert np.array_equal(middle, draw_scene(0, 0, 96).image[16:80, 16:80])
    for name in ("scene-000.tif", "places.geojson"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture(scope="module")
def tiles(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles") / "out"
    words = ["pack", "--source", "raster", "--images", str(deep), "--tile", str(CELL), "--workers", "1"]
    words += ["--vector", str(deep / "places.geojson"), "--value-range", "0,3000", "--bands", "nir,red,green"]
    assert main([*words, "--output", str(folder)]) == 0
    return folder


def test_stats_has_a_map_and_the_values_of_each_band(deep: Path, tiles: Path, tmp_path: Path) -> None:
    assert main(["stats", str(tiles), "--output", str(tmp_path), "--workers", "1"]) == 0
    found = json.loads((tmp_path / "stats.json").read_text())["rasters"]
    assert (found["tiles"], found["footprints"]) == (50, 50)
    assert found["scenes"] == {"scene-000.tif": 25, "scene-001.tif": 25}
    assert found["acquired"] == ["2024-06-01T10:30:00", "2024-06-02T10:30:00"]
    assert found["gsd"] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert list(found["bands"]) == ["nir", "red", "green"]
    values = []
    for number in range(2):
        with rasterio.open(deep / f"scene-{number:03d}.tif") as file:
            values.append(np.clip(file.read([4, 1, 2]), 0, 3000))
    whole = np.concatenate([each.reshape(3, -1) for each in values], axis=1).astype(float)
    for place, name in enumerate(("nir", "red", "green")):
        band = found["bands"][name]
        assert band["mean"] == pytest.approx(whole[place].mean(), rel=0.02)
        assert band["deviation"] == pytest.approx(whole[place].std(), rel=0.05)
        assert sum(band["counts"]) == 50 * CELL**2  # a tile of up to 128 x 128 pixels counts whole
        assert len(band["edges"]) == len(band["counts"]) + 1
    assert "band             nir (uint16): mean" in (tmp_path / "stats.txt").read_text()
    with Image.open(tmp_path / "rasters.png") as picture:
        assert picture.size == (1300, 600)
        left, right = (np.asarray(picture.convert("RGB"))[:, side] for side in (slice(0, 650), slice(650, 1300)))
    for half in (left, right):  # each panel has coloured footprints or lines
        assert (np.ptp(half.astype(int), axis=2) > 60).sum() > 200


def test_verify_knows_the_place_of_a_tile(tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiles), "--workers", "1"]) == 0
    good = ShardSet(str(tiles)).text(0).info
    for change, message in (
        ({"window": [0, 0, 80]}, "'window' must be left, top, width and height"),
        ({"window": [0, 0, 0, 80]}, "'window' must be"),
        ({"gsd": 0}, "'gsd' must be metres above 0"),
        ({"transform": [1, 0, 0, 0, 1]}, "'transform' must be six finite numbers"),
        ({"acquired": "yesterday"}, "'acquired' must be a date"),
        ({"footprint": {"type": "Point", "coordinates": [0, 0]}}, "'footprint' must be a GeoJSON Polygon"),
        ({"footprint": {"type": "Polygon", "coordinates": [[[0, 0], [0, 1], [1, 1]]]}}, "a ring that is not closed"),
        ({"footprint": {"type": "Polygon", "coordinates": [[[0, 95]] * 4]}}, "a latitude outside of -90 to 90"),
        ({"footprint": {"type": "Polygon", "coordinates": [[[190, 5]] * 4]}}, "a longitude outside of -180 to 180"),
        ({"footprint": {"type": "Polygon", "coordinates": [[[0, 1, 2]] * 4]}}, "points of two numbers"),
        ({"footprint": {"type": "Polygon", "coordinates": 5}}, "must have coordinates as GeoJSON has them"),
    ):
        image = ShardSet(str(tiles)).read(0).image
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write_tar(folder / "a.tar", {"a.jpg": image, "a.json": json.dumps(good | change).encode()})
        assert main(["index", str(folder), "--workers", "1"]) == 0
        capsys.readouterr()
        assert main(["verify", str(folder), "--workers", "1"]) == 1
        said = capsys.readouterr().out
        assert "BAD a.tar: member a.json: '" in said
        assert message in said


def test_wrong_options(deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--size", "500", "--cell", "80"), "--size 500 is no multiple of --cell 80: take 480 or 560"),
        (("--cell", "9"), "--cell must be a side in pixels"),
        (("--size", "40", "--cell", "80"), "--size must be a side in pixels, from --cell (80)"),
        (("--count", "0"), "--count must be at least 1"),
        (("--crs", "EPSG:4326"), "--crs EPSG:4326 does not count in metres"),
        (("--crs", "nowhere"), "--crs 'nowhere' is unknown"),
        (("--top", "1e9"), "off the globe"),
        (("--gsd", "0"), "--gsd must be metres a pixel"),
        (("--output", str(deep)), "exists and is not empty"),
    ):
        assert main([*WORDS, "--output", str(tmp_path / "o"), *words]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
