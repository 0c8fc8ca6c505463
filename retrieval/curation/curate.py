"""Drops bad pairs of shards by rules, counts each drop, and packs the rest into new shards.

    shards -> text rules -> similarity -> near duplicates -> semantic duplicates -> OUTPUT/shards
                                                                                    OUTPUT/report.md, report.json
                                                                                    OUTPUT/dropped.jsonl
                                                                                    OUTPUT/scores/    what is kept of it

The rules work in this order, and a pair is counted by the first rule that drops it. So duplicates are sought among the
images that are still there: the one that stays is never dropped by another rule. An image without a pair is left out.
Everything that takes long is stored, so the same command continues a killed one, and a command with other thresholds
starts from the stored scores and hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.output import get_logger
from priorclip.common.progress import Progress
from priorclip.data_shards.dedupe.duplicates import find_duplicates
from priorclip.data_shards.dedupe.hash_columns import hash_records
from priorclip.data_shards.dedupe.image_hashes import PERCEPTUAL
from priorclip.data_shards.pack.selection import check_distance
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool, find_task_share
from priorclip.data_shards.pack.write_shards import PackPlan, pack_share
from priorclip.data_shards.sources import Record
from priorclip.data_shards.sources.record import Missing
from priorclip.data_shards.sources.tars import webdataset
from priorclip.retrieval.commands import CurateConfig
from priorclip.retrieval.curation.report import write_report
from priorclip.retrieval.curation.text_rules import TextRules, check_languages, judge_captions, read_words

log = get_logger(__name__)

CAPTIONS_A_JOB = 20_000
NO_CAPTION, UNREADABLE = "no caption", "image cannot be read"
SIMILARITY, SHARE = "similarity too low", "among the least similar"
NEAR, SEMANTIC = "near duplicate", "semantic duplicate"


@dataclass
class Pairs:
    """T pairs of I samples, and why pairs were dropped.

    Args:
        captions: (T,) texts
        owner: (T,) sample of each pair, ascending
        images: number of samples
        rules: rule -> number of pairs that it dropped, in the order of the rules
        why: pair -> (rule, detail)
        similarity: (T,) cosines, None without a model
    """

    captions: list[str]
    owner: NDArray[np.int64]
    images: int
    rules: dict[str, int] = field(default_factory=dict)
    why: dict[int, tuple[str, str]] = field(default_factory=dict)
    similarity: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.captions), bool)

    @property
    def kept_images(self) -> NDArray[np.bool_]:
        """(I,) the samples that still have a pair."""
        found = np.zeros(self.images, bool)
        found[self.owner[self.kept]] = True
        return found

    def drop(self, rule: str, details: dict[int, str]) -> None:
        """Drops the pairs that ``details`` names, unless an earlier rule has, and counts them."""
        fresh = {pair: detail for pair, detail in details.items() if self.kept[pair]}
        self.rules[rule] = self.rules.get(rule, 0) + len(fresh)
        self.why |= {pair: (rule, detail) for pair, detail in fresh.items()}
        self.kept[list(fresh)] = False

    def drop_images(self, rule: str, details: dict[int, str]) -> None:
        """Drops all pairs of the samples that ``details`` names."""
        gone = np.isin(self.owner, list(details))
        self.drop(rule, {pair: details[int(self.owner[pair])] for pair in np.nonzero(gone)[0].tolist()})


def curate(config: CurateConfig) -> dict[str, Any]:
    """Runs the rules, writes the report, and packs the kept pairs if ``config.write``. Returns the report.

    Raises:
        OSError, ValueError: the shards cannot be read, an option does not fit, or no pair is left
        FileExistsError: OUTPUT/shards holds shards with other options
    """
    rules = TextRules(
        config.min_words, config.max_words, tuple(config.languages), config.certainty, read_words(config.words)
    )
    check_languages(rules.languages)
    check_distance("--near_duplicates", config.near_duplicates)
    if config.semantic_duplicates is not None:
        from priorclip.retrieval.curation.semantic import check_faiss

        check_faiss()
    output, share = Path(config.output), find_task_share(os.environ) if config.array else TaskShare()
    pool = WorkerPool(config.processes or os.cpu_count() or 1)
    records = webdataset(config.shards)
    texts = [[] if isinstance(record.image, Missing) else record.captions for record in records]
    pairs = list_pairs(texts)
    apply_text_rules(pairs, rules, pool)
    features = apply_similarity(pairs, config, texts, output / "scores", share)
    if config.near_duplicates is not None:
        drop_near_duplicates(pairs, records, config, output / "scores", pool, share)
    if config.semantic_duplicates is not None and features is not None:
        drop_semantic_duplicates(pairs, records, features, config.semantic_duplicates)
    keys = [record.key for record in records]
    without = [keys[sample] for sample, captions in enumerate(texts) if not captions]
    report = write_report(output, config, pairs, keys, {NO_CAPTION: without})
    if config.write:
        pack_kept(pairs, records, output / "shards", config, pool, share)
    return report


def list_pairs(texts: Sequence[Sequence[str]]) -> Pairs:
    """Returns the pairs of samples with these captions."""
    counts = [len(captions) for captions in texts]
    return Pairs(list(chain.from_iterable(texts)), np.repeat(np.arange(len(texts)), counts), len(texts))


def apply_text_rules(pairs: Pairs, rules: TextRules, pool: WorkerPool) -> None:
    """Drops the pairs whose caption breaks a rule, by the processes of the pool."""
    if rules == TextRules(certainty=rules.certainty):
        return
    starts = range(0, len(pairs.captions), CAPTIONS_A_JOB)
    jobs = ((rules, start, pairs.captions[start : start + CAPTIONS_A_JOB]) for start in starts)
    broken: dict[str, dict[int, str]] = {}
    with Progress(len(pairs.captions), "read captions", "caption") as progress:
        for start, verdicts in pool.run(judge_captions, jobs, len(starts)):
            for number, verdict in enumerate(verdicts):
                if verdict is not None:
                    broken.setdefault(verdict[0], {})[start + number] = verdict[1]
            progress.update(len(verdicts))
    for rule in sorted(broken):
        pairs.drop(rule, broken[rule])


def apply_similarity(
    pairs: Pairs, config: CurateConfig, texts: Sequence[Sequence[str]], folder: Path, share: TaskShare
) -> NDArray[np.float16] | None:
    """Scores the pairs and drops those that fit badly. Returns the features of the images; None without a model."""
    if config.model is None:
        return None
    from priorclip.retrieval.curation.scores import score_pairs

    scores = score_pairs(config, texts, folder, share)
    pairs.similarity = scores.similarity
    unreadable = dict.fromkeys(np.nonzero(~scores.usable)[0].tolist(), "")
    pairs.drop_images(UNREADABLE, unreadable)
    if config.min_similarity is not None:
        pairs.drop(SIMILARITY, dict.fromkeys(np.nonzero(scores.similarity < config.min_similarity)[0].tolist(), ""))
    if config.drop_share:
        left = np.nonzero(pairs.kept)[0]
        order = left[np.argsort(scores.similarity[left], kind="stable")]
        pairs.drop(SHARE, dict.fromkeys(order[: round(config.drop_share * len(order))].tolist(), ""))
    return scores.images


def drop_near_duplicates(
    pairs: Pairs, records: Sequence[Record], config: CurateConfig, folder: Path, pool: WorkerPool, share: TaskShare
) -> None:
    """Drops images that show the same picture as an earlier one, by their bytes or their perceptual hash."""
    name = f"{config.shards} {config.max_pixels} {len(records)} {records[0].key} {records[-1].key}"
    place = folder / f"hashes-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    hashes = hash_records(records, place, PERCEPTUAL, config.max_pixels, pool, share)
    pairs.drop_images(UNREADABLE, dict.fromkeys(np.nonzero(~hashes.readable)[0].tolist(), ""))
    found = find_duplicates(hashes, config.near_duplicates, pairs.kept_images)
    pairs.drop_images(NEAR, {item.image: f"{records[item.kept].key}, {item.distance} bits" for item in found})


def drop_semantic_duplicates(
    pairs: Pairs, records: Sequence[Record], features: NDArray[np.float16], threshold: float
) -> None:
    """Drops images whose embedding is nearly that of an earlier one."""
    from priorclip.retrieval.curation.semantic import semantic_duplicates

    left = np.nonzero(pairs.kept_images)[0]
    rows = features[left].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)  # float16 is not exactly of length 1
    found = semantic_duplicates(rows, threshold)
    details = {
        int(left[gone]): f"{records[int(left[kept])].key}, cosine {cosine:.3f}"
        for gone, (kept, cosine) in found.items()
    }
    pairs.drop_images(SEMANTIC, details)


def pack_kept(
    pairs: Pairs, records: Sequence[Record], folder: Path, config: CurateConfig, pool: WorkerPool, share: TaskShare
) -> None:
    """Packs the images that still have a pair, with the captions that are left. Images keep their bytes."""
    captions: dict[int, list[str]] = {}
    for pair in np.nonzero(pairs.kept)[0].tolist():
        captions.setdefault(int(pairs.owner[pair]), []).append(pairs.captions[pair])
    if not captions:
        raise ValueError(f"the rules drop all {len(pairs.captions)} pairs: see {Path(config.output) / 'report.md'}")
    kept = []
    for sample, texts in captions.items():
        records[sample].captions = texts
        kept.append(records[sample])
    plan = PackPlan(shard_size=config.shard_size, template_captions=False, max_pixels=config.max_pixels)
    if pack_share(kept, folder, plan, pool, share, config.overwrite) is None:
        log.info("%s: other tasks still pack their shards; the last one writes the manifest", folder)
