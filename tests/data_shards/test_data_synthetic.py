"""The product's sample data: the same bytes everywhere, true captions, visible colours and counts."""

from __future__ import annotations

import colorsys
import doctest
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from priorclip.data_shards import synthetic
from priorclip.data_shards.synthetic import SCENES, draw_scene, label_of, sketch_scene
from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.noise_tiles import tile
from priorclip.data_shards.synthetic.palette import PAINT
from priorclip.data_shards.synthetic.placement import Room, extent_for, spots
from priorclip.data_shards.synthetic.render import part_mask
from priorclip.data_shards.synthetic.vocabulary import GROUNDS, KINDS, LAYOUTS, MISTAKEN, NOUNS, SCENE_WORDS
from priorclip.data_shards.synthetic.wording import coarse_captions

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def digest(seed: int, index: int, size: int) -> str:
    scene = draw_scene(seed, index, size)
    text = json.dumps([scene.label, scene.fine, scene.coarse, scene.attributes])
    return hashlib.sha256(scene.image.tobytes() + text.encode()).hexdigest()


def things(attributes: dict) -> list[dict]:
    """Returns all things in a scene's facts."""
    found = [attributes["main"]]
    for company in attributes["company"]:
        found += [company] + ([company["carrying"]] if "carrying" in company else [])
    return found


def pieces(mask: np.ndarray, smallest: int = 6) -> int:
    """Counts the connected regions (eight neighbours) of a boolean picture, without tiny ones."""
    regions, _ = ndimage.label(mask, np.ones((3, 3)))
    return int((np.bincount(regions.ravel())[1:] >= smallest).sum())


def test_same_call_same_bytes_in_any_order_and_process() -> None:
    cases = [(5, index, 64) for index in range(len(SCENES))]
    forward = {case: digest(*case) for case in cases}
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_data_synthetic as t\n"
        "t.draw_scene(9, 3, 128)\n"
        f"print([t.digest(*case) for case in reversed({cases})])"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", program, here], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str([forward[case] for case in reversed(cases)])
    assert len(set(forward.values())) == len(cases)


def test_seed_and_index_both_matter() -> None:
    images = [draw_scene(seed, index, 32).image.tobytes() for seed in (0, 1) for index in range(40)]
    assert len(set(images)) == len(images)


def test_picture_is_rgb_and_uses_its_range() -> None:
    for index in range(len(SCENES)):
        image = draw_scene(2, index, 96).image
        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10, f"scene {index} is nearly blank"
        assert (image >= 254).mean() < 0.4, f"scene {index} is overexposed"


def test_one_scene_at_every_size() -> None:
    """Each size has the same facts, and its pixels agree with the averaged larger picture, not with another scene."""
    for index in range(0, 48, 5):
        small, large = draw_scene(4, index, 64), draw_scene(4, index, 256)
        other = draw_scene(4, index + 1, 64)
        assert (small.label, small.fine, small.coarse, small.attributes) == (
            large.label,
            large.fine,
            large.coarse,
            large.attributes,
        )
        coarse = [
            np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX), float)
            for picture in (small.image, large.image, other.image)
        ]
        same, different = abs(coarse[0] - coarse[1]).mean(), abs(coarse[0] - coarse[2]).mean()
        assert same < 4, f"{small.label}: sizes differ by {same:.1f} levels"
        assert same < different / 3


@pytest.mark.parametrize("kind", ["broad", "mottle"])
def test_noise_is_one_field_sampled_at_any_size(kind: str) -> None:
    fine = tile(kind, 128)
    averaged = fine.reshape(128, 2, 128, 2).mean(axis=(1, 3))
    coarse = tile(kind, 64)
    shifted = 0.25 * (coarse + np.roll(coarse, -1, 0) + np.roll(coarse, -1, 1) + np.roll(np.roll(coarse, -1, 0), -1, 1))
    assert max(np.corrcoef(averaged.ravel(), other.ravel())[0, 1] for other in (coarse, shifted)) > 0.85
    assert abs(float(fine.mean())) < 0.05
    assert 0.7 < float(fine.std()) < 1.3


