"""Captions without words, and the memory of the losses as measured on a process."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_models import BERT, CLIP_TEXT, tiny

from priorclip.model.build import build_model
from priorclip.model.config import TextConfig
from priorclip.model.losses.retrieval_loss import RetrievalLoss

# (N, N) logits alone would be 256 MB.
MEMORY = """
from pathlib import Path
import torch
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
size, width = 8192, 32
image, text = (torch.nn.functional.normalize(torch.randn(size, width), dim=1).requires_grad_() for _ in range(2))
scale, own = torch.tensor(10.0, requires_grad=True), torch.arange(size)
for small in (ContrastiveLoss(512), AttributionLoss(512)):  # load what is loaded on first use
    small(image[:64], text[:64], scale, own[:64]).backward()
for loss in (ContrastiveLoss(512), AttributionLoss(512)):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    loss(image, text, scale, own).backward()
    print(resident("VmHWM") - before)
"""


def test_a_process_never_holds_the_whole_matrix():
    """Every sample has its own image and class, so that both losses have N x N logits."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [int(line) for line in done.stdout.split()]
    assert len(found) == 2
    assert max(found) < 64, f"{found} MB above the features"


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
@pytest.mark.parametrize(
    ("text", "pooling"), [(BERT, "cls"), (BERT, "mean"), (CLIP_TEXT, "eos")], ids=["bert-cls", "bert-mean", "clip-eos"]
)
def test_captions_without_a_word(kind: str, text: dict, pooling: str):
    """A text of padding only and a text of start and end only: features are finite, and other captions stay."""
    torch.manual_seed(0)
    model = build_model(tiny(kind, text=TextConfig(config=text, context_length=20, pooling=pooling))).train()
    ids, mask = torch.randint(1, 60, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[0] = 0
    mask[1, 2:] = 0
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    outputs = model(images, ids, mask)
    alone = model.encode_text(ids[2:], mask[2:])
    torch.testing.assert_close(outputs["text_features"][2:], alone, rtol=1e-4, atol=1e-5)
    loss, _ = RetrievalLoss(lambda_cs=1.0)(outputs, torch.arange(4), torch.tensor([0, 0, 1, -1]))
    loss.backward()
    assert loss.isfinite()
    assert outputs["text_features"].isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert parameter.grad is None or parameter.grad.abs().max() < 1e4, name
