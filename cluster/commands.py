"""The options of ``python -m cluster``: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from priorclip.cluster.plan.network import Network


@dataclass
class CheckConfig:
    """Check this machine, the hosts of a hostfile, or the nodes of a SLURM job before a run.

    Args:
        hostfile: hosts and slots, one ``worker-0 slots=8`` a line; null for this SLURM job's nodes, or this machine
        ssh_port: port of the hosts' ssh servers; null for ssh's default
        nodes: number of SLURM nodes to check, in a job of its own
        gpus_per_node: ranks of a SLURM node; null for one a GPU, or two without GPUs
        srun_args: more options of the SLURM job in one string, such as the partition
        folder: folder of the runs; its free disk is checked on every host
        shards: folder of shards, or tars in braces notation; every host compares their sizes with the manifest
        master_addr: address of the first host for the rendezvous; null for the default of a run
        master_port: port of the rendezvous; null for the default of a run
        free_gb: minimum of free disk in that folder, GB
        shm_gb: minimum of free /dev/shm, GB; NCCL and data workers use it for tensors
        skew_seconds: maximum difference between a host's clock and this machine's
        measure: start real ranks that measure compute, all-reduce and links
        slow_share: a host or link below this share of the median of the others is slow
        all_reduce_gb_s: minimum bus bandwidth of the all-reduce, GB/s; 0 accepts any
        timeout_seconds: timeout of a host's answer, and of the measurement
        json: print JSON instead of the table
    """

    hostfile: str | None = None
    ssh_port: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    srun_args: str = ""
    folder: str = "."
    shards: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    free_gb: float = 10.0
    shm_gb: float = 1.0
    skew_seconds: float = 5.0
    measure: bool = True
    slow_share: float = 0.8
    all_reduce_gb_s: float = 0.0
    timeout_seconds: float = 120.0
    json: bool = False


@dataclass
class LaunchConfig:
    """Start a run on this machine or on the hosts of a hostfile: launch [options] -- pretrain --config FILE [...]

    Args:
        hostfile: hosts and slots, one ``worker-0 slots=8`` a line; null for this machine alone
        nproc: ranks on this machine; null for one a GPU, or two without GPUs
        launcher: program that starts the ranks; null is pdsh with a hostfile, otherwise local. node: starts only the
            ranks of this node; you start it once on every node
        node_rank: number of this node, counted from 0, for --launcher node; null takes srun's
        nodes: number of nodes, for --launcher node; null takes srun's
        launcher_args: more options of pdsh, mpirun or srun, in one string
        ssh_port: port of the hosts' ssh servers
        master_addr: address of the first host on the cluster's network; null for the first of ``hostname -I`` there
        master_port: port of the rendezvous; null for a free one on this machine, 29500 with a hostfile
        dry_run: only print the command
    """

    hostfile: str | None = None
    nproc: int | None = None
    launcher: Literal["local", "pdsh", "openmpi", "slurm", "node"] | None = None
    node_rank: int | None = None
    nodes: int | None = None
    launcher_args: str = ""
    ssh_port: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    dry_run: bool = False


@dataclass
class SbatchConfig:
    """Submit a run to SLURM: sbatch [options] -- pretrain --config FILE [...]

    Args:
        nodes: number of nodes of the job
        gpus_per_node: GPUs, and ranks, on each node; 0 for a run on CPUs
        ranks_per_node: null for one a GPU, or two without GPUs
        launcher: srun: srun starts every rank; node: srun starts one launcher a node (cluster launch), which starts its
            ranks
        cpus_per_task: cores a rank, for its data workers
        time: time limit, [days-]hours:minutes:seconds; before it, the run writes a checkpoint and is requeued
        partition: null for the cluster's default
        account: null for the user's default
        qos: null for the default
        job_name: name of the job and of its logs
        signal_seconds: seconds before the limit at which the ranks get the signal to write a checkpoint
        container: image in which the ranks run; null for none
        container_runtime: apptainer, or pyxis (srun --container-image)
        container_mounts: folders that the container sees besides the working folder, such as data and runs, separated
            by commas; HOST:CONTAINER gives one another path inside
        python: interpreter of the ranks; null for this one, or python3 in a container
        logs: folder of the log files, one a node
        retries: how often a failed run is requeued (a rank was killed, a node was lost)
        template: batch script with {{names}} to fill in; null is cluster/slurm/run.sbatch, or node.sbatch
        dry_run: only print the script
    """

    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    launcher: Literal["srun", "node"] = "srun"
    cpus_per_task: int = 8
    time: str = "1-00:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str = "priorclip"
    signal_seconds: int = 300
    container: str | None = None
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    container_mounts: str | None = None
    python: str | None = None
    logs: str = "logs"
    retries: int = 0
    template: str | None = None
    dry_run: bool = False


@dataclass
class FaultsConfig:
    """Kill a run at random points and check that it ends the same: faults [options] -- pretrain --config FILE [...]

    Args:
        kills: number of kills
        kinds: kinds of kills: rank (one rank), job (all ranks), daemon (SLURM's step daemon of a node), write (a rank
            that is writing a checkpoint); stop: a rank is stopped instead of killed, which the run has to detect;
            notice: the job gets the signal that comes before its time limit
        launcher: local starts the command again after a kill; slurm submits a job, which SLURM requeues
        folder: folder of the two runs, whole and shot, and of report.json and report.md
        seed: seed of the random points and processes
        nproc: ranks on each node
        nodes: nodes of the job; only ranks on this machine are killed
        gpus_per_node: 0 for a run on CPUs
        time: time limit of the job
        partition: null for the cluster's default
        account: null for the user's default
        template: batch script with {{names}} to fill in, as for sbatch
        hasten: start a requeued job at once; needs an operator's rights
    """

    kills: int = 20
    kinds: list[Literal["rank", "job", "daemon", "write", "stop", "notice"]] = field(
        default_factory=lambda: ["rank", "job", "write"]
    )
    launcher: Literal["local", "slurm"] = "local"
    folder: str = "runs/faults"
    seed: int = 0
    nproc: int = 2
    nodes: int = 1
    gpus_per_node: int = 0
    time: str = "1-00:00:00"
    partition: str | None = None
    account: str | None = None
    template: str | None = None
    hasten: bool = True


@dataclass
class PlanConfig:
    """Plan a run: memory of a GPU, batch sizes, ZeRO stage, time, data rate, checkpoints.

    Args:
        preset: name in model/presets
        gpus: number and memory of the GPUs: 8x80GB
        gpu: name of the GPU, for the peak that --mfu refers to
        global_batch: pairs a step; null for 512 a GPU, as published
        micro_batch: samples of one forward pass of a GPU; null for the largest that fits
        zero: ZeRO stage; null for the lowest of 2 and 3 that fits (one GPU: 0)
        grad_checkpointing: null: only if it is needed
        precision: of parameters and activations
        throughput: measured images/s of one GPU, without checkpointing and gradient caching
        bench: JSON of 'python -m benchmarks.gpu' or of 'python -m model bench --format json', instead of throughput
        mfu: assumed share of the peak FLOP/s, if throughput is not measured
        peak_tflops: peak of the GPU, if its name is not known
        pairs: pairs of an epoch; the default is RS5M
        epochs: epochs of the run
        loader: JSON of 'python -m data_shards bench'
        loader_rate: images/s of one data worker, instead of the JSON
        workers: data workers a rank
        kilobytes_an_image: size of an encoded image; in RS5M's shards 100
        disk_gbytes: GB/s of writing checkpoints
        reserve_gb: GB of each GPU for CUDA, cuDNN and NCCL
        fragmentation: share of the rest that the allocator loses
        network: links of the cluster
        table: output of 'python -m model summary --memory --format json'; null runs that command
        json: print JSON
    """

    preset: str = "priorclip-b32"
    gpus: str = "8x80GB"
    gpu: str = "A100"
    global_batch: int | None = None
    micro_batch: int | None = None
    zero: Literal["0", "1", "2", "3"] | None = None
    grad_checkpointing: bool | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    throughput: float | None = None
    bench: str | None = None
    mfu: float = 0.35
    peak_tflops: float | None = None
    pairs: int = 5_070_186
    epochs: int = 20
    loader: str | None = None
    loader_rate: float | None = None
    workers: int = 12
    kilobytes_an_image: float = 100.0
    disk_gbytes: float = 1.0
    reserve_gb: float = 2.0
    fragmentation: float = 0.08
    network: Network = field(default_factory=Network)
    table: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        names = ("global_batch", "micro_batch", "throughput", "mfu", "peak_tflops", "pairs", "epochs", "loader_rate")
        check_positive(self, *names, "workers", "kilobytes_an_image", "disk_gbytes")
        check_shares(self, "mfu", "fragmentation")
        if self.reserve_gb < 0:
            raise ValueError(f"reserve_gb must not be negative, but is {self.reserve_gb}")


@dataclass
class SimulateConfig:
    """Simulate how a run scales to many GPUs, weak and strong, by parts of a step.

    Args:
        preset: name in model/presets
        gpu: name of the GPU, for the peak that --mfu refers to
        images_per_second: measured on one GPU; null: from FLOPs, peak and MFU
        bench: JSON of 'python -m benchmarks.gpu' or of 'python -m model bench --format json', instead of that
        mfu: assumed share of the peak FLOP/s, if images_per_second is not measured
        peak_tflops: peak of the GPU, if its name is not known
        precision: of parameters and gradients
        zero: ZeRO stage
        batch: pairs a GPU of the weak curve
        global_batch: pairs a step of the strong curve
        gpus: largest number of GPUs, a power of two
        overlap: share of the collectives that can overlap with compute
        stragglers: standard deviation of a GPU's compute, as a share of it
        loader_rate: images/s from the workers of a rank; null: loading takes no time
        network: links of the cluster
        table: output of 'python -m model summary --memory --format json'; null runs that command
        output: PNG file to write
        json: print JSON
    """

    preset: str = "priorclip-b32"
    gpu: str = "A100"
    images_per_second: float | None = None
    bench: str | None = None
    mfu: float = 0.35
    peak_tflops: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero: Literal["0", "1", "2", "3"] = "2"
    batch: int = 512
    global_batch: int = 32768
    gpus: int = 512
    overlap: float = 0.8
    stragglers: float = 0.02
    loader_rate: float | None = None
    network: Network = field(default_factory=Network)
    table: str | None = None
    output: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        names = ("images_per_second", "mfu", "peak_tflops", "batch", "global_batch", "gpus", "loader_rate")
        check_positive(self, *names)
        check_shares(self, "mfu", "overlap", "stragglers")
        if self.gpus & (self.gpus - 1):
            raise ValueError(f"gpus must be a power of two, but is {self.gpus}")


def check_positive(config: object, *names: str) -> None:
    """Raises ValueError for a number that is not above 0. None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be over 0, but is {value}")


def check_shares(config: object, *names: str) -> None:
    """Raises ValueError for a number outside of 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, but is {getattr(config, name)}")
