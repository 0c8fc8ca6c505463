"""Evaluation batches: every image and every distinct caption once; the same number of batches on every rank.

    batches = eval_batches(shards, tokenizer, 224, 64, rank, world_size)
    for batch in batches.images(): ...   # images uint8 (b, 3, S, S), index (b,), labels (b,)
                                         # with bands: images float32 (b, B, S, S), measured values
    for batch in batches.texts(): ...    # input_ids, attention_mask (b, T), index (b,), image_index (b,)
    batches.text_image                   # (captions,) the image index of each caption

Equal captions come once, at the index of the first of them. Captions of similar length are in one batch, so that a
model can cut most of the padding. Rank r takes items r, r + W, ...; the last batches are padded with index -1, so that
all ranks make the same collectives. With ``whole``, rank r takes batches r, r + W, ... of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from priorclip.common.output import get_logger
from priorclip.common.progress import Progress
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import MAX_PIXELS, SeenPart, centred_square, crop_and_resize
from priorclip.data_shards.sources import Record, RecordSet
from priorclip.data_shards.stream.batch_fetcher import SampleSource, prefetch_samples, tokenize
from priorclip.data_shards.stream.truths import Boxes, Kind, Truths, stack_boxes
from priorclip.data_shards.stream.workers import load_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

PADDING = -1
READ_TOGETHER = 1024  # captions that are prefetched together


class ImageFetcher(Dataset):
    """Batches of images by index; -1 gives a black image. With ``skip_bad``, a bad image becomes -1 too."""

    def __init__(
        self,
        source: SampleSource,
        size: int,
        classes: list[str],
        max_pixels: int,
        skip_bad: bool,
        truth: Kind | None = None,
        bands: Sequence[str] | None = None,
    ) -> None:
        self.source, self.size, self.max_pixels, self.skip_bad = source, size, max_pixels, skip_bad
        self.bands = None if bands is None else tuple(bands)
        self.class_ids = ClassIds(classes)
        self.truths = Truths(source, truth, size, max_pixels) if truth else None

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        channels, dtype = (3, np.uint8) if self.bands is None else (len(self.bands), np.float32)
        images: NDArray[Any] = np.zeros((len(indices), channels, self.size, self.size), dtype)
        labels = np.full(len(indices), -1, np.int64)
        kept = np.array(indices, dtype=np.int64)
        kind = self.truths.kind if self.truths else None
        masks = np.zeros((len(indices) if kind == "masks" else 0, self.size, self.size), np.uint8)
        boxes: list[Boxes] = [np.zeros((0, 4), np.float32)] * len(indices)
        prefetch_samples(self.source, (index for index in indices if index != PADDING))
        for row, index in enumerate(indices):
            if index == PADDING:
                continue
            try:
                sample = self.source.read(index)
                part = SeenPart(centred_square)
                images[row] = crop_and_resize(sample.image, self.size, part, self.max_pixels, self.bands)
                if self.truths and kind == "masks":
                    masks[row] = self.truths.mask(index, part)[0]
                elif self.truths:
                    boxes[row] = self.truths.boxes(index, part)
                labels[row] = self.class_ids[sample.label]
            except BadSample as error:
                shard, key = self.source.name(index)
                if not self.skip_bad:
                    raise ValueError(f"evaluation image {key} of {shard} cannot be used: {error}") from error
                log.warning("evaluation image %s of %s is skipped: %s", key, shard, error)
                kept[row] = PADDING
        batch = {
            "images": torch.from_numpy(images),
            "index": torch.from_numpy(kept),
            "labels": torch.from_numpy(labels),
        }
        if kind:
            batch[kind] = torch.from_numpy(masks if kind == "masks" else stack_boxes(boxes))
        return batch


class EvalBatches:
    """Batches of one rank over all images, and over all captions.

    Attributes:
        captions: all captions; those of one image are neighbours
        text_image: int64 (captions,), the image index of each caption
        distinct: the index of the first of all equal captions, from the shortest caption to the longest
        classes: scene classes in the order of the label ids
    """

    def __init__(
        self,
        source: SampleSource,
        tokenizer: PreTrainedTokenizerBase | None,
        fetcher: ImageFetcher,
        batch_size: int,
        rank: int,
        world_size: int,
        caption_field: str,
        workers: int,
        whole: bool = False,
    ) -> None:
        self.source, self.tokenizer, self.fetcher, self.batch_size = source, tokenizer, fetcher, batch_size
        self.rank, self.world_size, self.workers, self.whole = rank, world_size, workers, whole
        self.classes = fetcher.class_ids.names
        self.captions: list[str] = []
        owners: list[int] = []
        if tokenizer is not None:
            for index in range(len(source)):
                if index % READ_TOGETHER == 0:
                    prefetch_samples(source, range(index, min(index + READ_TOGETHER, len(source))), images=False)
                texts = require_captions(source, index, caption_field)
                self.captions += texts
                owners += [index] * len(texts)
        self.text_image = np.array(owners, dtype=np.int64)
        first = {caption: index for index, caption in reversed(list(enumerate(self.captions)))}
        self.distinct = [first[caption] for caption in sorted(first, key=lambda caption: (len(caption), caption))]

    @property
    def image_count(self) -> int:
        return len(self.source)

    @property
    def text_count(self) -> int:
        """Number of the captions that texts() yields."""
        return len(self.distinct)

    def keys(self) -> list[str]:
        """Returns the key of each image."""
        return [self.source.name(index)[1] for index in range(len(self.source))]

    def images(self, title: str = "images", done: Set[int] = frozenset()) -> Iterator[dict[str, torch.Tensor]]:
        """Yields images as the fetcher gives them, index int64 (b,), labels int64 (b,); as many batches on all ranks
        unless the batches are whole.

        With a truth it also yields masks uint8 (b, S, S), or boxes float32 (b, n, 4), as ShardStream does.

        Rank 0 shows the progress of all ranks under ``title``. Whole batches with a number in ``done`` are left out.
        """
        batches = load_batches(self.fetcher, self._plan(range(self.image_count), done), self.workers)
        left = self.image_count - sum(min(self.batch_size, self.image_count - n * self.batch_size) for n in done)
        yield from self._counted(batches, left, title, "image")

    def image_numbers(self, done: Set[int] = frozenset()) -> list[int | None]:
        """Returns the number of each whole batch that ``images`` yields, as one process counts them; None: padding."""
        plan = self._plan(range(self.image_count), done)
        return [batch[0] // self.batch_size if batch[0] != PADDING else None for batch in plan]

    def texts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields input_ids and attention_mask int64 (b, T), index and image_index int64 (b,), of ``distinct``."""
        yield from self._counted(self._texts(), self.text_count, "captions", "caption")

    def _texts(self) -> Iterator[dict[str, torch.Tensor]]:
        assert self.tokenizer is not None, "texts() needs a tokenizer"
        for indices in self._plan(self.distinct):
            index = np.array(indices, dtype=np.int64)
            texts = [self.captions[i] if i != PADDING else "" for i in indices]
            owner = np.where(index == PADDING, PADDING, self.text_image[index])
            extra = {"index": torch.from_numpy(index), "image_index": torch.from_numpy(owner)}
            yield tokenize(self.tokenizer, texts) | extra

    def _counted(
        self, batches: Iterable[dict[str, torch.Tensor]], total: int, title: str, unit: str
    ) -> Iterator[dict[str, torch.Tensor]]:
        with Progress(total, title, unit, shown=self.rank == 0) as progress:
            for batch in batches:
                yield batch
                progress.update(min(self.batch_size * self.world_size, total - progress.done))

    def pixels(self, images: list[int]) -> torch.Tensor:
        """Reads a few images in this process: uint8 (n, 3, S, S), or float32 (n, B, S, S) of bands."""
        return self.fetcher.__getitems__(images)["images"]

    def scenes(self, images: list[int]) -> list[str]:
        """Returns the scene names of a few images without reading the images; "" for none."""
        return [self.source.text(image).label or "" for image in images]

    def _plan(self, items: Sequence[int], done: Set[int] = frozenset()) -> list[list[int]]:
        """Returns the indices of this rank's batches, padded with -1 to the same number on every rank.

        Whole batches are padded to their size only; a rank for which none is left has one of padding. Those in ``done``
        are left out.
        """
        if self.whole:
            size = self.batch_size
            filled = [*items, *[PADDING] * (-len(items) % size)]
            numbers = [number for number in range(len(filled) // size) if number not in done]
            mine = numbers[self.rank :: self.world_size]
            return [filled[n * size : (n + 1) * size] for n in mine] or [[PADDING] * size]
        rounds = -(-len(items) // (self.batch_size * self.world_size))
        indices = list(items[self.rank :: self.world_size])
        indices += [PADDING] * (rounds * self.batch_size - len(indices))
        return [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]


def eval_batches(
    source: SampleSource | Iterable[Record],
    tokenizer: PreTrainedTokenizerBase | None,
    image_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    caption_field: str = "captions",
    classes: list[str] | None = None,
    workers: int = 0,
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    truth: Kind | None = None,
    bands: Sequence[str] | None = None,
    whole: bool = False,
) -> EvalBatches:
    """Returns batches for an evaluation: every image once, as the centred square, with all its captions.

    Args:
        source: ShardSet, RecordSet, or the records of an annotation file (``sources.karpathy(...)``)
        tokenizer: transformers tokenizer; None for images and labels only
        image_size: side of the square in pixels
        batch_size: items of one rank
        rank: rank of this process
        world_size: number of ranks
        caption_field: captions or coarse_captions
        classes: classes in the order of their label ids; None takes those of the source
        workers: decoding processes
        skip_bad: give a bad image the index -1 and do not raise. Off by default, because results on fewer images are
            not comparable
        max_pixels: images with more pixels are bad
        truth: also yield the masks or the boxes of the images, see truths.py
        bands: bands of TIFFs of measured values, in the order of the channels; None reads pictures
        whole: ranks share whole batches, which have the same items for every number of ranks

    Raises:
        ValueError: an image is bad, a sample has no caption, or there is no such truth; it names the sample
    """
    samples = source if hasattr(source, "read") else RecordSet(list(source))  # type: ignore[arg-type]
    names = classes if classes is not None else samples.classes  # type: ignore[union-attr]
    fetcher = ImageFetcher(samples, image_size, names, max_pixels, skip_bad, truth, bands)  # type: ignore[arg-type]
    return EvalBatches(
        samples,  # type: ignore[arg-type]
        tokenizer,
        fetcher,
        batch_size,
        rank,
        world_size,
        caption_field,
        workers,
        whole,
    )


def require_captions(source: SampleSource, index: int, caption_field: str) -> list[str]:
    """Returns the captions of a sample. Raises ValueError, which names the sample, if it has none."""
    try:
        return source.captions(index, caption_field)
    except BadSample as error:
        shard, key = source.name(index)
        raise ValueError(f"evaluation sample {key} of {shard} has no caption: {error}") from error
