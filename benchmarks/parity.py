"""Compares the features of converted CLIP models with those of the original library.

    python benchmarks/parity.py [--models B-32 B-16 L-14]

It uses all layers, random weights (also biases and norms, so that each one matters), float32, random pixels and texts
of several lengths. It prints the largest difference between two L2-normalised features, which must be at most 1e-5, and
for comparison the largest difference between two inputs. Exit code 1 if a difference is larger. L/14 takes 5 GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from priorclip.model.build import build_model
from priorclip.model.convert import open_clip, transformers_clip
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.family import CLIP_MEAN, CLIP_STD, Request

LIMIT = 1e-5
SIZES = {  # transformers' arguments for the vision and the text tower; the defaults are B/32
    "B-32": ({}, {}),
    "B-16": ({"patch_size": 16}, {}),
    "L-14": (
        {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
}  # fmt: skip
PAIRS, LENGTH, END = 4, 77, 49407
Features = tuple[Tensor, Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    worst = 0.0
    print("| model | library | parameters, M | image features | text features | two images | two texts |")
    print(f"|---|---|{'---:|' * 5}")
    for name in parser.parse_args().models:
        for library, compare in (("open_clip", against_open_clip), ("transformers", against_transformers)):
            torch.manual_seed(0)
            size, theirs, ours = compare(name)
            errors = [(a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True)]
            apart = [(a[0] - a[1]).abs().max().item() for a in theirs]
            worst = max(worst, *errors)
            cells = [f"{size / 1e6:.1f}", *(f"{error:.1e}" for error in errors), *(f"{each:.2f}" for each in apart)]
            print(f"| ViT-{name} | {library} | {' | '.join(cells)} |", flush=True)
    return int(worst > LIMIT)


@torch.no_grad()
def against_open_clip(name: str) -> tuple[int, Features, Features]:
    """Returns parameters and features of open_clip's model, and the features of ours with its state dict."""
    import open_clip as library

    theirs = shaken(library.create_model(f"ViT-{name}")).eval()
    pixels, ids, _ = inputs()
    wanted = theirs.encode_image(normalised(pixels), normalize=True), theirs.encode_text(ids, normalize=True)
    return count(theirs), wanted, converted(open_clip.convert, theirs, "open_clip", {})


@torch.no_grad()
def against_transformers(name: str) -> tuple[int, Features, Features]:
    """Returns the same for transformers' CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    vision, text = SIZES[name]
    ends = {"bos_token_id": END - 1, "eos_token_id": END}
    config = CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=768 if name == "L-14" else 512)
    theirs = shaken(CLIPModel(config)).eval()
    pixels, ids, mask = inputs()
    out = theirs(input_ids=ids, attention_mask=mask, pixel_values=normalised(pixels))
    wanted = out.image_embeds, out.text_embeds
    return count(theirs), wanted, converted(transformers_clip.convert, theirs, "transformers", config.to_dict())


def converted(convert: Callable[..., Any], theirs: nn.Module, family: str, facts: dict[str, Any]) -> Features:
    """Returns the features of our model with their weights. Raises SystemExit if a key was not used."""
    made = convert(Checkpoint(family, dict(theirs.state_dict()), facts), Request(family))
    unused = [key for key in made.unused if not key.endswith("position_ids")]
    if unused:
        sys.exit(f"keys of {family} that were not used: {', '.join(unused)}")
    model = build_model(made.config).eval()
    model.load_state_dict(made.state)
    pixels, ids, mask = inputs()
    return model.encode_image(pixels), model.encode_text(ids, mask)


def shaken(model: nn.Module) -> nn.Module:
    """Returns the model with random biases and norms, which are 0 and 1 at first."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Returns pixels in [0, 1], and texts of different lengths, padded with zeros."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(PAIRS, 3, 224, 224, generator=generator)
    ids = torch.randint(1, END - 1, (PAIRS, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 30, 12, 5])[:, None]
    places = torch.arange(LENGTH)
    ids = ids.masked_fill(places == lengths - 1, END).masked_fill(places >= lengths, 0)
    return pixels, ids, (places < lengths).long()


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
