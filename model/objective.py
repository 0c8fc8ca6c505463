"""What a training on captioned images asks of the model: the losses of a batch, and the recall on held-out images.

objective = RetrievalObjective(LossConfig(lambda_cs=1.0), device, gather)
loss, parts = objective.step(engine, batch)
figures = objective.evaluate(engine, batches)
pictures = objective.pictures(engine, batches)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.belief_picture import belief_panel
from model.config import LossConfig
from model.evaluation import Batches, Forward, Gather, evaluate_retrieval
from model.losses import RetrievalLoss


class RetrievalObjective:
    """Contrastive and Attribution loss over the global batch; recall@k by the field's protocol.

    Args:
        loss: weights of the parts
        device: where the model is
        gather: joins the ranks' rows for an evaluation (see model.evaluation); None: this process has them all
    """

    def __init__(self, loss: LossConfig, device: torch.device, gather: Gather | None = None) -> None:
        self.loss = RetrievalLoss(**asdict(loss))
        self.device, self.gather = device, gather

    def step(self, engine: Forward, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (images, input_ids, attention_mask, image_ids, labels), its parts and the logit_scale."""
        return self.losses(self.encode(engine, batch), batch)

    def encode(self, engine: Forward, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first half of a step: features and scales of a batch (images, input_ids, attention_mask)."""
        return engine(batch["images"], batch["input_ids"], batch["attention_mask"])

    def losses(self, features: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The second half: the loss of features, with image_ids and labels of the batch."""
        image_ids, labels = (batch[name].to(self.device, non_blocking=True) for name in ("image_ids", "labels"))
        total, parts = self.loss(features, image_ids, labels)
        return total, {**parts, "logit_scale": features["logit_scale"].detach()}

    @torch.no_grad()
    def pictures(self, engine: Forward, batches: Batches, count: int = 8) -> dict[str, Image.Image]:
        """The belief maps of the first held-out images, the same at every evaluation. All ranks call the engine."""
        batch = next(batches.images())
        some = batch["images"][batch["index"] >= 0][:count]
        if len(some) == 0:  # a rank without a share, whose engine is needed by the others all the same
            some = batch["images"][:1]
        belief = engine(images=some.to(self.device), return_belief=True).get("belief")
        return {} if belief is None else {"belief": belief_panel(some, belief)}

    def evaluate(self, engine: Forward, batches: Batches) -> dict[str, float]:
        """Recalls of the engine in eval mode, percent."""
        return evaluate_retrieval(engine, batches, self.device, self.gather)
