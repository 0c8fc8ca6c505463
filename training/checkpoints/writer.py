"""Writes checkpoints while the run continues: each rank copies to host memory, a thread writes, rank 0 publishes.

    writer = Writer(engine, folder / "checkpoints", config.checkpoint)
    writer.save({"stream": ...}, evaluation)     # returns when the copy is made; the next step may begin
    writer.finish()                              # waits until it is published, or has failed

DeepSpeed asks a ``CheckpointEngine`` to save each of its files. Ours copies the tensors and gives them to the thread.
DeepSpeed's own decoupled engine delays the next optimizer step until the files are written, needs one more process per
rank, and ends the run if a file cannot be written. Ranks report their files to rank 0 through torch's store. That
needs no collective, so it cannot mix with the collectives of the training. If a save fails, an error is logged and the
run continues, until ``run.checkpoint.failures`` saves in a row have failed.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import itertools
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch.multiprocessing.reductions import StorageWeakRef

from priorclip.common.checkpoint_files import find_checkpoints, rank_file
from priorclip.common.checkpoint_record import read_record
from priorclip.common.files import fsync, naming, sha256_of
from priorclip.common.output import get_logger
from priorclip.training.checkpoints.files import Shape, find_best, publish, remove_unfinished, score
from priorclip.training.checkpoints.store import wait_for_key
from priorclip.training.config import CheckpointConfig
from priorclip.training.engine.averages import Averages
from priorclip.training.engine.buffers import get_buffers
from priorclip.training.engine.nvme import states_in_memory
from priorclip.training.ranks.rng_state import rng_states, rng_states_name

logger = get_logger(__name__)

LEAVE_SECONDS = 30
# DeepSpeed's own ds_to_universal refuses a checkpoint that does not say this. No tensor parallelism, so only a version.
UNIVERSAL = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
SAVES = itertools.count()  # saves of this process, which number their keys in the store; all ranks have the same number


class CheckpointError(RuntimeError):
    """Too many checkpoints in a row could not be written, so the run ends."""


class Snapshot:
    """Copies in host memory, which the next checkpoint uses again. They are page-locked if they come from a GPU."""

    def __init__(self) -> None:
        self.hosts: list[torch.Tensor] = []
        self.used = 0
        # By place in memory. The reference keeps the place, so that no new tensor gets it during this checkpoint.
        self.copies: dict[Any, tuple[StorageWeakRef, torch.Tensor]] = {}

    def begin(self) -> None:
        self.used = 0
        self.copies = {}

    def copy(self, value: Any) -> Any:
        """Returns a copy of ``value``. Tensors that share memory (tied weights) still share it."""
        if isinstance(value, torch.Tensor):
            storage = StorageWeakRef(value.untyped_storage())
            key = (storage.cdata, value.storage_offset(), value.dtype, tuple(value.shape), value.stride())
            if key not in self.copies:
                self.copies[key] = storage, self.host_copy(value.detach())
            return self.copies[key][1]
        if type(value) in (list, tuple):
            return type(value)(self.copy(each) for each in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self.copy(each)) for name, each in value.items())
        return copy.deepcopy(value)

    def host_copy(self, value: torch.Tensor) -> torch.Tensor:
        while self.used < len(self.hosts) and not fits(self.hosts[self.used], value):
            del self.hosts[self.used]
        if self.used == len(self.hosts):
            pinned = value.device.type == "cuda"
            self.hosts.append(torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned))
        host = self.hosts[self.used]
        self.used += 1
        host.copy_(value, non_blocking=True)
        return host


def fits(host: torch.Tensor, value: torch.Tensor) -> bool:
    return host.shape == value.shape and host.dtype == value.dtype


class StagingEngine(TorchCheckpointEngine):
    """Keeps DeepSpeed's files of one checkpoint in memory, by their names, instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()
        self.files: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: the thread makes the folder. Here, an error on one rank would leave the others waiting."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[os.path.basename(path)] = self.snapshot.copy(state_dict)

    def preserves_storage_sharing(self) -> bool:
        return False  # otherwise DeepSpeed makes a copy of its own first


