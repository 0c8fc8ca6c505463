"""Formats results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from priorclip.common.printable import one_line, one_line_values
from priorclip.model.recall import KS
from priorclip.retrieval.published_results import NAMES

if TYPE_CHECKING:
    from priorclip.retrieval.search import Hit

WAYS = {"i2t": "image to text", "t2i": "text to image"}


def tables(report: Mapping[str, Any]) -> str:
    """Returns all tables of a report of ``retrieval.evaluate``."""
    report = one_line_values(report)
    parts = [recall_table(report)] if "mean_recall" in report else []
    if "comparison" in report:
        parts.append(comparison_table(report["comparison"]))
    parts += [classification_table(report[task], task) for task in ("zeroshot", "probe") if task in report]
    return "\n\n".join(parts)


def recall_table(report: Mapping[str, Any]) -> str:
    """Returns a table of the recalls in percent, with chance in brackets.

    recall, % (chance)               R@1             R@5            R@10
    image to text          30.95  (2.38)  66.67 (11.38)   83.33 (21.79)
    """
    lines = [f"{'recall, % (chance)':<20}" + "".join(f"{f'R@{k}':>16}" for k in KS)]
    for way, title in WAYS.items():
        names = [f"{way}_r{k}" for k in KS]
        lines.append(f"{title:<20}" + "".join(cell(report, name) for name in names))
    lines.append(f"{'mean recall':<20}" + cell(report, "mean_recall") + interval(report, "mean_recall"))
    lines.append(f"{report['images']} images, {report['captions']} captions, split: {report['split']}")
    classes = sorted(report["classes"].items(), key=lambda item: item[1]["mean_recall"])
    if len(classes) > 1:
        worst = ", ".join(f"{name} {row['mean_recall']:.1f}" for name, row in classes[:5])
        lines.append(f"hardest scenes by mean recall: {worst}; easiest: {classes[-1][0]} "
                     f"{classes[-1][1]['mean_recall']:.1f}")  # fmt: skip
    for reason, keys in report["skipped"].items():
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        lines.append(f"left out, {reason}: {', '.join(keys[:5])}{more}")
    return "\n".join(lines)


def cell(report: Mapping[str, Any], name: str) -> str:
    chance = f"({report['chance'][name]:.2f})"
    return f"{report[name]:>8.2f} {chance:>7}"


def interval(report: Mapping[str, Any], name: str) -> str:
    if name not in report.get("intervals", {}):
        return ""
    low, high = report["intervals"][name]
    return f"  95 %: {low:.2f} to {high:.2f}"


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Returns a table of the published rows and the row of this model, the best last."""
    rows = comparison["rows"]
    width = max(len(row["method"]) for row in rows)
    heads = "".join(f"{name:>7}" for name in ("i@1", "i@5", "i@10", "t@1", "t@5", "t@10", "mean"))
    same = "" if comparison["same_test"] else " (another test set: do not compare)"
    lines = [f"{comparison['benchmark'] + ', published' + same}", f"{'':<{width}}{heads}  trained on [source]"]
    for row in rows:
        figures = "".join(f"{row[name]:>7.2f}" for name in NAMES)
        about = f"{row['trained_on']} [{row['source']}]" if row["source"] else "<-"
        lines.append(f"{row['method']:<{width}}{figures}  {about}")
    lines += [f"[{key}] {source}" for key, source in comparison["sources"].items()]
    return "\n".join(lines)


def classification_table(report: Mapping[str, Any], task: str) -> str:
    """Returns a table of the accuracies of a classification, with the worst classes and the confusions."""
    title = {"zeroshot": "zero-shot scenes", "probe": "linear probe"}[task]
    lines = [f"{title + ', %':<20}{'top-1':>8}{'top-5':>8}{'by class':>10}"]
    figures = f"{report['top1']:>8.2f}{report['top5']:>8.2f}{report['mean_class_recall']:>10.2f}"
    lines.append(f"{'':<20}{figures}{interval(report, 'top1').replace('95 %', 'top-1 95 %')}")
    about = f"{report['images']} images, {len(report['classes'])} classes"
    if task == "probe":
        lines.append(f"{about}, trained on {report['learned_from']} images, C = {report['C']:g}")
    else:
        lines.append(f"{about}, {report['prompts']} prompts ({report['templates']})")
    worst = sorted(report["classes"].items(), key=lambda item: item[1]["recall"])[:5]
    lines.append("lowest recall: " + ", ".join(f"{name} {row['recall']:.1f}" for name, row in worst))
    if report["confusions"]:
        pairs = [f"{name} for {other} {count}" for name, other, count in report["confusions"][:5]]
        lines.append(f"most taken: {', '.join(pairs)}")
    return "\n".join(lines)


def hit_table(hits: Sequence[Hit]) -> str:
    """Returns a table of hits: ``rank score scene key where``."""
    rows = [("rank", "score", "scene", "key", "where")]
    rows += [
        (str(hit.rank), f"{hit.score:.4f}", one_line(hit.label or "-"), one_line(hit.key), one_line(hit.where))
        for hit in hits
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )
