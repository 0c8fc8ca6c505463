"""The data pipeline: packs labelled or captioned images into tar shards, and reads them as a deterministic stream.

    sources -> pack -> TAR + TAR.idx + manifest.json -> ShardSet -> epoch_order -> ShardStream -> uint8 batches
                                                              \\-> eval_batches (every image once, all captions)

    from priorclip.data_shards import ShardSet, ShardStream, load_tokenizer
    shards = ShardSet(config.shards)
    tokenizer = load_tokenizer("bert-base-uncased", context_length=77)
    stream = ShardStream(shards, tokenizer, config, global_batch=512, rank=0, world_size=1, seed=0)
    for batch in stream: ...

torch and transformers are imported only when a stream or a tokenizer is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from priorclip.data_shards.config import DataConfig as DataConfig
    from priorclip.data_shards.format.sample import BadSample as BadSample
    from priorclip.data_shards.format.sample import Sample as Sample
    from priorclip.data_shards.order.epoch_order import EpochOrder as EpochOrder
    from priorclip.data_shards.order.epoch_order import epoch_order as epoch_order
    from priorclip.data_shards.shards import ShardSet as ShardSet
    from priorclip.data_shards.sources import Record as Record
    from priorclip.data_shards.sources import RecordSet as RecordSet
    from priorclip.data_shards.stream.evaluation_batches import EvalBatches as EvalBatches
    from priorclip.data_shards.stream.evaluation_batches import eval_batches as eval_batches
    from priorclip.data_shards.stream.training_stream import ShardStream as ShardStream
    from priorclip.data_shards.stream.training_stream import TooManyBadSamples as TooManyBadSamples
    from priorclip.data_shards.tokenizer import load_tokenizer as load_tokenizer
    from priorclip.data_shards.tokenizer import train_tokenizer as train_tokenizer

EXPORTS = {
    "BadSample": "format.sample",
    "DataConfig": "config",
    "EpochOrder": "order.epoch_order",
    "EvalBatches": "stream.evaluation_batches",
    "Record": "sources",
    "RecordSet": "sources",
    "Sample": "format.sample",
    "ShardSet": "shards",
    "ShardStream": "stream.training_stream",
    "TooManyBadSamples": "stream.training_stream",
    "epoch_order": "order.epoch_order",
    "eval_batches": "stream.evaluation_batches",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}

__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(f"priorclip.data_shards.{EXPORTS[name]}"), name)
    raise AttributeError(f"module 'data_shards' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
