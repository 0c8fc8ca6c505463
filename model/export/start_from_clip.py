"""How a PriorCLIP begins from a plain CLIP's weights: the parts that a CLIP does not have, and its image projection.

A plain CLIP projects the backbone's feature of width C into the shared space of width d. A PriorCLIP whose fusion
layers are narrower than the backbone projects their output of width w, so CLIP's projection (d, C) does not fit there:

    CLIP:       backbone -> projection (d, C)
    PriorCLIP:  backbone -> narrow (w, C) -> fusion -> projection (d, w)

If w = d, narrow takes CLIP's projection and the new projection is the identity. So the image features of stage one are
kept, except for what instruction, fusion layers and norm add. This matters most with a frozen backbone, because the
projection is then all that stage one has taught the image side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from priorclip.common.output import get_logger
from priorclip.model.networks.priorclip import PriorCLIP

log = get_logger(__name__)

PRIOR_PARTS = ("prior.", "visual.instruction.", "visual.narrow.", "visual.layers.", "visual.norm.", "visual.rival.")
PROJECTION = "image_projection.weight"


def is_plain_clip(state: Mapping[str, Tensor]) -> bool:
    """Tells whether the weights hold none of the parts that only a PriorCLIP has."""
    return not any(name.startswith(PRIOR_PARTS) for name in state)


def parts_beside_clip(model: PriorCLIP, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Returns the tensors by which a plain CLIP's state becomes the model's, by name.

    Args:
        model: the PriorCLIP; its prior and the layers that read it keep their weights
        state: the weights of a plain CLIP
        source: where the state comes from, for messages
    """
    warn_of_random_prior(model, source)
    own = model.state_dict()
    parts = {name: value for name, value in own.items() if name.startswith(PRIOR_PARTS)}
    return parts | moved_projection(own, state, source)


def warn_of_random_prior(model: PriorCLIP, source: object) -> None:
    prior = model.config.prior
    log.info("%s is a plain CLIP: the instruction starts at random, the prior from %s", source, prior.weights)
    if prior.weights is None and not prior.trainable:
        log.warning(
            "the prior '%s' is random and frozen: name its weights by --model.prior.weights (finetune prior makes "
            "them), or train it by --model.prior.trainable true",
            prior.name,
        )


def moved_projection(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Returns narrow and projection as the module's docstring describes; empty if CLIP's projection fits as it is.

    Other shapes than those of one backbone are left to the check of all names and shapes, which refuses them.
    """
    narrow, theirs, ours = own.get("visual.narrow.weight"), state.get(PROJECTION), own[PROJECTION]
    if narrow is None or theirs is None or theirs.shape != (len(ours), narrow.shape[1]):
        return {}
    if narrow.shape != theirs.shape:
        log.warning(
            "fusion.width %d is neither the backbone's width nor embed_dim %d: the image projection of %s does not fit "
            "and starts at random, so the image features of stage one are lost",
            len(narrow), len(ours), source,
        )  # fmt: skip
        return {PROJECTION: ours}
    log.info("the image projection of %s becomes the layer before the fusion layers", source)
    return {
        "visual.narrow.weight": theirs,
        "visual.narrow.bias": torch.zeros_like(own["visual.narrow.bias"]),
        PROJECTION: torch.eye(len(ours), dtype=ours.dtype),
    }
