"""Corruptions compared with references; the command's cells compared with an evaluation by hand; resuming."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from small_galleries import TestSet, export_model, picture, write_karpathy

from priorclip.model.recall import retrieval_metrics
from priorclip.retrieval import Encoder, evaluate, open_gallery
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import CORRUPTIONS as NAMES
from priorclip.retrieval.commands import EvaluateConfig, RobustnessConfig
from priorclip.retrieval.corruptions import (
    AIR,
    CLOUD,
    CORRUPTIONS,
    HAZE,
    NOISE,
    CorruptedSource,
    corrupt,
    fractal_noise,
    image_seed,
)
from priorclip.retrieval.robustness import CELLS, measure_robustness

FLAT = np.full((96, 112, 3), 128, np.uint8)
PHOTO = np.asarray(picture(4).resize((112, 96)))


def test_the_options_name_what_there_is() -> None:
    assert tuple(CORRUPTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_grows_with_its_severity_and_depends_on_seed_and_image_alone(name: str) -> None:
    green = PHOTO.copy()
    green[:48] = (40, 120, 30)  # a meadow
    seed = image_seed(0, name, "airport/1")
    levels = [corrupt(green, name, severity, seed) for severity in range(6)]
    assert np.array_equal(levels[0], green)
    assert all(level.shape == green.shape and level.dtype == np.uint8 for level in levels)
    away = [np.abs(level.astype(float) - green).mean() for level in levels]
    assert away[5] > away[3] > away[1] > 0.05
    assert np.array_equal(levels[3], corrupt(green.copy(), name, 3, seed))
    if name in ("noise", "cloud", "haze"):
        assert not np.array_equal(levels[3], corrupt(green, name, 3, image_seed(0, name, "airport/2")))
        assert not np.array_equal(levels[3], corrupt(green, name, 3, image_seed(1, name, "airport/1")))


def test_blur_is_scipys_and_jpeg_is_pillows() -> None:
    sigma = 3 * 96 / 224
    expected = ndimage.gaussian_filter(PHOTO.astype(float), (sigma, sigma, 0), mode="mirror", truncate=4)
    assert np.abs(corrupt(PHOTO, "blur", 3, 0) - expected).mean() < 0.6
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, "JPEG", quality=15)
    assert np.abs(corrupt(PHOTO, "jpeg", 3, 0).astype(float) - np.asarray(Image.open(buffer))).mean() < 1


def test_noise_haze_and_clouds_have_the_strength_they_say() -> None:
    noisy = corrupt(FLAT, "noise", 1, 7).astype(float)
    assert noisy.std() / 255 == pytest.approx(NOISE[0], rel=0.03)
    hazy = corrupt(FLAT, "haze", 3, 7).mean((0, 1)) / 255
    expected = 128 / 255 * HAZE[2] + AIR.flatten().numpy() * (1 - HAZE[2])
    assert hazy == pytest.approx(expected, abs=0.03)
    for severity, share in enumerate(CLOUD, 1):
        assert (corrupt(FLAT, "cloud", severity, 7)[..., 0] > 180).mean() == pytest.approx(share, abs=0.05)


def test_clouds_grow_where_they_are() -> None:
    covers = [corrupt(FLAT, "cloud", severity, 3)[..., 0] > 180 for severity in (1, 3, 5)]
    assert (covers[0] & ~covers[1]).mean() < 0.01
    assert (covers[1] & ~covers[2]).mean() < 0.01


def test_season_leaves_what_is_no_plant() -> None:
    scene = np.zeros((8, 8, 3), np.uint8)
    scene[:4], scene[4:] = (40, 120, 30), (120, 110, 105)
    dry = corrupt(scene, "season", 5, 0).astype(int)
    assert np.array_equal(dry[4:], scene[4:])
    assert dry[0, 0, 0] > dry[0, 0, 1] > dry[0, 0, 2]


def test_rotation_turns_about_the_centre_and_shows_no_corner() -> None:
    turned = corrupt(FLAT, "rotation", 5, 1)
    assert np.abs(turned.astype(int) - 128).max() <= 1
    spot = FLAT.copy()
    spot[46:50, 54:58] = 255
    high, wide = np.nonzero(corrupt(spot, "rotation", 4, 1)[..., 0] > 190)
    assert (high.mean(), wide.mean()) == pytest.approx((47.5, 55.5), abs=0.7)


def test_the_noise_field_falls_with_frequency_as_it_says() -> None:
    field = fractal_noise(256, 256, torch.Generator().manual_seed(0))
    power = torch.fft.rfft2(field).abs()
    frequency = torch.hypot(torch.fft.fftfreq(256)[:, None], torch.fft.rfftfreq(256)[None])
    rings = [power[(frequency > low) & (frequency <= 2 * low)].square().mean().sqrt() for low in (0.05, 0.1, 0.2)]
    slopes = [torch.log2(one / other).item() for one, other in itertools.pairwise(rings)]
    assert slopes == pytest.approx([1.8, 1.8], abs=0.15)
    assert (field.mean().item(), field.std().item()) == pytest.approx((0, 1), abs=1e-4)


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="'rain' is no corruption"):
        corrupt(FLAT, "rain", 1, 0)
    with pytest.raises(ValueError, match="severity 6 of haze"):
        corrupt(FLAT, "haze", 6, 0)


@pytest.fixture(scope="module")
def exports(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    texts = [row["raw"] for entry in test_set.entries() for row in entry["sentences"]]
    return [test_set.export, export_model(folder / "other", texts, seed=1)]


def request(test_set: TestSet, exports: list[Path], output: Path, **changes) -> RobustnessConfig:
    values = {"models": [f"one={exports[0]}", f"two={exports[1]}"], "data": str(test_set.json), "limit": 12}
    values |= {"images": str(test_set.images), "output": str(output), "device": "cpu", "severities": [2, 4]}
    return RobustnessConfig(**(values | {"corruptions": "jpeg,cloud,captions", "caption_shares": [0.5]} | changes))


def test_cells_are_what_evaluating_by_hand_gives(test_set: TestSet, exports: list[Path], tmp_path: Path) -> None:
    report = measure_robustness(request(test_set, exports, tmp_path / "out"))
    assert len(report["cells"]) == 2 * (1 + 2 * 2 + 1)
    cells = {(cell["model"], cell["corruption"], cell["severity"]): cell for cell in report["cells"]}
    settings = EvaluateConfig(
        model=str(exports[0]), data=str(test_set.json), images=str(test_set.images), limit=12, device="cpu"
    )
    assert cells["one", "none", 0]["mean_recall"] == pytest.approx(evaluate(settings)["mean_recall"])
    encoder = Encoder.load(exports[0], "cpu")
    gallery = open_gallery(settings.data, settings.images, limit=12)
    hurt = replace(gallery, source=CorruptedSource(gallery.source, "cloud", 4, 0))
    batches = encoder.batches(hurt, settings, "captions")
    images, texts = encoder.images(batches).features, encoder.texts(batches)
    expected = retrieval_metrics(images, texts, torch.from_numpy(batches.text_image))
    assert cells["one", "cloud", 4]["mean_recall"] == pytest.approx(expected["mean_recall"])
    low, high = cells["one", "cloud", 4]["interval"]
    assert low < expected["mean_recall"] < high
    assert cells["one", "cloud", 4]["mean_recall"] != cells["two", "cloud", 4]["mean_recall"]
    table = (tmp_path / "out" / "robustness.md").read_text()
    clean, clouded = cells["one", "none", 0]["mean_recall"], cells["one", "cloud", 2]["mean_recall"]
    assert f"| one | {clean:.1f} | {clouded:.1f} |" in table
    assert Image.open(tmp_path / "out" / "robustness.png").width > 600


def test_swapping_captions_of_a_perfect_model_costs_exactly_their_share() -> None:
    from priorclip.retrieval.features import Features
    from priorclip.retrieval.robustness import swap_captions

    rows = torch.nn.functional.normalize(torch.randn(20, 16), dim=-1)
    owner = torch.arange(20).repeat_interleave(3)
    whole = Features(rows, rows[owner], owner, torch.zeros(20), [], torch.arange(20), [""] * 60, {})
    assert retrieval_metrics(rows, whole.texts, owner)["t2i_r1"] == 100
    half = swap_captions(whole, 0.4, seed=5)
    found = retrieval_metrics(rows, half.texts, half.owner)
    assert (found["t2i_r1"], found["i2t_r1"]) == pytest.approx((60, 60))


def test_a_stopped_run_goes_on_and_measures_nothing_twice(
    test_set: TestSet, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    whole = measure_robustness(request(test_set, exports, output, corruptions="jpeg"))
    lines = (output / CELLS).read_text().splitlines()
    (output / CELLS).write_text("\n".join(lines[:3]) + "\n" + lines[3][:25])  # killed in the middle of a line
    encoded = []
    images = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, *words: encoded.append(self.folder) or images(self, *words))
    again = measure_robustness(request(test_set, exports, output, corruptions="jpeg"))
    assert again["cells"] == whole["cells"]
    assert encoded == [exports[1]] * 3  # of six: the second model's clean images and two severities
    assert len([json.loads(line) for line in (output / CELLS).read_text().splitlines() if line.endswith("}")]) == 6
    encoded.clear()
    measure_robustness(request(test_set, exports, output, corruptions="jpeg"))
    assert not encoded


def test_models_that_share_encoders_encode_an_image_once(
    test_set: TestSet, exports: list[Path], tmp_path: Path
) -> None:
    """Another head on the same encoders has the same recall with the cache, and the cache does not grow."""
    head = Path(shutil.copytree(exports[0], tmp_path / "head"))
    weights = load_file(head / "model.safetensors")
    weights["image_projection.weight"] = weights["image_projection.weight"].flip(0)
    save_file(weights, head / "model.safetensors")
    asked = {"corruptions": "jpeg", "models": [f"one={exports[0]}", f"head={head}"]}
    plain = measure_robustness(request(test_set, exports, tmp_path / "plain", **asked))["cells"]
    assert plain[0]["mean_recall"] != plain[3]["mean_recall"]
    grown = []
    for name, export in (("one", exports[0]), ("head", head)):
        asked |= {"models": [f"{name}={export}"], "remember": str(tmp_path / "memory")}
        cells = measure_robustness(request(test_set, exports, tmp_path / name, **asked))["cells"]
        assert [cell["mean_recall"] for cell in cells] == [
            cell["mean_recall"] for cell in plain if cell["model"] == name]  # fmt: skip
        grown.append(len(list((tmp_path / "memory").rglob("*.safetensors"))))
    assert grown[0] == grown[1] > 2 * 12 * 3, "12 images, clean and twice worse, for vision and prior, and the texts"


def test_command_takes_models_with_blanks_between_and_names_what_is_wrong(
    test_set: TestSet, exports: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(test_set.shards), "--output", str(tmp_path / "out"), "--device", "cpu"]
    models = ["--models", f"seed={exports[0]}", f"seed={exports[1]}"]
    words = ["robustness", *models, *data, "--corruptions", "captions", "--caption-shares", "0.25", "--limit", "8"]
    assert main(words) == 0
    assert " ± " in capsys.readouterr().out  # two models of one name
    words = ["--models", f"one={exports[0]}", *data, "--limit", "8", "--corruptions", "captions,blur"]
    assert main(["robustness", *words, "--severities", "5", "5", "--caption-shares", "0.255", "0.25", "0.255"]) == 0
    table = capsys.readouterr().out
    assert "| captions, % swapped | 0 | 25 | 25.5 |" in table
    assert " ± " not in table, "what is named twice is measured once"
    assert main(["robustness", "--models", "=x", *data]) == 2
    assert "NAME=EXPORT" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["robustness", *models, *data, "--corruptions", "rain"])
    assert "'rain' is no corruption" in capsys.readouterr().err


def test_features_are_encoded_once_and_anew_when_anything_changes(
    test_set: TestSet, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    images = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, *words: encoded.append(1) or images(self, *words))

    def run(**changes) -> float:
        values = {"model": str(exports[0]), "data": str(test_set.json), "images": str(test_set.images), "device": "cpu"}
        encoded.clear()
        values |= {"features": str(tmp_path), "bootstrap": 0}
        return evaluate(EvaluateConfig(**(values | changes)))["mean_recall"]

    first = run()
    assert encoded == [1]
    (kept,) = tmp_path.glob("*.safetensors")
    assert run() == first
    assert not encoded
    for changes in ({"model": str(exports[1])}, {"limit": 9}, {"precision": "bf16"}, {"max_pixels": 10**6}):
        run(**changes)
        assert encoded == [1], changes
    path = test_set.images / test_set.entries()[2]["filename"]
    before = path.read_bytes()
    try:
        picture(99).save(path)
        run()
        assert encoded == [1]
        newest = max(tmp_path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        moved = (load_file(newest)["images"] - load_file(kept)["images"]).abs().amax(1)
        assert moved[2] > 1e-4
        assert moved[:2].max() == moved[3:].max() == 0
    finally:
        path.write_bytes(before)
    entries = test_set.entries()
    classes = [set(), set()]
    for place, label in enumerate(("quarry", "airport")):
        entries[0]["label"] = label
        renamed = write_karpathy(tmp_path / "renamed.json", entries)
        values = {"model": str(exports[0]), "images": str(test_set.images), "device": "cpu", "limit": 4}
        report = evaluate(EvaluateConfig(data=str(renamed), features=str(tmp_path), bootstrap=0, **values))
        classes[place] = set(report["classes"])
    assert classes[0] ^ classes[1] == {"quarry", "airport"}
    run()  # the file has a new time
    damaged = max(tmp_path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read .*remove it"):
        run()