def test_classes_are_balanced_in_every_block() -> None:
    assert len(SCENES) >= 20
    for block in range(5):
        labels = [label_of(11, block * len(SCENES) + place) for place in range(len(SCENES))]
        assert sorted(labels) == sorted(SCENES)
    assert [label_of(11, i) for i in range(24)] != [label_of(12, i) for i in range(24)]


def stated(thing: dict, caption: str) -> bool:
    """Tells whether a caption has the thing's count, colour and noun as one phrase, with any synonym."""
    count = thing.get("count", 1)
    number = "(?:an?|one|a single)" if count == 1 else WORDS[count] if count < 13 else "(?:many|dozens of|lots of)"
    kinds = "(?:" + "|".join(KINDS[thing["kind"]]) + ")" if "kind" in thing else ""
    for singular, plural in NOUNS[thing["noun"]]:
        form = singular if count == 1 else plural
        form = form.replace("with {c} roof", "with (?:a )?{c} roof")
        phrase = " ".join(form.format(n=number, c=thing.get("colour", ""), k=kinds).split())
        if re.search(rf"\b{phrase}\b", caption):
            return True
    return False


def test_every_fine_caption_states_every_fact() -> None:
    for index in range(240):
        scene = draw_scene(6, index, 16)
        assert len(set(scene.fine)) == 5
        for caption in scene.fine:
            for thing in things(scene.attributes):
                assert stated(thing, caption), f"{scene.label} {index}: {thing} is not in {caption!r}"
                if "layout" in thing:
                    assert any(words in caption for words in LAYOUTS[thing["layout"]]), caption
            ground = scene.attributes["ground"]
            assert ground is None or any(words in caption for words in GROUNDS[ground]), caption


def test_a_wrong_count_or_colour_is_not_found() -> None:
    caption = "an aerial view of four red storage tanks in a ring beside a river with two white ships."
    assert stated({"noun": "tank", "count": 4, "colour": "red"}, caption)
    assert not stated({"noun": "tank", "count": 5, "colour": "red"}, caption)
    assert not stated({"noun": "tank", "count": 4, "colour": "white"}, caption)
    assert not stated({"noun": "ship", "count": 2, "colour": "red"}, caption)


def test_fine_captions_read_well_and_survive_flips_and_turns() -> None:
    for index in range(120):
        for caption in draw_scene(7, index, 16).fine:
            assert not re.search(r"\b(left|right|top|bottom|north|south|east|west|upper|lower)\b", caption), caption
            assert not re.search(r"[{}]|\bNone\b|  | [,.;]|\ba [aeio]\w+", caption.replace("a one", "")), caption
            assert 5 <= len(caption.split()) <= 52, caption


def test_fine_captions_tell_images_apart() -> None:
    scenes = [draw_scene(8, index, 16) for index in range(500)]
    facts = {json.dumps(scene.attributes, sort_keys=True) for scene in scenes}
    assert len({tuple(scene.fine) for scene in scenes}) >= 499
    assert len(facts) >= 485


def test_coarse_captions_are_class_level_and_noisy() -> None:
    hits: Counter[str] = Counter()
    for index in range(1200):
        label = SCENES[index % len(SCENES)]
        captions = coarse_captions(label, generator(1, index))
        assert len(captions) == 5
        for caption in captions:
            own = any(words in caption for words in SCENE_WORDS[label])
            hits["own" if own else "other" if any(w in caption for w in SCENE_WORDS[MISTAKEN[label]]) else "vague"] += 1
    share = {kind: number / hits.total() for kind, number in hits.items()}
    assert 0.82 < share["own"] < 0.93
    assert 0.02 < share["other"] < 0.08
    assert 0.04 < share["vague"] < 0.12


COUNTED = {"airport", "beach", "harbour", "parking lot", "sparse residential", "storage tanks", "industrial"}


