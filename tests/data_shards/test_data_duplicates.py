"""Duplicates and evaluation images: found by bytes and by look, whoever looks, and nothing else is thrown away."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from small_data import encoded, picture, rows

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.dedupe import hash_columns as hashing
from priorclip.data_shards.dedupe import near_hashes
from priorclip.data_shards.dedupe.duplicates import Duplicate, find_duplicates, merge_duplicates
from priorclip.data_shards.dedupe.hash_columns import HashColumns
from priorclip.data_shards.dedupe.image_hashes import PERCEPTUAL, SYMMETRIC, SYMMETRIES, hash_image, hash_images
from priorclip.data_shards.dedupe.leakage import DEFAULT_DISTANCE, EvaluationImages, find_leaks
from priorclip.data_shards.dedupe.near_hashes import Pieces, near_pairs
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import Sample
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
from priorclip.data_shards.pack.write_shards import PackPlan, hash_of_records, pack
from priorclip.data_shards.sources import Record, load, synthetic

UCMERCED = Path(__file__).parents[3] / "shared/data/ucmerced/images"
MAX_PIXELS = 100_000_000


def hash_columns(images: list[bytes], kind: np.dtype = PERCEPTUAL) -> HashColumns:
    return HashColumns.of_rows(hash_images(images, len(images), kind, MAX_PIXELS))


def evaluation_of(images: list[bytes], distance: int | None = DEFAULT_DISTANCE) -> EvaluationImages:
    names = [f"e{place}" for place in range(len(images))]
    return EvaluationImages(names, ["made"] * len(images), hash_columns(images, SYMMETRIC), distance)


def plain_pairs(left: np.ndarray, right: np.ndarray | None, distance: int) -> set[tuple[int, int, int]]:
    """Every hash against every other."""
    other = left if right is None else right
    return {
        (i, j, bits)
        for i, a in enumerate(left.tolist())
        for j, b in enumerate(other.tolist())
        if (bits := (a ^ b).bit_count()) <= distance and (right is not None or i < j)
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    distance=st.integers(0, 16),
    flips=st.integers(0, 20),
    within=st.booleans(),
    pieces=st.integers(3, 17),
    large=st.sampled_from((1, 50, near_hashes.LARGE)),
    block=st.sampled_from((1, 7, near_hashes.BLOCK)),
)
def test_near_pairs_are_those_of_all_comparisons(
    seed: int, sizes: tuple[int, int], distance: int, flips: int, within: bool, pieces: int, large: int, block: int
) -> None:
    """Hashes that lie near a few centres, so that there are pairs at every distance and equal ones.

    Any number of pieces finds them all, and large and small buckets and blocks give the same.
    """
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 3, dtype=np.uint64)

    def draw(count: int) -> np.ndarray:
        hashes = centres[rng.integers(0, 3, count)]
        for _ in range(int(rng.integers(0, flips + 1))):
            hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64))
        return hashes

    left, right = draw(sizes[0]), None if within else draw(sizes[1])
    chosen = Pieces.of(max(pieces, -(-(distance + 1) // 3)), distance)  # more than 2 bits of a piece take long
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_hashes, "LARGE", large)
        patch.setattr(near_hashes, "BLOCK", block)
        patch.setattr(Pieces, "cheapest", lambda *_: chosen)
        found = [(int(i), int(j), int(b)) for part in near_pairs(left, right, distance) for i, j, b in zip(*part)]
    assert len(found) == len(set(found)), "a pair comes once"
    assert set(found) == plain_pairs(left, right, distance)


@pytest.mark.parametrize("distance", [0, 3, 6, 8, 10])
def test_near_pairs_among_many_are_the_planted_ones(distance: int) -> None:
    """20,000 random hashes are no nearer than 11 bits to each other, but for those that were made so."""
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    for copy in range(200):
        bits = rng.choice(64, copy % (distance + 3), replace=False)
        hashes[19_000 + copy] = hashes[copy] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    expected = {(copy, 19_000 + copy, copy % (distance + 3)) for copy in range(200)}
    found = {(int(i), int(j), int(b)) for part in near_pairs(hashes, None, distance) for i, j, b in zip(*part)}
    assert {row for row in expected if row[2] <= distance} <= found
    assert all(row[2] <= distance for row in found)
    assert len(found) < 400


def test_too_large_a_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 16 of 64 bits"):
        list(near_pairs(np.zeros(2, np.uint64), None, 17))


def photograph(seed: int, side: int = 256) -> Image.Image:
    """Shapes, edges and grain: what a photograph's hash is made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 220, (9, 9, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    grain = rng.normal(0, 6, (side, side, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def sea(seed: int, side: int = 256) -> Image.Image:
    """Open water: one colour, and noise of a few grey levels."""
    rng = np.random.default_rng(seed)
    waves = Image.fromarray(rng.integers(0, 40, (64, 64), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    grey = np.asarray(waves)[..., None] + np.array([10, 60, 90])
    return Image.fromarray((grey + rng.normal(0, 3, (side, side, 3))).clip(0, 255).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 30": lambda image: encoded(image, quality=30),
    "half as wide": lambda image: encoded(image.resize((image.width // 2, image.height // 2), Image.BICUBIC)),
    "twice as wide": lambda image: encoded(image.resize((image.width * 2, image.height * 2), Image.BICUBIC)),
    "a rim of 1 % cut off": lambda image: encoded(image.crop((1, 1, image.width - 1, image.height - 1))),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15)),
    "PNG": lambda image: encoded(image, "PNG"),
}


@pytest.mark.parametrize("change", COPIES)
def test_changed_copies_are_found_in_every_orientation(change: str) -> None:
    originals = [photograph(seed) for seed in range(8)]
    evaluation = evaluation_of([encoded(image, quality=90) for image in originals])
    turned = [
        Image.fromarray(np.ascontiguousarray(np.moveaxis(turn(np.moveaxis(np.asarray(image), 2, 0)), 0, 2)))
        for image, turn in zip(originals, SYMMETRIES.values())
    ]
    found = find_leaks(hash_columns([COPIES[change](image) for image in turned]), evaluation)
    assert [(leak.image, leak.evaluated, leak.kind, leak.turn) for leak in found] == [
        (place, place, "near", place) for place in range(8)
    ]


def test_other_pictures_and_other_seas_are_not_thrown_away() -> None:
    evaluation = evaluation_of([encoded(make(seed)) for make in (photograph, sea) for seed in range(30)])
    others = [encoded(make(seed)) for make in (photograph, sea) for seed in range(100, 160)]
    assert find_leaks(hash_columns(others), evaluation) == []
    copies = [encoded(sea(seed), quality=75) for seed in range(30)]
    assert [leak.evaluated for leak in find_leaks(hash_columns(copies), evaluation)] == list(range(30, 60))


def test_pictures_without_content_are_compared_by_bytes_only() -> None:
    """Empty tiles have the same hash and the same look; that they are some test image's copies says nothing."""
    black, other = (encoded(Image.new("RGB", (64, 64), colour)) for colour in ("black", "#010203"))
    assert not hash_image(black, PERCEPTUAL, MAX_PIXELS)["textured"]
    found = find_leaks(hash_columns([other, black]), evaluation_of([black]))
    assert [(leak.image, leak.kind) for leak in found] == [(1, "exact")]


def test_first_record_stays_and_a_chain_is_not_followed() -> None:
    """b is like a, and c like b but not like a: a stays, b goes, c stays."""
    thumb = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = np.zeros(5, PERCEPTUAL)
    table["readable"] = table["textured"] = True
    table["thumb"] = thumb
    table["sha256"] = np.arange(5)[:, None]
    table["sha256"][4] = table["sha256"][1]
    table["hash"] = [0b0, 0b1111, 0b11111111, 2**63 + 2**62 + 2**61 + 2**60 + 2**59, 0b1111]
    found = find_duplicates(HashColumns.of_rows(table), 4, np.ones(5, bool))
    assert [(item.image, item.kept, item.kind, item.distance) for item in found] == [
        (1, 0, "near", 4),
        (4, 0, "near", 4),
    ]
    exact = find_duplicates(HashColumns.of_rows(table), None, np.ones(5, bool))
    assert [(item.image, item.kept, item.kind) for item in exact] == [(4, 1, "exact")]
    without = find_duplicates(HashColumns.of_rows(table), 4, np.array([False, True, True, True, True]))
    assert [(item.image, item.kept) for item in without] == [(2, 1), (4, 1)]


def dock_records() -> list[Record]:
    """Two pictures; the first comes again as it is, and again re-encoded with another label."""
    dock, field = photograph(1), photograph(2)
    return [
        Record("dock", encoded(dock), ["a dock"], None, extra={"coarse_captions": ["water"]}),
        Record("field", encoded(field), ["a field"], "farmland"),
        Record("copy", encoded(dock), ["boats", "a dock"], "port", extra={"coarse_captions": ["boats"]}),
        Record("worse", encoded(dock, quality=40), ["a pier"], "harbour"),
    ]


def test_keep_drop_and_merge(tmp_path: Path) -> None:
    def packed(name: str, **options: object) -> tuple[dict, Manifest]:
        manifest = pack(dock_records(), tmp_path / name, PackPlan(**options))  # type: ignore[arg-type]
        shards = ShardSet(str(tmp_path / name))
        return {shards.key(place): shards.read(place) for place in range(len(shards))}, manifest

    kept, manifest = packed("keep")
    assert list(kept) == ["dock", "field", "copy", "worse"]
    assert manifest.duplicates == {}
    assert not (tmp_path / "keep" / "duplicates.jsonl").exists()

    dropped, manifest = packed("drop", duplicates="drop")
    assert list(dropped) == ["dock", "field", "worse"]
    assert dropped["dock"].captions == ["a dock"]
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 0}

    merged, manifest = packed("merge", duplicates="merge", near_duplicates=6)
    assert list(merged) == ["dock", "field"]
    assert merged["dock"].captions == ["a dock", "boats", "a pier"]
    assert merged["dock"].texts("coarse_captions") == ["water", "boats"]
    assert merged["dock"].label == "port"
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 1, "near": 1}, "the two that go contradict each other"
    found = rows(tmp_path / "merge" / "duplicates.jsonl")
    assert [(row["key"], row["kept"], row["kind"]) for row in found] == [
        ("copy", "dock", "exact"),
        ("worse", "dock", "near"),
    ]


def test_contradicting_labels_are_reported(tmp_path: Path) -> None:
    made = dock_records()
    made[0].label = "harbour"
    manifest = pack(made, tmp_path / "o", PackPlan(duplicates="merge"))
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 1}
    assert rows(tmp_path / "o" / "duplicates.jsonl") == [
        {"key": "copy", "kept": "dock", "kind": "exact", "distance": 0, "label": "port", "kept_label": "harbour"}
    ]


def test_contradicting_sets_of_labels_are_reported(tmp_path: Path) -> None:
    made = dock_records()[::2]
    made[0].extra = {"labels": ["harbour", "sea"]}
    made[1].label, made[1].extra = None, {"labels": ["sea", "harbour"]}
    assert pack(made, tmp_path / "same", PackPlan(duplicates="drop")).duplicates["label_conflicts"] == 0
    made[1].extra = {"labels": ["sea", "beach"]}
    assert pack(made, tmp_path / "other", PackPlan(duplicates="drop")).duplicates["label_conflicts"] == 1
    made[1].label, made[1].extra = "port", {}
    assert pack(made, tmp_path / "one", PackPlan(duplicates="merge")).duplicates["label_conflicts"] == 1
    assert rows(tmp_path / "one" / "duplicates.jsonl")[0] | {"key": ""} == {
        "key": "", "kept": "dock", "kind": "exact", "distance": 0,
        "labels": ["port"], "kept_labels": ["harbour", "sea"],
    }  # fmt: skip
    packed = ShardSet(str(tmp_path / "one")).read(0)
    assert (packed.label, packed.info["labels"]) == (None, ["harbour", "sea"]), (
        "one label does not join a set of others"
    )


def test_labels_come_with_a_merge(tmp_path: Path) -> None:
    made = dock_records()[::2]
    made[1].label, made[1].extra = None, {"labels": ["sea", "beach"]}
    pack(made, tmp_path / "o", PackPlan(duplicates="merge"))
    packed = ShardSet(str(tmp_path / "o")).read(0)
    assert packed.info["labels"] == ["sea", "beach"]
    assert made[0].captions == ["a dock"], "the caller's records are left as they are"


def repacked(folder: Path, *inputs: Path) -> Sample:
    """The one picture of these shards, packed again."""
    words = f"pack --source webdataset --output {folder} --duplicates merge --workers 1 --shuffle=false"
    assert main([*words.split(), f"--shards=[{','.join(map(str, inputs))}]"]) == 0
    shards = ShardSet(str(folder))
    assert len(shards) == 1
    return shards.read(0)


def test_merge_survives_reading_a_tar(tmp_path: Path) -> None:
    """What a tar says beside captions and label is known only when the record is read: both sides' is kept."""
    first, _, second, _ = dock_records()
    second.extra["labels"] = ["port", "sea"]
    second.label = None
    for name, record in (("a", first), ("b", second)):
        pack([record], tmp_path / name, PackPlan())
    sample = repacked(tmp_path / "o", tmp_path / "a", tmp_path / "b")
    assert sample.captions == ["a dock", "boats"]
    assert sample.texts("coarse_captions") == ["water", "boats"]
    assert sample.info["labels"] == ["port", "sea"]


def test_conflicts_of_label_sets_in_tars_are_reported(tmp_path: Path) -> None:
    first, _, second, _ = dock_records()
    first.extra["labels"], second.extra["labels"], second.label = ["port", "sea"], ["port", "beach"], None
    for name, record in (("a", first), ("b", second)):
        pack([record], tmp_path / name, PackPlan())
    repacked(tmp_path / "o", tmp_path / "a", tmp_path / "b")
    assert Manifest.load(tmp_path / "o").duplicates == {"exact": 1, "label_conflicts": 1}


