"""`data_shards stats`: describes the content of shards as text, JSON and pictures.

shards -> counts of CHUNK samples each, by --workers processes -> their sum -> stats.json -> stats.txt, stats.png
                                                                               contact_sheet.png
tiles of scenes also give rasters.png, see raster_stats.py
"""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from priorclip.common.files import write_bytes
from priorclip.common.printable import one_line_values
from priorclip.common.processes import pool
from priorclip.common.progress import Progress
from priorclip.data_shards.commands import StatsConfig
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.inspect.counters import (
    CountOptions,
    SampleCounts,
    ValueCounts,
    count_samples,
    is_concept,
    text_hash,
)
from priorclip.data_shards.inspect.raster_stats import draw_rasters, format_rasters, raster_figures
from priorclip.data_shards.inspect.stats_page import FITTED, draw_page
from priorclip.data_shards.shards import ShardSet

CHUNK = 4096
WORDS_SHOWN, SIZES_SHOWN, SIZES_LISTED, BAR = 25, 8, 1000, 40
COVERAGE = (10, 100, 1000)
TILE, TEXT_LINES, LINE, COLUMNS = 176, 4, 12, 6  # of the contact sheet; TILE and LINE in pixels
LETTERS = TILE // 6  # letters of Pillow's default font that fit into a tile

_state: tuple[ShardSet, CountOptions] | None = None  # set in each worker process


def write_stats(config: StatsConfig) -> str:
    """Writes stats.txt, stats.json, stats.png and contact_sheet.png to the output folder. Returns the text."""
    shards = ShardSet(config.shards)
    total = SampleCounts()
    chosen = choose_samples(len(shards), config)
    with Progress(len(chosen), "stats", "img") as progress:
        for part in count_chunks(shards, chosen, config):
            total.merge(part)
            progress.update(part.samples)
    numbers = make_figures(total.join())
    text = format_stats(numbers, len(shards.files), len(shards))
    rasters = raster_figures(shards, chosen, config.seed)
    if rasters is not None:
        text = "\n".join([text, *format_rasters(rasters)])
        numbers["rasters"] = {name: value for name, value in rasters.items() if name != "outlines"}
    folder = Path(config.output or ".")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "stats.txt", text.encode() + b"\n")
    write_bytes(folder / "stats.json", json.dumps(numbers, indent=1, ensure_ascii=False).encode() + b"\n")
    write_bytes(folder / "stats.png", draw_page(numbers))
    sheet = io.BytesIO()
    draw_contact_sheet(shards, config).save(sheet, "PNG")
    write_bytes(folder / "contact_sheet.png", sheet.getvalue())
    done = f"{text}\npage of plots: {folder / 'stats.png'}\ncontact sheet: {folder / 'contact_sheet.png'}"
    if rasters is None:
        return done
    write_bytes(folder / "rasters.png", draw_rasters(rasters))
    return f"{done}\nmap and bands: {folder / 'rasters.png'}"


def choose_samples(samples: int, config: StatsConfig) -> Sequence[int]:
    """Returns all samples, or --limit samples that --seed draws, in order."""
    if config.limit is None or config.limit >= samples:
        return range(samples)
    if config.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {config.limit}")
    return sorted(random.Random(config.seed).sample(range(samples), config.limit))


def count_chunks(shards: ShardSet, chosen: Sequence[int], config: StatsConfig) -> Iterator[SampleCounts]:
    """Yields the counts of CHUNK samples at a time, in order."""
    jobs = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    arguments = (shards, config.caption_field, config.tokenizer)
    workers = min(config.workers or multiprocessing.cpu_count(), len(jobs))
    if workers <= 1:
        prepare_worker(*arguments)
        yield from map(count_chunk, jobs)
        return
    with pool(workers, prepare_worker, *arguments) as executor:
        yield from executor.map(count_chunk, jobs)


def prepare_worker(shards: ShardSet, caption_field: str, tokenizer: str | None) -> None:
    """Sets what a worker process needs for all of its jobs."""
    global _state
    _state = shards, CountOptions(caption_field, make_token_counter(tokenizer) if tokenizer else None)


def count_chunk(samples: Sequence[int]) -> SampleCounts:
    assert _state is not None
    return count_samples(_state[0], samples, _state[1])


def make_token_counter(name: str) -> Any:
    """Returns a function that counts the tokens of texts, with special tokens and without truncation."""
    from priorclip.data_shards.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name, 77)
    return lambda texts: [len(ids) for ids in tokenizer(texts, truncation=False, padding=False)["input_ids"]]


