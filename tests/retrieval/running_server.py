"""A `retrieval serve` that answers while a test runs, over a small index of pictures."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from small_galleries import TestSet, picture, write_karpathy

from priorclip.retrieval import Encoder, Searcher, build_index, create_server
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.web.scene_tiles import SceneTiles
from priorclip.retrieval.web.server import SearchServer


@contextmanager
def running_server(
    test_set: TestSet, folder: Path, files: Sequence[str], label: str = "x", names: Sequence[str] = ()
) -> Iterator[SearchServer]:
    """Indexes a picture for each file name, deletes ``gone.png``, and serves. Closing it ends the server.

    Args:
        test_set: has the model
        folder: for the pictures, the annotation and the index
        files: names of the pictures
        label: scene of each
        names: further names of the server
    """
    for number, name in enumerate(files):
        picture(number).save(folder / name)
    entries = [{"filename": name, "split": "test", "label": label, "sentences": [{"raw": "a river"}]} for name in files]
    data = write_karpathy(folder / "set.json", entries)
    index = build_index(
        IndexConfig(
            model=str(test_set.export), data=str(data), images=str(folder), output=str(folder / "index"), device="cpu"
        )
    )
    (folder / "gone.png").unlink()
    with serving(Searcher(index, Encoder.load(test_set.export, "cpu")), names) as server:
        yield server


@contextmanager
def serving(searcher: Searcher, names: Sequence[str] = (), tiles: SceneTiles | None = None) -> Iterator[SearchServer]:
    """Serves an index. Closing it ends the server."""
    server = create_server(searcher, names=names, tiles=tiles)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
