"""Scene classification: prompts compared with open_clip's zero-shot head, the probe with scikit-learn's search."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip import build_zero_shot_classifier
from PIL import Image
from small_galleries import SCENES, TestSet, picture

from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.retrieval import Encoder, evaluate, open_gallery
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import EvaluateConfig
from priorclip.retrieval.evaluate_export import write_report
from priorclip.retrieval.linear_probe import CHOICES, probe_report, stratified_split
from priorclip.retrieval.zeroshot import CLIP_TEMPLATES, class_features, class_names, class_prompts, zero_shot_report

UCM = "agricultural baseballdiamond denseresidential golfcourse mobilehomepark parkinglot storagetanks tenniscourt"
UCM_NAMES = "agricultural|baseball diamond|dense residential|golf course|mobile home park|parking lot|storage tanks"
EUROSAT = "AnnualCrop Forest HerbaceousVegetation PermanentCrop SeaLake"
EUROSAT_NAMES = "annual crop|forest|herbaceous vegetation|permanent crop|sea lake"
OTHERS = "BareLand BaseballField railwaystation thermal_power_station sea_ice snowberg chaparral Farmland solar-panel"
OTHER_NAMES = (
    "bare land|baseball field|railway station|thermal power station|sea ice|snowberg|chaparral|farmland|solar panel"
)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scene folders like AID's, in two splits: 48 images whose colour shows the scene, and a file of macOS."""
    root = tmp_path_factory.mktemp("scenes")
    for number in range(48):
        scene = number % len(SCENES)
        folder = root / ("train" if number < 28 else "test") / SCENES[scene].capitalize()
        folder.mkdir(parents=True, exist_ok=True)
        tint = np.full((48, 58, 3), 60, np.uint8)
        tint[..., scene % 3] = 120 + 40 * (scene == 3)
        blended = Image.blend(picture(number), Image.fromarray(tint), 0.55)
        blended.save(folder / f"{SCENES[scene]}_{number}.jpg")
    (root / "test" / "River" / "._river_1.jpg").write_bytes(b"resource fork")
    return root


def config(test_set: TestSet, data: Path, **changes) -> EvaluateConfig:
    return EvaluateConfig(**({"model": str(test_set.export), "data": str(data), "device": "cpu"} | changes))


@pytest.mark.parametrize(
    ("labels", "names"),
    [(UCM, f"{UCM_NAMES}|tennis court"), (EUROSAT, EUROSAT_NAMES), (OTHERS, OTHER_NAMES)],
    ids=["ucm", "eurosat", "others"],
)
def test_folder_names_become_words(labels: str, names: str) -> None:
    assert class_names(labels.split()) == names.split("|")


def test_templates(tmp_path: Path) -> None:
    assert len(set(CLIP_TEMPLATES)) == 18
    (prompts,) = class_prompts(["SeaLake"], "clip")
    assert "satellite imagery of sea lake." in prompts
    assert "aerial view of the sea lake." in prompts
    assert class_prompts(["Airport"], "remoteclip") == [["a satellite photo of airport."]]
    (scenes,) = class_prompts(["airport"], "scenes")
    assert "an aerial view of an airport with planes" in scenes
    (tmp_path / "own.txt").write_text("a {} here\n\n{} from above\n")
    assert class_prompts(["mine"], str(tmp_path / "own.txt")) == [["a mine here", "mine from above"]]
    (tmp_path / "names.json").write_text('{"SeaLake": "lake or sea"}')
    assert class_names(["SeaLake", "River"], str(tmp_path / "names.json")) == ["lake or sea", "river"]
    (tmp_path / "bad.txt").write_text("nothing to fill\n")
    with pytest.raises(ValueError, match=r"has no \{\} for the class name"):
        class_prompts(["mine"], str(tmp_path / "bad.txt"))
    (tmp_path / "bad.txt").write_text("a {} of {class}\n")
    with pytest.raises(ValueError, match=r"'a {} of {class}' has other braces"):
        class_prompts(["mine"], str(tmp_path / "bad.txt"))
    (tmp_path / "bad.txt").write_bytes(b"a {} at the caf\xe9\n")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text"):
        class_prompts(["mine"], str(tmp_path / "bad.txt"))
    lake, river = class_prompts(["SeaLake", "River"], "scenes", str(tmp_path / "names.json"))
    assert "an aerial view of a lake or sea" in lake
    assert "an aerial view of a river" in " ".join(river)
    with pytest.raises(ValueError, match="clip, remoteclip, scenes"):
        class_prompts(["mine"], "nonesuch")
    with pytest.raises(ValueError, match="names SeaLake: the classes are River"):
        class_names(["River"], str(tmp_path / "names.json"))


