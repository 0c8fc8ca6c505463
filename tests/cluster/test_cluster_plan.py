"""Plans and simulations compared with values computed by hand, and the commands on a real preset."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorclip.cluster.__main__ import main
from priorclip.cluster.plan.gpu_rates import bench_rate
from priorclip.cluster.plan.memory import Setting, estimate_memory, largest_micro_batch
from priorclip.cluster.plan.model_table import ModelTable, Point
from priorclip.cluster.plan.network import Network
from priorclip.cluster.plan.scaling import efficiency, strong_scaling, weak_scaling
from priorclip.cluster.plan.step_time import Work, collectives, expected_maximum, step_time

MILLION = 1_000_000
# 100 M trained parameters in ten large and ten small tensors, 20 M frozen; 10 MB of activations a pair at the start of
# the backward pass.
CURVE = [Point(0.0, 0.0, 10e6), Point(0.5, 0.0, 5e6), Point(1.0, 0.0, 0.0)]
RECOMPUTED = [replace(point, sample=point.sample / 5) for point in CURVE]
TABLE = ModelTable(
    "made", [10 * MILLION] * 10 + [1000] * 10, [20 * MILLION], 512, 10**9, 10**8,
    {False: CURVE, True: RECOMPUTED}, {"A100": (312, 19.5)},
)  # fmt: skip
P, F = sum(TABLE.tensors), TABLE.frozen


@pytest.mark.parametrize(
    ("zero", "precision", "parameters", "gradients", "optimizer"),
    [
        (0, "fp32", 4 * (P + F), 4 * P, 8 * P),
        (0, "bf16", 2 * (P + F), 2 * P, 12 * P),
        # The second rank has elements 25 to 50 M of 100: the tensors 20-30, 30-40, 40-50 and 50-60 M, counted whole.
        (1, "bf16", 2 * (P + F), 2 * 40e6, 12 * P / 4),
        (2, "fp32", 4 * (P + F), 4 * 40e6, 12 * P / 4),
        (2, "bf16", 2 * (P + F), 2 * 40e6, 12 * P / 4),
        (3, "fp32", (P + F) + 4 * 10_000, 4 * P / 4, 12 * P / 4),
        (3, "bf16", (P + F) / 2 + 2 * 10_000, 2 * P / 4, 12 * P / 4),
    ],
)
def test_states_by_stage(zero: int, precision: str, parameters: float, gradients: float, optimizer: float) -> None:
    memory = estimate_memory(TABLE, Setting(zero, 4, precision, 8, 8))
    assert (memory.parameters, memory.gradients, memory.optimizer) == pytest.approx((parameters, gradients, optimizer))


@given(zero=st.integers(0, 3), ranks=st.integers(1, 64), micro=st.integers(1, 64), again=st.booleans())
def test_peak_grows_with_the_micro_batch_and_is_no_less_than_its_parts(
    zero: int, ranks: int, micro: int, again: bool
) -> None:
    # Micro batches accumulate, so that ZeRO-1 keeps whole gradients.
    setting = Setting(zero, ranks, "bf16", micro, 128, checkpointing=again)
    memory, more = estimate_memory(TABLE, setting), estimate_memory(TABLE, replace(setting, micro_batch=micro + 1))
    assert memory.peak >= memory.parameters + memory.optimizer + max(memory.gradients, memory.activations)
    assert more.peak >= memory.peak
    offloaded = estimate_memory(TABLE, replace(setting, offload="optimizer"))
    assert offloaded.peak <= memory.peak
    assert offloaded.host > 0


def test_largest_micro_batch_is_the_last_that_fits() -> None:
    setting = Setting(2, 8, "bf16", 1, 512)
    limit = estimate_memory(TABLE, replace(setting, micro_batch=64)).peak
    assert largest_micro_batch(TABLE, setting, limit) == 64
    assert largest_micro_batch(TABLE, setting, limit - 1) == 32
    assert largest_micro_batch(TABLE, setting, 3e8) == 0


def test_collectives_by_hand() -> None:
    network = Network(gpus_per_node=4, intra_gbytes=100, inter_gbytes=10, intra_microseconds=0, inter_microseconds=0)
    assert network.all_reduce(1e9, 4) == pytest.approx(2 * 3 / 4 * 1e9 / 100e9)
    assert network.all_reduce(1e9, 8) == pytest.approx(
        2 * 7 / 8 * 1e9 / 10e9
    )  # the network cards of a node limit the ring
    assert network.gather_or_scatter(1e9, 1) == 0
    slow = replace(network, intra_microseconds=10, inter_microseconds=100)
    # Two nodes of four: seven hops, two of them between the nodes; or three levels of a tree.
    assert slow.gather_or_scatter(8, 8) == pytest.approx(min(5 * 10e-6 + 2 * 100e-6, 3 * 100e-6), rel=1e-4)


def test_bytes_of_the_stages() -> None:
    """An all-reduce costs two all-gathers over P parameters. ZeRO 1 and 2 add one more; ZeRO-3 needs two in total."""
    network = Network(intra_microseconds=0, inter_microseconds=0)
    work = Work(1e-3, trained=P, zero=0)
    unit = network.gather_or_scatter(2 * P, 64)
    for stage, count in ((0, 2), (1, 3), (2, 3), (3, 2)):
        assert sum(collectives(replace(work, zero=stage), network, 64)) == pytest.approx(count * unit)
    third = replace(work, zero=3)
    assert sum(collectives(replace(third, frozen=P), network, 64)) == pytest.approx(3 * unit)
    assert sum(collectives(replace(third, reuse=0), network, 64)) == pytest.approx(3 * unit), "gathered twice"
    slow = Network(intra_microseconds=0, inter_microseconds=100)
    small = [step_time(replace(third, persistent=count), slow, 64, 1).parameters for count in (0, 50)]
    assert small[1] - small[0] == pytest.approx(50 * 6 * 100e-6), "each takes log2 64 hops and overlaps with nothing"
    for stage, count in ((1, 3), (2, 4 * 2 + 1), (3, 4 * 3)):
        cached = replace(work, zero=stage, micro_batches=4, cached=True)
        assert sum(collectives(cached, network, 64)) == pytest.approx(count * unit)


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
def test_expected_maximum_against_draws(ranks: int) -> None:
    source = random.Random(1)
    drawn = [max(source.gauss() for _ in range(ranks)) for _ in range(2000)]
    assert expected_maximum(ranks) == pytest.approx(statistics.mean(drawn), abs=0.08)


def test_scaling_curves() -> None:
    free = Network(intra_gbytes=1e9, inter_gbytes=1e9, intra_microseconds=0, inter_microseconds=0)
    work = Work(1e-3, trained=P, stragglers=0)
    ranks = [1, 8, 64, 512]
    assert efficiency(weak_scaling(work, free, ranks, 64)) == pytest.approx([1] * 4, rel=1e-4)
    slow = replace(free, inter_gbytes=1.0)
    weak = efficiency(weak_scaling(work, slow, ranks, 64))
    assert weak[1] > 0.99
    assert weak[2] < 0.5, "0.2 GB twice at 1 GB/s takes longer than 64 ms of compute"
    strong = strong_scaling(work, slow, ranks, 64)
    assert [step.ranks for step in strong] == [1, 8, 64], "every rank has a sample"
    assert efficiency(strong)[2] < weak[2]
    assert step_time(replace(work, loader_rate=500), free, 8, 64).seconds == pytest.approx(64 / 500)
    assert step_time(replace(work, cores=2), free, 4, 64).compute == pytest.approx(2 * 64e-3)
    products = 4 * 2 * 64 * 512 * 512  # 64 rows of a rank and the features of 8 ranks, 512 numbers each
    assert step_time(replace(work, loss_flops=1e9), free, 8, 64).loss == pytest.approx(products / 1e9)


def test_gradients_overlap_only_with_the_backward_pass() -> None:
    network = Network(gpus_per_node=1, inter_gbytes=1.0, inter_microseconds=0)
    work = Work(1e-3, trained=P, stragglers=0, overlap=1.0, zero=0)
    without_overlap = network.all_reduce(2 * P, 8, math.ceil(P / work.bucket))
    assert step_time(work, network, 8, 60).gradients == pytest.approx(without_overlap - 2 / 3 * 60e-3)
    assert step_time(work, network, 8, 6000).gradients == 0


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the model package, from its own process."""
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("plan") / "tiny.json"
    command = [sys.executable, "-m", "model", "summary", "--preset", "priorclip-tiny", "--format", "json",
               "--memory", "true", "--precision", "bf16"]  # fmt: skip
    path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return path


