"""What ``python -m cluster check|launch|sbatch|faults`` is told. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from priorclip.cluster.plan.network import Network


@dataclass
class CheckConfig:
    """Look at this machine, the hosts of a hostfile, or the nodes of a SLURM job, before a run.

    Args:
        hostfile: hosts and slots, one ``worker-0 slots=8`` a line; null for this SLURM job's nodes, or this machine
        ssh_port: port of the hosts' ssh servers, null for ssh's own choice
        nodes: SLURM nodes to look at, in a job of its own
        gpus_per_node: ranks of a SLURM node; null for one a GPU, or two without GPUs
        srun_args: further options of the SLURM job, such as its partition, in one string
        folder: where runs are written, looked at on every host
        shards: folder of shards, or tars in braces notation, whose sizes every host compares with their manifest
        master_addr: address of the first host where ranks would meet; null is what a run would take
        master_port: port of the rendezvous; null is what a run would take
        free_gb: least free disk of that folder, GB
        shm_gb: least free /dev/shm, GB; NCCL and data workers pass tensors through it
        skew_seconds: most that a host's clock may differ from this machine's
        measure: start real ranks that measure compute, all-reduce and links
        slow_share: a host or link below this share of the others' median is slow
        all_reduce_gb_s: least bus bandwidth of the all-reduce, GB/s; 0 accepts any
        timeout_seconds: how long a host may take to answer, and the ranks to measure
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
        launcher: how ranks are started; null is pdsh with a hostfile, else local. node: the ranks of this node, of a
            run that is started once on every node
        node_rank: of this node, counted from 0, for --launcher node; null asks srun
        nodes: how many there are, for --launcher node; null asks srun
        launcher_args: further options of pdsh, mpirun or srun, in one string
        ssh_port: port of the hosts' ssh servers
        master_addr: address of the first host on the cluster's network; null is the first that the host itself names
        master_port: port of the rendezvous; null for a free one on this machine, 29500 with a hostfile
        dry_run: print the command instead
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
        nodes: machines of the job
        gpus_per_node: GPUs, and ranks, on each; 0 for a run on CPUs
        ranks_per_node: null for one a GPU, or two without GPUs
        launcher: srun starts every rank; node: srun starts one launcher a node (cluster launch), which starts its ranks
        cpus_per_task: cores a rank, for its data workers
        time: limit, [days-]hours:minutes:seconds; the run checkpoints before it and is requeued
        partition: null for the cluster's default
        account: null for the user's default
        qos: null for the default
        job_name: name of the job and of its logs
        signal_seconds: how long before the limit the ranks are told to checkpoint
        container: image that the ranks run in, null for none
        container_runtime: apptainer, or pyxis (srun --container-image)
        python: interpreter of the ranks; null is this one, or python3 in a container
        logs: folder of the log files, one a node
        retries: how often the job goes back into the queue after a run that failed: a rank was killed, a node is lost
        template: batch script with {{names}} to fill in; null is cluster/slurm/run.sbatch, or node.sbatch
        dry_run: print the script instead of submitting it
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
    python: str | None = None
    logs: str = "logs"
    retries: int = 0
    template: str | None = None
    dry_run: bool = False


@dataclass
class FaultsConfig:
    """Kill a run at random points and see that it comes out the same: faults [options] -- pretrain --config FILE [...]

    Args:
        kills: how many
        kinds: of what: rank (one of them), job (all ranks), daemon (SLURM's step daemon of a node), write (a rank while
            a checkpoint is written); stop: a rank is not killed but stopped, which the run has to find out; notice: the
            job is told that it will end, as before its time limit
        launcher: local starts the command again after a kill; slurm submits a job, which SLURM requeues
        folder: of the two runs, whole and shot, and report.json and report.md
        seed: of the random points and victims
        nproc: ranks, on each node
        nodes: of the job; kills reach the ranks on this machine only
        gpus_per_node: 0 for a run on CPUs
        time: limit of the job
        partition: null for the cluster's default
        account: null for the user's default
        template: batch script with {{names}} to fill in, as for sbatch
        hasten: tell SLURM to start a job that was put back at once; takes an operator's rights
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
        preset: a name in model/presets
        gpus: how many and how large: 8x80GB
        gpu: its name, for the peak that --mfu is a share of
        global_batch: pairs a step; null for 512 a GPU, as published
        micro_batch: samples a GPU at a time; null for the most that fits
        zero: ZeRO stage; null for the lowest of 2 and 3 that fits (one GPU: 0)
        grad_checkpointing: null: only where it is needed
        precision: of parameters and activations
        throughput: measured images/s of one GPU, without checkpointing and gradient caching
        bench: JSON of 'python -m model bench --format json', in the place of throughput
        mfu: share of the peak that is reached, where nothing is measured: an assumption
        peak_tflops: of the GPU, where its name is not known
        pairs: of an epoch; RS5M's
        epochs: of the run
        loader: JSON of 'python -m data_shards bench'
        loader_rate: images/s of a loader's worker, in its place
        workers: loader's workers of a rank that there are
        kilobytes_an_image: of an encoded image; RS5M's shards have 100
        disk_gbytes: GB/s that checkpoints are written with
        reserve_gb: of each GPU for CUDA, cuDNN and NCCL
        fragmentation: share of the rest that the allocator loses
        network: links of the cluster
        table: output of 'python -m model summary --memory --format json', in the place of making it
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
        over_zero(self, *names, "workers", "kilobytes_an_image", "disk_gbytes")
        shares(self, "mfu", "fragmentation")
        if self.reserve_gb < 0:
            raise ValueError(f"reserve_gb must not be negative, but is {self.reserve_gb}")


@dataclass
class SimulateConfig:
    """Simulate the scaling of a run to many GPUs: weak and strong, by parts of a step.

    Args:
        preset: a name in model/presets
        gpu: its name, for the peak that --mfu is a share of
        images_per_second: measured, of one GPU; null: from FLOPs, peak and MFU
        mfu: share of the peak, where nothing is measured: an assumption
        peak_tflops: of the GPU, where its name is not known
        precision: of parameters and gradients
        zero: ZeRO stage
        batch: pairs a GPU of the weak curve
        global_batch: of the strong curve
        gpus: largest number of GPUs, a power of two
        overlap: share of collectives that can hide behind compute
        stragglers: standard deviation of a GPU's compute, as a share of it
        loader_rate: images/s that the workers of a rank deliver; null: enough
        network: links of the cluster
        table: output of 'python -m model summary --memory --format json', in the place of making it
        output: PNG to write
        json: print JSON
    """

    preset: str = "priorclip-b32"
    gpu: str = "A100"
    images_per_second: float | None = None
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
        over_zero(self, *names)
        shares(self, "mfu", "overlap", "stragglers")
        if self.gpus & (self.gpus - 1):
            raise ValueError(f"gpus must be a power of two, but is {self.gpus}")


def over_zero(config: object, *names: str) -> None:
    """Raises ValueError for a number that is there and not over 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be over 0, but is {value}")


def shares(config: object, *names: str) -> None:
    """Raises ValueError for what is no share of a whole."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, but is {getattr(config, name)}")
