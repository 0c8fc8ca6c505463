"""`retrieval index` and `search`: exact ranking, images are found again, models do not mix, nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_galleries import TestSet, export_model

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.shards import ShardSet
from priorclip.retrieval import EmbeddingIndex, Encoder, Searcher, build_index, image_places, nearest_rows
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import IndexConfig


def config(test_set: TestSet, output: Path, **changes) -> IndexConfig:
    values = {"model": str(test_set.export), "data": str(test_set.json), "images": str(test_set.images)}
    return IndexConfig(**(values | {"device": "cpu", "batch_size": 8, "output": str(output)} | changes))


@pytest.fixture(scope="module")
def built(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingIndex:
    return build_index(config(test_set, tmp_path_factory.mktemp("index") / "index"))


@pytest.fixture(scope="module")
def searcher(test_set: TestSet, built: EmbeddingIndex) -> Searcher:
    return Searcher(built, Encoder.load(test_set.export, "cpu"))


def in_memory(embeddings: torch.Tensor) -> EmbeddingIndex:
    lines = "".join(json.dumps({"key": str(row)}) + "\n" for row in range(len(embeddings)))
    return EmbeddingIndex(Path("memory"), {}, embeddings, lines.encode())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_nearest_is_the_order_of_a_full_sort(rows: int, k: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((rows, 5))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    query = embeddings[rng.integers(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_rows, "CHUNK", chunk)
        scores, found = in_memory(torch.tensor(embeddings, dtype=torch.float32)).nearest(torch.tensor(query).float(), k)
    exact = embeddings @ query
    assert len(found) == len(set(found)) == min(k, rows)
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(np.sort(exact)[::-1][:k], abs=1e-5)
    assert scores == pytest.approx(exact[found], abs=1e-5)


def test_equal_scores_are_ranked_by_row() -> None:
    embeddings = torch.eye(3).repeat(4, 1)
    scores, rows = in_memory(embeddings).nearest(torch.tensor([0.0, 1.0, 0.0]), 4)
    assert scores == [1.0] * 4
    assert rows == [1, 4, 7, 10]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(1, 30), st.sampled_from([1e-5, 1e-3, 0.3]), st.integers(0, 2**32 - 1))
def test_float16_gives_the_rows_of_a_full_sort(rows: int, k: int, spread: float, seed: int) -> None:
    """With a small spread most products of float16 are equal or in the wrong order, and some rows are equal."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal(16) + spread * rng.standard_normal((rows, 16))
    made[rng.integers(rows, size=rows // 8)] = made[0]
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    embeddings, query = torch.tensor(made).half(), torch.tensor(made[rng.integers(rows)]).float()
    scores, found = in_memory(embeddings).nearest(query, k)
    exact = (embeddings.double() * query.double()).sum(1).float().clamp(-1, 1).tolist()
    expected = sorted(range(rows), key=lambda row: (-exact[row], row))[:k]
    assert scores == pytest.approx([exact[row] for row in expected], abs=1e-6)
    assert len(set(found)) == min(k, rows)
    assert [exact[row] for row in found] == pytest.approx(scores, abs=1e-6)


def test_few_rows_of_many_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product in float16 and 64 of 20,000 rows in float64; no float32 copy of all rows."""
    draw = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=draw), dim=1)
    counted: list[int] = []
    products = nearest_rows.products

    def counting(rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        counted.append(len(rows))
        return products(rows, query)

    monkeypatch.setattr(nearest_rows, "products", counting)
    monkeypatch.setattr(nearest_rows, "all_rows", None)
    scores, rows = in_memory(embeddings.half()).nearest(embeddings[77], 10)
    assert counted == [64]
    exact = (embeddings.half().double() @ embeddings[77].double()).clamp(-1, 1)
    assert rows == exact.topk(10).indices.tolist()
    assert scores == pytest.approx(exact.topk(10).values.tolist(), abs=1e-7)


def test_a_row_that_is_not_finite_hides_no_other_one() -> None:
    draw = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(2000, 8, generator=draw), dim=1).half()
    embeddings[5] = torch.nan
    exact = embeddings.double() @ embeddings[9].double()
    exact[5] = -1
    assert in_memory(embeddings).nearest(embeddings[9].float(), 2)[1] == exact.topk(2).indices.tolist()


def test_every_image_finds_itself(test_set: TestSet, searcher: Searcher) -> None:
    entries = [entry for entry in test_set.entries() if entry["split"] == "test"]
    assert len(searcher.index) == len(entries) == 24
    for row, entry in enumerate(entries):
        data = (test_set.images / entry["filename"]).read_bytes()
        for hits in (searcher.by_image(data, 3), searcher.by_row(row, 3)):
            assert hits[0].row == row
            assert hits[0].score == pytest.approx(1, abs=2e-3)
            assert hits[0].score > hits[1].score
            assert hits[0].label == entry["filename"].split("/")[0]
            assert hits[0].where == str(test_set.images / entry["filename"])
        assert searcher.index.read_image(row) == data


def test_a_text_ranks_the_images_as_the_model_does(test_set: TestSet, searcher: Searcher) -> None:
    text = "a river with 7 white ships"
    hits = searcher.by_text(text, 24)
    tokens = searcher.encoder.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        query = searcher.encoder.model.encode_text(tokens["input_ids"], tokens["attention_mask"])[0]
    for hit in hits:
        data = (test_set.images / f"{hit.key}.png").read_bytes()
        assert hit.score == pytest.approx(float(searcher.encoder.image(data) @ query), abs=2e-3)
    assert [hit.rank for hit in hits] == list(range(1, 25))


def test_search_command_prints_a_ranked_table(
    test_set: TestSet, built: EmbeddingIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", "--index", str(built.folder), "--device", "cpu", "--k", "4"]
    image = test_set.images / "forest" / "forest_6.png"
    assert main([*words, "--image", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    rank, score, *rest = lines[1].split()
    assert (rank, rest) == ("1", ["forest", "forest/forest_6", str(image)])
    assert float(score) > 0.99
    assert main([*words, "--text", "a harbour"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_search_errors(test_set: TestSet, built: EmbeddingIndex, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(built.folder)
    cases = [
        (["--index", folder], "either --text"),
        (["--index", folder, "--text", "a", "--image", "b"], "either --text"),
        (["--index", folder, "--text", "  "], "blank"),
        (["--index", folder, "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--index", folder, "--image", str(test_set.json)], f"{test_set.json}: not an image"),
        (["--index", str(test_set.folder), "--text", "a"], "no image index"),
        (["--index", folder, "--text", "a", "--k", "0"], "at least 1"),
    ]
    for words, expected in cases:
        assert exit_code("search", *words, "--device", "cpu") == 2, words
        assert expected in capsys.readouterr().err


def exit_code(*words: str) -> int | str | None:
    """The exit code of the command. Wrong options raise SystemExit, other errors return the code."""
    try:
        return main(words)
    except SystemExit as error:
        return error.code


def test_index_of_shards_reads_the_images_from_the_tars(
    test_set: TestSet, built: EmbeddingIndex, tmp_path: Path
) -> None:
    shards = ShardSet(str(test_set.shards))
    index = build_index(config(test_set, tmp_path / "index", data=str(test_set.shards), images=None, dtype="float32"))
    assert index.embeddings.dtype == torch.float32
    torch.testing.assert_close(index.embeddings, built.embeddings.float(), atol=1e-3, rtol=0)
    for row in range(len(index)):
        assert index.read_image(row) == shards.read(row).image
        assert index.entry(row)["label"] == shards.read(row).label
        assert index.entry(row)["key"] == built.entry(row)["key"]


def test_index_of_shards_without_captions_or_manifest(test_set: TestSet, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        for number, path in enumerate(sorted(test_set.images.rglob("*.png"))[:3]):
            tar.add(path, f"{number}.png")
    index = build_index(config(test_set, tmp_path / "index", data=str(tmp_path / "bare.tar"), images=None))
    assert [index.entry(row)["key"] for row in range(3)] == ["0", "1", "2"]
    assert index.entry(0)["label"] is None


def test_an_image_that_changed_place_is_not_taken_for_another(test_set: TestSet, tmp_path: Path) -> None:
    shutil.copytree(test_set.shards, tmp_path / "shards")
    index = build_index(config(test_set, tmp_path / "index", data=str(tmp_path / "shards"), images=None))
    first, second = (tmp_path / "shards" / f"test-00000{n}.tar" for n in (0, 1))
    shutil.copyfile(second, first)
    shutil.copyfile(f"{second}.idx", f"{first}.idx")
    image_places.open_shard.cache_clear()
    with pytest.raises(BadSample, match="shard has changed"):
        index.read_image(0)


def test_bad_images_are_left_out_and_written_down(test_set: TestSet, tmp_path: Path) -> None:
    shutil.copytree(test_set.images, tmp_path / "images")
    (tmp_path / "images" / "river" / "river_5.png").write_bytes(b"GIF89a")
    index = build_index(config(test_set, tmp_path / "index", images=str(tmp_path / "images")))
    keys = [index.entry(row)["key"] for row in range(len(index))]
    assert len(keys) == 23
    assert "river/river_5" not in keys
    assert [key for listed in index.about["skipped"].values() for key in listed] == ["river/river_5"]
    good = Encoder.load(test_set.export, "cpu").image((tmp_path / "images" / "stadium" / "stadium_7.png").read_bytes())
    row = keys.index("stadium/stadium_7")
    torch.testing.assert_close(index.embeddings[row].float(), good, atol=1e-3, rtol=0)


def test_an_index_is_replaced_only_on_request_and_other_folders_never(test_set: TestSet, tmp_path: Path) -> None:
    output = tmp_path / "index"
    build_index(config(test_set, output, limit=3))
    with pytest.raises(FileExistsError, match="--overwrite"):
        build_index(config(test_set, output, limit=5))
    assert len(EmbeddingIndex.load(output)) == 3
    assert len(build_index(config(test_set, output, limit=5, overwrite=True))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="no image index"):
        build_index(config(test_set, precious, overwrite=True))
    assert (precious / "thesis.txt").read_text() == "years"


def test_an_index_and_another_model_do_not_mix(test_set: TestSet, built: EmbeddingIndex, tmp_path: Path) -> None:
    other = export_model(tmp_path / "other", ["a river", "a harbour"], seed=1)
    with pytest.raises(ValueError, match="other weights"):
        Searcher(built, Encoder.load(other, "cpu"))
    with pytest.raises(ValueError, match="different models"):
        built.nearest(torch.ones(7), 1)


def test_a_damaged_index_is_said_to_be_so(built: EmbeddingIndex, tmp_path: Path) -> None:
    def damaged(name: str, change) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(built.folder, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    cases = [
        (damaged("images.jsonl", lambda data: data[: len(data) // 2]), "damaged"),
        (damaged("images.jsonl", lambda data: b""), "damaged"),
        (damaged("embeddings.safetensors", lambda data: data[:-9]), "embeddings.safetensors cannot be read"),
        (damaged("index.json", lambda data: data.replace(b'"version": 1', b'"version": 9')), "another version"),
        (damaged("index.json", lambda data: b"[]"), "index.json must be a JSON object, not a list"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            EmbeddingIndex.load(folder)
