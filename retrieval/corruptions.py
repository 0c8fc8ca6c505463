"""Corruptions of aerial images, at severities 1 to 5, to measure the robustness of a model.

    corrupt(pixels, "cloud", severity=3, seed=image_seed(0, "cloud", "airport/12"))     # uint8 (H, W, 3) -> the same

blur       Gaussian, standard deviation 1 to 6 pixels of a 224-pixel side       torchvision, as ImageNet-C
noise      Gaussian, standard deviation 8 to 38 % of the range                  as ImageNet-C
jpeg       quality 25 to 7                                                      torchvision, as ImageNet-C
rotation   5 to 45 degrees either way, edges mirrored                           torchvision
cloud      10 to 70 % of the area under white clouds, with their shadows        fractal noise, cut at that share
haze       transmission 0.85 to 0.35, not uniform                               I t + A (1 - t), Koschmieder's law
season     plants turn from green to straw, 20 to 100 %                         plants have an excess of green

The severities of the first three are those of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261). Random values
depend only on the image's key, the corruption and the seed, not on the severity: a cloud grows and does not move.
Larger images are first reduced to WORKING_SIDE, so a severity means the same for 600 pixels as for 256.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from priorclip.data_shards.format.sample import Sample
from priorclip.data_shards.images.decode import MAX_PIXELS, open_image, upright_rgb
from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.stream.batch_fetcher import SampleSource

SEVERITIES = (1, 2, 3, 4, 5)
WORKING_SIDE = 256  # pixels of the shorter side; larger images are reduced to it
BLUR = (1, 2, 3, 4, 6)  # pixels at a side of 224
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
JPEG = (25, 18, 15, 10, 7)
ROTATION = (5, 10, 15, 30, 45)  # degrees
CLOUD = (0.1, 0.2, 0.35, 0.5, 0.7)  # share of the area
HAZE = (0.85, 0.7, 0.6, 0.45, 0.35)  # transmission
SEASON = (0.2, 0.4, 0.6, 0.8, 1.0)
AIR = torch.tensor([0.86, 0.89, 0.92])[:, None, None]  # light scattered by haze
STRAW = torch.tensor([[0.45, 0.75, 0.1], [0.35, 0.55, 0.1], [0.25, 0.3, 0.15]])  # rows give red, green, blue
ROUGHNESS = 1.8  # exponent of the clouds' amplitude spectrum
EDGE = 0.25  # width of the soft edge of clouds, in standard deviations of their noise

Pixels = NDArray[np.uint8]


def corrupt(pixels: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """Returns the corrupted image. Severity 0 returns the image unchanged.

    Args:
        pixels: uint8 (H, W, 3)
        name: one of CORRUPTIONS
        severity: 0 to 5
        seed: of the image
    Raises:
        ValueError: no such corruption or severity
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"'{name}' is no corruption; the corruptions are {', '.join(CORRUPTIONS)}")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity {severity} of {name} must be 0 to {SEVERITIES[-1]}")
    if not severity:
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    changed = CORRUPTIONS[name](image, severity - 1, torch.Generator().manual_seed(seed & (1 << 63) - 1))
    return np.ascontiguousarray(changed.numpy().transpose(1, 2, 0))


def blur(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    sigma = BLUR[level] * min(image.shape[1:]) / 224
    reach = min(round(4 * sigma), min(image.shape[1:]) - 1)
    return tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)


