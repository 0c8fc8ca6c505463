"""Parses the option `shards`: one corpus, or a mix of corpora with weights. Imports no numpy, because `--help` does it.

    data/train                                                    one corpus
    [data/pub11, "data/rs3-{0000..0031}.tar"]                     one corpus with the shards of both
    [{shards: data/pub11, weight: 1}, {shards: [data/rs3, data/more], weight: 2.5}]           a mix
    {data/pub11: 1, data/rs3: 2.5}                                the same, shorter

A weight is the number of passes in an epoch: 1 gives each sample once, 2 twice, 0.5 (or "1/2") once in two epochs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

Shards = str | list[str | dict[str, Any]] | dict[str, float | str]
KEYS = ("shards", "weight")
LARGEST_WEIGHT = 10_000


@dataclass(frozen=True)
class Corpus:
    """Shards that belong together, with their passes in an epoch."""

    shards: Sequence[str | Path]
    weight: Fraction = Fraction(1)

    def __str__(self) -> str:
        return ", ".join(map(str, self.shards))


def corpora(spec: str | Sequence[str | Path | Mapping[str, Any]] | Mapping[str, Any]) -> list[Corpus]:
    """Returns the corpora of a specification, in order. Raises ValueError, which names the wrong piece and key."""
    if isinstance(spec, str):
        return [Corpus([spec])]
    if isinstance(spec, Mapping):
        if "shards" in spec:
            return [_corpus(spec)]
        return [Corpus([shards], _weight(weight, shards)) for shards, weight in spec.items()]
    if not any(isinstance(piece, Mapping) for piece in spec):
        return [Corpus([piece for piece in spec if not isinstance(piece, Mapping)])]
    return [_corpus(piece) if isinstance(piece, Mapping) else Corpus([piece]) for piece in spec]


def _corpus(piece: Mapping[str, Any]) -> Corpus:
    for key in piece:
        if key not in KEYS:
            matches = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.4)
            hint = f"did you mean '{matches[0]}'?" if matches else f"known keys: {', '.join(KEYS)}"
            raise ValueError(f"shards: unknown key '{key}' in {dict(piece)}: {hint}")
    shards = piece.get("shards")
    names = [shards] if isinstance(shards, str) else shards
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"shards: {dict(piece)} needs 'shards': a folder, a pattern or a list of them")
    return Corpus(names, _weight(piece.get("weight", 1), ", ".join(names)))


def _weight(value: Any, name: str) -> Fraction:
    """Returns the exact weight: 0.1 is one tenth, not the nearest binary number."""
    try:
        weight = Fraction(str(value)) if not isinstance(value, bool) else Fraction(0)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"shards: the weight of {name} is not a number: {value!r}") from error
    if not 0 < weight <= LARGEST_WEIGHT:
        raise ValueError(
            f"shards: the weight of {name} is {value}: it must be above 0 and at most {LARGEST_WEIGHT} passes"
        )
    return weight