def test_heads_and_accuracies_equal_open_clips_zero_shot_classifier(test_set: TestSet, scenes: Path) -> None:
    encoder = Encoder.load(test_set.export, "cpu")
    report = evaluate(config(test_set, scenes / "test", tasks="zeroshot", bootstrap=0))["zeroshot"]
    classes = sorted(scene.capitalize() for scene in SCENES)
    model = SimpleNamespace(
        encode_text=lambda tokens, normalize: torch.nn.functional.normalize(encoder.model.encode_text(**tokens), dim=-1)
    )

    class Tokens(dict):
        def to(self, device: str) -> Tokens:
            return self

    with torch.no_grad():
        heads = build_zero_shot_classifier(
            model, lambda texts: Tokens(tokenize(encoder.tokenizer, list(texts))),
            [name.lower() for name in classes], [lambda name, t=t: t.format(name) for t in CLIP_TEMPLATES],
            num_classes_per_batch=2,
        )  # fmt: skip
    torch.testing.assert_close(class_features(encoder, class_prompts(classes)), heads.T, atol=1e-5, rtol=0)
    gallery = open_gallery(str(scenes / "test"))
    images = encoder.images(encoder.batches(gallery, config(test_set, scenes / "test"))).features
    logits = 100.0 * images @ heads
    wanted = torch.tensor([classes.index(record.label) for record in gallery.origin.records])
    top = logits.topk(4, 1).indices == wanted[:, None]
    assert report["top1"] == pytest.approx(100 * top[:, :1].any(1).float().mean().item(), abs=1e-4)
    assert report["top5"] == 100
    assert report["images"] == 20
    recalls = {name: 100 * top[wanted == n, 0].float().mean().item() for n, name in enumerate(classes)}
    assert {name: row["recall"] for name, row in report["classes"].items()} == pytest.approx(recalls, abs=1e-4)
    assert sum(count for *_, count in report["confusions"]) == round(20 * (1 - report["top1"] / 100))


def test_classes_with_the_same_prompt_share_what_they_tie_for() -> None:
    images = torch.nn.functional.normalize(torch.randn(30, 6), dim=-1)
    heads = images[[0, 0, 1]]
    report, _ = zero_shot_report(images[[0, 1]].repeat(2, 1), torch.tensor([0, 2, 1, -1]), ["a", "b", "c"], heads, 0)
    assert report["top1"] == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    assert report["images"] == 3


def test_the_probe_equals_scikit_learns_own_search() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 24))
    labels = rng.integers(0, 5, 400)
    features = (centres[labels] + 1.6 * rng.normal(size=(400, 24))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    learn, test = slice(0, 250), slice(250, 400)
    report, predicted = probe_report(
        features[learn], labels[learn], features[test], labels[test], list("abcde"), resamples=100, seed=3
    )
    _, held_out = stratified_split(labels[learn], 0.2, 3)
    fold = np.full(250, -1)
    fold[held_out] = 0
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": list(CHOICES)}, cv=PredefinedSplit(fold))
    search.fit(features[learn], labels[learn])
    assert report["C"] == search.best_params_["C"]
    assert list(report["validation"].values()) == pytest.approx(list(100 * search.cv_results_["mean_test_score"]))
    assert predicted.tolist() == search.predict(features[test]).tolist()
    assert report["top1"] == pytest.approx(100 * search.score(features[test], labels[test]))
    assert report["intervals"]["top1"][0] < report["top1"] < report["intervals"]["top1"][1]
    assert 30 < report["top1"] < 95


def test_stratified_parts_hold_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 5, 1])
    first, second = stratified_split(labels, 0.4, 1)
    assert sorted([*first, *second]) == list(range(16))
    assert np.bincount(labels[second], minlength=3).tolist() == [4, 2, 0]