def noise(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    return to_uint8(image / 255 + NOISE[level] * torch.randn(image.shape, generator=random))


def jpeg(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    return tv.jpeg(image, JPEG[level])


def rotation(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    """Rotates about the centre, bilinear. Mirrors the edges first, so that no black corner shows the angle."""
    sign = 1 if torch.rand((), generator=random) < 0.5 else -1
    high, wide = image.shape[1:]
    reach = math.ceil((high + wide) / math.sqrt(8) - min(high, wide) / 2) + 1  # corners at 45 degrees
    margin = min(min(high, wide) - 1, reach)
    padded = tv.pad(image, [margin], padding_mode="reflect")
    turned = tv.rotate(padded, sign * float(ROTATION[level]), v2.InterpolationMode.BILINEAR)
    return turned[:, margin : margin + high, margin : margin + wide]


def cloud(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    """Draws clouds at the largest values of a noise field, in the share of the level, with shadows on the ground."""
    field = fractal_noise(image.shape[1], image.shape[2], random)
    threshold = torch.quantile(field.flatten(), 1 - CLOUD[level])
    cover = ((field - threshold) / EDGE + 0.5).clamp(0, 1)  # half cover at the threshold
    shift = max(1, min(image.shape[1:]) // 24)
    shadow = torch.roll(cover, (shift, shift), (0, 1))
    ground = image / 255 * (1 - 0.45 * shadow)
    return to_uint8(ground * (1 - cover) + (0.9 + 0.1 * cover) * cover)


def haze(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    depth = fractal_noise(image.shape[1], image.shape[2], random, roughness=3.0)
    thickness = -torch.log(torch.tensor(HAZE[level])) * (1 + 0.25 * depth.clamp(-2, 2))
    transmission = torch.exp(-thickness)
    return to_uint8(image / 255 * transmission + AIR * (1 - transmission))


def season(image: Tensor, level: int, random: torch.Generator) -> Tensor:
    """Gives plants the colour of dry grass. Plants have an excess of green (Woebbecke et al. 1995).

    The excess is (2g - r - b) / (r + g + b).
    """
    colour = image / 255
    excess = (3 * colour[1] / colour.sum(0).clamp(min=1e-3) - 1).clamp(min=0)
    plant = (excess / 0.15).clamp(max=1) * SEASON[level]
    dry = torch.einsum("rc,chw->rhw", STRAW, colour)
    return to_uint8(colour * (1 - plant) + dry * plant)


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    function.__name__: function for function in (blur, noise, jpeg, rotation, cloud, haze, season)
}


def to_uint8(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def fractal_noise(high: int, wide: int, random: torch.Generator, roughness: float = ROUGHNESS) -> Tensor:
    """Returns noise (high, wide) of mean 0 and deviation 1. Amplitude ~ frequency to the power of -roughness."""
    spectrum = torch.fft.rfft2(torch.randn(high, wide, generator=random))
    frequency = torch.hypot(torch.fft.fftfreq(high)[:, None], torch.fft.rfftfreq(wide)[None, :])
    frequency[0, 0] = torch.inf
    field = torch.fft.irfft2(spectrum * frequency**-roughness, (high, wide))
    return field / field.std() if field.numel() > 1 else field


def image_seed(seed: int, name: str, key: str) -> int:
    """Returns the seed of an image, from the seed of the command, the corruption and the image's key."""
    return hash_integers(seed, zlib.crc32(name.encode()), zlib.crc32(key.encode("utf-8", "surrogateescape")))


def encode_bmp(pixels: Pixels) -> bytes:
    """Encodes an image without loss, in little time."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


class CorruptedSource:
    """A source that corrupts the images of another source as it reads them. Captions, labels and names stay."""

    def __init__(self, source: SampleSource, name: str, severity: int, seed: int, max_pixels: int = MAX_PIXELS) -> None:
        self.source, self.corruption, self.severity, self.seed = source, name, severity, seed
        self.max_pixels = max_pixels
        self.sizes, self.classes = source.sizes, source.classes

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def read(self, sample: int) -> Sample:
        """Reads and corrupts a sample. Raises BadSample if the image cannot be decoded."""
        clean = self.source.read(sample)
        with open_image(clean.image, self.max_pixels) as image:
            picture = upright_rgb(image)
            shorter = min(picture.size)
            if shorter > WORKING_SIDE:
                wide, high = (max(1, round(side * WORKING_SIDE / shorter)) for side in picture.size)
                picture = picture.resize((wide, high), resample=Image.Resampling.BICUBIC, reducing_gap=3)
            pixels = np.array(picture)
        seed = image_seed(self.seed, self.corruption, clean.key)
        return replace(clean, image=encode_bmp(corrupt(pixels, self.corruption, self.severity, seed)))

    def text(self, sample: int) -> Sample:
        return self.source.text(sample)

    def name(self, sample: int) -> tuple[str, str]:
        return self.source.name(sample)

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        return self.source.captions(sample, caption_field)
