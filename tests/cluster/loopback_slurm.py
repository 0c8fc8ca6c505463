"""A real SLURM of two nodes, the hosts of ``network``, each with a fake GPU. The tests of a session share it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from network_hosts import Network
from toy_launches import dying_with_us, environment, execute, needed, root_needed

from priorclip.common.ports import free_port

JOB_SECONDS = 240
REST_SECONDS = 5


@dataclass(frozen=True)
class Slurm:
    """A running SLURM, by the environment that its programs read."""

    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        return execute(command, self.environment).stdout

    def wait(self, job: str, logs: Path) -> tuple[dict[str, str], str]:
        """Waits for the job to end. Returns the fields of scontrol and the text of its logs."""
        deadline, waited = time.time() + JOB_SECONDS, 0
        while time.time() < deadline:
            words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
            fields = dict(word.split("=", 1) for word in words if "=" in word)
            if fields.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return fields, text_of(logs)
            # SLURM delays a requeued job by two minutes, so that it can clean up the last run. Here we start it some
            # seconds after its steps have ended: slurmd distinguishes the runs of a job by the second of their start.
            waited = waited + 1 if fields.get("Reason") == "BeginTime" and not steps_of(job) else 0
            if waited == REST_SECONDS:
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)
        state = self.ask("squeue") + self.ask("sinfo", "-lN")
        raise AssertionError(f"job {job} has not ended: {state}\n{text_of(logs)}")


def steps_of(job: str) -> list[str]:
    """slurmstepd processes of the job that still run."""
    titles = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [title for title in titles if title.startswith(f"slurmstepd: [{job}.")]


def text_of(logs: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(logs.iterdir()))


def configuration(folder: Path, ports: Sequence[int], network: Network) -> str:
    """slurm.conf of a controller here and a node on each host, all run by this user."""
    nodes = "\n".join(
        f"NodeName={host.name} NodeHostname={host.name} NodeAddr={host.address} Port={port} CPUs=16 Gres=gpu:1"
        for host, port in zip(network.hosts, ports[1:])
    )
    return f"""
ClusterName=loopback
SlurmctldHost=localhost({network.address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MinJobAge=600
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=short Nodes=node[0-1] Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def slurm(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Starts munged, slurmctld and two slurmd. At the end stops them by their process ids."""
    programs = {name: needed(f"/usr/sbin/{name}", package) for name, package in
                (("munged", "munge"), ("slurmctld", "slurm-wlm"), ("slurmd", "slurm-wlm"))}  # fmt: skip
    needed("sbatch", "slurm-wlm")
    root_needed("for slurmd, which starts steps as other users")
    folder = tmp_path_factory.mktemp("slurm")
    for path in [folder, *folder.parents][:2]:
        path.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(configuration(folder, [free_port() for _ in range(3)], network))
    (folder / "gres.conf").write_text("NodeName=node[0-1] Name=gpu File=/dev/zero\n")
    variables = {**network.variables, "SLURM_CONF": str(folder / "slurm.conf")}
    files = {f"--{kind}-file": f"{folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")}
    munge = [
        "--foreground",
        "--force",
        "--socket",
        f"{folder}/munge.socket",
        *(w for pair in files.items() for w in pair),
    ]
    commands = [
        [programs["munged"], *munge],
        [programs["slurmctld"], "-D"],
        *(host.enter(programs["slurmd"], "-D", "-N", host.name) for host in network.hosts),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"daemon-{len(daemons)}.out").open("wb") as log:
                daemons.append(
                    subprocess.Popen(
                        dying_with_us(command), env={**environment(), **variables}, stdout=log, stderr=subprocess.STDOUT
                    )
                )
            time.sleep(0.5)
        cluster = Slurm(variables)
        wait_for_nodes(cluster, folder)
        yield cluster
    finally:
        execute(["scancel", "--user", str(os.geteuid())], variables)
        time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=20)


def wait_for_nodes(cluster: Slurm, folder: Path) -> None:
    deadline = time.time() + 40
    while time.time() < deadline:
        if cluster.ask("sinfo", "-h", "-o", "%D %t").strip() == "2 idle":
            return
        time.sleep(0.5)
    logs = "\n".join(f"{path}: {path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log"))
    raise AssertionError(f"SLURM did not start: {cluster.ask('sinfo', '-lN')}\n{logs}")