def test_merge_survives_drawing(tmp_path: Path) -> None:
    """A drawn scene brings its captions and label when it is drawn."""
    drawing = synthetic(1, 3, 64)[0]
    drawn = load(drawing)
    copy = Record("copy", drawn.image, ["my own words"], "another", extra={"coarse_captions": ["in short"]})
    for name, made in (("first", [drawing, copy]), ("last", [copy, drawing])):
        manifest = pack(made, tmp_path / name, PackPlan(duplicates="merge"))
        sample = ShardSet(str(tmp_path / name)).read(0)
        assert manifest.samples == 1
        assert set(sample.captions) == {*drawn.captions, "my own words"}
        assert set(sample.texts("coarse_captions")) == {*drawn.extra["coarse_captions"], "in short"}
        assert sample.label == (drawn.label if name == "first" else "another")


def test_what_a_merged_record_says_is_kept_where_it_can_be_read_no_more(tmp_path: Path) -> None:
    first, _, second, _ = dock_records()
    path = tmp_path / "copy.jpg"
    path.write_bytes(second.image)
    second.image = path
    merged = merge_duplicates([first, second], [Duplicate(1, 0, "exact", 0)])[0]
    path.unlink()
    found = load(merged)
    assert (found.image, found.captions, found.label) == (first.image, ["a dock", "boats"], "port")


