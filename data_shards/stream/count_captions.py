"""Counts the captions of each image, for ``data.captions: all``: one pass over the texts at the start of a run.

Neither the index nor the manifest holds these counts. The pass reads no image. Each rank makes it, and its workers get
the counts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from priorclip.common.output import get_logger
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.order.caption_pairs import CaptionPairs

log = get_logger(__name__)

MOST = 100_000_000  # samples: the pass takes an hour or more, and the numbers 800 MB in every decoding process


def count_pairs(source: Any, caption_field: str) -> CaptionPairs:
    """Returns the (image, caption) pairs of a ShardSet or RecordSet.

    A sample whose captions cannot be read counts as one pair, so that the stream meets it and reports it as bad.

    Raises:
        ValueError: a shard is remote, so that the pass would be one request for each sample, or there are too many
    """
    refuse_slow(source, "data.captions: all counts the captions")
    start = time.monotonic()
    counts = np.array([caption_count(source, index, caption_field) for index in range(len(source))], np.int64)
    pairs = CaptionPairs(counts)
    log.info("%d captions of %d images, counted in %.1f s", len(pairs), len(source), time.monotonic() - start)
    return pairs


def caption_count(source: Any, index: int, caption_field: str) -> int:
    try:
        return len(source.captions(index, caption_field))
    except BadSample:
        return 1


def refuse_slow(source: Any, work: str) -> None:
    """Raises ValueError if a shard is remote or there are too many samples.

    ``work`` is the option and what it does with each sample.
    """
    if len(source) > MOST:
        raise ValueError(
            f"{work} of every sample at the start and keeps a number for each: at most {MOST} samples, and there are "
            f"{len(source)}. Leave out {work.split(':')[0]}"
        )
    remote = [file for file in getattr(source, "files", []) if file.remote]
    if remote:
        raise ValueError(
            f"{work} of every sample at the start, and {remote[0]} is remote: that would be one request for each of "
            f"the {len(source)} samples. Copy the shards to a local folder, or leave out {work.split(':')[0]}"
        )
