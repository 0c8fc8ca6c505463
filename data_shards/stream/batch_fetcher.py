"""Makes one batch from positions of an epoch: reads, decodes, augments, tokenizes. Runs in the worker processes.

A bad sample is replaced by another one of its corpus, drawn by (seed, epoch, position, attempt). So every rank keeps
its batch size, and the replacement is the same after a resume. The list of bad samples goes with the batch to the
training process.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from priorclip.data_shards.config import DataConfig, byte_count
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.data_shards.format.sample import BadSample, Sample
from priorclip.data_shards.images.randaugment import rand_augment
from priorclip.data_shards.images.transforms import eval_transform, flip_and_turn, random_crop
from priorclip.data_shards.order.balanced_scenes import BalancedScenes
from priorclip.data_shards.order.caption_pairs import CaptionPairs
from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.order.mixture import Draw, MixedOrder, Mixture, MixturePart
from priorclip.data_shards.stream.count_captions import count_pairs
from priorclip.data_shards.stream.group_scenes import group_scenes
from priorclip.data_shards.stream.kept_samples import DecodedSample, KeptSamples
from priorclip.data_shards.stream.semantic_noise import SemanticNoise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUGMENTATION, REPLACEMENT = 3, 4
ATTEMPTS = 100
MOST_STORED = 1 << 30  # samples
STORED = 50_000_000  # samples whose order `data.order: auto` keeps in memory: 38 MB in each decoding process
LONGEST_TOKEN = 64  # characters; longer than any token of a vocabulary of words
BAD_ROWS = "bad_rows"

Position = tuple[int, int]  # (epoch, position in the epoch)


class SampleSource(Protocol):
    """The samples of a stream: ShardSet or RecordSet."""

    sizes: list[int]
    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, sample: int) -> Sample: ...
    def name(self, sample: int) -> tuple[str, str]: ...
    def text(self, sample: int) -> Sample: ...
    def captions(self, sample: int, caption_field: str = "captions") -> list[str]: ...
    @property
    def fingerprint(self) -> str: ...


class BatchFetcher(Dataset):
    """A map-style dataset whose item is a whole batch: DataLoader calls ``__getitems__`` with the batch's positions.

    Args:
        source: samples
        tokenizer: transformers tokenizer, or None for images and labels only
        config: see DataConfig
        seed: seed of the run
        train: True for random crop, flips and caption and the noise of the config; False for the centred square and
            the first caption
    """

    def __init__(
        self,
        source: SampleSource,
        tokenizer: PreTrainedTokenizerBase | None,
        config: DataConfig,
        seed: int,
        train: bool,
    ) -> None:
        self.source, self.tokenizer, self.config, self.seed, self.train = source, tokenizer, config, seed, train
        classes = config.classes if config.classes is not None else source.classes
        self.class_ids = ClassIds(classes)
        parts = getattr(source, "parts", None) or [MixturePart(source.sizes)]
        self.pairs = self.count_pairs() if config.captions == "all" else None
        self.balanced = self.balance_scenes(parts) if config.balance == "scenes" else None
        if self.pairs:
            parts = self.pairs.parts(parts)
        elif self.balanced:
            parts = self.balanced.parts(parts[0].weight)
        self.mixture = Mixture(parts, seed, config.block_size, config.window_blocks, is_keyed(config, parts))
        shares = (config.caption_noise, config.label_noise) if train else (0, 0)
        self.noise = SemanticNoise(seed, len(source), *shares)
        self.kept = KeptSamples(byte_count(config.keep_pixels, "keep_pixels"))

    def count_pairs(self) -> CaptionPairs:
        """Returns the pairs for data.captions: all. Raises ValueError if there are no captions or shards are remote."""
        if self.tokenizer is None:
            raise ValueError("data.captions: all makes a sample of each caption, but this training reads no captions")
        return count_pairs(self.source, self.config.caption_field)

    def balance_scenes(self, parts: Sequence[MixturePart]) -> BalancedScenes:
        """Returns the samples by scene for data.balance: scenes. Raises ValueError if that is impossible."""
        if len(parts) > 1:
            raise ValueError(
                "data.balance: scenes decides how often a sample comes, and so do the weights of several corpora in "
                "data.shards: list their shards as one corpus"
            )
        return group_scenes(self.source, self.class_ids)

    def order(self, epoch: int) -> MixedOrder:
        """Returns the place at each position of an epoch: a sample index, or a pair with data.captions: all."""
        return MixedOrder(self.mixture, epoch)

    def image_of(self, place: int) -> int:
        """Returns the sample index of a place."""
        if self.balanced:
            return self.balanced.locate(place)
        return self.pairs.locate(place)[0] if self.pairs else place

    def __getitems__(self, positions: Sequence[Position]) -> dict[str, Any]:
        """Returns one batch with the keys of ShardStream; ``bad_rows`` lists the replaced samples."""
        bad_rows: list[dict[str, str]] = []
        size = self.config.side
        images = pixel_buffer((len(positions), 3, size, size))
        pixels = images.numpy()
        captions, labels, ids = [], [], []
        draws = self.mixture.draws(positions)
        coming = (self.image_of(draw.sample) for draw in draws)
        prefetch_samples(self.source, (sample for sample in coming if sample not in self.kept))
        for row, (position, draw) in enumerate(zip(positions, draws, strict=True)):
            sample, pixels[row], label, caption = self.fetch(position, draw, bad_rows)
            ids.append(sample)
            labels.append(label)
            captions.append(caption)
        batch: dict[str, Any] = {
            "images": images,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_ids": torch.tensor(ids, dtype=torch.int64),
            "epoch": positions[0][0],
            BAD_ROWS: bad_rows,
        }
        if self.tokenizer is not None:
            batch |= tokenize(self.tokenizer, captions)
        return batch

    def fetch(
        self, place_in_epoch: Position, draw: Draw, bad_rows: list[dict[str, str]]
    ) -> tuple[int, NDArray[np.uint8], int, str]:
        """Returns (sample index, pixels, label id or -1, caption) of a drawn sample, or of its replacement."""
        (epoch, position), (corpus, pass_number, place) = place_in_epoch, draw
        for attempt in range(ATTEMPTS):
            index = self.image_of(place)
            try:
                return index, *self.prepare(pass_number, place)
            except BadSample as error:
                shard, key = self.source.name(index)
                why = {"reason": error.reason, "detail": error.detail}
                bad_rows.append({"sample": str(index), "shard": shard, "key": key, **why})
            place = self.mixture.substitute(corpus, hash_integers(self.seed, epoch, REPLACEMENT, position, attempt))
        shards = ", ".join(sorted({row["shard"] for row in bad_rows})[:5])
        reason = bad_rows[-1]["reason"]
        raise RuntimeError(
            f"{ATTEMPTS} samples in a row are bad ({reason}): run `data_shards verify --decode true` on {shards}"
        )

    def prepare(self, pass_number: int, place: int) -> tuple[NDArray[np.uint8], int, str]:
        """Returns pixels, label id and caption of a place, which depend on (seed, pass of its corpus, place)."""
        rng = random.Random(hash_integers(self.seed, pass_number, AUGMENTATION, place))
        draw = rng.random() if self.train else 0.0
        index, number = self.pairs.locate(place) if self.pairs else (self.image_of(place), None)
        sample = self.kept.get(index) or self.load(index, rng)
        caption = choose_caption(sample.texts, draw, number)
        pixels = self.augment(sample.pixels, rng) if self.train else sample.pixels
        return pixels, sample.label, caption

    def augment(self, pixels: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
        """Flips and turns an image (3, S, S) and changes its colours and shape, as the config says."""
        config, more = self.config, self.config.randaugment
        pixels = flip_and_turn(pixels, rng, hflip=config.hflip, vflip=config.vflip, rot90=config.rot90)
        if more is None:
            return pixels
        return rand_augment(pixels, rng, layers=more.layers, magnitude=more.magnitude, probability=more.probability)

    def load(self, index: int, rng: random.Random) -> DecodedSample:
        """Reads and decodes a sample, and keeps it if the config says so. Raises BadSample."""
        sample = self.source.read(index)
        texts = self.texts(sample, index) if self.tokenizer is not None else []
        if self.config.check_hashes:
            check_hash(sample)
        pixels = self.decode(sample.image, rng)
        label = self.noise.label(index, self.class_ids[sample.label], len(self.class_ids))
        decoded = DecodedSample(pixels, texts, label)
        self.kept.add(index, decoded)
        return decoded

    def texts(self, sample: Sample, index: int) -> list[str]:
        """Returns the captions of a sample, or those of another one if it is noisy. Raises BadSample."""
        donor = self.noise.caption_source(index)
        name = self.config.caption_field
        return sample.texts(name) if donor == index else self.source.captions(donor, name)

    def decode(self, data: bytes, rng: random.Random) -> NDArray[np.uint8]:
        """Returns the resized image: a random crop of it in training. Raises BadSample."""
        config = self.config
        if self.train:
            return random_crop(data, config.side, rng, scale=config.scale, max_pixels=config.max_pixels)
        return eval_transform(data, config.side, max_pixels=config.max_pixels)


def is_keyed(config: DataConfig, parts: Sequence[MixturePart]) -> bool:
    """Tells whether the order of an epoch is computed, not stored.

    Raises ValueError if data.order is stored and the order takes more memory than a process should need.
    """
    samples = sum(part.samples for part in parts)
    if config.order == "stored" and samples > MOST_STORED:
        gigabytes = 24e-9 * samples / config.block_size
        raise ValueError(
            f"data.order: stored would take {gigabytes:.1f} GB in every decoding process for {samples} samples: set "
            "data.order to keyed, or to auto"
        )
    return config.order == "keyed" or (config.order == "auto" and samples > STORED)


def choose_caption(texts: list[str], draw: float, number: int | None) -> str:
    """Returns the caption of a number, or the one that ``draw`` in [0, 1) picks. "" if there are none.

    A noisy image has the captions of another one, which may have fewer: the numbers then start again.
    """
    if not texts:
        return ""
    return texts[int(draw * len(texts)) if number is None else number % len(texts)]


def pixel_buffer(shape: tuple[int, ...]) -> torch.Tensor:
    """Returns an uninitialized uint8 tensor; in a worker it is in shared memory, which saves a later copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def prefetch_samples(source: Any, samples: Iterable[int], images: bool = True) -> None:
    """Tells a source that can read ahead which samples are read next, in this order."""
    prefetch = getattr(source, "prefetch", None)
    if prefetch is not None:
        prefetch(samples, images)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, int64 (b, T), padded to the tokenizer's ``model_max_length``."""
    longest = LONGEST_TOKEN * tokenizer.model_max_length  # the rest would be cut off anyway, and costs a second per MB
    texts = [text[:longest] for text in texts]
    # Lists, because return_tensors loops over all tokens in Python: a fifth of a batch's time at 256 pixels.
    # numpy converts lists three times as fast as torch.
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    names = ("input_ids", "attention_mask")
    return {name: torch.from_numpy(np.array(encoded[name], np.int64)) for name in names}


def check_hash(sample: Sample) -> None:
    recorded = sample.info.get("sha256")
    if recorded and hashlib.sha256(sample.image).hexdigest() != recorded:
        raise BadSample("image differs from its hash", f"recorded {recorded}")