def planned(capsys: pytest.CaptureFixture[str], table: Path, *options: str) -> dict:
    assert main(["plan", "--preset", "priorclip-tiny", "--table", str(table), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_of_a_preset(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, table_file, "--gpus", "8x80GB", "--throughput", "1000", "--loader_rate", "300")
    assert found["setting"]["zero"] == 2
    assert found["setting"]["micro_batch"] == 512
    assert not found["setting"]["checkpointing"]
    assert found["global_batch"] == 4096
    assert found["steps_an_epoch"] == 5_070_186 // 4096
    assert 0.512 < found["step_seconds"] < 0.7, "512 pairs at 1,000 a second, and collectives"
    assert found["days"] == pytest.approx(20 * found["steps_an_epoch"] * found["step_seconds"] / 86400)
    assert found["data"]["workers_a_rank"] == math.ceil(found["images_per_second"] / 8 / 300)
    assert found["memory"]["peak"] < found["usable_bytes"]
    assert main(["plan", "--preset", "priorclip-tiny", "--table", str(table_file), "--throughput", "1000"]) == 0
    text = capsys.readouterr().out
    assert "run.engine: {zero: 2, precision: bf16, global_batch: 4096, micro_batch: null" in text
    assert f"{found['days']:.2f} days" in text


def gpu_figures(path: Path, *rows: tuple[str, float]) -> str:
    """JSON as `python -m benchmarks.gpu` writes it, with (mode, images/s) of the preset in bf16."""
    models = [{"preset": "priorclip-tiny", "name": "priorclip-tiny", "mode": mode, "precision": "bf16", "batch": 512,
               "images_per_second": rate} for mode, rate in rows]  # fmt: skip
    path.write_text(json.dumps({"benchmark": "gpu", "machine": {"device": "NVIDIA H100"}, "models": models}))
    return str(path)


def test_plan_and_simulation_take_the_figures_of_a_gpu(
    table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gpu_figures(tmp_path / "gpu.json", ("compiled", 2000.0), ("eager", 1000.0))
    given = planned(capsys, table_file, "--gpus", "8x80GB", "--throughput", "1000")
    found = planned(capsys, table_file, "--gpus", "8x80GB", "--bench", file)
    assert found["step"] == given["step"], "the model that is not compiled counts, as in a run by default"
    assert found["compute_from"] == f"measured, {file}: NVIDIA H100, bf16, eager, batch 512"
    words = ["simulate", "--preset", "priorclip-tiny", "--table", str(table_file), "--json"]
    compiled = gpu_figures(tmp_path / "compiled.json", ("compiled", 2000.0))
    assert main([*words, "--bench", compiled]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["seconds_a_sample"] == 1 / 2000


def test_figures_of_a_gpu_that_do_not_fit_are_named(
    table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gpu_figures(tmp_path / "gpu.json", ("eager", 1000.0))
    nothing, broken = gpu_figures(tmp_path / "empty.json"), gpu_figures(tmp_path / "broken.json", ("eager", -1.0))
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "gpu", "models": [{"preset": "priorclip-tiny"}]}')
    words = ["plan", "--preset", "priorclip-tiny"]
    table = ["--table", str(table_file)]
    for options, message in (
        ([*table, "--bench", nothing], "no throughput of priorclip-tiny in bf16, only of: none. Measure it: python -m"),
        ([*table, "--bench", broken], "broken.json: -1.0 images/s cannot be"),
        ([*table, "--bench", str(other)], "no output of 'python -m model bench --format json' or 'python -m benchm"),
    ):
        assert main([*words, *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="of priorclip-tiny in fp16, only of: priorclip-tiny in bf16"):
        bench_rate(file, "priorclip-tiny", "fp16")


def test_plan_saves_memory_if_it_must(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = planned(capsys, table_file, "--gpus", "4x80GB", "--global_batch", "131072")
    tight = planned(capsys, table_file, "--gpus", "4x12GB", "--global_batch", "131072")
    assert not wide["grad_cache"]
    assert tight["grad_cache"]
    assert (131072 // 4) % tight["setting"]["micro_batch"] == 0
    assert tight["memory"]["peak"] <= tight["usable_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8 big ones"], "--gpus 8 big ones: write number and size, such as 8x80GB"),
        (["--gpus", "8x80GB", "--global_batch", "100"], "--global_batch 100 is not divisible by the 8 GPUs"),
        (["--gpus", "8x2GB"], "--reserve_gb 2.0 leaves nothing of 2 GB"),
        (["--gpu", "Abacus"], "--gpu Abacus is not known"),
        (["--gpus", "1x2.1GB", "--zero", "0", "--micro_batch", "512"], "does not fit"),
        (["--bench", "setup.py"], "--bench setup.py: no output of 'python -m model bench"),
        (["--precision", "fp32"], "tiny.json is of priorclip-tiny in bf16, not of priorclip-tiny in fp32"),
        (["--table", "setup.py"], "setup.py is no output of 'python -m model summary"),
    ],
)
def test_invalid_plans(options: list[str], message: str, table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "priorclip-tiny", "--table", str(table_file), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--epochs", "0"], "epochs must be over 0, but is 0"),
        (["plan", "--disk_gbytes", "0"], "disk_gbytes must be over 0"),
        (["plan", "--mfu", "3"], "mfu must be between 0 and 1, but is 3.0"),
        (["plan", "--reserve_gb", "-3"], "reserve_gb must not be negative"),
        (["simulate", "--gpus", "12"], "gpus must be a power of two, but is 12"),
        (["simulate", "--network.inter_gbytes", "0"], "network.inter_gbytes must be over 0"),
    ],
)
def test_invalid_numbers(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_simulate_writes_curves_and_a_plot(
    table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    picture = tmp_path / "scaling.png"
    words = ["simulate", "--preset", "priorclip-tiny", "--table", str(table_file), "--images_per_second", "2000"]
    assert main([*words, "--json", "--output", str(picture), "--network.inter_gbytes", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["ranks"] for step in found["weak"]] == [1 << power for power in range(10)]
    assert all(step["ranks"] * step["batch"] == 32768 for step in found["strong"])
    assert found["weak"][0]["images_per_second"] == pytest.approx(2000, rel=2e-3), "without the time of the loss"
    with Image.open(picture) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "the plot has curves"
