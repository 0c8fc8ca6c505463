"""Tiles get the class and the texts of the shapes under them, from vector files in any CRS and from tables."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import shapely
from rasterio.features import rasterize
from rasterio.warp import transform
from shapely.geometry import MultiPoint, Point, Polygon, box, mapping
from small_rasters import reflectance, write_raster

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.rasters.vector import Note
from priorclip.data_shards.sources.tile_texts import SceneTexts

SIDE, TILE = 200, 50
SHAPES = {  # in pixels of the scene
    "forest": Polygon([(0, 0), (120, 0), (60, 200), (0, 200)]),
    "lake": Point(140, 60).buffer(33),
    "town": Polygon([(100, 120), (195, 125), (190, 190), (110, 180)]),
}
CORNER = (500_000, 5_000_000, 10)  # left, top and pixel of write_raster


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_raster(folder / "T33/a.tif", reflectance(3, SIDE, SIDE).astype(np.uint16))
    write_raster(folder / "bare.tif", reflectance(3, 60, 60).astype(np.uint16), georeferenced=False)
    return folder


def on_the_ground(shape: shapely.Geometry, crs: str) -> shapely.Geometry:
    """Returns a shape in pixels of the scene as a shape in a CRS, with many points on its edges."""

    def move(points: np.ndarray) -> np.ndarray:
        left, top, pixel = CORNER
        return np.column_stack(transform("EPSG:32633", crs, left + pixel * points[:, 0], top - pixel * points[:, 1]))

    return shapely.transform(shapely.segmentize(shape, 5), move)


def write_layer(path: Path, crs: str, driver: str, shapes: list[shapely.Geometry], fields: dict[str, list]) -> Path:
    ground = np.array([on_the_ground(shape, crs) for shape in shapes])
    kinds = {shape.geom_type for shape in ground}
    columns = [np.array(values, object) for values in fields.values()]
    pyogrio.raw.write(path, shapely.to_wkb(ground), columns, list(fields), driver=driver, crs=crs,
                      geometry_type=kinds.pop() if len(kinds) == 1 else "Unknown")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same shapes in three formats and CRSs."""
    folder = tmp_path_factory.mktemp("vector")
    shapes = list(SHAPES.values())
    fields = {"class": list(SHAPES), "text": [f"some {name}" for name in SHAPES]}
    features = [
        {"type": "Feature", "geometry": mapping(on_the_ground(shape, "EPSG:4326")),
         "properties": {"label": name, "captions": [f"some {name}", f"a {name} from above"], "size": 3}}
        for name, shape in SHAPES.items()
    ]  # fmt: skip
    (folder / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return {
        "GeoJSON in degrees": folder / "a.geojson",
        "GeoPackage in UTM": write_layer(folder / "a.gpkg", "EPSG:32633", "GPKG", shapes, fields),
        "Shapefile in Mercator": write_layer(folder / "a.shp", "EPSG:3857", "ESRI Shapefile", shapes, fields),
    }


def pack(scenes: Path, output: Path, *words: str) -> int:
    start = ["pack", "--source", "raster", "--images", str(scenes), "--output", str(output), "--tile", str(TILE)]
    return main([*start, "--stride", "40", "--workers", "1", *words])


def samples(folder: Path) -> dict:
    shards = ShardSet(str(folder))
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


@cache
def burnt(name: str) -> np.ndarray:
    """Returns the pixels of a shape as GDAL burns them, at ten times the resolution of the scene."""
    fine = shapely.transform(SHAPES[name], lambda points: points * 10)
    return rasterize([(fine, 1)], out_shape=(SIDE * 10, SIDE * 10))


def counted(x: int, y: int) -> dict[str, float]:
    """Returns the share of each class in a tile, counted in pixels."""
    shares = {name: float(burnt(name)[y * 10 : (y + TILE) * 10, x * 10 : (x + TILE) * 10].mean()) for name in SHAPES}
    return {name: share for name, share in shares.items() if share}


@pytest.mark.parametrize("name", ["GeoJSON in degrees", "GeoPackage in UTM", "Shapefile in Mercator"])
def test_a_tile_has_the_class_with_the_largest_share(
    name: str, scenes: Path, layers: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--vector", str(layers[name]), "--min-share", "0.4", "--keep-unlabelled", "true")
    more = () if "GeoJSON" in name else ("--label-field", "class", "--caption-field", "text")
    assert pack(scenes, tmp_path / "out", *words, *more, "--caption-from", "none") == 0
    found = samples(tmp_path / "out")
    assert len(found) == 25 + 4
    labels = {}
    for x in (0, 40, 80, 120, 150):
        for y in (0, 40, 80, 120, 150):
            sample, shares = found[f"T33/a/{y:06d}-{x:06d}"], counted(x, y)
            told = {each: sample.info.get("shares", {}).get(each, 0) for each in SHAPES}
            assert told == pytest.approx({each: shares.get(each, 0) for each in SHAPES}, abs=0.01)
            first = max(shares, key=lambda each: shares[each], default=None)
            sure = not shares or abs(max(shares.values()) - 0.4) > 0.01
            if sure:  # none of these polygons lies in one tile to 40 %
                labels[x, y] = first if shares and shares[first] > 0.4 else None
                assert sample.label == labels[x, y], (x, y, shares)
    assert set(labels.values()) == {"forest", "lake", "town", None}
    assert labels[120, 40] == "lake"
    expected = ["some lake", "a lake from above"] if "GeoJSON" in name else ["some lake"]
    assert found["T33/a/000040-000120"].captions == expected
    assert found["bare/000000-000000"].label is None


def test_tiles_without_text_are_left_out_and_labels_become_captions(
    scenes: Path, layers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--vector", str(layers["GeoPackage in UTM"]), "--label-field", "class", "--min-share", "0.4")
    assert pack(scenes, tmp_path / "out", *words) == 0
    found = samples(tmp_path / "out")
    told = json.loads((tmp_path / "out/manifest.json").read_text())
    assert told["classes"] == sorted(SHAPES)
    assert told["skipped"] == {"no caption": 29 - len(found)}
    assert 10 < len(found) < 25
    assert all(sample.label and sample.captions for sample in found.values())
    assert "left out" in capsys.readouterr().out


def test_the_rule_for_small_polygons_points_and_lines() -> None:
    tank, pond = Note("tank", ["a tank"]), Note("pond", ["a pond"])
    shapes = [
        (box(10, 10, 20, 20), tank),  # inside the tile
        (box(95, 40, 115, 60), pond),  # a quarter of it inside
        (Point(50, 50), Note("well", ["a well"])),
        (MultiPoint([(150, 150)]), Note("mast", ["a mast"])),
        (shapely.LineString([(0, 90), (300, 90)]), Note(None, ["a road"])),
        (box(100, 0, 200, 100), Note("touching", ["only touches"])),
    ]
    texts = SceneTexts(shapes, 0.5)
    note, shares = texts.of((0, 0, 100, 100))
    assert (note.label, note.captions) == ("tank", ["a tank", "a well", "a road"])
    assert shares == {"tank": 0.01, "pond": 0.01}  # as large: the one that lies in the tile
    assert texts.of((120, 120, 50, 50)) == (Note("mast", ["a mast"]), {})
    assert texts.of((0, 200, 50, 50)) == (Note(None, []), {})
    assert SceneTexts(shapes, 0.2).of((0, 0, 100, 100))[0].captions == ["a tank", "a pond", "a well", "a road"]
    covered = SceneTexts([(box(0, 0, 60, 100), tank), (box(0, 0, 60, 100), tank), (box(0, 0, 55, 100), pond)], 0.5)
    assert covered.of((0, 0, 100, 100))[1] == {"tank": 0.6, "pond": 0.55}  # twice the same ground counts once


def test_a_scene_across_the_dateline_finds_the_shapes_of_both_sides(tmp_path: Path) -> None:
    from affine import Affine

    values = reflectance(3, 100, 100).astype(np.uint16)
    write_raster(tmp_path / "s/a.tif", values, georeferenced=False, crs="EPSG:32660",
                 transform=Affine(1000, 0, 783_000, 0, -1000, 50_000))  # fmt: skip
    features = [
        {"type": "Feature", "geometry": mapping(box(*bounds)), "properties": {"label": name}}
        for name, bounds in (("west", (170, -5, 180, 5)), ("east", (-180, -5, -170, 5)))
    ]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert pack(tmp_path / "s", tmp_path / "out", "--vector", str(tmp_path / "a.geojson")) == 0
    found = samples(tmp_path / "out")
    assert len(found) == 9
    for key, sample in found.items():
        shares = sample.info["shares"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.002)
        middle = np.mean([783_000 + (int(key[-6:]) + 25) * 1000])
        lon = transform("EPSG:32660", "EPSG:4326", [middle], [0])[0][0]
        assert sample.label == ("west" if lon > 0 else "east")
    assert {sample.label for sample in found.values()} == {"west", "east"}


def test_a_table_of_windows(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "texts.csv"
    rows = [
        "scene;x;y;width;height;label;caption",
        "T33/a.tif;0;40;50;50;forest;firs; ",
        "bare;0;0;60;60;;a bare place",
    ]
    table.write_text("\n".join([*rows, "T33/a.tif;0;40;50;50;forest;spruces", "gone.tif;0;0;9;9;x;y"]))
    assert pack(scenes, tmp_path / "out", "--csv", str(table), "--caption-from", "none") == 0
    found = samples(tmp_path / "out")
    assert (found["T33/a/000040-000000"].label, found["T33/a/000040-000000"].captions) == (
        "forest",
        ["firs", "spruces"],
    )
    assert set(found) == {"T33/a/000040-000000", *(f"bare/{y:06d}-{x:06d}" for y in (0, 10) for x in (0, 10))}
    assert found["bare/000000-000010"].captions == ["a bare place"]
    assert "1 scenes of the table are not in --images, such as gone.tif" in caplog.text


def test_wrong_files_and_options(
    scenes: Path, layers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    virtual = (
        "<OGRVRTDataSource><OGRVRTLayer name='a'><SrcDataSource>/etc</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>"
    )
    (tmp_path / "virtual.gpkg").write_text(virtual)
    (tmp_path / "virtual.geojson").write_text(virtual)
    (tmp_path / "virtual.shp").write_text(virtual)
    (tmp_path / "deep.geojson").write_text("[" * 100_000)
    bad = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], ["a", 1]]]}, "properties": {}}
    (tmp_path / "bad.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [bad]}))
    far = {"type": "Feature", "geometry": mapping(box(0, 0, 1, 1)), "properties": {"label": "far"}}
    (tmp_path / "far.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [far]}))
    pathless = write_layer(tmp_path / "b.shp", "EPSG:32633", "ESRI Shapefile", [SHAPES["lake"]], {"class": ["lake"]})
    pathless.with_suffix(".prj").unlink()
    two = tmp_path / "two.gpkg"
    for name in ("a", "b"):
        wkb = shapely.to_wkb(np.array([on_the_ground(SHAPES["lake"], "EPSG:32633")]))
        pyogrio.raw.write(two, wkb, [np.array(["lake"], object)], ["class"], layer=name, driver="GPKG",
                          crs="EPSG:32633", geometry_type="Polygon", append=two.exists())  # fmt: skip
    (tmp_path / "short.csv").write_text("scene,x,y,label\na.tif,0,0,lake\n")
    (tmp_path / "text.csv").write_text("scene,x,y,width,height,label\na.tif,0,zero,5,5,lake\n")
    geojson = str(layers["GeoJSON in degrees"])
    for words, message in (
        (("--vector", str(tmp_path / "virtual.gpkg")), "is no GPKG, whatever its name says"),
        (("--vector", str(tmp_path / "virtual.shp")), "is no ESRI Shapefile, whatever its name says"),
        (("--vector", str(tmp_path / "virtual.geojson")), "is no GeoJSON"),
        (("--vector", str(tmp_path / "deep.geojson")), "is no GeoJSON"),
        (("--vector", str(tmp_path / "bad.geojson")), "feature 0"),
        (("--vector", str(tmp_path / "far.geojson")), "no tile has a class or a text"),
        (("--vector", str(tmp_path / "none.gpkg")), "does not exist"),
        (("--vector", str(tmp_path / "short.csv")), "must be one of .geojson"),
        (("--vector", str(pathless), "--label-field", "class"), "a Shapefile needs its .prj"),
        (("--vector", str(two)), "has several layers, name one by --layer: a, b"),
        (("--vector", str(two), "--layer", "c"), "--layer c"),
        (("--vector", geojson, "--label-field", "kind"), "has no field kind (--label-field); it has: label, captions"),
        (("--vector", geojson, "--min-share", "0"), "--min-share must be above 0"),
        (("--vector", geojson, "--csv", "a.csv"), "take one"),
        (("--label-field", "class"), "need --vector or --csv"),
        (("--layer", "a"), "--layer needs --vector"),
        (("--csv", str(tmp_path / "short.csv")), "has no column width, height"),
        (("--csv", str(tmp_path / "text.csv")), "y='zero'"),
    ):
        assert pack(scenes, tmp_path / "out", *words) == 2, words
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert pack(scenes, tmp_path / "out", "--vector", str(two), "--layer", "b", "--min-share", "0.4") == 0
