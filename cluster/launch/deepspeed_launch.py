"""``python -m cluster launch``: the ``deepspeed`` command line of a run, and waiting for it.

    python -m cluster launch -- pretrain --config c.yaml                    # every GPU of this machine
    python -m cluster launch --hostfile hosts -- pretrain --config c.yaml   # pdsh over ssh
    -> python -m priorclip.cluster.launch.runner --hostfile hosts --force_multi --launcher pdsh
           --module priorclip.pretrain --config c.yaml
    srun --ntasks-per-node=1 python -m cluster launch --launcher node -- pretrain --config c.yaml   # each node its own

DeepSpeed starts and watches the ranks, here by the part of it that it also starts on each host of a hostfile;
cluster.runner is its ``deepspeed`` command with an exit code to rely on. What this adds: a run's words reach it
unchanged through pdsh's remote shells; a port that is free; the GPUs that CUDA_VISIBLE_DEVICES allows; and a SIGTERM,
SIGUSR1 or Ctrl-C reaches the ranks, so that they checkpoint and the command ends with their exit code.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from priorclip.cluster.commands import LaunchConfig
from priorclip.cluster.launch.hostfile import HOST, read_hostfile
from priorclip.common.command_names import module_of
from priorclip.common.masking import copy_masked
from priorclip.common.ports import TORCH_PORT, free_port, job_port
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

logger = logging.getLogger(__name__)

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# Unquoted in the remote shell, where DeepSpeed writes the working folder and the interpreter.
PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")
CPU_RANKS = 2
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.2
START_SECONDS = 2.0  # after which a process that knows SIGUSR1 has said so


def launch(config: LaunchConfig, run: Sequence[str]) -> int:
    """Start ``run`` (a module and its options) and return its exit code.

    Raises:
        ValueError: the hostfile, the module or the options do not make a run; nothing was started.
    """
    sys.path.insert(0, os.getcwd())
    command = deepspeed_command(config, run, os.environ)
    if config.dry_run:
        print(shlex.join(command))
        return 0
    logger.info("%s", shlex.join(command))
    return wait_for(command, config.launcher or ("pdsh" if config.hostfile else "local"))


def deepspeed_command(config: LaunchConfig, run: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The argument list that starts the run; no shell of this machine reads it."""
    module, *words = module_of(run[0]), *run[1:]
    if not MODULE.fullmatch(module) or importlib.util.find_spec(module.split(".")[0]) is None:
        raise ValueError(f"'{module}' is no module of {os.getcwd()}: pretrain, or finetune with its sub-command first")
    launcher = config.launcher or ("pdsh" if config.hostfile else "local")
    if launcher in ("local", "node"):
        return [*node_launcher(config, launcher, environment), "--module", module, *words]
    runner = [sys.executable, "-m", "priorclip.cluster.launch.runner", *hostfile_options(config, launcher)]
    if launcher == "pdsh":
        words = [through_pdsh(word) for word in words]
    if launcher == "slurm":
        return [*runner, str(Path(__file__).parent / "run_module.py"), module, *words]
    return [*runner, "--module", module, *words]


def node_launcher(config: LaunchConfig, launcher: str, environment: Mapping[str, str]) -> list[str]:
    """DeepSpeed's launcher of one host's ranks: this machine's are all of the run's, or with ``node`` one node's."""
    if config.hostfile:
        raise ValueError(
            f"--launcher {launcher} runs on this machine: leave --hostfile out, or choose another launcher"
        )
    slots = local_slots(config.nproc, environment)
    node, nodes = (0, 1) if launcher == "local" else place_among_nodes(config, environment)
    address, port = config.master_addr or "127.0.0.1", config.master_port or free_port()
    if launcher == "node":
        address, port = meeting_place(config, environment)
    world = json.dumps({f"node{number}": slots for number in range(nodes)})
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level", "error",
            f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={node}",
            f"--master_addr={plain_host(address)}", f"--master_port={port}"]  # fmt: skip


