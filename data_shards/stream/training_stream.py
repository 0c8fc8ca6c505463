"""The stream of training batches: the same sequence for any number of ranks and workers, resumable anywhere.

    epoch e      positions 0 .. N-1, see order/mixture.py              N samples, B = N // G global batches
                 (images, or their pairs with data.captions: all)
    batch b      positions b*G .. (b+1)*G - 1                          G samples, the same set for every world size
    rank r of W  positions b*G + r, b*G + r + W, ...                   G / W samples
    state        {"epoch": e, "samples_seen": (b+1)*G}                 after the batch was returned

The last N - B*G samples of an epoch are dropped. They differ from epoch to epoch, and the log reports their number.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from priorclip.common.output import get_logger
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.stream.batch_fetcher import BAD_ROWS, BatchFetcher, Position, SampleSource
from priorclip.data_shards.stream.quarantine import Quarantine, allowed_bad_samples
from priorclip.data_shards.stream.quarantine import TooManyBadSamples as TooManyBadSamples
from priorclip.data_shards.stream.truths import Kind
from priorclip.data_shards.stream.workers import load_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

KEYED = ", keyed order"


class ShardStream:
    """Batches of one rank, without end or for a number of epochs.

    Each batch is a dict, b = global_batch / world_size:
        images: uint8 (b, 3, S, S), not normalised; with data.bands float32 (b, B, S, S), measured values
        input_ids, attention_mask: int64 (b, T); absent without a tokenizer
        labels: int64 (b,), index in the classes, -1 for none
        image_ids: int64 (b,), sample indices; the same for all captions of an image
        masks: uint8 (b, S, S), 255 where the image shows only what its captions name; with ``truth="masks"``
        boxes: float32 (b, n, 4) around the pieces of that, in pixels, NaN for none; with ``truth="boxes"``
        epoch: int

    Args:
        source: ShardSet, or RecordSet of an annotation file
        tokenizer: transformers tokenizer, or None for images and labels only
        config: see DataConfig
        global_batch: samples of a batch over all ranks; world_size must divide it
        rank: rank of this process
        world_size: number of ranks
        seed: seed of the run
        train: True for random crop, flips and caption; False for the centred square and the first caption
        epochs: stop after this number of epochs, counted from epoch 0; None never stops
        truth: also give the masks or the boxes of the samples, see truths.py

    Raises:
        ValueError: the world size does not divide the global batch, one batch needs more samples than there are, or the
            samples do not have the truth
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
        truth: Kind | None = None,
    ) -> None:
        self.source, self.config, self.epochs = source, config, epochs
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.fetcher = BatchFetcher(source, tokenizer, config, seed, train, truth)
        self.samples = self.fetcher.mixture.samples
        check_batch(self.samples, global_batch, rank, world_size)
        self._quarantine = Quarantine(config.quarantine)
        self._epoch = 0
        self._samples_seen = 0
        if rank == 0:
            self._log_summary()

    def _log_summary(self) -> None:
        """Logs once what a user may not expect: weights, noise, dropped samples, unknown labels."""
        source, global_batch = self.source, self.global_batch
        mixture = self.fetcher.mixture
        for part, quota in zip(mixture.parts, mixture.quotas, strict=True):
            if self.fetcher.balanced is None and (quota != self.samples or part.weight != 1):
                form = "%s: weight %s, %d samples, %d (%.1f %%) of the %d samples of an epoch"
                log.info(form, part.name, part.weight, part.samples, quota, 100 * quota / self.samples, self.samples)
        if self.config.caption_noise or self.config.label_noise:
            log.warning(
                "%.0f %% of the samples get the captions of another one and %.0f %% another scene class, to test "
                "robustness (data.caption_noise, data.label_noise)",
                100 * self.config.caption_noise, 100 * self.config.label_noise,
            )  # fmt: skip
        self._log_kept()
        if self.fetcher.pairs:
            log.info("an epoch has %d pairs of an image and a caption (data.captions: all)", self.samples)
        if self.fetcher.balanced:
            form = "an epoch has %d samples, %d of each of %d scenes (data.balance: scenes)"
            log.info(form, self.samples, mixture.quotas[0], len(mixture.parts))
        dropped = self.samples % global_batch
        if dropped:
            log.info(
                "%d of %d samples do not fill a batch of %d: each epoch drops that many, not always the same ones",
                dropped, self.samples, global_batch,
            )  # fmt: skip
        with contextlib.suppress(BadSample):
            label = source.text(0).label
            if label is not None and not self.classes:
                log.warning(
                    "samples have labels (%r) that are in no manifest: all samples count as unlabelled. "
                    "Run `python -m data_shards index` on the shards, or set data.classes",
                    label,
                )

    def _log_kept(self) -> None:
        """Logs which share of the images data.keep_pixels has room for."""
        limit, image = self.fetcher.kept.limit, 3 * self.config.side**2
        if limit:
            form = "each decoding process keeps up to %d of %d decoded images in memory (data.keep_pixels)"
            log.info(form, min(limit // image, len(self.source)), len(self.source))

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.samples // self.global_batch

    @property
    def classes(self) -> list[str]:
        """Scene classes in the order of the label ids."""
        return self.fetcher.class_ids.names

    @property
    def skipped(self) -> Counter[str]:
        """Number of bad samples of this rank, by reason."""
        return self._quarantine.skipped

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch. ``data`` and ``order`` detect other shards or another shuffling."""
        place = {"epoch": self._epoch, "samples_seen": self._samples_seen}
        return {**place, "data": self.fingerprint, "order": self._order}

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the order of an epoch: shards, weights, and counts of captions or scenes if used."""
        more = self.fetcher.pairs or self.fetcher.balanced
        return f"{self.source.fingerprint} {more.fingerprint}" if more else self.source.fingerprint

    @property
    def _order(self) -> str:
        config = self.config
        order = f"seed {self.fetcher.seed}, block_size {config.block_size}, window_blocks {config.window_blocks}"
        noise = [
            f", {name} {getattr(config, name)}" for name in ("caption_noise", "label_noise") if getattr(config, name)
        ]
        captions = ", every caption" if config.captions == "all" else ""
        balance = ", scenes alike" if config.balance == "scenes" else ""
        keyed = KEYED if self.fetcher.mixture.keyed else ""
        return order + captions + balance + "".join(noise) + keyed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, which may come from another world size and number of workers.

        Raises ValueError if shards, weights, seed or shuffling differ from those of the state.
        """
        order = state.get("order", self._order)
        if self.config.order == "auto":  # a run of an older version, or of fewer samples, goes on as it began
            self.fetcher.mixture.keyed = order.endswith(KEYED)
        if order != self._order:
            raise ValueError(
                f"the checkpoint was written with {order}, and this run has {self._order}: samples would repeat or be "
                "skipped. Set the old values (run.seed, data.block_size, data.window_blocks, data.captions, "
                "data.balance, data.order, data.caption_noise, data.label_noise), or train anew in another run.dir"
            )
        data = state.get("data", self.fingerprint)
        if data != self.fingerprint:
            raise ValueError(
                "the shards or their weights have changed since the checkpoint was written, or the number of their "
                f"captions ({data}, now {self.fingerprint}): its position in the epoch does not fit them. "
                "Restore data.shards and their weights, or train anew in another run.dir"
            )
        epoch, samples_seen = int(state["epoch"]), int(state["samples_seen"])
        if epoch < 0 or not 0 <= samples_seen <= self.samples:
            raise ValueError(f"samples_seen {samples_seen} of epoch {epoch} is outside the {self.samples} samples")
        self._epoch, self._samples_seen = epoch, samples_seen
        self._start_next_epoch()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields batches from the current state on. Closing the iterator stops its workers; a new one continues."""
        config = self.config
        allowed = self.allowed_bad()
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
            self._samples_seen += self.global_batch
            self._start_next_epoch()
            yield batch

    def allowed_bad(self) -> float:
        """Returns the number of different bad samples that this rank may meet in an epoch."""
        share, pairs = self.config.max_bad_share, self.fetcher.pairs
        images = self.samples * len(self.source) / len(pairs) if pairs else self.samples
        return min(allowed_bad_samples(share, self.samples, self.world_size), share * images)

    def positions(self) -> Iterator[list[Position]]:
        """Yields (epoch, position) of each sample of this rank's batches, from the current state on."""
        epoch, start = self._epoch, self._samples_seen
        while self.epochs is None or epoch < self.epochs:
            for first in range(start, self.samples - self.global_batch + 1, self.global_batch):
                own = range(first + self.rank, first + self.global_batch, self.world_size)
                yield [(epoch, position) for position in own]
            epoch, start = epoch + 1, 0

    def _start_next_epoch(self) -> None:
        """Moves to the next epoch if this one has no further batch."""
        if self._samples_seen + self.global_batch > self.samples:
            self._epoch, self._samples_seen = self._epoch + 1, 0


def check_batch(samples: int, global_batch: int, rank: int, world_size: int) -> None:
    """Raises ValueError if the batch fits neither the ranks nor the samples."""
    if global_batch < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"global batch {global_batch}, rank {rank} of world size {world_size}: out of range")
    if global_batch % world_size:
        raise ValueError(
            f"the world size {world_size} must divide the global batch {global_batch}: "
            f"use {global_batch // world_size * world_size or world_size}, or another number of ranks"
        )
    if samples < global_batch:
        raise ValueError(f"{samples} samples are fewer than one global batch of {global_batch}: use a smaller batch")
