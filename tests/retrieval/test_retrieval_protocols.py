"""Recall compared with the protocols of the field, each rewritten from its description, and their ties.

CLIP Benchmark (LAION), which RemoteCLIP's and PriorCLIP's evaluations call: a query counts where a right answer is
among the k of highest score, as torch.topk gives them. X-VLM's, which PIR builds on: all answers are sorted, and the
place of the first right one is compared with k. Without ties both are ours; with ties they depend on the order that the
test set is written in, and ours is their mean over all orders.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.model.recall import retrieval_metrics
from priorclip.retrieval.published_results import FILE, NAMES, SOURCES, compare_with_published
from priorclip.retrieval.text_tables import comparison_table

KS = (1, 5, 10)


def clip_benchmark(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """The share of queries with at least one positive among the k highest scores."""
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), owner] = True
    found = {}
    for way, table, right in (("i2t", scores.T, positive.T), ("t2i", scores, positive)):
        for k in KS:
            chosen = table.topk(min(k, table.shape[1]), dim=1).indices
            found[f"{way}_r{k}"] = 100 * right.gather(1, chosen).any(1).double().mean().item()
    return found


def xvlm(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """The best rank of an image's texts in the sorted scores, and the rank of a text's image."""
    scores = (images @ texts.T).numpy()
    text_places, image_places = [], []
    for image, row in enumerate(scores):
        ranked = np.argsort(row)[::-1]
        text_places.append(min(int(np.where(ranked == text)[0][0]) for text in np.flatnonzero(owner == image)))
    for text, column in enumerate(scores.T):
        image_places.append(int(np.where(np.argsort(column)[::-1] == int(owner[text]))[0][0]))
    places = {"i2t": np.array(text_places), "t2i": np.array(image_places)}
    return {f"{way}_r{k}": 100 * float((at < k).mean()) for way, at in places.items() for k in KS}


def draw(seed: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.nn.functional.normalize(torch.randn(len(counts), 12, generator=generator), dim=-1)
    texts = images[owner] + 0.7 * torch.randn(len(owner), 12, generator=generator)
    return images, torch.nn.functional.normalize(texts, dim=-1), owner


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=11, max_size=30))
def test_without_ties_all_three_are_the_same(seed: int, counts: list[int]) -> None:
    features = draw(seed, counts)
    ours = retrieval_metrics(*features)
    mean = ours.pop("mean_recall")
    assert ours == pytest.approx(clip_benchmark(*features), abs=1e-9)
    assert ours == pytest.approx(xvlm(*features), abs=1e-9)
    assert mean == pytest.approx(sum(ours.values()) / 6)


@pytest.mark.parametrize("protocol", [clip_benchmark, xvlm])
def test_with_ties_ours_is_the_mean_of_theirs_over_the_orders_of_the_test_set(protocol) -> None:
    images, texts, owner = draw(3, [3] * 12)
    texts[1::2] = texts[0::2]  # equal captions, many of different images
    images[4] = images[5]
    ours = retrieval_metrics(images, texts, owner)
    ours.pop("mean_recall")
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(400):
        order, lines = (torch.randperm(len(rows), generator=generator) for rows in (images, texts))
        drawn.append(protocol(images[order], texts[lines], order.argsort()[owner[lines]]))
    for name, expected in ours.items():
        values = np.array([figures[name] for figures in drawn])
        assert abs(values.mean() - expected) <= 4 * values.std() / 20 + 1e-9, name
    assert len({figures["i2t_r1"] for figures in drawn}) > 1  # their figure depends on the order


def test_published_rows_add_up_and_name_their_source() -> None:
    """The mean of each row is that of its six figures, except one that its table prints differently."""
    import yaml

    tables = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    odd = []
    for benchmark, table in tables.items():
        assert len({(row[0], row[1]) for row in table["rows"]}) == len(table["rows"])
        for method, _, *figures, source in table["rows"]:
            assert set(source.split(", ")) <= SOURCES.keys()
            if abs(sum(figures[:6]) / 6 - figures[6]) > 0.011:
                odd.append((benchmark, method))
    assert odd == [("rsicd", "CLIP-CL ViT-B/32")]


def test_the_comparison_is_sorted_and_warns_of_another_test_set(caplog: pytest.LogCaptureFixture) -> None:
    report = dict.fromkeys(NAMES, 40.0) | {"images": 452, "captions": 2260}
    found = compare_with_published("rsitmd", report)
    methods = [row["method"] for row in found["rows"]]
    assert found["same_test"] is True
    assert methods.index("PIR") < methods.index("this model") < methods.index("PE-RSITR")
    assert methods[-1] == "GeoRSCLIP-FT ViT-B/32"
    assert found["rows"][-1]["mean_recall"] == 51.81
    assert json.loads(json.dumps(found)) == found
    assert "2306.11300" in comparison_table(found)
    assert not caplog.records
    assert compare_with_published("rsicd", report)["same_test"] is False
    assert "do not compare" in caplog.text
