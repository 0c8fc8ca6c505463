"""`data_shards stats`: what is in the shards, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import random
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_shards.commands import StatsConfig
from data_shards.images import opened, upright_size
from data_shards.index import write_aside
from data_shards.sample import BadSample
from data_shards.shards import ShardSet
from data_shards.transforms import eval_transform

WORDS_SHOWN, SIZES_SHOWN, BAR = 25, 8, 40
TILE, TEXT_LINES, LINE, COLUMNS = 176, 4, 12, 6  # of the contact sheet, in pixels but for the counts
LETTERS = TILE // 6  # of Pillow's default font in a tile's width


@dataclass
class Statistics:
    """Counts over a set of shards."""

    samples: int = 0
    captions: int = 0
    unique_captions: set[str] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)  # words of each caption
    words: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    hashes: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)

    def add(self, shards: ShardSet, sample: int, caption_field: str) -> None:
        self.samples += 1
        try:
            self._add(shards, sample, caption_field)
        except BadSample as error:
            self.bad[error.reason] += 1

    def _add(self, shards: ShardSet, sample: int, caption_field: str) -> None:
        entry = shards.text(sample)
        self.classes[entry.label if entry.label is not None else "(none)"] += 1
        if entry.info.get("sha256"):
            self.hashes[entry.info["sha256"]] += 1
        width, height = entry.info.get("width"), entry.info.get("height")
        if not (width and height):
            with opened(shards.read(sample).image) as image:
                width, height = upright_size(image)
        self.sizes[f"{width} x {height}"] += 1
        for caption in entry.texts(caption_field):
            words = re.findall(r"[\w'-]+", caption.lower())
            self.captions += 1
            self.unique_captions.add(caption)
            self.lengths.append(len(words))
            self.words.update(words)

    def as_dict(self) -> dict:
        """JSON-able; quantiles of the caption length in words."""
        lengths = np.array(self.lengths or [0])
        quantiles = {f"p{share}": float(np.percentile(lengths, share)) for share in (0, 5, 50, 95, 100)}
        return {
            "samples": self.samples,
            "captions": self.captions,
            "unique_captions": len(self.unique_captions),
            "caption_words": {"mean": float(lengths.mean()), **quantiles},
            "vocabulary": len(self.words),
            "words_seen_once": sum(count == 1 for count in self.words.values()),
            "top_words": dict(self.words.most_common(WORDS_SHOWN)),
            "classes": dict(sorted(self.classes.items())),
            "image_sizes": dict(self.sizes.most_common()),
            "exact_duplicates": sum(count - 1 for count in self.hashes.values()),
            "bad": dict(self.bad),
        }


def write_stats(config: StatsConfig) -> str:
    """Count, write stats.txt, stats.json and contact_sheet.png to the output folder; returns the text."""
    shards = ShardSet(config.shards)
    statistics = Statistics()
    for sample in tqdm(range(len(shards)), unit="img", desc="stats", disable=None):
        statistics.add(shards, sample, config.caption_field)
    numbers = statistics.as_dict()
    text = describe(numbers, len(shards.paths))
    folder = Path(config.output or ".")
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "stats.txt", text.encode() + b"\n")
    write_aside(folder / "stats.json", json.dumps(numbers, indent=1, ensure_ascii=False).encode() + b"\n")
    contact_sheet(shards, config).save(folder / "contact_sheet.png")
    return f"{text}\ncontact sheet: {folder / 'contact_sheet.png'}"


def describe(numbers: dict, shards: int) -> str:
    words = numbers["caption_words"]
    lines = [
        f"samples          {numbers['samples']} in {shards} shards",
        f"captions         {numbers['captions']}, {numbers['unique_captions']} of them different",
        f"caption length   {words['mean']:.1f} words on average, "
        f"{words['p0']:.0f} / {words['p5']:.0f} / {words['p50']:.0f} / {words['p95']:.0f} / {words['p100']:.0f} "
        "(min, 5 %, median, 95 %, max)",
        f"vocabulary       {numbers['vocabulary']} words, {numbers['words_seen_once']} of them seen once",
        f"most frequent    {', '.join(f'{word} {count}' for word, count in numbers['top_words'].items())}",
        f"duplicates       {numbers['exact_duplicates']} images are byte for byte another one",
    ]
    sizes = list(numbers["image_sizes"].items())
    shown = ", ".join(f"{size}: {count}" for size, count in sizes[:SIZES_SHOWN])
    lines.append(
        f"image sizes      {shown}{f' and {len(sizes) - SIZES_SHOWN} more' if len(sizes) > SIZES_SHOWN else ''}"
    )
    if numbers["bad"]:
        lines.append(f"bad samples      {', '.join(f'{reason}: {count}' for reason, count in numbers['bad'].items())}")
    classes = numbers["classes"]
    largest = max(classes.values(), default=1)
    width = max((len(name) for name in classes), default=0)
    lines.append(f"scene classes    {len(classes)}")
    for name, count in sorted(classes.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {name:<{width}} {count:>8} {'#' * max(1, round(BAR * count / largest))}")
    return "\n".join(lines)


def contact_sheet(shards: ShardSet, config: StatsConfig) -> Image.Image:
    """Random samples with their label and a caption."""
    chosen = random.Random(config.seed).sample(range(len(shards)), min(config.images, len(shards)))
    columns = min(COLUMNS, len(chosen)) or 1
    rows = -(-len(chosen) // columns)
    high = TILE + (TEXT_LINES + 1) * LINE + 6
    sheet = Image.new("RGB", (columns * (TILE + 6) + 6, rows * high + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, sample in enumerate(sorted(chosen)):
        left, top = 6 + place % columns * (TILE + 6), 6 + place // columns * high
        try:
            entry = shards.read(sample)
            pixels = eval_transform(entry.image, TILE)
            lines = [entry.label or "", *textwrap.wrap(entry.texts(config.caption_field)[0], LETTERS)]
        except BadSample as error:
            pixels, lines = np.full((3, TILE, TILE), 128, np.uint8), ["bad sample", *textwrap.wrap(str(error), LETTERS)]
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (left, top))
        for row, line in enumerate(lines[: TEXT_LINES + 1]):
            plain = line.encode("latin-1", "replace").decode("latin-1")
            draw.text((left, top + TILE + row * LINE), plain, fill="black" if row else "navy")
    return sheet