def test_anything_that_is_packed_of_a_record_changes_the_digest() -> None:
    def digest(**changes: object) -> bytes:
        whole = {
            "key": "a",
            "image": b"x",
            "captions": ["y"],
            "extra": {"coarse_captions": ["z"], "labels": ["p", "q"]},
        }
        return hash_of_records([Record(**whole | changes)])  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {}, {"key": "b"}, {"image": b"y"}, {"captions": ["y", "y"]}, {"label": "p"}, {"split": "test"},
        {"source": "s"}, {"url": "u"}, {"extra": {}}, {"extra": {"coarse_captions": ["z"], "labels": ["p"]}},
        {"extra": {"coarse_captions": ["w"], "labels": ["p", "q"]}},
        {"extra": {"coarse_captions": ["z"], "labels": ["p", "q"], "gsd": 0.5}},
    ]  # fmt: skip
    assert len({digest(**change) for change in changes}) == len(changes)
    assert digest() == digest(extra={"labels": ["p", "q"], "coarse_captions": ["z"]}), "the order of fields is none"


def test_other_options_are_another_pack(tmp_path: Path) -> None:
    half = tmp_path / "half"
    with pytest.raises(ValueError, match="none of 1 records"):
        pack([Record("a", b"no image", ["x"])], half, PackPlan())
    with pytest.raises(FileExistsError, match="other options"):
        pack([Record("a", b"no image", ["x"])], half, PackPlan(duplicates="drop"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--duplicates some", "--duplicates: keep, drop, merge"),
        ("--near-duplicates 4", "needs --duplicates drop or merge"),
        ("--duplicates drop --near-duplicates 20", "0 to 16, not 20"),
        ("--exclude test.json", "needs --exclude-images"),
        ("--exclude here --exclude-distance -1", "0 to 16, not -1"),
        ("--exclude nowhere", "nowhere does not exist"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str) -> None:
    folder = tmp_path / "images" / "dock"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encoded(picture(1)))
    command = f"pack --source imagefolder --images {folder.parent} --output {tmp_path / 'o'} --workers 1 {options}"
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Training images, two of them from the test split of an annotation; one of these turned and re-encoded."""
    train, test = tmp_path / "train" / "any", tmp_path / "test"
    train.mkdir(parents=True)
    test.mkdir()
    for seed in range(6):
        (train / f"t{seed}.jpg").write_bytes(encoded(photograph(seed)))
    for seed in (10, 11, 12):
        (test / f"e{seed}.jpg").write_bytes(encoded(photograph(seed), quality=90))
    (train / "same.jpg").write_bytes((test / "e10.jpg").read_bytes())
    turned = photograph(11).transpose(Image.Transpose.ROTATE_90).resize((140, 140))
    (train / "turned.jpg").write_bytes(encoded(turned, quality=50))
    (train / "trained.jpg").write_bytes((test / "e12.jpg").read_bytes())
    entries = [
        {"filename": f"e{seed}.jpg", "split": "train" if seed == 12 else "test", "sentences": [{"raw": "x"}]}
        for seed in (10, 11, 12)
    ]
    (tmp_path / "test.json").write_text(json.dumps({"dataset": "made", "images": entries}))
    return tmp_path


def test_exclude_leaves_out_and_reports(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    source = f"pack --source imagefolder --images {corpus / 'train'} --no-shuffle --workers 1".replace(
        "--no-shuffle", "--shuffle=false"
    )
    exclude = f"--exclude {corpus / 'test.json'} --exclude-images {corpus / 'test'}"
    leaking, clean = corpus / "leaking", corpus / "clean"
    assert main(f"{source} --output {leaking}".split()) == 0
    assert main(f"{source} --output {clean} {exclude}".split()) == 0
    printed = capsys.readouterr().out
    assert "excluded as images of the evaluation: 1 x exact, 1 x near" in printed
    found = rows(clean / "excluded.jsonl")
    assert [(row["key"], row["evaluation"], row["kind"], row["transformation"]) for row in found] == [
        ("any/same", "e10", "exact", "none"),
        ("any/turned", "e11", "near", "rotated by 90 degrees"),
    ]
    assert Manifest.load(clean).excluded == {"exact": 1, "near": 1}
    shards = ShardSet(str(clean))
    assert [shards.key(place) for place in range(len(shards))] == [f"any/t{n}" for n in range(6)] + ["any/trained"]

    before = {path: path.read_bytes() for path in leaking.iterdir()}
    assert main(f"leakage {leaking} {exclude} --workers 1".split()) == 1
    printed = capsys.readouterr().out
    assert [json.loads(line[5:])["key"] for line in printed.splitlines() if line.startswith("LEAK ")] == [
        "any/same",
        "any/turned",
    ]
    assert {path: path.read_bytes() for path in leaking.iterdir()} == before
    assert main(f"leakage {clean} {exclude} --workers 1".split()) == 0
    assert main(f"leakage {clean} {exclude} --exclude-split all --workers 1".split()) == 1
    assert main(f"leakage {leaking} {exclude} --exclude-distance null --workers 1".split()) == 1
    assert "any/turned" not in capsys.readouterr().out.splitlines()[-2]


def test_packed_shards_and_folders_are_evaluation_sets(corpus: Path) -> None:
    evaluated = corpus / "evaluated"
    assert main(f"pack --source imagefolder --images {corpus / 'test'} --output {evaluated} --workers 1".split()) == 0
    for name, output in ((evaluated, "a"), (corpus / "test", "b")):
        command = f"pack --source imagefolder --images {corpus / 'train'} --exclude {name} --output {corpus / output}"
        assert main([*command.split(), "--workers", "1"]) == 0
        found = {row["key"]: row["evaluation"] for row in rows(corpus / output / "excluded.jsonl")}
        assert found == {"any/same": "e10", "any/turned": "e11", "any/trained": "e12"}


def test_unreadable_evaluation_images_are_an_error(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    source = f"pack --source imagefolder --images {corpus / 'train'} --output {corpus / 'o'} --workers 1"
    exclude = f"--exclude {corpus / 'test.json'} --exclude-images {corpus / 'test'}"
    (corpus / "test" / "e11.jpg").unlink()
    assert main(f"{source} {exclude}".split()) == 2
    assert "1 of the 2 evaluation images" in (said := capsys.readouterr().err)
    assert "e11" in said
    assert main(f"{source} {exclude} --exclude-split val".split()) == 2
    assert "--exclude-split to one of test, train" in capsys.readouterr().err
    assert not (corpus / "o").exists()


def test_everything_excluded_is_an_error(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    train = corpus / "train"
    command = f"pack --source imagefolder --images {train} --exclude {train} --output {corpus / 'o'} --workers 1"
    assert main(command.split()) == 2
    assert "all show evaluation images" in capsys.readouterr().err


@pytest.mark.skipif(not UCMERCED.is_dir(), reason="UC Merced's photographs are not here")
def test_real_photographs(tmp_path: Path) -> None:
    """Of 84 scenes, 21 classes, none is another's copy; their mirrored and re-encoded copies are found."""
    paths = [path for scene in sorted(UCMERCED.iterdir()) for path in sorted(scene.glob("*.jpg"))[::25][:4]]
    images = [path.read_bytes() for path in paths]
    assert find_leaks(hash_columns(images[1::2]), evaluation_of(images[::2])) == []
    copies = []
    for data in images[::2]:
        with Image.open(io.BytesIO(data)) as image:
            mirrored = image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            copies.append(encoded(mirrored.resize((160, 160), Image.BICUBIC), quality=60))
    found = find_leaks(hash_columns(copies), evaluation_of(images[::2]))
    assert [leak.image for leak in found] == [leak.evaluated for leak in found]
    assert len(found) >= 0.97 * len(copies)


def test_prints_are_the_same_from_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PART", 50)  # images
    made = [Record(f"r{n}", encoded(picture(n)), ["x"]) for n in range(110)]
    one = hashing.hash_records(made, tmp_path / "one", PERCEPTUAL, MAX_PIXELS, WorkerPool(1), TaskShare())
    two = hashing.hash_records(made, tmp_path / "two", PERCEPTUAL, MAX_PIXELS, WorkerPool(2), TaskShare())
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 3
    some = np.array([105, 3, 105, 49, 50])
    assert np.array_equal(one.thumbnails(some), np.concatenate([np.load(p)["thumb"] for p in two.parts])[some])