def make_figures(total: SampleCounts) -> dict[str, Any]:
    """Returns the figures of stats.json."""
    sizes = {f"{int(value) >> 32} x {int(value) & 0xFFFFFFFF}": int(number)
             for value, number in ((total.sizes.values[i], total.sizes.counts[i])
                                   for i in total.sizes.ranked()[:SIZES_LISTED])}  # fmt: skip
    labels = Counter({name: number for name, number in total.classes.items() if name != "(none)"})
    concepts = total.top(total.words, 1000, is_concept)
    return {
        "samples": total.samples,
        "captions": total.captions,
        "unique_captions": len(total.texts.values),
        "most_repeated_captions": {text: n for text, n in total.top(total.texts, 5).items() if n > 1},
        "caption_words": quantiles(total.lengths),
        "caption_tokens": quantiles(total.token_lengths) if total.token_lengths else None,
        "caption_words_histogram": histogram(total.lengths),
        "caption_tokens_histogram": histogram(total.token_lengths),
        "vocabulary": len(total.words.values),
        "words_seen_once": count_singletons(total.words),
        "top_words": total.top(total.words, WORDS_SHOWN),
        "top_concepts": dict(list(concepts.items())[:WORDS_SHOWN]),
        "bigrams": len(total.bigrams.values),
        "bigrams_seen_once": count_singletons(total.bigrams),
        "top_bigrams": total.top(total.bigrams, WORDS_SHOWN),
        "rank_frequency": rank_frequency(total.words),
        "rank_frequency_slope": fit_slope(total.words),
        "captions_naming_a_top_concept": measure_coverage(total.sampled, list(concepts)),
        "classes": dict(sorted(total.classes.items())),
        "label_balance": measure_balance(labels),
        "image_sizes": sizes,
        "different_image_sizes": len(total.sizes.values),
        "image_sides": count_sides(total.sizes),
        "exact_duplicates": int((total.images.counts.astype(np.int64) - 1).sum()),
        "duplicate_groups": int((total.images.counts > 1).sum()),
        "largest_duplicate_group": int(total.images.counts.max(initial=0)),
        "images_with_a_hash": int(total.images.counts.sum()),
        "bad": dict(sorted(total.bad.items())),
    }


