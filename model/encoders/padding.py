"""Cuts the padding that no text of a batch needs: an encoder's time grows with the length that it is given.

    input_ids (64, 77), longest caption 13 tokens -> (64, 16)

Padding is masked, so the features are those of the padded batch up to rounding (1e-7). Lengths are multiples of 8: then
a GPU's memory and kernels see at most 10 shapes of 77 tokens. To cut for a compiled model, cut its input.

Two things decide whether a cut is exact:

* the architecture. A token of a model in ``MASKED`` reads only unmasked tokens, and positions count from the left.
* dropout. It draws a number for each value, padding included, so a cut changes what is drawn for the others. A model
  that draws is not cut, so that a training is the same with and without this module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

MULTIPLE = 8  # tokens
MASKED = (
    "albert",
    "bert",
    "camembert",
    "clip_text_model",
    "distilbert",
    "electra",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
)


def cut_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts token ids (B, T) and mask (B, T) after the longest text, to a multiple of 8 -> (B, t) each, t <= T.

    On a GPU it waits for the mask. A mask without values keeps T: on the meta device, or a subclass of tensors, such as
    the fake tensors that count memory.
    """
    if attention_mask.is_meta or type(attention_mask) is not Tensor:
        return input_ids, attention_mask
    kept = kept_length(attention_mask)
    return input_ids[:, :kept], attention_mask[:, :kept]


def kept_length(attention_mask: Tensor) -> int:
    """Returns the place after the last real token of any text, rounded up to a multiple of 8, at most T."""
    length = attention_mask.shape[1]
    places = torch.arange(1, length + 1, device=attention_mask.device)
    longest = int((attention_mask.bool().any(0) * places).amax()) if attention_mask.numel() else 0
    return min(length, -(-max(longest, 1) // MULTIPLE) * MULTIPLE)


def is_masked(architecture: PreTrainedConfig) -> bool:
    """Tells whether no token of this architecture ever reads a padded one."""
    return architecture.model_type in MASKED and not getattr(architecture, "is_decoder", False)


def draws_dropout(module: nn.Module, architecture: PreTrainedConfig | None = None) -> bool:
    """Tells whether a module draws random numbers: in training mode, by its layers or its configuration's rates."""
    if not module.training:
        return False
    rates = {} if architecture is None else architecture.to_dict()
    if any("drop" in name and isinstance(rate, int | float) and rate > 0 for name, rate in rates.items()):
        return True
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in module.modules() if layer.training)
