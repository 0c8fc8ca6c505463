"""``python -m retrieval COMMAND``, each with ``--help``.

The commands are evaluate, robustness, pictures, belief-truth, curate, index, approximate, add, remove, search and
serve.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from priorclip.common.command_line import run_command, torchrun_ranks
from priorclip.common.options import parse_command
from priorclip.common.output import get_logger, quiet, say, set_up_logging
from priorclip.retrieval.commands import (
    COMMANDS,
    AddConfig,
    ApproximateConfig,
    BeliefTruthConfig,
    CurateConfig,
    EvaluateConfig,
    IndexConfig,
    PicturesConfig,
    RemoveConfig,
    RobustnessConfig,
    SearchConfig,
    ServeConfig,
)

if TYPE_CHECKING:
    from priorclip.retrieval.search import Searcher
    from priorclip.retrieval.web.scene_tiles import SceneTiles


log = get_logger(__name__)

LISTS = (
    "--models",
    "--severities",
    "--caption_shares",
    "--caption-shares",
    "--queries",
    "--languages",
    "--image_keys",
    "--image-keys",
)
SHARED = ("evaluate", "index")  # commands whose work several processes of torchrun can share
OTHER_LISTS = {  # of commands where an option takes several values, and one elsewhere
    "search": ("--data", "--names"),
    "serve": ("--data", "--names"),
    "approximate": (),
    "remove": ("--shards", "--image_keys", "--image-keys"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see common/command_line.py."""
    set_up_logging("%(levelname)s %(message)s")
    quiet("httpx", "timm", "transformers")
    run: dict[str, Callable[..., None]] = {
        "evaluate": run_evaluate,
        "robustness": run_robustness,
        "pictures": run_pictures,
        "belief-truth": run_belief_truth,
        "curate": run_curate,
        "index": run_index,
        "approximate": run_approximate,
        "add": run_add,
        "remove": run_remove,
        "search": run_search,
        "serve": run_serve,
    }
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot print
    words = list(sys.argv[1:] if argv is None else argv)
    words = join_box(words)
    words = join_list_values(words, OTHER_LISTS.get("".join(words[:1]), LISTS))
    name, config = parse_command(COMMANDS, words, prog="retrieval", description="Evaluate and use a trained model.")

    def work() -> None:
        refuse_shared(name)
        run[name](config)

    return run_command(f"retrieval {name}", work)


def refuse_shared(name: str) -> None:
    """Raises ValueError if torchrun has started several processes for a command that is one process."""
    ranks = torchrun_ranks()
    if ranks > 1 and name not in SHARED:
        shared = " and ".join(SHARED)
        raise ValueError(f"{name} is one process, and torchrun has started {ranks} of it: only {shared} share work")


