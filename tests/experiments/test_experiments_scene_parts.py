"""Recall of the head, the middle and the tail of the scenes, from runs of a study that are done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from priorclip.data_shards.format.manifest import Manifest
from priorclip.experiments.experiment import load_data
from priorclip.experiments.scene_parts import recall_by_part, results_by_part, scene_parts, scene_sizes
from priorclip.experiments.study import load_study, row_at_level
from priorclip.experiments.sweep_table import Results
from priorclip.model.image_hits import IMAGE_FILE, ImageHits, image_hits, write_image_hits
from priorclip.model.recall import query_hits

SIZES = {"port": 9, "beach": 50, "desert": 2, "farm": 9, "park": 100, "river": 1, "church": 4}


def test_scenes_are_ranked_by_size() -> None:
    parts = {"head": ["beach", "farm", "park"], "middle": ["church", "port"], "tail": ["desert", "river"]}
    found = scene_parts(SIZES)
    assert {part: sorted(name for name in found if found[name] == part) for part in parts} == parts
    with pytest.raises(ValueError, match="at least 3 scenes, and there are 2"):
        scene_parts({"port": 1, "beach": 2})


def hits_of(rng: np.random.Generator, scenes: list[str]) -> tuple[ImageHits, np.ndarray, np.ndarray]:
    """Hits of a random model, with its similarities (I, C) and the image of each caption (C,)."""
    captions = rng.integers(1, 4, len(scenes))
    image_of = np.repeat(np.arange(len(scenes)), captions)
    images, texts = (
        normalize(torch.from_numpy(rng.normal(size=(count, 6))), dim=1) for count in (len(scenes), len(image_of))
    )
    found = query_hits(images, texts, torch.from_numpy(image_of))
    keys = [f"image-{place}" for place in range(len(scenes))]
    return image_hits(found, keys, scenes), (images @ texts.T).numpy(), image_of


def slow_mean_recall(similarity: np.ndarray, image_of: np.ndarray, own: list[int]) -> float:
    """Mean recall of the queries of some images, which search among all images and captions: sorted one by one."""
    recalls = []
    for k in (1, 5, 10):
        first = [np.argsort(-similarity[image])[:k] for image in own]
        recalls.append(np.mean([image in image_of[best] for image, best in zip(own, first, strict=True)]))
        queries = [caption for caption in range(len(image_of)) if image_of[caption] in own]
        recalls.append(np.mean([image_of[each] in np.argsort(-similarity[:, each])[:k] for each in queries]))
    return 100 * float(np.mean(recalls))


def test_recall_of_a_part_is_of_its_queries_in_the_whole_gallery() -> None:
    rng = np.random.default_rng(3)
    scenes = [*SIZES, "unknown"] * 5
    images, similarity, image_of = hits_of(rng, scenes)
    parts = scene_parts(SIZES)
    found = recall_by_part(images, parts)
    assert list(found) == ["head", "middle", "tail"]
    for part, value in found.items():
        own = [place for place, scene in enumerate(scenes) if parts.get(scene) == part]
        assert value == pytest.approx(slow_mean_recall(similarity, image_of, own), abs=1e-9)
    assert list(recall_by_part(images, {"port": "tail"})) == ["tail"]


def test_a_study_has_its_parts_of_each_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seed 0 has other sizes than seed 1, seed 2 has no shards, and one run has no file of its test images."""
    study = load_study("long-tail")
    data = replace(load_data("rsicd"), places={**load_data("rsicd").places, "subsets": str(tmp_path / "subsets")})
    names = list(study.rows)[:2]
    rows = [row for row in study.experiments() if row.name in names]
    table = {f"{level:g}": {row.name: row_at_level(study, level, row, data, tmp_path, {}) for row in rows}
             for level in (0, 1.5)}  # fmt: skip
    for seed, sizes in enumerate([SIZES, dict(zip(SIZES, reversed(SIZES.values()), strict=True))]):
        shards = tmp_path / f"subsets/tail-1.5/seed-{seed}"
        shards.mkdir(parents=True)
        Manifest(175, 175, 1, sorted(sizes), sizes, ["captions"], []).save(shards)
        assert scene_sizes(shards) == sizes
    rng, expected = np.random.default_rng(1), {}
    results: dict[str, Results] = {}
    for level, parts in table.items():
        results[level] = {name: {} for name in parts}
        for name, place in parts.items():
            for seed in range(3):
                images, *_ = hits_of(rng, [*SIZES] * 4)
                run = place.run(seed) / place.row.steps[-1].command
                run.mkdir(parents=True)
                results[level][name][seed] = images.figures()
                if (level, name, seed) != ("1.5", names[1], 0):
                    write_image_hits(run / IMAGE_FILE, images)
                    sizes = scene_sizes(tmp_path / f"subsets/tail-1.5/seed-{seed}") if seed < 2 else {}
                    expected[level, name, seed] = recall_by_part(images, scene_parts(sizes)) if sizes else {}
    found = results_by_part(study, table, results, range(3))
    read = {
        (level, name, seed): {part: found[part][level][name][seed]["mean_recall"] for part in found}
        for level in table for name in names for seed in found["tail"][level][name]
    }  # fmt: skip
    assert set(read) == {key for key in expected if key[2] < 2}
    assert all(read[key] == pytest.approx(expected[key], abs=1e-9) for key in read)
    assert "no recall of head, middle and tail for seed 2" in caplog.text
    assert json.dumps(found)
    assert results_by_part(replace(study, scene_sizes=None), table, results, range(3)) == {}
