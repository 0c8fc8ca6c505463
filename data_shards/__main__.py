"""`python -m data_shards pack|synthetic|leakage|index|verify|stats|tokenizer|bench`. Each has its own --help."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorclip.common.command_line import print_error, run_command
from priorclip.common.options import parse_command
from priorclip.common.output import say, set_up_logging
from priorclip.common.printable import one_line
from priorclip.data_shards.commands import (
    BenchConfig,
    IndexConfig,
    LeakageConfig,
    PackConfig,
    StatsConfig,
    SyntheticConfig,
    TokenizerConfig,
    VerifyConfig,
)
from priorclip.data_shards.format.class_names import is_number

if TYPE_CHECKING:
    from priorclip.data_shards.dedupe.leakage import EvaluationImages
    from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
    from priorclip.data_shards.sources import Record

CURATE = "python -m retrieval curate --shards SHARDS --model EXPORT --output FOLDER"
COMMANDS = {
    "pack": PackConfig,
    "synthetic": SyntheticConfig,
    "leakage": LeakageConfig,
    "index": IndexConfig,
    "verify": VerifyConfig,
    "stats": StatsConfig,
    "tokenizer": TokenizerConfig,
    "bench": BenchConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0 success, 1 bad data, 2 an error, see common/command_line.py."""
    set_up_logging("%(levelname)s %(message)s")
    if list(sys.argv[1:] if argv is None else argv)[:1] == ["curate"]:
        print_error("data_shards", "curate scores pairs with a model, so it is a command of retrieval: " + CURATE)
        return 2
    name, config = parse_command(
        COMMANDS,
        argv,
        prog="data_shards",
        description="Pack, check and describe WebDataset shards of aerial images.",
        positional={"leakage": "shards", "verify": "shards", "stats": "shards", "index": "shards"},
    )
    run: dict[str, Callable[[Any], int]] = {
        "pack": run_pack,
        "synthetic": run_synthetic,
        "leakage": run_leakage,
        "index": run_index,
        "verify": run_verify,
        "stats": run_stats,
        "tokenizer": run_tokenizer,
        "bench": run_bench,
    }
    return run_command(f"data_shards {name}", lambda: run_until_worker_dies(run[name], config))


def run_until_worker_dies(run: Callable[[Any], int], config: Any) -> int:
    """Runs the command. Raises OSError, which says what to do, if a worker process dies."""
    try:
        return run(config)
    except BrokenExecutor as error:
        raise OSError("a worker process died: run the same command again to continue") from error


def run_pack(config: PackConfig) -> int:
    from priorclip.data_shards.pack.worker_pool import TaskShare, find_task_share, open_worker_pool

    share = find_task_share(os.environ) if config.array else TaskShare()
    with open_worker_pool(config.workers or os.cpu_count() or 1) as pool:
        # None on an MPI rank other than 0, which has finished its jobs.
        return 0 if pool is None else pack_records(pool, share, config)


