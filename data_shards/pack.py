"""Records -> shards, the same bytes for any number of workers, and after being killed half way.

    records  r0 r1 r2 ...                        --shard-size 1000
    job k    records k*1000 .. k*1000+999    ->  train-00000k.tar.tmp -> fsync -> train-00000k.tar
                                             ->  train-00000k.tar.idx
                                             ->  .pack/train-00000k.json  (this shard is done; its part of the manifest)
    end      all parts -> manifest.json, quarantine.jsonl; .pack/ goes

A record that cannot be packed (missing, unreadable or oversized image, no caption and no label) is left out of its
shard, counted, and written to quarantine.jsonl. The fingerprint of options and records guards a half-finished folder:
other options, or a finished folder, are refused unless --overwrite.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

from data_shards import templates
from data_shards.images import opened, upright_rgb, upright_size
from data_shards.index import Member, ShardIndex, write_aside
from data_shards.jpeg import check_whole
from data_shards.manifest import NAME, Manifest, ShardContent, ShardEntry, combine
from data_shards.sample import BadSample, captions_of
from data_shards.seeds import mix
from data_shards.shards import PROGRESS, index_path
from data_shards.sources import Record, load

log = logging.getLogger(__name__)

OPTIONS, QUARANTINE = "options.json", "quarantine.jsonl"
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class PackPlan:
    """How records become shards.

    Args:
        prefix: shards are named PREFIX-000000.tar
        shard_size: records a shard
        max_side: images whose longer side exceeds this many pixels are shrunk to it; None keeps them
        quality: re-encode every image as JPEG of this quality; None keeps the bytes of jpg, png and webp
        max_pixels: larger images are left out
        template_captions: caption images that have a label and no caption from templates
        captions_per_image: template captions an image
        seed: of the template captions
    """

    prefix: str = "shard"
    shard_size: int = 1000
    max_side: int | None = None
    quality: int | None = None
    max_pixels: int = 100_000_000
    template_captions: bool = True
    captions_per_image: int = 1
    seed: int = 0


def pack(records: list[Record], folder: Path, plan: PackPlan, workers: int = 1, overwrite: bool = False) -> Manifest:
    """Write the shards, their indices and the manifest.

    Raises FileExistsError where the folder holds other things, ValueError where no record can be packed.
    """
    unique_keys(records)
    options = asdict(plan)
    fingerprint = hashlib.sha256(json.dumps(options).encode() + records_digest(records)).hexdigest()
    progress = claim(folder, fingerprint, overwrite)
    names = [f"{plan.prefix}-{number:06d}" for number in range(-(-len(records) // plan.shard_size))]
    chunks = [records[i * plan.shard_size : (i + 1) * plan.shard_size] for i in range(len(names))]
    todo = [i for i, name in enumerate(names) if not (progress / f"{name}.json").exists()]
    if len(todo) < len(names):
        log.info("%d of %d shards are there already", len(names) - len(todo), len(names))
    with tqdm(total=len(records), unit="img", desc="pack", disable=None) as bar:
        bar.update(sum(len(chunk) for i, chunk in enumerate(chunks) if i not in set(todo)))
        for done in run(folder, plan, [(names[i], chunks[i]) for i in todo], workers):
            bar.update(done)
    return finish(folder, progress, names, fingerprint, options)


def run(folder: Path, plan: PackPlan, jobs: list[tuple[str, list[Record]]], workers: int) -> Iterator[int]:
    """Pack each job; yields the number of its records when it is done."""
    if workers <= 1 or len(jobs) <= 1:
        for name, records in jobs:
            yield pack_shard(folder, plan, name, records)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(pack_shard, folder, plan, name, records) for name, records in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def claim(folder: Path, fingerprint: str, overwrite: bool) -> Path:
    """Make the folder ours: new, or half finished with the same fingerprint. Returns its progress folder."""
    progress = folder / PROGRESS
    note = progress / OPTIONS
    ours = overwrite and clear(folder)
    if (folder / NAME).exists():
        raise FileExistsError(f"{folder} holds finished shards: use another --output, or --overwrite")
    if note.exists():
        if json.loads(note.read_text())["fingerprint"] != fingerprint:
            raise FileExistsError(
                f"{folder} is half packed with other options or other input: repeat those to finish it, or --overwrite"
            )
        return progress
    if not ours and folder.is_dir() and any(path.name != PROGRESS for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and was not written by pack: use another --output")
    progress.mkdir(parents=True, exist_ok=True)
    write_aside(note, json.dumps({"fingerprint": fingerprint}).encode())
    return progress


def clear(folder: Path) -> bool:
    """Remove what packing wrote, and nothing else; False where it had written nothing."""
    manifest = Manifest.load(folder)
    note = folder / PROGRESS
    if not manifest and not note.is_dir():
        return False
    names = {entry.name for entry in manifest.shards} if manifest else set()
    names |= {f"{path.stem}.tar" for path in note.glob("*.json")}
    for name in names:
        for path in (folder / name, index_path(folder / name)):
            path.unlink(missing_ok=True)
    for path in (*folder.glob("*.tar.tmp"), *folder.glob("*.idx.tmp"), folder / QUARANTINE, folder / NAME):
        path.unlink(missing_ok=True)
    shutil.rmtree(note, ignore_errors=True)
    return True


def finish(folder: Path, progress: Path, names: list[str], fingerprint: str, options: dict) -> Manifest:
    """Join the parts of all shards into the manifest; the folder is finished when that is there."""
    contents = [read_part(progress / f"{name}.json") for name in names]
    manifest = combine(contents, fingerprint, options)
    bad = [row for content in contents for row in content.bad]
    if not manifest.samples:
        raise ValueError(f"none of {len(bad)} records could be packed: {bad[0] if bad else 'there are no records'}")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    write_aside(folder / QUARANTINE, lines.encode("utf-8", "surrogateescape"))
    manifest.save(folder)
    shutil.rmtree(progress)
    return manifest


def read_part(path: Path) -> ShardContent:
    content = json.loads(path.read_text(encoding="utf-8"))
    return ShardContent(**{**content, "entry": ShardEntry(**content["entry"])})


def pack_shard(folder: Path, plan: PackPlan, name: str, records: list[Record]) -> int:
    """Write one tar with its index and its part of the manifest; returns the number of records taken."""
    path = folder / f"{name}.tar"
    temporary = path.with_name(f"{path.name}.tmp")
    bad: list[dict[str, str]] = []
    with open(temporary, "wb") as file:
        writer = ShardWriter(file)
        for record in records:
            try:
                writer.add(*members_of(record, plan))
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
    content = ShardContent(entry, writer.captions, dict(writer.classes), sorted(writer.fields), bad)
    text = json.dumps(asdict(content), ensure_ascii=False)
    write_aside(folder / PROGRESS / f"{name}.json", text.encode("utf-8", "surrogateescape"))
    return len(records)


class HashingFile:
    """A file that hashes what is written to it, so that a shard is not read again for its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Appends samples to a tar whose bytes depend on the samples alone: no time, no owner, a fixed mode."""

    def __init__(self, file: BinaryIO) -> None:
        self.output = HashingFile(file)
        self.tar = tarfile.open(fileobj=self.output, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        self.members: list[Member] = []
        self.samples = self.captions = 0
        self.classes: Counter[str] = Counter()
        self.fields: set[str] = set()

    def add(self, key: str, members: dict[str, bytes], info: dict) -> None:
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size, header.mode, header.mtime = len(data), 0o644, 0
            self.tar.addfile(header, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            offset = self.output.size - padded
            self.members.append(Member(key, extension, offset, len(data), hashlib.sha256(data).digest()))
        self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
        self.samples += 1
        self.captions += len(info["captions"])
        self.fields |= {name for name in ("captions", "coarse_captions") if info.get(name)}
        if info["label"] is not None:
            self.classes[info["label"]] += 1

    def close(self) -> tuple[str, int]:
        """(hex SHA-256, size) of the tar."""
        self.tar.close()
        return self.output.sha256.hexdigest(), self.output.size


def members_of(record: Record, plan: PackPlan) -> tuple[str, dict[str, bytes], dict]:
    """(key, members by extension, JSON content) of a record. Raises BadSample where it cannot be used."""
    record = load(record)
    assert isinstance(record.image, bytes)
    extension, data, width, height = encoded(record.image, plan)
    captions = captions_of({"captions": record.captions}, "captions")
    if not captions and plan.template_captions and record.scenes:
        captions = templates.captions(record.scenes, plan.captions_per_image, mix(plan.seed, text_seed(record.key)))
    if not captions and not record.scenes:
        raise BadSample("no caption", "neither caption nor label")
    info = {
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
        if len(captions) == 1:
            members["txt"] = captions[0].encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample("text is not UTF-8", str(error)) from error
    return record.key, members, info


def encoded(data: bytes, plan: PackPlan) -> tuple[str, bytes, int, int]:
    """(extension, bytes, width, height) as stored: the same bytes unless the plan or the format asks for others.

    The image is decoded in any case, so that what is packed can be read.
    """
    with opened(data, plan.max_pixels) as image:
        check_whole(data)
        width, height = upright_size(image)
        known = KEPT_FORMATS.get(image.format or "")
        large = plan.max_side is not None and max(width, height) > plan.max_side
        if known and not large and plan.quality is None:
            image.load()
            return known, data, width, height
        picture = upright_rgb(image)
        if large and plan.max_side is not None:
            picture.thumbnail((plan.max_side, plan.max_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=plan.quality or DEFAULT_QUALITY)
        return "jpg", buffer.getvalue(), picture.width, picture.height


def unique_keys(records: list[Record]) -> None:
    """Give a second record of the same key the suffix -2, and so on: a key is one sample."""
    taken: set[str] = set()
    for record in records:
        key, number = record.key, 1
        while record.key in taken:
            number += 1
            record.key = f"{key}-{number}"
        taken.add(record.key)


def records_digest(records: list[Record]) -> bytes:
    """Changes with any key, caption, label, split or drawing; not with where the folder lies."""
    digest = hashlib.sha256()
    for record in records:
        image = record.image.name if isinstance(record.image, Path) else repr(record.image)
        row = (record.key, image, record.captions, record.label, record.split, record.source, record.url)
        digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return digest.digest()


def text_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little")
