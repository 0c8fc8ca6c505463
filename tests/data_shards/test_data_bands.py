"""Images of measured bands: written as rasterio reads them, streamed as Pillow would resize them, counted exactly."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from small_data import encoded, picture, rows
from small_rasters import reflectance, write_raster
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.band_statistics import read_band_statistics
from priorclip.data_shards.config import DataConfig, RandAugmentConfig
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import align_box, eval_transform, random_box, random_crop
from priorclip.data_shards.rasters.band_file import read_bands, unused_value, write_bands
from priorclip.data_shards.stream.evaluation_batches import eval_batches
from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.infrared import render_infrared
from priorclip.data_shards.synthetic.plants import artificial_of, has_plants
from priorclip.data_shards.synthetic.scene import GROUND, sketch_scene

NAMES = ("coastal", "blue", "green", "red", "nir")
SIDE = 150


def whole(wide: int, high: int) -> tuple[int, int, int, int]:
    return 0, 0, wide, high


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of five bands of 16 bits, whose lower right corner is empty."""
    folder = tmp_path_factory.mktemp("scenes")
    values = (reflectance(5, SIDE, SIDE) + 20).astype(np.uint16)
    values[:, 110:, 120:] = 65535
    write_raster(folder / "a.tif", values, nodata=65535, names=NAMES, tiled=True, blockxsize=64, blockysize=64)
    return folder


def pack(scenes: Path, output: Path, *more: str) -> int:
    words = ["pack", "--source", "raster", "--images", str(scenes), "--output", str(output), "--tile", "64"]
    return main([*words, "--stride", "43", "--image-format", "tiff", "--shard-size", "4", "--workers", "1", *more])


@pytest.fixture(scope="module")
def packed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine tiles of near infrared, red and blue; the labels are for the evaluation batches."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    assert pack(scenes, folder, "--bands", "nir,red,blue", "--min-valid", "0.1") == 0
    return folder


def source_window(scenes: Path, window: list[int], names: tuple[str, ...]) -> np.ndarray:
    """What rasterio reads of the scene, with 0 for pixels without data: float32 (bands, h, w)."""
    x, y, wide, high = window
    with rasterio.open(scenes / "a.tif") as file:
        values = file.read([NAMES.index(name) + 1 for name in names], window=((y, y + high), (x, x + wide)))
    return np.where(values == 65535, 0, values).astype(np.float32)


def test_a_member_holds_the_values_and_names_of_its_window(scenes: Path, packed: Path) -> None:
    shards = ShardSet(str(packed))
    assert len(shards) == 9
    kept = {}
    for number in range(len(shards)):
        sample = shards.read(number)
        expected = source_window(scenes, sample.info["window"], ("nir", "red", "blue"))
        with rasterio.MemoryFile(sample.image) as memory, memory.open() as file:
            assert (file.dtypes, file.descriptions) == (("uint16",) * 3, ("nir", "red", "blue"))
            valid = file.dataset_mask() > 0
            assert np.array_equal(file.read() * valid, expected)
        assert np.array_equal(valid, (expected > 0).all(0))
        kept[tuple(sample.info["window"][:2])] = sample.info
        assert sample.info["raster"] == {"bands": ["nir", "red", "blue"], "type": "uint16",
                                         "valid": round(float(valid.mean()), 4)}  # fmt: skip
        assert (sample.info["width"], sample.info["height"]) == (64, 64)
    assert kept[86, 86]["raster"]["valid"] == round(1 - 40 * 30 / 64**2, 4)
    assert json.loads((packed / "manifest.json").read_text())["options"]["image_format"] == "tiff"
    assert main(["verify", "--shards", str(packed), "--decode", "true", "--workers", "1"]) == 0


def test_packing_is_reproducible(scenes: Path, packed: Path, tmp_path: Path) -> None:
    assert pack(scenes, tmp_path / "two", "--bands", "nir,red,blue", "--min-valid", "0.1", "--workers", "2") == 0
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}
        for folder in (packed, tmp_path / "two")
    ]
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]


