"""An exported model with its tokenizer on a device: it turns images and texts into L2-normalised features.

    encoder = Encoder.load("runs/demo/export")
    encoder.embed_images(["harbour.jpg", "river.tif"])  # (2, d)
    encoder.embed_texts(["a harbour with ten boats"])   # (1, d)
    encoder.text("a harbour with ten boats")            # (d,)
    encoder.image(Path("harbour.jpg").read_bytes())     # (d,)
    found = encoder.images(batches)                     # .features (I, d), .usable (I,), .labels (I,)
    encoder.texts(batches)                              # (T, d)

Images are prepared as in evaluations during training: centred square, resized, uint8, normalised by the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from priorclip.common.hub import fetch_export
from priorclip.data_shards import EvalBatches, eval_batches, load_tokenizer
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import MAX_PIXELS, eval_transform
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.model import from_pretrained
from priorclip.model.device import pick_device
from priorclip.model.encoders.feature_cache import FeatureCache
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder, cache_facts
from priorclip.model.evaluation import encode_texts
from priorclip.model.losses.gather import rank, world_size
from priorclip.model.pictures.belief_maps import paint_belief
from priorclip.retrieval.commands import Device, Precision
from priorclip.retrieval.gallery import Gallery, Skipped, add_skipped
from priorclip.retrieval.indexing.index_parts import IndexParts, Rows
from priorclip.retrieval.shared_encoding import from_all_ranks
from priorclip.retrieval.test_set_options import TestSetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class EncodedImages:
    """The features of a gallery's images.

    Args:
        features: (I, d), zeros for an image that cannot be used
        usable: (I,) bool
        labels: (I,) int64, index of the scene in the batches' ``classes``, -1 if it is unknown
    """

    features: Tensor
    usable: Tensor
    labels: Tensor


class Encoder:
    """PriorCLIP or PriorITR in eval mode. A call runs the model in the chosen precision, without gradients.

    Args:
        model: from ``model.from_pretrained``
        tokenizer: the tokenizer of its training
        folder: export folder, for messages and for the hash of the weights
        device: device of the model
        precision: fp32, or bf16 or fp16 through autocast
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, device: torch.device, precision: Precision
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer, self.folder, self.device, self.precision = tokenizer, folder, device, precision

    @classmethod
    def load(cls, folder: str | Path, device: Device = "auto", precision: Precision = "fp32") -> Encoder:
        """Loads the model of an export folder, or of one on the hub: ``hf://user/name``.

        Raises:
            FileNotFoundError: no export folder, or one without tokenizer
            ValueError: a scene classifier, weights that do not fit, or no GPU for ``device="cuda"``
        """
        folder = fetch_export(folder)
        where = pick_device(device)
        model = from_pretrained(folder)
        if not hasattr(model, "encode_text"):
            raise ValueError(f"--model {folder} is a {type(model).__name__}: it has no text encoder")
        return cls(model, read_tokenizer(folder, model.config.text), folder, where, precision)

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.model.config.vision.image_size

    @property
    def bands(self) -> list[str] | None:
        """Bands that the model reads from TIFFs of measured values; None for a model of pictures."""
        return self.model.config.vision.bands

    def require_pictures(self, what: str) -> None:
        """Raises ValueError if the model reads bands: ``what`` changes or draws pictures of three colours."""
        if self.bands is not None:
            raise ValueError(
                f"the model in {self.folder} reads measured values of {', '.join(self.bands)}: {what} needs a model "
                "of pictures"
            )

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        reduced = self.precision != "fp32"
        with torch.inference_mode(), torch.autocast(self.device.type, DTYPES[self.precision], enabled=reduced):
            return self.model(**inputs)

    def batches(self, gallery: Gallery, config: TestSetConfig, caption_field: str | None = None) -> EvalBatches:
        """Returns batches of the gallery's images, and of its captions if ``caption_field`` is given."""
        return eval_batches(
            gallery.source,
            None if caption_field is None else self.tokenizer,
            self.image_size,
            config.batch_size,
            rank(),
            world_size(),
            caption_field=caption_field or "captions",
            workers=config.workers,
            skip_bad=True,
            max_pixels=config.max_pixels,
            bands=self.bands,
            whole=True,
        )

    def images(
        self, batches: EvalBatches, dtype: torch.dtype = torch.float32, parts: IndexParts | None = None
    ) -> EncodedImages:
        """Returns the features of all images as ``dtype`` on the CPU. Ranks share the batches.

        Args:
            batches: of the images
            dtype: of the features
            parts: keeps finished batches; those of an earlier run are not encoded again

        Raises ValueError if a feature is not finite.
        """
        total = batches.image_count
        features = torch.zeros(0)
        usable = torch.zeros(total, dtype=torch.bool)
        labels = torch.full((total,), -1)
        done = frozenset() if parts is None else parts.done()
        for number, batch in zip(batches.image_numbers(done), batches.images(done=done), strict=True):
            rows = self(images=batch["images"].to(self.device))["image_features"].float().cpu()
            if not len(features):
                features = torch.zeros(total, rows.shape[1], dtype=dtype)
            real = batch["index"] >= 0
            places = batch["index"][real]
            features[places] = rows[real].to(dtype)
            usable[places] = True
            labels[places] = batch["labels"][real]
            if parts is not None and number is not None:
                self.check_finite(features[places])
                parts.add(number, Rows(places, features[places], labels[places]))
        if parts is not None:
            parts.flush()
            for kept in parts.kept:
                features[kept.places], labels[kept.places] = kept.features, kept.labels
                usable[kept.places] = True
        self.check_finite(features)
        if world_size() > 1:
            mine = usable.nonzero().flatten()
            places = from_all_ranks(mine)
            features[places], labels[places] = from_all_ranks(features[mine]), from_all_ranks(labels[mine])
            usable[places] = True
        return EncodedImages(features, usable, labels)

    def texts(self, batches: EvalBatches) -> Tensor:
        """Returns the features of all captions in order, (T, d) float32 on the CPU. Ranks share the batches.

        Raises ValueError if a feature is not finite.
        """
        features = encode_texts(self, batches, self.device, from_all_ranks if world_size() > 1 else None).cpu()
        self.check_finite(features)
        return features

    def embed_images(self, images: Iterable[str | Path | bytes | Image.Image], batch_size: int = 64) -> Tensor:
        """Returns the features of images in their order, (I, d) float32 on the CPU, each of length 1.

        Args:
            images: files, encoded images or pictures of Pillow, of any size
            batch_size: images that the model sees at a time
        Raises:
            OSError: a file cannot be read
            ValueError: an image cannot be decoded; the message names the file, or the place in ``images``
        """
        features = [torch.zeros(0, self.model.config.embed_dim)]
        for batch in batched(enumerate(images), batch_size):
            pixels = torch.stack([self.decoded(image, place) for place, image in batch])
            features.append(self(images=pixels.to(self.device))["image_features"].float().cpu())
        self.check_finite(torch.cat(features))
        return torch.cat(features)

    def embed_texts(self, texts: Iterable[str], batch_size: int = 256) -> Tensor:
        """Returns the features of texts in their order, (T, d) float32 on the CPU, each of length 1.

        Texts longer than the model's context are cut. Raises ValueError for a blank text.
        """
        features = [torch.zeros(0, self.model.config.embed_dim)]
        for batch in batched((text.strip() for text in texts), batch_size):
            if not all(batch):
                raise ValueError("a text is blank")
            inputs = {name: value.to(self.device) for name, value in tokenize(self.tokenizer, list(batch)).items()}
            features.append(self(**inputs)["text_features"].float().cpu())
        self.check_finite(torch.cat(features))
        return torch.cat(features)

    def decoded(self, image: str | Path | bytes | Image.Image, place: int) -> Tensor:
        """Returns the model's square of an image, as `decode`. Raises as `embed_images`."""
        if isinstance(image, Image.Image):
            file = BytesIO()
            image.save(file, "PNG")
            image = file.getvalue()
        name = f"image {place}" if isinstance(image, bytes) else str(image)
        try:
            return self.decode(image if isinstance(image, bytes) else Path(image).read_bytes())
        except BadSample as error:
            raise ValueError(f"{name}: {error}") from error

    def text(self, text: str) -> Tensor:
        """Returns the feature (d,) of one text, float32 on the CPU. Raises ValueError for a blank text."""
        if not text.strip():
            raise ValueError("the search text is blank")
        inputs = {name: value.to(self.device) for name, value in tokenize(self.tokenizer, [text.strip()]).items()}
        return self.single_row(self(**inputs)["text_features"])

    def image(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Returns the feature (d,) of one encoded image, float32 on the CPU. Raises BadSample if it cannot be read."""
        return self.feature(self.decode(data, max_pixels=max_pixels))

    def decode(self, data: bytes, side: int | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Returns the centred square of an encoded image, uint8 (3, S, S), or float32 (n, S, S) of the model's bands.

        With ``side`` it is a picture of that side, to look at. It does not run the model. Raises BadSample if the image
        cannot be read.
        """
        bands = self.bands if side is None else None
        return torch.from_numpy(eval_transform(data, side or self.image_size, max_pixels=max_pixels, bands=bands))

    def feature(self, pixels: Tensor) -> Tensor:
        """Returns the feature (d,) of one decoded image (3, S, S), float32 on the CPU."""
        return self.single_row(self(images=pixels[None].to(self.device))["image_features"])

    def belief(self, pixels: Tensor, square: Tensor) -> Image.Image:
        """Returns the belief map of one decoded image (3, S, S), painted over its ``square`` of any side.

        Raises ValueError for a model without a prior.
        """
        if not self.model.has_belief:
            raise ValueError(f"the model in {self.folder} has no scene prior, so it has no belief map")
        belief = self(images=pixels[None].to(self.device), return_belief=True)["belief"][0]
        return paint_belief(square, belief)

    def single_row(self, features: Tensor) -> Tensor:
        """Returns the only row of (1, d) features."""
        row = features[0].float().cpu()
        self.check_finite(row)
        return row

    def check_finite(self, features: Tensor) -> None:
        """Raises ValueError for NaN or infinity, because no comparison with NaN is true and recall would be perfect."""
        if not features.isfinite().all():
            raise ValueError(
                f"the model in {self.folder} gives features that are not finite in {self.precision}: its weights are "
                f"damaged, or the precision is too low (--precision fp32)"
            )


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of ``size`` items, and the rest. (itertools.batched is new in Python 3.12.)"""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def remember(model: Any, folder: str | Path, precision: Precision = "fp32") -> None:
    """Caches the outputs of the model's encoders in a folder, for further models that have the same encoder.

    Examples are the seeds of a sweep, or heads on one frozen encoder. Trainings fill the same cache (``remember``).
    """
    reduced = () if precision == "fp32" else (precision,)
    for module in model.modules():
        if isinstance(module, ImageEncoder):
            settings = module.config
            facts = cache_facts(settings, module.pool, module.given, *reduced)
            module.feature_cache = FeatureCache(folder, module.model, facts)
        elif isinstance(module, TextEncoder):
            architecture = module.config.config
            text_facts = (architecture, *reduced) if reduced else architecture
            module.feature_cache = FeatureCache(folder, module.model, text_facts)


def find_skip_reasons(gallery: Gallery, usable: Tensor, encoder: Encoder, max_pixels: int) -> Skipped:
    """Reads each unusable image again to find out the reason, because workers report none."""
    skipped: Skipped = {}
    for sample in (~usable).nonzero().flatten().tolist():
        try:
            encoder.decode(gallery.source.read(sample).image, max_pixels=max_pixels)
            add_skipped(skipped, gallery, sample, BadSample("readable only the second time"))
        except BadSample as error:
            add_skipped(skipped, gallery, sample, error)
    return skipped


def read_tokenizer(folder: Path, text: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of an export folder and checks its size against the text encoder's vocabulary."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"--model {folder} has no tokenizer: copy the tokenizer files of its training into the folder"
        )
    tokenizer = load_tokenizer(str(folder), text.context_length)
    known = (text.config or {}).get("vocab_size")
    if known is not None and len(tokenizer) > known:
        raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} entries, but its text encoder has {known}")
    return tokenizer
