"""`retrieval curate`: which pairs each rule drops, that the shards hold the rest, that a second run encodes nothing.

The model is fitted to the true pairs of 40 drawn scenes. Then the captions of 20 % of them are swapped.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from priorclip.common.options import parse_command
from priorclip.data_shards import ShardSet, train_tokenizer
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.data_shards.commands import PackConfig
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.inspect.verify import verify_folder
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources.catalogue import read_source
from priorclip.data_shards.sources.record import Record, load
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.model import build_model, load_preset, save_pretrained
from priorclip.model.config import EncoderConfig
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import COMMANDS
from priorclip.retrieval.curation import curate as curation
from priorclip.retrieval.curation.semantic import semantic_duplicates
from priorclip.retrieval.curation.text_rules import TextRules
from priorclip.retrieval.encoder import Encoder

SCENES, SWAPPED = 40, 8
GERMAN, SHORT, STOCK = "ein Hafen mit vielen Booten und drei Lagertanks", "dock", "a Stock  Photo of boats at a pier"


@dataclass(frozen=True)
class Noisy:
    shards: Path
    export: Path
    swapped: set[tuple[str, str]]  # key and caption of the pairs that do not belong together
    pairs: set[tuple[str, str]]


def fit(records: list[Record], folder: Path) -> Path:
    """Exports a random CLIP whose text projection is solved so that each caption has the feature of its image.

    There are fewer captions than the text encoder has values, so the solution is exact.
    """
    torch.manual_seed(0)
    captions = [text for record in records for text in record.captions]
    tokenizer = train_tokenizer(captions, folder / "tokenizer", 400, 32)
    config = load_preset("priorclip-tiny")
    config.kind, config.text.context_length = "clip", 32
    config.vision = EncoderConfig(name="test_vit", image_size=64)
    model = build_model(config, vocab_size=len(tokenizer)).eval()
    images = [eval_transform(record.image, 64) for record in records for _ in record.captions]  # type: ignore[arg-type]
    inputs: list[torch.Tensor] = []
    hook = model.text_projection.register_forward_pre_hook(lambda module, values: inputs.append(values[0]))
    with torch.no_grad():
        found = model(images=torch.from_numpy(np.stack(images)), **tokenize(tokenizer, captions))
        weights = torch.linalg.lstsq(inputs[0].double(), found["image_features"].double(), driver="gelsd").solution
        model.text_projection.weight.copy_(weights.T)
    hook.remove()
    return save_pretrained(model.state_dict(), model.config, folder / "export", tokenizer_folder=folder / "tokenizer")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Noisy:
    """40 drawn scenes with two captions each, 8 of them with those of others; a copy of the first image; bad texts."""
    folder = tmp_path_factory.mktemp("noisy")
    drawn = read_source(PackConfig("synthetic", str(folder), count=SCENES, size=64, captions="fine"))
    clean = [replace(found, captions=found.captions[:2]) for found in map(load, drawn)]
    export = fit(clean, folder)
    records = [replace(record, captions=list(record.captions)) for record in clean]
    for place in range(SWAPPED):
        records[place].captions = list(clean[(place + 1) % SWAPPED].captions)
    swapped = {(record.key, text) for record in records[:SWAPPED] for text in record.captions}
    records[-1].captions += [GERMAN, SHORT, STOCK]
    picture, file = Image.open(io.BytesIO(clean[20].image)), io.BytesIO()  # type: ignore[arg-type]
    picture.convert("RGB").save(file, "JPEG", quality=95)
    records.append(Record("copy", file.getvalue(), list(clean[20].captions)))
    pack(records, folder / "shards", PackPlan(shard_size=15, template_captions=False))
    pairs = {(record.key, text) for record in records for text in record.captions}
    return Noisy(folder / "shards", export, swapped, pairs)


def curate(noisy: Noisy, output: Path, *words: object) -> int:
    texts = ["--shards", noisy.shards, "--output", output, "--device", "cpu", "--processes", 1, *words]
    try:
        return main(["curate", *map(str, texts)])
    except SystemExit as end:  # of an option that is refused while the command line is read
        return int(end.code or 0)


def read_report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def pairs_of(shards: Path) -> set[tuple[str, str]]:
    found = ShardSet(str(shards))
    return {(found.key(sample), text) for sample in range(len(found)) for text in found.captions(sample)}


RULES = ("--languages", "en", "--min_words", 3, "--words", "stock photo,watermark", "--near_duplicates", 6)


def test_swapped_captions_are_found_and_every_drop_is_counted(
    noisy: Noisy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert curate(noisy, tmp_path / "out", "--model", noisy.export, "--drop_share", 0.2, *RULES) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    report = read_report(tmp_path / "out")
    assert report["dropped"] == {
        "other language": 1,
        "too few words": 1,
        "unwanted word": 1,
        "image cannot be read": 0,
        "among the least similar": 16,
        "near duplicate": 2,
    }
    assert len(rows) == 21
    least = {(row["key"], row["caption"]) for row in rows if row["rule"] == "among the least similar"}
    precision, recall = len(least & noisy.swapped) / len(least), len(least & noisy.swapped) / len(noisy.swapped)
    assert precision >= 0.85
    assert recall >= 0.85
    by_text = {row["caption"]: row for row in rows if "similar" not in row["rule"]}
    assert by_text[GERMAN]["detail"].startswith("de, ")
    assert by_text[STOCK]["detail"] == "stock  photo"
    assert {row["key"] for row in rows if row["rule"] == "near duplicate"} == {"copy"}
    # The shards hold exactly the rest, and are whole.
    gone = {(row["key"], row["caption"]) for row in rows}
    assert pairs_of(tmp_path / "out" / "shards") == noisy.pairs - gone
    assert verify_folder(tmp_path / "out" / "shards", 1, True)[0] == []
    assert report["kept_pairs"] == len(noisy.pairs) - 21
    # The examples of a threshold are those just below it.
    for row in report["similarity"]:
        assert all(example["similarity"] <= row["similarity"] for example in row["examples"])
    fifth = next(row for row in report["similarity"] if row["share"] == 0.2)
    assert len(fifth["examples"]) == 5
    assert f"| 20 % | {fifth['similarity']:.3f} |" in (tmp_path / "out" / "report.md").read_text()

    # Another threshold starts from what is stored: no model is loaded and no image is hashed.
    def refuse(*words: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "load", refuse)
    monkeypatch.setattr("priorclip.data_shards.dedupe.hash_columns.hash_part", refuse)
    again = ("--model", noisy.export, "--min_similarity", fifth["similarity"], *RULES)
    assert curate(noisy, tmp_path / "out", *again) == 2  # the shards of the first run are there
    assert curate(noisy, tmp_path / "out", *again, "--write", "false") == 0
    assert read_report(tmp_path / "out")["dropped"]["similarity too low"] >= 14
    assert curate(noisy, tmp_path / "out", *again, "--overwrite", "true") == 0
    assert len(pairs_of(tmp_path / "out" / "shards")) == read_report(tmp_path / "out")["kept_pairs"]


def test_a_killed_scoring_continues(noisy: Noisy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model", noisy.export, "--write", "false", "--semantic_duplicates", 0.98)
    monkeypatch.setattr("priorclip.retrieval.curation.scores.PART", 20)
    whole, killed, seen = Encoder.images, [2], []

    def images(self: Encoder, batches: object) -> object:
        killed[0] -= 1
        if killed[0] < 0:
            raise KeyboardInterrupt
        seen.append(1)
        return whole(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "images", images)
    assert curate(noisy, tmp_path / "out", *words) == 130
    assert len(list((tmp_path / "out" / "scores").glob("*/*.safetensors"))) == 2
    killed[0] = 9
    assert curate(noisy, tmp_path / "out", *words) == 0
    assert len(seen) == 3  # 41 samples are three parts, and each was encoded once
    report = read_report(tmp_path / "out")
    assert 2 <= report["dropped"]["semantic duplicate"] <= 10
    assert "copy" in {row["key"] for row in report["examples"]["semantic duplicate"]}


def test_several_processes_judge_as_one_does(noisy: Noisy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "CAPTIONS_A_JOB", 30)
    words = ("--languages", "de", "--write", "false", "--certainty", 0)
    assert curate(noisy, tmp_path / "one", *words) == 0
    assert curate(noisy, tmp_path / "two", *words, "--processes", 2) == 0
    one, two = ((tmp_path / name / "dropped.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == len(noisy.pairs) - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--drop_share", 0.2), "--drop_share 0.2 needs --model"),
        (("--semantic_duplicates", 0.9), "--semantic_duplicates 0.9 needs --model"),
        (("--languages", "english"), "english is not known"),
        (("--min_words", 9, "--max_words", 3), "no caption fits"),
        (("--near_duplicates", 40), "--near_duplicates must be a number of bits"),
        (("--min_words", 900), "the rules drop all"),
        (("--words", " , "), "there is no word in it"),
    ],
)
def test_what_cannot_be_is_refused(
    noisy: Noisy, tmp_path: Path, words: tuple, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curate(noisy, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "shards").exists()


@pytest.mark.parametrize("exact", [1000, 10], ids=["all pairs", "cells"])
def test_semantic_duplicates_are_those_of_a_comparison_of_all(exact: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 16)).astype(np.float32)
    rows[200:] = rows[:100] + 0.05 * rng.normal(size=(100, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected: dict[int, int] = {}
    for late in range(len(rows)):
        cosines = rows[:late] @ rows[late]
        cosines[list(expected)] = -1
        if late and cosines.max() >= 0.95:
            expected[late] = int(cosines.argmax())
    found = semantic_duplicates(rows, 0.95, exact)
    assert len(expected) == 100
    assert {late: early for late, (early, _) in found.items()} == expected


def test_words_are_whole_and_languages_need_certainty() -> None:
    rules = TextRules(words=("logo", "stock photo"))
    assert rules.judge("a catalogue of boats") is None
    assert rules.judge("the LOGO, twice") == ("unwanted word", "logo")
    assert TextRules(languages=("en",)).judge("a dock") is None  # too short to be certain
    assert TextRules(max_words=3).judge("a dock with boats") == ("too many words", "4 words")


def test_data_shards_says_whose_command_curate_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert data_shards(["curate", "--help"]) == 2
    command = capfd.readouterr().err.strip().split("a command of retrieval: python -m retrieval ")[1]
    name, config = parse_command(COMMANDS, command.split(), prog="retrieval")
    assert (name, config.shards, config.output) == ("curate", "SHARDS", "FOLDER")