def quantiles(lengths: Counter[int]) -> dict[str, float]:
    """Returns mean and quantiles of a histogram, as numpy computes them from the list."""
    values = np.array(sorted(lengths) or [0])
    ends = np.cumsum([lengths[value] or 1 for value in values.tolist()])
    last = int(ends[-1]) - 1

    def at(share: float) -> float:
        place = share / 100 * last
        below, above = (values[np.searchsorted(ends, side, side="right")] for side in (int(place), -int(-place // 1)))
        return float(below + (above - below) * (place % 1))

    mean = sum(value * lengths[value] for value in lengths) / max(1, lengths.total())
    return {"mean": mean, **{f"p{share}": at(share) for share in (0, 5, 50, 95, 100)}}


def histogram(lengths: Counter[int]) -> dict[str, int]:
    return {str(length): lengths[length] for length in sorted(lengths)}


def count_singletons(counts: ValueCounts) -> int:
    return int((counts.counts == 1).sum())


def rank_frequency(counts: ValueCounts) -> list[list[int]]:
    """Returns [rank, count] at about 100 ranks that are evenly spaced on a logarithmic scale."""
    falling = np.sort(counts.counts)[::-1]
    if not len(falling):
        return []
    ranks = np.unique(np.geomspace(1, len(falling), 100).round().astype(int))
    return [[int(rank), int(falling[rank - 1])] for rank in ranks]


def fit_slope(counts: ValueCounts) -> float | None:
    """Fits count ~ rank ** slope between FITTED ranks, by least squares on logarithms. Zipf's law gives -1."""
    points = np.array([point for point in rank_frequency(counts) if FITTED[0] <= point[0] <= FITTED[1]], float)
    return float(np.polyfit(np.log(points[:, 0]), np.log(points[:, 1]), 1)[0]) if len(points) > 2 else None


def measure_coverage(sampled: list[tuple[int, ...]], concepts: list[str]) -> dict[str, float]:
    """Returns the share of the sampled captions that name at least one of the k most frequent concepts."""
    shares = {}
    for k in COVERAGE:
        top = {text_hash(word) for word in concepts[:k]}
        shares[f"top_{k}"] = sum(not top.isdisjoint(words) for words in sampled) / max(1, len(sampled))
    return shares


def measure_balance(labels: Counter[str]) -> dict[str, float] | None:
    """Returns the entropy in bits, its share of the largest possible entropy, and largest : smallest class."""
    if not labels:
        return None
    shares = np.array(sorted(labels.values())) / labels.total()
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    most = float(np.log2(len(shares)))
    evenness = entropy / most if most else 1.0
    return {"entropy_bits": entropy, "evenness": evenness, "imbalance_ratio": float(shares[-1] / shares[0])}


def count_sides(sizes: ValueCounts) -> dict[str, int]:
    """Counts images by their longer side: lower edge in pixels -> count, in bins of half an octave."""
    longer = np.maximum(sizes.values >> np.uint64(32), sizes.values & np.uint64(0xFFFFFFFF)).astype(float)
    bins: NDArray[np.int64] = np.floor(np.log2(np.maximum(longer, 1)) * 2).astype(int)
    counts = np.bincount(bins, weights=sizes.counts) if len(bins) else np.empty(0)
    return {str(round(2 ** (number / 2))): int(value) for number, value in enumerate(counts) if value}


def format_stats(numbers: dict[str, Any], shards: int, available: int) -> str:
    numbers = one_line_values(numbers)
    words, tokens = numbers["caption_words"], numbers["caption_tokens"]
    part = f" (drawn from {available})" if numbers["samples"] < available else ""
    lines = [
        f"samples          {numbers['samples']}{part} in {shards} shards",
        f"captions         {numbers['captions']}, {numbers['unique_captions']} of them different",
        f"caption length   {format_lengths(words, 'words')}",
    ]
    lines += [f"                 {format_lengths(tokens, 'tokens')}"] if tokens else []
    repeated = numbers["most_repeated_captions"]
    lines += [f"repeated most    {textwrap.shorten(text, 70)!r} {count}" for text, count in list(repeated.items())[:1]]
    slope_text = f", slope {numbers['rank_frequency_slope']:.2f}" if numbers["rank_frequency_slope"] else ""
    named = ", ".join(f"{k.removeprefix('top_')}: {v:.1%}" for k, v in numbers["captions_naming_a_top_concept"].items())
    lines += [
        f"vocabulary       {numbers['vocabulary']} words, {numbers['words_seen_once']} of them seen once{slope_text}",
        f"most frequent    {format_counts(numbers['top_words'])}",
        f"concepts         {format_counts(numbers['top_concepts'])}",
        f"concept pairs    {numbers['bigrams']}, {numbers['bigrams_seen_once']} of them seen once; "
        f"{format_counts(numbers['top_bigrams'], 10)}",
        f"long tail        captions that name one of the top concepts, {named}",
        f"duplicates       {numbers['exact_duplicates']} images are byte for byte another one "
        f"({numbers['duplicate_groups']} groups, the largest of {numbers['largest_duplicate_group']}; "
        f"{numbers['images_with_a_hash']} images have a recorded hash)",
    ]
    sizes = list(numbers["image_sizes"].items())
    more = numbers["different_image_sizes"] - SIZES_SHOWN
    shown = ", ".join(f"{size}: {count}" for size, count in sizes[:SIZES_SHOWN])
    lines.append(f"image sizes      {shown}{f' and {more} more' if more > 0 else ''}")
    if numbers["bad"]:
        lines.append(f"bad samples      {', '.join(f'{reason}: {count}' for reason, count in numbers['bad'].items())}")
    return "\n".join([*lines, *format_classes(numbers)])


def format_lengths(length: dict[str, float], unit: str) -> str:
    places = " / ".join(f"{length[name]:.0f}" for name in ("p0", "p5", "p50", "p95", "p100"))
    return f"{length['mean']:.1f} {unit} on average, {places} (min, 5 %, median, 95 %, max)"


def format_counts(counts: dict[str, int], number: int = WORDS_SHOWN) -> str:
    return ", ".join(f"{name} {count}" for name, count in list(counts.items())[:number])


def format_classes(numbers: dict[str, Any]) -> list[str]:
    classes, even = numbers["classes"], numbers["label_balance"]
    largest = max(classes.values(), default=1)
    width = max((len(name) for name in classes), default=0)
    text = f", evenness {even['evenness']:.3f}, largest : smallest {even['imbalance_ratio']:.1f}" if even else ""
    lines = [f"scene classes    {len(classes)}{text}"]
    for name, number in sorted(classes.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {name:<{width}} {number:>8} {'#' * max(1, round(BAR * number / largest))}")
    return lines


def draw_contact_sheet(shards: ShardSet, config: StatsConfig) -> Image.Image:
    """Draws random samples with their label and a caption."""
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
