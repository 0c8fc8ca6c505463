"""The ``deepspeed`` command line of a run, as ``python -m cluster launch`` starts it.

    python -m cluster launch -- pretrain --config c.yaml                    # every GPU of this machine
    python -m cluster launch --hostfile hosts -- pretrain --config c.yaml   # pdsh over ssh
    -> python -m priorclip.cluster.launch.deepspeed_runner --hostfile hosts --force_multi --launcher pdsh
           --module priorclip.pretrain --config c.yaml
    srun --ntasks-per-node=1 python -m cluster launch --launcher node -- pretrain --config c.yaml   # a launcher a node

DeepSpeed starts and watches the ranks. On this machine we call the program that DeepSpeed also starts on each host of a
hostfile. For other hosts we call DeepSpeed's ``deepspeed`` command through deepspeed_runner.py, which returns a correct
exit code. We add three things: the options of the run arrive unchanged through pdsh's remote shells; the port is free;
CUDA_VISIBLE_DEVICES chooses the GPUs.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from priorclip.cluster.commands import LaunchConfig
from priorclip.cluster.launch.hostfile import HOST, read_hostfile
from priorclip.common.command_names import module_of
from priorclip.common.ports import TORCH_PORT, free_port, job_port

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# DeepSpeed writes the working folder and the interpreter into the remote shell's command without quotes.
PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")
CPU_RANKS = 2


def deepspeed_command(config: LaunchConfig, run: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the argument list that starts the run. No shell of this machine reads it.

    Raises:
        ValueError: the hostfile, the module or the options are invalid.
    """
    module, *words = module_of(run[0]), *run[1:]
    if not MODULE.fullmatch(module) or importlib.util.find_spec(module.split(".")[0]) is None:
        raise ValueError(f"'{module}' is no module of {os.getcwd()}: write pretrain, or finetune and its sub-command")
    launcher = config.launcher or ("pdsh" if config.hostfile else "local")
    if launcher in ("local", "node"):
        return [*node_launcher(config, launcher, environment), "--module", module, *words]
    runner = [sys.executable, "-m", "priorclip.cluster.launch.deepspeed_runner", *hostfile_options(config, launcher)]
    if launcher == "pdsh":
        words = [quote_for_pdsh(word) for word in words]
    if launcher == "slurm":
        return [*runner, str(Path(__file__).parent / "run_module.py"), module, *words]
    return [*runner, "--module", module, *words]


def node_launcher(config: LaunchConfig, launcher: str, environment: Mapping[str, str]) -> list[str]:
    """DeepSpeed's launcher of one host: it starts all ranks of the run, or with ``node`` the ranks of one node."""
    if config.hostfile:
        raise ValueError(f"--launcher {launcher} runs on this machine: remove --hostfile, or choose another launcher")
    slots = local_slots(config.nproc, environment)
    node, nodes = (0, 1) if launcher == "local" else node_number(config, environment)
    address, port = config.master_addr or "127.0.0.1", config.master_port or free_port()
    if launcher == "node":
        address, port = rendezvous(config, environment)
    world = json.dumps({f"node{number}": slots for number in range(nodes)})
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level", "error",
            f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={node}",
            f"--master_addr={checked_host(address)}", f"--master_port={port}"]  # fmt: skip


