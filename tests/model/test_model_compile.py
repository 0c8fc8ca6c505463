"""torch.compile takes the whole model as one graph; all attention uses torch's fused kernel."""

import pytest
import torch
import torch._dynamo
from tiny_models import CLIP_TEXT, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from priorclip.model.build import build_model
from priorclip.model.config import BeliefConfig, TextConfig
from priorclip.model.losses.retrieval_loss import RetrievalLoss

CLIP = TextConfig(config=CLIP_TEXT, context_length=20, pooling="eos")


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch whose texts have other lengths for every seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 60, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(3, 10, (3, 1), generator=generator)).long()
    return images, tokens, mask


def step(forward, seed: int) -> torch.Tensor:
    loss, _ = RetrievalLoss()(forward(*draw(seed)), torch.arange(3))
    loss.backward()
    return loss.detach()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("backend", "config"), [
    ("inductor", tiny(text=CLIP)),
    ("aot_eager", tiny("prioritr", belief=BeliefConfig(mode="hard", k=5))),
], ids=["priorclip", "prioritr"])  # fmt: skip
def test_compiled_is_eager_in_one_graph_without_recompiling(backend, config):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = build_model(config).train()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        wanted, expected = step(model, seed), gradients(model)
        torch.testing.assert_close(step(compiled, seed), wanted, rtol=1e-5, atol=1e-5)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class SoftmaxOverScores(TorchDispatchMode):
    """Counts the softmax over (B, heads, Q, L), which attention has only without the fused kernel."""

    def __init__(self):
        super().__init__()
        self.unfused = self.fused = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            self.unfused += args[0].ndim >= 3
        self.fused += "scaled_dot_product" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("config", "least"), [
    (tiny(text=CLIP), 6 + 2),
    (tiny(vision="resnet"), 1 + 2),
    (tiny("prioritr"), 6 + 2 * 1 + 2 * 2 + 2),
], ids=["vit", "fusion", "pae"])  # fmt: skip
@pytest.mark.parametrize("train", [True, False])
def test_attention_is_fused_everywhere(config, least: int, train: bool):
    model = build_model(config).train(train)
    watch = SoftmaxOverScores()
    with watch, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss, _ = RetrievalLoss()(model(*draw(1)), torch.arange(3))
        loss.backward()
    assert watch.unfused == 0
    assert watch.fused >= 2 * least  # each forward and backward


def test_the_watch_sees_attention_that_is_not_fused(monkeypatch):
    model = build_model(tiny())
    for block in model.visual.encoder.model.blocks:
        monkeypatch.setattr(block.attn, "fused_attn", False)
    watch = SoftmaxOverScores()
    with watch:
        model.encode_image(draw(1)[0])
    assert watch.unfused == len(model.visual.encoder.model.blocks)
