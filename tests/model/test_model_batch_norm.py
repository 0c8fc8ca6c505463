"""Batch norms with half precision weights and float32 statistics, as under DeepSpeed."""

from __future__ import annotations

import timm
import torch

from priorclip.model.encoders.batch_norm import keep_statistics


def test_half_weights_beside_float32_statistics() -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=0, channels=[8, 8, 16, 16], stem_width=8)
    images = torch.randn(4, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    net.eval()
    expected = net(images)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    keys = list(net.state_dict())
    keep_statistics(net)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(images), expected)
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16()
    half = net(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() / expected.norm() < 0.03
    half.sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in net.parameters())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in net.named_buffers())
    net.train()(images.bfloat16())
    assert net.bn1.running_mean.dtype == torch.float32
    assert not torch.equal(net.bn1.running_mean, statistics["bn1.running_mean"])
    net.bfloat16().eval()(images.bfloat16())
