"""Recall of a model on batches: encode every image and every caption once, put the features in order, compare.

    figures = evaluate_retrieval(model, batches, device)              # one process
    figures = evaluate_retrieval(engine, batches, device, gather)     # each rank encodes its share

``batches`` is anything with ``images()``, ``texts()``, ``captions``, ``text_image`` and ``image_count``, as
data_shards.eval_batches gives; ``gather(rows)`` gives the rows of all ranks. Pictures ask for ``pixels`` and ``scenes``
of a few images besides.
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
    """What is evaluated. Index -1 marks padding."""

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
    """Recalls in percent, as model.recall.retrieval_metrics names them.

    Args:
        forward: the model, in eval mode, or the DeepSpeed engine around it
        batches: of this rank
        device: where the model is
        gather: joins the ranks' rows; None: this process has them all
    """
    images = encode_images(forward, batches, device, gather)
    texts = encode_texts(forward, batches, device, gather)
    return retrieval_metrics(images, texts, torch.as_tensor(batches.text_image))


def encode_images(forward: Forward, batches: Batches, device: torch.device, gather: Gather | None = None) -> Tensor:
    """L2-normalised features of all images in their order, (I, d) float32."""
    encoded = (
        (forward(images=batch["images"].to(device))["image_features"], batch["index"]) for batch in batches.images()
    )
    return in_order(encoded, batches.image_count, gather)


def encode_texts(forward: Forward, batches: Batches, device: torch.device, gather: Gather | None = None) -> Tensor:
    """L2-normalised features of all captions in their order, (T, d) float32.

    Captions of the same words get the same feature, to the last bit, whatever batch they stood in: rounding must not
    decide which of two equal captions ranks first.
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
    features = in_order(encoded, len(batches.captions), gather)
    first = {caption: place for place, caption in reversed(list(enumerate(batches.captions)))}
    return features[torch.tensor([first[caption] for caption in batches.captions], device=features.device)]


@torch.no_grad()
def in_order(encoded: Iterable[tuple[Tensor, Tensor]], total: int, gather: Gather | None) -> Tensor:
    """Rows (n, d) with their places (n,), batch by batch, -> (total, d) float32."""
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for features, index in encoded:
        rows.append(features.float())
        places.append(index.to(features.device))
    found, where = torch.cat(rows), torch.cat(places)
    if gather is not None:
        found, where = gather(found), gather(where)
    return place_rows(found, where, total)


def place_rows(rows: Tensor, index: Tensor, total: int) -> Tensor:
    """``rows (n, d)`` at ``index (n,)``, -1 left out, -> (total, d). Raises ValueError where a place has no row."""
    kept, where = rows[index >= 0], index[index >= 0]
    if len(where.unique()) != total:
        raise ValueError(f"features for {len(where.unique())} of {total} places")
    ordered = kept.new_empty((total, kept.shape[1]))
    ordered[where] = kept
    return ordered
