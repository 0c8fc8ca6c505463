"""``python -m retrieval evaluate|index|search|serve``: see each command's --help."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from options import parse_command
from retrieval.config import COMMANDS, EvaluateConfig, IndexConfig, SearchConfig, ServeConfig

if TYPE_CHECKING:
    from retrieval.search import Searcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the request or what it names is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "timm", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run: dict[str, Callable[..., None]] = {
        "evaluate": run_evaluate,
        "index": run_index,
        "search": run_search,
        "serve": run_serve,
    }
    prog = "retrieval"
    try:
        name, config = parse_command(COMMANDS, argv, prog=prog, description="Evaluate and use a trained model.")
        prog = f"retrieval {name}"
        run[name](config)
    except (OSError, ValueError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_evaluate(config: EvaluateConfig) -> None:
    from retrieval.evaluation import evaluate, write_report
    from retrieval.table import recall_table

    report = evaluate(config)
    print(recall_table(report))
    if config.output:
        write_report(config.output, report)
        print(f"report: {config.output}")


def run_index(config: IndexConfig) -> None:
    from retrieval.index import build_index

    index = build_index(config)
    print(f"{config.output}: {len(index)} images, {index.embeddings.shape[1]} {config.dtype} values each")


def run_search(config: SearchConfig) -> None:
    from pathlib import Path

    from retrieval.table import hit_table

    data = Path(config.image).read_bytes() if config.image is not None else None
    searcher = open_searcher(config)
    hits = searcher.by_text(config.text or "", config.k) if data is None else searcher.by_image(data, config.k)
    print(hit_table(hits))


def run_serve(config: ServeConfig) -> None:
    from retrieval.server import create_server, serve

    serve(create_server(open_searcher(config), config.host, config.port))


def open_searcher(config: SearchConfig | ServeConfig) -> Searcher:
    from retrieval.encoder import Encoder
    from retrieval.index import EmbeddingIndex
    from retrieval.search import Searcher

    index = EmbeddingIndex.load(config.index)
    return Searcher(index, Encoder.load(config.model or index.model, config.device, config.precision))


if __name__ == "__main__":
    sys.exit(main())
