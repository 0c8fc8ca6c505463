"""Measures what belief attends to and whether the model uses it, for trained models of a sweep on their test images.

    E=runs/evidence
    python benchmarks/belief.py --runs $E/open/one-stage-soft/seed-*/closed --prior $E/prior/export

Soft belief can help only if three conditions hold. Each is measured:

* the prior recognises the scene: its accuracy on the test images;
* belief follows the prior: rank correlation (Spearman) of M with the prior's class activation map, which shows where
  in the image the evidence for the scene is (Zhou et al. 2016), and with the distance to the centre;
* the ranking depends on the image: rank correlation of M between an image and its turned and mirrored copies, and
  between models of other seeds on the same image.

To see whether the model uses the map, recall is measured unchanged, with the map of each image shuffled over its
tokens, with belief turned off in the trained model, and with a random half of the tokens left out. If that costs no
recall, the choice of tokens does not matter.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from priorclip.data_shards import EvalBatches, ShardSet, eval_batches, load_tokenizer
from priorclip.model import SceneClassifier, from_pretrained
from priorclip.model.evaluation import evaluate_retrieval
from priorclip.model.networks import belief as belief_of_model
from priorclip.retrieval.encoder import remember


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run directories of finetune closed")
    parser.add_argument("--prior", type=Path, required=True, help="export of finetune prior")
    parser.add_argument("--features", type=Path, default=Path("runs/evidence/features"),
                        help="folder for cached features of the encoders")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    prior = from_pretrained(options.prior)
    rows: list[dict[str, Any]] = []
    maps: dict[str, list[Tensor]] = {}
    for run in options.runs:
        test = test_images(run)
        model = from_pretrained(run / "export")
        remember(model, options.features)
        found, beliefs = look_at(model, prior, test)
        rows.append({"run": str(run), **found, **used(model, test)})
        for key, belief in zip(test.keys, beliefs, strict=True):
            maps.setdefault(key, []).append(belief)
        print(json.dumps(rows[-1]), flush=True)
    pairs = [
        spearman(one.flatten(), other.flatten())
        for same in maps.values()
        for one, other in itertools.combinations(same, 2)
    ]
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if name != "run"}
    means["other_seeds"] = statistics.fmean(pairs) if pairs else float("nan")
    print(table(means))
    if options.output:
        options.output.write_text(json.dumps({"mean": means, "runs": rows}, indent=1) + "\n")


class Test:
    """The test images of a run as batches, with a name for each image that is equal in all runs."""

    def __init__(self, batches: EvalBatches, classes: list[str]) -> None:
        self.batches, self.classes = batches, classes
        self.images = torch.cat([batch["images"][batch["index"] >= 0] for batch in batches.images()])
        self.labels = torch.cat([batch["labels"][batch["index"] >= 0] for batch in batches.images()])
        self.keys = batches.keys()


def test_images(run: Path) -> Test:
    config = yaml.safe_load((run / "config.yaml").read_text())
    shards = ShardSet(config["test"]["shards"])
    tokenizer = load_tokenizer(str(run / "tokenizer"), config["model"]["text"]["context_length"])
    return Test(eval_batches(shards, tokenizer, config["data"]["image_size"], 64), shards.classes)


@torch.no_grad()
def look_at(model: Any, prior: SceneClassifier, test: Test) -> tuple[dict[str, float], Tensor]:
    """Returns the figures of the belief maps, and the maps (B, h, w)."""
    maps = model.belief_map(test.images)
    height, width = maps.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    nearness = -((rows - (height - 1) / 2) ** 2 + (columns - (width - 1) / 2) ** 2)
    evidence, right = activation(prior, test, (height, width))
    flat = maps.flatten(1)
    entropy = -(flat * flat.clamp(min=1e-12).log()).sum(1)
    return {
        "prior_accuracy": 100 * right.float().mean().item(),
        "tokens": height * width,
        "effective_tokens": entropy.exp().mean().item(),
        "with_activation": mean_spearman(maps, evidence),
        "with_centre": mean_spearman(maps, nearness.expand_as(maps)),
        "activation_with_centre": mean_spearman(evidence, nearness.expand_as(maps)),
        "under_turns": statistics.fmean(
            mean_spearman(maps, undo(model.belief_map(turned(test.images, n)), n)) for n in range(1, 8)
        ),
    }, maps


def activation(prior: SceneClassifier, test: Test, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the evidence for the true scene at each place, (B, h, w), and whether the prior finds it, (B,)."""
    encoder = prior.backbone
    features = encoder.model.forward_features(encoder.normalise(test.images))
    own = torch.tensor([list(prior.classes).index(test.classes[label]) for label in test.labels])
    evidence = torch.einsum("bchw,bc->bhw", features, prior.head.weight[own])
    if evidence.shape[1:] != grid:
        evidence = F.interpolate(evidence[:, None], size=grid, mode="bilinear", antialias=True)[:, 0]
    return evidence, prior(test.images).argmax(1) == own


