"""Reads the scene of each sample, for ``data.balance: scenes``: one pass over the texts at the start of a run.

The pass reads no image. Each rank makes it, and its workers get the result.
"""

from __future__ import annotations

import time
from typing import Any

from priorclip.common.output import get_logger
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.order.balanced_scenes import BalancedScenes
from priorclip.data_shards.stream.count_captions import refuse_slow

log = get_logger(__name__)


def group_scenes(source: Any, class_ids: ClassIds) -> BalancedScenes:
    """Returns the samples of a ShardSet or RecordSet by scene.

    A sample whose text cannot be read counts to the first scene, so that the stream meets it and reports it as bad.

    Raises:
        ValueError: a sample has no scene or one that is no class, or a shard is remote, so that the pass would be one
            request for each sample, or there are too many samples
    """
    refuse_slow(source, "data.balance: scenes reads the scene")
    start = time.monotonic()
    scenes = [scene_of(source, index, class_ids) for index in range(len(source))]
    balanced = BalancedScenes(scenes, class_ids.names)
    log.info("%d samples of %d scenes, read in %.1f s", len(scenes), len(set(scenes)), time.monotonic() - start)
    return balanced


def scene_of(source: Any, index: int, class_ids: ClassIds) -> int:
    try:
        label = source.text(index).label
    except BadSample:
        return 0
    scene = class_ids[label]
    if scene < 0:
        shard, key = source.name(index)
        why = "has no scene" if label is None else f"has the scene {label!r}, which is no class of the shards"
        raise ValueError(
            f"data.balance: scenes needs the scene of every sample, and {key} of {shard} {why}: pack it with its "
            "label, or set data.balance to none"
        )
    return scene