def test_without_bands_all_are_kept(scenes: Path, tmp_path: Path) -> None:
    assert pack(scenes, tmp_path / "all") == 0
    sample = ShardSet(str(tmp_path / "all")).read(0)
    assert sample.info["raster"]["bands"] == list(NAMES)
    by_number = read_bands(sample.image, ("5", "2"), whole, 10**6)
    assert np.array_equal(by_number, read_bands(sample.image, ("nir", "Blue"), whole, 10**6))
    assert np.array_equal(by_number, source_window(scenes, sample.info["window"], ("nir", "blue")))


def test_any_type_keeps_its_values_and_its_holes() -> None:
    for kind in ("uint8", "int16", "uint16", "int32", "float32", "float64"):
        values = np.moveaxis(reflectance(4, 30, 50, 120), 0, -1).astype(kind)
        values[0, :8, 0] = [0, 1, 2, 3, 4, 5, 6, 7]
        valid = np.ones((30, 50), bool)
        valid[10:, 20:30] = False
        data = write_bands(values, valid, "abcd")
        expected = np.where(valid[..., None], values, 0).astype(np.float32)
        assert np.array_equal(np.moveaxis(read_bands(data, "abcd", whole, 10**6), 0, -1), expected), kind
        assert data == write_bands(values, valid, "abcd")
    large = np.random.default_rng(0).integers(0, 9000, (600, 520, 2), np.uint16)
    data = write_bands(large, np.ones(large.shape[:2], bool), "ab")
    part = read_bands(data, "b", lambda wide, high: (wide - 30, high - 20, wide, high), 10**6)
    assert np.array_equal(part[0], large[-20:, -30:, 1])


def test_the_value_of_a_hole_is_one_that_no_pixel_has() -> None:
    assert unused_value(np.array([[1, 5]], np.uint16)) == 0
    assert unused_value(np.array([0, 65535, 65534], np.uint16)) == 65533
    assert np.isnan(unused_value(np.array([0.5], np.float32)))
    with pytest.raises(BadSample, match="leave none free"):
        unused_value(np.arange(256, dtype=np.uint8))


def test_crops_are_those_of_pictures_and_resized_as_pillow_does(scenes: Path, packed: Path) -> None:
    sample = ShardSet(str(packed)).read(0)
    planes = source_window(scenes, sample.info["window"], ("nir", "red", "blue"))
    box = align_box(random_box(64, 64, 0.5, random.Random(7)), 24)
    for found, (left, top, right, bottom) in (
        (random_crop(sample.image, 24, random.Random(7), bands=("nir", "red", "blue")), box),
        (eval_transform(sample.image, 24, bands=("nir", "red", "blue")), (0, 0, 64, 64)),
    ):
        assert (found.dtype, found.shape) == (np.float32, (3, 24, 24))
        for plane, result in zip(planes, found, strict=True):
            crop = Image.fromarray(np.ascontiguousarray(plane[top:bottom, left:right]))
            assert result == pytest.approx(np.asarray(crop.resize((24, 24), Image.Resampling.BICUBIC)), abs=0.02)


def test_other_images_and_bands_are_bad_samples(packed: Path) -> None:
    image = ShardSet(str(packed)).read(0).image
    turned = io.BytesIO()
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(turned, "TIFF", tiffinfo={274: 6})
    for data, bands, limit, reason in (
        (encoded(picture(0)), ("red",), 10**6, "no bands"),
        (image, ("red", "swir1"), 10**6, "no such band: 'swir1' of 3 bands; names: nir, red, blue"),
        (image, ("7",), 10**6, "no such band"),
        (image, ("red",), 4000, "too many pixels: 64 x 64"),
        (image[:400], ("red",), 10**6, "unreadable image"),
        (turned.getvalue(), ("1",), 10**6, "unsupported raster: its tag of orientation is 6"),
    ):
        with pytest.raises(BadSample, match=reason):
            eval_transform(data, 8, max_pixels=limit, bands=bands)


