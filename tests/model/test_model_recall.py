"""Recall against a version that sorts, and chance against enumeration."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.model import recall
from priorclip.model.recall import chance, retrieval_metrics


def slow_recall(similarity: list[float], own: list[int], k: int) -> float:
    """Probability that the first k include one of ``own``, with equal similarities in random order."""
    best = max(similarity[answer] for answer in own)
    above = sum(value > best for value in similarity)
    right = sum(similarity[answer] == best for answer in own)
    level = sum(value == best for value in similarity)
    places = min(max(k - above, 0), level)
    return 1 - math.comb(level - right, places) / math.comb(level, places)


def slow_metrics(images, texts, index, ks=(1, 5, 10)):
    similarity, found = images.double() @ texts.double().T, {}
    owns = [[t for t in range(len(texts)) if index[t] == i] for i in range(len(images))]
    asked = [i for i in range(len(images)) if owns[i]]
    for k in ks:
        hits = [slow_recall(similarity[i].tolist(), owns[i], k) for i in asked]
        found[f"i2t_r{k}"] = 100 * sum(hits) / len(hits)
    for k in ks:
        hits = [slow_recall(similarity[:, t].tolist(), [int(index[t])], k) for t in range(len(texts))]
        found[f"t2i_r{k}"] = 100 * sum(hits) / len(hits)
    return found | {"mean_recall": sum(found.values()) / len(found)}


def draw(seed: int, counts: list[int], levels: int):
    """Integer features with few levels, so that there are many exact ties."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=generator)]
    images = torch.randint(-levels, levels + 1, (len(counts), 3), generator=generator).float()
    texts = torch.randint(-levels, levels + 1, (len(index), 3), generator=generator).float()
    return images, texts, index


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any),
    st.integers(1, 9),
    st.sampled_from([1, 7, 1 << 10]),
)
def test_recall_equals_counting(seed: int, counts: list[int], levels: int, side: int):
    images, texts, index = draw(seed, counts, levels)
    before = recall.SIDE
    try:
        recall.SIDE = side
        found = retrieval_metrics(images, texts, index)
    finally:
        recall.SIDE = before
    assert found == pytest.approx(slow_metrics(images, texts, index), abs=1e-9)


def test_perfect_and_collapsed_features():
    images = F.normalize(torch.randn(20, 8), dim=-1)
    index = torch.arange(20).repeat_interleave(5)
    assert set(retrieval_metrics(images, images[index], index).values()) == {100.0}
    assert retrieval_metrics(torch.ones(20, 8), torch.ones(100, 8), index) == pytest.approx(chance(index))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_are_broken_at_random(k: int):
    """Counts all orders of the equal entries."""
    index = torch.tensor([0, 0, 1, 1, 2])
    images = torch.tensor([[1.0], [0.0], [0.0]])
    texts = torch.tensor(
        [[3.0], [3.0], [3.0], [5.0], [3.0]]
    )  # to image 0 a wrong text stands above, two beside its own
    orders = [order for order in itertools.permutations(range(5)) if order[0] == 3]
    expected = sum(any(index[t] == 0 for t in order[:k]) for order in orders) / len(orders)
    standing = recall.standings(images, texts, index)["i2t"]
    assert recall.hit_probability(standing, k)[0] == pytest.approx(expected)


def test_names_of_the_figures():
    images, texts, index = draw(0, [5, 5], 3)
    names = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall"]
    assert list(retrieval_metrics(images, texts, index)) == names
    assert list(chance(index)) == names


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3], [4, 0, 1]])
def test_chance_equals_enumeration_of_all_rankings(counts: list[int]):
    index = [i for i, count in enumerate(counts) for _ in range(count)]
    ks, images = (1, 2, 5), len(counts)
    orders = list(itertools.permutations(range(len(index))))
    expected = {}
    for k in ks:
        queries = [i for i in range(images) if counts[i]]
        hits = [sum(any(index[t] == i for t in order[:k]) for order in orders) / len(orders) for i in queries]
        expected[f"i2t_r{k}"] = 100 * sum(hits) / len(hits)
    for k in ks:
        expected[f"t2i_r{k}"] = 100 * min(k, images) / images
    found = chance(torch.tensor(index), ks, images=images)
    assert found == pytest.approx(expected | {"mean_recall": sum(expected.values()) / len(expected)})


def test_chance_is_the_mean_of_random_features():
    torch.manual_seed(0)
    index = torch.arange(30).repeat_interleave(5)
    runs = [retrieval_metrics(torch.randn(30, 64), torch.randn(150, 64), index)["mean_recall"] for _ in range(200)]
    assert sum(runs) / len(runs) == pytest.approx(chance(index)["mean_recall"], abs=0.5)


def test_bad_input_is_named():
    images, texts, index = draw(0, [2, 2], 3)
    with pytest.raises(ValueError, match="3 entries for 4 texts"):
        retrieval_metrics(images, texts, index[:3])
    with pytest.raises(ValueError, match="rows of the 1 images"):
        retrieval_metrics(images[:1], texts, index)
    with pytest.raises(ValueError, match=r"\(I, d\) and \(T, d\)"):
        retrieval_metrics(images, texts[:, :2], index)
