"""The stream of training batches: the same sequence for any number of ranks and workers, resumable anywhere.

    epoch e      positions 0 .. N-1, see data_shards.mixture           N samples, B = N // G global batches
    batch b      positions b*G .. (b+1)*G - 1                          G samples, the same set for every world size
    rank r of W  positions b*G + r, b*G + r + W, ...                   G / W samples
    state        {"epoch": e, "samples_seen": (b+1)*G}                 after the batch was handed out

The N - B*G samples left over at the end of an epoch are dropped (a different few every epoch) and the log says so.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.stream.batch_fetcher import BAD_ROWS, BatchFetcher, Position, SampleSource
from priorclip.data_shards.stream.quarantine import Quarantine, allowed_bad_samples
from priorclip.data_shards.stream.quarantine import TooManyBadSamples as TooManyBadSamples
from priorclip.data_shards.stream.workers import load_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class ShardStream:
    """Batches of one rank, for ever or for a number of epochs.

    Each batch is a dict, b = global_batch / world_size:
        images: uint8 (b, 3, S, S), not normalised
        input_ids, attention_mask: int64 (b, T); absent without a tokenizer
        labels: int64 (b,), place in the classes, -1 for none
        image_ids: int64 (b,), sample indices
        epoch: int

    Args:
        source: ShardSet, or RecordSet of an annotation file
        tokenizer: transformers tokenizer, or None for images and labels only
        config: see DataConfig
        global_batch: samples of all ranks together; world_size must divide it
        rank, world_size: of this process
        seed: of the run
        train: random crop, flips and caption; otherwise the centred square and the first caption
        epochs: stop after this many (counted from epoch 0); None never stops

    Raises:
        ValueError: the world size does not divide the batch, or there are fewer samples than one batch
    """

    def __init__(
        self,
        source: SampleSource,
        tokenizer: PreTrainedTokenizerBase | None,
        config: DataConfig,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train: bool = True,
        epochs: int | None = None,
    ) -> None:
        self.source, self.config, self.epochs = source, config, epochs
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.fetcher = BatchFetcher(source, tokenizer, config, seed, train)
        self.samples = self.fetcher.mixture.samples
        check_batch(self.samples, global_batch, rank, world_size)
        self._quarantine = Quarantine(config.quarantine)
        self._epoch = 0
        self._seen = 0
        if rank == 0:
            self._remarks()

    def _remarks(self) -> None:
        """What a user might not expect, said once."""
        source, global_batch = self.source, self.global_batch
        mixture = self.fetcher.mixture
        for part, quota in zip(mixture.parts, mixture.quotas, strict=True):
            if quota != self.samples or part.weight != 1:
                form = "%s: weight %s, %d samples, %d or %.1f %% of an epoch of %d"
                log.info(form, part.name, part.weight, part.samples, quota, 100 * quota / self.samples, self.samples)
        if self.config.caption_noise or self.config.label_noise:
            log.warning(
                "%.0f %% of the samples have the captions of another one, %.0f %% another scene class: a test of "
                "robustness (data.caption_noise, data.label_noise)",
                100 * self.config.caption_noise, 100 * self.config.label_noise,
            )  # fmt: skip
        dropped = self.samples % global_batch
        if dropped:
            log.info(
                "%d of %d samples do not fill a batch of %d: dropped each epoch, others every time",
                dropped, self.samples, global_batch,
            )  # fmt: skip
        with contextlib.suppress(BadSample):
            label = source.text(0).label
            if label is not None and not self.classes:
                log.warning(
                    "samples have labels (%r) that no manifest lists: all count as unlabelled. "
                    "Run `python -m data_shards index` on the shards, or set data.classes",
                    label,
                )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.samples // self.global_batch

    @property
    def classes(self) -> list[str]:
        """Scene classes in the order of the label ids."""
        return self.fetcher.class_ids.names

    @property
    def skipped(self) -> Counter[str]:
        """Bad samples of this rank by reason."""
        return self._quarantine.skipped

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts. ``data`` and ``order`` guard against going on in another sequence."""
        place = {"epoch": self._epoch, "samples_seen": self._seen}
        return {**place, "data": self.source.fingerprint, "order": self._order}

    @property
    def _order(self) -> str:
        config = self.config
        order = f"seed {self.fetcher.seed}, block_size {config.block_size}, window_blocks {config.window_blocks}"
        noise = [
            f", {name} {getattr(config, name)}" for name in ("caption_noise", "label_noise") if getattr(config, name)
        ]
        return order + "".join(noise)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, of any world size and worker count.

        Raises ValueError where shards, weights, seed or shuffling are not those of the state.
        """
        data = state.get("data", self.source.fingerprint)
        if data != self.source.fingerprint:
            raise ValueError(
                "the shards or their weights have changed since the checkpoint was written "
                f"({data}, now {self.source.fingerprint}): the place in the epoch has no meaning on them. "
                "Restore the shards, or start the data from epoch 0"
            )
        order = state.get("order", self._order)
        if order != self._order:
            raise ValueError(
                f"the checkpoint was written with {order}, and this run has {self._order}: samples would come twice or "
                "not at all. Set them as they were, or start the data from epoch 0"
            )
        epoch, seen = int(state["epoch"]), int(state["samples_seen"])
        if epoch < 0 or not 0 <= seen <= self.samples:
            raise ValueError(f"samples_seen {seen} of epoch {epoch} is outside the {self.samples} samples")
        self._epoch, self._seen = epoch, seen
        self._wrap()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches from the current state on. Abandoning the iterator stops its workers; a new one goes on."""
        config = self.config
        allowed = allowed_bad_samples(config.max_bad_share, self.samples, self.world_size)
        loader = load_batches(
            self.fetcher,
            self.positions(),
            config.workers,
            prefetch=config.prefetch,
            start_method=config.start_method,
            pin_memory=config.pin_memory,
        )
        for batch in loader:
            self._quarantine.add(batch.pop(BAD_ROWS), batch["epoch"], allowed)
            self._seen += self.global_batch
            self._wrap()
            yield batch

    def positions(self) -> Iterator[list[Position]]:
        """(epoch, position) of every sample of this rank's batches, from the current state on."""
        epoch, seen = self._epoch, self._seen
        while self.epochs is None or epoch < self.epochs:
            for start in range(seen, self.samples - self.global_batch + 1, self.global_batch):
                mine = range(start + self.rank, start + self.global_batch, self.world_size)
                yield [(epoch, position) for position in mine]
            epoch, seen = epoch + 1, 0

    def _wrap(self) -> None:
        """The end of an epoch is the start of the next."""
        if self._seen + self.global_batch > self.samples:
            self._epoch, self._seen = self._epoch + 1, 0


def check_batch(samples: int, global_batch: int, rank: int, world_size: int) -> None:
    if global_batch < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"global batch {global_batch}, rank {rank} of world size {world_size}: out of range")
    if global_batch % world_size:
        raise ValueError(
            f"the world size {world_size} must divide the global batch {global_batch}: "
            f"use {global_batch // world_size * world_size or world_size} or another number of ranks"
        )
    if samples < global_batch:
        raise ValueError(f"{samples} samples are fewer than one global batch of {global_batch}: use a smaller batch")
