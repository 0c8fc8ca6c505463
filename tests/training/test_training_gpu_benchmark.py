"""`python -m benchmarks.gpu`: one run on the CPU with every section, its figures, its failures, and its time."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from house import ROOT

from benchmarks.gpu import kernels, losses, measure, open_clip_step
from benchmarks.gpu.cases import SECTIONS, settings_of, work
from benchmarks.gpu.page import BEGIN, END, NO_GPU, page_of, put_into_page
from benchmarks.gpu.run_cases import Budget, run_cases
from priorclip.cluster.plan.gpu_rates import bench_rate

TOO_MANY = 10**13  # pairs, whose features no machine holds
PEAK = 0.5  # TFLOP/s, given by hand
TINY = ("--device", "cpu", "--threads", "1", "--batch", "4", "--steps", "1", "--repeats", "2", "--global_batches", "8",
        "--micro_batch", "4", "--loader_images", "16", "--loader_side", "64", "--peak_tflops", str(PEAK),
        "--minutes", "30")  # fmt: skip


def benchmark(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sections; a preset that does not exist, and more pairs than fit into memory, before pairs that do."""
    output = tmp_path_factory.mktemp("gpu")
    done = benchmark("--output", output, *TINY, "--presets", "priorclip-tiny", "no-such-preset",
                     "--stages", "0", "3", "zero2-offload", "--loss_sizes", TOO_MANY, 64)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("benchmarks.gpu: error: 3 of the cases failed")
    return output


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())  # type: ignore[no-any-return]


def test_mfu_and_ratio_are_those_of_the_measured_seconds(found: dict[str, Any]) -> None:
    (row,) = found["models"]
    for one in (row, row["peer"]):
        assert one["images_per_second"] == pytest.approx(4 / statistics.median(one["seconds"]))
        assert one["mfu"] == pytest.approx(one["flops_per_image"] * one["images_per_second"] / (PEAK * 1e12))
        assert len(one["seconds"]) == 2
    ratios = [theirs / ours for ours, theirs in zip(row["seconds"], row["peer"]["seconds"], strict=True)]
    assert row["ratio"] == pytest.approx(statistics.median(ratios))


