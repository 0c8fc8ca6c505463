"""The map of the search page: tiles of the scenes against rasterio's own warp, and the page by mouse and keyboard."""

from __future__ import annotations

import io
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from browser import Page, browser
from PIL import Image
from rasterio.transform import from_bounds
from rasterio.vrt import WarpedVRT
from running_server import serving

from priorclip.data_shards.format.place import bounds
from priorclip.data_shards.rasters.values import value_rule
from priorclip.retrieval import Searcher
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.web.scene_tiles import SceneTiles, tile_bounds
from priorclip.retrieval.web.server import SearchServer, render_page


@pytest.fixture(scope="module")
def tiles(placed_index: Path, placed_searcher: Searcher) -> SceneTiles:
    assert placed_searcher.index.columns is not None
    return SceneTiles(placed_index.parent / "scenes", placed_searcher.index.columns, value_rule(None))


@pytest.fixture(scope="module")
def server(placed_searcher: Searcher, tiles: SceneTiles) -> Iterator[SearchServer]:
    with serving(placed_searcher, tiles=tiles) as served:
        yield served


def tile_of(lon: float, lat: float, z: int) -> tuple[int, int, int]:
    y = (1 - math.asinh(math.tan(math.radians(lat))) / math.pi) / 2
    return z, int((lon + 180) / 360 * 2**z), int(y * 2**z)


def middle_of(searcher: Searcher, scene: str) -> tuple[float, float]:
    """Longitude and latitude of the middle of the first tile of a scene."""
    entries = map(searcher.index.entry, range(len(searcher.index)))
    west, south, east, north = next(
        bounds(each["place"]["footprint"]) for each in entries if each["place"]["scene"] == scene
    )
    return (west + east) / 2, (south + north) / 2


def test_far_out_a_scene_is_a_dot_in_its_place(
    tiles: SceneTiles, placed_searcher: Searcher, caplog: pytest.LogCaptureFixture
) -> None:
    """A tile of half the globe reaches places where the projection of a scene is not defined."""
    lon, lat = middle_of(placed_searcher, "scene-000.tif")
    data = tiles.draw(*tile_of(lon, lat, 10))
    assert data is not None
    alpha = np.asarray(Image.open(io.BytesIO(data)))[..., 3]
    assert 0 < (alpha > 0).sum() < 200
    for z in range(8):
        tiles.draw(*tile_of(lon, lat, z))
    assert not [record for record in caplog.records if "scene-000.tif is not on the map" in record.getMessage()]


@pytest.mark.parametrize("z", [13, 15, 17])
def test_a_tile_is_what_gdal_warps(tiles: SceneTiles, placed_index: Path, placed_searcher: Searcher, z: int) -> None:
    columns = tiles.columns
    alone = np.where(columns.scene == columns.names.index("scene-000.tif"), columns.scene, -1)
    tile = tile_of(*middle_of(placed_searcher, "scene-000.tif"), z)
    data = SceneTiles(tiles.folder, replace(columns, scene=alone), tiles.rule).draw(*tile)
    assert data is not None
    drawn = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    half = math.pi * 6_378_137
    z, x, y = tile
    west, east = ((at / 2**z * 2 - 1) * half for at in (x, x + 1))
    north, south = ((1 - at / 2**z * 2) * half for at in (y, y + 1))
    where = {"transform": from_bounds(west, south, east, north, 256, 256), "width": 256, "height": 256}
    with (
        rasterio.open(placed_index.parent / "scenes" / "scene-000.tif") as scene,
        WarpedVRT(scene, crs="EPSG:3857", add_alpha=True, **where) as warped,
    ):
        want = np.moveaxis(warped.read(), 0, -1).astype(int)
    there = want[..., 3] > 0
    assert there.sum() > 80
    assert ((drawn[..., 3] > 0) == there).mean() > 0.99
    both = there & (drawn[..., 3] > 0)
    assert (np.abs(drawn[both][:, :3] - want[both][:, :3]).max(1) == 0).mean() > 0.85  # borders of pixels


def test_tiles_over_the_wire(server: SearchServer, placed_searcher: Searcher) -> None:
    z, x, y = tile_of(*middle_of(placed_searcher, "scene-001.tif"), 15)
    with urllib.request.urlopen(f"{server.url}tile/{z}/{x}/{y}") as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert np.asarray(Image.open(io.BytesIO(answer.read())))[..., 3].any()
    with urllib.request.urlopen(f"{server.url}tile/9/0/255") as answer:
        assert (answer.status, answer.read()) == (204, b"")
    for wrong in ("tile/2/4/0", "tile/25/0/0", "tile/1/a/0", "tile/1/0/-1"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.url + wrong)
    west, south, east, north = tile_bounds(15, x, y)
    lon, lat = middle_of(placed_searcher, "scene-001.tif")
    assert west <= lon <= east
    assert south <= lat <= north


