"""The options of ``python -m pretrain``, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from priorclip.data_shards.band_statistics import read_band_statistics
from priorclip.data_shards.config import DataConfig, EvaluationConfig
from priorclip.model.config import EncoderConfig, LossConfig, ModelConfig, add_bias
from priorclip.model.export_config import starting_architecture
from priorclip.training.config import RunConfig


@dataclass
class PretrainConfig:
    """Stage one: pretrain PriorCLIP on image-text shards.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: the training shards
        tokenizer: hub id, local folder or package:NAME; null takes the one of init_from
        preset: name of an architecture in model/presets; its values are the defaults of model.*
        init_from: export folder, or hf://user/name on the hub; the run starts from its weights and architecture
        model: the architecture, key by key
        loss: the objective
        evaluation: recall during training
    """

    run: RunConfig
    data: DataConfig
    tokenizer: str | None = None
    preset: str = "priorclip-b32"
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        follow_model(self.data, self.run.dir, self.model.vision, self.model.prior)
        add_bias(self.model, self.loss)


def follow_model(data: DataConfig, run_dir: str, vision: EncoderConfig, *others: EncoderConfig) -> None:
    """Sets what is null and follows from other options: image size and bands of the data, statistics of the encoders.

    Raises ValueError or OSError for bands of the data that are not those of ``vision``, and for bad statistics.
    """
    data.follow(vision.image_size, run_dir, vision.bands)
    if data.statistics is not None:
        found = read_band_statistics(data.statistics)
        for encoder in (vision, *others):
            encoder.take_statistics(found, data.statistics)


def model_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the architecture of ``--init_from`` or ``--preset`` as the defaults of ``model.*``."""
    return {"model": starting_architecture(given.get("init_from"), given["preset"])}
