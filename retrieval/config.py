"""The options of `python -m retrieval`: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class GalleryConfig:
    """A model and the images it encodes.

    Args:
        model: export folder of a PriorCLIP or PriorITR, as training and save_pretrained write it
        data: Karpathy JSON, or shards: a folder, tars, or a pattern such as "test-{000..007}.tar"
        images: folder that the file names of the Karpathy JSON are relative to
        split: split of the Karpathy JSON to take, or "all"; null takes "test" where the file has it, else all
        limit: take the first so many images only
        batch_size: images, or captions, encoded at a time
        device: auto takes the GPU where there is one
        precision: number format of the activations
        workers: decoding processes; 0 decodes in this one
        max_pixels: larger images are refused before they are decoded
        max_bad_share: stop when more than this share of the images cannot be used
    """

    model: str
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
            raise ValueError(f"--workers must not be negative, but is {self.workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share is a share: 0 to 1, not {self.max_bad_share}")


@dataclass
class EvaluateConfig(GalleryConfig):
    """Measure recall at 1, 5 and 10 in both directions, on a Karpathy JSON or on shards.

    Args:
        output: report to write, JSON; null prints the table only
        caption_field: list in KEY.json that holds the captions: captions or coarse_captions
    """

    output: str | None = None
    caption_field: str = "captions"


@dataclass(kw_only=True)
class IndexConfig(GalleryConfig):
    """Encode images into an index that `search` and `serve` read. Captions are not needed.

    Args:
        output: folder to write
        dtype: number format of the stored embeddings
        overwrite: replace an index that is there
    """

    output: str
    dtype: Literal["float16", "float32"] = "float16"
    overwrite: bool = False


@dataclass
class SearchConfig:
    """Rank the images of an index by a text, or by an image.

    Args:
        index: folder that `index` wrote
        text: what to look for
        image: image file to look for more like it
        k: results
        model: export folder; null takes the one that the index was made with
        device: auto takes the GPU where there is one
        precision: number format of the activations
    """

    index: str
    text: str | None = None
    image: str | None = None
    k: int = 10
    model: str | None = None
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise ValueError('give either --text "..." or --image FILE')
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, not {self.k}")


@dataclass
class ServeConfig:
    """Serve a search page over an index: read-only, and nothing is loaded from elsewhere.

    Args:
        index: folder that `index` wrote
        host: address to listen on; 0.0.0.0 lets other machines in
        port: port to listen on; 0 takes a free one
        model: export folder; null takes the one that the index was made with
        device: auto takes the GPU where there is one
        precision: number format of the activations
    """

    index: str
    host: str = "127.0.0.1"
    port: int = 8008
    model: str | None = None
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be between 0 and 65535, not {self.port}")


COMMANDS = {"evaluate": EvaluateConfig, "index": IndexConfig, "search": SearchConfig, "serve": ServeConfig}
