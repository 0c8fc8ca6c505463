"""``python -m cluster check`` on real hosts with real problems: each problem is found and named.

``node1`` has other code, another deepspeed, full disks, other shards and a closed firewall. ``late`` is node1 with a
clock that is two minutes ahead, ``same`` is node0, ``gone`` is an address without a host. Another program has the port.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from network_hosts import Network
from small_pretraining import SmallPretraining
from toy_launches import PYTHON, ROOT, execute, needed

from priorclip.cluster.check import measure_speed
from priorclip.cluster.check.host_probe import verify_shards
from priorclip.cluster.check.rules import check_speeds, find_problems
from priorclip.cluster.commands import CheckConfig
from priorclip.common.ports import TORCH_PORT

# libfaketime also changes sleeps, and they sometimes fail with it on a busy machine.
LATE_CLOCK = """
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += 120;
    return failed;
}
"""
FIREWALL = (
    f"table inet closed {{\nchain out {{\ntype filter hook output priority 0\n tcp dport {TORCH_PORT} drop\n}}\n}}\n"
)


def other_code(folder: Path) -> tuple[str, str]:
    copy = shutil.copy(ROOT / "cluster" / "commands.py", folder / "commands.py")
    copy.write_text(copy.read_text() + "# mine\n")
    return str(copy), str(ROOT / "cluster" / "commands.py")


def other_deepspeed(folder: Path) -> tuple[str, str]:
    (metadata,) = [file for file in importlib.metadata.files("deepspeed") or () if file.name == "METADATA"]
    text = Path(metadata.locate()).read_text()
    version = importlib.metadata.version("deepspeed")
    (folder / "METADATA").write_text(text.replace(f"\nVersion: {version}\n", "\nVersion: 0.0.1\n", 1))
    return str(folder / "METADATA"), str(metadata.locate())


def other_shards(folder: Path, shards: Path) -> tuple[str, str]:
    copy = folder / "shards"
    shutil.copytree(shards, copy)
    first, second, *_ = sorted(copy.glob("*.tar"))
    first.unlink()
    os.truncate(second, second.stat().st_size - 512)
    return str(copy), str(shards)


@contextlib.contextmanager
def late_sshd(network: Network) -> Iterator[None]:
    """Starts another sshd on node1, whose sessions have a clock that is ahead. ``ssh late`` connects to it."""
    folder = network.bin.parent
    library = folder / "late.so"
    compiler = [needed("gcc", "g++"), "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=LATE_CLOCK, text=True, check=True)
    settings = (folder / "sshd_config").read_text()
    (folder / "sshd_late").write_text("Port 2222\n" + settings.replace("SetEnv ", f"SetEnv LD_PRELOAD={library} "))
    late = f"{network.hosts[1].address}\n    Port 2222"
    addresses = {"late": late, "same": network.hosts[0].address, "gone": network.gone}
    known = "".join(f"Host {name}\n    HostName {address}\n" for name, address in addresses.items())
    ssh_config = folder / "ssh_config"
    before = ssh_config.read_text()
    ssh_config.write_text(known + before)
    command = network.hosts[1].enter("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_late"))
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 20
        while execute([str(network.bin / "ssh"), "late", "true"]).returncode:
            assert time.time() < deadline, "the late sshd does not answer"
            time.sleep(0.2)
        yield
    finally:
        ssh_config.write_text(before)
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture(scope="module")
def broken(
    network: Network, small_pretraining: SmallPretraining, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The JSON of check with all problems at the same time."""
    needed("nft", "nftables")
    folder = tmp_path_factory.mktemp("broken")
    runs, (node0, node1) = folder / "runs", network.hosts
    runs.mkdir()
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in ("node0", "same", "node1", "late", "gone")))
    small = ("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    taken = subprocess.Popen(node0.enter(PYTHON, "-m", "http.server", str(TORCH_PORT)), stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as problems:
        problems.callback(taken.wait, timeout=10)
        problems.callback(taken.terminate)
        for source, target in (
            other_code(folder), other_deepspeed(folder), other_shards(folder, small_pretraining.shards)
        ):  # fmt: skip
            problems.enter_context(node1.mounted("--bind", source, target))
        problems.enter_context(node1.mounted(*small, "/dev/shm"))
        problems.enter_context(node1.mounted(*small, str(runs)))
        node1.run("nft", FIREWALL)
        problems.callback(node1.run, "nft", "flush", "ruleset")
        problems.enter_context(late_sshd(network))
        words = [
            "--folder",
            str(runs),
            "--free-gb",
            "0.1",
            "--shm-gb",
            "0.1",
            "--shards",
            str(small_pretraining.shards),
        ]
        command = [PYTHON, "-m", "cluster", "check", "--hostfile", str(hostfile), *words, "--json"]
        done = execute(command, network.variables)
    assert done.returncode == 1, done.stdout
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("host", "problem", "remedy"),
    [
        ("gone", "exit code 255: ssh: connect to host", "see what `ssh gone hostname` says"),
        ("node1", "the code of cluster is not that of the other hosts", "at the same commit"),
        ("node1", "deepspeed is 0.0.1, elsewhere", "use one environment on all hosts"),
        ("node1", "/runs, 0.1 wanted", "free some space"),
        ("node1", "0.0 GB free in /dev/shm, 0.1 wanted", "mount -o remount"),
        ("node1", ".tar: No such file or directory, and 1 more", "python -m data_shards verify"),
        ("node1", f":{TORCH_PORT}: timed out", "open the port in the firewalls"),
        ("late", "its clock is +1", "start chronyd"),
        ("node0", f"port {TORCH_PORT} cannot be used: Address already in use", "--master-port"),
    ],
)
def test_problem_is_found(broken: dict[str, Any], host: str, problem: str, remedy: str) -> None:
    found = [each for each in broken["findings"] if each["host"] == host and problem in each["problem"]]
    assert len(found) == 1, broken["findings"]
    assert remedy in found[0]["remedy"]


