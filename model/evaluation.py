"""Recall of a model on batches: encodes every image and caption once, puts the features in order, and compares.

    figures = evaluate_retrieval(model, batches, device)              # one process
    figures = evaluate_retrieval(engine, batches, device, gather)     # each rank encodes its share

``batches`` is a `Batches`, such as data_shards.eval_batches returns; ``gather(rows)`` returns the rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from priorclip.model.recall import retrieval_metrics

Forward = Callable[..., Mapping[str, Any]]
Gather = Callable[[Tensor], Tensor]


class Batches(Protocol):
    """Held-out images and captions. Index -1 marks padding. Pictures use ``pixels`` and ``scenes``.

    ``texts`` yields each distinct caption at least once, with the index of the first caption that equals it.
    """

    captions: list[str]
    text_image: Any

    @property
    def image_count(self) -> int: ...
    def images(self) -> Iterator[dict[str, Tensor]]: ...
    def texts(self) -> Iterator[dict[str, Tensor]]: ...
    def pixels(self, images: list[int]) -> Tensor: ...
    def scenes(self, images: list[int]) -> list[str]: ...


def evaluate_retrieval(
    forward: Forward, batches: Batches, device: torch.device, gather: Gather | None = None
) -> dict[str, float]:
    """Returns recalls in percent by the names of model.recall.retrieval_metrics.

    Args:
        forward: the model, in eval mode, or the DeepSpeed engine around it
        batches: of this rank
        device: of the model
        gather: gathers the rows of all ranks; None: this process has all rows
    """
    images = encode_images(forward, batches, device, gather)
    texts = encode_texts(forward, batches, device, gather)
    return retrieval_metrics(images, texts, torch.as_tensor(batches.text_image))


def encode_images(forward: Forward, batches: Batches, device: torch.device, gather: Gather | None = None) -> Tensor:
    """Returns L2-normalised features of all images in their order, (I, d) float32."""
    encoded = (
        (forward(images=batch["images"].to(device), **masks_of(batch, device))["image_features"], batch["index"])
        for batch in batches.images()
    )
    return collect_rows(encoded, batches.image_count, gather)


def masks_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Returns the masks of a batch, for a model whose belief is given; empty without."""
    return {"masks": batch["masks"].to(device, non_blocking=True)} if "masks" in batch else {}


def encode_texts(forward: Forward, batches: Batches, device: torch.device, gather: Gather | None = None) -> Tensor:
    """Returns L2-normalised features of all captions in their order, (T, d) float32.

    Equal captions get the same feature to the last bit, that of the first of them, so that rounding does not decide
    which of them ranks first.
    """
    encoded = (
        (
            forward(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))[
                "text_features"
            ],
            batch["index"],
        )
        for batch in batches.texts()
    )
    first: dict[str, int] = {}
    places = [first.setdefault(caption, place) for place, caption in enumerate(batches.captions)]
    features = collect_rows(encoded, len(batches.captions), gather, needed=list(first.values()))
    return features[torch.tensor(places, device=features.device)]


@torch.no_grad()
def collect_rows(
    encoded: Iterable[tuple[Tensor, Tensor]], total: int, gather: Gather | None, needed: list[int] | None = None
) -> Tensor:
    """Collects rows (n, d) and their places (n,) batch by batch -> (total, d) float32 in order.

    Places that are not ``needed`` may stay zero; None: all are.
    """
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for features, index in encoded:
        rows.append(features.float())
        places.append(index.to(features.device))
    all_rows, all_places = torch.cat(rows), torch.cat(places)
    if gather is not None:
        all_rows, all_places = gather(all_rows), gather(all_places)
    return place_rows(all_rows, all_places, total, needed)


def place_rows(rows: Tensor, index: Tensor, total: int, needed: list[int] | None = None) -> Tensor:
    """Puts ``rows (n, d)`` at ``index (n,)`` -> (total, d); -1 is left out.

    Raises ValueError if a place that is needed has no row.
    """
    kept, places = rows[index >= 0], index[index >= 0]
    found = torch.zeros(total, dtype=torch.bool, device=places.device)
    found[places] = True
    wanted = found if needed is None else found[torch.tensor(needed, device=places.device)]
    if not wanted.all():
        raise ValueError(f"features for {int(wanted.sum())} of {len(wanted)} places")
    ordered = kept.new_zeros((total, kept.shape[1]))
    ordered[places] = kept
    return ordered
