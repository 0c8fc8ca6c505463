"""`data_shards verify`: checks that each byte is the byte that packing wrote.

For each shard of the manifest it checks that the tar and its .idx exist and have their size and SHA-256, that the .idx
has the true place of each member, that each member has its SHA-256, and that KEY.json has the SHA-256 of its image
and, of a tile, a footprint, window, CRS, transform and time that can be. Samples that streaming would skip are problems
too, even if packing wrote them so: those without an image, with a damaged text, or with bytes that are no image.
sizes.json and wids.json, which other programs read, must say the same as the indices; older packs have neither.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

from priorclip.common.files import sha256_of
from priorclip.data_shards.format.client_files import LAYOUT, client_contents, count_captioned
from priorclip.data_shards.format.manifest import Manifest, ShardEntry
from priorclip.data_shards.format.place import columns_of_info, place_of_info
from priorclip.data_shards.format.sample import IMAGE_MEMBERS, JSON_MEMBER, BadSample, split_name
from priorclip.data_shards.format.shard_index import Member, ShardIndex, index_path
from priorclip.data_shards.format.tar import read_members
from priorclip.data_shards.images.decode import count_pixels, open_image, upright_rgb
from priorclip.data_shards.images.jpeg import check_complete
from priorclip.data_shards.pack.index_tars import parallel
from priorclip.data_shards.shards import ShardSet


def verify_folder(folder: Path, workers: int = 1, decode: bool = False) -> tuple[list[str], int]:
    """Checks the shards of a manifest, and with ``decode`` the pixels of each image.

    Returns:
        (problems, samples checked); a problem names the shard, and the member or the first sample

    Raises:
        FileNotFoundError: no manifest
        ValueError: a file beside the shards that says how to read them is damaged
    """
    manifest = Manifest.load(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no manifest.json: `data_shards index` writes one")
    found = parallel(partial(verify_shard, folder, decode=decode), manifest.shards, workers, "verify")
    problems = [problem for part in found for problem in part]
    listed = {entry.name for entry in manifest.shards}
    problems += [f"{tar.name}: not in the manifest" for tar in sorted(folder.glob("*.tar")) if tar.name not in listed]
    if sum(entry.samples for entry in manifest.shards) != manifest.samples:
        problems.append(f"manifest.json: its shards do not add up to {manifest.samples} samples")
    if manifest.options.get("layout") == LAYOUT:
        problems += check_client_files(folder, manifest)
    return problems, manifest.samples


def check_client_files(folder: Path, manifest: Manifest) -> list[str]:
    """Returns the problems of sizes.json and wids.json. Shards whose index cannot be read are a problem already."""
    captioned: dict[str, int] = {}
    for entry in manifest.shards:
        try:
            captioned[entry.name] = count_captioned(ShardIndex.load(index_path(folder / entry.name), hashes=False))
        except (OSError, ValueError):
            return []
    problems = []
    for name, expected in client_contents(manifest.shards, captioned).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != len(expected) or path.read_bytes() != expected:
            problems.append(f"{name}: does not fit the shards; `data_shards index --overwrite` writes it again")
    return problems


def verify_shard(folder: Path, entry: ShardEntry, decode: bool = False) -> list[str]:
    """Returns the problems of one shard; each begins with the shard's name."""
    path = folder / entry.name
    if not path.is_file():
        return [f"{entry.name}: missing"]
    problems = []
    size = path.stat().st_size
    if size != entry.bytes:
        problems.append(f"{entry.name}: {size} bytes, the manifest says {entry.bytes}")
    if sha256_of(path) != entry.sha256:
        problems.append(f"{entry.name}: SHA-256 differs from the manifest")
    index, found = check_index(path, entry)
    problems += found
    if index is not None:
        problems += verify_members(path, index)
    if index is not None and not problems:  # otherwise the index may lead to other bytes
        problems += find_bad_samples(path, decode)
    return problems


