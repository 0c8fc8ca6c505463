"""Which weights a run is judged by and leaves behind: the last, their moving average, or the best of its evaluations.

    outcome = Outcome(run, engine)
    outcome.stepped()                               # after each step: the average follows
    with outcome.judged(): figures = evaluate()     # the engine computes with what is judged
    outcome.sees(figures); outcome.is_over          # patience has run out
    weights, facts = outcome.weights()              # what is exported; their step, and their evaluation where known

The best weights are those of the best checkpoint, which ``run.checkpoint`` keeps anyway. Each checkpoint holds the
averages of its step, and how long the run has waited for a better evaluation: a run that goes on has both.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor

from priorclip.training.checkpoints import files as checkpoint
from priorclip.training.config import RunConfig
from priorclip.training.engine.averages import Averages, put
from priorclip.training.engine.build import full_state_dict

logger = logging.getLogger(__name__)


class Outcome:
    """See the module's docstring. All methods but ``stepped`` and ``sees`` are collectives.

    Args:
        config: ``average``, ``export``, ``patience``, and ``checkpoint``, which says what best is
        engine: of the run, before its first step
    """

    def __init__(self, config: RunConfig, engine: deepspeed.DeepSpeedEngine) -> None:
        self.config, self.engine = config, engine
        self.averages = Averages(engine, config.average) if config.average.decay else None
        self.best: float | None = None
        self.waited = 0

    def stepped(self) -> None:
        if self.averages is not None:
            self.averages.update()

    def judged(self) -> AbstractContextManager[None]:
        return self.averages.in_place() if self.averages is not None else nullcontext()

    def sees(self, evaluation: dict[str, float]) -> None:
        """Take note of an evaluation.

        Raises:
            ValueError: it has no figure by which the run could tell the best
        """
        if self.config.export == "last" and not self.config.patience:
            return
        new = checkpoint.score(evaluation, self.config.checkpoint)
        if new is None:
            raise ValueError(
                f"run.checkpoint.best is '{self.config.checkpoint.best}', but the figures of an evaluation are "
                f"{', '.join(evaluation) or 'none: give evaluation.shards'}; run.export best and run.patience need one"
            )
        better = self.best is None or new > self.best
        self.best, self.waited = (new, 0) if better else (self.best, self.waited + 1)

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.config.patience <= self.waited

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Whole weights to export, and what the report says of them.

        The engine computes with them from then on, and is not to be trained further.
        """
        facts: dict[str, Any] = {}
        best = best_good(Path(self.config.dir) / "checkpoints", self.config) if self.config.export == "best" else None
        if best is not None:
            if checkpoint.step_of(best) != self.engine.global_steps:
                checkpoint.load(self.engine, best)
                self.load(best, {})
            facts["evaluation"] = checkpoint.record_of(best)["evaluation"]
        facts["exported_step"] = self.engine.global_steps
        if self.averages is None:
            return full_state_dict(self.engine), facts
        weights = self.averages.state_dict()
        put(self.engine.module, weights)
        return weights, facts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the averages."""
        return {"best": self.best, "waited": self.waited}

    def load(self, found: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint that the engine has been brought to."""
        self.best, self.waited = state.get("best"), state.get("waited", 0)
        if self.averages is not None and not self.averages.load(found):
            logger.warning("%s has no moving average: it starts afresh from the weights of that step", found)


def best_good(folder: Path, config: RunConfig) -> Path | None:
    """The best checkpoint whose checksums hold. Rank 0 looks, all ranks get its answer."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        left = checkpoint.published(folder)
        while (best := checkpoint.best_of(left, config.checkpoint)) is not None:
            problem = checkpoint.fault(best)
            if problem is None:
                found = [str(best)]
                break
            logger.warning("%s was the best, but is not exported: %s", best, problem)
            left.remove(best)
    dist.broadcast_object_list(found)
    return Path(found[0]) if found[0] else None
