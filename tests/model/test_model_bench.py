"""The benchmark of the step: its counts, output and errors. Its timings are not tested."""

import json
import sys

import pytest
import torch
from tiny_models import tiny

from priorclip.model.__main__ import main
from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig
from priorclip.model.cost.flops import count_flops, module_flops, total_flops
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.cost.step_bench import median_ratio
from priorclip.model.losses.retrieval_loss import RetrievalLoss


def flops_of_a_step(trainable: bool) -> tuple[int, int]:
    """FLOPs of the whole step and of the prior in it, with the prior trained or frozen."""
    model = build_model(tiny(prior=EncoderConfig(name="test_convnext", image_size=32, trainable=trainable))).train()
    images, ids = torch.zeros((2, 3, 64, 64), dtype=torch.uint8), torch.ones((2, 9), dtype=torch.long)
    with count_flops() as counter:
        RetrievalLoss()(model(images, ids), torch.arange(2))[0].backward()
    return total_flops(counter), module_flops(counter, "PriorCLIP.prior")


def test_the_backward_pass_of_a_frozen_prior_costs_nothing():
    model = build_model(tiny()).eval()
    with count_flops() as counter:
        model.prior(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))
    forward = total_flops(counter)
    frozen, trained = flops_of_a_step(False), flops_of_a_step(True)
    assert frozen[1] == forward > 0
    assert trained[0] > frozen[0] + forward


def test_attention_on_the_cpu_is_counted():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    with count_flops() as counter:
        read = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert total_flops(counter) == 2 * 2 * 2 * 3 * 5 * 5 * 8
    with count_flops() as counter:
        read.sum().backward()
    assert total_flops(counter) >= 2 * 4 * 2 * 3 * 5 * 5 * 8


def test_the_command_times_a_preset_alone(capsys):
    words = ["bench", "--preset", "priorclip-tiny", "--peer", "null", "--batch", "2", "--runs", "1", "--device", "cpu"]
    assert main([*words, "--optimizer", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (found,) = report["models"]
    assert found["images_per_second"] == pytest.approx(2 / found["seconds"])
    assert found["tflops_per_second"] == pytest.approx(found["gflops"] / 1000 / found["seconds"])
    assert "time_ratio" not in report


def test_both_are_timed_and_compared(capsys, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-for-tests", small)
    words = ["bench", "--preset", "priorclip-tiny", "--peer", "small-for-tests", "--batch", "2", "--runs", "2"]
    assert main([*words, "--device", "cpu", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["priorclip-tiny", "small-for-tests"]
    gflops = [float(line.split()[3]) for line in lines[2:4]]
    assert float(lines[4].split()[-1]) == pytest.approx(gflops[0] / gflops[1], rel=0.01)
    assert lines[4].startswith("ratio of times ")


def test_ratios_are_of_steps_side_by_side():
    assert median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize(("device", "dtype", "peak"), [
    ("NVIDIA H200", "bf16", 989.0), ("NVIDIA H100 80GB HBM3", "bf16", 989.0), ("NVIDIA H100 PCIe", "bf16", 756.0),
    ("NVIDIA A100-SXM4-80GB", "float32", 19.5), ("NVIDIA L4", "bf16", 121.0), ("NVIDIA L40S", "bf16", 362.0),
    ("NVIDIA A10", "bf16", 125.0), ("NVIDIA GeForce RTX 4090", "bf16", 165.0), ("Tesla T4", "bf16", None),
])  # fmt: skip
def test_peaks_by_device_name(device: str, dtype: str, peak: float | None):
    assert peak_of(device, dtype) == peak


@pytest.mark.parametrize(("words", "named"), [
    (["--peer", "ViT-Z-1", "--preset", "priorclip-tiny"], "--peer ViT-Z-1"),
    (["--preset", "priorclip-none"], "no preset 'priorclip-none'"),
])  # fmt: skip
def test_missing_things_are_named(words: list[str], named: str, capsys):
    assert main(["bench", "--batch", "2", "--runs", "1", "--device", "cpu", *words]) == 2
    assert named in capsys.readouterr().err


def test_without_open_clip_the_message_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert main(["bench", "--preset", "priorclip-tiny", "--batch", "2", "--device", "cpu"]) == 2
    assert "pip install open_clip_torch, or --peer null" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda", "--preset", "priorclip-tiny"]) == 2
    assert "--device cuda" in capsys.readouterr().err
