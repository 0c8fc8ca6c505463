"""Files beside the shards by which other programs read a pack: open_clip's trainer, and wids.

    sizes.json    {"shard-000000.tar": 1000, "shard-000001.tar": 998}      samples with a caption
    wids.json     {"wids_version": 1, "shardlist": [{"url": "shard-000000.tar", "nsamples": 1000, "filesize": ...}]}

    python -m open_clip_train.main --dataset-type webdataset --train-data "FOLDER/shard-{000000..000001}.tar"
    wids.ShardListDataset("FOLDER/wids.json")[1234]

open_clip skips a sample without KEY.txt, and waits for ever if it wants more samples than it finds. Our own programs
read neither file: `manifest.json` and the .idx files say more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from priorclip.common.files import write_bytes
from priorclip.data_shards.format.manifest import ShardEntry
from priorclip.data_shards.format.sample import CAPTION_MEMBER
from priorclip.data_shards.format.shard_index import ShardIndex

SIZES, WIDS = "sizes.json", "wids.json"
CLIENT_FILES = (SIZES, WIDS)
LAYOUT = 2  # of a pack, in the manifest's options: from 2 on there are these files, and KEY.txt has the first caption


def client_contents(entries: Sequence[ShardEntry], captioned: Mapping[str, int]) -> dict[str, bytes]:
    """Returns the bytes of each file by its name.

    Args:
        entries: shards with at least one sample
        captioned: by name of the shard, its samples that have KEY.txt
    """
    shards = [{"url": entry.name, "nsamples": entry.samples, "filesize": entry.bytes} for entry in entries]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    return {SIZES: encoded({entry.name: captioned[entry.name] for entry in entries}), WIDS: encoded(index)}


def write_client_files(folder: Path, entries: Sequence[ShardEntry], captioned: Mapping[str, int]) -> None:
    for name, data in client_contents(entries, captioned).items():
        write_bytes(folder / name, data)


def count_captioned(index: ShardIndex) -> int:
    """Returns the number of samples that have KEY.txt."""
    return sum(
        any(member.extension == CAPTION_MEMBER for member in index.members(sample)) for sample in range(len(index))
    )


def encoded(content: Any) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"