def test_good_host_has_no_other_problem(broken: dict[str, Any]) -> None:
    assert [each["problem"].split(" ")[0] for each in broken["findings"] if each["host"] in ("node0", "same")] == [
        "port"
    ]
    assert broken["rates"] is None, "hosts with problems are not measured"


def test_truncated_and_missing_shards_have_different_messages(broken: dict[str, Any]) -> None:
    (node1,) = [row for row in broken["hosts"] if row["host"] == "node1"]
    assert sorted(problem.split(" ")[-1] for problem in node1["shards"]["problems"].values()) == [
        "directory",
        "manifest",
    ]


def test_slow_host_is_named(network: Network) -> None:
    """After the rendezvous, the rank of node1 shares a core with four processes of higher priority."""
    words = ("--free-gb", "0", "--shm-gb", "0", "--slow-share", "0.6", "--json")
    first, *_, last = sorted(os.sched_getaffinity(0))
    done: list[subprocess.CompletedProcess[str]] = []
    checking = threading.Thread(target=lambda: done.append(network.cluster("check", *words)))
    checking.start()
    others: list[subprocess.Popen[bytes]] = []
    try:
        ranks = [wait_until(partial(rank_on, host.name), checking) for host in network.hosts]
        wait_until(partial(has_connection, ranks[1].pid), checking)
        for rank, core in zip(ranks, (first, last)):
            rank.cpu_affinity([core])
        set_priority(ranks[0].pid, -20)  # above other work on this machine
        set_priority(ranks[1].pid, 10)
        spin = ["taskset", "-c", str(last), "sh", "-c", "while :; do :; done"]
        others += [subprocess.Popen(spin) for _ in range(4)]
        checking.join()
    finally:
        for process in others:
            process.kill()
            process.wait()
    report = json.loads(done[0].stdout)
    assert done[0].returncode == 1, report["rates"]
    assert [each["host"] for each in report["findings"]] == ["node1"], report
    assert "computes at" in report["findings"][0]["problem"]
    assert "every step waits for it" in report["findings"][0]["remedy"]
    assert report["rates"]["all_reduce_gb_s"] > 0
    assert [link[:2] for link in report["rates"]["links"]] == [[0, 1]]


def set_priority(pid: int, nice: int) -> None:
    """Sets the priority of the process, and of its session if the kernel groups processes by session."""
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def has_connection(pid: int) -> bool:
    """Whether the host of the process has a connection to the rendezvous. psutil shows only those of this machine."""
    tables = [Path(f"/proc/{pid}/net/{kind}").read_text() for kind in ("tcp", "tcp6")]
    return any(f":{TORCH_PORT:04X} 01 " in table for table in tables)


def wait_until(condition: Callable[[], Any], checking: threading.Thread) -> Any:
    """Returns the first true value of ``condition`` while check runs."""
    while checking.is_alive():
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("check ended before its ranks were found")


def rank_on(host: str) -> psutil.Process | None:
    """The rank of rank_rates.py on the host. Ranks are numbered like the hosts."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        with contextlib.suppress(psutil.Error, KeyError):
            rank = measure_speed.RANK_PROGRAM in words and "deepspeed.launcher.launch" not in words
            if rank and process.environ()["RANK"] == host.removeprefix("node"):
                return process
    return None


def test_this_machine_and_shards_behind_a_url(small_pretraining: SmallPretraining) -> None:
    folder = small_pretraining.shards
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shards = f"http://127.0.0.1:{server.server_port}/"
    words = ["--free-gb", "0", "--shm-gb", "0", "--measure", "false", "--shards", shards]
    fine = execute([PYTHON, "-m", "cluster", "check", *words])
    gone = verify_shards(f"{shards}nothing/")
    server.shutdown()
    server.server_close()
    assert fine.returncode == 0, fine.stdout
    assert "nothing found" in fine.stdout
    assert fine.stdout.split()[:3] == ["host", "slots", "python"]
    tars = list(folder.glob("*.tar"))
    own = verify_shards(str(folder))
    assert fine.stdout.splitlines()[1].split()[-2:] == [str(len(tars)), "-"], "all shards are counted"
    assert (own["count"], own["bytes"]) == (len(tars), sum(path.stat().st_size for path in tars))
    assert gone["wrong"] == 1
    (found,) = find_problems([probe_of("a", shards=gone)], CheckConfig(shards=shards))
    assert "has no manifest.json" in found.problem
    assert "credentials" in found.remedy


def probe_of(host: str, **changes: Any) -> dict[str, Any]:
    """A row of a GPU host, because this machine has no GPUs."""
    versions = {"python": "3.11.7", "torch": "2.14.1", "deepspeed": "0.19.8", "cuda": "13.0", "nccl": "2.28.3"}
    sizes = {"count": 8, "slots": 8, "free_gb": 500.0, "shm_gb": 60.0, "skew_s": 0.1, "tflops": 700.0}
    code = {"code": {"cluster": "0a"}, "commit": "abc", "shards": None, "accelerator": "H200"}
    return {"host": host, **versions, **sizes, **code, **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"nccl": "2.27.5"}, "nccl is 2.27.5, elsewhere 2.28.3"),
        ({"deepspeed": "missing"}, "deepspeed is missing"),
        ({"accelerator": "cpu", "count": 0}, "accelerator is cpu, elsewhere H200"),
        ({"count": 4}, "8 slots for 4 GPUs"),
        ({"free_gb": None}, ". does not exist"),
    ],
)
def test_gpu_host_with_a_problem(changes: dict[str, Any], problem: str) -> None:
    rows = [probe_of("a"), probe_of("b")]
    assert find_problems(rows, CheckConfig()) == []
    found = find_problems([*rows, probe_of("c", **changes)], CheckConfig())
    assert [(finding.host, finding.problem) for finding in found] == [("c", problem)]


def test_slow_link_and_slow_network_are_named() -> None:
    rows = [probe_of(name) for name in "abc"]
    rates = {"links": [[0, 8, 24.0], [8, 16, 3.0], [16, 0, 23.0]], "all_reduce_gb_s": 90.0}
    slow, low = check_speeds(rows, rates, CheckConfig(all_reduce_gb_s=100))
    assert (slow.host, "3 GB/s from b" in slow.problem) == ("c", True)
    assert low.problem == "all-reduce at 90 GB/s, 100 wanted"


def test_check_does_not_wait_for_ranks_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for ranks that ignore SIGTERM, nor for a process of another session that keeps their output open."""
    monkeypatch.setattr(measure_speed, "END_SECONDS", 0.3)
    code, output = measure_speed.run_with_limit(
        ["bash", "-c", "trap '' TERM; echo begun; sleep 60; sleep 60"], None, 0.3
    )
    assert (code, output) == (None, "begun\n")
    code, output = measure_speed.run_with_limit(["bash", "-c", "setsid sleep 3 & sleep 60"], None, 0.3)
    assert code is None
    assert "is still running" in output
