"""The rules of ``cluster check``: they find problems that would stop a run or make it slow.

    find_problems(rows, config)  ->  [Finding("worker-1", "torch is 2.13.0, elsewhere 2.14.1", "use one environ...")]

A row is the description of a host (host_probe.py) with ``slots``, ``skew_s``, ``listening``, ``reached`` and ``tflops``
added. The row of a host without an answer has only ``error``.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from priorclip.cluster.commands import CheckConfig

Row = dict[str, Any]
VERSIONS = ("python", "torch", "deepspeed", "cuda", "nccl", "accelerator")


@dataclass(frozen=True)
class Finding:
    """A problem that would stop a run on ``host`` or make it slow, and its remedy."""

    host: str
    problem: str
    remedy: str


def find_problems(rows: Sequence[Row], config: CheckConfig) -> list[Finding]:
    """Returns the problems of all hosts except slow compute and network (see check_speeds)."""
    answered = [row for row in rows if "error" not in row]
    findings = [no_answer(row, config) for row in rows if "error" in row]
    for name in VERSIONS:
        findings += check_versions(name, answered)
    findings += check_code(answered)
    for row in answered:
        findings += [*check_capacity(row, config), *check_ports(row, answered), *check_shards(row, answered, config)]
    return findings


def no_answer(row: Row, config: CheckConfig) -> Finding:
    remedy = f"see what `ssh {row['host']} hostname` says" if config.hostfile else "install the project there"
    return Finding(row["host"], row["error"], f"{remedy}; {sys.executable} and {os.getcwd()} must be there")


def most_common(values: Sequence[Any]) -> Any:
    """The value that most hosts have; if two are equally frequent, the one that comes first."""
    return Counter(values).most_common(1)[0][0] if values else None


def check_versions(name: str, rows: Sequence[Row]) -> Iterator[Finding]:
    most = most_common([row[name] for row in rows])
    for row in rows:
        if row[name] == "missing":
            yield Finding(row["host"], f"{name} is missing", f"install it for {sys.executable}")
        elif row[name] != most:
            remedy = "remove the host" if name == "accelerator" else "use one environment on all hosts"
            yield Finding(row["host"], f"{name} is {row[name]}, elsewhere {most}", remedy)


def check_code(rows: Sequence[Row]) -> Iterator[Finding]:
    most = {name: most_common([row["code"][name] for row in rows]) for name in (rows[0]["code"] if rows else ())}
    for row in rows:
        others = [name for name, value in row["code"].items() if value != most[name]]
        if others:
            problem = f"the code of {', '.join(others)} is not that of the other hosts (commit {row['commit']} there)"
            yield Finding(
                row["host"], problem, f"check {os.getcwd()} out there at the same commit, without local changes"
            )


def check_capacity(row: Row, config: CheckConfig) -> Iterator[Finding]:
    """Accelerators, disk, shared memory and clock of one host."""
    host, folder = row["host"], config.folder
    if row["count"] and row["count"] != row["slots"]:
        remedy = f"write slots={row['count']}" if config.hostfile else f"ask for {row['count']} a node"
        yield Finding(host, f"{row['slots']} slots for {row['count']} GPUs", remedy)
    if row["free_gb"] is None:
        yield Finding(host, f"{folder} does not exist", "mount it, or pass --folder")
    elif row["free_gb"] < config.free_gb:
        remedy = f"free some space, or accept less with --free-gb {row['free_gb']:g}"
        yield Finding(host, f"{row['free_gb']} GB free in {folder}, {config.free_gb:g} wanted", remedy)
    if row["shm_gb"] is None or row["shm_gb"] < config.shm_gb:
        remedy = "mount -o remount,size=16G /dev/shm, or docker run --shm-size=16g"
        yield Finding(host, f"{row['shm_gb']} GB free in /dev/shm, {config.shm_gb:g} wanted", remedy)
    if abs(row["skew_s"]) > config.skew_seconds:
        yield Finding(host, f"its clock is {row['skew_s']:+.1f} s off", "start chronyd or timesyncd there")


def check_ports(row: Row, rows: Sequence[Row]) -> Iterator[Finding]:
    """Checks the rendezvous port on the first host and the ports between the ranks of any two hosts."""
    if row.get("listening"):
        remedy = f"end the program that uses it (`ss -ltnp sport = :{row['port']}` there), or pass --master-port"
        yield Finding(row["host"], f"port {row['port']} cannot be used: {row['listening']}", remedy)
    reached = row.get("reached", {})
    refused = {name: answer["error"] for name, answer in reached.items() if "error" in answer}
    first = next((each for each in rows if "master" in each), None)  # None if that host has failed since
    if first and "rendezvous" in refused:
        others = [address for address in first["addresses"] if "from" in reached.get(address, {})]
        problem = f"cannot connect to {first['host']} at {first['master']}:{first['port']}: {refused['rendezvous']}"
        remedy = f"pass --master-addr {others[0]}, which it reaches" if others else "open the port in the firewalls"
        yield Finding(row["host"], problem, f"{remedy}; the run's first rank listens there")
    for name in [other["host"] for other in rows if other["host"] in refused]:
        remedy = "allow connections between the hosts on all ports of /proc/sys/net/ipv4/ip_local_port_range"
        yield Finding(row["host"], f"cannot connect to {name} on a port of the ranks: {refused[name]}", remedy)


def check_shards(row: Row, rows: Sequence[Row], config: CheckConfig) -> Iterator[Finding]:
    here = row["shards"]
    if here is None:
        return
    if here["wrong"]:
        name, problem = next(iter(here["problems"].items()))
        more = f", and {here['wrong'] - 1} more" if here["wrong"] > 1 else ""
        remedy = f"mount or copy them again there, then run python -m data_shards verify {config.shards}"
        if "://" in str(config.shards):
            remedy = "check there: the address, the credentials in the environment, and the proxy; a run uses them too"
        yield Finding(row["host"], f"{name}: {problem}{more}", remedy)
    elif here["digest"] != (
        most := most_common([each["shards"]["digest"] for each in rows if not each["shards"]["wrong"]])
    ):
        count = next(each["shards"]["count"] for each in rows if each["shards"]["digest"] == most)
        problem = f"{config.shards} has {here['count']} shards, other names or sizes than the {count} elsewhere"
        yield Finding(row["host"], problem, "use the same shards on every host")


def check_speeds(rows: Sequence[Row], rates: dict[str, Any], config: CheckConfig) -> Iterator[Finding]:
    """Finds hosts and links that are much slower than the others, and an all-reduce below ``all_reduce_gb_s``."""
    for row in rows:
        others = [other["tflops"] for other in rows if other is not row]
        if others and row["tflops"] < config.slow_share * (most := statistics.median(others)):
            problem = f"computes at {row['tflops']:.3g} TFLOP/s a rank, the other hosts at {most:.3g}"
            remedy = (
                "look there for other jobs (top, nvidia-smi), heat and power limits (nvidia-smi -q -d PERFORMANCE), "
            )
            yield Finding(row["host"], problem, remedy + "or remove the host: every step waits for it")
    for first, second, rate in rates["links"]:
        others = [link[2] for link in rates["links"] if link[:2] != [first, second]]
        if len(others) > 1 and rate < config.slow_share * (most := statistics.median(others)):
            problem = f"gets {rate:.3g} GB/s from {host_of(rows, first)}, other links have {most:.3g}"
            yield Finding(host_of(rows, second), problem, "check its cable, port and interface (ethtool, ibstat)")
    rate = rates["all_reduce_gb_s"]
    if rate is not None and rate < config.all_reduce_gb_s:
        problem = f"all-reduce at {rate:.3g} GB/s, {config.all_reduce_gb_s:g} wanted"
        remedy = "NCCL_DEBUG=INFO shows which network NCCL uses; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another"
        yield Finding("all hosts", problem, remedy)


def host_of(rows: Sequence[Row], rank: int) -> str:
    """The host of the rank. Ranks are numbered along the hosts' slots."""
    for row in rows:
        if rank < row["slots"]:
            return row["host"]
        rank -= row["slots"]
    raise IndexError(f"there is no rank {rank}")