def node_number(config: LaunchConfig, environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns (number of this node, number of nodes), from the options or from srun's variables."""
    node = environment.get("SLURM_NODEID") if config.node_rank is None else config.node_rank
    nodes = config.nodes or environment.get("SLURM_STEP_NUM_NODES")
    if node is None or nodes is None:
        raise ValueError("--launcher node needs --node-rank and --nodes, or srun must start it with one task a node")
    if not 0 <= int(node) < int(nodes):
        raise ValueError(f"--node-rank {node} of --nodes {nodes}: nodes are counted from 0")
    return int(node), int(nodes)


def rendezvous(config: LaunchConfig, environment: Mapping[str, str]) -> tuple[str, int]:
    """Returns address and port of the rendezvous on node 0. They are the same on every node."""
    address = config.master_addr or environment.get("MASTER_ADDR")
    if address is None:
        raise ValueError("--launcher node needs --master-addr, or MASTER_ADDR: the address of node 0")
    job = environment.get("SLURM_JOB_ID")
    default = job_port(int(job)) if job else TORCH_PORT
    return address, config.master_port or int(environment.get("MASTER_PORT", default))


def checked_host(name: str) -> str:
    """Returns the name. Raises ValueError if it is not a plain host name or IPv4 address."""
    if not HOST.fullmatch(name):
        raise ValueError(f"--master-addr '{name}' is not a host name or IPv4 address")
    return name


def local_slots(nproc: int | None, environment: Mapping[str, str]) -> list[int]:
    """Numbers of the devices of this machine; each gets one rank."""
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc}: at least one rank is needed")
    gpus = visible_gpus(environment)
    if not gpus:
        return list(range(nproc or CPU_RANKS))
    if nproc and nproc > len(gpus):
        raise ValueError(
            f"--nproc {nproc}, but there are {len(gpus)} GPUs; to use the CPU, set DS_ACCELERATOR=cpu in front"
        )
    return gpus[: nproc or len(gpus)]


def visible_gpus(environment: Mapping[str, str]) -> list[int]:
    """Numbers of the GPUs that this process may use."""
    if environment.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    named = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip().isdigit()]
    return [int(name) for name in named] if len(named) == count else list(range(count))


def hostfile_options(config: LaunchConfig, launcher: str) -> list[str]:
    """DeepSpeed's options for a run over the hosts of the hostfile."""
    if config.hostfile is None:
        raise ValueError(f"--launcher {launcher} needs --hostfile FILE with one 'HOST slots=N' a line")
    if config.nproc is not None:
        raise ValueError("--nproc is for this machine alone; with --hostfile the file's slots are the ranks")
    first = next(iter(read_hostfile(config.hostfile)))
    options = ["--hostfile", config.hostfile, "--force_multi", "--launcher", launcher]
    if launcher == "pdsh":
        for path in (os.getcwd(), sys.executable):
            if not PLAIN_PATH.fullmatch(path):
                raise ValueError(f"{path}: pdsh cannot use this path; choose one of letters, digits and @+=:,./-_")
    if config.ssh_port:
        options += ["--ssh_port", str(config.ssh_port)]
    if launcher == "slurm":
        # Without these options DeepSpeed asks the first host over ssh for an address that srun's ranks do not use.
        options += ["--no_ssh_check", "--master_addr", checked_host(config.master_addr or first)]
    elif config.master_addr:
        options += ["--master_addr", checked_host(config.master_addr)]
    if config.master_port:
        options += ["--master_port", str(config.master_port)]
    arguments = shlex.split(config.launcher_args)
    if launcher == "openmpi":
        arguments += mpirun_arguments(config, arguments)
    return [*options, f"--launcher_args={shlex.join(arguments)}"] if arguments else options


def mpirun_arguments(config: LaunchConfig, given: Sequence[str]) -> list[str]:
    """Arguments that DeepSpeed does not pass to mpirun: ssh port, rendezvous, and a network interface that exists."""
    arguments: list[str] = []
    if config.ssh_port:
        arguments += ["--mca", "plm_rsh_args", f"-p {config.ssh_port}"]
    if config.master_addr:
        arguments += ["-x", f"MASTER_ADDR={config.master_addr}"]
    if config.master_port:
        arguments += ["-x", f"MASTER_PORT={config.master_port}"]
    if "btl_tcp_if_include" not in given:
        names = [name for _, name in socket.if_nameindex()]
        others = [name for name in names if name != "lo"]
        arguments += ["--mca", "btl_tcp_if_include", "eth0" if "eth0" in names else ",".join(others or names)]
    return arguments


def quote_for_pdsh(word: str) -> str:
    """Quotes ``word`` so that it arrives unchanged after DeepSpeed, pdsh and the remote shell have read it.

    DeepSpeed puts a word with a space into double quotes and escapes only the double quotes in it. It leaves other
    words bare. Then pdsh replaces ``%n`` and similar, and the remote shell reads the line.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")
