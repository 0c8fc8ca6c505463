"""What a run says about its data: one dataclass, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from priorclip.data_shards.corpus import Shards, corpora

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass
class DataConfig:
    """Which shards to stream, and how.

    Args:
        shards: folder, braceexpand pattern or list of them, e.g. "data/{pub11,rs3}-train-{0000..0031}.tar";
            local path, http(s)://, s3://, gs://, hf:// or pipe: (a remote folder with a manifest ends in a slash); or
            several corpora and how often an epoch passes over each: {"data/pub11": 1, "data/rs3": 2.5}, or
            [{shards: data/pub11, weight: 1}, ...]
        caption_field: list in KEY.json that captions are drawn from: captions or coarse_captions
        image_size: side of the square image given to the model, in pixels; null takes the model's
        scale: smallest share of the image's area that a random crop keeps (1.0: no random crop)
        hflip: mirror left to right half of the time
        vflip: mirror top to bottom half of the time
        rot90: turn by a random multiple of 90 degrees; an aerial image has no up
        classes: scene classes in the order of their label ids; null takes them from the manifest
        block_size: samples in a block, a run of neighbours that the shuffle keeps in one window; fewer shuffle better
        window_blocks: blocks, from all over the shards, whose samples are shuffled together; more shuffle better, and
            keep more shards open and more bytes in caches at a time
        workers: decoding processes a rank (0 decodes in the training process)
        prefetch: batches that each worker keeps ready
        start_method: how workers start: forkserver is safe beside torch.distributed, MPI and CUDA; fork starts faster
        pin_memory: copy batches to page-locked memory, for GPUs
        max_pixels: images with more pixels than this are refused before they are decoded
        check_hashes: compare each image with the sha256 that packing recorded
        max_bad_share: the run stops when more than this share of an epoch's samples is bad; counted from the start or
            resume of the run, and for several ranks on each, which allows for the luck of the draw
        quarantine: JSON-lines file to which each bad sample is appended once (shard, key, reason); null is
            quarantine.jsonl in the run directory
        cache: folder for the node's copies of remote shards, shared by its ranks; null is ~/.cache/data_shards
        cache_limit: bytes of image data kept there, e.g. 50GB or 200GiB; what was used longest ago goes first; 0 keeps
            none, so that each sample travels once an epoch over all nodes
        read_ahead: requests for remote samples that each worker has under way (0: one sample after the other)
        timeout: seconds that one request to a remote shard may take, its body included
        caption_noise: share of the samples that get the captions of another one while training, the same in every
            epoch: how robust is the training to wrong pairs? The share of the seed's order, see
            data_shards/stream/semantic_noise.py
        label_noise: share of the samples that get another scene class while training
    """

    shards: Shards
    caption_field: str = "captions"
    image_size: int | None = None
    scale: float = 0.5
    hflip: bool = True
    vflip: bool = True
    rot90: bool = True
    classes: list[str] | None = None
    block_size: int = 32
    window_blocks: int = 2048
    workers: int = 2
    prefetch: int = 2
    start_method: str = "forkserver"
    pin_memory: bool = False
    max_pixels: int = 100_000_000
    check_hashes: bool = False
    max_bad_share: float = 0.01
    quarantine: str | None = None
    cache: str | None = None
    cache_limit: int | str = "50GB"
    read_ahead: int = 16
    timeout: float = 60.0
    caption_noise: float = 0.0
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        corpora(self.shards)
        positive = ("image_size", "block_size", "window_blocks", "prefetch", "max_pixels")
        for name in positive:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale is a share of the image's area: 0 < scale <= 1, not {self.scale}")
        for name in ("max_bad_share", "caption_noise", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be between 0 and 1, not {getattr(self, name)}")
        byte_count(self.cache_limit)
        if not 0 <= self.read_ahead <= 256:
            raise ValueError(f"data.read_ahead must be between 0 and 256, not {self.read_ahead}")
        if not self.timeout > 0:
            raise ValueError(f"data.timeout is a number of seconds above 0, not {self.timeout}")
        if self.workers < 0:
            raise ValueError(f"data.workers must not be negative, but is {self.workers}")
        if self.start_method not in ("forkserver", "fork", "spawn"):
            raise ValueError(f"data.start_method: forkserver, fork or spawn, not {self.start_method!r}")

    def follow(self, image_size: int, run_dir: str) -> None:
        """Sets the options that are null and follow from others of the run: the image size and the quarantine file."""
        self.image_size = self.image_size or image_size
        self.quarantine = self.quarantine or f"{run_dir}/quarantine.jsonl"

    @property
    def side(self) -> int:
        """``image_size`` in pixels; 224 if it is null, as it is without a model."""
        return self.image_size or 224

    @property
    def access(self) -> dict[str, Any]:
        """How shards are opened, as keywords of ShardSet."""
        names = ("cache", "cache_limit", "timeout", "read_ahead")
        return {name: getattr(self, name) for name in names}


@dataclass
class EvaluationConfig:
    """Evaluation while training, on shards the training does not see.

    Args:
        shards: the held-out shards; null for none
        caption_field: list in KEY.json with the captions
        batch_size: images, and texts, a rank encodes at a time
    """

    shards: str | list[str] | None = None
    caption_field: str = "captions"
    batch_size: int = 64


def byte_count(text: int | str) -> int:
    """ "50GB" -> 50 * 10**9, "1.5GiB", 4096. Raises ValueError."""
    if isinstance(text, int):
        count = text
    else:
        number = text.strip().rstrip("BKMGTibkmgt")
        unit = text.strip()[len(number) :].upper()
        try:
            count = int(float(number) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(
                f"data.cache_limit: {text!r} is no number of bytes: write e.g. 50GB, 512MiB, or 0"
            ) from None
    if count < 0:
        raise ValueError(f"data.cache_limit: {text!r}: a number of bytes is not negative")
    return count
