"""Uses a trained model: recall on a test set, and search in an index of images by a text or an image.

    export folder + Karpathy JSON or shards -> evaluate -> table, report.json
    export folder + images                  -> index    -> embeddings + the place of each image
    export folder + shards with captions    -> curate   -> shards without bad pairs, report.md
    index + text or image                   -> search   -> ranked table
                                            -> serve    -> a web page

    from priorclip.retrieval import EmbeddingIndex, Encoder, Searcher
    searcher = Searcher(EmbeddingIndex.load("runs/index"), Encoder.load("runs/demo/export"))
    for hit in searcher.by_text("four white storage tanks beside a river", k=10): ...

The package imports torch only when one of these names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from priorclip.retrieval.embedding_index import EmbeddingIndex as EmbeddingIndex
    from priorclip.retrieval.embedding_index import build_index as build_index
    from priorclip.retrieval.encoder import Encoder as Encoder
    from priorclip.retrieval.evaluate_export import evaluate as evaluate
    from priorclip.retrieval.gallery import Gallery as Gallery
    from priorclip.retrieval.gallery import open_gallery as open_gallery
    from priorclip.retrieval.search import Hit as Hit
    from priorclip.retrieval.search import Searcher as Searcher
    from priorclip.retrieval.web.server import create_server as create_server

EXPORTS = {
    "EmbeddingIndex": "embedding_index",
    "Encoder": "encoder",
    "Gallery": "gallery",
    "Hit": "search",
    "Searcher": "search",
    "build_index": "embedding_index",
    "create_server": "web.server",
    "evaluate": "evaluate_export",
    "open_gallery": "gallery",
}

__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(f"priorclip.retrieval.{EXPORTS[name]}"), name)
    raise AttributeError(f"module 'retrieval' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
