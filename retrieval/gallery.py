"""Opens the images that ``--data`` names as a source of samples with random access.

    open_gallery("dataset_rsicd.json", "RSICD_images")       # Karpathy JSON: its test split
    open_gallery("shards/test")                              # folder of tars, a tar, or a pattern of tars
    open_gallery("AID")                                      # folder of scene folders: labels, no captions

    gallery.source      len(), read(i) -> Sample, captions(i, field), name(i) -> (shard or data set, key)
    gallery.location(i) file of image i, so that an index finds it again without the annotation file

A sample that cannot be used is left out, and ``Skipped`` lists its key under the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorclip.common.output import get_logger
from priorclip.data_shards.format.class_names import unique_classes
from priorclip.data_shards.format.manifest import NAME as MANIFEST
from priorclip.data_shards.format.sample import BadSample, Sample
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import IMAGE_SUFFIXES, Record, RecordSet, imagefolder, karpathy, keep_split
from priorclip.data_shards.sources.folder import walk_names

if TYPE_CHECKING:
    from priorclip.data_shards.stream.batch_fetcher import SampleSource

log = get_logger(__name__)

TEST, ALL = "test", "all"

Skipped = dict[str, list[str]]  # reason -> keys of the samples


@dataclass(frozen=True)
class Gallery:
    """Images with their captions and labels.

    Args:
        source: the samples
        split: their split of the Karpathy JSON, or "all"
        origin: the whole set; ``source`` is all of it or a selection
        places: index in ``origin`` of each sample of ``source``
    """

    source: SampleSource
    split: str
    origin: RecordSet | ShardSet
    places: Sequence[int]

    def location(self, sample: int) -> dict[str, Any]:
        """Returns the place of the image: ``{"path"}`` of a file, or ``{"shard", "sample"}``, a tar and its row."""
        if isinstance(self.origin, ShardSet):
            shard, row = self.origin.locate(self.places[sample])
            file = self.origin.files[shard]
            return {"shard": file.address if file.remote else str(Path(file.address).resolve()), "sample": row}
        path = self.origin.records[self.places[sample]].path
        assert path is not None, "records of a Karpathy JSON name files"
        return {"path": str(path.resolve())}

    def keep(self, samples: Sequence[int]) -> Gallery:
        """Returns a gallery of these samples only, in this order."""
        places = [self.places[sample] for sample in samples]
        return Gallery(Selection(self.origin, places), self.split, self.origin, places)


class Selection:
    """A source that holds some samples of another source."""

    def __init__(self, origin: RecordSet | ShardSet, places: Sequence[int]) -> None:
        self.origin, self.places = origin, places
        self.sizes = [len(places)]
        self.classes = origin.classes

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        return self.origin.fingerprint

    def read(self, sample: int) -> Sample:
        return self.origin.read(self.places[sample])

    def text(self, sample: int) -> Sample:
        return self.origin.text(self.places[sample])

    def name(self, sample: int) -> tuple[str, str]:
        return self.origin.name(self.places[sample])

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        return self.origin.captions(self.places[sample], caption_field)


def open_gallery(data: str, images: str | None = None, split: str | None = None, limit: int | None = None) -> Gallery:
    """Opens a Karpathy JSON (``data`` ends in .json), shards, or a folder of scene folders.

    Args:
        data: JSON file, shard specification, or folder that has images in sub-folders and no tar
        images: folder of the JSON's images
        split: of the JSON, or "all"; None takes "test" if the file has it, otherwise all. Of a folder: a sub-folder;
            None takes "test" if there is "train" too
        limit: only the first samples, this many

    Raises:
        FileNotFoundError: the file, the folder, or all images are missing
        ValueError: contradictory options, an unknown split, or a file that is no Karpathy JSON
    """
    origin: RecordSet | ShardSet
    if data.endswith(".json"):
        records, split = read_records(Path(data), images, split)
        origin = RecordSet(records)
    else:
        if images is not None:
            raise ValueError(f"--images {images} needs a Karpathy JSON in --data, but {data} holds the images itself")
        if is_image_folder(Path(data)):
            if split is None and all((Path(data) / name).is_dir() for name in (TEST, "train")):
                split = TEST
                log.info("%s: taking the folder '%s'", data, split)
            origin = RecordSet(imagefolder(data, None if split == ALL else split))
            return limit_gallery(Gallery(origin, split or ALL, origin, range(len(origin))), limit)
        if split not in (None, ALL):
            raise ValueError(f"--split {split}: shards have no splits; name the tars of the split in --data")
        origin, split = ShardSet(data), ALL
        origin.classes = unique_classes([*origin.classes, *origin.find_labels()])  # without an index, no list has them
    return limit_gallery(Gallery(origin, split or ALL, origin, range(len(origin))), limit)


def limit_gallery(gallery: Gallery, limit: int | None) -> Gallery:
    return gallery if limit is None or limit >= len(gallery.places) else gallery.keep(range(limit))


def is_image_folder(path: Path) -> bool:
    """Tells whether a folder holds images in sub-folders, and no shards."""
    if not path.is_dir() or (path / MANIFEST).exists() or any(path.glob("*.tar")):
        return False
    return bool(walk_names(path, lambda name: name.lower().endswith(IMAGE_SUFFIXES)))


def read_records(path: Path, images: str | None, split: str | None) -> tuple[list[Record], str]:
    """Returns the records of a split of a Karpathy JSON, and the name of the split."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: the file does not exist")
    if images is None:
        raise ValueError(f"--data {path} holds only file names of images: give their folder with --images DIR")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"--images {images}: the folder does not exist")
    refuse_manifest(path)
    records = karpathy(path, images)
    if split is None:
        split = TEST if any(record.split == TEST for record in records) else ALL
        log.info("%s: taking the split '%s'" if split == TEST else "%s: no test split, taking %s images", path, split)
    kept = records if split == ALL else keep_split(records, split, path)
    paths = [record.path for record in kept if record.path is not None]
    if paths and not any(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"none of the {len(paths)} images that {path} names is in --images {images} (the first is {paths[0]}): "
            f"give the folder that contains these file names"
        )
    return kept, split


