"""`benchmarks/swapped_captions.py`: what is swapped, and the figures of a curation that is known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.swapped_captions import score, swap


def annotations() -> dict[str, Any]:
    """Ten training images with two captions each, of which one image has the same twice, and one test image."""
    entries = [
        {"filename": f"a_{n}.jpg", "split": "train", "sentences": [{"raw": f"one {n} ."}, {"raw": f"two {n} ."}]}
        for n in range(10)
    ]
    entries[3]["sentences"] = [{"raw": "one 3 ."}] * 2
    return {"images": [*entries, {"filename": "t.jpg", "split": "test", "sentences": [{"raw": "a test ."}]}]}


def test_captions_change_places_among_the_chosen_images_only() -> None:
    content, before = annotations(), annotations()
    assert swap(content, 0.4, "train", seed=1) == 4
    moved = 0
    for entry, old in zip(content["images"], before["images"], strict=True):
        if entry.get("swapped"):
            moved += 1
            assert entry["sentences"] != old["sentences"]
            assert any(entry["sentences"] == other["sentences"] for other in before["images"])
        else:
            assert entry == old
    assert moved == 4
    with pytest.raises(ValueError, match=r"share 0\.1 of the 10 images of split 'train' is no two images"):
        swap(annotations(), 0.1, "train", seed=1)


def test_figures_of_a_known_curation() -> None:
    """4 images of 10 are swapped, with 8 of 19 distinct pairs; 3 of them and 1 right pair are dropped."""
    content = annotations()
    for number in (0, 1, 2, 4):
        content["images"][number]["swapped"] = True
    dropped = [
        {"key": key, "caption": caption}
        for key, caption in [("a_0", "one 0 ."), ("a_0", "two 0 ."), ("a_4", "one 4 ."), ("a_5", "one 5 .")]
    ]
    found = score(content, [*dropped, dropped[0]], "train")
    assert found == pytest.approx({"precision": 75.0, "recall": 37.5, "chance": 100 * 8 / 19, "dropped": 4})