def test_as_many_objects_in_the_picture_as_in_the_caption() -> None:
    """Counts the connected pieces of the main thing's pixels: each is whole, separate and inside the frame."""
    checked, wrong = 0, []
    for index in range(240):
        label, sketch, facts = sketch_scene(13, index)
        beside = [thing for item in facts.company for thing in (item.thing, item.carrying) if thing and thing.colour]
        solid = [thing.count for thing in beside if thing.noun not in ("field", "surround", "train")]
        cases = [("company", sum(solid))] if "train" not in [thing.noun for thing in beside] else []
        cases += [("main", facts.main.count)] if label in COUNTED else []
        for part, count in cases:
            seen = pieces(part_mask(sketch, 256, part) > 0.4)
            checked += 1
            if seen != count:
                wrong.append((label, index, part, count, seen))
    assert checked > 180
    assert len(wrong) <= 0.01 * checked, wrong


def test_objects_show_the_colour_that_captions_state() -> None:
    """The object's pixels have the colour of the caption, also with haze, exposure, wear and noise."""
    checked, wrong = 0, []
    for index in range(360):
        label, sketch, facts = sketch_scene(14, index)
        if facts.main.colour not in PAINT or facts.main.noun in ("field", "circle", "forest", "desert"):
            continue
        image = draw_scene(14, index, 128).image.astype(float)
        pixels = image[part_mask(sketch, 128, "main") > 0.9]
        assert len(pixels) >= 20, f"{label} {index}: its main thing covers {len(pixels)} pixels"
        named = colour_word(np.median(pixels, axis=0))
        checked += 1
        if named != facts.main.colour:
            wrong.append((label, index, facts.main.colour, named))
    assert checked > 100
    assert len(wrong) <= 0.05 * checked, wrong


def colour_word(rgb: np.ndarray) -> str:
    """Returns a person's name of a colour from hue, saturation and brightness, without the product's palette."""
    hue, strength, value = colorsys.rgb_to_hsv(*(rgb / 255))
    if strength < 0.22 or value < 0.27:
        return "white" if value > 0.66 else "grey" if value > 0.36 else "black"
    degrees = hue * 360
    if 13 <= degrees < 41:
        return "orange" if value > 0.62 else "brown"
    limits = ((13, "red"), (72, "yellow"), (180, "green"), (252, "blue"), (335, "purple"), (360, "red"))
    return next(name for limit, name in limits if degrees <= limit)


@given(st.integers(2, 12), st.sampled_from(["row", "two rows", "ring", "scattered"]), st.integers(0, 2**32))
def test_layouts_are_what_they_are_called(count: int, layout: str, seed: int) -> None:
    room = Room(0.05, -0.1, 0.7, 0.5)
    extent = extent_for(count, layout, room, 0.2)
    found = spots(generator(seed), count, layout, room, extent)
    u, v = np.array([spot[:2] for spot in found]).T
    assert len(found) == count
    assert 0.03 < extent <= 0.2
    assert abs(u - room.u).max() <= room.length / 2 - 0.39 * extent
    assert abs(v - room.v).max() <= room.width / 2 - 0.39 * extent
    apart = np.hypot(u[:, None] - u, v[:, None] - v) + np.eye(count)
    assert apart.min() > 0.99 * extent
    if layout == "row":
        assert np.ptp(v) < 1e-9
        assert np.allclose(np.diff(u), np.diff(u)[0])
    elif layout == "two rows":
        assert len(set(v.round(9))) == 2
    elif layout == "ring":
        away = np.hypot(u - room.u, v - room.v)
        assert np.ptp(away) < 1e-9


MODULES = [synthetic, synthetic.scene, synthetic.noise_tiles]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_in_the_documentation_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_bad_calls_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"must not be negative.*index=-1"):
        draw_scene(1, -1)
    with pytest.raises(ValueError, match="size 8 is out of range"):
        draw_scene(1, 1, 8)
    with pytest.raises(ValueError, match="unknown layout 'spiral'"):
        spots(generator(1), 3, "spiral", Room(0, 0, 1, 1), 0.1)
