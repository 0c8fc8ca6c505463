"""The report of a curation: what each rule dropped, the similarities, and examples at each threshold.

    | rule                    | pairs dropped |        | drop the lowest | similarity | pairs just below          |
    | other language          |           120 |        | 5 %             |      0.112 | 0.112 a dock (port/3) ... |
    | among the least similar |         1,976 |        | 20 %            |      0.241 | 0.241 boats (port/17) ... |

The examples of a threshold are the pairs just below it, which it would drop. So one run with ``--write false`` shows
where to set it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorclip.common.files import write_bytes
from priorclip.common.printable import figure_text, one_line
from priorclip.retrieval.commands import CurateConfig

if TYPE_CHECKING:
    from priorclip.retrieval.curation.curate import Pairs

SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
LONGEST = 120  # letters of a caption in report.md


def write_report(
    output: Path, config: CurateConfig, pairs: Pairs, keys: Sequence[str], left_out: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Writes report.json, report.md and dropped.jsonl, and returns the report.

    Args:
        output: the folder
        config: the options, which report.json repeats
        pairs: after all rules
        keys: (I,) of the samples
        left_out: reason -> keys of samples that have no pair
    """
    images = pairs.kept_images
    report: dict[str, Any] = {
        "pairs": len(pairs.captions),
        "images": pairs.images,
        "kept_pairs": int(pairs.kept.sum()),
        "kept_images": int(images.sum()),
        "without_pair": {reason: len(found) for reason, found in left_out.items() if found},
        "dropped": pairs.rules,
        "examples": rule_examples(pairs, keys, config.examples),
        "similarity": similarity_thresholds(pairs, keys, config.examples),
        "options": asdict(config),
    }
    rows = [pair_row(pairs, keys, pair) for pair in sorted(pairs.why)]
    rows += [{"key": key, "rule": reason} for reason, found in left_out.items() for key in found]
    output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in (
        ("dropped.jsonl", lines),
        ("report.json", json.dumps(report, indent=1, ensure_ascii=False)),
        ("report.md", markdown(report)),
    ):
        write_bytes(output / name, text.encode("utf-8", "surrogateescape"))
    return report


def pair_row(pairs: Pairs, keys: Sequence[str], pair: int) -> dict[str, Any]:
    """Returns a pair as JSON: key, caption, its similarity, and the rule that dropped it with what the rule saw."""
    row: dict[str, Any] = {"key": keys[int(pairs.owner[pair])], "caption": pairs.captions[pair]}
    if pairs.similarity is not None and np.isfinite(pairs.similarity[pair]):
        row["similarity"] = round(float(pairs.similarity[pair]), 4)
    rule, detail = pairs.why.get(pair, ("", ""))
    row |= {"rule": rule} if rule else {}
    return row | ({"detail": detail} if detail else {})


def rule_examples(pairs: Pairs, keys: Sequence[str], count: int) -> dict[str, list[dict[str, Any]]]:
    """Returns up to ``count`` pairs of each rule, evenly spread over the pairs that it dropped."""
    found: dict[str, list[int]] = {rule: [] for rule in pairs.rules}
    for pair, (rule, _) in sorted(pairs.why.items()):
        found[rule].append(pair)
    chosen = {rule: list(dict.fromkeys(spread(places, count))) for rule, places in found.items()}
    return {rule: [pair_row(pairs, keys, pair) for pair in places] for rule, places in chosen.items()}


def spread(places: Sequence[int], count: int) -> list[int]:
    """Returns ``count`` of the places at even distances, or all if there are fewer."""
    if len(places) <= count:
        return list(places)
    return [places[int(row)] for row in np.linspace(0, len(places) - 1, count)] if count else []


def similarity_thresholds(pairs: Pairs, keys: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Returns for each share of ``SHARES`` the similarity that drops it of all scored pairs, and pairs just below."""
    if pairs.similarity is None:
        return []
    scored = np.nonzero(np.isfinite(pairs.similarity))[0]
    order = scored[np.argsort(pairs.similarity[scored], kind="stable")]
    rows = []
    for share in SHARES if len(order) else ():
        place = min(round(share * len(order)), len(order) - 1)
        examples = [pair_row(pairs, keys, pair) for pair in order[max(0, place - count) : place].tolist()]
        threshold = round(float(pairs.similarity[order[place]]), 4)
        rows.append({"share": share, "similarity": threshold, "examples": examples})
    return rows


def summary(report: Mapping[str, Any]) -> str:
    """Returns the counts as lines for a terminal."""
    lines = [f"kept {report['kept_pairs']:,} of {report['pairs']:,} pairs, "
             f"{report['kept_images']:,} of {report['images']:,} images"]  # fmt: skip
    lines += [f"  {rule}: {count:,} pairs dropped" for rule, count in report["dropped"].items()]
    lines += [f"  {reason}: {count:,} images" for reason, count in report["without_pair"].items()]
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """Returns report.md."""
    lines = ["# Curation", "", summary(report).splitlines()[0] + ".", ""]
    for reason, count in report["without_pair"].items():
        lines += [f"Samples left out because of '{reason}': {count:,}.", ""]
    lines += ["| rule | pairs dropped | examples |", "|---|---|---|"]
    lines += [f"| {rule} | {count:,} | {cell(report['examples'][rule])} |" for rule, count in report["dropped"].items()]
    if report["similarity"]:
        lines += ["", "## Similarity", "", "A threshold in this table drops the share of all pairs that stands beside "
                  "it. The examples are the pairs just below it.", "",
                  "| drop the lowest | similarity | pairs just below |", "|---|---|---|"]  # fmt: skip
        lines += [f"| {100 * row['share']:g} % | {row['similarity']:.3f} | {cell(row['examples'])} |"
                  for row in report["similarity"]]  # fmt: skip
    return "\n".join(lines) + "\n"


def cell(examples: Sequence[Mapping[str, Any]]) -> str:
    """Returns pairs as one cell of a table: similarity, caption, key and detail of each."""
    return "<br>".join(example_text(row) for row in examples)


def example_text(row: Mapping[str, Any]) -> str:
    value = f"{row['similarity']:.3f} " if "similarity" in row else ""
    detail = f": {row['detail']}" if row.get("detail") else ""
    text = f"{value}{figure_text(row['caption'], LONGEST)} ({row['key']}{detail})"
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
