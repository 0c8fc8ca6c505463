"""A whole training run of a small regression model, which tests launch on real ranks.

The stream is a formula of the sample number, so that a test can compute the run's weights without DeepSpeed.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.request import urlopen

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from priorclip.common.options import parse
from priorclip.training.config import RunConfig
from priorclip.training.engine.build import build_engine, full_state_dict
from priorclip.training.loop import train
from priorclip.training.monitoring.measure import ModelFacts
from priorclip.training.monitoring.report import set_up_logging, write_report
from priorclip.training.progress import total_steps
from priorclip.training.ranks.distributed import leave_at_exit, seed_everything, start
from priorclip.training.run import Run
from priorclip.training.run_folder import prepare_folder
from priorclip.training.task import Task

SAMPLES = 96
LATE_SECONDS = 0.3
TOY_FLOPS = 3 * 2 * (8 * 32 + 32 * 1)


@dataclass
class ToyConfig:
    """Fits a formula.

    Args:
        run: the run
        kill_at: rank 0 sends itself SIGTERM in this step
        kill_in_evaluation: rank 0 sends itself SIGTERM during the evaluation after this step
        raise_at: the last rank raises an error in this step
        nan_at: the loss of this step is NaN
        bad_gradient_at: the loss of this step is finite, but on the first rank its gradient is not
        freeze_at: the last rank sleeps for ever in this step
        nan_batch: this batch of the run, counted from 0, contains a NaN
        spike_batch: the targets of this batch are a hundred times too large
        dropout: dropout of the hidden layer
        hidden: width of the hidden layer
        batch_norm: normalise the hidden layer over the rank's batch
        hub_token: a secret, because of its name
        note: text that rank 0 logs
        frozen: the first layer is not trained
        draws: add noise to the inputs from Python's and NumPy's global generators, which are not seeded by the step
        late: part of each step in which the last rank waits 0.3 seconds
        scrape_at: rank 0 reads its own Prometheus endpoint in this step and writes the answer to scrape.txt
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="unset"))
    kill_at: int = -1
    kill_in_evaluation: int = -1
    raise_at: int = -1
    nan_at: int = -1
    bad_gradient_at: int = -1
    freeze_at: int = -1
    nan_batch: int = -1
    spike_batch: int = -1
    dropout: float = 0.0
    hidden: int = 32
    batch_norm: bool = False
    hub_token: str | None = None
    note: str | None = None
    frozen: bool = False
    draws: bool = False
    late: Literal["data", "forward"] | None = None
    scrape_at: int = -1


class ToyStream:
    """``SAMPLES`` rows in each epoch, in order; rank r of W gets rows r, r + W, ... of each global batch."""

    def __init__(
        self,
        global_batch: int,
        rank: int,
        world_size: int,
        late: float = 0.0,
        nan_batch: int = -1,
        spike_batch: int = -1,
    ) -> None:
        self.global_batch, self.rank, self.world_size, self.late = global_batch, rank, world_size, late
        self.nan_batch, self.spike_batch = nan_batch, spike_batch
        self.epoch = self.seen = 0

    @property
    def skipped(self) -> Counter[str]:
        """Bad samples of this rank by reason: one "image" for each batch; ranks except 0 also have two "caption"."""
        batches = (self.epoch * len(self)) + self.seen // self.global_batch
        return Counter({"image": batches, "caption": 2}) if self.rank else Counter({"image": batches})

    def __len__(self) -> int:
        return SAMPLES // self.global_batch

    def __iter__(self):
        while True:
            index = torch.arange(self.seen + self.rank, self.seen + self.global_batch, self.world_size)
            inputs = torch.sin(index[:, None] * torch.arange(1, 9) * 0.37 + self.epoch)
            time.sleep(self.late)
            targets = inputs.sum(1, keepdim=True).tanh()
            epoch, number = self.epoch, self.epoch * len(self) + self.seen // self.global_batch
            if number == self.nan_batch and self.rank == 0:
                inputs[1, 2] = float("nan")
            if number == self.spike_batch:
                targets = 100 * targets
            self.seen += self.global_batch
            if self.seen + self.global_batch > SAMPLES:
                self.epoch, self.seen = self.epoch + 1, 0
            yield {"inputs": inputs, "targets": targets, "epoch": epoch}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "samples_seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.seen = state["epoch"], state["samples_seen"]