def test_open_clips_flops_are_those_of_its_layers(found: dict[str, Any]) -> None:
    """By hand: a backward pass costs twice the forward pass, but pixels need no gradient."""
    width, layers, patches = 128, 2, (96 // 16) ** 2
    forward = 2 * 2 * width * width  # the projections of both features
    for tokens in (patches + 1, 32):
        forward += layers * (2 * 12 * width**2 * tokens + 4 * width * tokens**2)  # weights, and attention
    embedding = 2 * patches * 3 * 16**2 * width
    assert found["models"][0]["peer"]["flops_per_image"] == pytest.approx(3 * forward + 2 * embedding, rel=0.01)


def test_memory_holds_the_states(found: dict[str, Any]) -> None:
    """4 bytes for each parameter and 12 for each trained one; the buckets of ZeRO 1 to 3 are larger than the model."""
    states = 9.6e6 + 6.8e6 + 13.7e6  # of docs/scaling.md
    peaks = {row["zero"]: row["peak_bytes"] for row in found["zero"]}
    assert peaks.keys() == {"0", "3", "zero2-offload"}
    assert states < peaks["0"] < 3 * states
    assert found["models"][0]["peak_bytes"] == pytest.approx(peaks["0"], rel=0.05)
    assert all(states < peak < 1e9 for peak in peaks.values())


def test_kernels_have_shares(found: dict[str, Any]) -> None:
    (row,) = found["kernels"]
    shares = [each["share"] for each in row["kernels"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert len(shares) == kernels.SHOWN
    assert row["kernels"][0]["seconds"] == pytest.approx(shares[0] * row["kernel_seconds"])
    assert row["attention"] == {"flash, CPU": pytest.approx(3)}  # two layers of text, one of the instruction
    assert row["synchronisations"] is None
    assert row["synchronisations_note"].startswith("not counted")


def test_gradient_caching_and_loader_are_measured(found: dict[str, Any]) -> None:
    (cached,) = found["grad_cache"]
    assert (cached["batch"], cached["micro_batch"]) == (8, 4)
    assert cached["images_per_second"] == pytest.approx(8 / statistics.median(cached["seconds"]))
    (loader,) = found["loader"]
    assert loader["ours_per_core"] > 0
    assert loader["open_clip_per_core"] > 0


def test_losses_have_the_errors_of_their_number_format(found: dict[str, Any]) -> None:
    (row,) = found["losses"]
    assert row["losses"].keys() == {"contrastive", "sigmoid", "attribution", losses.PEER}
    for loss in row["losses"].values():
        assert loss["fp32"]["gradient_error"] < 1e-4 < loss["bf16"]["gradient_error"] < 0.1
    assert row["losses"]["contrastive"]["bf16"]["gradient_error"] < 0.01  # its products are in float32
    peer = row["losses"][losses.PEER]["seconds"]
    ours = row["losses"]["contrastive"]
    assert ours["ratio"] == pytest.approx(statistics.median(a / b for a, b in zip(ours["seconds"], peer, strict=True)))


def test_what_fails_is_recorded_and_the_rest_goes_on(found: dict[str, Any], folder: Path) -> None:
    reasons = {(each["section"], each["case"]): each["reason"] for each in found["not_measured"]}
    assert all(each["failed"] for each in found["not_measured"])
    assert reasons.keys() == {
        ("models", "no-such-preset, eager"), ("kernels", "no-such-preset"),
        ("losses", f"size {TOO_MANY}, matmul highest"),
    }  # fmt: skip
    assert "no preset 'no-such-preset'" in reasons["models", "no-such-preset, eager"]
    assert reasons["losses", f"size {TOO_MANY}, matmul highest"].startswith("out of memory: ")
    assert all(found[section] for section in SECTIONS)
    page = (folder / "gpu.md").read_text()
    assert all(f"{section}: {case}: failed: {reason}" in page for (section, case), reason in reasons.items())


def test_the_files_say_what_was_measured_where(found: dict[str, Any], folder: Path) -> None:
    assert found["machine"] | {"device": "cpu", "cuda": None, "peak_tflops": PEAK} == found["machine"]
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["command"].startswith("python -m benchmarks.gpu --output ")
    page = (folder / "gpu.md").read_text()
    assert page.startswith(NO_GPU)
    assert f"| priorclip-tiny, eager | 4 | {found['models'][0]['images_per_second']:,.0f} |" in page


def test_the_plan_reads_the_file(found: dict[str, Any], folder: Path) -> None:
    file = str(folder / "gpu.json")
    rate, source = bench_rate(file, "priorclip-tiny", "fp32")
    assert rate == found["models"][0]["images_per_second"]
    assert source == f"measured, {file}: cpu, fp32, eager, batch 4"


def test_without_time_everything_is_listed(tmp_path: Path) -> None:
    done = benchmark("--output", tmp_path, *TINY, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    listed = [(each["section"], each["failed"]) for each in found["not_measured"]]
    assert listed == [(section, False) for section, cases in work(found["settings"]) for _ in cases]
    assert {section for section, _ in listed} == set(SECTIONS)
    assert not any(found[section] for section in SECTIONS)
    assert all("the 0 minutes were over" in each["reason"] for each in found["not_measured"])


def dies_in_the_second(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    if case["number"] == 2:
        print("the last words", flush=True)
        os.kill(os.getpid(), 9)
    return {"number": case["number"], "process": os.getpid()}


def sleeps_in_the_second(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    if case["number"] == 2:
        time.sleep(300)
    return {}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("dies", "sleeps"):
        monkeypatch.setitem(measure.MEASURES, name, f"{__name__}:{name}_in_the_second")
    return multiprocessing.get_context("fork")


def test_a_killed_process_fails_its_current_case_only(processes: Any, tmp_path: Path) -> None:
    cases = [{"number": number} for number in (1, 2, 3, 4)]
    outcomes = list(run_cases(processes, "dies", cases, {}, Budget(5), tmp_path))
    assert [outcome.case["number"] for outcome in outcomes] == [1, 2, 3, 4]
    rows = [outcome.row for outcome in outcomes]
    assert [row and row["number"] for row in rows] == [1, None, 3, 4]
    first, _, third, fourth = (row["process"] if row else 0 for row in rows)
    assert first != third == fourth
    assert outcomes[1].failed
    assert outcomes[1].reason.startswith("its process ended: killed by SIGKILL")
    assert outcomes[1].reason.endswith("the last words")


def test_the_time_ends_a_case_that_takes_too_long(processes: Any, tmp_path: Path) -> None:
    cases = [{"number": number} for number in (1, 2, 3)]
    before = set(psutil.Process().children())
    outcomes = list(run_cases(processes, "sleeps", cases, {}, Budget(2 / 60), tmp_path))
    assert [outcome.reason.partition(":")[0] for outcome in outcomes] == ["", "not finished", "not reached"]
    assert not any(outcome.failed for outcome in outcomes)
    assert set(psutil.Process().children()) <= before


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's warnings, without a GPU: its switch is recorded, and set back even if the step fails."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (waits,) = kernels.synchronisations(step).items()
    assert waits == (f"tests/training/{Path(__file__).name}:{step.__code__.co_firstlineno + 2}", 2)
    with pytest.raises(ZeroDivisionError):
        kernels.synchronisations(lambda: 1 / 0)
    assert modes == ["warn", "default"] * 2


def test_without_open_clip_the_comparison_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_step, "is_installed", lambda: False)
    monkeypatch.setattr(losses, "is_installed", lambda: False)
    assert "pip install 'priorclip-pretraining[bench]'" in str(open_clip_step.why_no_peer("priorclip-b32"))
    settings = {"kind": "cpu", "precision": "fp32", "repeats": 1}
    row = losses.measure_losses({"size": 8, "matmul": "highest"}, settings)
    assert losses.PEER not in row["losses"]
    assert "ratio" not in row["losses"]["contrastive"]
    assert row["peer_missing"] == open_clip_step.NOT_INSTALLED


def test_compiled_models_come_last(folder: Path) -> None:
    options = type("Options", (), {})()
    options.__dict__ = {"sections": list(SECTIONS), "stages": ["0"], "batch": None}
    groups = work(settings_of(options, "cuda"))
    assert [name for name, _ in groups] == [*SECTIONS, "models"]
    assert [case["mode"] for case in groups[-1][1]] == ["compiled"] * 3
    assert [case["global_batch"] for case in groups[3][1]] == [512, 4096, 32768]


def test_figures_go_into_their_place_of_a_page(tmp_path: Path, found: dict[str, Any]) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nformer figures\n{END}\n\nAfter.\n")
    put_into_page(page, page_of(found))
    text = page.read_text()
    assert text.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n{NO_GPU}")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "former figures" not in text
    put_into_page(page, page_of(found))
    assert page.read_text() == text
    page.write_text("# A page of something else\n")
    with pytest.raises(ValueError, match=r"gpu\.md: it has no lines"):
        put_into_page(page, "figures")
    put_into_page(tmp_path / "new.md", "figures\n")
    assert (tmp_path / "new.md").read_text().endswith(f"{BEGIN}\nfigures\n{END}\n")


def test_the_page_of_the_docs_has_the_place_and_claims_no_gpu() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    figures = text.partition(BEGIN)[2].partition(END)[0]
    assert figures.strip()
    assert (NO_GPU in figures) == ("CUDA" not in figures)
