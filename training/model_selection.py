"""Which weights a run evaluates and exports: the last, their moving average, or those of its best evaluation.

    selection = ModelSelection(config, engine)
    selection.update_average()                                      # after each step
    with selection.selected_weights(): metrics = evaluate(engine)
    selection.add_evaluation(metrics); selection.is_out_of_patience
    weights, facts = selection.export_weights()                     # facts: their step, and their evaluation if known

The best weights are those of the best checkpoint, which ``run.checkpoint`` keeps anyway. Each checkpoint holds the
averages of its step, and the number of evaluations without a better one, so that a resumed run continues with both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor

from priorclip.common.checkpoint_files import step_of
from priorclip.common.checkpoint_record import load_record
from priorclip.common.output import get_logger
from priorclip.training.checkpoints.files import score
from priorclip.training.checkpoints.load import find_best_good, load_checkpoint
from priorclip.training.config import RunConfig
from priorclip.training.engine.averages import Averages, copy_weights
from priorclip.training.engine.build import full_state_dict

logger = get_logger(__name__)


class ModelSelection:
    """All methods except `update_average` and `add_evaluation` are collectives.

    Args:
        config: ``average``, ``export``, ``patience``, and ``checkpoint``, which defines the best evaluation
        engine: of the run, before its first step
    """

    def __init__(self, config: RunConfig, engine: deepspeed.DeepSpeedEngine) -> None:
        self.config, self.engine = config, engine
        self.averages = Averages(engine, config.average) if config.average.decay else None
        self.best: float | None = None
        self.evaluations_without_better = 0

    def update_average(self) -> None:
        if self.averages is not None:
            self.averages.update()

    def selected_weights(self) -> AbstractContextManager[None]:
        """While it is open, the engine computes with the moving average, if the run keeps one."""
        return self.averages.in_place() if self.averages is not None else nullcontext()

    def add_evaluation(self, evaluation: dict[str, float]) -> None:
        """Compares an evaluation with the best one, if the configuration needs to know it.

        Raises:
            ValueError: the evaluation does not have the metric ``run.checkpoint.best``
        """
        if self.config.export == "last" and not self.config.patience:
            return
        new = score(evaluation, self.config.checkpoint)
        if new is None:
            raise ValueError(
                f"run.checkpoint.best is '{self.config.checkpoint.best}', but the metrics of an evaluation are "
                f"{', '.join(evaluation) or 'none: set evaluation.shards'}; run.export best and run.patience need it"
            )
        if self.best is None or new > self.best:
            self.best, self.evaluations_without_better = new, 0
        else:
            self.evaluations_without_better += 1

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.evaluations_without_better

    def export_weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Whole weights to export, and what the report says about them.

        From then on the engine computes with these weights. Do not train it further.
        """
        facts: dict[str, Any] = {}
        best = None
        if self.config.export == "best":
            best = find_best_good(Path(self.config.dir) / "checkpoints", self.config.checkpoint)
            if best is None:
                logger.warning("no checkpoint of an evaluation can be read: the last weights are exported")
        if best is not None:
            if step_of(best) != self.engine.global_steps:
                load_checkpoint(self.engine, best)
                self.load(best, {})
            facts["evaluation"] = load_record(best)["evaluation"]
        facts["exported_step"] = self.engine.global_steps
        if self.averages is None:
            return full_state_dict(self.engine), facts
        weights = self.averages.state_dict()
        copy_weights(self.engine.module, weights)
        return weights, facts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the averages."""
        return {"best": self.best, "waited": self.evaluations_without_better}

    def load(self, found: Path, state: dict[str, Any]) -> None:
        """Continues from a checkpoint that the engine has loaded."""
        self.best, self.evaluations_without_better = state.get("best"), state.get("waited", 0)
        if self.averages is not None and not self.averages.load(found):
            logger.warning("%s has no moving average: a new one starts from the weights of that step", found)
