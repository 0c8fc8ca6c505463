"""The file of what each test image contributes: against counting image by image, and read back to the last digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_recall import draw, slow_metrics, slow_recall

from priorclip.model.image_hits import FIGURES, ImageHits, image_hits, read_image_hits, write_image_hits
from priorclip.model.recall import query_hits, retrieval_metrics

HEAD = f"key,scene,captions,{','.join(FIGURES)}\n"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any), st.integers(1, 5))
def test_equals_counting_image_by_image_and_gives_the_recalls(
    tmp_path_factory: pytest.TempPathFactory, seed: int, counts: list[int], levels: int
) -> None:
    images, texts, index = draw(seed, counts, levels)
    path = tmp_path_factory.mktemp("hits") / "test_images.csv"
    keys = [f'a "key", {image}' for image in range(len(counts))]
    write_image_hits(path, image_hits(query_hits(images, texts, index), keys, ["port"] * len(counts)))
    found = read_image_hits(path)
    assert (found.keys, found.scenes) == (keys, ["port"] * len(counts))
    assert found.captions.tolist() == counts
    similarity = images.double() @ texts.double().T
    for image in range(len(counts)):
        own = (index == image).nonzero().flatten().tolist()
        slow = [slow_recall(similarity[image].tolist(), own, k) if own else 0 for k in (1, 5, 10)]
        slow += [sum(slow_recall(similarity[:, text].tolist(), [image], k) for text in own) for k in (1, 5, 10)]
        assert found.sums[:, image] == pytest.approx(slow, abs=1e-9)
    assert found.figures() == pytest.approx(slow_metrics(images, texts, index), abs=1e-9)
    assert found.figures() == pytest.approx(retrieval_metrics(images, texts, index), abs=1e-11)


def test_whole_numbers_stay_short_and_any_name_can_be_written(tmp_path: Path) -> None:
    sums = np.array([[1, 0], [1, 0], [1, 1 / 3], [2, 0], [3, 0], [3, 0.5]])
    write_image_hits(tmp_path / "f.csv", ImageHits(["gar\udce9", "b"], ["", "port"], np.array([3, 2]), sums))
    assert (tmp_path / "f.csv").read_text() == (
        f"key,scene,captions,{','.join(FIGURES)}\ngar\\udce9,,3,1,1,1,2,3,3\nb,port,2,0,0,0.333333333333333,0,0,0.5\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


@pytest.mark.parametrize("lines", ["", "key,scene\n", f"{HEAD}", f"{HEAD}a,,5,1,1,x,1,1,1\n", f"{HEAD}a,,5,1\n"])
def test_another_file_is_named(tmp_path: Path, lines: str) -> None:
    (tmp_path / "wrong.csv").write_text(lines)
    with pytest.raises(ValueError, match=r"wrong\.csv: "):
        read_image_hits(tmp_path / "wrong.csv")


def test_a_missing_figure_is_an_error() -> None:
    hits = query_hits(torch.eye(2), torch.eye(2), torch.arange(2), ks=(1, 5))
    with pytest.raises(KeyError, match="i2t_r10"):
        image_hits(hits, ["a", "b"], ["", ""])
