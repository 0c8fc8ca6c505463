"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.search import Hit

KS = (1, 5, 10)
WAYS = {"i2t": "image to text", "t2i": "text to image"}


def recall_table(report: Mapping[str, Any]) -> str:
    """A report of ``retrieval.evaluate`` as a table, percent, with chance beside each figure in brackets.

    recall, % (chance)               R@1             R@5            R@10
    image to text          30.95  (2.38)  66.67 (11.38)   83.33 (21.79)
    """
    lines = [f"{'recall, % (chance)':<20}" + "".join(f"{f'R@{k}':>16}" for k in KS)]
    for way, title in WAYS.items():
        names = [f"{way}_r{k}" for k in KS]
        lines.append(f"{title:<20}" + "".join(cell(report, name) for name in names))
    lines.append(f"{'mean recall':<20}" + cell(report, "mean_recall"))
    lines.append(f"{report['images']} images, {report['captions']} captions, split: {report['split']}")
    for reason, keys in report["skipped"].items():
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        lines.append(f"left out, {reason}: {', '.join(keys[:5])}{more}")
    return "\n".join(lines)


def cell(report: Mapping[str, Any], name: str) -> str:
    beside = f"({report['chance'][name]:.2f})"
    return f"{report[name]:>8.2f} {beside:>7}"


def hit_table(hits: Sequence[Hit]) -> str:
    """Hits as ``rank score scene key where``."""
    rows = [("rank", "score", "scene", "key", "where")]
    rows += [(str(hit.rank), f"{hit.score:.4f}", hit.label or "-", hit.key, hit.where) for hit in hits]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )
