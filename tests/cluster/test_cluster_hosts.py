"""A hostfile of two hosts, 127.0.0.2 and 127.0.0.3, behind a real sshd: check, pdsh, Open MPI."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_launches import PYTHON, STOPPABLE, ToyRun, assert_same, execute, needed, toy_arguments

from cluster.launch import free_port
from cluster.preemption import REQUEUE_EXIT_CODE

HOSTS = ("127.0.0.2", "127.0.0.3")


@dataclass(frozen=True)
class Hosts:
    """Two hosts: their hostfile, the port of their sshd, and a folder whose ``ssh`` knows the key."""

    hostfile: Path
    port: int
    bin: Path

    def cluster(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        options = ("--hostfile", str(self.hostfile), "--ssh-port", str(self.port))
        return execute([PYTHON, "-m", "cluster", command, *options, *words], path)

    def launch(self, launcher: str, folder: Path, *words: str, options: tuple[str, ...] = ()) -> ToyRun:
        rendezvous = ("--master-addr", HOSTS[0], "--master-port", str(free_port()))
        run = ("--", "tests.cluster.toy_run", *toy_arguments(folder, *words))
        done = self.cluster("launch", "--launcher", launcher, *options, *rendezvous, *run)
        return ToyRun(folder, done.returncode, done.stdout)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """sshd as this user on the two addresses, with a key of its own."""
    sshd = needed("/usr/sbin/sshd", "openssh-server")
    needed("pdsh", "pdsh")
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation
    listen = "\n".join(f"ListenAddress {host}:{port}" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"{listen}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nSetEnv DS_ACCELERATOR=cpu\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, server)
        yield Hosts(folder / "hosts", port, folder / "bin")
    finally:
        server.terminate()
        server.wait(timeout=10)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.time() + 20
    while time.time() < deadline:
        assert server.poll() is None, "sshd did not start"
        with socket.socket() as probe:
            if probe.connect_ex((HOSTS[1], port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("sshd does not answer")


def test_check_asks_every_host(hosts: Hosts) -> None:
    done = hosts.cluster("check", "--free-gb", "0.001", "--shm-gb", "0")
    assert done.returncode == 0, done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("127.")]
    assert [(row[0], row[1]) for row in rows] == [(host, "1") for host in HOSTS]
    assert rows[0][2:8] == rows[1][2:8]
    assert all(abs(float(row[-1])) < 5 for row in rows)


def test_pdsh_run_stops_and_goes_on_under_openmpi(hosts: Hosts, toys: dict[str, ToyRun], tmp_path: Path) -> None:
    """The run directory's name is one that a remote shell, pdsh and DeepSpeed would each take apart."""
    mpirun = needed("mpirun", "openmpi-bin")
    folder = tmp_path / "it's {a,b} $HOME `id` 50%n"
    stopped = hosts.launch("pdsh", folder, *STOPPABLE, "--kill_at", "6")
    assert stopped.ended == REQUEUE_EXIT_CODE, stopped.output
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert list(stopped.records("train/loss")) == list(range(1, 8))
    root = "--allow-run-as-root " if os.geteuid() == 0 else ""
    options = (f"--launcher-args={root}--oversubscribe --bind-to none",)
    resumed = hosts.launch("openmpi", folder, *STOPPABLE, options=options)
    assert resumed.ended == 0, (mpirun, resumed.output)
    assert "resumed" in resumed.output
    assert_same(resumed, toys["whole"])