def find_bad_samples(path: Path, decode: bool) -> list[str]:
    """Returns a problem for each reason for which streaming would skip samples, with their number and the first."""
    shard = ShardSet(str(path))
    bad: dict[str, list[str]] = {}
    for number in range(len(shard)):
        try:
            check_image(shard.read(number).image, decode)
        except BadSample as error:
            bad.setdefault(error.reason, []).append(f"{shard.key(number)} {error.detail}".rstrip())
    return [
        f"{path.name}: streaming skips {len(samples)} samples: {reason}, the first is {samples[0]}"
        for reason, samples in bad.items()
    ]


def check_image(data: bytes, decode: bool) -> None:
    """Raises BadSample if the header is not that of an image that we read, or with ``decode`` if a pixel is damaged."""
    if decode:
        with open_image(data) as image:
            check_complete(data)
            upright_rgb(image).load()
    else:
        count_pixels(data)


def check_index(path: Path, entry: ShardEntry) -> tuple[ShardIndex | None, list[str]]:
    """Returns the shard's index, or None if it cannot be read, and its problems."""
    place = index_path(path)
    if not place.is_file():
        return None, [f"{place.name}: missing"]
    problems = []
    if hashlib.sha256(place.read_bytes()).hexdigest() != entry.index_sha256:
        problems.append(f"{place.name}: SHA-256 differs from the manifest")
    try:
        index = ShardIndex.load(place)
    except ValueError as error:
        return None, [*problems, f"{place.name}: {error}"]
    if len(index) != entry.samples:
        problems.append(f"{place.name}: {len(index)} samples, the manifest says {entry.samples}")
    return index, problems


def verify_members(path: Path, index: ShardIndex) -> list[str]:
    """Compares each member of the tar with its row in the index, and each image with its KEY.json."""
    rows: dict[tuple[str, str], list[Member]] = {}  # by key and extension; a name may occur twice
    for sample in range(len(index)):
        for member in index.members(sample):
            rows.setdefault((member.key, member.extension), []).append(member)
    problems: list[str] = []
    images: dict[str, str] = {}  # key -> hash of its image, because members of a key are neighbours
    damage: list[str] = []
    for info, data in read_members(path, True, damage.append):
        assert data is not None
        key, extension = split_name(info.name)
        digest = hashlib.sha256(data)
        place = f"{path.name}: member {info.name}"
        found = Member(key, extension, info.offset_data, info.size, digest.digest())
        known = rows.get((key, extension))
        problems += [f"{place}: {text}" for text in compare_member(found, known.pop(0) if known else None)]
        if extension in IMAGE_MEMBERS:
            images = {key: digest.hexdigest()}
        elif extension == JSON_MEMBER and key in images:
            problems += [f"{place}: {text}" for text in compare_json(data, images[key])]
    problems += [f"{path.name}: {text}" for text in damage]
    lost = [member for members in rows.values() for member in members]
    if lost:
        first = min(lost, key=lambda member: member.offset)
        problems.append(f"{path.name}: {len(lost)} members are lost, the first is {first.key}.{first.extension}")
    return problems


def compare_member(found: Member, row: Member | None) -> list[str]:
    """Returns the differences between a member and its row in the index."""
    if row is None:
        return ["not in the index"]
    problems = []
    if (found.offset, found.size) != (row.offset, row.size):
        problems.append(f"at byte {found.offset}, {found.size} long; the index says {row.offset} and {row.size}")
    if row.sha256 is not None and found.sha256 != row.sha256:
        problems.append("SHA-256 differs from the index")
    return problems


def compare_json(data: bytes, image_sha256: str) -> list[str]:
    """Returns the problems of KEY.json: another image's hash, or a place or kept columns that cannot be."""
    try:
        info = json.loads(data)
        recorded = info.get("sha256")
    except (ValueError, AttributeError):
        return ["not a JSON object"]
    problems = [] if recorded in (None, image_sha256) else ["its sha256 is not that of the image"]
    try:
        place_of_info(info)
        columns_of_info(info)
    except ValueError as error:
        problems.append(str(error))
    return problems