def pack_records(pool: WorkerPool, share: TaskShare, config: PackConfig) -> int:
    from priorclip.data_shards.pack.selection import check_duplicate_options
    from priorclip.data_shards.pack.write_shards import PackPlan, pack_share
    from priorclip.data_shards.sources.catalogue import read_source, rule_of

    relabel = config.caption_from == "relabel"
    if config.caption_from not in ("template", "none", "relabel"):
        raise ValueError(f"--caption-from must be template, none or relabel, not {config.caption_from!r}")
    if config.shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1, not {config.shard_size}")
    check_duplicate_options(config.duplicates, config.near_duplicates)
    values = rule_of(config)
    records = choose_records(read_source(config), config)
    for record in records if relabel else []:
        record.captions = [] if record.scenes else record.captions
    if config.caption_from != "none":
        refuse_number_labels(records)
    drawn = config.source in ("synthetic", "raster")  # encoded once, when they are read
    plan = PackPlan(
        prefix=config.prefix or config.split or "shard",
        shard_size=config.shard_size,
        max_side=config.max_side,
        quality=None if drawn else config.quality,
        max_pixels=config.max_pixels,
        template_captions=config.caption_from != "none",
        captions_per_image=config.captions_per_image,
        seed=config.seed,
        duplicates=config.duplicates,
        near_duplicates=config.near_duplicates,
        values=values,
        image_format=config.image_format,
        needs_text=config.source != "raster" or (gives_texts(config) and not config.keep_unlabelled),
    )
    evaluation = read_excluded_images(config, pool) if config.exclude else None
    folder = Path(config.output)
    manifest = pack_share(records, folder, plan, pool, share, config.overwrite, evaluation)
    if manifest is None:
        task = f"task {share.index + 1} of {share.count}"
        say(f"{folder}: {task} has packed its shards; the last task writes the manifest")
        return 0
    say(
        f"{config.output}: {manifest.samples} samples, {manifest.captions} captions, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB"
    )
    for reason, count in manifest.skipped.items():
        say(f"  left out: {count} x {reason} (see {folder / 'quarantine.jsonl'})")
    for how, count in manifest.scaled.items():
        say(f"  scaled to 8 bits: {count} images of measured values, black and white are {how}")
    for kind, count in manifest.duplicates.items():
        say(f"  duplicates: {count} x {kind.replace('_', ' ')} (see {folder / 'duplicates.jsonl'})")
    if config.exclude:
        counts = ", ".join(f"{count} x {kind}" for kind, count in manifest.excluded.items())
        say(f"  excluded as images of the evaluation: {counts or 'none'} (see {folder / 'excluded.jsonl'})")
    return 0


def gives_texts(config: PackConfig) -> bool:
    """Tells whether the tiles of scenes get classes or texts."""
    return config.vector is not None or config.csv is not None


