"""RandAugment: timm's own result for the same draws, the authors' operations, and the same pixels everywhere."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import picture
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards.config import RandAugmentConfig
from priorclip.data_shards.images.randaugment import rand_augment, timm_policy

TEN = {
    "Identity",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
}
TEN |= {"Rotate"}  # of RandomAugment(2, 7, augs=[...]) in X-VLM's dataset/__init__.py
SETTINGS = RandAugmentConfig(layers=2, magnitude=7)


def pixels(index: int) -> np.ndarray:
    return np.asarray(picture(index, 64, 64)).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_timms_result_for_the_same_draws(seed: int) -> None:
    found = rand_augment(pixels(seed), random.Random(seed), layers=2, magnitude=7)
    draws = random.Random(seed)
    random.seed(draws.getrandbits(64))
    np.random.seed(draws.getrandbits(32))
    expected = timm_policy(2, 7, 0.5)(picture(seed, 64, 64))
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(expected))


def test_the_policy_has_the_operations_and_strengths_of_the_authors() -> None:
    """At 7 of 10: factor 0.7 * 1.8 + 0.1, shear 0.7 * 0.3, shift 0.7 * 10 pixels, rotation 0.7 * 30 degrees."""
    policy = timm_policy(2, 7, 0.5)
    named = {operation.name: operation for operation in policy.ops if hasattr(operation, "name")}
    assert named.keys() | {"Identity"} == TEN
    assert len(policy.ops) == 10
    assert (policy.num_layers, policy.choice_weights) == (2, None)
    strengths = {"Brightness": 1.36, "Sharpness": 1.36, "ShearX": 0.21, "ShearY": 0.21, "Rotate": 21.0}
    for name, value in (strengths | {"TranslateX": 7.0, "TranslateY": 7.0}).items():
        (found,) = named[name].level_fn(named[name].magnitude, named[name].hparams)
        assert abs(found) == pytest.approx(value), name
    assert {operation.prob for operation in named.values()} == {0.5}
    assert {operation.kwargs["fillcolor"] for operation in named.values()} == {(128, 128, 128)}


def test_a_quarter_and_more_of_the_images_stay_as_they_are() -> None:
    """No operation or Identity twice: (0.5 + 0.5 / 10) ** 2 = 0.30; the rest is changed by an operation."""
    original = pixels(3) // 2 + 50  # AutoContrast changes it
    same = [
        np.array_equal(rand_augment(original, random.Random(n), layers=2, magnitude=7), original) for n in range(900)
    ]
    assert 0.25 < np.mean(same) < 0.36  # 0.3025, standard deviation 0.015


def test_global_generators_keep_their_state() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for number in range(5):
        rand_augment(pixels(number), random.Random(number), layers=2, magnitude=7)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_an_operation_is_applied_after_the_flips(packed: Path) -> None:
    """The stream's image is timm's change of the stream's image without RandAugment."""
    plain = take(stream_of(config(packed, scale=1.0)), 5)
    found = take(stream_of(config(packed, scale=1.0, randaugment=SETTINGS)), 5)
    changed = 0
    for one, other in zip(plain, found, strict=True):
        for before, after in zip(one["images"], other["images"], strict=True):
            candidates = operations_of(before.numpy())
            changed += not torch.equal(before, after)
            pairs = [second for first in candidates for second in operations_of(first)]
            assert any(np.array_equal(after.numpy(), candidate) for candidate in pairs)
    assert changed > 16  # of 40; 28 expected, standard deviation 2.9


def operations_of(image: np.ndarray) -> list[np.ndarray]:
    """Returns the image after each operation in each direction, and as it is."""
    results = [image]
    for operation in timm_policy(2, 7, 1.0).ops[1:]:
        seen = set()
        for seed in range(6):  # both signs
            random.seed(seed)
            changed = np.asarray(operation(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))))
            if changed.tobytes() not in seen:
                seen.add(changed.tobytes())
                results.append(changed.transpose(2, 0, 1))
    return results


def test_the_stream_does_not_depend_on_workers_ranks_or_kept_pixels(packed: Path) -> None:
    options = {"scale": 1.0, "randaugment": SETTINGS}
    whole = take(stream_of(config(packed, **options)), 7)
    random.seed(99)
    np.random.seed(99)
    assert_same(take(stream_of(config(packed, workers=2, **options)), 7), whole)
    assert_same(take(stream_of(config(packed, keep_pixels="1MB", **options)), 7), whole)
    ranks = [take(stream_of(config(packed, **options), rank=rank, world_size=2), 7) for rank in range(2)]
    for number, batch in enumerate(whole):
        dealt = torch.stack([ranks[row % 2][number]["images"][row // 2] for row in range(8)])
        assert torch.equal(dealt, batch["images"])
    resumed = stream_of(config(packed, **options))
    resumed.load_state_dict({"epoch": 0, "samples_seen": 24})
    assert_same(take(resumed, 2), whole[3:5])


def test_an_evaluation_is_not_augmented(packed: Path) -> None:
    plain, other = (stream_of(config(packed, randaugment=more), train=False) for more in (None, SETTINGS))
    assert_same(take(other, 2), take(plain, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": 0}, "null turns it off"), ({"magnitude": 11}, "between 0 and 10"), ({"probability": 0}, "above 0")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugmentConfig(**options)
