"""The options that several commands of `python -m retrieval` share: the test set, and the model that encodes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


def listed(words: str) -> list[str]:
    """Returns the names in a text of names and commas, each once."""
    return list(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))


def refuse_unknown(option: str, words: str, noun: str, known: Sequence[str]) -> None:
    """Raises ValueError if ``words`` names something that is not in ``known``."""
    for name in listed(words):
        if name not in known:
            raise ValueError(f"{option} {words}: '{name}' is no {noun}; the {noun}s are {', '.join(known)}")


@dataclass(kw_only=True)
class TestSetConfig:
    """Images, their captions, and how to encode them.

    Args:
        data: Karpathy JSON; or shards: a folder, tars, or a pattern such as "test-{000..007}.tar"; or a folder of scene
            folders, which is the layout of AID, RESISC45, EuroSAT and UC Merced
        images: folder of the image files that the Karpathy JSON names
        split: split of the Karpathy JSON, or "all"; null takes "test" if the file has it, otherwise all. In a folder of
            scene folders: the sub-folder that holds them; null takes "test" if there is "train" too
        limit: use only the first images, this many
        batch_size: images, or captions, in a batch
        device: auto uses the GPU if there is one
        precision: number format of the activations
        workers: decoding processes; 0 decodes in the main process
        max_pixels: images with more pixels are refused before they are decoded
        max_bad_share: stop if a larger share of the images cannot be used
    """

    __test__ = False  # pytest takes the name for a test

    data: str
    images: str | None = None
    split: str | None = None
    limit: int | None = None
    batch_size: int = 64
    device: Device = "auto"
    precision: Precision = "fp32"
    workers: int = 0
    max_pixels: int = 100_000_000
    max_bad_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, not {self.workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share must be between 0 and 1, not {self.max_bad_share}")


@dataclass(kw_only=True)
class GalleryConfig(TestSetConfig):
    """A model and the images that it encodes.

    Args:
        model: export folder of a PriorCLIP or PriorITR, written by training or save_pretrained
    """

    model: str
