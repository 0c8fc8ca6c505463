"""The metrics of a run: gradient norms by part, stragglers, bad samples, the Prometheus endpoint, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_launches import ToyRun
from toy_run import LATE_SECONDS, TOY_FLOPS, ToyStream, toy_model

from priorclip.common.ports import free_port
from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring.measure import RankMetrics, skipped_metrics
from priorclip.training.monitoring.prometheus import open_endpoint
from priorclip.training.monitoring.tensorboard_layout import LAYOUT, flat

BATCH = 16
PARTS = ("0", "4")  # the layers of the toy model that have parameters


def first_norms() -> dict[str, float]:
    """Gradient norm of each layer in the first step, in one float64 process on the whole batch."""
    model = toy_model(dropout=0.0, batch_norm=False).double()
    batch = next(iter(ToyStream(BATCH, rank=0, world_size=1)))
    torch.nn.functional.mse_loss(model(batch["inputs"].double()), batch["targets"].double()).backward()
    return {part: torch.cat([p.grad.flatten() for p in model[int(part)].parameters()]).norm().item() for part in PARTS}


@pytest.mark.parametrize(
    ("run", "tolerance"),
    [("zero0", 1e-5), ("zero1", 1e-5), ("zero2", 1e-5), ("zero3", 1e-5), ("micro", 1e-5), ("unclipped", 1e-5),
     ("bf16", 2e-2), ("bf16-0", 2e-2), ("bf16-1", 2e-2)],
)  # fmt: skip
def test_norm_of_each_part_is_that_of_one_process(toys: dict[str, ToyRun], run: str, tolerance: float) -> None:
    for part, norm in first_norms().items():
        assert toys[run].records(f"grad_norm/{part}")[1] == pytest.approx(norm, rel=tolerance)
    parts = [toys[run].records(f"grad_norm/{part}") for part in PARTS]
    for step, whole in toys[run].records("train/grad_norm").items():
        assert math.hypot(*(part[step] for part in parts)) == pytest.approx(whole, rel=max(1e-4, tolerance)), step


@pytest.mark.parametrize("run", ["late-data", "late-forward", "late-zero3"])
def test_slow_rank_is_named(toys: dict[str, ToyRun], run: str) -> None:
    records = toys[run].records("straggler/rank")
    assert len(records) == 5
    assert statistics.median(records.values()) == 1
    lags = toys[run].records("straggler/lag_seconds")
    assert statistics.median(lags.values()) > LATE_SECONDS / 2
    waits = statistics.median(toys[run].records("straggler/wait_seconds").values())
    assert (waits > LATE_SECONDS / 2) == (run == "late-data")
    shares = toys[run].records("straggler/lag_share")
    seconds = toys[run].records("speed/step_seconds_median")
    assert shares[3] == pytest.approx(lags[3] / seconds[3], rel=1e-6)
    assert "rank 1 on " in toys[run].output
    assert "delays the other ranks by 0.3" in toys[run].output


def test_bad_samples_of_all_ranks_are_added_up(toys: dict[str, ToyRun]) -> None:
    run = toys["scraped"]
    assert run.records("data/skipped/image") == {step: 2 * step for step in (1, 4, 8, 12)}
    assert set(run.records("data/skipped/caption").values()) == {2}
    assert run.records("data/skipped") == {step: 2 * step + 2 for step in (1, 4, 8, 12)}
    seen = [
        RankMetrics("a", {}, {}, 0, 0, {}, {"image": 2}),
        RankMetrics("b", {}, {}, 0, 0, {}, {"caption": 1, "image": 3}),
    ]
    assert skipped_metrics(seen) == {"data/skipped": 6, "data/skipped/caption": 1, "data/skipped/image": 5}


def test_speed_is_counted_over_all_steps_since_the_last_record(toys: dict[str, ToyRun]) -> None:
    run = toys["scraped"]
    seconds = run.records("speed/step_seconds")
    assert {step: len(each) for step, each in seconds.items()} == {1: 1, 4: 3, 8: 4, 12: 4}
    for step, each in seconds.items():
        speed = run.records("train/images_per_second")[step]
        assert speed == pytest.approx(BATCH * len(each) / sum(each), rel=1e-3)
        assert run.records("speed/images_per_second_a_rank")[step] == pytest.approx(speed / 2)
        assert run.records("speed/mfu")[step] == pytest.approx(speed / 2 * TOY_FLOPS / 1e12 / 1e-4)
        for name, of in (("fastest", min), ("median", statistics.median), ("slowest", max)):
            assert run.records(f"speed/step_seconds_{name}")[step] == pytest.approx(of(each), abs=2e-6)
    assert not toys["zero2"].records("speed/mfu"), "the peak TFLOP/s of a CPU are not known"


def test_memory_is_that_of_the_worst_rank(toys: dict[str, ToyRun]) -> None:
    run = toys["scraped"]
    assert all(0.1 < value < 8 for value in run.records("memory/host_rss_gb").values())
    assert all(value > 0 for value in run.records("memory/host_available_gb").values())
    assert not run.records("memory/accelerator_peak_gb"), "a CPU has no accelerator memory"


def test_prometheus_scrapes_a_run(toys: dict[str, ToyRun]) -> None:
    """The run is scraped in step 10; its last record is that of step 8."""
    run = toys["scraped"]
    families = {each.name: each for each in text_string_to_metric_families((run.folder / "scrape.txt").read_text())}
    for figure in ("train/loss", "grad_norm/4", "train/lr", "speed/images_per_second_a_rank", "speed/mfu"):
        sample = families[f"priorclip_{figure.replace('/', '_')}"].samples[0]
        assert sample.labels == {"run": "scraped"}
        assert sample.value == pytest.approx(run.records(figure)[8]), figure
    skipped = {each.labels["reason"]: each.value for each in families["priorclip_data_skipped"].samples}
    assert skipped == {"image": 16, "caption": 2}
    own = families["priorclip_rank_own_seconds"].samples
    assert [each.labels["rank"] for each in own] == ["0", "1"]
    assert all(each.value > 0 and each.labels["host"] for each in own)
    assert all(each.value > 1e8 for each in families["priorclip_rank_host_rss_bytes"].samples)
    assert families["priorclip_eval_mse"].samples[0].value == pytest.approx(run.records("eval/mse")[6])


def test_endpoint_listens_on_the_address_given_and_closes(caplog: pytest.LogCaptureFixture) -> None:
    monitor = MonitorConfig(prometheus_port=free_port())
    endpoint = open_endpoint(monitor, "mine", serves=True)
    assert endpoint is not None
    endpoint.update(3, {"train/loss": 2.5, "train/grad_norm": math.nan, "straggler/host": "a"}, ())
    with urllib.request.urlopen(f"http://127.0.0.1:{monitor.prometheus_port}/metrics") as answer:
        text = answer.read().decode()
    assert 'priorclip_train_loss{run="mine"} 2.5' in text
    assert 'priorclip_train_grad_norm{run="mine"} NaN' in text
    assert "priorclip_rank" not in text
    with pytest.raises(urllib.error.URLError):  # an address of this host too, but not the configured one
        urllib.request.urlopen(f"http://127.0.0.2:{monitor.prometheus_port}/metrics")
    with caplog.at_level(logging.WARNING):
        assert open_endpoint(monitor, "other", serves=True) is None
    assert f"cannot listen on 127.0.0.1 port {monitor.prometheus_port}" in caplog.text
    assert open_endpoint(monitor, "other", serves=False) is None
    endpoint.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{monitor.prometheus_port}/metrics")


def test_endpoint_without_its_library_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for serves in (True, False):
        with pytest.raises(ValueError, match=r"pip install 'priorclip-pretraining\[prometheus\]'"):
            open_endpoint(MonitorConfig(prometheus_port=1), "mine", serves)
    assert open_endpoint(MonitorConfig(), "mine", True) is None


def test_tensorboard_has_the_figures_of_metrics_jsonl(toys: dict[str, ToyRun]) -> None:
    run = toys["scraped"]
    board = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    numbers = {
        (name, record["step"]): value
        for record in records
        for name, value in record.items()
        if name not in ("step", "time") and isinstance(value, int | float)
    }
    in_tensorboard = {(tag, each.step): each.value for tag in board.Tags()["scalars"] for each in board.Scalars(tag)}
    assert in_tensorboard == pytest.approx(numbers, rel=1e-6)
    assert {record["straggler/host"] for record in records if "straggler/host" in record} != {""}
    histogram = board.Histograms("speed/step_seconds")[-1].histogram_value
    assert histogram.num == 4
    assert histogram.sum == pytest.approx(np.sum(run.records("speed/step_seconds")[12]))


def test_configuration_is_flattened_for_hparams() -> None:
    config = {"run": {"epochs": 2, "progress": False, "micro": None, "optimizer": {"betas": [0.9, 0.98]}}, "name": "b"}
    assert flat(config) == {
        "run.epochs": 2, "run.progress": "false", "run.optimizer.betas": "[0.9, 0.98]", "name": "b",
    }  # fmt: skip


def test_charts_of_the_first_page_find_the_figures_of_a_run(toys: dict[str, ToyRun]) -> None:
    """Every metric is in some chart, except two."""
    board = EventAccumulator(str(toys["scraped"].folder / "tensorboard")).Reload()
    patterns = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    left = {tag for tag in board.Tags()["scalars"] if not any(re.match(each, tag) for each in patterns)}
    assert left == {"train/epoch", "speed/model_tflops_a_rank"}