class Writer:
    """Saves one checkpoint at a time. Every rank has a writer and calls the same methods at the same steps."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        folder: Path,
        config: CheckpointConfig,
        averages: Averages | None = None,
    ) -> None:
        self.engine, self.folder, self.config, self.averages = engine, folder, config, averages
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.staging = StagingEngine()
        self.copy_scripts = engine._copy_recovery_script
        self.thread: threading.Thread | None = None
        self.leaving = threading.Event()
        atexit.register(self.leave)
        self.problem = ""  # of the last save; the same on every rank
        self.failures = 0
        self.stalls: list[float] = []  # seconds that each save took from the training
        engine.checkpoint_engine = self.staging
        engine._copy_recovery_script = lambda folder: None
        # Processes of a killed run may still write to their folder for a moment, so each run has its own name.
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token)
        self.token = token[0]

    def save(self, state: dict[str, Any], evaluation: dict[str, float]) -> None:
        """Copies the engine's state and starts to write it as the checkpoint of this step. A collective.

        Args:
            state: what the run adds (data position, epoch): tensors and plain values
            evaluation: metrics of an evaluation at this step, which define the best checkpoint

        Raises:
            CheckpointError: the previous ``run.checkpoint.failures`` saves failed
        """
        begun = time.perf_counter()
        self.finish()
        step = self.engine.global_steps
        partial = self.folder / f"step_{step:08d}.partial-{self.token}"
        self.staging.files = {}
        self.staging.snapshot.begin()
        client = {"run": state, "parameters": parameter_names(self.engine), **UNIVERSAL}
        with states_in_memory(self.engine):
            self.engine.save_checkpoint(str(self.folder), tag=partial.name, client_state=client, save_latest=False)
        buffers = get_buffers(self.engine.module)
        if buffers:
            self.staging.files[rank_file("buffers", self.rank)] = self.staging.snapshot.copy(buffers)
        if self.averages is not None:
            self.staging.files[rank_file("averages", self.rank)] = self.staging.snapshot.copy(self.averages.named())
        self.staging.files[rng_states_name(self.rank)] = rng_states()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shape = Shape.of(self.engine)
        record = {"step": step, "world_size": shape.world_size, "zero_stage": shape.zero_stage}
        number = next(SAVES)
        arguments = (partial, {**record, "evaluation": evaluation}, number)
        self.thread = threading.Thread(target=self.write, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()
        if not self.config.background:
            self.finish()
        self.stalls.append(time.perf_counter() - begun)

    def is_best(self, evaluation: dict[str, float]) -> bool:
        """Whether this evaluation is better than that of every checkpoint. A collective."""
        new = score(evaluation, self.config)
        better = [False]
        if self.rank == 0 and new is not None:
            old = self.best_score()
            better = [old is None or new > old]
        dist.broadcast_object_list(better)
        return better[0]

    def best_score(self) -> float | None:
        """Score of the best checkpoint; None if there is none, or if the folder cannot be listed."""
        best = find_best(known_checkpoints(self.folder), self.config)
        # The thread may remove the checkpoint at this moment. Then it has no score.
        return score(read_record(best).get("evaluation", {}), self.config) if best else None

    def finish(self) -> None:
        """Waits for the current save. A collective: all ranks raise the same error.

        Raises:
            CheckpointError: the last ``run.checkpoint.failures`` saves failed
        """
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        self.failures = self.failures + 1 if self.problem else 0
        if self.failures and self.failures >= self.config.failures:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row could not be written, the last because of {self.problem}: the"
                f" run ends. Make room in {self.folder} and run the same command again"
            )

    def leave(self) -> None:
        """Waits for the thread when the process ends, because Python cannot end a thread inside torch's store."""
        self.leaving.set()
        if self.thread:
            self.thread.join(timeout=LEAVE_SECONDS)

    def write(self, partial: Path, record: dict[str, Any], number: int) -> None:
        """Runs in the thread and sets ``problem``."""
        try:
            self.write_and_publish(partial, record, number)
        except Exception as error:
            self.problem = f"the ranks could not agree: {error}"
            if not self.leaving.is_set():
                logger.exception("%s could not be written", partial)

    def write_and_publish(self, partial: Path, record: dict[str, Any], number: int) -> None:
        """Writes this rank's files; then rank 0 publishes the files of all ranks."""
        store = dist.distributed_c10d._get_default_store().clone()
        keys = [f"checkpoint/{number}/{rank}" for rank in range(self.world_size)]
        done = f"checkpoint/{number}/done"
        try:
            report: dict[str, Any] = {"sha256": self.write_own(partial)}
        except Exception as error:
            report = {"error": f"{first_cause(error)} (rank {self.rank} on {socket.gethostname()})"}
        store.set(keys[self.rank], json.dumps(report))
        if self.rank == 0:
            self.problem = self.publish_all(partial, record, [wait_for_key(store, key, self.leaving) for key in keys])
            for key in keys:
                store.delete_key(key)
            store.set(done, self.problem)
        else:
            self.problem = wait_for_key(store, done, self.leaving)

    def write_own(self, partial: Path) -> dict[str, str]:
        """Writes this rank's files. Returns the SHA-256 of each one by its name."""
        if self.rank == 0:
            remove_unfinished(self.folder, except_for=partial.name)
        partial.mkdir(parents=True, exist_ok=True)
        sums = {name: save_file(state, partial / name) for name, state in self.staging.files.items()}
        if self.rank == 0 and self.engine.zero_optimization():
            self.copy_scripts(str(partial))
            sums |= {path.name: sha256_of(path) for path in partial.glob("zero_to_*.py")}
        return sums

    def publish_all(self, partial: Path, record: dict[str, Any], reports: list[str]) -> str:
        """Publishes the checkpoint if no rank had an error, or removes it. Returns the errors, or an empty string."""
        parsed = [json.loads(report) for report in reports]
        errors = [report["error"] for report in parsed if "error" in report]
        if not errors:
            try:
                sums = {name: value for report in parsed for name, value in report["sha256"].items()}
                publish(partial, {**record, "sha256": dict(sorted(sums.items()))}, self.config)
                return ""
            except Exception as error:
                errors = [first_cause(error)]
        shutil.rmtree(partial, ignore_errors=True)
        good = known_checkpoints(self.folder)
        left = self.config.failures - self.failures - 1
        logger.error(
            "the checkpoint of step %d could not be written: %s. The run continues, and would resume from %s; %s",
            record["step"], "; ".join(errors), good[0].name if good else "its beginning",
            f"{left} more in a row end it" if left > 0 else "it ends at the next one",
        )  # fmt: skip
        return "; ".join(errors)


def known_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints, newest first; none if the folder cannot be listed."""
    try:
        return find_checkpoints(folder)
    except OSError:
        return []


def save_file(state: Any, path: Path) -> str:
    """Writes and fsyncs a file. Returns the SHA-256 of the data that was given to the disk."""
    with naming(path), path.open("wb") as file:
        hashing = HashingFile(file)
        torch.save(state, cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)
    return hashing.sha256.hexdigest()


class HashingFile:
    """A file that is written from start to end, and its SHA-256. Writing from Python lets the other threads run."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        with naming(self.file.name):
            return self.file.write(data)

    def flush(self) -> None:
        with naming(self.file.name):
            self.file.flush()


def first_cause(error: Exception) -> str:
    """Returns the message of the first error of the chain, because torch wraps errors of files."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def parameter_names(engine: deepspeed.DeepSpeedEngine) -> list[list[str]]:
    """Returns the names by optimizer group, because without ZeRO the optimizer state has numbers instead."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = engine.optimizer.param_groups
    return [[names[parameter] for parameter in group["params"] if parameter in names] for group in groups]
