"""Figures on CLIP Benchmark's own WebDataset layouts are those of CLIP Benchmark itself."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.metrics import accuracy_score
from sklearn.metrics import balanced_accuracy_score as mean_class_recall
from small_galleries import picture
from torch import Tensor
from torch.utils.data import DataLoader

from priorclip.data_shards.__main__ import main as data_shards
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.retrieval.__main__ import main as retrieval
from priorclip.retrieval.encoder import Encoder

STORED = Path(__file__).resolve().parents[1] / "stored" / "v0.1"
EXPORT = STORED / "run" / "export"
NAMES = ("river", "harbour", "forest", "stadium", "Sea Lake")  # class 4 has no image
TEMPLATES = ("a photo of a {c}.", "{c} from above")


class Theirs:
    """Our model with the interface of CLIP Benchmark: the tokens of a text and their mask are one tensor."""

    def __init__(self) -> None:
        self.encoder = Encoder.load(EXPORT, device="cpu")

    def transform(self, image: Image.Image) -> Tensor:
        from test_retrieval_clients import png

        return self.encoder.decode(png(image))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        found = tokenize(self.encoder.tokenizer, list(texts))
        return torch.stack([found["input_ids"], found["attention_mask"]], dim=1)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.encoder.model.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.encoder.model.encode_text(tokens[:, 0], tokens[:, 1])


def write(folder: Path, samples: list[dict]) -> Path:
    (folder / "test").mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "test" / "%d.tar"), maxcount=15, verbose=0) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"s{number:07d}", **sample})
    (folder / "test" / "nshards.txt").write_text(f"{-(-len(samples) // 15)}\n")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 36 stored images with 1 to 5 captions each."""
    shards = ShardSet([str(STORED / "shards" / name) for name in ("held-out", "train")])
    samples = [shards.read(number) for number in range(len(shards))]
    folder = write(
        tmp_path_factory.mktemp("captioned") / "wds",
        [{"jpg": each.image, "txt": "\n".join(each.captions[: 1 + number % 5])} for number, each in enumerate(samples)],
    )
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"jpg": picture(number), "cls": number % 4} for number in range(24)]
    folder = write(tmp_path_factory.mktemp("labelled") / "wds", samples)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder


def evaluate(data: Path | str, out: Path, *words: str) -> dict:
    arguments = ["evaluate", "--model", str(EXPORT), "--data", str(data), "--output", str(out), "--workers", "0"]
    assert retrieval([*arguments, "--bootstrap", "0", "--device", "cpu", *words]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("indexed", [False, True])
def test_recall_is_clip_benchmarks(captioned: Path, tmp_path: Path, indexed: bool) -> None:
    theirs = Theirs()
    loader = DataLoader(
        build_wds_dataset("made", theirs.transform, data_dir=str(captioned)),
        batch_size=8,
        collate_fn=image_captions_collate_fn,
    )
    expected = zeroshot_retrieval.evaluate(theirs, loader, theirs.tokens, "cpu", amp=False, recall_k_list=[1, 5, 10])
    if indexed:
        assert data_shards(["index", "--shards", str(captioned / "test"), "--workers", "1", "--overwrite", "true"]) == 0
        assert json.loads((captioned / "test" / "manifest.json").read_text())["captions"] == 106
    report = evaluate(captioned / "test", tmp_path / "report.json")
    assert report["captions"] == 106  # not one an image
    for k in (1, 5, 10):
        assert report[f"i2t_r{k}"] == pytest.approx(100 * expected[f"text_retrieval_recall@{k}"], abs=1e-3)
        assert report[f"t2i_r{k}"] == pytest.approx(100 * expected[f"image_retrieval_recall@{k}"], abs=1e-3)


@pytest.mark.parametrize("indexed", [False, True])
def test_zero_shot_is_clip_benchmarks(labelled: Path, tmp_path: Path, indexed: bool) -> None:
    """Also its class without an image, and its template file."""
    theirs = Theirs()
    loader = DataLoader(build_wds_dataset("made", theirs.transform, data_dir=str(labelled)), batch_size=8)
    # Its `evaluate` adds up hits in a way that numpy refuses since 2.4, so the accuracy is taken of its logits.
    heads = zeroshot_classification.zero_shot_classifier(
        theirs, theirs.tokens, list(NAMES), list(TEMPLATES), "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(theirs, heads, loader, "cpu", amp=False)
    if indexed:
        assert data_shards(["index", "--shards", str(labelled / "test"), "--workers", "1", "--overwrite", "true"]) == 0
    templates = str(labelled / "zeroshot_classification_templates.txt")
    found = evaluate(
        labelled / "test", tmp_path / "report.json", "--tasks", "zeroshot", "--templates", templates
    )["zeroshot"]  # fmt: skip
    assert found["top1"] == pytest.approx(100 * accuracy_score(target, logits.argmax(1)), abs=1e-3)
    assert found["mean_class_recall"] == pytest.approx(100 * mean_class_recall(target, logits.argmax(1)), abs=1e-3)
    assert found["first_prompts"] == {name: f"a photo of a {name}." for name in NAMES}
    assert {name: row["images"] for name, row in found["classes"].items()} == dict.fromkeys(NAMES[:4], 6)


def test_packing_takes_names_and_lines(captioned: Path, labelled: Path, tmp_path: Path) -> None:
    """The pack needs none of the files beside the shards any more."""
    for name, folder in (("captions", captioned), ("labels", labelled)):
        words = ["pack", "--source", "webdataset", "--shards", str(folder / "test"), "--output", str(tmp_path / name)]
        assert data_shards([*words, "--workers", "1", "--shuffle", "false"]) == 0
    (tmp_path / "classnames.txt").write_text("wrong\n" * 9)
    captions, labels = ShardSet(str(tmp_path / "captions")), ShardSet(str(tmp_path / "labels"))
    assert [len(captions.read(number).captions) for number in range(7)] == [1, 2, 3, 4, 5, 1, 2]
    assert labels.classes == ["forest", "harbour", "river", "stadium"]
    assert labels.read(5).label == "harbour"
    assert {text for number in range(24) for text in labels.read(number).captions if re.search(r"\d", text)} == set()
    assert any("stadium" in text for text in labels.read(3).captions)


@pytest.mark.parametrize("names", [None, "river\nharbour\n"])
def test_numbers_without_names_are_refused(
    labelled: Path, tmp_path: Path, names: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """No caption is "a bird's eye view of a 0", and no prompt. With too few names, the other samples are bad."""
    test = tmp_path / "wds" / "test"
    test.mkdir(parents=True)
    for path in (labelled / "test").glob("*.tar"):
        (test / path.name).write_bytes(path.read_bytes())
    out = str(tmp_path / "out")
    words = ["pack", "--source", "webdataset", "--shards", str(test), "--output", out, "--workers", "1"]
    if names is None:
        assert data_shards(words) == 2
        assert "24 images without captions have a number as their label, such as '0'" in capsys.readouterr().err
        assert data_shards([*words, "--caption-from", "none"]) == 0
        arguments = ["evaluate", "--model", str(EXPORT), "--data", str(test), "--tasks", "zeroshot", "--device", "cpu"]
        for templates in ("clip", "scenes"):
            assert retrieval([*arguments, "--workers", "0", "--templates", templates]) == 2
            assert "4 classes are numbers, such as '0', and prompts need names" in capsys.readouterr().err
    else:
        (test.parent / "classnames.txt").write_text(names)
        assert data_shards(words) == 0
        assert "12 x unknown class" in capsys.readouterr().out


def test_sets_without_labels_are_refused(captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--model", str(EXPORT), "--data", str(captioned / "test"), "--device", "cpu"]
    for task, said in (("zeroshot", "no image has a scene label"), ("probe", "needs labelled training images")):
        assert retrieval([*arguments, "--workers", "0", "--tasks", task]) == 2
        assert said in capsys.readouterr().err
    folder = write(tmp_path / "wds", [{"jpg": picture(0), "npy": torch.tensor([0, 1]).numpy()}])
    (folder / "dataset_type.txt").write_text("multilabel\n")
    assert data_shards(["index", "--shards", str(folder / "test")]) == 2
    assert "is a 'multilabel' set of CLIP Benchmark" in capsys.readouterr().err


def test_names_that_are_written_twice_are_said(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "classnames.txt").write_text("crane\ncrane\npond\npond 2\n\n")
    (tmp_path / "0.tar").write_bytes((labelled / "test" / "0.tar").read_bytes())
    with caplog.at_level(logging.WARNING):
        shards = ShardSet(str(tmp_path))
    assert shards.classes == ["crane", "pond", "pond 2"]
    assert "has a name several times" in caplog.text
