"""Materials that fill an area, as ``(n, n, 3)`` float pictures in 0..255.

Broad noise mixes two tones to a material; finer noise adds mottle and grain:

    texture("grass", grid, rng)   # lawn with worn patches

Materials with a structure (water, canopy, dunes, crop rows, mountains) are the functions below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from priorclip.data_shards.synthetic.dice import Rng, between, chance
from priorclip.data_shards.synthetic.noise_tiles import canopy_patch, patch
from priorclip.data_shards.synthetic.palette import Rgb, blend
from priorclip.data_shards.synthetic.sketch import Grid, Picture, Plane, Texture


class Material(NamedTuple):
    """Two tones (RGB) and the strength of each scale of noise, as a share of brightness."""

    tone: Rgb
    other: Rgb
    drift: float  # random shift of the tones per picture
    mix: float  # strength of the broad noise between the tones
    mottle: float
    grain: float


MATERIALS: dict[str, Material] = {
    "grass": Material((88, 116, 62), (122, 136, 82), 10, 0.42, 0.035, 0.04),
    "lawn": Material((84, 134, 62), (104, 150, 74), 7, 0.25, 0.02, 0.03),
    "dry grass": Material((184, 168, 112), (156, 138, 86), 8, 0.42, 0.035, 0.04),
    "soil": Material((130, 98, 74), (160, 126, 96), 9, 0.42, 0.035, 0.04),
    "sand": Material((220, 202, 164), (206, 184, 142), 7, 0.30, 0.02, 0.03),
    "concrete": Material((172, 170, 165), (188, 185, 178), 8, 0.30, 0.025, 0.025),
    "asphalt": Material((94, 95, 98), (110, 110, 111), 8, 0.30, 0.025, 0.03),
    "gravel": Material((150, 142, 132), (128, 120, 110), 8, 0.3, 0.04, 0.09),
    "rock": Material((136, 122, 106), (108, 98, 88), 10, 0.4, 0.10, 0.10),
    "snow": Material((240, 243, 248), (222, 229, 240), 4, 0.3, 0.01, 0.01),
    "clay": Material((178, 104, 66), (192, 122, 80), 6, 0.25, 0.02, 0.03),
    "desert": Material((212, 168, 112), (196, 148, 94), 8, 0.4, 0.03, 0.03),
}


@dataclass(frozen=True)
class Fill:
    """A texture that knows how much near infrared it reflects, as a share of the light, on average, and what lives."""

    paint: Texture
    infrared: float
    plant: bool = False

    def __call__(self, grid: Grid, rng: Rng) -> Picture:
        return self.paint(grid, rng)


# Share of near infrared that a material reflects: leaves much, water almost none.
INFRARED: dict[str, float] = {
    "grass": 0.42,
    "lawn": 0.46,
    "dry grass": 0.30,
    "soil": 0.25,
    "sand": 0.38,
    "concrete": 0.30,
    "asphalt": 0.12,
    "gravel": 0.24,
    "rock": 0.24,
    "snow": 0.75,
    "clay": 0.30,
    "desert": 0.40,
}
WATER, LEAVES, TURF, DUNES, SLOPES = 0.02, 0.44, 0.46, 0.40, 0.25
SOIL = 0.24  # of a field without plants
PLASTIC = 0.14  # of artificial plants, whose green is paint
PLANTS = ("grass", "lawn", "dry grass")  # materials; a Fill says it itself


def _speckled(tone: Rgb, other: Rgb, mix: Plane, light: Plane) -> Picture:
    picture = np.empty((*mix.shape, 3), np.float32)
    for channel in range(3):
        picture[..., channel] = (tone[channel] + (other[channel] - tone[channel]) * mix) * light
    return picture


def _drifted(tone: Rgb, rng: Rng, drift: float) -> Rgb:
    lift, warm, green = ((rng.random(3) - 0.5) * (2 * drift)).tolist()
    return tone[0] + lift + warm * 0.6, tone[1] + lift + green * 0.5, tone[2] + lift - warm * 0.6


def plain(material: Material, grid: Grid, rng: Rng) -> Picture:
    """Returns two tones of a material mixed by noise at three scales."""
    tone, other = _drifted(material.tone, rng, material.drift), _drifted(material.other, rng, material.drift)
    mix = np.clip(0.5 + material.mix * patch("broad", grid.size, rng), 0, 1)
    light = 1 + material.mottle * patch("mottle", grid.size, rng) + material.grain * patch("grain", grid.size, rng)
    return _speckled(tone, other, mix, light)


def water(deep: Rgb = (44, 74, 88), shallow: Rgb = (66, 104, 108)) -> Texture:
    """Returns water with slow changes of depth and fine waves."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        mix = np.clip(0.4 + 0.35 * patch("broad", grid.size, rng), 0, 1)
        angle, waves = rng.random(2).tolist()
        ripple = np.sin(
            (grid.u * math.cos(angle * 6.3) + grid.v * math.sin(angle * 6.3)) * (220 + 120 * waves)
            + 2.2 * patch("mottle", grid.size, rng)
        )
        light = 1 + 0.018 * ripple + 0.03 * patch("grain", grid.size, rng)
        drift = 9
        return _speckled(_drifted(deep, rng, drift), _drifted(shallow, rng, drift), mix, light)

    return Fill(fill, WATER)


