"""`pack --source synthetic --masks true`: where a drawn scene shows what its captions name, as members of shards."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from test_data_synthetic import COUNTED

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.inspect.verify import verify_folder
from priorclip.data_shards.synthetic import render as renderer
from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.ground import texture
from priorclip.data_shards.synthetic.render import part_mask, render
from priorclip.data_shards.synthetic.scene import GROUND, sketch_scene
from priorclip.data_shards.synthetic.sketch import Sketch, Texture
from priorclip.data_shards.synthetic.truth import SMALLEST_PIECE, boxes_of, draw_truth

PARTS = ("main", "main+")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """26 scenes in two shards, without masks and with them."""
    folder = tmp_path_factory.mktemp("truth")
    for name, masks in (("plain", "false"), ("masks", "true")):
        words = ["pack", "--source", "synthetic", "--count", "26", "--size", "48", "--shard-size", "20"]
        assert main([*words, "--masks", masks, "--workers", "1", "--output", str(folder / name)]) == 0
    return folder / "plain", folder / "masks"


def members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    return found


def test_masks_are_members_beside_the_same_others(packs: tuple[Path, Path]) -> None:
    plain, masks = map(members, packs)
    extra = {name for name in masks if name.endswith((".mask.png", ".boxes.json"))}
    assert len(extra) == 2 * 26
    assert list(plain.items()) == [(name, data) for name, data in masks.items() if name not in extra]
    for number in range(26):
        truth = draw_truth(0, number, 48)
        stored = np.asarray(Image.open(io.BytesIO(masks[f"scene-{number:08d}.mask.png"])))
        assert stored.dtype == np.uint8
        assert np.abs(stored / 255 - truth.mask).max() <= 0.5 / 255 + 1e-6
        boxes = json.loads(masks[f"scene-{number:08d}.boxes.json"])
        assert boxes == {"noun": truth.noun, "size": [48, 48], "boxes": truth.boxes}


def test_packing_masks_again_gives_the_same_bytes(packs: tuple[Path, Path], tmp_path: Path) -> None:
    """With two processes, which is another order of work."""
    words = ["pack", "--source", "synthetic", "--count", "26", "--size", "48", "--shard-size", "20", "--masks", "true"]
    assert main([*words, "--workers", "2", "--output", str(tmp_path / "again")]) == 0
    first, again = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (packs[1], tmp_path / "again")
    )
    assert first == again


def test_all_readers_see_the_same_samples_with_masks_and_without(packs: tuple[Path, Path], tmp_path: Path) -> None:
    plain, masks = (ShardSet(str(folder)) for folder in packs)
    for number in range(26):
        assert replace(masks.read(number), shard="") == replace(plain.read(number), shard="")
        assert masks.captions(number) == plain.captions(number)
    streams = [
        ShardStream(each, None, DataConfig(shards=str(folder), image_size=32, workers=0), global_batch=13, epochs=1)
        for each, folder in zip((plain, masks), packs, strict=True)
    ]
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])
    assert verify_folder(packs[1]) == ([], 26)
    copied = shutil.copytree(packs[1], tmp_path / "indexed")
    assert main(["index", str(copied), "--overwrite", "true", "--workers", "1"]) == 0
    counted = [Manifest.load(folder) for folder in (copied, packs[0])]
    assert len({(each.samples, each.captions, tuple(each.class_counts.items())) for each in counted if each}) == 1
    read = list(webdataset.WebDataset(str(packs[1] / "shard-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert len(read) == 20
    assert read[0]["mask.png"].shape == (48, 48, 3)
    assert read[0]["boxes.json"]["noun"] == draw_truth(0, 0, 48).noun


def test_a_member_is_read_by_its_extension(packs: tuple[Path, Path]) -> None:
    plain, masks = (ShardSet(str(folder)) for folder in packs)
    assert masks.member(22, "mask.png") == draw_truth(0, 22, 48).png()
    with pytest.raises(BadSample, match=r"no member: the sample has no \.mask\.png"):
        plain.member(22, "mask.png")


def black_and_white(sketch: Sketch) -> Sketch:
    """The same drawing with the parts in white and everything else in black; all random draws stay."""

    def dyed(material: str | Texture, part: str) -> Texture:
        return lambda grid, rng: 0 * texture(material, grid, rng) + 255.0 * (part in PARTS)

    ground = dyed(sketch.ground, sketch.ground_part)
    areas = [
        area if area.material is None else area._replace(material=dyed(area.material, area.part))
        for area in sketch.areas
    ]
    marks, *levels = (
        [shape._replace(colour=(255.0 * (shape.part in PARTS),) * 3) for shape in shapes]
        for shapes in (sketch.marks, *sketch.levels)
    )
    return replace(sketch, ground=ground, areas=areas, marks=marks, levels=levels)


def test_the_mask_is_the_picture_painted_white_where_the_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the renderer of the pictures itself: it draws the parts white and the rest black."""
    monkeypatch.setattr(renderer, "SHADOW_DEPTH", 0.0)
    found = set()
    for index in range(48):
        label, sketch, _ = sketch_scene(7, index)
        if label in ("mountain", "roundabout"):  # their main thing is a named place of the ground, without a paint
            continue
        drawn = render(black_and_white(sketch), 64, generator(7, GROUND, index))[..., 0] / 255
        mask = part_mask(sketch, 64, PARTS, generator(7, GROUND, index))
        weather = 0.15 * (mask > 0)  # render makes what is painted up to that much darker or lighter
        assert (np.abs(drawn - mask) <= 0.02 + weather).all(), (label, index)
        assert 0.004 < mask.mean() < 0.999, (label, index)
        found.add(label)
    assert len(found) == 22


