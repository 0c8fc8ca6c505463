"""Measurements become 8 bits by the values that they hold. Without rasterio they are right or refused."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from small_data import encoded, picture, rows
from small_rasters import reflectance, write_raster

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import count_pixels, open_image, upright_rgb
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.rasters import picture as pictures
from priorclip.data_shards.rasters.values import SENSORS, ValueRule, value_rule, without_outliers

HIGH, WIDE = 64, 80


def stretched(bands: np.ndarray, low: float = 2, high: float = 98) -> np.ndarray:
    """The picture (H, W, 3) of bands (B, H, W): each band's percentiles become 0 and 255, by numpy."""
    planes = []
    for band in bands.astype(float):
        black, white = np.percentile(band[np.isfinite(band)], (low, high))
        planes.append(np.clip((band - black) / (white - black) * 255, 0, 255))
    return np.dstack(planes * 3 if len(planes) == 1 else planes)


def pixels(data: bytes | Path, rule: ValueRule | None = None, limit: int = 100_000_000) -> np.ndarray:
    data = data.read_bytes() if isinstance(data, Path) else data
    with open_image(data, limit, rule or ValueRule()) as image:
        return np.asarray(upright_rgb(image)).astype(int)


def refusal(data: bytes | Path, **options: object) -> BadSample:
    with pytest.raises(BadSample) as caught:
        pixels(data, **options)  # type: ignore[arg-type]
    return caught.value


def close(found: np.ndarray, expected: np.ndarray, most: float = 1) -> bool:
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= most)


