"""What ``--data`` names, as a source of samples that can be read one by one.

    open_gallery("dataset_rsicd.json", "RSICD_images")       # Karpathy JSON: its test split
    open_gallery("shards/test")                              # folder of tars, a tar, or a pattern of tars
    open_gallery("AID")                                      # folder of scene folders: labels, no captions

    gallery.source      len(), read(i) -> Sample, captions(i, field), name(i) -> (shard or data set, key)
    gallery.location(i)    where image i lies, so that an index finds it again without the annotation file

A sample that cannot be used is left out and said so: ``Skipped`` lists its key under the reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorclip.data_shards.format.manifest import NAME as MANIFEST
from priorclip.data_shards.format.sample import BadSample, Sample
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import IMAGE_SUFFIXES, Record, RecordSet, imagefolder, karpathy, keep_split
from priorclip.data_shards.sources.folder import walk_names

if TYPE_CHECKING:
    from priorclip.data_shards.stream.batch_fetcher import SampleSource

log = logging.getLogger(__name__)

TEST, ALL = "test", "all"

Skipped = dict[str, list[str]]  # reason -> keys of the samples


@dataclass(frozen=True)
class Gallery:
    """Images with what is known about them.

    Args:
        source: the samples
        split: split of the Karpathy JSON they are, or "all"
        origin: the whole set that ``source`` may be a selection of
        places: index in ``origin`` of each sample of ``source``
    """

    source: SampleSource
    split: str
    origin: RecordSet | ShardSet
    places: Sequence[int]

    def location(self, sample: int) -> dict[str, Any]:
        """Where the image lies: ``{"path"}`` of a file, or ``{"shard", "sample"}``: a tar and the row in it."""
        if isinstance(self.origin, ShardSet):
            shard, row = self.origin.locate(self.places[sample])
            file = self.origin.files[shard]
            return {"shard": file.address if file.remote else str(Path(file.address).resolve()), "sample": row}
        path = self.origin.records[self.places[sample]].path
        assert path is not None, "a Karpathy JSON names files"
        return {"path": str(path.resolve())}

    def keep(self, samples: Sequence[int]) -> Gallery:
        """The gallery with these samples only, in the order given."""
        places = [self.places[sample] for sample in samples]
        return Gallery(Selection(self.origin, places), self.split, self.origin, places)


class Selection:
    """Some samples of a source, as a source."""

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
    """The samples of a Karpathy JSON (``data`` ends in .json), of shards, or of a folder of scene folders.

    Args:
        data: JSON file, shard specification, or folder with images below and no tar in it
        images: folder of the JSON's images
        split: of the JSON, or "all"; None takes "test" where the file has it, else all. Of a folder: the one in it;
            None takes "test" where there is "train" beside it
        limit: the first so many samples

    Raises:
        FileNotFoundError: the file, the folder, or every single image is not there
        ValueError: options that do not fit each other, a split that is not there, a file that is no Karpathy JSON
    """
    origin: RecordSet | ShardSet
    if data.endswith(".json"):
        records, split = read_records(Path(data), images, split)
        origin = RecordSet(records)
    else:
        if images is not None:
            raise ValueError(
                f"--images {images} goes with a Karpathy JSON; the shards of --data {data} hold the images"
            )
        if is_image_folder(Path(data)):
            if split is None and all((Path(data) / name).is_dir() for name in (TEST, "train")):
                split = TEST
                log.info("%s: taking the folder '%s'", data, split)
            origin = RecordSet(imagefolder(data, None if split == ALL else split))
            return limit_gallery(Gallery(origin, split or ALL, origin, range(len(origin))), limit)
        if split not in (None, ALL):
            raise ValueError(f"--split {split}: shards have no splits, so name the tars of the split in --data")
        origin, split = ShardSet(data), ALL
    return limit_gallery(Gallery(origin, split or ALL, origin, range(len(origin))), limit)


def limit_gallery(gallery: Gallery, limit: int | None) -> Gallery:
    return gallery if limit is None or limit >= len(gallery.places) else gallery.keep(range(limit))


def is_image_folder(path: Path) -> bool:
    """Whether it holds images, in folders, and no shards."""
    if not path.is_dir() or (path / MANIFEST).exists() or any(path.glob("*.tar")):
        return False
    return bool(walk_names(path, lambda name: name.lower().endswith(IMAGE_SUFFIXES)))


def read_records(path: Path, images: str | None, split: str | None) -> tuple[list[Record], str]:
    """Records of the split of a Karpathy JSON, and the split's name."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    if images is None:
        raise ValueError(f"--data {path} names images by file name: give their folder as --images DIR")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"--images {images}: no such folder")
    refuse_manifest(path)
    records = karpathy(path, images)
    if split is None:
        split = TEST if any(record.split == TEST for record in records) else ALL
        log.info("%s: taking the split '%s'" if split == TEST else "%s: no test split, taking %s images", path, split)
    kept = records if split == ALL else keep_split(records, split, path)
    paths = [record.path for record in kept if record.path is not None]
    if paths and not any(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"none of the {len(paths)} images that {path} names is in --images {images} (the first would be "
            f"{paths[0]}): give the folder that its file names are relative to"
        )
    return kept, split


def refuse_manifest(path: Path) -> None:
    """A shard folder's manifest.json is JSON too, but the folder is what --data takes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # karpathy() says what is wrong with it
    if isinstance(content, dict) and "shards" in content and "images" not in content:
        raise ValueError(f"--data {path} is the manifest of a shard folder: give the folder, --data {path.parent}")


def with_captions(gallery: Gallery, caption_field: str) -> tuple[Gallery, Skipped]:
    """The samples that have captions, and the keys of those that have none."""
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
    """Write a sample down under the reason."""
    skipped.setdefault(error.reason, []).append(gallery.source.name(sample)[1])


def refuse_too_many(skipped: Skipped, total: int, max_bad_share: float) -> None:
    """Raise ValueError where more than the share of the samples cannot be used."""
    count = sum(len(keys) for keys in skipped.values())
    if not count:
        return
    reasons = "; ".join(f"{reason}: {len(keys)}, such as {', '.join(keys[:3])}" for reason, keys in skipped.items())
    if count > max_bad_share * total or count == total:
        raise ValueError(
            f"{count} of {total} images cannot be used, more than --max_bad_share {max_bad_share:g} allows ({reasons})"
        )
    log.warning("%d of %d images are left out (%s)", count, total, reasons)
