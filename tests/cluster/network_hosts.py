"""Two hosts in network namespaces of this machine. Each has its own address, host name, mounts and sshd.

    node0 10.77.N.2, node1 10.77.N.3 and this machine 10.77.N.1 are on one bridge. Each host has a second interface,
    ``public``, without a connection.

The hosts see the files of this machine as a shared file system, until a test mounts something else on a host.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_launches import LIMIT_SECONDS, PYTHON, ROOT, dying_with_us, environment, execute, needed, root_needed

NAMES = ("node0", "node1")


@dataclass(frozen=True)
class Host:
    """A host, and the process that holds its namespaces."""

    name: str
    address: str
    public: str
    pid: int

    def enter(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", f"--wd={ROOT}", *command]

    def run(self, *command: str, extra: Mapping[str, str] | None = None) -> str:
        """Runs the command on this host and returns its output. AssertionError if it fails."""
        done = execute(self.enter(*command), extra)
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextlib.contextmanager
    def mounted(self, *words: str) -> Iterator[None]:
        """``mount WORDS`` on this host alone."""
        self.run("mount", *words)
        try:
            yield
        finally:
            self.run("umount", "-l", words[-1])


@dataclass(frozen=True)
class Network:
    """The hosts, their hostfile with one slot each, and a folder with an ``ssh`` that has their key and addresses.

    ``address`` is that of this machine on their network, ``gone`` one without a host, ``servers`` are their sshd.
    """

    hosts: tuple[Host, Host]
    address: str
    gone: str
    hostfile: Path
    bin: Path
    servers: tuple[subprocess.Popen[bytes], ...]

    @property
    def variables(self) -> dict[str, str]:
        """Environment in which ``ssh node0`` works, also for the programs that call it."""
        return {"PATH": f"{self.bin}{os.pathsep}{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"}

    def cluster(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return execute([PYTHON, "-m", "cluster", command, "--hostfile", str(self.hostfile), *words], self.variables)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def make_host(name: str, number: int, bridge: str, subnet: str, names: Path) -> tuple[Host, subprocess.Popen[bytes]]:
    holder = subprocess.Popen(
        dying_with_us(["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c",
                       f"hostname {name}; mount --bind {names} /etc/hosts; echo ready; exec sleep infinity"]),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n", "no namespaces can be made here"
    host = Host(name, f"{subnet}.{number + 2}", f"192.168.{number + 77}.2", holder.pid)
    outer = f"{bridge}-{number}"
    ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
    ip("link", "set", outer, "master", bridge, "up")
    host.run("ip", "link", "set", "lo", "up")
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "up")
    host.run("ip", "link", "add", "public", "type", "veth", "peer", "name", "nowhere")
    host.run("ip", "address", "add", f"{host.public}/24", "dev", "public")
    host.run("ip", "link", "set", "public", "up")
    host.run("ip", "link", "set", "nowhere", "up")
    return host, holder


def ssh_files(folder: Path, addresses: Mapping[str, str]) -> None:
    """Writes keys, the configuration of both ends, and ``bin/ssh``, which uses it."""
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\n"
        f"SetEnv DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PATH={Path(PYTHON).parent}:{os.environ['PATH']}\n"
        "MaxStartups 100\n"
    )
    known = "".join(f"Host {name}\n    HostName {address}\n" for name, address in addresses.items())
    (folder / "ssh_config").write_text(
        f"{known}Host *\n    IdentityFile {folder}/user_key\n    StrictHostKeyChecking no\n"
        "    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Makes the bridge, the hosts and their sshd. At the end stops them by their process ids."""
    sshd = needed("/usr/sbin/sshd", "openssh-server")
    needed("ip", "iproute2")
    root_needed("to make network namespaces")
    folder = tmp_path_factory.mktemp("network")
    number = os.getpid() % 250 + 1
    bridge, subnet = f"pc{number}", f"10.77.{number}"
    addresses = {name: f"{subnet}.{place + 2}" for place, name in enumerate(NAMES)}
    (folder / "etc_hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    ssh_files(folder, addresses)
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation
    processes: list[subprocess.Popen[bytes]] = []
    remove_old_bridge(bridge)
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        hosts, servers = [], []
        for place, name in enumerate(NAMES):
            host, holder = make_host(name, place, bridge, subnet, folder / "etc_hosts")
            processes.append(holder)
            command = host.enter(sshd, "-D", "-e", "-f", str(folder / "sshd_config"))
            # A run must not rely on a restrictive umask.
            servers.append(subprocess.Popen(dying_with_us(command), stderr=subprocess.DEVNULL, umask=0))
            processes.append(servers[-1])
            hosts.append(host)
        network = Network(
            (hosts[0], hosts[1]), f"{subnet}.1", f"{subnet}.9", folder / "hosts", folder / "bin", tuple(servers)
        )
        wait_for_ssh(network)
        yield network
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=10)
        ip("link", "delete", bridge)


def remove_old_bridge(bridge: str) -> None:
    """Removes a bridge of this name without hosts, which a killed test process leaves."""
    members = Path(f"/sys/class/net/{bridge}/brif")
    if members.is_dir() and not list(members.iterdir()):
        ip("link", "delete", bridge)


def wait_for_ssh(network: Network) -> None:
    deadline = time.time() + 40
    for host in network.hosts:
        while True:
            answer = execute([str(network.bin / "ssh"), host.name, "hostname"]).stdout.strip()
            if answer == host.name:
                break
            assert time.time() < deadline, f"sshd of {host.name} does not answer: {answer}"
            time.sleep(0.2)


def start(command: Sequence[str], extra: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts a command and returns while it runs."""
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment(), **extra}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for the process and returns its exit code and output."""
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, output)
