"""The losses by the paper's formulas, in one process, with N x N matrices and loops: slow and simple."""

import math

import torch
from torch import Tensor

from priorclip.model.losses.contrastive import ContrastiveLoss
from priorclip.model.losses.probabilistic import as_products
from priorclip.model.losses.sigmoid import SigmoidLoss


def contrastive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    total = image.new_zeros(())
    for rows, columns in ((image, text), (text, image)):
        logits = scale * rows @ columns.T
        for i in range(len(rows)):
            positives = [j for j in range(len(rows)) if ids[j] == ids[i]]
            log_probability = logits[i] - logits[i].logsumexp(0)
            total = total - sum(log_probability[j] for j in positives) / len(positives)
    return total / (2 * len(image))


def kind_of_pair(i: int, j: int, ids: Tensor, captions: Tensor | None) -> str:
    """Image i and text j: positive, negative, or ignored because text j has the words of text i."""
    if ids[i] == ids[j]:
        return "positive"
    return "ignored" if captions is not None and captions[i] == captions[j] else "negative"


def weighted_contrastive(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, captions: Tensor | None, beta: float
) -> Tensor:
    """Negatives weighted as by Robinson et al.; beta 0 gives equal weights."""
    total, own = image.new_zeros(()), range(len(image))
    for rows, columns in ((image, text), (text, image)):
        logits = scale * rows @ columns.T
        for i in own:
            kinds = [kind_of_pair(i, j, ids, captions) for j in own]
            positives = [logits[i, j] for j in own if kinds[j] == "positive"]
            negatives = [logits[i, j] for j in own if kinds[j] == "negative"]
            below = positives
            if negatives:
                log_mean = torch.stack([beta * s for s in negatives]).logsumexp(0) - math.log(len(negatives))
                below = positives + [s + (beta * s - log_mean) for s in negatives]
            total = total + torch.stack(below).logsumexp(0) - sum(positives) / len(positives)
    return total / (2 * len(image))


def sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, captions: Tensor | None = None
) -> Tensor:
    total = image.new_zeros(())
    for i in range(len(image)):
        for j in range(len(text)):
            kind = kind_of_pair(i, j, ids, captions)
            logit = scale * image[i] @ text[j] + bias
            if kind != "ignored":
                total = total - torch.nn.functional.logsigmoid(logit if kind == "positive" else -logit)
    return total / len(image)


class PairLoss(torch.nn.Module):
    """A loss of pairs that takes image ids and caption ids as one key (B, 2), and its bias from the scale."""

    def __init__(self, loss: torch.nn.Module, equal_captions: str):
        super().__init__()
        self.loss, self.ignores = loss, equal_captions == "ignored"

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, key: Tensor) -> Tensor:
        captions = key[:, 1] if self.ignores else None
        biases = [-scale / 3] if isinstance(self.loss, SigmoidLoss) else []
        return self.loss(image, text, scale, *biases, key[:, 0], captions)

    def slowly(self, image: Tensor, text: Tensor, scale: Tensor, key: Tensor) -> Tensor:
        captions = key[:, 1] if self.ignores else None
        if isinstance(self.loss, SigmoidLoss):
            return sigmoid(image, text, scale, -scale / 3, key[:, 0], captions)
        return weighted_contrastive(image, text, scale, key[:, 0], captions, self.loss.hard_negatives)


class DistributionLoss(PairLoss):
    """The loss of distributions: the square of the last feature is the sum of the variances."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, key: Tensor) -> Tensor:
        captions = key[:, 1] if self.ignores else None
        (image, of_image), (text, of_text) = halves(image), halves(text)
        return self.loss(*as_products(image, text, of_image, of_text, scale, scale / 2), key[:, 0], captions)

    def slowly(self, image: Tensor, text: Tensor, scale: Tensor, key: Tensor) -> Tensor:
        captions = key[:, 1] if self.ignores else None
        return probabilistic(*halves(image), *halves(text), scale, scale / 2, key[:, 0], captions)


def halves(features: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.normalize(features[:, :-1], dim=1), features[:, -1].square()


def probabilistic(
    image: Tensor, image_variance: Tensor, text: Tensor, text_variance: Tensor, scale: Tensor, bias: Tensor,
    ids: Tensor, captions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """PCME++'s matching loss, with the expected squared distance of samples of two normal distributions."""
    total = image.new_zeros(())
    for i in range(len(image)):
        for j in range(len(text)):
            distance = (image[i] - text[j]).square().sum() + image_variance[i] + text_variance[j]
            kind = kind_of_pair(i, j, ids, captions)
            logit = bias - scale * distance
            if kind != "ignored":
                total = total - torch.nn.functional.logsigmoid(logit if kind == "positive" else -logit)
    return total / len(image)


