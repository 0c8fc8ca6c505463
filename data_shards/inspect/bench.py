"""`data_shards bench`: images per second of the whole pipeline on one core, compared with open_clip on the same tars.

    read -> decode -> random resized crop -> flips, turns -> tokenise -> batch    ours: uint8, normalised on the device
    read -> decode -> random resized crop -> normalise    -> tokenise -> batch    open_clip's loader as it trains

Both read the same JPEGs with the same crop statistics and batch size, in one process each. They take turns, so that a
noisy machine slows both. A rate is images per second of processor time; the result is the median of the rounds.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from priorclip.common.files import write_bytes
from priorclip.common.output import get_logger
from priorclip.data_shards.commands import BenchConfig
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.images.decode import open_image, upright_rgb
from priorclip.data_shards.images.transforms import align_box, random_box, train_transform
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import Record, imagefolder, synthetic
from priorclip.data_shards.sources import load as load_record
from priorclip.data_shards.stream.training_stream import ShardStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

TILE, QUALITY, SHARDS = 256, 90, 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
WARM_UP = 4  # batches before the measurement with workers starts


def bench(config: BenchConfig) -> str:
    """Measures, writes the JSON and returns the table."""
    torch.set_num_threads(1)
    peer = importlib.util.find_spec("open_clip") is not None
    if not peer:
        log.warning("open_clip is not installed, so there is no comparison: pip install 'priorclip-pretraining[bench]'")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = clip_tokenizer() if peer else None
        for side in config.sizes:
            shards = Path(folder) / str(side)
            make_shards(shards, side, config)
            rows += [measure(shards, side, scale, config, tokenizer) for scale in config.scales]
    result = {
        "options": {"image_size": config.image_size, "batch": config.batch, "rounds": config.rounds},
        "rows": rows,
    }
    write_bytes(Path(config.output), json.dumps(result, indent=1).encode() + b"\n")
    return table(rows)


def measure(
    shards: Path, side: int, scale: float, config: BenchConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Measures one row: both pipelines on one core in turns, ours with 1 and 2 workers, and our pixel error."""
    data = DataConfig(str(shards), image_size=config.image_size, scale=scale, workers=0)
    source = ShardSet(data.shards)

    def ours() -> Iterable[int]:
        return lengths(ShardStream(source, tokenizer, data, global_batch=config.batch, epochs=1))

    def normalised() -> Iterable[int]:
        for batch in ShardStream(source, tokenizer, data, global_batch=config.batch, epochs=1):
            yield len(normalise(batch["images"]))

    runs: dict[str, Callable[[], Iterable[int]]] = {"ours": ours, "ours_normalised": normalised}
    if tokenizer is not None:
        runs["open_clip"] = lambda: open_clip_batches(shards, scale, config)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, run in runs.items():
            rates[name].append(processor_rate(run()))
    row: dict[str, Any] = {"side": side, "scale": scale}
    row |= {f"{name}_per_core": statistics.median(found) for name, found in rates.items()}
    for name in ("ours", "ours_normalised") if tokenizer is not None else ():
        row[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(rates[name], rates["open_clip"], strict=True))
    if config.workers:
        row |= worker_scaling(source, tokenizer, data, config)
    return row | pixel_error(source, scale, config.image_size)


def lengths(stream: ShardStream) -> Iterable[int]:
    return (len(batch["images"]) for batch in stream)


def processor_rate(batches: Iterable[int]) -> float:
    """Returns images per second of this process's processor time, from the first byte to the last batch."""
    begun = time.process_time()
    images = sum(batches)
    return images / (time.process_time() - begun)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalises on the processor what the model normalises on the device, for a comparison that includes this step."""
    pixels = images.numpy()
    result = np.empty(pixels.shape, np.float32)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        table = ((np.arange(256) / 255 - mean) / std).astype(np.float32)
        for row in range(len(pixels)):
            np.take(table, pixels[row, channel], out=result[row, channel], mode="clip")
    return torch.from_numpy(result)


def worker_scaling(
    source: ShardSet, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig, config: BenchConfig
) -> dict[str, float]:
    """Measures wall-clock rates with 1 and 2 decoding workers and the median of the rounds' ratios."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(config.rounds):
        for workers, rates in found.items():
            rates.append(steady_rate(source, tokenizer, replace(data, workers=workers), config.batch))
    ratio = statistics.median(two / one for one, two in zip(found[1], found[2], strict=True))
    one, two = (statistics.median(found[workers]) for workers in (1, 2))
    return {"workers_1": one, "workers_2": two, "workers_ratio": ratio}


def steady_rate(source: ShardSet, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig, batch: int) -> float:
    """Returns images per second of wall-clock time after the workers have started, over one epoch."""
    stream = ShardStream(source, tokenizer, data, global_batch=batch)
    batches = iter(stream)
    for _ in range(WARM_UP):
        next(batches)
    begun = time.perf_counter()
    images = sum(len(next(batches)["images"]) for _ in range(len(stream)))
    rate = images / (time.perf_counter() - begun)
    batches.close()  # type: ignore[attr-defined]
    return rate