def canopy(dark: Rgb = (40, 66, 36), light: Rgb = (88, 118, 58), jitter: float = 0.8) -> Texture:
    """Returns tree crowns seen from above, each with a lit and a shaded side."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        height, tone = canopy_patch(grid.size, rng, jitter)
        lit = _relief(height, grid) * (0.16 * grid.size / 12)
        level = np.clip(0.30 + 0.85 * height, 0.25, 1.15) + np.clip(lit, -0.35, 0.45)
        level *= 1 + 0.07 * patch("grain", grid.size, rng)
        return _speckled(_drifted(dark, rng, 6), _drifted(light, rng, 8), 0.25 + 0.6 * tone, level)

    return Fill(fill, LEAVES, plant=True)


def _relief(height: Plane, grid: Grid) -> Plane:
    """Returns how much a height field faces the sun: its slope in the direction of the shadows."""
    du, dv = np.zeros_like(height), np.zeros_like(height)
    du[:, 1:-1] = height[:, 2:] - height[:, :-2]
    dv[1:-1] = height[2:] - height[:-2]
    du[:, 0], du[:, -1] = du[:, 1], du[:, -2]
    dv[0], dv[-1] = dv[1], dv[-2]
    return du * grid.sun[0] + dv * grid.sun[1]


def crop(
    tone: Rgb, other: Rgb, heading: float, rows: float = 40.0, depth: float = 0.09, infrared: float = LEAVES
) -> Texture:
    """Returns a ploughed or planted field with furrows along ``heading``, with ``rows`` furrows per scene side."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        across = grid.v * math.cos(heading) - grid.u * math.sin(heading)
        wobble = 0.5 * patch("mottle", grid.size, rng)
        furrow = np.sin(across * (2 * math.pi * rows) + wobble)
        tractor = np.sin(across * (2 * math.pi * rows / 6) + wobble * 0.3) > 0.93
        mix = np.clip(0.45 + 0.35 * patch("broad", grid.size, rng), 0, 1)
        light = 1 + depth * furrow - 0.10 * tractor + 0.04 * patch("grain", grid.size, rng)
        return _speckled(_drifted(tone, rng, 7), _drifted(other, rng, 7), mix, light)

    return Fill(fill, infrared, plant=infrared > SOIL)


def mown(tone: Rgb, other: Rgb, heading: float, stripes: float = 18.0) -> Texture:
    """Returns a mown pitch in two greens, striped along ``heading``."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        across = grid.v * math.cos(heading) - grid.u * math.sin(heading)
        mix = np.clip(0.5 + 3 * np.sin(across * (2 * math.pi * stripes)), 0, 1)
        light = 1 + 0.03 * patch("mottle", grid.size, rng) + 0.03 * patch("grain", grid.size, rng)
        return _speckled(_drifted(tone, rng, 5), _drifted(other, rng, 5), mix, light)

    return Fill(fill, TURF, plant=True)


def dunes(tone: Rgb, other: Rgb, heading: float, ridges: float = 7.0) -> Texture:
    """Returns wind-blown ridges across ``heading``: long lit backs, short slip faces, fine ripples."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        across = grid.v * math.cos(heading) - grid.u * math.sin(heading)
        wobble = 0.55 * patch("broad", grid.size, rng) + 0.05 * patch("mottle", grid.size, rng)
        strength = np.clip(0.75 + 0.35 * patch("broad", grid.size, rng), 0.2, 1.2)
        wave = np.mod(across * ridges + wobble, 1.0)
        back = np.minimum(wave / 0.74, (1 - wave) / 0.26)
        slip = np.sin(np.clip((wave - 0.74) / 0.26, 0, 1) * math.pi)
        ripple = np.sin(across * (ridges * 2 * math.pi * 9) + 6 * wobble)
        light = 0.93 + strength * (0.13 * back - 0.20 * slip) + 0.012 * ripple + 0.025 * patch("grain", grid.size, rng)
        mix = np.clip(0.5 + 0.3 * patch("broad", grid.size, rng), 0, 1)
        return _speckled(_drifted(tone, rng, 6), _drifted(other, rng, 6), mix, light)

    return Fill(fill, DUNES)


