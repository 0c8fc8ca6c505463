"""The losses by the paper's formulas, in one process, with N x N matrices and loops: slow and simple."""

import torch
from torch import Tensor

from priorclip.model.losses.contrastive import ContrastiveLoss


def contrastive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    total = image.new_zeros(())
    for rows, columns in ((image, text), (text, image)):
        logits = scale * rows @ columns.T
        for i in range(len(rows)):
            positives = [j for j in range(len(rows)) if ids[j] == ids[i]]
            log_probability = logits[i] - logits[i].logsumexp(0)
            total = total - sum(log_probability[j] for j in positives) / len(positives)
    return total / (2 * len(image))


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
    }


def crowd(counts: list[int], width: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """A global batch with so many samples of each class, in random order: unit features and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = torch.randn(2, len(labels), width, dtype=torch.float64, generator=generator)
    image, text = torch.nn.functional.normalize(features, dim=-1)
    return {"image": image, "text": text, "labels": labels[torch.randperm(len(labels), generator=generator)]}
