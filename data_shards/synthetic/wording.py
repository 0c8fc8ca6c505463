"""Puts facts into words: fine captions state all facts, coarse ones look like captions of the web.

    fine_captions("storage tanks", facts, rng)
    # ['four white storage tanks in a ring on bare soil, beside a river with two red ships.', ...]
    coarse_captions("storage tanks", rng)
    # ['oil storage, satellite view', 'aerial photo #4821', ...]

`vocabulary` has the words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from priorclip.data_shards.synthetic.dice import Rng, chance, count, pick, shuffled
from priorclip.data_shards.synthetic.facts import MANY, Company, Facts, Thing
from priorclip.data_shards.synthetic.scenes import SCENES
from priorclip.data_shards.synthetic.vocabulary import (
    CARRYING,
    COARSE,
    GROUNDS,
    KINDS,
    LAYOUTS,
    MISTAKEN,
    NOUNS,
    NUMBERS,
    ONE,
    PLENTY,
    RELATIONS,
    SCENE_WORDS,
    SETTING,
    SETTINGS,
    VAGUE,
)

PARAPHRASES = 5

WRONG_SHARE = 0.05
VAGUE_SHARE = 0.08


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().replace(" ,", ",")
    return re.sub(r"\ba (?=[aeiou])(?!one )", "an ", text)


def _number(rng: Rng, value: int, article: str | None) -> str:
    if value == 1:
        return article or pick(rng, ONE)
    return NUMBERS[value] if value < MANY else pick(rng, PLENTY)


def name(thing: Thing, rng: Rng, article: str | None = None) -> str:
    """Returns the words of a thing: count, colour, kind and one synonym of its noun."""
    singular, plural = pick(rng, NOUNS[thing.noun])
    form = singular if thing.count == 1 else plural
    if "with {c} roof" in form and thing.count == 1:
        form = form.replace("with {c} roof", "with a {c} roof")
    kind = pick(rng, KINDS[thing.kind]) if thing.kind else ""
    return _tidy(form.format(n=_number(rng, thing.count, article), c=thing.colour or "", k=kind))


def _company(company: Company, rng: Rng) -> str:
    thing = name(company.thing, rng)
    if company.thing.layout:
        thing = f"{thing} {pick(rng, LAYOUTS[company.thing.layout])}"
    if company.carrying:
        thing = f"{thing} {pick(rng, CARRYING).format(t=name(company.carrying, rng))}"
    return pick(rng, RELATIONS[company.relation]).format(t=thing)


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _sentence(style: int, label: str, facts: Facts, rng: Rng) -> str:
    main, many = name(facts.main, rng), facts.main.count != 1
    placed = f"{main} {pick(rng, LAYOUTS[facts.main.layout])}" if facts.main.layout else main
    company = _listed([_company(item, rng) for item in facts.company])
    ground = pick(rng, GROUNDS[facts.ground]) if facts.ground else ""
    setting = pick(rng, SETTINGS.get(facts.main.noun, SETTING)).format(g=ground) if ground else ""
    scene = SCENE_WORDS[label][0]
    verb = "are" if many else "is"
    if style == 0:
        return _joined(", ", f"{placed} {setting}", company)
    if style == 1:
        return _joined(", ", f"an aerial view of {placed} {company}", setting)
    if style == 2:
        return _joined(", ", f"there {verb} {placed}", company, setting)
    if style == 3:
        return _joined(" ", f"{scene}: {placed}", setting, company)
    shown = f"this picture from above shows {placed} {company}"
    if ground and facts.main.noun not in SETTINGS:
        return _joined("; ", shown, f"the ground is {ground}")
    return _joined(", ", shown, setting)


def _joined(mark: str, *parts: str) -> str:
    return mark.join(part.strip() for part in parts if part.strip()) + "."


def fine_captions(label: str, facts: Facts, rng: Rng) -> list[str]:
    """Returns `PARAPHRASES` different sentences, each stating every fact."""
    return [_tidy(_sentence(style, label, facts, rng)) for style in range(PARAPHRASES)]


def coarse_captions(label: str, rng: Rng) -> list[str]:
    """Returns `PARAPHRASES` captions like those of the web: they name only the class, and some are vague or wrong."""
    captions = []
    for pattern in shuffled(rng, COARSE)[:PARAPHRASES]:
        shown = MISTAKEN[label] if chance(rng, WRONG_SHARE) else label
        if chance(rng, VAGUE_SHARE):
            pattern = pick(rng, VAGUE)
        words = pick(rng, SCENE_WORDS[shown])
        number = count(rng, 100, 9999)
        captions.append(_tidy(pattern.format(s=words, i=number, j=number + 20, y=count(rng, 1998, 2024))))
    return captions


def _check_tables() -> None:
    missing = set(SCENES) ^ set(SCENE_WORDS) | set(SCENES) ^ set(MISTAKEN)
    if missing:
        raise ValueError(f"the scenes {sorted(missing)} have no words or do not exist: edit vocabulary.py")


_check_tables()