def attribution(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    valid = [i for i in range(len(labels)) if labels[i] >= 0]
    classes = sorted({int(labels[i]) for i in valid})
    total = image.new_zeros(())
    for rows, others in ((image, text), (text, image)):
        centres = []
        for c in classes:
            members = [others[i] for i in valid if int(labels[i]) == c]
            centres.append(sum(members) / len(members))
        for i in valid:
            logits = torch.stack([scale * rows[i] @ centre for centre in centres])
            total = total - (logits[classes.index(int(labels[i]))] - logits.logsumexp(0))
    return total / (2 * max(len(valid), 1))


def released_attribution(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """PIR-CLIP's, in one process: a centre for each sample, N x N logits, the target is the own index."""
    valid = [i for i in range(len(labels)) if labels[i] >= 0]
    total = image.new_zeros(())
    for rows, others in ((image, text), (text, image)):
        centres = []
        for i in valid:
            members = [others[j] for j in valid if labels[j] == labels[i]]
            centres.append(sum(members) / len(members))
        for place, i in enumerate(valid):
            logits = torch.stack([scale * rows[i] @ centre for centre in centres])
            total = total - (logits[place] - logits.logsumexp(0))
    return total / (2 * max(len(valid), 1))


def closed_attribution(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """PIR's, in one process: as PIR-CLIP's, but in its second half each image centre is compared with all texts."""
    total, own = image.new_zeros(()), range(len(labels))
    members = [[j for j in own if labels[j] == labels[i]] for i in own]
    for i in own:
        logits = torch.stack([scale * image[i] @ text[members[j]].mean(0) for j in own])
        total = total - (logits[i] - logits.logsumexp(0))
        logits = torch.stack([scale * image[members[i]].mean(0) @ text[j] for j in own])
        total = total - (logits[i] - logits.logsumexp(0))
    return total / (2 * len(labels))


def of(loss: torch.nn.Module, image: Tensor, text: Tensor, scale: Tensor, key: Tensor) -> Tensor:
    """The reference of a loss module; ``key``: image ids of the contrastive loss, labels of the attribution loss."""
    if isinstance(loss, PairLoss):
        return loss.slowly(image, text, scale, key)
    if isinstance(loss, ContrastiveLoss):
        return contrastive(image, text, scale, key)
    function = released_attribution if getattr(loss, "compat", None) == "released" else attribution
    return function(image, text, scale, key)


def batch(size: int = 12, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A global batch: unit features, repeated image ids, labels with gaps, repeats and -1, unevenly distributed."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, width, dtype=torch.float64, generator=generator)
    text = torch.randn(size, width, dtype=torch.float64, generator=generator)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 0, 7, 8, 9, 10, 3])[:size]
    labels = torch.tensor([5, -1, 2, 2, 9, 5, 5, 2, -1, -1, -1, -1])[:size]
    return {
        "image": torch.nn.functional.normalize(image, dim=-1),
        "text": torch.nn.functional.normalize(text, dim=-1),
        "ids": ids,
        "labels": labels,
        # Equal words: within an image, of images on one rank, and of images on different ranks.
        "captions": torch.tensor([1, 2, 3, 4, 5, 2, 1, 3, 4, 4, 6, 4])[:size],
    }


def crowd(counts: list[int], width: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """A global batch with so many samples of each class, in random order: unit features and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = torch.randn(2, len(labels), width, dtype=torch.float64, generator=generator)
    image, text = torch.nn.functional.normalize(features, dim=-1)
    return {"image": image, "text": text, "labels": labels[torch.randperm(len(labels), generator=generator)]}