def run_synthetic(config: SyntheticConfig) -> int:
    from priorclip.data_shards.rasters.drawn_scenes import PLACES, write_drawn_scenes

    paths = write_drawn_scenes(config)
    cells = len(paths) * (config.size // config.cell) ** 2
    say(f"{config.output}: {len(paths)} scenes of {config.size} x {config.size} {config.type} pixels in {config.crs}")
    say(f"  what is where: {cells} places in {Path(config.output) / PLACES}")
    return 0


def refuse_number_labels(records: list[Record]) -> None:
    """Raises ValueError if captions would be made of labels that are numbers: "an aerial picture of a 0"."""
    bare = [record for record in records if not record.captions and record.scenes]
    numbers = [record for record in bare if any(map(is_number, record.scenes))]
    if numbers:
        raise ValueError(
            f"{len(numbers)} images without captions have a number as their label, such as {numbers[0].scenes[0]!r} of "
            f"{one_line(numbers[0].key)}: captions need names. Put classnames.txt with one name a line beside the "
            "shards, write names into the annotation, or set --caption-from none"
        )


def read_excluded_images(config: PackConfig | LeakageConfig, pool: WorkerPool) -> EvaluationImages:
    """Returns the evaluation images that --exclude names."""
    from priorclip.data_shards.dedupe.leakage import read_evaluation_images
    from priorclip.data_shards.pack.selection import check_distance
    from priorclip.data_shards.sources.names import split_paths

    check_distance("--exclude-distance", config.exclude_distance)
    sets, folders, splits = (
        [name for name in split_paths(value) if name]
        for value in (config.exclude, config.exclude_images, config.exclude_split)
    )
    return read_evaluation_images(sets, folders, splits, config.exclude_distance, config.max_pixels, pool)


def joined(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def run_leakage(config: LeakageConfig) -> int:
    import json

    from priorclip.common.files import write_bytes
    from priorclip.data_shards.dedupe.leakage import find_leaks_in_shards
    from priorclip.data_shards.pack.worker_pool import WorkerPool
    from priorclip.data_shards.shards import ShardSet

    pool = WorkerPool(config.workers or os.cpu_count() or 1)
    shards = ShardSet(config.shards)
    rows, unreadable = find_leaks_in_shards(shards, read_excluded_images(config, pool), config.max_pixels, pool)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if config.output:
        write_bytes(Path(config.output), "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    for line in [] if config.output else lines:
        say(f"LEAK {line}")
    say(f"{config.shards}: {len(shards)} samples, {len(rows)} show images of {joined(config.exclude)}")
    if unreadable:
        say(f"  not compared: {unreadable} images that cannot be read")
    return 1 if rows else 0


def choose_records(records: list[Record], config: PackConfig) -> list[Record]:
    """Returns the records of --classes and --scenes, shuffled, at most --limit of them, with --captions-kept."""
    from priorclip.data_shards.pack.subset import first_scenes, keep_captions, keep_sizes
    from priorclip.data_shards.sources.catalogue import shuffled

    if config.classes is not None:
        unknown = set(config.classes) - {scene for record in records for scene in record.scenes}
        if unknown:
            raise ValueError(f"--classes: no record has the label {', '.join(sorted(unknown))}")
        wanted = set(config.classes)
        records = [record for record in records if wanted.intersection(record.scenes)]
    if config.scenes is not None:
        records = first_scenes(records, config.scenes, config.seed)
    if config.shuffle and config.source != "synthetic":
        records = shuffled(records, config.seed)
    if config.zipf is not None or (config.scenes is not None and config.limit is not None):
        if config.limit is None:
            raise ValueError(f"--zipf {config.zipf} needs --limit, the number of images of all scenes")
        records = keep_sizes(records, config.limit, config.zipf or 0.0, config.seed)
    records = records[: config.limit]
    if config.captions_kept is not None:
        keep_captions(records, config.captions_kept, config.seed)
    return records


def run_index(config: IndexConfig) -> int:
    from priorclip.data_shards.pack.index_tars import build_index

    for folder, manifest in build_index(config.shards, config.workers or os.cpu_count() or 1, config.overwrite):
        say(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, {len(manifest.classes)} classes")
    return 0


def run_verify(config: VerifyConfig) -> int:
    from priorclip.data_shards.inspect.verify import verify_folder

    if config.sizes:
        return run_sizes(config)
    if config.json:
        raise ValueError("--json needs --sizes")
    problems, samples = verify_folder(Path(config.shards), config.workers or os.cpu_count() or 1, config.decode)
    for problem in problems:
        say(f"BAD {one_line(problem)}")
    say(f"{config.shards}: {samples} samples checked, {len(problems)} problems")
    return 1 if problems else 0


def run_sizes(config: VerifyConfig) -> int:
    import dataclasses
    import json

    from priorclip.data_shards.inspect.sizes import check_sizes
    from priorclip.data_shards.remote.urls import public_url

    sizes = check_sizes(config.shards)
    if config.json:
        say(json.dumps(dataclasses.asdict(sizes)))
        return 1 if sizes.wrong else 0
    for name, problem in sizes.problems.items():
        say(f"BAD {one_line(name)}: {one_line(problem)}")
    say(f"{public_url(config.shards)}: {sizes.count} shards, {sizes.bytes / 1e6:.1f} MB, {sizes.wrong} with problems")
    return 1 if sizes.wrong else 0


def run_stats(config: StatsConfig) -> int:
    from priorclip.data_shards.inspect.stats import write_stats

    say(write_stats(config))
    return 0


def run_tokenizer(config: TokenizerConfig) -> int:
    from priorclip.data_shards.shards import ShardSet
    from priorclip.data_shards.tokenizer import all_captions, train_tokenizer

    fields = [name.strip() for name in config.caption_field.split(",")]
    captions = all_captions(ShardSet(config.shards), fields)
    tokenizer = train_tokenizer(captions, config.output, config.vocab_size, config.context_length)
    say(f"{config.output}: {len(tokenizer)} entries, {config.context_length} tokens a caption")
    return 0


def run_bench(config: BenchConfig) -> int:
    from priorclip.data_shards.inspect.bench import bench

    say(bench(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