def test_a_stream_of_bands_repeats_and_resumes_bit_for_bit(packed: Path) -> None:
    settings = config(packed, bands=["blue", "nir"])
    batches = take(stream_of(settings, batch=4), 5)
    assert batches[0]["images"].shape == (4, 2, 24, 24)
    assert batches[0]["images"].dtype == torch.float32
    assert_same(take(stream_of(settings, batch=4), 5), batches)
    ranks = [stream_of(settings, batch=4, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *parts in zip(batches, *(take(rank, 5) for rank in ranks), strict=True):
        assert torch.equal(torch.stack([part["images"] for part in parts], 1).flatten(0, 1), batch["images"])
    stream = stream_of(settings, batch=4)
    first = take(stream, 3)
    resumed = stream_of(settings, batch=4)
    resumed.load_state_dict(stream.state_dict())
    assert_same([*first, *take(resumed, 2)], batches)


def test_workers_give_the_same_tensors(packed: Path) -> None:
    settings = config(packed, bands=["red"])
    assert_same(
        take(stream_of(config(packed, bands=["red"], workers=1, start_method="fork"), batch=4), 2),
        take(stream_of(settings, batch=4), 2),
    )


def test_flips_and_turns_only_move_values(packed: Path) -> None:
    settings = config(packed, bands=["red", "nir"], scale=1.0)
    shards, seen = ShardSet(str(packed)), set()
    for batch in take(stream_of(settings, batch=4), 8):
        for image, number in zip(batch["images"].numpy(), batch["image_ids"].tolist(), strict=True):
            plain = eval_transform(shards.read(number).image, 24, bands=("red", "nir"))
            ways = {(turn, flip): np.rot90(plain[:, :, ::flip], turn, (1, 2)) for turn in range(4) for flip in (1, -1)}
            (found,) = [way for way, pixels in ways.items() if np.array_equal(pixels, image)]
            seen.add(found)
    assert len(seen) >= 6


def test_evaluation_batches_have_the_bands_in_order(packed: Path) -> None:
    shards = ShardSet(str(packed))
    batches = eval_batches(shards, None, 16, 6, bands=("blue", "red"))
    found = torch.cat([batch["images"][batch["index"] >= 0] for batch in batches.images()])
    expected = [eval_transform(shards.read(number).image, 16, bands=("blue", "red")) for number in range(9)]
    assert torch.equal(found, torch.from_numpy(np.stack(expected)))


def test_statistics_are_those_of_the_valid_values(scenes: Path, packed: Path, tmp_path: Path) -> None:
    assert main(["stats", "--shards", str(packed), "--output", str(tmp_path), "--workers", "1"]) == 0
    shards = ShardSet(str(packed))
    windows = [shards.read(number).info["window"] for number in range(9)]
    found = read_band_statistics(tmp_path)
    assert list(found) == ["nir", "red", "blue"]
    for name, (mean, deviation) in found.items():
        values = [source_window(scenes, window, (name,)) for window in windows]
        values = np.concatenate([plane[plane > 0] for plane in values]).astype(np.float64)
        assert (mean, deviation) == pytest.approx((values.mean(), values.std()), rel=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no bands"),
        ({"rasters": {"bands": {"red": {"mean": 1.0}}}}, "'red' has no finite mean"),
        ({"rasters": {"bands": {"red": {"mean": 1.0, "deviation": "x"}}}}, "'red' has no finite mean"),
        ({"rasters": {"bands": {"red": {"mean": 1.0, "deviation": 0}}}}, "the same everywhere"),
    ],
)
def test_bad_statistics_are_named(content: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_band_statistics(tmp_path / "stats.json")
    with pytest.raises(FileNotFoundError, match=r"data\.statistics"):
        read_band_statistics(tmp_path / "none.json")


def test_options_of_bands_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        DataConfig("x", bands=["red", "red"])
    with pytest.raises(ValueError, match="the model takes pictures"):
        DataConfig("x", bands=["red"]).follow(64, "run")
    with pytest.raises(ValueError, match="the model takes red, nir"):
        DataConfig("x", bands=["nir", "red"]).follow(64, "run", ["red", "nir"])
    with pytest.raises(ValueError, match="randaugment"):
        DataConfig("x", randaugment=RandAugmentConfig()).follow(64, "run", ["red"])
    followed = DataConfig("x")
    followed.follow(64, "run", ["red", "nir"])
    assert followed.bands == ["red", "nir"]
    numbers = DataConfig("x", bands=["4", "8"])
    numbers.follow(64, "run", ["red", "nir"])
    assert numbers.bands == ["4", "8"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-format", "png"], "--image-format must be jpeg or tiff"),
        (["--quality", "80"], "does not take --quality"),
        (["--value-range", "0,3000"], "does not take --value-range"),
        (["--bands", "red,red"], "different names"),
        (["--bands", "red,swir1"], "none of 1 scenes"),
    ],
)
def test_bad_options_of_packing_name_the_option(
    more: list[str], message: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(scenes, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def drawn(output: Path, *more: str) -> int:
    words = [
        "pack",
        "--source",
        "synthetic",
        "--count",
        "24",
        "--size",
        "32",
        "--workers",
        "1",
        "--output",
        str(output),
    ]
    return main([*words, *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bands", "red,green,nir"], "--bands needs --image-format tiff"),
        (["--artificial-plants", "0.5"], "--artificial-plants differ in near infrared only"),
        (["--artificial-plants", "2", "--image-format", "tiff"], "must be a share"),
        (["--image-format", "tiff", "--bands", "red,swir1"], "swir1 is not drawn"),
        (["--image-format", "tiff", "--masks", "true"], "--masks needs --image-format jpeg"),
    ],
)
def test_bad_options_of_drawn_bands_are_named(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drawn(tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_colours_do_not_tell_artificial_plants_and_near_infrared_does(tmp_path: Path) -> None:
    names = ("red", "green", "blue", "nir")
    for share in ("0.001", "1"):
        assert drawn(tmp_path / share, "--image-format", "tiff", "--artificial-plants", share) == 0
    living, artificial = (ShardSet(str(tmp_path / share)) for share in ("0.001", "1"))
    told = 0
    for number in range(24):
        one, other = living.read(number), artificial.read(number)
        before, after = (read_bands(sample.image, names, whole, 10**6) for sample in (one, other))
        assert np.array_equal(before[:3], after[:3])
        kinds = [sample.info["attributes"].get("plants") for sample in (one, other)]
        assert kinds in ([None, None], ["living", "artificial"])
        told += kinds[1] is not None
        if kinds[1] is None:
            assert one.captions == other.captions
            continue
        assert (before[3] > after[3] + 300).mean() > 0.05
        assert all("alive" in text or "living" in text for text in one.captions)
        assert all("artificial" in text or "plastic" in text for text in other.captions)
    assert 6 <= told <= 23
    assert main(["pack", "--source", "synthetic", "--count", "1", "--size", "32", "--workers", "1", "--output",
                 str(tmp_path / "plain"), "--image-format", "tiff", "--bands", "nir,blue"]) == 0  # fmt: skip
    plain = ShardSet(str(tmp_path / "plain")).read(0)
    assert plain.info["raster"]["bands"] == ["nir", "blue"]
    assert "plants" not in plain.info["attributes"]


def test_water_is_dark_and_leaves_are_bright_in_near_infrared() -> None:
    means: dict[str, list[float]] = {"forest": [], "harbour": []}
    for index in range(48):
        label, sketch, _ = sketch_scene(0, index)
        if label in means:
            means[label].append(float(np.median(render_infrared(sketch, 48, generator(0, GROUND, index)))))
    assert all(value > 0.3 for value in means["forest"])
    assert min(means["harbour"]) < 0.05


def test_the_share_of_artificial_plants_is_that_asked_for() -> None:
    drawn_kinds = [artificial_of(0, index, 0.3) for index in range(2000)]
    assert 0.26 < np.mean(drawn_kinds) < 0.34
    desert = next(index for index in range(60) if sketch_scene(0, index)[0] == "desert")
    forest = next(index for index in range(60) if sketch_scene(0, index)[0] == "forest")
    for index, plants in ((desert, False), (forest, True)):
        sketch = sketch_scene(0, index)[1]
        assert has_plants(sketch, lambda index=index: generator(0, GROUND, index)) == plants


def test_bad_tiles_are_listed(scenes: Path, tmp_path: Path) -> None:
    assert pack(scenes, tmp_path / "out", "--min-valid", "0.9") == 0
    (row,) = rows(tmp_path / "out/quarantine.jsonl")
    assert (row["key"], row["reason"]) == ("a/000086-000086", "too few valid pixels")
