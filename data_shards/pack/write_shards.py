"""Packs records into shards: the same bytes for any number of workers, ranks and tasks, also after a kill and restart.

    records  r0 r1 r2 ...                        without duplicates and evaluation images, see selection.py
    job k    records k*1000 .. k*1000+999    ->  train-00000k.tar.HOST~PID.tmp -> fsync -> train-00000k.tar
                                             ->  train-00000k.tar.idx
                                             ->  .pack/train-00000k.json  (this shard is done; its part of the manifest)
    end      all parts -> manifest.json, quarantine.jsonl, sizes.json, wids.json; .pack/ goes

worker_pool.py runs the jobs; unfinished_folder.py has the files of an unfinished folder.

A record that cannot be packed (missing, unreadable or oversized image, no caption and no label) is left out of its
shard, counted, and listed in quarantine.jsonl. A fingerprint of options and records protects an unfinished folder: pack
refuses it with other options, and refuses a finished folder, unless --overwrite is set.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from priorclip.common.files import temporary_path
from priorclip.common.output import get_logger
from priorclip.common.progress import Progress
from priorclip.data_shards.dedupe.leakage import EvaluationImages
from priorclip.data_shards.find_shards import PROGRESS
from priorclip.data_shards.format.client_files import LAYOUT
from priorclip.data_shards.format.manifest import Manifest, ShardContent, ShardEntry
from priorclip.data_shards.format.sample import CAPTION_MEMBER, BadSample, captions_of
from priorclip.data_shards.format.shard_index import Member, ShardIndex, index_path
from priorclip.data_shards.images.decode import open_image, upright_rgb, upright_size
from priorclip.data_shards.images.jpeg import check_complete
from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.pack.selection import select_records
from priorclip.data_shards.pack.unfinished_folder import (
    HASHES,
    claim_folder,
    finish_folder,
    list_unfinished,
    load_finished,
    write_shard_record,
)
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
from priorclip.data_shards.rasters.band_file import read_measured
from priorclip.data_shards.rasters.values import DEFAULT, ValueRule
from priorclip.data_shards.sources import Record, load, templates

log = get_logger(__name__)

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class PackPlan:
    """The options of packing.

    Args:
        prefix: shards are named PREFIX-000000.tar
        shard_size: records per shard
        max_side: shrink images whose longer side exceeds this many pixels; None keeps them
        quality: re-encode every image as JPEG of this quality; None keeps the bytes of jpg, png and webp
        max_pixels: leave out larger images
        template_captions: make captions from templates for images with a label and no caption
        captions_per_image: template captions per image
        seed: seed of the template captions
        duplicates: keep, drop or merge records of the same picture
        near_duplicates: number of bits (of 64) that perceptual hashes may differ in; None compares bytes only
        values: how measurements become 8 bits
        needs_text: leave out images without caption and label; without it they are packed, to be indexed and searched
        image_format: jpeg for 8-bit pictures, tiff if the records' images are TIFFs of measured values, which are kept
    """

    prefix: str = "shard"
    shard_size: int = 1000
    max_side: int | None = None
    quality: int | None = None
    max_pixels: int = 100_000_000
    template_captions: bool = True
    captions_per_image: int = 1
    seed: int = 0
    duplicates: str = "keep"
    near_duplicates: int | None = None
    values: ValueRule = DEFAULT
    needs_text: bool = True
    image_format: str = "jpeg"


def pack(
    records: list[Record],
    folder: Path,
    plan: PackPlan,
    workers: int = 1,
    overwrite: bool = False,
    evaluation: EvaluationImages | None = None,
) -> Manifest:
    """Writes the shards, their indices and the manifest with ``workers`` processes of this machine.

    Raises:
        FileExistsError: the folder has other files
        ValueError: no record can be packed
    """
    manifest = pack_share(records, folder, plan, WorkerPool(workers), TaskShare(), overwrite, evaluation)
    assert manifest is not None, "a single task has no other tasks to wait for"
    return manifest


def pack_share(
    records: list[Record],
    folder: Path,
    plan: PackPlan,
    pool: WorkerPool,
    share: TaskShare,
    overwrite: bool = False,
    evaluation: EvaluationImages | None = None,
) -> Manifest | None:
    """Packs the shards of this task. Returns the manifest if all shards are done, None if other tasks have some left.

    Args:
        records: all records, the same for each task
        folder: output folder, the same for each task
        plan: options of packing
        pool: processes of this task
        share: shards of this task
        overwrite: remove what an earlier pack wrote; an error if there are several tasks
        evaluation: images to leave out
    """
    make_keys_unique(records)
    options = {**asdict(plan), "exclude": evaluation.digest if evaluation else None, "layout": LAYOUT}
    fingerprint = hashlib.sha256(json.dumps(options).encode() + hash_of_records(records)).hexdigest()
    alone = share.count == 1
    try:
        if not alone and (manifest := load_finished(folder, fingerprint)):
            return manifest
        progress = claim_folder(folder, fingerprint, overwrite, alone)
        selection = select_records(
            records, progress / HASHES, plan.duplicates, plan.near_duplicates, evaluation, plan.max_pixels, pool, share
        )
        names = pack_shards(selection.records, folder, plan, pool, share)
        missing = list_unfinished(progress, names)
    except (FileNotFoundError, FileExistsError):
        # Another task has finished the folder and removed the files that this task wanted to read.
        if alone or not (manifest := load_finished(folder, fingerprint)):
            raise
        return manifest
    if missing and progress.is_dir():
        log.info("other tasks still pack %d of %d shards, the first is %s", len(missing), len(names), missing[0])
        return None
    return finish_folder(folder, names, fingerprint, options, selection)


def pack_shards(records: list[Record], folder: Path, plan: PackPlan, pool: WorkerPool, share: TaskShare) -> list[str]:
    """Packs the unfinished shards of the share. Returns the names of all shards."""
    names = [f"{plan.prefix}-{number:06d}" for number in range(-(-len(records) // plan.shard_size))]
    if not names:
        raise ValueError("there is nothing to pack: no record is left, or all show evaluation images")

    def chunk(number: int) -> list[Record]:
        return records[number * plan.shard_size : (number + 1) * plan.shard_size]

    missing = set(list_unfinished(folder / PROGRESS, names))
    own = [number for number in range(len(names)) if share.has(number)]
    todo = [number for number in own if names[number] in missing]
    if len(todo) < len(own):
        log.info("%d of %d shards are done already", len(own) - len(todo), len(own))
    jobs = ((folder, plan, names[number], chunk(number)) for number in todo)
    total = sum(len(chunk(number)) for number in own)
    before = total - sum(len(chunk(number)) for number in todo)
    with Progress(total, "pack", "img", done=before) as progress:
        for done in pool.run(pack_shard, jobs, len(todo)):
            progress.update(done)
    return names


def pack_shard(folder: Path, plan: PackPlan, name: str, records: list[Record]) -> int:
    """Writes one tar with its index and its part of the manifest. Returns the number of records.

    Raises:
        OSError: the tar, which the error names, cannot be written; the unfinished file is removed
    """
    path = folder / f"{name}.tar"
    temporary = temporary_path(path)
    try:
        return write_shard(folder, plan, path, temporary, records)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # the error of a write has no file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_shard(folder: Path, plan: PackPlan, path: Path, temporary: Path, records: list[Record]) -> int:
    bad: list[dict[str, str]] = []
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:  # "x" does not follow a symbolic link of this name
        writer = ShardWriter(file)
        for record in records:
            try:
                writer.add(*make_members(record, plan))
            except BadSample as error:
                bad.append({"shard": path.name, "key": record.key, "reason": error.reason, "detail": error.detail})
        digest, size = writer.close()
        file.flush()
        os.fsync(file.fileno())
    if writer.samples:
        index_digest = ShardIndex.build(writer.members).save(index_path(path))
        os.replace(temporary, path)
    else:
        index_digest, size = b"", 0
        temporary.unlink()
    entry = ShardEntry(path.name, writer.samples, size, digest, index_digest.hex())
    content = ShardContent(
        entry, writer.captions, dict(writer.classes), sorted(writer.fields), bad, writer.captioned, dict(writer.scaled)
    )
    write_shard_record(folder / PROGRESS, path.stem, content)
    return len(records)


class HashingFile:
    """A file that hashes the bytes written to it, so that the SHA-256 of a shard needs no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Appends samples to a tar whose bytes depend only on the samples: no time, no owner, a fixed mode."""

    def __init__(self, file: BinaryIO) -> None:
        self.output = HashingFile(file)
        self.tar = tarfile.open(fileobj=self.output, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        self.members: list[Member] = []
        self.samples = self.captions = self.captioned = 0
        self.classes: Counter[str] = Counter()
        self.fields: set[str] = set()
        self.scaled: Counter[str] = Counter()

    def add(self, key: str, members: dict[str, bytes], info: dict) -> None:
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size, header.mode, header.mtime = len(data), 0o644, 0
            self.tar.addfile(header, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            offset = self.output.size - padded
            self.members.append(Member(key, extension, offset, len(data), hashlib.sha256(data).digest()))
        self.tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps each header
        self.samples += 1
        self.captions += len(info["captions"])
        self.captioned += CAPTION_MEMBER in members
        self.fields |= {name for name in ("captions", "coarse_captions") if info.get(name)}
        if how := info.get("raster", {}).get("range_from"):
            self.scaled[how] += 1
        if info["label"] is not None:
            self.classes[info["label"]] += 1

    def close(self) -> tuple[str, int]:
        """Closes the tar and returns its (hex SHA-256, size)."""
        self.tar.close()
        return self.output.sha256.hexdigest(), self.output.size


def make_members(record: Record, plan: PackPlan) -> tuple[str, dict[str, bytes], dict]:
    """Returns (key, members by extension, JSON content) of a record. Raises BadSample if it cannot be packed."""
    record = load(record)
    assert isinstance(record.image, bytes)
    extension, data, width, height, facts = encode_image(record.image, plan)
    captions = captions_of({"captions": record.captions}, "captions")
    if not captions and plan.template_captions and record.scenes:
        captions = templates.captions(
            record.scenes, plan.captions_per_image, hash_integers(plan.seed, text_seed(record.key))
        )
    if plan.needs_text and not captions and not record.scenes:
        raise BadSample("no caption", "neither caption nor label")
    info = {
        **({"raster": facts} if facts else {}),
        **record.extra,
        "captions": captions,
        "label": record.label,
        "source": record.source,
        "url": record.url,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        text = json.dumps(info, ensure_ascii=False, sort_keys=True).encode("utf-8")
        members = {extension: data, "json": text}
        if captions:
            members[CAPTION_MEMBER] = captions[0].encode("utf-8")
        members |= record.members or {}
    except UnicodeEncodeError as error:
        raise BadSample("text is not UTF-8", str(error)) from error
    return record.key, members, info


def encode_image(data: bytes, plan: PackPlan) -> tuple[str, bytes, int, int, dict[str, Any]]:
    """Returns (extension, bytes, width, height, raster) of the stored image. It keeps the bytes if the plan allows it.

    It always decodes the image, so that each packed image can be read. ``raster`` says how measurements became 8 bits,
    and is empty for an ordinary picture.
    """
    if plan.image_format == "tiff":
        planes, _, _ = read_measured(data, None, lambda wide, high: (0, 0, wide, high), plan.max_pixels)
        return "tif", data, planes.shape[2], planes.shape[1], {}
    with open_image(data, plan.max_pixels, plan.values) as image:
        facts = image.info.get("raster", {})
        check_complete(data)
        width, height = upright_size(image)
        known = KEPT_FORMATS.get(image.format or "")
        large = plan.max_side is not None and max(width, height) > plan.max_side
        if known and not large and plan.quality is None:
            image.load()
            return known, data, width, height, facts
        picture = upright_rgb(image)
        if large and plan.max_side is not None:
            picture.thumbnail((plan.max_side, plan.max_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=plan.quality or DEFAULT_QUALITY)
        return "jpg", buffer.getvalue(), picture.width, picture.height, facts


def make_keys_unique(records: list[Record]) -> None:
    """Appends -2, -3 ... to the key of further records with the same key, because a key is one sample."""
    taken: set[str] = set()
    for record in records:
        key, number = record.key, 1
        while record.key in taken:
            number += 1
            record.key = f"{key}-{number}"
        taken.add(record.key)


def hash_of_records(records: list[Record]) -> bytes:
    """Returns a hash of all fields of the records and the names of their images, without the folder of the images."""
    digest = hashlib.sha256()
    for record in records:
        image = record.image.name if isinstance(record.image, Path) else repr(record.image)
        extra = json.dumps(record.extra, sort_keys=True, default=repr)
        row = (record.key, image, record.captions, record.label, record.split, record.source, record.url, extra)
        digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return digest.digest()


def text_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little")
