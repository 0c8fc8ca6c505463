"""Draws stats.png: one page of panels from the figures of stats.json. It needs no display."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from priorclip.common.printable import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS, LONGEST = 30, 24  # classes in a panel, letters of a name
FITTED = (3, 1000)  # ranks of the fit, because the first ranks bend and the last have equal counts
COLOUR, SECOND = "#2a6f97", "#c8553d"


def draw_page(numbers: dict[str, Any]) -> bytes:
    """Returns the page as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    draw_bars(panels[0, 0], numbers["top_concepts"], "Most frequent concepts")
    draw_rank_frequency(panels[0, 1], numbers)
    draw_lengths(panels[0, 2], numbers)
    draw_sizes(panels[1, 0], numbers["image_sides"])
    draw_classes(panels[1, 1], numbers)
    draw_summary(panels[1, 2], numbers)
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()


def draw_bars(axes: Axes, counts: dict[str, int], title: str) -> None:
    axes.set_title(title)
    names = list(counts)[:BARS]
    axes.barh([figure_text(name, LONGEST) for name in names], [counts[name] for name in names], color=COLOUR)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("count")
    if not names:
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)


def draw_rank_frequency(axes: Axes, numbers: dict[str, Any]) -> None:
    axes.set_title("Words by rank")
    points = numbers["rank_frequency"]
    if points:
        axes.loglog(*zip(*points, strict=True), ".", color=COLOUR, label="words")
    slope = numbers["rank_frequency_slope"]
    if slope is not None:
        fitted = [point for point in points if FITTED[0] <= point[0] <= FITTED[1]]
        middle = [math.exp(sum(map(math.log, side)) / len(fitted)) for side in zip(*fitted, strict=True)]
        ends = (fitted[0][0], fitted[-1][0])  # the least-squares line contains the mean
        line = [middle[1] * (end / middle[0]) ** slope for end in ends]
        axes.loglog(ends, line, color=SECOND, label=f"slope {slope:.2f}")
        axes.set_ylim(0.7, points[0][1] * 2)
    axes.set_xlabel("rank")
    axes.set_ylabel("count")
    axes.grid(alpha=0.3)
    if points:
        axes.legend()


def draw_lengths(axes: Axes, numbers: dict[str, Any]) -> None:
    axes.set_title("Length of captions")
    for name, colour in (("words", COLOUR), ("tokens", SECOND)):
        counts = {int(length): count for length, count in numbers[f"caption_{name}_histogram"].items()}
        if counts:
            axes.step(list(counts), list(counts.values()), where="mid", color=colour, label=name)
            # so that a few very long captions do not flatten all others
            axes.set_xlim(0, max(2 * numbers[f"caption_{name}"]["p95"], 10))
    axes.set_xlabel("words or tokens in a caption")
    axes.set_ylabel("captions")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def draw_sizes(axes: Axes, sides: dict[str, int]) -> None:
    axes.set_title("Longer side of images")
    axes.bar(range(len(sides)), list(sides.values()), width=0.9, color=COLOUR)
    axes.set_xticks(range(len(sides)), [f"{side}+" for side in sides], rotation=45)
    axes.set_xlabel("pixels")
    axes.set_ylabel("images")


def draw_classes(axes: Axes, numbers: dict[str, Any]) -> None:
    ordered = dict(sorted(numbers["classes"].items(), key=lambda item: (-item[1], item[0])))
    more = f", the {BARS} largest of {len(ordered)}" if len(ordered) > BARS else ""
    draw_bars(axes, ordered, f"Scene classes{more}")
    even = numbers["label_balance"]
    if even:
        text = f"entropy {even['entropy_bits']:.2f} bits, evenness {even['evenness']:.3f}, " \
               f"largest : smallest {even['imbalance_ratio']:.1f}"  # fmt: skip
        axes.set_xlabel(f"count\n{text}")  # below the bars, because a bar may have any length


def draw_summary(axes: Axes, numbers: dict[str, Any]) -> None:
    axes.axis("off")
    axes.set_title("In figures")
    rows = [
        ("samples", numbers["samples"]), ("captions", numbers["captions"]),
        ("different captions", numbers["unique_captions"]), ("words", numbers["vocabulary"]),
        ("words seen once", numbers["words_seen_once"]), ("concept pairs", numbers["bigrams"]),
        ("concept pairs seen once", numbers["bigrams_seen_once"]),
        ("different image sizes", numbers["different_image_sizes"]),
        ("duplicate images", numbers["exact_duplicates"]), ("groups of duplicates", numbers["duplicate_groups"]),
        ("largest group", numbers["largest_duplicate_group"]),
        *((f"bad: {reason}", count) for reason, count in numbers["bad"].items()),
    ]  # fmt: skip
    cells = [(name, f"{value:,}") for name, value in rows]
    cells += [(f"captions with a {k.replace('_', ' ')} concept", f"{share:.1%}")
              for k, share in numbers["captions_naming_a_top_concept"].items()]  # fmt: skip
    table = axes.table(cells, loc="upper center", colWidths=[0.68, 0.32], edges="horizontal", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.scale(1, 1.4)
