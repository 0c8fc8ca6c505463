"""A training step of open_clip as its trainer takes it by default: autocast, ClipLoss, AdamW with float32 weights.

    step = OpenClipStep("ViT-B-32-quickgelu", batch=512, device=device, precision="bf16", compiled=False)
    step.take()
    step.flops_a_pair()     # 44.1e9, forward and backward

The model has random weights, pixels are normalised ones on the device, and texts have their full length, as in ours.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from priorclip.model.cost.flops import count_flops, total_flops
from priorclip.model.cost.step_bench import draw_tokens

NOT_INSTALLED = "open_clip is not installed: pip install 'priorclip-pretraining[bench]'"
# The same towers; OpenAI's, which the presets start from, have QuickGELU.
PEERS = {
    "priorclip-b32": "ViT-B-32-quickgelu",
    "priorclip-b16": "ViT-B-16-quickgelu",
    "priorclip-l14": "ViT-L-14-quickgelu",
    "priorclip-tiny": "tiny",
}
# Not the towers of priorclip-tiny, but as small: it shows on a CPU that the comparison runs.
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 4096, "width": 128, "heads": 4, "layers": 2},
}
# open_clip_train's defaults for ViTs, and its clamp of the scale.
ADAMW = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}
WEIGHT_DECAY = 0.2
LARGEST_SCALE = math.log(100)


def is_installed() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def why_no_peer(preset: str) -> str | None:
    """Returns why a preset cannot be compared with open_clip, or None if it can."""
    if preset not in PEERS:
        return f"open_clip has no model with the towers of {preset}"
    return None if is_installed() else NOT_INSTALLED


class OpenClipStep:
    """Model, loss, optimizer and one batch of open_clip."""

    def __init__(self, name: str, batch: int, device: torch.device, precision: str, compiled: bool) -> None:
        from open_clip.loss import ClipLoss

        self.name, self.device, self.precision = name, device, precision
        self.model = create(name, device).train()
        self.loss = ClipLoss(cache_labels=True)
        named = [(each, value) for each, value in self.model.named_parameters() if value.requires_grad]
        plain = [value for each, value in named if value.ndim < 2 or "bn" in each or "ln" in each or "bias" in each]
        kept = {id(value) for value in plain}
        decayed = [value for _, value in named if id(value) not in kept]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
        self.optimizer = torch.optim.AdamW(groups, **ADAMW)  # type: ignore[arg-type]
        self.run: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.tokens = draw_tokens(batch, self.model.context_length, self.model.vocab_size, device)
        self.pixels = torch.randn(batch, 3, *self.model.visual.image_size, device=device)

    def take(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            image, text, scale = self.run(self.pixels, self.tokens)[:3]
            loss = self.loss(image, text, scale)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, LARGEST_SCALE)

    def flops_a_pair(self) -> float:
        """FLOPs of the model's forward and backward pass, counted as those of ours, without memory."""
        count = 2
        model = create(self.name, torch.device("meta")).train()
        pixels = torch.zeros(count, *self.pixels.shape[1:], device="meta")
        tokens = torch.zeros(count, self.model.context_length, dtype=torch.long, device="meta")
        with count_flops() as counter:
            image, text = model(pixels, tokens)[:2]
            (image.sum() + text.sum()).backward()
        return total_flops(counter) / count


def create(name: str, device: torch.device) -> Any:
    """Returns open_clip's model with random weights."""
    import open_clip

    if name == "tiny" and name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.json"
            path.write_text(json.dumps(TINY))
            open_clip.add_model_config(path)
    with torch.device(device):
        return open_clip.create_model(name, device=device)
