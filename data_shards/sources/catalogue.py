"""`data_shards pack --source NAME`: the layouts by name, with the options that each needs and takes.

    read_source(PackConfig(source="karpathy", json="rsicd.json,ucm.json", images="RSICD,UCM", ...))

There may be several annotation files. Then their options name one folder per file, or one for all, and the keys of each
set begin with its name. So RET-3 of the PriorCLIP paper (RSICD, RSITMD and UCM together) is one pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from priorclip.data_shards.format.class_names import normalized, unique_classes
from priorclip.data_shards.order.hashing import hash_integers, permutation
from priorclip.data_shards.rasters.values import ALL, SENSORS, ValueRule, value_rule
from priorclip.data_shards.rasters.vector import read_vector
from priorclip.data_shards.sources.benchmark import karpathy, precomp
from priorclip.data_shards.sources.bigearthnet import bigearthnet
from priorclip.data_shards.sources.drawing import DRAWN_BANDS, synthetic
from priorclip.data_shards.sources.fmow import fmow
from priorclip.data_shards.sources.folder import imagefolder, millionaid
from priorclip.data_shards.sources.kept_columns import kept_columns
from priorclip.data_shards.sources.names import pair_paths, split_paths
from priorclip.data_shards.sources.parquet import parquet
from priorclip.data_shards.sources.record import Record, join_sets
from priorclip.data_shards.sources.scenes import raster
from priorclip.data_shards.sources.skyscript import skyscript
from priorclip.data_shards.sources.table import csv, rs5m
from priorclip.data_shards.sources.tars import webdataset
from priorclip.data_shards.sources.tile_texts import TextSource, read_windows

if TYPE_CHECKING:
    from priorclip.data_shards.commands import PackConfig

DRAWN_QUALITY = 90
RASTER_TEXTS = ("label_field", "caption_field", "min_share", "keep_unlabelled", "max_bad_share")
TILE_VALID = 0.5  # share of valid pixels of a tile, without --min-valid


@dataclass(frozen=True)
class Source:
    """A layout.

    Args:
        read: returns the records for the options
        needs: required options
        takes: other options of this layout
    """

    read: Callable[[PackConfig], list[Record]]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def _drawn(config: PackConfig) -> list[Record]:
    if config.masks and config.max_side is not None and config.max_side < config.size:
        raise ValueError(
            f"--max-side {config.max_side} would shrink the images and not their masks: draw them with --size "
            f"{config.max_side}"
        )
    quality, bands = config.quality or DRAWN_QUALITY, drawn_bands(config)
    return synthetic(
        config.count, config.seed, config.size, config.captions, config.first_index, quality, config.masks,
        bands=bands, artificial_plants=config.artificial_plants,
    )  # fmt: skip


def drawn_bands(config: PackConfig) -> tuple[str, ...] | None:
    """Returns the bands of drawn TIFFs, or None for JPEGs. Raises ValueError for bands that nobody draws."""
    if not keeps_values(config):
        if config.bands is not None:
            raise ValueError("--source synthetic draws JPEGs of red, green and blue: --bands needs --image-format tiff")
        return None
    if config.masks:
        raise ValueError("--masks needs --image-format jpeg")
    chosen = rule_of(config).bands
    names = DRAWN_BANDS if chosen is None or chosen == ALL else chosen
    if unknown := [name for name in names if name not in DRAWN_BANDS]:
        raise ValueError(f"--bands: {', '.join(unknown)} is not drawn, only {', '.join(DRAWN_BANDS)}")
    return names


def _tiles(config: PackConfig) -> list[Record]:
    rule, quality = rule_of(config), config.quality or DRAWN_QUALITY
    if not 0 <= config.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share must be a share, 0 to 1, not {config.max_bad_share}")
    texts, measured = tile_texts(config), keeps_values(config)
    return raster(config.images or "", rule, config.tile, config.stride, quality, texts, config.max_bad_share, measured)


def keeps_values(config: PackConfig) -> bool:
    """Tells whether images are TIFFs of measured values. Raises ValueError for options that contradict."""
    if config.image_format not in ("jpeg", "tiff"):
        raise ValueError(f"--image-format must be jpeg or tiff, not {config.image_format!r}")
    if config.image_format == "jpeg":
        return False
    default = {item.name: item.default for item in fields(config)}
    given = [flag(name) for name in ("max_side", "quality", "percentiles", "fill") if
             getattr(config, name) != default[name]]  # fmt: skip
    if config.value_range is not None and config.value_range not in SENSORS:
        given.append("--value-range LOW,HIGH (the name of a sensor gives the bands their names)")
    if given:
        raise ValueError(f"--image-format tiff keeps the measured values, so it does not take {', '.join(given)}")
    return True


def tile_texts(config: PackConfig) -> TextSource:
    """Returns where the classes and texts of tiles come from. Raises ValueError for options that contradict."""
    tables = split_paths(config.csv)
    fields_named = config.label_field, caption_fields(config)
    if config.vector is not None and tables:
        raise ValueError("--vector and --csv both give texts to tiles: take one")
    if len(tables) > 1:
        raise ValueError("--source raster takes one --csv")
    if config.layer is not None and config.vector is None:
        raise ValueError("--layer needs --vector")
    if config.vector is not None:
        layer = read_vector(Path(config.vector), config.layer, *fields_named)
        return TextSource(layer, min_share=config.min_share)
    if tables:
        return TextSource(windows=read_windows(Path(tables[0]), *fields_named), min_share=config.min_share)
    if any(fields_named):
        raise ValueError("--label-field and --caption-field need --vector or --csv, because scenes have no texts")
    return TextSource(min_share=config.min_share)


def rule_of(config: PackConfig) -> ValueRule:
    """Returns how measured values become 8 bits. Raises ValueError for wrong options."""
    least = config.min_valid
    if least is None:
        least = TILE_VALID if config.source == "raster" else 0.0
    kept = keeps_values(config)
    return value_rule(config.value_range, config.percentiles, config.bands, config.fill, least, kept)


def _karpathy(config: PackConfig) -> list[Record]:
    return _annotated(config, "json", lambda file, images, labels: karpathy(file, images, config.split, labels))


def _precomp(config: PackConfig) -> list[Record]:
    return _annotated(config, "precomp", lambda file, images, labels: precomp(file, images, config.split, labels))


def _csv(config: PackConfig) -> list[Record]:
    texts, kept = caption_fields(config), kept_columns(config.keep_columns)
    return _annotated(config, "csv", lambda file, images, _: csv(file, images, config.split, texts, kept=kept))


def _rs5m(config: PackConfig) -> list[Record]:
    texts, kept = caption_fields(config), kept_columns(config.keep_columns)
    return _annotated(config, "csv", lambda file, images, _: rs5m(file, images, config.split, texts, kept))


def _skyscript(config: PackConfig) -> list[Record]:
    texts, kept = caption_fields(config), kept_columns(config.keep_columns)
    return _annotated(config, "csv", lambda file, images, _: skyscript(file, images, texts, kept))


def _annotated(config: PackConfig, option: str, read: Callable[..., list[Record]]) -> list[Record]:
    """Reads each annotation file with its image folder and its labels."""
    files = split_paths(getattr(config, option))
    images = pair_paths("images", config.images, option, len(files))
    labels = pair_paths("labels", config.labels, option, len(files)) if config.labels else [""] * len(files)
    groups = [read(*parts) for parts in zip(files, images, (name or None for name in labels), strict=True)]
    spelling = {
        normalized(name): name for name in unique_classes(r.label for group in groups for r in group if r.label)
    }
    for record in (each for group in groups for each in group):
        record.label = spelling[normalized(record.label)] if record.label else None
    return join_sets(groups)


def _parquet(config: PackConfig) -> list[Record]:
    files = split_paths(config.parquet)
    images = pair_paths("images", config.images, "parquet", len(files)) if config.images else [""] * len(files)
    fields_named = config.image_field, caption_fields(config), config.label_field, kept_columns(config.keep_columns)
    return join_sets(
        [parquet(file, folder or None, config.split, *fields_named) for file, folder in zip(files, images, strict=True)]
    )


SOURCES: dict[str, Source] = {
    "synthetic": Source(
        _drawn, takes=("count", "size", "captions", "first_index", "masks", "image_format", "artificial_plants")
    ),
    "csv": Source(_csv, ("csv", "images"), ("split", "caption_field", "keep_columns")),
    "rs5m": Source(_rs5m, ("csv", "images"), ("split", "caption_field", "keep_columns")),
    "skyscript": Source(_skyscript, ("csv", "images"), ("caption_field", "keep_columns")),
    "karpathy": Source(_karpathy, ("json", "images"), ("split", "labels")),
    "precomp": Source(_precomp, ("precomp", "images"), ("split", "labels")),
    "webdataset": Source(
        lambda config: webdataset(config.shards or "", caption_fields(config), kept_columns(config.keep_columns)),
        ("shards",),
        ("caption_field", "keep_columns"),
    ),
    "parquet": Source(
        _parquet, ("parquet",), ("images", "split", "image_field", "caption_field", "label_field", "keep_columns")
    ),
    "imagefolder": Source(lambda config: imagefolder(str(config.images), config.split), ("images",), ("split",)),
    "raster": Source(_tiles, ("images",), ("tile", "stride", "vector", "layer", "csv", "image_format", *RASTER_TEXTS)),
    "millionaid": Source(lambda config: millionaid(str(config.images), config.split), ("images",), ("split",)),
    "fmow": Source(
        lambda config: fmow(str(config.images), config.split, config.fmow_kind, config.crop_margin),
        ("images",),
        ("split", "fmow_kind", "crop_margin"),
    ),
    "bigearthnet": Source(
        lambda config: bigearthnet(
            str(config.images), config.split, next(iter(split_paths(config.parquet)), None), config.reflectance_max
        ),
        ("images",),
        ("split", "parquet", "reflectance_max"),
    ),
}


def read_source(config: PackConfig) -> list[Record]:
    """Reads the chosen source. Raises ValueError that names a missing option, or one that the source does not take."""
    source = SOURCES.get(config.source)
    if source is None:
        raise ValueError(f"--source must be one of {', '.join(SOURCES)}, not {config.source!r}")
    for name in source.needs:
        if getattr(config, name) is None:
            raise ValueError(f"--source {config.source} needs {flag(name)}")
    known = source.needs + source.takes
    foreign = {name for other in SOURCES.values() for name in other.needs + other.takes} - set(known)
    default = {item.name: item.default for item in fields(config)}
    given = sorted(flag(name) for name in foreign if getattr(config, name) != default[name])
    if given:
        takes = ", ".join(flag(name) for name in known)
        raise ValueError(f"--source {config.source} does not take {', '.join(given)}; it takes: {takes}")
    return source.read(config)


def caption_fields(config: PackConfig) -> list[str] | None:
    """Returns the names of ``--caption-field a,b`` or of a list; None without the option."""
    value = config.caption_field
    names = value.split(",") if isinstance(value, str) else value or []
    return [name.strip() for name in names] or None


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """Returns the records in a random order that the seed decides.

    Reading one record of a Parquet file reads its whole row group. So the groups are shuffled, and the records within
    each group. Each group is then read once or twice, not once per record.
    """
    groups: dict[object, list[Record]] = {}
    for record in records:
        groups.setdefault(getattr(record.image, "neighbourhood", None), []).append(record)
    parts = list(groups.values())
    if len(parts) == 1:
        return [records[i] for i in permutation(hash_integers(seed), len(records))]
    mixed = [parts[i] for i in permutation(hash_integers(seed), len(parts))]
    return [part[i] for number, part in enumerate(mixed) for i in permutation(hash_integers(seed, number), len(part))]