def join_list_values(words: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Turns ``--models a=x b=y`` into ``--models [a=x,b=y]`` in JSON, for the options in ``lists``."""
    found: list[str] = []
    rest = list(words)
    while rest:
        found.append(rest.pop(0))
        if found[-1] in lists and rest and not rest[0].startswith(("--", "[")):
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            found.append(json.dumps(values))
    return found


def join_box(words: Sequence[str]) -> list[str]:
    """Turns ``--bbox -10,40,0,50`` into ``--bbox=-10,40,0,50``, because a word with a minus looks like an option."""
    found: list[str] = []
    for word in words:
        found[-1:] = [f"--bbox={word}"] if found[-1:] == ["--bbox"] else [*found[-1:], word]
    return found


def run_robustness(config: RobustnessConfig) -> None:
    from priorclip.retrieval.robustness import measure_robustness, robustness_table

    report = measure_robustness(config)
    say(robustness_table(report))
    say(f"report and plot: {config.output}")


def run_pictures(config: PicturesConfig) -> None:
    from priorclip.retrieval.pictures.draw import draw_pictures

    report = draw_pictures(config)
    for name in report["pictures"]:
        say(f"{name}: {config.output}/{name}.png")
    for name, reason in report["left_out"].items():
        say(f"{name} is left out: {reason}")


def run_belief_truth(config: BeliefTruthConfig) -> None:
    from priorclip.retrieval.localization.belief_truth import belief_truth_table, measure_belief_truth

    say(belief_truth_table(measure_belief_truth(config)))
    say(f"report and picture: {config.output}")


def run_evaluate(config: EvaluateConfig) -> None:
    from priorclip.retrieval.evaluate_export import evaluate, write_report
    from priorclip.retrieval.shared_encoding import is_first, joined
    from priorclip.retrieval.text_tables import tables

    with joined():
        report = evaluate(config)
        if not is_first():
            return
    say(tables(report))
    if config.confusions:
        say(f"confusions: {config.confusions}")
    if config.output:
        write_report(config.output, report)
        say(f"report: {config.output}")


def run_curate(config: CurateConfig) -> None:
    from priorclip.retrieval.curation.curate import curate
    from priorclip.retrieval.curation.report import summary

    say(summary(curate(config)))
    say(f"report: {config.output}/report.md")
    if config.write:
        say(f"shards for training: {config.output}/shards")


def run_index(config: IndexConfig) -> None:
    from priorclip.retrieval.embedding_index import EmbeddingIndex, write_index
    from priorclip.retrieval.shared_encoding import is_first, joined

    with joined():
        write_index(config)
        if not is_first():
            return
    index = EmbeddingIndex.load(config.output)
    say(f"{config.output}: {len(index)} images, {index.embeddings.shape[1]} {config.dtype} values each")


def run_approximate(config: ApproximateConfig) -> None:
    from priorclip.retrieval.indexing.index_changes import make_approximate

    texts = read_queries(Path(config.queries)) if config.queries is not None else None
    cells = make_approximate(config, texts)
    if cells is None:
        say(f"{config.index}: searches are exact")
        return
    about = cells.about
    say(f"{config.index}: a search compares {about['probes']} of {len(cells.ends)} cells, recall@10 "
        f"{about['recall_at_10']:.3f} ({about['held_out']} {about['queries']})")  # fmt: skip


def run_add(config: AddConfig) -> None:
    from priorclip.retrieval.indexing.index_changes import add_images

    added, there = add_images(config)
    say(f"{config.index}: {added} images added" + (f", {there} were there already" if there else ""))


def run_remove(config: RemoveConfig) -> None:
    from priorclip.retrieval.indexing.index_changes import remove_images

    say(f"{config.index}: {remove_images(config)} images removed")


def run_search(config: SearchConfig) -> None:
    from priorclip.common.files import write_text
    from priorclip.common.progress import counted
    from priorclip.retrieval.hit_formats import format_answers, format_hits
    from priorclip.retrieval.hits_geoparquet import require_geopandas, write_geoparquet
    from priorclip.retrieval.places import Within

    if config.format == "geoparquet":
        require_geopandas()
    within = Within.parse(config.bbox, config.time, config.scene)
    data = Path(config.image).read_bytes() if config.image is not None else None
    queries = read_queries(Path(config.queries)) if config.queries is not None else None
    searcher = open_searcher(config)
    if within is not None:
        within.need(searcher.index.columns)  # an index without places is no fault of the query
    text, k = config.text or "", config.k
    way = searcher.index.way_of_search(limited=within is not None)
    if queries is not None:
        found = searcher.by_texts(queries, k, within)
        answers = list(zip(counted(queries, "queries", "query"), found, strict=True))
    else:
        try:
            hits = searcher.by_text(text, k, within) if data is None else searcher.by_image(data, k, within)
        except ValueError as error:
            raise ValueError(f"--image {config.image}: {error}" if data is not None else f"--text: {error}") from error
        answers = [("", hits)]
    if way["search"] == "approximate":
        log.info("approximate search, recall@10 %.3f: --exact compares all images", way["recall_at_10"])
    if config.format == "geoparquet":
        write_geoparquet(answers, Path(str(config.output)), with_query=queries is not None)
    else:
        if queries is None:
            printed = format_hits(answers[0][1], config.format, way)
        else:
            printed = format_answers(answers, config.format, way)
        if config.output is None:
            say(printed)
            return
        write_text(Path(config.output), printed + "\n")
    say(f"{config.output}: {sum(len(hits) for _, hits in answers)} results")


def read_queries(path: Path) -> list[str]:
    """Returns the lines of a text file. Raises ValueError, which names the line, for a blank one or no UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--queries {path} is no text in UTF-8: {error}") from error
    blank = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
    if blank is not None or not lines:
        raise ValueError(f"--queries {path}: " + (f"line {blank} is blank" if lines else "it has no line"))
    return [line.strip() for line in lines]


def run_serve(config: ServeConfig) -> None:
    from priorclip.retrieval.web.server import create_server, serve

    searcher = open_searcher(config)
    serve(create_server(searcher, config.host, config.port, config.names, open_scenes(config, searcher)))


def open_scenes(config: ServeConfig, searcher: Searcher) -> SceneTiles | None:
    """Returns the scenes of --scenes, or None. Raises ValueError, FileNotFoundError if they cannot be shown."""
    from priorclip.data_shards.rasters.values import value_rule
    from priorclip.retrieval.web.scene_tiles import SceneTiles

    if config.scenes is None:
        for name, value in (("value_range", config.value_range), ("bands", config.bands)):
            if value is not None:
                raise ValueError(f"--{name} is about the scenes on the map: give their folder by --scenes")
        return None
    if searcher.index.columns is None:
        raise ValueError(f"--scenes {config.scenes}: this index has no places, so it has no map")
    return SceneTiles(Path(config.scenes), searcher.index.columns, value_rule(config.value_range, bands=config.bands))


def open_searcher(config: SearchConfig | ServeConfig) -> Searcher:
    from priorclip.retrieval.embedding_index import EmbeddingIndex
    from priorclip.retrieval.encoder import Encoder
    from priorclip.retrieval.search import Searcher

    index = EmbeddingIndex.load(config.index, config.data, config.exact)
    return Searcher(index, Encoder.load(config.model or index.find_model(), config.device, config.precision))


if __name__ == "__main__":
    sys.exit(main())
