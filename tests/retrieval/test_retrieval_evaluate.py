"""`retrieval evaluate`: figures compared with an independent recall, every form of input, bad images, errors."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_galleries import SCENES, TestSet, write_karpathy

from priorclip.data_shards import eval_batches
from priorclip.data_shards.sources import karpathy
from priorclip.model import SceneClassifier, SceneConfig, retrieval_metrics, save_pretrained
from priorclip.model.config import EncoderConfig
from priorclip.model.evaluation import evaluate_retrieval
from priorclip.retrieval import Encoder, evaluate, open_gallery
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import EvaluateConfig
from priorclip.retrieval.text_tables import recall_table

ROOT = Path(__file__).parents[2]
FIGURES = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"mean_recall"}
FACTS = {"chance", "images", "captions", "model", "data", "split", "caption_field", "precision", "device", "skipped"}


def config(test_set: TestSet, **changes) -> EvaluateConfig:
    values = {"model": str(test_set.export), "data": str(test_set.json), "images": str(test_set.images)}
    return EvaluateConfig(**(values | {"device": "cpu", "batch_size": 7} | changes))


def six_recalls(report: dict) -> dict[str, float]:
    return {name: report[name] for name in FIGURES}


def slow_recall(similarity: list[list[float]], owner: list[int], ways=("i2t", "t2i")) -> dict[str, float]:
    """The protocol of the field: sort the answers of each query and find the first right one.

    ``similarity[i][t]`` of image i and caption t, ``owner[t]`` the image of caption t.
    """
    texts = range(len(owner))
    first: dict[str, list[int]] = {way: [] for way in ways}
    for image, row in enumerate(similarity):
        ranked = sorted(texts, key=lambda t: -row[t])
        first["i2t"].append(next(place for place, t in enumerate(ranked, 1) if owner[t] == image))
    for text in texts:
        ranked = sorted(range(len(similarity)), key=lambda image: -similarity[image][text])
        first["t2i"].append(ranked.index(owner[text]) + 1)
    found = {
        f"{way}_r{k}": 100 * sum(place <= k for place in places) / len(places)
        for way, places in first.items()
        for k in (1, 5, 10)
    }
    return found | {"mean_recall": sum(found.values()) / len(found)}


def features(test_set: TestSet, entries: list[dict]) -> tuple[list[list[float]], list[int]]:
    """Similarities of test images and captions, each encoded alone, without the batches of this package."""
    from priorclip.data_shards.images.transforms import eval_transform

    encoder = Encoder.load(test_set.export, "cpu")
    pixels = [eval_transform((test_set.images / entry["filename"]).read_bytes(), 64) for entry in entries]
    texts = [row["raw"] for entry in entries for row in entry["sentences"]]
    owner = [place for place, entry in enumerate(entries) for _ in entry["sentences"]]
    with torch.no_grad():
        images = torch.cat([encoder.model.encode_image(torch.from_numpy(image)[None]) for image in pixels]).double()
        captions = []
        for text in texts:
            tokens = encoder.tokenizer(text, return_tensors="pt")
            captions.append(encoder.model.encode_text(tokens["input_ids"], tokens["attention_mask"]))
    return (images @ torch.cat(captions).double().T).tolist(), owner


def test_command_writes_the_report_and_prints_the_table(test_set: TestSet, tmp_path: Path) -> None:
    output = tmp_path / "made" / "report.json"
    words = ["--model", test_set.export, "--data", test_set.json, "--images", test_set.images, "--output", output]
    command = [sys.executable, "-m", "retrieval", "evaluate", *map(str, words), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert set(report) == FIGURES | FACTS | {"seconds", "intervals", "classes"}
    assert set(report["chance"]) == FIGURES
    assert (report["images"], report["captions"], report["split"]) == (24, 84, "test")
    assert report["model"] == str(test_set.export)
    assert report["data"] == str(test_set.json)
    assert report["skipped"] == {}
    assert report["seconds"] > 0
    assert f"{report['mean_recall']:.2f} ({report['chance']['mean_recall']:.2f})" in " ".join(done.stdout.split())
    assert os.listdir(output.parent) == ["report.json"]


def test_figures_equal_a_slow_recall_on_features_encoded_one_by_one(test_set: TestSet) -> None:
    report = evaluate(config(test_set))
    entries = [entry for entry in test_set.entries() if entry["split"] == "test"]
    expected = slow_recall(*features(test_set, entries))
    assert six_recalls(report) == pytest.approx(expected, abs=1e-9)
    assert 0 < report["mean_recall"] < 100


def test_figures_equal_the_evaluation_while_training(test_set: TestSet) -> None:
    encoder = Encoder.load(test_set.export, "cpu")
    records = karpathy(test_set.json, test_set.images, "test")
    batches = eval_batches(records, encoder.tokenizer, encoder.image_size, 5)
    assert six_recalls(evaluate(config(test_set))) == pytest.approx(
        evaluate_retrieval(encoder, batches, torch.device("cpu")), abs=1e-9
    )


def test_shards_give_the_figures_of_the_karpathy_json(test_set: TestSet) -> None:
    expected = evaluate(config(test_set))
    packed = evaluate(config(test_set, data=str(test_set.shards), images=None, workers=1))
    pattern = evaluate(config(test_set, data=f"{test_set.shards}/test-{{000000..000002}}.tar", images=None))
    assert six_recalls(packed) == six_recalls(pattern) == six_recalls(expected)
    assert packed["chance"] == expected["chance"]
    assert (packed["images"], packed["captions"], packed["split"]) == (24, 84, "all")


def test_chance_is_what_random_features_score(test_set: TestSet) -> None:
    report = evaluate(config(test_set))
    owner = torch.tensor([n for n, entry in enumerate(test_set.entries()[:24]) for _ in entry["sentences"]])
    generator = torch.Generator().manual_seed(0)
    draws = [
        retrieval_metrics(
            torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1),
            torch.nn.functional.normalize(torch.randn(84, 16, generator=generator), dim=1),
            owner,
        )["mean_recall"]
        for _ in range(400)
    ]
    error = torch.tensor(draws).std().item() / math.sqrt(len(draws))
    assert report["chance"]["mean_recall"] == pytest.approx(sum(draws) / len(draws), abs=4 * error)


def test_bad_images_are_listed_and_leave_the_test_with_their_captions(test_set: TestSet, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(test_set.images, images)
    entries = [entry for entry in test_set.entries() if entry["split"] == "test"]
    names = [entry["filename"] for entry in entries]
    (images / names[0]).write_bytes((images / names[0]).read_bytes()[:60])
    (images / names[7]).write_bytes(b"<html>404</html>")
    (images / names[13]).unlink()
    entries[3]["sentences"] = []
    path = write_karpathy(tmp_path / "bad.json", entries)
    report = evaluate(config(test_set, data=str(path), images=str(images)))

    keys = [name.removesuffix(".png") for name in names]
    assert {key for listed in report["skipped"].values() for key in listed} == {keys[n] for n in (0, 3, 7, 13)}
    assert report["skipped"]["missing file"] == [keys[13]]
    assert report["skipped"]["not an image"] == [keys[7]]
    assert report["skipped"]["no caption"] == [keys[3]]
    assert f"left out, missing file: {keys[13]}" in recall_table(report)

    good = [entry for n, entry in enumerate(entries) if n not in (0, 3, 7, 13)]
    smaller = evaluate(config(test_set, data=str(write_karpathy(tmp_path / "good.json", good))))
    assert six_recalls(report) == pytest.approx(six_recalls(smaller), abs=1e-9)
    assert report["chance"] == smaller["chance"]
    assert (report["images"], report["captions"]) == (smaller["images"], smaller["captions"])


def test_too_many_bad_images_stop_it(test_set: TestSet, tmp_path: Path) -> None:
    shutil.copytree(test_set.images, tmp_path / "images")
    for path in (tmp_path / "images" / "river").iterdir():
        path.write_bytes(b"")
    allowed = evaluate(config(test_set, images=str(tmp_path / "images"), max_bad_share=0.25))
    assert len(allowed["skipped"]["empty image"]) == 6
    with pytest.raises(ValueError, match=r"6 of 24 images .*empty image: 6, such as river/river_1"):
        evaluate(config(test_set, images=str(tmp_path / "images"), max_bad_share=0.24))


@pytest.mark.parametrize(("split", "images"), [(None, 24), ("train", 6), ("all", 30)])
def test_split(test_set: TestSet, split: str | None, images: int) -> None:
    gallery = open_gallery(str(test_set.json), str(test_set.images), split)
    assert len(gallery.source) == images
    assert gallery.split == (split or "test")


def test_a_file_without_test_split_is_taken_whole(test_set: TestSet, tmp_path: Path) -> None:
    entries = [entry for entry in test_set.entries() if entry["split"] == "train"]
    gallery = open_gallery(str(write_karpathy(tmp_path / "train.json", entries)), str(test_set.images))
    assert (len(gallery.source), gallery.split) == (6, "all")


def test_limit_takes_the_first_images_of_files_and_shards(test_set: TestSet) -> None:
    files = evaluate(config(test_set, limit=9))
    shards = evaluate(config(test_set, data=str(test_set.shards), images=None, limit=9))
    assert files["images"] == shards["images"] == 9
    assert six_recalls(files) == six_recalls(shards)


def test_reduced_precision_is_near(test_set: TestSet) -> None:
    gallery = open_gallery(str(test_set.json), str(test_set.images))
    full, half = (
        encoder.images(encoder.batches(gallery, config(test_set))).features
        for encoder in (Encoder.load(test_set.export, "cpu", name) for name in ("fp32", "bf16"))
    )
    assert not torch.equal(full, half)
    assert (full * half).sum(1).min() > 0.99


def test_features_that_are_not_finite_are_an_error(test_set: TestSet, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(test_set.export, folder)
    state = load_file(folder / "model.safetensors")
    state["image_projection.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        evaluate(config(test_set, model=str(folder)))


def test_errors_name_what_is_wrong_and_what_to_do(
    test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"images": [')
    write_karpathy(tmp_path / "nofile.json", [{"split": "test", "sentences": [{"raw": "a"}]}])
    scene = SceneConfig(EncoderConfig(name="test_resnet", image_size=32), list(SCENES))
    save_pretrained(SceneClassifier(scene).state_dict(), scene, tmp_path / "scene")
    shutil.copytree(test_set.export, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()

    model, data, images = str(test_set.export), str(test_set.json), str(test_set.images)
    shards = str(test_set.shards)
    cases = [
        (("nothing.json", images, model), ("nothing.json", "does not exist")),
        ((data, None, model), ("--images DIR",)),
        ((data, "nowhere", model), ("--images nowhere", "does not exist")),
        (
            (data, str(tmp_path / "empty"), model),
            ("none of the 24 images", "harbour_0.png", "contains these file names"),
        ),
        ((str(tmp_path / "broken.json"), images, model), ("broken.json", "not a Karpathy JSON")),
        ((str(tmp_path / "nofile.json"), images, model), ("nofile.json", "'filename'")),
        ((f"{shards}/manifest.json", images, model), ("manifest", f"--data {shards}")),
        ((shards, images, model), ("--images", "holds the images")),
        ((str(tmp_path / "empty"), None, model), ("no tar",)),
        ((data, images, str(tmp_path / "empty")), ("no export folder", "config.json")),
        ((data, images, str(tmp_path / "scene")), ("SceneClassifier", "no text encoder")),
        ((data, images, str(tmp_path / "mute")), ("mute", "no tokenizer")),
        ((data, images, model, "--split", "val"), ("'val'", "test, train")),
        ((shards, None, model, "--split", "val"), ("--split val", "no splits")),
        ((data, images, model, "--caption_field", "coarse_captions"), ("coarse_captions", "--caption_field")),
        ((data, images, model, "--output", str(tmp_path)), ("is a folder", "report.json")),
    ]
    for (file, folder, export, *more), expected in cases:
        words = ["evaluate", "--data", file, "--model", export, "--device", "cpu", *more]
        assert main([*words, *(["--images", folder] if folder else [])]) == 2, words
        message = capsys.readouterr().err
        assert "error: " in message
        for part in expected:
            assert part in message, (words, message)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--data", data, "--images", images, "--model", model, "--batch_size", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(test_set: TestSet) -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        evaluate(config(test_set, device="cuda"))


def test_help_is_quick_and_loads_no_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "retrieval", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor seconds, so that a busy machine does not matter
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("evaluate", "index", "search", "serve"))
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "priorclip.retrieval.commands" in loaded
    assert not loaded & {"torch", "transformers", "deepspeed", "priorclip.data_shards.shards"}


def test_lists_of_images_and_texts_are_embedded_as_one_by_one(test_set, tmp_path):
    """From files, bytes and Pillow's pictures, in their order, whatever the batch."""
    encoder = Encoder.load(test_set.export, "cpu")
    generator, pictures = np.random.default_rng(0), []
    for number, channels in enumerate(((3,), (), (4,), (3,), (3,))):
        picture = Image.fromarray(generator.integers(0, 256, (40 + number, 50, *channels), dtype=np.uint8))
        picture.save(tmp_path / f"{number}.png")
        pictures.append(picture)
    files = [tmp_path / f"{number}.png" for number in range(5)]
    one_by_one = torch.stack([encoder.image(file.read_bytes()) for file in files])
    mixed = [files[0], str(files[1]), files[2].read_bytes(), pictures[3], pictures[4]]
    for batch_size in (2, 64):
        torch.testing.assert_close(encoder.embed_images(mixed, batch_size), one_by_one, rtol=0, atol=1e-6)
    texts = ["a river", " two ships in a harbour ", "a river beside many buildings and a long road " * 20]
    wanted = torch.stack([encoder.text(text) for text in texts])
    torch.testing.assert_close(encoder.embed_texts(iter(texts), 2), wanted, rtol=0, atol=1e-6)
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, wanted.shape[1])
    (tmp_path / "1.png").write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"1\.png: "):
        encoder.embed_images(files)
    with pytest.raises(ValueError, match="image 0: "):
        encoder.embed_images([b"no image"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        encoder.embed_images([tmp_path / "nowhere.jpg"])
    with pytest.raises(ValueError, match="blank"):
        encoder.embed_texts(["a river", " "])
