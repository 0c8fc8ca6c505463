"""An index of tiles of georeferenced scenes, which tests of places and of the map share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from small_galleries import TestSet

from priorclip.data_shards.__main__ import main as data_shards
from priorclip.retrieval import EmbeddingIndex, Encoder, Searcher
from priorclip.retrieval.__main__ import main


@pytest.fixture(scope="session")
def placed_index(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn scenes of four places, one scene across the dateline, and one without coordinates.

    The scenes are in ``scenes`` beside the index, the tiles in ``tiles``.
    """
    folder = tmp_path_factory.mktemp("places")
    words = ["--count", "2", "--size", "128", "--cell", "64", "--bands", "rgb", "--type", "uint8"]
    assert data_shards(["synthetic", "--output", str(folder / "scenes"), *words]) == 0
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 128), np.uint8)
    for name, place in (
        ("fiji.tif", {"crs": "EPSG:32660", "transform": from_origin(800_000, -1_900_000, 500, 500)}),
        ("lost.tif", {}),
    ):
        with rasterio.open(
            folder / "scenes" / name, "w", driver="GTiff", count=3, dtype="uint8", width=128, height=64, **place
        ) as file:
            file.write(pixels)
    tiles, output = folder / "tiles", folder / "index"
    words = ["pack", "--source", "raster", "--images", str(folder / "scenes"), "--tile", "64", "--workers", "1"]
    words += ["--vector", str(folder / "scenes/places.geojson"), "--keep-unlabelled", "true"]
    assert data_shards([*words, "--output", str(tiles)]) == 0
    words = ["index", "--model", str(test_set.export), "--data", str(tiles), "--device", "cpu", "--workers", "1"]
    assert main([*words, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def placed_searcher(placed_index: Path, test_set: TestSet) -> Searcher:
    return Searcher(EmbeddingIndex.load(placed_index), Encoder.load(test_set.export, "cpu"))
