"""Offload of optimizer states (and ZeRO-3 parameters) to the host's memory or to NVMe: what has to be there first.

    --run.engine.zero zero2-offload                              optimizer states and their step on the CPU
    --run.engine.zero zero3-nvme --run.engine.nvme_path /local   optimizer states and parameters on a disk of the node

DeepSpeed finds out late, and in its own words, that a stage cannot offload, that a folder is missing or that libaio is
not installed; here it is said before the model is sharded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SECTIONS = ("offload_optimizer", "offload_param")


def offload_devices(settings: dict[str, Any]) -> dict[str, str]:
    """Where each section of the DeepSpeed settings offloads to, cpu or nvme; without those that do not."""
    zero = settings.get("zero_optimization", {})
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in SECTIONS}
    return {name: device for name, device in devices.items() if device != "none"}


def check_offload(settings: dict[str, Any], where: object) -> None:
    """Refuse what DeepSpeed cannot do.

    Raises:
        ValueError: a stage that cannot offload so; no folder for NVMe; ``where`` is the file that asks for it.
    """
    devices = offload_devices(settings)
    stage = settings["zero_optimization"].get("stage", 0)
    for section, device in devices.items():
        if device not in ("cpu", "nvme"):
            raise ValueError(f"{where}: zero_optimization.{section}.device is '{device}': write cpu, nvme or none")
    if "offload_param" in devices and stage != 3:
        raise ValueError(f"{where}: offload_param needs ZeRO stage 3, and the stage there is {stage}")
    if "nvme" in devices.values() and stage != 3:
        raise ValueError(f"{where}: offload to nvme needs ZeRO stage 3, and the stage there is {stage}")
    if devices and stage == 0:
        raise ValueError(f"{where}: offload_optimizer needs ZeRO stage 1, 2 or 3, and the stage there is 0")
    for section, device in devices.items():
        if device == "nvme" and not settings["zero_optimization"][section].get("nvme_path"):
            raise ValueError(
                f"{where}: {section} goes to nvme, and no folder is given: set run.engine.nvme_path to one on a disk of"
                " the node itself"
            )


def prepare_nvme(settings: dict[str, Any], run_dir: str) -> None:
    """Give the run a folder of its own on the NVMe disk, and see that DeepSpeed's asynchronous I/O can be had.

    Every rank calls it; ``settings`` are changed in place.

    Raises:
        ValueError: the folder cannot be written, or libaio or a compiler is missing.
    """
    nvme = [section for section, device in offload_devices(settings).items() if device == "nvme"]
    if not nvme:
        return
    own = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:12]
    for section in nvme:
        path = Path(settings["zero_optimization"][section]["nvme_path"])
        folder = path / f"{Path(run_dir).name}-{own}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.engine.nvme_path: {path} cannot be written: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"run.engine.nvme_path: {path} cannot be written")
        settings["zero_optimization"][section]["nvme_path"] = str(folder)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offload to nvme needs libaio and a C++ compiler on every node, which DeepSpeed compiles its asynchronous"
            " I/O with: apt-get install libaio-dev g++ (or libaio-devel)"
        )
    from torch.utils.cpp_extension import _get_build_directory  # where DeepSpeed's builder compiles

    lock = Path(_get_build_directory("async_io", False)) / "lock"
    if lock.exists():
        logger.warning(
            "%s: another process compiles DeepSpeed's asynchronous I/O, which is waited for; where none does, one was"
            " killed while it did: remove that file",
            lock,
        )
    free = shutil.disk_usage(settings["zero_optimization"][nvme[0]]["nvme_path"]).free
    logger.info(
        "offload to %s: %.0f GB free; the first time, DeepSpeed's asynchronous I/O is compiled, a minute or more",
        settings["zero_optimization"][nvme[0]]["nvme_path"], free / 1e9,
    )  # fmt: skip
