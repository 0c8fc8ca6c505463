"""Networks that train a prior without scene labels: a backbone, and a light head that is left out of the export.

    masks   each token of the grid -> P x P logits, side by side             (B, h*P, w*P)
    boxes   the same places -> score and distances to the four edges         (B, h*P * w*P, 5)
    self    pooled feature -> expander, as in VICReg                         (B, D)

    network = PriorNetwork(backbone, "masks")
    network(images)                    # the output of the head
    network(images, features=True)     # pooled features (B, C), for a probe

The export is the backbone alone: a `SceneClassifier` without classes, which is a value of ``model.prior.weights``.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from priorclip.model.config import EncoderConfig, SceneConfig
from priorclip.model.encoders.vision import ImageEncoder, VisualTokens, normalisation

DenseTarget = Literal["boxes", "masks", "self"]
PER_TOKEN = 4  # P: places of a token on a side
HIDDEN = 128
EXPANDED = 512  # D, the width of the expander; VICReg has 8192 for ImageNet


class PriorNetwork(nn.Module):
    """A backbone with a head for boxes, masks or self-supervision.

    Args:
        config: the backbone
        target: what it learns
    Raises:
        ValueError: the backbone's pooling has weights of its own, which these targets would not train
    """

    def __init__(self, config: EncoderConfig, target: DenseTarget):
        super().__init__()
        self.config = SceneConfig(backbone=copy.deepcopy(config), learned=target)
        self.config.backbone.mean, self.config.backbone.std = normalisation(config)
        self.target = target
        self.backbone = ImageEncoder(self.config.backbone, pool=False)
        refuse_own_pooling(config, self.backbone)
        width, outputs = self.backbone.width, PER_TOKEN**2 * {"masks": 1, "boxes": 5, "self": 0}[target]
        if target == "self":
            layers = [nn.Linear(width, EXPANDED, bias=False), nn.BatchNorm1d(EXPANDED), nn.ReLU()]
            layers += [nn.Linear(EXPANDED, EXPANDED, bias=False), nn.BatchNorm1d(EXPANDED), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Linear(EXPANDED, EXPANDED, bias=False))
        else:
            last = nn.Linear(HIDDEN, outputs)
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), last)
            if target == "boxes":
                start_rare(last)

    def forward(self, images: Tensor, features: bool = False) -> Tensor:
        """Images (B, 3, H, W) -> the head's output; with ``features`` the pooled features (B, C)."""
        visual = self.backbone.tokens(images)
        if features:
            return visual.pooled
        if self.target == "self":
            return self.head(visual.pooled)
        return self.spread(visual)

    def spread(self, visual: VisualTokens) -> Tensor:
        """Returns the logits (B, h*P, w*P) of masks, or (B, h*P * w*P, 5) of boxes, row by row."""
        (height, width), size = visual.grid, PER_TOKEN
        each = self.head(visual.tokens).unflatten(1, (height, width)).unflatten(-1, (size, size, -1))
        places = each.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)  # (B, h*P, w*P, 1 or 5)
        return places.squeeze(-1) if self.target == "masks" else places.flatten(1, 2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)


def start_rare(layer: nn.Linear) -> None:
    """Sets the biases of the scores so that a place starts with a probability of 0.01, as for the focal loss."""
    with torch.no_grad():
        layer.bias.view(-1, 5)[:, 0] = -4.595


def refuse_own_pooling(config: EncoderConfig, encoder: ImageEncoder) -> None:
    """Raises ValueError if the encoder that pools, which the export holds, has other weights than this one."""
    plain = copy.deepcopy(config)
    plain.weights = None
    with torch.device("meta"):
        pooling = ImageEncoder(plain, pool=True)
    if pooling.model.state_dict().keys() != encoder.model.state_dict().keys():
        raise ValueError(
            f"the pooling of the encoder '{config.name}' has weights of its own, which --targets boxes, masks and self "
            "do not train: take another --backbone.name"
        )


def backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the export: those of the backbone."""
    return {name: value for name, value in weights.items() if not name.startswith("head.")}