def test_a_scene_of_a_foreign_index_is_a_file_below_the_folder(
    placed_index: Path, placed_searcher: Searcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The names of scenes come out of the index. One that leaves the folder is not opened, and the log says so once."""
    columns = placed_searcher.index.columns
    assert columns is not None
    names = [f"../{placed_index.parent.name}/scenes/{name}" for name in columns.names]
    folder = placed_index.parent / "tiles"
    tiles = SceneTiles(folder, replace(columns, names=names), value_rule(None))
    tile = tile_of(*middle_of(placed_searcher, "scene-000.tif"), 15)
    assert [tiles.draw(*tile), tiles.draw(*tile)] == [None, None]
    told = [record.getMessage() for record in caplog.records if "is not on the map" in record.getMessage()]
    assert len(told) == len(set(told)) > 0
    assert all("it leaves the folder" in message for message in told)


def test_wrong_options_are_one_line(placed_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "--index", str(placed_index), "--device", "cpu", "--port", "0"]
    assert main([*words, "--scenes", str(placed_index / "nowhere")]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    assert main([*words, "--bands", "red"]) == 2
    assert "give their folder by --scenes" in capsys.readouterr().err


def test_an_index_without_places_has_no_map(placed_searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/leaflet.js" in render_page(placed_searcher).decode()
    monkeypatch.setattr(placed_searcher.index, "columns", None)
    assert "/leaflet.js" not in render_page(placed_searcher).decode()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser(1400, 1000) as opened:
        yield opened


def scenes_shown(page: Page) -> list[str]:
    return page.value("[...document.querySelectorAll('#hits .key')].map(each => each.textContent)")


def test_the_map_by_mouse_and_keyboard(server: SearchServer, placed_searcher: Searcher, page: Page) -> None:
    page.open(f"{server.url}?text=river")
    page.wait("document.querySelectorAll('#hits li').length === 12")
    hits = placed_searcher.by_text("a river", 99)
    placed = [hit.row for hit in hits if "footprint" in hit.place]
    page.wait(f"document.querySelectorAll('path[role=button]').length === {len(placed)}")

    # A click on a footprint marks its card and moves the focus there; hovering a card marks its footprint.
    row = next(hit.row for hit in hits if hit.place["scene"] == "scene-000.tif")
    rank = page.value(f"[...document.querySelectorAll('#hits img')].findIndex(each => each.dataset.row == {row})") + 1
    card = f"#hits li:nth-child({rank})"
    page.click(f"{card} .onmap")
    page.wait(f"document.querySelector('{card}').classList.contains('near')")
    page.wait("document.querySelector('img.leaflet-tile-loaded')")  # the scene itself lies below the footprints
    page.hover("#text")
    page.click(f"path[data-row='{row}']")
    page.wait(f"document.activeElement === document.querySelector('{card} a')")
    plain, near = "#1971c2", "#d9480f"
    colour = f"document.querySelector(\"path[data-row='{row}']\").getAttribute('stroke')"
    page.value("document.activeElement.blur()")
    page.hover("#text")
    page.wait(f"{colour} === '{plain}'")
    page.hover(card)
    page.wait(f"{colour} === '{near}'")

    # The keyboard reaches a footprint, whose name a screen reader says.
    name = page.value(f"document.querySelector(\"path[data-row='{row}']\").getAttribute('aria-label')")
    label = placed_searcher.index.entry(row)["label"] or "unlabelled"
    assert name.startswith(f"{rank}: {label}, similarity ")
    page.value(f"document.querySelector(\"path[data-row='{row}']\").focus()")
    page.press("Enter")
    page.wait(f"document.activeElement === document.querySelector('{card} a')")

    # A drawn box is searched, and the results are those of the command's --bbox.
    page.click(f"{card} .onmap")
    page.click("#draw")
    box = page.value("(() => { const a = document.getElementById('map').getBoundingClientRect();"
                     "return [a.x, a.y, a.width, a.height]; })()")  # fmt: skip
    x, y, wide, high = box
    page.drag((x + wide * 0.3, y + high * 0.3), (x + wide * 0.7, y + high * 0.7))
    page.wait("new URLSearchParams(location.search).has('bbox') && !document.querySelector('#hits.waiting')")
    bbox = page.value("new URLSearchParams(location.search).get('bbox')")
    query = f"search?text=river&k=24&bbox={bbox}"
    with urllib.request.urlopen(server.url + query) as answer:
        want = json.load(answer)["hits"]
    page.wait(f"document.querySelectorAll('#hits li').length === {len(want)}")
    assert 0 < len(want) < len(hits)
    assert {hit["place"]["scene"] for hit in want} == {"scene-000.tif"}
    assert scenes_shown(page) == [hit["key"] for hit in want]
    with urllib.request.urlopen(server.url.rstrip("/") + page.value("geojson.getAttribute('href')")) as answer:
        assert answer.headers["Content-Type"] == "application/geo+json"
        features = json.load(answer)["features"]
    assert [feature["geometry"] for feature in features] == [hit["place"]["footprint"] for hit in want]

    # Without a mouse: a box in digits, and everywhere again.
    page.value("bbox.select()")
    page.write("8,-90,180,90")
    page.press("Enter")
    page.wait("new URLSearchParams(location.search).get('bbox') === '8,-90,180,90'")
    page.value("document.getElementById('nowhere').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('#hits li').length === 12")

    assert page.errors == [], page.missing
    assert all(address.startswith((server.url, "data:", "about:")) for address in page.requests)
