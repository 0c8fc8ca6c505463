"""The command ``retrieval pictures``: draws each picture, and writes their figures to pictures.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from priorclip.retrieval.commands import PICTURES, PicturesConfig
from priorclip.retrieval.evaluate_export import write_report
from priorclip.retrieval.pictures.belief import draw_belief
from priorclip.retrieval.pictures.material import CannotDraw, Material
from priorclip.retrieval.pictures.panel import draw_panel
from priorclip.retrieval.pictures.scenes import draw_scenes
from priorclip.retrieval.pictures.tsne import draw_tsne

Draw = Callable[[Material, Path], dict[str, Any]]
DRAWN: dict[str, Draw] = dict(zip(PICTURES, (draw_tsne, draw_panel, draw_belief, draw_scenes), strict=True))


def draw_pictures(config: PicturesConfig) -> dict[str, Any]:
    """Draws the chosen pictures into ``config.output``.

    Returns:
        ``pictures``: the figures of each drawn picture; ``left_out``: name -> reason of those that the model or the
        data do not allow. With ``only``, such a reason is an error
    Raises:
        OSError, ValueError: bad input; the message names the option, file or key
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder} is a file: name a folder")
    material = Material(config)
    report: dict[str, Any] = {"pictures": {}, "left_out": {}}
    for name in config.chosen:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report["pictures"][name] = DRAWN[name](material, folder / f"{name}.png")
        except CannotDraw as error:
            if config.only is not None:
                raise
            report["left_out"][name] = str(error)
    write_report(folder / "pictures.json", report)
    return report