def mountains(peaks: list[tuple[float, float, float]], slope: Rgb, foot: Rgb, snow_line: float | None) -> Texture:
    """Returns ridges under the peaks ``(u, v, radius)``, bare or with snow above ``snow_line`` of their height."""

    def fill(grid: Grid, rng: Rng) -> Picture:
        n = grid.size
        folds, fine, spread = patch("broad", n, rng), patch("mottle", n, rng), patch("broad", n, rng)
        summit = np.zeros_like(grid.u)
        for u, v, radius in peaks:
            x, y = grid.u - u, grid.v - v
            away = np.hypot(x, y) / radius
            bearing = np.arctan2(y, x) + 0.5 * folds * np.minimum(away, 1)
            arms = 1 - np.abs(np.sin(bearing * 2.5 + 9 * u)) + 0.5 * (1 - np.abs(np.sin(bearing * 5.5 + 7 * v)))
            reach = 1 + 0.34 * (arms - 0.6) * np.minimum(away * 2, 1)
            summit = np.maximum(summit, np.exp(-((away * 1.25 / reach) ** 1.4)))
        gullies = 1 - np.abs(fine + 0.8 * spread) * 0.5
        height = 0.36 * summit + 0.012 * folds + 0.012 * gullies * (0.5 + 0.4 * summit)
        lit = np.clip(_relief(height, grid) * (n / 3.6), -0.52, 0.40)
        rough = 1 + 0.045 * patch("grain", n, rng) + 0.05 * fine
        bare = np.clip(summit * 3 - 0.45 + 0.10 * fine, 0, 1)
        picture = _speckled(_drifted(foot, rng, 7), _drifted(slope, rng, 7), bare, rough)
        if snow_line is not None:
            cover = np.clip((summit - snow_line + 0.015 * fine + 0.05 * spread) * 9, 0, 1)[..., None]
            picture += (np.array((244, 247, 252), np.float32) - picture) * cover
        return picture * (0.94 + lit)[..., None]

    return Fill(fill, SLOPES)


CROPS: dict[str, tuple[Rgb, Rgb]] = {
    "green": ((74, 128, 54), (100, 146, 66)),
    "yellow": ((214, 190, 84), (222, 202, 106)),
    "brown": ((128, 92, 66), (146, 110, 82)),
}


CROP_INFRARED = {"green": 0.42, "yellow": 0.33, "brown": SOIL}


def field_of(rng: Rng, colour: str, heading: float) -> Texture:
    """Returns a field of the named crop colour with its own furrow spacing."""
    tone, other = CROPS[colour]
    shift = between(rng, 0, 0.3)
    rows, depth = between(rng, 18, 36), 0.04 + 0.05 * chance(rng, 0.6)
    return crop(blend(tone, other, shift), other, heading, rows, depth, CROP_INFRARED[colour])


NAMED: dict[str, Texture] = {
    "water": water(),
    "sea": water((34, 84, 108), (62, 128, 138)),
    "forest": canopy(),
    "autumn forest": canopy((120, 62, 28), (196, 116, 48)),
    "orchard": canopy((58, 84, 42), (92, 122, 60), 0.1),
}


def texture(material: str | Texture, grid: Grid, rng: Rng) -> Picture:
    """Returns the picture ``(n, n, 3)`` of a material, given by its name or as a function."""
    if not isinstance(material, str):
        return material(grid, rng)
    if material in NAMED:
        return NAMED[material](grid, rng)
    return plain(MATERIALS[material], grid, rng)


def infrared_of(material: str | Texture, artificial: bool = False) -> float:
    """Returns the share of near infrared that a material reflects, on average; ``artificial`` makes plants plastic."""
    fill = NAMED.get(material, material) if isinstance(material, str) else material
    if isinstance(fill, Fill):
        return PLASTIC if artificial and fill.plant else fill.infrared
    return PLASTIC if artificial and fill in PLANTS else INFRARED[str(fill)]
