"""The options of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DemoConfig:
    """Run the whole system on this machine.

    Args:
        source: synthetic and raster draw their images; ucmerced and rsicd read them from data
        data: folder with images/, labels.csv and dataset_ucm_captions.json (source ucmerced), or with images/ and
            dataset_rsicd_aid.json (source rsicd)
        dir: run folder; null takes runs/demo, runs/demo-raster, runs/demo-ucmerced or runs/rsicd
        seed: of the synthetic images and of every training
        ranks: processes of each training
        zero: ZeRO stage of the trainings, but for the prior
        train_images: synthetic images for training (sources synthetic and raster)
        test_images: synthetic images for the recall table (source synthetic); evaluation in training (raster)
        scene_size: side in pixels of each of the three scenes (source raster)
        model: export folder that encodes the tiles, such as runs/demo/export; null trains a tiny model (source raster)
    """

    source: Literal["synthetic", "raster", "ucmerced", "rsicd"] = "synthetic"
    data: str | None = None
    dir: str | None = None
    seed: int = 0
    ranks: int = 2
    zero: int = 2
    train_images: int = 6000
    test_images: int = 200
    scene_size: int = 4000
    model: str | None = None