def refuse_manifest(path: Path) -> None:
    """Raises ValueError if the JSON is the manifest of a shard folder, because --data takes the folder itself."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # karpathy() raises the error
    if isinstance(content, dict) and "shards" in content and "images" not in content:
        raise ValueError(f"--data {path} is the manifest of a shard folder: give the folder, --data {path.parent}")


def with_captions(gallery: Gallery, caption_field: str) -> tuple[Gallery, Skipped]:
    """Returns the samples that have captions, and the keys of those that have none. Raises ValueError if none has."""
    kept: list[int] = []
    skipped: Skipped = {}
    for sample in range(len(gallery.source)):
        try:
            gallery.source.captions(sample, caption_field)
            kept.append(sample)
        except BadSample as error:
            add_skipped(skipped, gallery, sample, error)
            log.warning("%s is left out: %s", " of ".join(reversed(gallery.source.name(sample))), error)
    if not kept:
        raise ValueError(f"no sample has a caption in '{caption_field}': see --caption_field")
    return (gallery.keep(kept) if skipped else gallery), skipped


def add_skipped(skipped: Skipped, gallery: Gallery, sample: int, error: BadSample) -> None:
    """Adds the key of a sample to ``skipped`` under the reason of the error."""
    skipped.setdefault(error.reason, []).append(gallery.source.name(sample)[1])


def merge_skipped(first: Skipped, second: Skipped) -> Skipped:
    """Returns the keys of both by reason, those of ``first`` before the others."""
    return {reason: [*first.get(reason, []), *second.get(reason, [])] for reason in {**first, **second}}


def refuse_too_many(skipped: Skipped, total: int, max_bad_share: float) -> None:
    """Raises ValueError if more than ``max_bad_share`` of the samples cannot be used."""
    count = sum(len(keys) for keys in skipped.values())
    if not count:
        return
    reasons = "; ".join(f"{reason}: {len(keys)}, such as {', '.join(keys[:3])}" for reason, keys in skipped.items())
    if count > max_bad_share * total or count == total:
        raise ValueError(
            f"{count} of {total} images cannot be used, more than --max_bad_share {max_bad_share:g} allows ({reasons})"
        )
    log.warning("%d of %d images are left out (%s)", count, total, reasons)