def test_a_probe_learns_from_one_folder_and_is_tested_on_another(
    test_set: TestSet, scenes: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheets" / "confusions.png"
    options = {"tasks": "probe,zeroshot", "features": str(tmp_path / "features"), "confusions": str(sheet)}
    report = evaluate(config(test_set, scenes, split="test", probe_data=str(scenes / "train"), **options))
    assert (report["images"], report["split"], report["probe"]["learned_from"]) == (20, "test", 28)
    assert report["probe"]["top1"] > 60  # chance is 25; the colours show the scene
    assert "mean_recall" not in report
    assert Image.open(sheet).width > 300
    spelt = tmp_path / "spelt"
    for scene in SCENES:
        (spelt / scene.upper()).mkdir(parents=True)
        for image in (scenes / "train" / scene.capitalize()).glob("*.jpg"):
            (spelt / scene.upper() / image.name).write_bytes(image.read_bytes())
    other = evaluate(config(test_set, scenes, split="test", tasks="probe", probe_data=str(spelt)))
    assert other["probe"]["top1"] == report["probe"]["top1"], "a class spelt in another way is that class"
    within = evaluate(config(test_set, scenes, split="all", tasks="probe", train_share=0.75))
    assert (within["probe"]["learned_from"], within["probe"]["images"]) == (36, 12)
    packed = evaluate(config(test_set, test_set.shards, tasks="probe,retrieval", bootstrap=0))
    assert packed["probe"]["images"] == 4
    assert packed["captions"] == 84


def test_errors_name_what_is_wrong(test_set: TestSet, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["evaluate", "--model", str(test_set.export), "--device", "cpu", "--data"]
    cases = [
        ([str(scenes)], "--caption_field"),
        (
            [str(scenes / "test"), "--tasks", "probe", "--probe_data", str(scenes / "train" / "Forest")],
            "no image of Harbour",
        ),
        ([str(scenes), "--tasks", "probe", "--probe_data", str(scenes / "test")], "has 20 images of the test set"),
        ([str(scenes), "--limit", "1", "--tasks", "probe", "--train_share", "0.9"], "leaves no image to test"),
        ([str(scenes), "--tasks", "zeroshot", "--confusions", str(scenes)], "is a folder: name a file"),
        ([str(scenes), "--tasks", "zeroshot", "--features", str(test_set.json)], "is a file"),
        ([str(scenes), "--split", "val", "--tasks", "zeroshot"], "no sub-folder"),
        ([str(scenes), "--tasks", "zeroshot", "--templates", "nothing.txt"], "nothing.txt"),
    ]
    for words, expected in cases:
        assert main([*base, *words]) == 2, words
        assert expected in capsys.readouterr().err, words
    with pytest.raises(SystemExit, match="2"):
        main([*base, str(scenes), "--tasks", "retrieval,sorting"])
    assert "retrieval, zeroshot, probe" in capsys.readouterr().err


def test_scores_that_are_level_are_a_tie_and_a_class_never_seen_is_wrong() -> None:
    level, labels = np.ones((12, 4), np.float32), np.repeat([0, 1, 2, 3], 3)
    report, _ = probe_report(level, labels, level, labels, ["a", "b", "c", "d"], 0, 0)
    assert (report["top1"], report["top5"]) == (25, 100)
    seen = labels < 3
    report, _ = probe_report(level[seen], labels[seen], level, labels, ["a", "b", "c", "d"], 0, 0)
    assert (report["classes"]["d"]["recall"], report["top5"]) == (0, 75)
    pair = np.array([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1]] * 5, np.float32)
    two = np.array([0, 0, 2, 2] * 5)
    report, predicted = probe_report(pair, two, pair, two, ["a", "b", "c"], 0, 0)
    assert report["top1"] == 100
    assert predicted.tolist() == two.tolist()


def test_a_report_holds_file_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/\xc3\xb6l")
    write_report(tmp_path / "report.json", {"skipped": [name]})
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["skipped"] == [name]


def test_report_is_json(test_set: TestSet, scenes: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", test_set.export, "--data", scenes / "test", "--tasks", "zeroshot,probe"]
    assert main([*map(str, words), "--device", "cpu", "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["zeroshot"]["prompts"] == 18 * 4
    assert set(report["probe"]) >= {"top1", "top5", "mean_class_recall", "C", "validation", "intervals", "confusions"}
