"""The data options of a run. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from priorclip.data_shards.corpus import Shards, corpora

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass
class RandAugmentConfig:
    """RandAugment as in X-VLM and PIR, by timm; see data_shards/images/randaugment.py.

    Args:
        layers: operations that are drawn for an image, of ten kinds
        magnitude: strength of the operations, of 10
        probability: with which each drawn operation is applied
    """

    layers: int = 2
    magnitude: float = 7.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"data.randaugment.layers must be at least 1, not {self.layers}: null turns it off")
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"data.randaugment.magnitude must be between 0 and 10, not {self.magnitude}")
        if not 0 < self.probability <= 1:
            raise ValueError(f"data.randaugment.probability must be above 0 and at most 1, not {self.probability}")


@dataclass
class DataConfig:
    """Which shards to stream, and how.

    Args:
        shards: folder, braceexpand pattern or list of them, e.g. "data/{pub11,rs3}-train-{0000..0031}.tar";
            local path, http(s)://, s3://, gs://, hf:// or pipe: (a remote folder has a manifest and ends in a slash);
            or several corpora with weights, the passes in an epoch: {"data/pub11": 1, "data/rs3": 2.5}, or
            [{shards: data/pub11, weight: 1}, ...]
        caption_field: list of captions in KEY.json: captions or coarse_captions
        captions: one draws a random caption of each image, so an epoch has each image once; all makes every pair of an
            image and a caption a sample of the epoch, so an image with 5 captions comes 5 times. all reads every text
            once at the start and needs local shards
        balance: none gives each sample once an epoch; scenes gives each scene as many samples as any other, so those
            of a small scene come more often. scenes reads every text once at the start and needs local shards
        image_size: side of the square image given to the model, in pixels; null takes the model's
        scale: smallest share of the image area that a random crop keeps (1.0: no random crop)
        hflip: mirror left to right with probability 0.5
        vflip: mirror top to bottom with probability 0.5
        rot90: rotate by a random multiple of 90 degrees, because an aerial image has no up
        randaugment: operations on colour and shape after the flips, e.g. {layers: 2, magnitude: 7}; null for none
        classes: scene classes in the order of their label ids; null takes those of the manifest
        block_size: samples in a block of neighbours, which the shuffle keeps in one window; smaller shuffles better
        window_blocks: blocks from all shards whose samples are shuffled together; more shuffles better, but needs more
            open shards and a larger cache
        order: stored keeps the order of an epoch in memory, 24 bytes for each block in every decoding process; keyed
            computes it for each batch and keeps nothing; auto is stored up to 50 million samples. A resumed run keeps
            the one that it began with
        workers: decoding processes of each rank (0 decodes in the training process)
        prefetch: batches that each worker prepares ahead
        start_method: how workers start: forkserver is safe with torch.distributed, MPI and CUDA; fork starts faster
        pin_memory: copy batches to pinned memory, from which a GPU reads while it computes; null: if there is a GPU
        keep_pixels: size of the decoded images that each decoding process keeps in memory, e.g. 2GB, so that later
            epochs neither read nor decode them; 0 keeps none. It needs scale 1. With several workers each of them
            needs room for all images: width x height x 3 bytes each
        max_pixels: images with more pixels are refused before they are decoded
        check_hashes: compare each image with the SHA-256 that packing recorded
        max_bad_share: the run stops if more than this share of an epoch's samples is bad; counted from the start or
            resume of the run, on each rank with a margin for chance
        quarantine: JSON-lines file to which each bad sample is appended once (shard, key, reason); null is
            quarantine.jsonl in the run directory
        cache: folder for this node's copies of remote shards, shared by its ranks; null is ~/.cache/data_shards
        cache_limit: largest size of the image data there, e.g. 50GB or 200GiB; the least recently used data is deleted
            first; 0 keeps none, and each sample is transferred once an epoch over all nodes
        read_ahead: concurrent requests of each worker for remote samples (0: one sample at a time)
        timeout: seconds for one request to a remote shard, with its body, and for a pipe: command without output; the
            run ends if failed reads take a batch more than four times as long
        caption_noise: share of the samples that get the captions of another sample in training, to measure robustness
            to wrong pairs; the same images in every epoch, see data_shards/stream/semantic_noise.py
        label_noise: share of the samples that get another scene class in training
    """

    shards: Shards
    caption_field: str = "captions"
    captions: str = "one"
    balance: str = "none"
    image_size: int | None = None
    scale: float = 0.5
    hflip: bool = True
    vflip: bool = True
    rot90: bool = True
    randaugment: RandAugmentConfig | None = None
    classes: list[str] | None = None
    block_size: int = 32
    window_blocks: int = 2048
    order: str = "auto"
    workers: int = 2
    prefetch: int = 2
    start_method: str = "forkserver"
    pin_memory: bool | None = None
    keep_pixels: int | str = 0
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
        if self.captions not in ("one", "all"):
            raise ValueError(
                f"data.captions must be one or all, not {self.captions!r}; data.caption_field names the field"
            )
        if self.balance not in ("none", "scenes"):
            raise ValueError(f"data.balance must be none or scenes, not {self.balance!r}")
        if self.order not in ("auto", "stored", "keyed"):
            raise ValueError(f"data.order must be auto, stored or keyed, not {self.order!r}")
        if self.balance == "scenes" and self.captions == "all":
            raise ValueError(
                "data.balance: scenes needs data.captions: one, because all gives each caption once an epoch"
            )
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale must be above 0 and at most 1, not {self.scale} (share of the image area)")
        for name in ("max_bad_share", "caption_noise", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be between 0 and 1, not {getattr(self, name)}")
        byte_count(self.cache_limit)
        if byte_count(self.keep_pixels, "keep_pixels") and self.scale < 1:
            raise ValueError(
                f"data.keep_pixels needs data.scale 1, not {self.scale}: a random crop is another picture in each epoch"
            )
        if not 0 <= self.read_ahead <= 256:
            raise ValueError(f"data.read_ahead must be between 0 and 256, not {self.read_ahead}")
        if not self.timeout > 0:
            raise ValueError(f"data.timeout must be above 0 seconds, not {self.timeout}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be at least 0, not {self.workers}")
        if self.start_method not in ("forkserver", "fork", "spawn"):
            raise ValueError(f"data.start_method must be forkserver, fork or spawn, not {self.start_method!r}")

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
        """The keywords of ShardSet that say how shards are read."""
        names = ("cache", "cache_limit", "timeout", "read_ahead")
        return {name: getattr(self, name) for name in names}


@dataclass
class EvaluationConfig:
    """Evaluation during training, on shards that are not trained on.

    Args:
        shards: the held-out shards; null for none
        caption_field: list of captions in KEY.json
        batch_size: images, and texts, that a rank encodes at a time
    """

    shards: str | list[str] | None = None
    caption_field: str = "captions"
    batch_size: int = 64


def byte_count(text: int | str, option: str = "cache_limit") -> int:
    """ "50GB" -> 50 * 10**9, "1.5GiB", 4096. Raises ValueError, which names the option of the data."""
    if isinstance(text, int):
        count = text
    else:
        number = text.strip().rstrip("BKMGTibkmgt")
        unit = text.strip()[len(number) :].upper()
        try:
            count = int(float(number) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f"data.{option}: {text!r} is not a size: write for example 50GB, 512MiB or 0") from None
    if count < 0:
        raise ValueError(f"data.{option}: {text!r} is negative: write for example 50GB, 512MiB or 0")
    return count
