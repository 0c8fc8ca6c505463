"""The approximate part of an index, against a full sort in float64: what it finds, what it says, and what breaks it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_galleries import TestSet
from torch import Tensor

from priorclip.common.files import sha256_of
from priorclip.data_shards.stream.evaluation_batches import ImageFetcher
from priorclip.retrieval import EmbeddingIndex, Encoder, Searcher
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.embedding_index import write_folder
from priorclip.retrieval.indexing import cell_training
from priorclip.retrieval.indexing.cell_training import changed, make_cells, measured, noisy_rows
from priorclip.retrieval.indexing.cells import CELLS

ROOT = Path(__file__).resolve().parents[2]
COUNT = 6000
SCENES = ("north", "south")


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def clustered(count: int, width: int, seed: int) -> Tensor:
    """Rows around 40 points of a few dimensions, which share a direction as those of a model do.

    The points are the same for each seed.
    """
    fixed = torch.Generator().manual_seed(0)
    points, basis, shared = (torch.randn(*shape, generator=fixed) for shape in ((40, 10), (10, width), (width,)))
    drawn = torch.Generator().manual_seed(seed)
    near = points[torch.randint(len(points), (count,), generator=drawn)] + torch.randn(count, 10, generator=drawn)
    return torch.nn.functional.normalize(near @ basis + 2 * shared, dim=1)


def full_sort(embeddings: Tensor, query: Tensor, k: int) -> list[int]:
    scores = embeddings.double().numpy() @ query.double().numpy()
    return np.argsort(-scores, kind="stable")[:k].tolist()


@pytest.fixture(scope="module")
def small(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("small") / "index"
    assert run("index", "--output", output, *encoding(test_set)) == 0
    return output


def encoding(test_set: TestSet) -> list[str | Path]:
    data = ["--data", test_set.json, "--images", test_set.images]
    return ["--model", test_set.export, "--device", "cpu", "--batch_size", "4", *data]


@pytest.fixture(scope="module")
def large(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 6,000 drawn embeddings, from two shards and two scenes, with an approximate part."""
    folder = tmp_path_factory.mktemp("large") / "index"
    about = json.loads((small / "index.json").read_text())
    entries = (
        {"key": f"k{row}", "label": None, "shard": f"/data/part-{row % 2}.tar", "sample": row // 2,
         "place": {"scene": SCENES[row // 5 % 2]}, "caption": None} for row in range(COUNT)
    )  # fmt: skip
    write_folder(folder, about | {"images": COUNT}, clustered(COUNT, about["width"], 1).half(), entries)
    assert run("approximate", "--index", folder) == 0
    return folder


@pytest.fixture
def copy(large: Path, tmp_path: Path) -> Path:
    return shutil.copytree(large, tmp_path / "index")


def test_recall_is_the_stored_one_and_above_its_target(large: Path) -> None:
    """Of noisy rows by the stored figure, and of rows that were drawn alike but are not in the index."""
    index = EmbeddingIndex.load(large)
    assert index.cells is not None
    about = json.loads((large / "index.json").read_text())["approximate"]
    held_out = index.cells.queries[1::2].float()
    assert (about["queries"], about["held_out"], about["target"]) == ("noisy rows", len(held_out), 0.95)
    found = [shared(index, query) for query in held_out]
    assert about["recall_at_10"] == pytest.approx(np.mean(found), abs=1e-3)  # equal rows count as found
    assert about["recall_at_10"] >= 0.93
    others = clustered(200, about_width(large), seed=9)
    assert np.mean([shared(index, query) for query in others]) >= 0.9
    compared = [len(index.cells.candidates(query, 10)) for query in others]
    assert np.mean(compared) < COUNT / 4
    assert index.way_of_search() == {"search": "approximate", "recall_at_10": about["recall_at_10"]}


def about_width(folder: Path) -> int:
    return json.loads((folder / "index.json").read_text())["width"]


def shared(index: EmbeddingIndex, query: Tensor) -> float:
    """The share of the ten best rows that a search finds. Its scores are exact."""
    scores, rows = index.nearest(query, 10)
    exact = index.embeddings[rows].double() @ query.double()
    assert scores == pytest.approx(exact.clamp(-1, 1).tolist(), abs=1e-6)
    return len(set(rows) & set(full_sort(index.embeddings, query, 10))) / 10


def test_more_recall_takes_more_cells(large: Path) -> None:
    index = EmbeddingIndex.load(large)
    assert index.cells is not None
    found = [
        measured(replace(index.cells, about=index.cells.about | {"target": target}), index.embeddings).about
        for target in (0.5, 0.95, 1.0)
    ]
    assert found[0]["probes"] < found[1]["probes"] < found[2]["probes"]
    assert found[0]["recall_at_10"] < found[1]["recall_at_10"] <= found[2]["recall_at_10"]
    assert found[2]["recall_at_10"] > 0.99


def test_many_hits_are_exact_where_cells_hold_too_few(large: Path) -> None:
    index = EmbeddingIndex.load(large)
    query = clustered(1, about_width(large), seed=3)[0]
    assert index.nearest(query, COUNT)[1] == index.nearest(query, COUNT, exact=True)[1]
    assert len(set(index.nearest(query, 300)[1])) == 300


def test_exact_is_brute_force_and_both_say_so(
    large: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["search", "--index", large, "--text", "a river", "-k", "10", "--device", "cpu"]
    assert run(*words, "--json", "--exact") == 0
    hits = json.loads(capsys.readouterr().out)
    index = EmbeddingIndex.load(large)
    query = Encoder.load(test_set.export, "cpu").text("a river")
    assert [hit["key"] for hit in hits] == [f"k{row}" for row in full_sort(index.embeddings, query, 10)]
    assert {hit["search"] for hit in hits} == {"exact"}
    assert all("recall_at_10" not in hit for hit in hits)
    assert index.nearest(query, 10, exact=True)[1] == full_sort(index.embeddings, query, 10)
    recall = json.loads((large / "index.json").read_text())["approximate"]["recall_at_10"]
    caplog.set_level(logging.INFO, "priorclip")
    assert run(*words, "--json") == 0
    assert {(hit["search"], hit["recall_at_10"]) for hit in json.loads(capsys.readouterr().out)} == {
        ("approximate", recall)
    }
    assert run(*words, "--format", "geojson") == 0
    assert json.loads(capsys.readouterr().out)["recall_at_10"] == recall
    assert f"approximate search, recall@10 {recall:.3f}: --exact compares all images" in caplog.text


def test_limits_are_exact(large: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]) -> None:
    index = EmbeddingIndex.load(large)
    words = ["search", "--index", large, "--text", "a river", "-k", "50", "--device", "cpu", "--json"]
    assert run(*words, "--scene", "south") == 0
    hits = json.loads(capsys.readouterr().out)
    rows = [row for row in range(COUNT) if SCENES[row // 5 % 2] == "south"]
    best = full_sort(index.embeddings[rows], Encoder.load(test_set.export, "cpu").text("a river"), 50)
    assert [hit["key"] for hit in hits] == [f"k{rows[place]}" for place in best]
    assert {hit["search"] for hit in hits} == {"exact"}


def test_removed_images_are_never_found_and_the_others_keep_their_rank(copy: Path) -> None:
    before = EmbeddingIndex.load(copy)
    assert run("remove", "--index", copy, "--shards", "part-1.tar", "--image_keys", "k1*", "k7") == 0
    gone = {row for row in range(COUNT) if row % 2 and (str(row).startswith("1") or row == 7)}
    after = EmbeddingIndex.load(copy)
    assert len(after) == COUNT - len(gone)
    queries = torch.cat([before.embeddings[sorted(gone)[::5]].float(), before.embeddings[::97].float()])
    for query in queries:
        keys = [after.entry(row)["key"] for row in after.nearest(query, 20)[1]]
        assert not {int(key[1:]) for key in keys} & gone
    assert after.cells is not None
    again = measured(after.cells, after.embeddings)
    assert {**again.about} == after.cells.about
    assert np.mean([shared(after, query) for query in after.cells.queries[1::8].float()]) > 0.9


def test_added_images_are_found(copy: Path, test_set: TestSet) -> None:
    assert run("add", "--index", copy, "--device", "cpu", "--data", test_set.json, "--images", test_set.images) == 0
    after = EmbeddingIndex.load(copy)
    assert after.cells is not None
    assert len(after) > COUNT
    assert after.way_of_search()["search"] == "approximate"
    for row in range(COUNT, len(after)):
        assert after.nearest(after.embeddings[row].float(), 1)[0][0] == pytest.approx(1, abs=2e-3)
        assert row in after.nearest(after.embeddings[row].float(), 10)[1]


def test_an_index_that_has_grown_by_half_gets_new_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(900, 16, 1).half()
    old = make_cells(rows[:600], None, "", 0.9)
    less, more = (old.with_rows(rows[600:count]) for count in (899, 900))
    assert torch.equal(changed(less, rows[:899]).centres, old.centres)
    new = changed(more, rows)
    assert new.about["trained_on"] == 900
    assert torch.equal(new.queries, old.queries)
    monkeypatch.setattr(cell_training, "find_spec", lambda name: None)
    assert torch.equal(changed(more, rows).centres, old.centres)


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def rewrite(**changes: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Returns a change of the tensors by somebody who also writes the checksum."""

    def change(path: Path) -> None:
        tensors = load_file(path)
        for name, alter in changes.items():
            tensors[name] = alter(tensors[name].clone()).contiguous()
        save_file(tensors, path)
        about = json.loads((path.parent / "index.json").read_text())
        about["approximate"]["sha256"] = sha256_of(path)
        (path.parent / "index.json").write_text(json.dumps(about))

    return change


DAMAGES = {
    "missing": Path.unlink,
    "truncated": damage_end,
    "a bit": damage_bit,
    "no file": lambda path: (path.unlink(), path.mkdir()),
    "a row too large": rewrite(rows=lambda rows: rows.index_fill(0, torch.tensor([3]), COUNT)),
    "a negative row": rewrite(rows=lambda rows: rows.index_fill(0, torch.tensor([3]), -1)),
    "a row twice": rewrite(rows=lambda rows: rows.index_copy(0, torch.tensor([3]), rows[4:5])),
    "ends backwards": rewrite(ends=lambda ends: torch.cat([ends[:-2], ends[-1:], ends[-1:] - 1])),
    "a negative end": rewrite(ends=lambda ends: ends.index_fill(0, torch.tensor([0]), -5)),
    "other width": rewrite(centres=lambda centres: centres[:, 1:]),
    "other type": rewrite(centres=lambda centres: centres.half()),
    "rows of floats": rewrite(rows=lambda rows: rows.double()),
    "no cells": rewrite(centres=lambda centres: centres[:0], ends=lambda ends: ends[:0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_with_what_to_do(copy: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES[damage](copy / CELLS)
    said = f"{copy / CELLS} cannot be used ("
    remedy = f"make it again with `retrieval approximate --index {copy}`, or search with --exact"
    for words in (("search", "--text", "a river", "--device", "cpu"), ("remove", "--image_keys", "k1")):
        assert run(words[0], "--index", copy, *words[1:]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert remedy in error
        assert len(error.splitlines()) == 1
    assert EmbeddingIndex.load(copy, exact=True).nearest(torch.ones(about_width(copy)), 3)[1]


def test_a_damaged_part_is_made_again_or_removed(copy: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same index gets the same bytes. The other files of the index stay as they are."""
    before = {path.name: path.read_bytes() for path in large.iterdir()}
    damage_bit(copy / CELLS)
    assert run("approximate", "--index", copy) == 0
    assert "recall@10 0.9" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert run("approximate", "--index", copy, "--remove") == 0
    assert EmbeddingIndex.load(copy).way_of_search() == {"search": "exact"}
    assert "approximate" not in json.loads((copy / "index.json").read_text())
    left = {path.name: path.read_bytes() for path in copy.iterdir() if path.name != "index.json"}
    assert left == {name: data for name, data in before.items() if name not in (CELLS, "index.json")}


@pytest.mark.parametrize(
    "value", [1, {}, {"probes": 0}, {"recall_at_10": float("nan")}, {"sha256": 5}, {"target": 2}, {"probes": 1.5}]
)
def test_a_malformed_about_is_refused(copy: Path, value: object) -> None:
    about = json.loads((copy / "index.json").read_text())
    known = about["approximate"] | value if isinstance(value, dict) and value else value
    (copy / "index.json").write_text(json.dumps(about | {"approximate": known}))
    with pytest.raises(ValueError, match=r"index\.json: 'approximate'"):
        EmbeddingIndex.load(copy)


def test_texts_measure_the_recall(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay with the index, so that a change is measured with them too."""
    texts = [f"a river with {number} ships" for number in range(70)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    words = ["approximate", "--index", copy, "--recall", "0.9"]
    assert run(*words, "--queries", tmp_path / "texts.txt", "--device", "cpu") == 0
    assert "(35 captions)" in capsys.readouterr().out
    kept = EmbeddingIndex.load(copy).cells
    assert kept is not None
    expected = Encoder.load(test_set.export, "cpu").embed_texts(texts)
    torch.testing.assert_close(kept.queries.float(), expected, atol=1e-3, rtol=0)
    assert run(*words) == 0
    assert "(35 captions)" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from priorclip.retrieval.indexing.cells import Cells
from priorclip.retrieval.__main__ import main

save = Cells.save

def save_and_die(cells, folder):
    save(cells, folder)
    os.kill(os.getpid(), signal.SIGKILL)

Cells.save = save_and_die
main(sys.argv[1:])
"""


def test_a_killed_index_goes_on_and_has_the_same_bytes(
    test_set: TestSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while the approximate part is written. The images are not encoded again."""
    words = ["index", *encoding(test_set), "--approximate", "always", "--keep_every", "6", "--output"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words), str(tmp_path / "killed" / "index")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "index").exists()
    assert run(*words, tmp_path / "whole" / "index") == 0
    read: list[int] = []
    fetch = ImageFetcher.__getitems__

    def counting(fetcher: ImageFetcher, indices: list[int]) -> dict:
        read.extend(index for index in indices if index >= 0)  # the others are padding
        return fetch(fetcher, indices)

    monkeypatch.setattr(ImageFetcher, "__getitems__", counting)
    assert run(*words, tmp_path / "killed" / "index") == 0
    assert not read
    found, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "index").iterdir()} for name in ("killed", "whole")
    )
    assert CELLS in found
    assert found == whole
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["index"]


def test_when_an_index_gets_an_approximate_part(
    test_set: TestSet, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By size, if faiss is there. The captions of the images are the queries."""
    assert EmbeddingIndex.load(small).cells is None
    monkeypatch.setattr(cell_training, "FEWEST_QUERIES", 8)
    words = ["index", *encoding(test_set), "--approximate_from", "24", "--output"]
    assert run(*words, tmp_path / "index") == 0
    cells = EmbeddingIndex.load(tmp_path / "index").cells
    assert cells is not None
    assert cells.about["queries"] == "captions"
    captions = [entry["sentences"][0]["raw"] for entry in test_set.entries() if entry["split"] == "test"]
    expected = Encoder.load(test_set.export, "cpu").embed_texts(captions)
    torch.testing.assert_close(cells.queries.float(), expected, atol=1e-3, rtol=0)
    assert run(*words, tmp_path / "never", "--approximate", "never") == 0
    assert EmbeddingIndex.load(tmp_path / "never").cells is None
    monkeypatch.setattr(cell_training, "find_spec", lambda name: None)
    assert run(*words, tmp_path / "without") == 0
    assert EmbeddingIndex.load(tmp_path / "without").cells is None
    assert "24 images get no approximate index" in caplog.text
    assert run(*words, tmp_path / "refused", "--approximate", "always") == 2
    assert "pip install 'priorclip-pretraining[millions]'" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_cells_of_one_row_and_of_rows_that_are_not_finite() -> None:
    one = make_cells(clustered(1, 8, 1).half(), None, "", 0.95)
    assert one.candidates(torch.ones(8), 5).tolist() == [0]
    assert one.about["recall_at_10"] == 1
    rows = clustered(400, 8, 1).half()
    rows[7] = torch.nan
    cells = make_cells(rows, noisy_rows(clustered(400, 8, 1)), "", 0.9)
    assert sorted(cells.rows.tolist()) == list(range(400))
    assert cells.about["recall_at_10"] > 0.8


def test_a_search_by_row_and_by_many_texts_uses_the_cells(large: Path, test_set: TestSet) -> None:
    searcher = Searcher(EmbeddingIndex.load(large), Encoder.load(test_set.export, "cpu"))
    alone = [[hit.row for hit in searcher.by_row(row, 5)] for row in range(3)]
    assert [rows[0] for rows in alone] == [0, 1, 2]
    together = [[hit.row for hit in hits] for hits in searcher.by_texts(["a river", "a road"] * 20, 5)]
    assert together == [[hit.row for hit in searcher.by_text(text, 5)] for text in ["a river", "a road"]] * 20