def pixel_error(source: ShardSet, scale: float, size: int) -> dict[str, float]:
    """Returns the mean absolute pixel difference (of 255) from Pillow's full decode, crop and bicubic resize."""
    errors = []
    for index in range(0, len(source), max(1, len(source) // 64)):
        data = source.read(index).image
        found = train_transform(data, size, random.Random(index), scale=scale, hflip=False, vflip=False, rot90=False)
        with open_image(data) as image:
            picture = upright_rgb(image)
        box = align_box(random_box(*picture.size, scale, random.Random(index)), size)
        expected = np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        errors.append(float(np.abs(found.astype(int) - expected).mean()))
    return {"error_mean": statistics.mean(errors), "error_worst": max(errors)}


def open_clip_batches(shards: Path, scale: float, config: BenchConfig) -> Iterable[int]:
    """Yields the batch sizes of an epoch of open_clip's training pipeline, in this process.

    These are the stages of `open_clip_train.data.get_wds_dataset` with webdataset's own tar reader, because the reader
    of open_clip 3.3 does not work with webdataset 1.0.
    """
    import open_clip
    import webdataset as wds

    transform = open_clip.image_transform(config.image_size, is_train=True, aug_cfg={"scale": (scale, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(sorted(str(path) for path in shards.glob("*.tar"))),
        wds.shuffle(bufsize=2000, initial=500),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(config.batch, partial=False),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=0)
    return (len(images) for images, _ in loader)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """Returns transformers' CLIP tokenizer with open_clip's vocabulary: it gives the same ids as open_clip's own."""
    import open_clip
    from transformers import CLIPTokenizer

    theirs = open_clip.get_tokenizer("ViT-B-32")
    start, end = theirs.all_special_ids
    names = {number: text for text, number in theirs.encoder.items()}
    special = {"bos_token": names[start]} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), names[end])
    length = theirs.context_length
    return CLIPTokenizer(vocab=theirs.encoder, merges=list(theirs.bpe_ranks), model_max_length=length, **special)


def make_shards(folder: Path, side: int, config: BenchConfig) -> None:
    """Packs ``count`` JPEGs of ``side`` pixels with one caption each: drawn scenes, or mosaics of --images."""
    if config.images is None:
        drawn = synthetic(config.count, 0, side, quality=config.quality or QUALITY)
        records = [one_caption(load_record(record)) for record in drawn]
    else:
        records = photographs(imagefolder(config.images), side, config.count, config.quality)
    pack(records, folder, PackPlan(shard_size=-(-config.count // SHARDS)))


def one_caption(record: Record) -> Record:
    """Keeps one caption, because open_clip reads one, in KEY.txt, and both loaders shall read the same."""
    return replace(record, captions=record.captions[:1])


def photographs(records: list[Record], side: int, count: int, quality: int | None = None) -> list[Record]:
    """Makes mosaics of TILE-pixel tiles, so that a large picture has as much detail as a real one.

    Saves with ``quality``, or with the quality of the first tile, because a higher one adds no detail but time.
    """
    order = random.Random(0).sample(records, len(records))
    across = -(-side // TILE)
    made = []
    for index in range(count):
        sheet = Image.new("RGB", (across * TILE, across * TILE))
        saving: dict[str, Any] = {"quality": quality or QUALITY}
        for tile in range(across * across):
            record = load_record(order[(index * across * across + tile) % len(order)])
            assert isinstance(record.image, bytes)
            with open_image(record.image) as image:
                if tile == 0 and quality is None and isinstance(image, JpegImageFile):
                    saving = {"qtables": image.quantization, "subsampling": get_sampling(image)}
                sheet.paste(upright_rgb(image).resize((TILE, TILE)), (tile % across * TILE, tile // across * TILE))
        buffer = io.BytesIO()
        sheet.crop((0, 0, side, side)).save(buffer, "JPEG", **saving)
        caption = f"an aerial photograph of {record.label} number {index} with roads, trees and a few buildings"
        made.append(Record(f"{index:06d}", buffer.getvalue(), [caption], record.label, source="bench"))
    return made


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as text, without columns that were not measured."""
    columns = {
        "side": ("JPEG", "{:.0f} px"),
        "scale": ("crop scale", "{:.2f}-1"),
        "ours_per_core": ("ours /s/core", "{:.0f}"),
        "open_clip_per_core": ("open_clip", "{:.0f}"),
        "ours_ratio": ("ratio", "{:.2f}"),
        "ours_normalised_ratio": ("if normalised here", "{:.2f}"),
        "workers_1": ("1 worker /s", "{:.0f}"),
        "workers_2": ("2 workers", "{:.0f}"),
        "workers_ratio": ("ratio", "{:.2f}"),
        "error_mean": ("pixel error /255", "{:.3f}"),
        "error_worst": ("worst", "{:.3f}"),
    }
    shown = {name: column for name, column in columns.items() if name in rows[0]}
    lines = ["  ".join(title for title, _ in shown.values())]
    for row in rows:
        lines.append("  ".join(form.format(row[name]).rjust(len(title)) for name, (title, form) in shown.items()))
    return "\n".join(lines)