LAYOUTS = {  # name -> (type, bands, bands of the picture, options of GDAL)
    "u16x1": ("uint16", 1, (0,), {}),
    "u16x3": ("uint16", 3, (0, 1, 2), {"photometric": "MINISBLACK"}),
    "u16x13": ("uint16", 13, (0, 1, 2), {"photometric": "MINISBLACK"}),
    "u16x2": ("uint16", 2, (0,), {"photometric": "MINISBLACK"}),
    "u32": ("uint32", 1, (0,), {}),
    "i16x1": ("int16", 1, (0,), {}),
    "i16x4": ("int16", 4, (0, 1, 2), {"photometric": "MINISBLACK"}),
    "i32": ("int32", 1, (0,), {}),
    "f32x1": ("float32", 1, (0,), {}),
    "f32x3": ("float32", 3, (0, 1, 2), {"photometric": "MINISBLACK"}),
    "f64": ("float64", 1, (0,), {}),
    "f64x3": ("float64", 3, (0, 1, 2), {"photometric": "MINISBLACK"}),
    "rgb16": ("uint16", 3, (0, 1, 2), {"photometric": "RGB"}),
    "planar": ("uint16", 5, (0, 1, 2), {"interleave": "band"}),
    "tiled": ("uint16", 3, (0, 1, 2), {"tiled": True, "blockxsize": 32, "blockysize": 16, "interleave": "pixel"}),
    "bigtiff": ("uint16", 3, (0, 1, 2), {"bigtiff": "YES"}),
    "big-endian": ("uint16", 3, (0, 1, 2), {"endianness": "BIG"}),
    "lzw-predictor": ("uint16", 3, (0, 1, 2), {"compress": "lzw", "predictor": 2}),
    "deflate-float": ("float32", 3, (0, 1, 2), {"compress": "deflate", "predictor": 3}),
    "zstd": ("uint16", 3, (0, 1, 2), {"compress": "zstd"}),
    "lerc": ("float32", 1, (0,), {"compress": "lerc"}),
    "lzma": ("uint16", 1, (0,), {"compress": "lzma"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_scaled_by_its_values(name: str, tmp_path: Path) -> None:
    kind, bands, shown, options = LAYOUTS[name]
    values = reflectance(bands, HIGH, WIDE).astype(kind)
    assert close(pixels(write_raster(tmp_path / "a.tif", values, **options)), stretched(values[list(shown)]))


@pytest.mark.parametrize("options", [{"compress": "webp", "webp_lossless": True}, {"compress": "zstd"}])
def test_8_bit_data_stays_as_it_is(options: dict, tmp_path: Path) -> None:
    values = (reflectance(3, HIGH, WIDE, 40)).astype(np.uint8)
    found = pixels(write_raster(tmp_path / "a.tif", values, photometric="RGB", **options))
    assert np.array_equal(found, values.transpose(1, 2, 0))


def test_8_bit_data_of_many_bands_shows_the_first_three(tmp_path: Path) -> None:
    values = reflectance(6, HIGH, WIDE, 255).astype(np.uint8)
    found = pixels(write_raster(tmp_path / "a.tif", values, photometric="MINISBLACK"))
    assert np.array_equal(found, values[:3].transpose(1, 2, 0))


@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_jpeg_2000_of_many_bits(kind: str, tmp_path: Path) -> None:
    values = reflectance(3, HIGH, WIDE).astype(kind)
    options = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
    assert close(pixels(write_raster(tmp_path / "a.jp2", values, **options)), stretched(values))


def test_png_of_16_bits_a_colour(tmp_path: Path) -> None:
    values = reflectance(3, HIGH, WIDE).astype(np.uint16)
    path = write_raster(tmp_path / "a.png", values, georeferenced=False, driver="PNG")
    with Image.open(path) as image:
        assert np.asarray(image.convert("RGB")).max() <= 11  # what Pillow alone makes of it
    assert close(pixels(path), stretched(values))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_palette_gives_its_colours(kind: type, tmp_path: Path) -> None:
    values = np.arange(HIGH * WIDE).reshape(1, HIGH, WIDE).astype(kind) % 7
    table = {value: (30 * value, 200 - 20 * value, 5 + value, 255) for value in range(7)}
    found = pixels(write_raster(tmp_path / "a.tif", values, colormap=table, nodata=6))
    expected = np.array([table[value][:3] for value in range(6)] + [(0, 0, 0)])[values[0]]
    assert np.array_equal(found, expected)


def hole(values: np.ndarray, value: float) -> np.ndarray:
    """Sets a corner of 20 x 30 pixels, a tenth of all, to a value that stands for nothing."""
    values = values.copy()
    values[:, :20, :30] = value
    return values


NOTHING: dict[str, tuple[str, float, dict]] = {
    "declared": ("uint16", 0, {"nodata": 0}),
    "declared and large": ("uint16", 65535, {"nodata": 65535}),
    "declared as NaN": ("float32", np.nan, {"nodata": np.nan}),
    "NaN": ("float32", np.nan, {}),
    "infinite": ("float64", np.inf, {}),
    "-9999": ("float32", -9999, {}),
    "-9999 in 16 bits": ("int16", -9999, {}),
    "smallest of 16 bits": ("int16", -32768, {}),
    "smallest float": ("float32", np.finfo(np.float32).min, {}),
    "declared float": ("float32", np.finfo(np.float32).min, {"nodata": float(np.finfo(np.float32).min)}),
    "mask": ("uint16", 60000, {"mask": "corner"}),
    "alpha": ("uint16", 60000, {"alpha": True}),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("bands", [1, 3])
def test_nothing_enters_no_statistic_and_becomes_the_fill(name: str, bands: int, tmp_path: Path) -> None:
    kind, value, options = NOTHING[name]
    options = dict(options)
    clean = reflectance(bands, HIGH, WIDE).astype(kind) + np.array(50, kind)
    values = hole(clean, value)
    corner = np.zeros((HIGH, WIDE), bool)
    corner[:20, :30] = True
    if options.pop("mask", None):
        options["mask"] = ~corner
    if options.pop("alpha", None):
        values = np.concatenate([values, np.where(corner, 0, 65535).astype(kind)[None]])
        colours = [ColorInterp.gray] if bands == 1 else [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        options["colours"] = [*colours, ColorInterp.alpha]
    found = pixels(write_raster(tmp_path / "a.tif", values, **options), value_rule(fill=77))
    expected = stretched(np.where(corner, np.nan, clean.astype(float)))
    assert (found[corner] == 77).all()
    assert np.abs(found[~corner] - expected[~corner]).max() <= 1


def test_a_lone_outlier_changes_nothing(tmp_path: Path) -> None:
    """Also in a picture so small that one pixel is above the 98th percentile."""
    values = reflectance(1, 5, 6).astype(np.uint16)
    spoilt = values.copy()
    spoilt[0, 2, 2] = 65535
    clean = without_outliers(np.delete(values.ravel(), 2 * 6 + 2))
    black, white = np.percentile(clean, (2, 98))
    found = pixels(write_raster(tmp_path / "a.tif", spoilt))
    expected = np.clip((spoilt[0] - black) / (white - black) * 255, 0, 255)
    assert np.abs(found[..., 0] - expected).max() <= 1
    assert len(clean) == values.size - 1


def test_classes_far_apart_are_no_outliers() -> None:
    values = np.array([0] * 50 + [1] * 40 + [200] * 10, np.int16)
    assert np.array_equal(without_outliers(values), values)


def test_a_stated_range_and_a_range_for_each_band(tmp_path: Path) -> None:
    values = reflectance(3, HIGH, WIDE).astype(np.uint16)
    path = write_raster(tmp_path / "a.tif", values)
    found = pixels(path, value_rule("0,3000"))
    assert close(found, (values / 3000 * 255).transpose(1, 2, 0))
    found = pixels(path, value_rule("0,3000;1000,2000;-500,500"))
    for band, (low, high) in enumerate([(0, 3000), (1000, 2000), (-500, 500)]):
        assert close(found[..., band], np.clip((values[band].astype(float) - low) / (high - low) * 255, 0, 255))
    assert "2 ranges" in refusal(path, rule=value_rule("0,1;0,2")).detail


@pytest.mark.parametrize(("sensor", "count"), [(name, count) for name in SENSORS for count in SENSORS[name].bands])
def test_a_sensor_knows_its_bands_and_its_range(sensor: str, count: int, tmp_path: Path) -> None:
    kind = SENSORS[sensor]
    order = kind.bands[count]
    top = kind.high
    values = reflectance(count, HIGH, WIDE, top).astype(np.uint8 if top == 255 else np.uint16)
    path = write_raster(tmp_path / "a.tif", values, photometric="MINISBLACK")
    chosen = values[[order.index(name) for name in ("red", "green", "blue")]].astype(float)
    expected = np.clip((chosen - kind.low) / (kind.high - kind.low) * 255, 0, 255).transpose(1, 2, 0)
    assert close(pixels(path, value_rule(sensor)), expected)
    if "nir" in order:
        found = pixels(path, value_rule(sensor, bands="false-colour"))[..., 0]
        nir = (values[order.index("nir")].astype(float) - kind.low) / (kind.high - kind.low) * 255
        assert close(found, np.clip(nir, 0, 255))


def test_bands_by_description_and_number(tmp_path: Path) -> None:
    values = reflectance(4, HIGH, WIDE).astype(np.uint16)
    path = write_raster(tmp_path / "a.tif", values, names=("Blue", "Green", "Red", "NIR"), photometric="MINISBLACK")
    assert close(pixels(path), stretched(values[[2, 1, 0]]))
    assert close(pixels(path, value_rule(bands="nir,red,green")), stretched(values[[3, 2, 1]]))
    assert close(pixels(path, value_rule(bands="4")), stretched(values[3:]))
    detail = refusal(path, rule=value_rule(bands="urban")).detail
    assert "'swir2' of 4 bands; names: blue, green, red, nir" in detail


@pytest.mark.parametrize("kind", ["complex64", "complex_int16"])
def test_complex_values_are_refused_by_bands_and_type(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    values = (reflectance(2, 8, 8) * (1 + 1j)).astype(np.complex64)
    with rasterio.open(path, "w", driver="GTiff", count=2, height=8, width=8, dtype=kind) as file:
        file.write(values)
    error = refusal(path)
    assert error.reason == "unsupported raster"
    assert "2 bands of complex" in error.detail


def test_no_valid_pixel_and_too_few(tmp_path: Path) -> None:
    empty = write_raster(tmp_path / "a.tif", np.full((1, 8, 8), np.nan, np.float32))
    assert refusal(empty).reason == "too few valid pixels"
    values = np.full((1, 8, 8), np.nan, np.float32)
    values[0, 0] = np.arange(8)
    few = write_raster(tmp_path / "b.tif", values)
    assert refusal(few, rule=value_rule(min_valid=0.2)).reason == "too few valid pixels"
    assert pixels(few, value_rule(min_valid=0.1)).max() == 255


def test_size_is_bounded_before_pixels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    options = {"driver": "GTiff", "height": 30_000, "width": 30_000, "count": 3, "dtype": "uint16", "sparse_ok": True}
    with rasterio.open(path, "w", **options, compress="deflate"):
        pass
    assert len(path.read_bytes()) < 3_000_000
    assert refusal(path).reason == "too many pixels"
    with pytest.raises(BadSample, match="too many pixels"):
        count_pixels(path.read_bytes())
    huge_block = tmp_path / "b.tif"
    options |= {"height": 9_600, "width": 9_600, "tiled": True, "blockxsize": 9_600, "blockysize": 9_600}
    with rasterio.open(huge_block, "w", **options, compress="deflate", interleave="pixel"):
        pass
    assert "one block of 9600 x 9600 takes 527 MB" in refusal(huge_block).detail


def test_damaged_rasters_are_unreadable(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3000, (3, 64, 64)).astype(np.uint16)
    data = write_raster(tmp_path / "a.tif", values, compress="deflate", photometric="MINISBLACK").read_bytes()
    for cut in (9, 60, len(data) // 2):
        assert refusal(data[:cut]).reason in ("unreadable image", "not an image")
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 12):
            broken[place] = rng.integers(256)
        with suppress(BadSample):  # any other error fails the test
            assert pixels(bytes(broken), limit=1_000_000).shape[2] == 3


def test_turned_rasters_are_made_upright(tmp_path: Path) -> None:
    values = reflectance(1, HIGH, WIDE).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(values[0]).save(file, "TIFF", tiffinfo={274: 6})
    assert close(pixels(file.getvalue()), stretched(np.rot90(values, -1, (1, 2))))


@pytest.fixture
def without_rasterio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "has_rasterio", lambda: False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_rasterio_a_raster_is_right_or_refused(name: str, without_rasterio: None, tmp_path: Path) -> None:
    kind, bands, shown, options = LAYOUTS[name]
    values = reflectance(bands, HIGH, WIDE).astype(kind)
    path = write_raster(tmp_path / "a.tif", values, **options)
    if bands == 1 and kind in ("uint16", "int16", "int32", "float32") and "compress" not in options:
        assert close(pixels(path), stretched(values[list(shown)]))
        return
    error = refusal(path)
    assert error.reason == "needs rasterio"
    assert f"{bands} {'band' if bands == 1 else 'bands'} of {kind}" in error.detail
    assert "pip install 'priorclip-pretraining[geo]'" in error.detail


def test_without_rasterio_nothing_enters_no_statistic(without_rasterio: None, tmp_path: Path) -> None:
    values = hole(reflectance(1, HIGH, WIDE).astype(np.float32) + 50, -1)
    found = pixels(write_raster(tmp_path / "a.tif", values, nodata=-1), value_rule(fill=9))
    assert (found[:20, :30] == 9).all()
    expected = stretched(np.where(values == -1, np.nan, values.astype(float)))
    assert np.abs(found[20:] - expected[20:]).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--value-range", "3000"], "--value-range must be LOW,HIGH"),
        (["--value-range", "landsat"], "sentinel2-l2a, landsat-c2-l2, naip, planetscope"),
        (["--value-range", "5,5"], "black must be smaller than white"),
        (["--value-range", "0,nan"], "must be finite"),
        (["--percentiles", "98,2"], "the first one smaller"),
        (["--bands", "red,green"], "--bands must be one or three"),
        (["--fill", "256"], "--fill must be a grey level"),
        (["--min-valid", "2"], "--min-valid must be a share"),
    ],
)
def test_wrong_options_name_themselves(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["pack", "--source", "imagefolder", "--images", str(tmp_path), "--output", str(tmp_path / "o")]
    assert main([*words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_pack_records_the_range_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = reflectance(3, HIGH, WIDE).astype(np.uint16)
    write_raster(tmp_path / "in/land/deep.tif", values)
    write_raster(tmp_path / "in/land/complex.tif", np.ones((1, 8, 8), np.complex64))
    (tmp_path / "in/land/photo.jpg").write_bytes(encoded(picture(1)))
    words = ["pack", "--source", "imagefolder", "--images", str(tmp_path / "in"), "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    how = "percentiles 2 to 98 of the valid pixels of each image"
    assert f"scaled to 8 bits: 1 images of measured values, black and white are {how}" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out")
    assert manifest is not None
    assert manifest.scaled == {how: 1}
    assert manifest.options["values"]["percentiles"] == [2.0, 98.0]
    shards = ShardSet(str(tmp_path / "out"))
    found = {shards.key(i): shards.read(i) for i in range(len(shards))}
    facts = found["land/deep"].info["raster"]
    expected = [list(np.percentile(band, (2, 98))) for band in values]
    assert np.allclose(facts["range"], expected)
    assert (facts["type"], facts["valid"], facts["range_from"]) == ("uint16", 1.0, how)
    assert "raster" not in found["land/photo"].info
    (bad,) = rows(tmp_path / "out" / "quarantine.jsonl")
    assert (bad["key"], bad["reason"]) == ("land/complex", "unsupported raster")
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main([*words, "--output", str(tmp_path / "stated"), "--value-range", "0,3000"]) == 0
    assert json.loads((tmp_path / "stated/manifest.json").read_text())["scaled"] == {"the stated range": 1}


def test_every_reader_scales(tmp_path: Path) -> None:
    """Evaluation and search read files without packing; they show what a pack would hold."""
    values = reflectance(3, HIGH, HIGH).astype(np.uint16)
    data = write_raster(tmp_path / "a.tif", values, photometric="MINISBLACK").read_bytes()
    assert close(eval_transform(data, HIGH).transpose(1, 2, 0).astype(int), stretched(values))
    assert count_pixels(data) == 2 * HIGH * HIGH