def turned(images: Tensor, n: int) -> Tensor:
    """Returns one of the 8 orientations; 0 is the image itself."""
    return torch.rot90(images.flip(-1) if n >= 4 else images, n % 4, dims=(-2, -1))


def undo(maps: Tensor, n: int) -> Tensor:
    back = torch.rot90(maps, -(n % 4), dims=(-2, -1))
    return back.flip(-1) if n >= 4 else back


def mean_spearman(one: Tensor, other: Tensor) -> float:
    return statistics.fmean(spearman(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True))


def spearman(one: Tensor, other: Tensor) -> float:
    """Returns the rank correlation; ties get their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(one.numpy(), other.numpy()).statistic)


def used(model: Any, test: Test) -> dict[str, float]:
    """Returns mean recall of the trained model, with its map shuffled over the tokens, and without belief."""
    config = model.visual.belief if hasattr(model, "visual") else model.config.belief
    figures = {"mean_recall": recall(model, test)}
    straight = belief_of_model.affinity
    random = torch.Generator().manual_seed(0)

    def shuffled(tokens: Tensor, instruction: Tensor) -> Tensor:
        scores = straight(tokens, instruction)
        order = torch.stack([torch.randperm(scores.shape[1], generator=random) for _ in scores])
        return scores.gather(1, order)

    own = copy.copy(config)
    belief_of_model.affinity = shuffled
    try:
        figures["shuffled"] = statistics.fmean(recall(model, test) for _ in range(3))
        config.mode, config.k = "hard", model.belief_map(test.images[:1]).numel() // 2
        figures["half_by_lot"] = statistics.fmean(recall(model, test) for _ in range(3))
    finally:
        belief_of_model.affinity = straight
    config.mode = "none"
    figures["turned_off"] = recall(model, test)
    config.mode, config.k = own.mode, own.k
    return figures


@torch.no_grad()
def recall(model: Any, test: Test) -> float:
    return evaluate_retrieval(model, test.batches, torch.device("cpu"))["mean_recall"]


def table(means: dict[str, float]) -> str:
    meaning = {
        "prior_accuracy": "prior's accuracy on the test images, %",
        "effective_tokens": f"tokens that M is spread over (exp of its entropy), of {means['tokens']:.0f}",
        "with_activation": "rank correlation of M with the prior's activation map",
        "with_centre": "rank correlation of M with nearness to the centre",
        "activation_with_centre": "rank correlation of the activation map with nearness to the centre",
        "under_turns": "rank correlation of M with that of the turned and mirrored image",
        "other_seeds": "rank correlation of M with that of other seeds",
        "mean_recall": "mean recall",
        "shuffled": "mean recall, map shuffled over the tokens",
        "turned_off": "mean recall, belief turned off after training",
        "half_by_lot": "mean recall, half of the tokens left out by lot",
    }
    return "\n".join(["| | |", "|---|---:|", *(f"| {text} | {means[name]:.2f} |" for name, text in meaning.items())])


if __name__ == "__main__":
    main()
