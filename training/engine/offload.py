"""Offload of optimizer states (and ZeRO-3 parameters) to the host's memory or to NVMe: checks before the run starts.

    --run.engine.zero zero2-offload                              optimizer states and their step on the CPU
    --run.engine.zero zero3-nvme --run.engine.nvme_path /local   optimizer states and parameters on a disk of the node

DeepSpeed reports late that a stage cannot offload, that a folder is missing or that libaio is not installed. We check
it before the model is sharded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from priorclip.common.output import get_logger

logger = get_logger(__name__)

PACKAGES = "libaio-dev and g++ (apt-get install), or libaio-devel"
SECTIONS = ("offload_optimizer", "offload_param")


def offload_devices(settings: dict[str, Any]) -> dict[str, str]:
    """Returns the device, cpu or nvme, of each section of the DeepSpeed settings that offloads."""
    zero = settings.get("zero_optimization", {})
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in SECTIONS}
    return {name: device for name, device in devices.items() if device != "none"}


def check_offload(settings: dict[str, Any], source: object) -> None:
    """Checks that DeepSpeed supports the settings; ``source`` is their file, for the message.

    Raises:
        ValueError: the stage cannot offload to this device, or the folder for NVMe is missing
    """
    devices = offload_devices(settings)
    stage = settings["zero_optimization"].get("stage", 0)
    for section, device in devices.items():
        if device not in ("cpu", "nvme"):
            raise ValueError(f"{source}: zero_optimization.{section}.device is '{device}': write cpu, nvme or none")
    if "offload_param" in devices and stage != 3:
        raise ValueError(f"{source}: offload_param needs ZeRO stage 3, and the stage there is {stage}")
    if "nvme" in devices.values() and stage != 3:
        raise ValueError(f"{source}: offload to nvme needs ZeRO stage 3, and the stage there is {stage}")
    if devices and stage == 0:
        raise ValueError(f"{source}: offload_optimizer needs ZeRO stage 1, 2 or 3, and the stage there is 0")
    for section, device in devices.items():
        if device == "nvme" and not settings["zero_optimization"][section].get("nvme_path"):
            raise ValueError(
                f"{source}: {section} goes to nvme, but no folder is given: set run.engine.nvme_path to one on a local"
                " disk of the node"
            )


def prepare_nvme(settings: dict[str, Any], run_dir: str) -> None:
    """Makes a folder for this run on the NVMe disk and loads DeepSpeed's asynchronous I/O.

    Every rank calls it. It changes ``settings`` in place.

    Raises:
        ValueError: the folder cannot be written, or the asynchronous I/O cannot be compiled
    """
    nvme = [section for section, device in offload_devices(settings).items() if device == "nvme"]
    if not nvme:
        return
    run_hash = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:12]
    for section in nvme:
        path = Path(settings["zero_optimization"][section]["nvme_path"])
        folder = path / f"{Path(run_dir).name}-{run_hash}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.engine.nvme_path: {path} cannot be written: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"run.engine.nvme_path: {path} cannot be written")
        settings["zero_optimization"][section]["nvme_path"] = str(folder)
    free = shutil.disk_usage(folder).free / 1e9
    logger.info("offload to %s: %.0f GB free. The first time, DeepSpeed compiles its asynchronous I/O", folder, free)
    load_async_io()


def load_async_io() -> None:
    """Compiles DeepSpeed's asynchronous I/O if necessary. The first rank of a node compiles, the others wait.

    torch's lock ends with the process that holds it, so a killed process blocks no other.

    Raises:
        ValueError: libaio or a compiler is missing, or the folder of extensions cannot be written
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder, begun = AsyncIOBuilder(), time.monotonic()
    if not builder.is_compatible(verbose=False):
        raise ValueError(
            "offload to nvme needs libaio and a C++ compiler on every node, because DeepSpeed compiles its asynchronous"
            f" I/O with them. Install {PACKAGES}"
        )
    try:
        builder.load(verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"offload to nvme: DeepSpeed's asynchronous I/O cannot be compiled here: {str(error).splitlines()[0]}. It"
            f" needs {PACKAGES}, and write access to TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions"
        ) from error
    if (seconds := time.monotonic() - begun) > 10:
        logger.info("asynchronous I/O was compiled in %.0f s; later runs on this node use it again", seconds)