class Late(nn.Module):
    """An identity function that sleeps."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return inputs


def toy_model(dropout: float, batch_norm: bool, late: float = 0.0, hidden: int = 32) -> nn.Sequential:
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(hidden) if batch_norm else Late(late)
    return nn.Sequential(nn.Linear(8, hidden), norm, nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(ToyConfig, argv, prog="toy")
    if config.run.engine.precision == "fp16":
        # DeepSpeed requires instructions for fast fp16, but torch computes fp16 on any CPU.
        get_accelerator().is_fp16_supported = lambda: True
    rank = start(config.run.engine)
    set_up_logging(rank)
    if config.note:
        logging.info("note: %s", config.note)
    seed_everything(config.run.seed, config.run.deterministic)
    late = {config.late: LATE_SECONDS} if rank.rank == rank.world_size - 1 else {}
    batch, seconds = config.run.engine.global_batch, late.get("data", 0.0)
    stream = ToyStream(batch, rank.rank, rank.world_size, seconds, config.nan_batch, config.spike_batch)
    folder = prepare_folder(config, config.run, rank)
    model = toy_model(config.dropout, config.batch_norm, late.get("forward", 0.0), config.hidden)
    decay = config.run.optimizer.weight_decay
    model[0].requires_grad_(not config.frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine = build_engine(
        model, groups, config.run, total_steps=total_steps(config.run, len(stream)), world_size=rank.world_size
    )

    def step(engine, batch):
        if engine.global_steps == config.kill_at and rank.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        if engine.global_steps == config.raise_at and rank.rank == rank.world_size - 1:
            raise RuntimeError("asked to fail")
        if engine.global_steps == config.scrape_at and rank.is_first:
            with urlopen(f"http://127.0.0.1:{config.run.monitor.prometheus_port}/metrics") as answer:
                (folder / "scrape.txt").write_bytes(answer.read())
        if engine.global_steps == config.freeze_at and rank.rank == rank.world_size - 1:
            time.sleep(1e6)
        if config.draws:
            noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1)
            batch = {**batch, "inputs": batch["inputs"] + (rank.rank + 1) * noise}
        inputs = batch["inputs"].to(next(engine.module.parameters()).dtype)
        outputs = engine(inputs).float()
        loss = nn.functional.mse_loss(outputs, batch["targets"])
        if engine.global_steps == config.bad_gradient_at and rank.is_first:
            loss = loss + (0 * outputs).sum().sqrt()  # 0, and its gradient is 0 times infinity
        if engine.global_steps == config.nan_at:
            loss = loss * float("nan")
        return loss, {"mse": loss}

    def evaluate(engine) -> dict[str, float]:
        inputs = torch.cos(torch.arange(64.0)[:, None] * torch.arange(1, 9) * 0.21)
        outputs = []
        for part, half in enumerate(inputs.to(next(engine.module.parameters()).dtype).split(32)):
            if part and engine.global_steps == config.kill_in_evaluation and rank.is_first:
                os.kill(os.getpid(), signal.SIGTERM)
            outputs.append(engine(half).float())
        return {"mse": float(nn.functional.mse_loss(torch.cat(outputs), inputs.sum(1, keepdim=True).tanh()))}

    facts = ModelFacts(flops=lambda: TOY_FLOPS)
    task = Task(model, groups, stream, step, evaluate, export=lambda *_: None, model_facts=facts)
    report = train(Run(config.run, rank, engine, task))
    state = full_state_dict(engine)
    if rank.is_first:
        torch.save(state, folder / "weights.pt")
        write_report(folder, report)
    leave_at_exit()


if __name__ == "__main__":
    main()
    sys.exit(0)