def test_named_places_of_the_ground() -> None:
    """A roundabout is a ring without its island; peaks are discs, where no hut stands on them."""
    for index in range(100):
        label, sketch, facts = sketch_scene(9, index)
        mask = part_mask(sketch, 96, PARTS, generator(9, GROUND, index))
        if label == "roundabout":
            assert mask[48, 48] == 0
            assert 0.06 < mask.mean() < 0.25
        if label == "mountain":
            assert len(boxes_of(mask)) <= facts.main.count
            assert 0.1 < mask.mean() < 0.6


def test_each_counted_thing_has_a_box_that_fits() -> None:
    checked, wrong = 0, []
    for index in range(120):
        label, sketch, facts = sketch_scene(13, index)
        if label not in COUNTED:
            continue
        mask = part_mask(sketch, 128, PARTS, generator(13, GROUND, index))
        boxes = boxes_of(mask)
        checked += 1
        wrong += [] if len(boxes) == facts.main.count else [(label, index, facts.main.count, len(boxes))]
        seen = mask > 0.4
        for left, top, right, bottom in boxes:
            inside = seen[top:bottom, left:right]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert inside.sum() >= SMALLEST_PIECE
        covered = np.zeros_like(seen)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] = True
        assert (seen & ~covered).sum() < SMALLEST_PIECE * 4, (label, index)
    assert checked > 30
    assert len(wrong) <= 0.05 * checked, wrong


def test_boxes_begin_with_the_largest_piece_and_leave_out_specks() -> None:
    mask = np.zeros((10, 12), np.float32)
    mask[1:3, 1:3] = 1  # 4 pixels
    mask[5:8, 4:9] = 0.5  # 15 pixels
    mask[9, 11] = 1  # a speck
    mask[0, 6:] = 0.3  # not seen
    assert boxes_of(mask) == [[4, 5, 9, 8], [1, 1, 3, 3]]


def test_masks_that_would_not_fit_their_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["pack", "--output", str(tmp_path / "x"), "--masks", "true", "--workers", "1"]
    assert main([*words, "--source", "synthetic", "--size", "64", "--max-side", "32"]) == 2
    assert "draw them with --size 32" in capsys.readouterr().err
    assert main([*words, "--source", "imagefolder", "--images", str(tmp_path)]) == 2
    assert "does not take --masks" in capsys.readouterr().err
