"""Does a model see whether plants live? The right words for the plants against the wrong ones, image by image.

    python -m benchmarks.plants runs/plants-nir/export runs/plants-rgb/export --data data/plants-test

The shards are drawn with `--artificial-plants` (data_shards/synthetic/plants.py): only near infrared tells.
Each caption of an image with plants is compared with itself after its words for the plants are exchanged for those of
the other kind. The figure is the share of captions that are closer to their image: 50 % is chance.
"""

from __future__ import annotations

import argparse

import torch

from priorclip.common.output import say
from priorclip.data_shards import ShardSet
from priorclip.data_shards.synthetic.plants import WORDS
from priorclip.retrieval import Encoder


def exchanged(caption: str) -> str:
    """Returns the caption with the words for the other kind of plants. Raises ValueError if it has none of them."""
    for ours, theirs in (*zip(WORDS[False], WORDS[True], strict=True), *zip(WORDS[True], WORDS[False], strict=True)):
        if caption.endswith(f"{ours}."):
            return f"{caption.removesuffix(f'{ours}.')}{theirs}."
    raise ValueError(f"no words for plants at the end of {caption!r}: draw the shards with --artificial-plants")


def measure(model: str, images: list[bytes], captions: list[list[str]]) -> float:
    """Returns the share of the captions, in percent, that are closer to their image than with exchanged words."""
    encoder = Encoder.load(model, "cpu")
    owners = [place for place, texts in enumerate(captions) for _ in texts]
    right = [text for texts in captions for text in texts]
    features = encoder.embed_images(images)[torch.tensor(owners)]
    pairs = (encoder.embed_texts(texts) for texts in (right, [exchanged(text) for text in right]))
    closeness = [(features * texts).sum(1) for texts in pairs]
    return 100 * float((closeness[0] > closeness[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="export folders")
    parser.add_argument("--data", required=True, help="shards drawn with --artificial-plants")
    options = parser.parse_args()
    shards = ShardSet(options.data)
    samples = [shards.read(number) for number in range(len(shards))]
    chosen = [sample for sample in samples if "plants" in sample.info.get("attributes", {})]
    if not chosen:
        raise SystemExit(f"{options.data} says of no image whether its plants live: draw with --artificial-plants")
    for model in options.models:
        found = measure(model, [sample.image for sample in chosen], [sample.captions for sample in chosen])
        say(f"{model}: {found:.1f} % of the captions of {len(chosen)} images with plants")


if __name__ == "__main__":
    main()
