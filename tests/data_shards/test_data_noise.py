"""Semantic noise: its share is exact, it is the same everywhere, and an evaluation has none."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import records

from priorclip.data_shards import RecordSet, ShardStream, load_tokenizer
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.stream.semantic_noise import KeyedPermutation, SemanticNoise

SAMPLES = 40


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**63), st.integers(1, 700))
def test_the_order_is_a_permutation_and_its_inverse(key: int, count: int) -> None:
    order = KeyedPermutation(key, count)
    places = [order.place(sample) for sample in range(count)]
    assert sorted(places) == list(range(count))
    assert [order.sample(place) for place in places] == list(range(count))


def test_the_order_is_uniform() -> None:
    """Each of the 24 permutations of 4 is equally frequent: chi-square is below its 99.99 % bound."""
    drawn = [tuple(KeyedPermutation(key, 4).place(sample) for sample in range(4)) for key in range(4800)]
    counts = [drawn.count(order) for order in itertools.permutations(range(4))]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 59


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(0, 1), st.floats(0, 1))
def test_exactly_the_share_is_noisy_and_no_caption_is_lost(seed: int, samples: int, share: float, more: float) -> None:
    share, more = sorted((share, more))
    donors = [SemanticNoise(seed, samples, share).caption_source(sample) for sample in range(samples)]
    swapped = {sample for sample, donor in enumerate(donors) if donor != sample}
    expected = round(share * samples)
    assert len(swapped) == (expected if expected > 1 else 0)
    assert sorted(donors) == list(range(samples))
    larger = SemanticNoise(seed, samples, more)
    assert all(larger.caption_source(sample) != sample for sample in swapped)
    labels = [SemanticNoise(seed, samples, label_share=share).label(sample, sample % 7, 7) for sample in range(samples)]
    assert sum(label != sample % 7 for sample, label in enumerate(labels)) == expected
    assert set(labels) <= set(range(7))


def test_noise_is_drawn_anew_for_another_seed_and_apart_for_captions_and_labels() -> None:
    def noisy(seed: int) -> tuple[set[int], set[int]]:
        noise = SemanticNoise(seed, 400, 0.25, 0.25)
        return (
            {sample for sample in range(400) if noise.caption_source(sample) != sample},
            {sample for sample in range(400) if noise.label(sample, 0, 9) != 0},
        )

    sets = [*noisy(0), *noisy(1)]
    for one, other in itertools.combinations(sets, 2):
        assert 5 < len(one & other) < 45  # 25 expected, standard deviation 4
    classes = [SemanticNoise(0, 900, label_share=1).label(sample, 2, 4) for sample in range(900)]
    assert all(240 < classes.count(number) < 360 for number in (0, 1, 3))


def test_unlabelled_samples_stay_so_and_one_class_has_no_other() -> None:
    noise = SemanticNoise(0, 10, label_share=1)
    assert noise.label(3, -1, 5) == -1
    assert noise.label(3, 0, 1) == 0


def pairs(tokenizer: Path, train: bool = True, state: dict | None = None, **options: object) -> dict[int, set]:
    """Maps each sample to (index in its caption, label), over two epochs of a stream."""
    rank = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    config = DataConfig("made", image_size=16, **{"workers": 0, "caption_noise": 0.25, "label_noise": 0.1} | options)
    words = load_tokenizer(str(tokenizer), 12)
    stream = ShardStream(
        RecordSet(records(SAMPLES)), words, config, global_batch=8, seed=3, train=train, epochs=2, **rank
    )
    if state:
        stream.load_state_dict(state)
    found: dict[int, set] = {}
    for batch in stream:
        for row, sample in enumerate(batch["image_ids"].tolist()):
            text = words.decode(batch["input_ids"][row], skip_special_tokens=True)
            found.setdefault(sample, set()).add((int(text.split()[1]), int(batch["labels"][row])))
    return found


def test_a_stream_has_the_share_of_wrong_pairs_the_same_in_every_epoch(tokenizer_folder: Path) -> None:
    found = pairs(tokenizer_folder)
    assert all(len(seen) == 1 for seen in found.values())
    assert len(found) == SAMPLES
    captions = {sample: next(iter(seen))[0] for sample, seen in found.items()}
    assert sum(sample != caption for sample, caption in captions.items()) == 10
    assert sorted(captions.values()) == list(range(SAMPLES))
    assert sum(next(iter(seen))[1] != sample % 3 for sample, seen in found.items()) == 4


def test_noise_is_the_same_on_two_ranks_and_after_a_resume(tokenizer_folder: Path) -> None:
    whole = pairs(tokenizer_folder)
    ranks = [pairs(tokenizer_folder, rank=rank, world_size=2) for rank in range(2)]
    assert {sample: ranks[0].get(sample, set()) | ranks[1].get(sample, set()) for sample in whole} == whole
    resumed = pairs(tokenizer_folder, state={"epoch": 1, "samples_seen": 16})
    assert resumed
    assert all(whole[sample] == seen for sample, seen in resumed.items())


def test_an_evaluation_stream_has_no_noise(tokenizer_folder: Path) -> None:
    assert all(seen == {(sample, sample % 3)} for sample, seen in pairs(tokenizer_folder, train=False).items())


def test_a_resume_with_other_noise_is_refused_and_shares_are_checked(tokenizer_folder: Path) -> None:
    config = DataConfig("made", image_size=16, caption_noise=0.2)
    state = ShardStream(RecordSet(records(8)), None, config, global_batch=8).state_dict()
    other = ShardStream(RecordSet(records(8)), None, DataConfig("made", image_size=16), global_batch=8)
    with pytest.raises(ValueError, match=r"caption_noise 0\.2"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.label_noise must be between 0 and 1, not 1\.5"):
        DataConfig("made", label_noise=1.5)
