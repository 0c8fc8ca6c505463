"""Does curation find wrong captions? Swaps the captions of some training images, and counts how many it drops.

    python -m benchmarks.swapped_captions swap --json dataset_rsicd.json --share 0.2 --output swapped.json
    python -m data_shards pack --source karpathy --json swapped.json --images images --split train --output swapped
    python -m retrieval curate --shards swapped --model EXPORT --drop_share 0.2 --output curated
    python -m benchmarks.swapped_captions score --json swapped.json --curated curated

``swap`` gives the chosen images each other's captions, all captions of one image together, and marks them
``"swapped": true``. ``score`` prints precision (which part of the dropped pairs is swapped), recall (which part of the
swapped pairs is dropped) and the share of swapped pairs, which is the precision of chance. Two images can have a
caption of the same words. Such a pair counts as swapped although it may be right, so 100 % is out of reach.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from priorclip.common.files import write_text
from priorclip.common.output import say


def swap(content: dict[str, Any], share: float, split: str, seed: int) -> int:
    """Swaps captions among ``share`` of the images of a split in place, and returns how many images that are.

    Raises:
        ValueError: fewer than two images are chosen
    """
    entries = [entry for entry in content["images"] if entry.get("split") == split]
    chosen = random.Random(seed).sample(entries, round(share * len(entries)))
    if len(chosen) < 2:
        raise ValueError(f"share {share} of the {len(entries)} images of split '{split}' is no two images")
    sentences = [entry["sentences"] for entry in chosen]
    for entry, others in zip(chosen, [*sentences[1:], sentences[0]], strict=True):
        entry["sentences"], entry["swapped"] = others, True
    return len(chosen)


def score(content: dict[str, Any], dropped: list[dict[str, Any]], split: str) -> dict[str, float]:
    """Returns precision, recall and the share of swapped pairs, percent.

    Args:
        content: the Karpathy JSON that ``swap`` has changed
        dropped: lines of dropped.jsonl, with key and caption
        split: split that was packed
    """
    packed = [entry for entry in content["images"] if entry.get("split") == split]
    wrong = pairs_of(entry for entry in packed if entry.get("swapped"))
    pairs = {(row["key"], row["caption"]) for row in dropped}
    return {
        "precision": 100 * len(pairs & wrong) / max(1, len(pairs)),
        "recall": 100 * len(pairs & wrong) / max(1, len(wrong)),
        "chance": 100 * len(wrong) / len(pairs_of(packed)),
        "dropped": len(pairs),
    }


def pairs_of(entries: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    """Returns the distinct pairs of key and caption, as shards have them."""
    return {(Path(entry["filename"]).stem, each["raw"].strip()) for entry in entries for each in entry["sentences"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["swap", "score"])
    parser.add_argument("--json", type=Path, required=True, help="annotations in Karpathy's format")
    parser.add_argument("--split", default="train")
    parser.add_argument("--share", type=float, default=0.2, help="of the images of the split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of swap: the annotations with swapped captions")
    parser.add_argument("--curated", type=Path, nargs="+", default=[], help="of score: folders that curate wrote")
    options = parser.parse_args()
    content = json.loads(options.json.read_text(encoding="utf-8"))
    if options.command == "swap":
        if options.output is None:
            parser.error("swap needs --output")
        count = swap(content, options.share, options.split, options.seed)
        write_text(options.output, json.dumps(content))
        say(f"{options.output}: {count} images have the captions of others")
        return
    for folder in options.curated:
        lines = (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        found = score(content, [json.loads(line) for line in lines], options.split)
        say(f"{folder}: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
