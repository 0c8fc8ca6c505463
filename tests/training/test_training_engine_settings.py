"""DeepSpeed's settings from the run's configuration, the learning rate schedule, and the ranks' variables."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from hypothesis import given
from hypothesis import strategies as st

from priorclip.training.config import EngineConfig, OptimizerConfig
from priorclip.training.engine.build import ZERO_FOLDER, batch_split, deepspeed_settings, schedule_shape
from priorclip.training.engine.offload import prepare_nvme
from priorclip.training.ranks.distributed import local_world_size, rank_environment
from priorclip.training.ranks.preemption import StopSignal

ROOT = Path(__file__).resolve().parents[2]


def settings_of(tmp_path: Path, content: str) -> EngineConfig:
    path = tmp_path / "ds.json"
    path.write_text(content)
    return EngineConfig(zero=str(path), global_batch=32, micro_batch=4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_auto_values_follow_from_the_run(stage: int, precision: str) -> None:
    engine = EngineConfig(zero=str(stage), precision=precision, global_batch=96, micro_batch=8)
    settings = deepspeed_settings(engine, OptimizerConfig(clip_grad_norm=0.7), world_size=3)
    assert settings["train_batch_size"] == 96
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.7
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert settings["zero_optimization"]["stage"] == stage
    assert '"auto"' not in json.dumps(settings)


@pytest.mark.parametrize("zero", ["1", "2"])
def test_bf16_does_not_check_each_parameter_for_overflow(zero: str) -> None:
    """The name is one that DeepSpeed knows: its own class reads it, and checks by default."""
    settings = deepspeed_settings(EngineConfig(zero=zero, precision="bf16"), OptimizerConfig(), world_size=1)
    assert DeepSpeedBF16Config(**settings["bf16"]).check_grad_overflow is False
    assert DeepSpeedBF16Config(enabled=True).check_grad_overflow is True


def test_values_in_the_file_stay(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 32,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 12345},
        "dump_state": True,
    }
    settings = deepspeed_settings(settings_of(tmp_path, json.dumps(content)), OptimizerConfig(), world_size=2)
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 12345}
    assert settings["dump_state"] is True
    assert settings["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 64}', "ds.json: train_batch_size is 64 there but 32 in the run's configuration"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled is True there but False"),
        ('{"gradient_clipping": 5.0}', "gradient_clipping is 5.0 there but 1.0"),
        ('{"optimizer": {"type": "Lamb"}}', "remove 'optimizer': run.optimizer in the run's configuration sets it"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}', "remove 'optimizer.params.lr': run.optimizer"),
        ('{"scheduler": {"type": "WarmupLR"}}', "remove 'scheduler'"),
        ('{"zero_optimization": {"sub_group_size": "auto"}}', 'the "auto" of zero_optimization.sub_group_size'),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "ds.json: offload_param needs ZeRO stage 3, and the stage there is 2",
        ),
        (
            '{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}}',
            "offload to nvme needs ZeRO stage 3",
        ),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "needs ZeRO stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}', "device is 'disk': write cpu"),
        ('{"zero_optimization": }', "ds.json: not valid JSON: Expecting value"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        deepspeed_settings(settings_of(tmp_path, content), OptimizerConfig(), world_size=2)
    assert message in str(raised.value)


@pytest.mark.parametrize("zero", ["4", "zero2-nvme", "missing/ds.json"])
def test_unknown_stage_or_file(zero: str) -> None:
    with pytest.raises(ValueError, match=f"run.engine.zero: '{zero}' is neither a ZeRO stage .* zero2-offload"):
        deepspeed_settings(EngineConfig(zero=zero), OptimizerConfig(), world_size=1)


def test_shipped_files_by_name() -> None:
    """Name -> (stage, device of the optimizer states, device of the parameters, zero_force_ds_cpu_optimizer)."""
    found = {}
    for path in ZERO_FOLDER.glob("*.json"):
        engine = EngineConfig(zero=path.stem, nvme_path="/local")
        settings = deepspeed_settings(engine, OptimizerConfig(), world_size=2)
        zero = settings["zero_optimization"]
        devices = [zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")]
        found[path.stem] = (zero["stage"], *devices, settings.get("zero_force_ds_cpu_optimizer"))
    assert found == {
        **{f"zero{stage}": (stage, None, None, None) for stage in range(4)},
        "zero2-offload": (2, "cpu", None, False),
        "zero3-offload": (3, "cpu", "cpu", False),
        "zero3-nvme": (3, "nvme", "nvme", False),
    }


def test_nvme_needs_a_folder() -> None:
    with pytest.raises(ValueError, match=r"zero3-nvme.json: offload_optimizer goes to nvme.* set run.engine.nvme_path"):
        deepspeed_settings(EngineConfig(zero="zero3-nvme"), OptimizerConfig(), world_size=2)
    settings = deepspeed_settings(EngineConfig(zero="zero3-nvme", nvme_path="/local"), OptimizerConfig(), world_size=2)
    for section in ("offload_optimizer", "offload_param"):
        settings["zero_optimization"][section]["nvme_path"] = "/proc/none"
    with pytest.raises(ValueError, match=r"run.engine.nvme_path: /proc/none cannot be written"):
        prepare_nvme(settings, "runs/x")


def test_nvme_without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    engine = EngineConfig(zero="zero3-nvme", nvme_path=str(tmp_path))
    settings = deepspeed_settings(engine, OptimizerConfig(), world_size=2)
    with pytest.raises(ValueError, match=r"offload to nvme needs libaio and a C\+\+ compiler.*libaio-dev and g\+\+"):
        prepare_nvme(settings, "runs/x")
    assert [path.name[:2] for path in tmp_path.iterdir()] == ["x-"], "the run has its own folder"


TRANSFORMERS_JSON = """{
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
  "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "overlap_comm": "auto",
    "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}
}"""


def test_file_in_which_every_value_is_auto(tmp_path: Path) -> None:
    settings = deepspeed_settings(settings_of(tmp_path, TRANSFORMERS_JSON), OptimizerConfig(), world_size=2)
    assert not {"optimizer", "scheduler"} & settings.keys()
    assert settings["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert '"auto"' not in json.dumps(settings)
    with pytest.raises(ValueError, match=r"remove 'scheduler': .* here linear"):
        deepspeed_settings(settings_of(tmp_path, TRANSFORMERS_JSON), OptimizerConfig(schedule="linear"), world_size=2)


@given(world=st.integers(1, 64), micro=st.integers(1, 16), pieces=st.integers(1, 16))
def test_batch_split_is_exact(world: int, micro: int, pieces: int) -> None:
    engine = EngineConfig(global_batch=world * micro * pieces, micro_batch=micro)
    assert batch_split(engine, world) == (micro, pieces)
    assert batch_split(replace(engine, micro_batch=None), world) == (micro * pieces, 1)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"run.engine.global_batch 100 is not divisible by the world size 3"):
        batch_split(EngineConfig(global_batch=100), 3)
    with pytest.raises(ValueError, match=r"run.engine.micro_batch 7 does not divide the 32 samples .* 64 over 2 ranks"):
        batch_split(EngineConfig(global_batch=64, micro_batch=7), 2)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.1 + 0.9 * 0.5), ("constant", 1.0)]
)
def test_schedule_by_hand(schedule: str, middle: float) -> None:
    shape = schedule_shape(OptimizerConfig(schedule=schedule, warmup=0.1, min_lr_share=0.1), total_steps=100)
    assert [shape(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert shape(10) == pytest.approx(1.0)
    assert shape(55) == pytest.approx(middle)
    assert shape(100) == pytest.approx(1.0 if schedule == "constant" else 0.1)


@given(total=st.integers(2, 5000), warmup=st.floats(0, 0.9), least=st.floats(0, 1), step=st.integers(0, 5000))
def test_cosine_closed_form(total: int, warmup: float, least: float, step: int) -> None:
    shape = schedule_shape(OptimizerConfig(warmup=warmup, min_lr_share=least), total)
    first = math.ceil(warmup * total)
    if step < first:
        assert shape(step) == pytest.approx((step + 1) / first)
    else:
        turned = min(1.0, (step - first) / max(1, total - first))
        assert shape(step) == pytest.approx(least + (1 - least) * math.cos(turned * math.pi / 2) ** 2)


def test_warmup_in_steps() -> None:
    shape = schedule_shape(OptimizerConfig(warmup=10_000), total_steps=20_000)
    assert (shape(0), shape(4999), shape(9999)) == pytest.approx((1e-4, 0.5, 1.0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_is_received(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop_signal = StopSignal()
        assert not stop_signal.received
        os.kill(os.getpid(), number)
        assert stop_signal.received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "node[0-1]", "MASTER_ADDR": "node0", "SLURM_NTASKS": "8"}  # fmt: skip


def test_task_of_srun_is_a_rank() -> None:
    wanted = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "20017"}
    assert rank_environment(STEP) == wanted


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({"LOCAL_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        ({}, None),
    ],
)
def test_ranks_on_this_host_are_counted(environment: dict[str, str], ranks: int | None) -> None:
    """CPU threads are divided by this number. Ranks on other hosts do not count."""
    assert local_world_size(environment) == ranks


def test_batch_script_is_no_rank() -> None:
    script = {name: value for name, value in STEP.items() if not name.startswith(("SLURM_STEP", "MASTER"))}
    assert rank_environment(script)["WORLD_SIZE"] == "1"


def test_mpirun_inside_a_job_counts_its_own_ranks() -> None:
    ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    found = rank_environment({**STEP, **ranks})
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("1", "0", "2")
    without = {name: value for name, value in STEP.items() if name != "MASTER_ADDR"}
    assert rank_environment({**without, **ranks}) == {}  # DeepSpeed asks mpi4py


def test_incomplete_environment_is_refused() -> None:
    with pytest.raises(RuntimeError, match="has RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        rank_environment({"RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("precision", [None, "high"])
def test_the_precision_of_products_is_torchs(precision: str | None) -> None:
    """A process that starts with another setting gets the run's, which is torch's own by default."""
    chosen = "" if precision is None else f"matmul_precision={precision!r}"
    program = f"""
import torch
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.distributed import start
default = torch.get_float32_matmul_precision()
torch.set_float32_matmul_precision("medium")
start(EngineConfig({chosen}))
print(default, torch.get_float32_matmul_precision())
"""
    environment = {**os.environ, "MASTER_PORT": "0", "MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["highest", precision or "highest"]