def place_among_nodes(config: LaunchConfig, environment: Mapping[str, str]) -> tuple[int, int]:
    """(number of this node, number of nodes), by the options or by what srun says."""
    node = environment.get("SLURM_NODEID") if config.node_rank is None else config.node_rank
    nodes = config.nodes or environment.get("SLURM_STEP_NUM_NODES")
    if node is None or nodes is None:
        raise ValueError("--launcher node needs --node-rank and --nodes, or to be started by srun, one task a node")
    if not 0 <= int(node) < int(nodes):
        raise ValueError(f"--node-rank {node} of --nodes {nodes}: nodes are counted from 0")
    return int(node), int(nodes)


def meeting_place(config: LaunchConfig, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of the rendezvous on node 0, the same on every node."""
    address = config.master_addr or environment.get("MASTER_ADDR")
    if address is None:
        raise ValueError("--launcher node needs --master-addr, or MASTER_ADDR: the address of node 0")
    job = environment.get("SLURM_JOB_ID")
    usual = job_port(int(job)) if job else TORCH_PORT
    return address, config.master_port or int(environment.get("MASTER_PORT", usual))


def plain_host(name: str) -> str:
    if not HOST.fullmatch(name):
        raise ValueError(f"--master-addr '{name}' is not a host name or IPv4 address")
    return name


def local_slots(nproc: int | None, environment: Mapping[str, str]) -> list[int]:
    """Numbers of the devices of this machine that take a rank each."""
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc}: at least one rank is needed")
    gpus = visible_gpus(environment)
    if not gpus:
        return list(range(nproc or CPU_RANKS))
    if nproc and nproc > len(gpus):
        raise ValueError(f"--nproc {nproc}, but there are {len(gpus)} GPUs; DS_ACCELERATOR=cpu in front takes the CPU")
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
        raise ValueError("--nproc is for this machine alone; with --hostfile the ranks are the slots in it")
    first = next(iter(read_hostfile(config.hostfile)))
    options = ["--hostfile", config.hostfile, "--force_multi", "--launcher", launcher]
    if launcher == "pdsh":
        for path in (os.getcwd(), sys.executable):
            if not PLAIN_PATH.fullmatch(path):
                raise ValueError(f"{path}: pdsh runs break on this path; use one of letters, digits and @+=:,./-_")
    if config.ssh_port:
        options += ["--ssh_port", str(config.ssh_port)]
    if launcher == "slurm":
        # DeepSpeed would ask the first host over ssh for an address that srun's ranks do not use.
        options += ["--no_ssh_check", "--master_addr", plain_host(config.master_addr or first)]
    elif config.master_addr:
        options += ["--master_addr", plain_host(config.master_addr)]
    if config.master_port:
        options += ["--master_port", str(config.master_port)]
    arguments = shlex.split(config.launcher_args)
    if launcher == "openmpi":
        arguments += mpirun_arguments(config, arguments)
    return [*options, f"--launcher_args={shlex.join(arguments)}"] if arguments else options


def mpirun_arguments(config: LaunchConfig, given: Sequence[str]) -> list[str]:
    """What DeepSpeed does not tell mpirun: the ssh port, the rendezvous port, and an interface that exists."""
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


def through_pdsh(word: str) -> str:
    """``word`` so that it arrives whole after DeepSpeed, pdsh and the remote shell have each had a go at it.

    DeepSpeed puts words with a space in double quotes and escapes the double quotes in them, nothing else; it leaves
    all other words bare. The remote shell then reads the line, and pdsh replaces ``%n`` and the like before it.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def wait_for(command: Sequence[str], launcher: str) -> int:
    """Run the command and return its exit code (128 + N for signal N), telling the ranks of signals that arrive here.

    The first SIGTERM, SIGUSR1 or Ctrl-C asks for a checkpoint and an end, the second ends the run at once. What cannot
    take it yet, for it still starts, is asked when it can.
    """
    if launcher in ("pdsh", "slurm") and not shutil.which({"pdsh": "pdsh", "slurm": "srun"}[launcher]):
        raise ValueError(f"--launcher {launcher}: {'srun' if launcher == 'slurm' else launcher} is not installed here")
    watched = launcher in ("local", "node")
    # DeepSpeed prints the command lines that it starts on hosts.
    pipe = None if watched else subprocess.PIPE
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=tie_to_us if watched else None, stdout=pipe, stderr=pipe
    )
    copies = [
        copy_masked(source, sink)
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if source
    ]
    watch = RankWatch(process.pid) if watched else None
    step_daemon = os.getppid() if launcher == "node" and "SLURM_STEP_ID" in os.environ else None
    told: list[int] = []
    asked: set[psutil.Process] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)
        first = len(told) == 1
        logger.warning("%s: %s", signal.Signals(number).name, "the ranks checkpoint and end" if first else "ending now")
        if launcher == "pdsh":
            end_at_once(process, launcher)
        elif first:
            ask_to_end(process.pid, asked, must=number != signal.SIGUSR1)
        else:
            end_at_once(process, launcher)

    previous = {name: signal.signal(name, pass_on) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
            if watch:
                watch.look()
            if len(told) == 1 and launcher != "pdsh":
                ask_to_end(process.pid, asked, must=told[0] != signal.SIGUSR1)
            if step_daemon not in (None, os.getppid()):
                logger.error("SLURM's step daemon, process %s, is gone: the ranks of this node end", step_daemon)
                step_daemon = None
                end_at_once(process, launcher)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
    for copy in copies:
        copy.join(timeout=5)  # a process that was left behind may keep the output open
    if watched and code > 256 - signal.NSIG:
        code -= 256  # DeepSpeed's launcher passes on what Python says of a rank that signal N ended: -N
    if code < 0:
        code = 128 - code
    if watch and watch.first_gone and code not in (0, REQUEUE_EXIT_CODE):
        logger.error("exit code %d: %s on %s was the first to end", code, watch.first_gone, socket.gethostname())
    return code


def tie_to_us() -> None:
    """In DeepSpeed's launcher of this host's ranks, before it begins.

    SLURM signals every process of a step: DeepSpeed's, which would die of SIGUSR1, leaves it to the ranks. And where
    this process is killed, the kernel tells DeepSpeed's to end its ranks.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class RankWatch:
    """Which rank below DeepSpeed's launcher of a node went first: DeepSpeed ends the others, and names none of them."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ranks: dict[psutil.Process, str] = {}
        self.first_gone: str | None = None

    def look(self) -> None:
        for rank in children_of(self.pid):
            with contextlib.suppress(psutil.Error, KeyError):
                if rank not in self.ranks:
                    self.ranks[rank] = f"rank {rank.environ()['RANK']} (process {rank.pid})"
        gone = [name for rank, name in self.ranks.items() if not alive(rank)]
        if gone and self.first_gone is None:
            self.first_gone = " and ".join(gone)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def children_of(pid: int) -> list[psutil.Process]:
    """Below DeepSpeed's launcher of a node its ranks, below its runner of many hosts mpirun or srun."""
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def ask_to_end(pid: int, asked: set[psutil.Process], must: bool) -> None:
    """Send SIGUSR1 to those below DeepSpeed's process ``pid`` that take it, once: ranks checkpoint, mpirun and srun
    carry it to theirs.

    DeepSpeed's launcher of a node would kill what it is told to stop. Where the run ``must`` end, what has run for some
    seconds and does not know the signal gets SIGTERM.
    """
    for child in children_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            takes = catches(child.pid, signal.SIGUSR1)
            if child not in asked and (takes or (must and time.time() - child.create_time() > START_SECONDS)):
                child.send_signal(signal.SIGUSR1 if takes else signal.SIGTERM)
                asked.add(child)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_at_once(process: subprocess.Popen[bytes], launcher: str) -> None:
    """End DeepSpeed's process and all that it started here; pdsh, which ends ranks on other hosts, by SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        if launcher == "pdsh":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)
