"""The data plane: labelled or captioned images become tar shards, and tar shards become a deterministic stream.

    sources -> pack -> TAR + TAR.idx + manifest.json -> ShardSet -> epoch_order -> ShardStream -> uint8 batches
                                                              \\-> eval_batches (every image once, all captions)

    from data_shards import ShardSet, ShardStream, load_tokenizer
    shards = ShardSet(config.shards)
    tokenizer = load_tokenizer("bert-base-uncased", context_length=77)
    stream = ShardStream(shards, tokenizer, config, global_batch=512, rank=0, world_size=1, seed=0)
    for batch in stream: ...

Nothing here imports torch or transformers until a stream or a tokenizer is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.config import DataConfig as DataConfig
    from data_shards.evaluation import EvalBatches as EvalBatches
    from data_shards.evaluation import eval_batches as eval_batches
    from data_shards.order import EpochOrder as EpochOrder
    from data_shards.order import epoch_order as epoch_order
    from data_shards.sample import BadSample as BadSample
    from data_shards.sample import Sample as Sample
    from data_shards.shards import ShardSet as ShardSet
    from data_shards.sources import Record as Record
    from data_shards.sources import RecordSet as RecordSet
    from data_shards.stream import ShardStream as ShardStream
    from data_shards.stream import TooManyBadSamples as TooManyBadSamples
    from data_shards.tokenizer import load_tokenizer as load_tokenizer
    from data_shards.tokenizer import train_tokenizer as train_tokenizer

EXPORTS = {
    "BadSample": "sample",
    "DataConfig": "config",
    "EpochOrder": "order",
    "EvalBatches": "evaluation",
    "Record": "sources",
    "RecordSet": "sources",
    "Sample": "sample",
    "ShardSet": "shards",
    "ShardStream": "stream",
    "TooManyBadSamples": "stream",
    "epoch_order": "order",
    "eval_batches": "evaluation",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}

__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(f"data_shards.{EXPORTS[name]}"), name)
    raise AttributeError(f"module 'data_shards' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
