"""What would stop or spoil a run, from what the hosts said: the rules of ``cluster check``.

    findings(rows, config)  ->  [Finding("worker-1", "torch is 2.13.0, elsewhere 2.14.1", "use one environment ...")]

A row is a host's facts (host_probe.py) with ``slots``, ``skew_s``, ``listening``, ``reached`` and ``tflops`` added,
or ``error`` where it did not answer.
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
    """Something that would stop or spoil a run on ``host``, and what to do about it."""

    host: str
    problem: str
    remedy: str


def findings(rows: Sequence[Row], config: CheckConfig) -> list[Finding]:
    """What is wrong, host by host."""
    answered = [row for row in rows if "error" not in row]
    found = [silent(row, config) for row in rows if "error" in row]
    for name in VERSIONS:
        found += versions(name, answered)
    found += code(answered)
    for row in answered:
        found += [*capacity(row, config), *ports(row, answered), *shards(row, answered, config)]
    return found


def silent(row: Row, config: CheckConfig) -> Finding:
    way = f"see what `ssh {row['host']} hostname` says" if config.hostfile else "install the project there"
    return Finding(row["host"], row["error"], f"{way}; {sys.executable} and {os.getcwd()} must be there")


def usual(values: Sequence[Any]) -> Any:
    """The value that most hosts have; of equally many, that of the first host."""
    return Counter(values).most_common(1)[0][0] if values else None


def versions(name: str, rows: Sequence[Row]) -> Iterator[Finding]:
    most = usual([row[name] for row in rows])
    for row in rows:
        if row[name] == "missing":
            yield Finding(row["host"], f"{name} is missing", f"install it for {sys.executable}")
        elif row[name] != most:
            one = "take the host out" if name == "accelerator" else "use one environment on all hosts"
            yield Finding(row["host"], f"{name} is {row[name]}, elsewhere {most}", one)


def code(rows: Sequence[Row]) -> Iterator[Finding]:
    most = {name: usual([row["code"][name] for row in rows]) for name in (rows[0]["code"] if rows else ())}
    for row in rows:
        others = [name for name, value in row["code"].items() if value != most[name]]
        if others:
            problem = f"the code of {', '.join(others)} is not that of the other hosts (commit {row['commit']} here)"
            yield Finding(row["host"], problem, f"bring {os.getcwd()} there to the same commit, without own changes")


def capacity(row: Row, config: CheckConfig) -> Iterator[Finding]:
    """Accelerators, disk, shared memory and clock of one host."""
    host, folder = row["host"], config.folder
    if row["count"] and row["count"] != row["slots"]:
        remedy = f"write slots={row['count']}" if config.hostfile else f"ask for {row['count']} a node"
        yield Finding(host, f"{row['slots']} slots for {row['count']} GPUs", remedy)
    if row["free_gb"] is None:
        yield Finding(host, f"{folder} is not there", "mount it, or pass --folder")
    elif row["free_gb"] < config.free_gb:
        remedy = f"make room, or accept less with --free-gb {row['free_gb']:g}"
        yield Finding(host, f"{row['free_gb']} GB free in {folder}, {config.free_gb:g} wanted", remedy)
    if row["shm_gb"] is None or row["shm_gb"] < config.shm_gb:
        remedy = "mount -o remount,size=16G /dev/shm, or docker run --shm-size=16g"
        yield Finding(host, f"{row['shm_gb']} GB free in /dev/shm, {config.shm_gb:g} wanted", remedy)
    if abs(row["skew_s"]) > config.skew_seconds:
        yield Finding(host, f"its clock is {row['skew_s']:+.1f} s off", "start chronyd or timesyncd there")


def ports(row: Row, rows: Sequence[Row]) -> Iterator[Finding]:
    """The rendezvous port on the first host, and the ports that the ranks of any two hosts talk on."""
    if row.get("listening"):
        remedy = f"end what has it (`ss -ltnp sport = :{row['port']}` there), or choose another with --master-port"
        yield Finding(row["host"], f"port {row['port']} cannot be used: {row['listening']}", remedy)
    reached = row.get("reached", {})
    refused = {name: answer["error"] for name, answer in reached.items() if "error" in answer}
    first = next((each for each in rows if "master" in each), None)  # it may be lost meanwhile, which is said of it
    if first and "rendezvous" in refused:
        others = [address for address in first["addresses"] if "from" in reached.get(address, {})]
        problem = f"cannot connect to {first['host']} at {first['master']}:{first['port']}: {refused['rendezvous']}"
        way = f"pass --master-addr {others[0]}, which it reaches" if others else "open the way in the firewalls"
        yield Finding(row["host"], problem, f"{way}; the run's first rank listens there")
    for name in [other["host"] for other in rows if other["host"] in refused]:
        remedy = "let the hosts connect to each other on all ports of /proc/sys/net/ipv4/ip_local_port_range"
        yield Finding(row["host"], f"cannot connect to {name} on a port of the ranks: {refused[name]}", remedy)


def shards(row: Row, rows: Sequence[Row], config: CheckConfig) -> Iterator[Finding]:
    own = row["shards"]
    if own is None:
        return
    if own["wrong"]:
        name, problem = next(iter(own["problems"].items()))
        more = f", and {own['wrong'] - 1} more" if own["wrong"] > 1 else ""
        remedy = f"mount or copy them again there, then python -m data_shards verify {config.shards}"
        if "://" in str(config.shards):
            remedy = "there: see to address, credentials in its environment, and the network's way out; a run reads so"
        yield Finding(row["host"], f"{name}: {problem}{more}", remedy)
    elif own["digest"] != (most := usual([each["shards"]["digest"] for each in rows if not each["shards"]["wrong"]])):
        count = next(each["shards"]["count"] for each in rows if each["shards"]["digest"] == most)
        problem = f"{config.shards} has {own['count']} shards, other names or sizes than the {count} elsewhere"
        yield Finding(row["host"], problem, "give every host the same shards")


def speeds(rows: Sequence[Row], rates: dict[str, Any], config: CheckConfig) -> Iterator[Finding]:
    """Hosts that compute, and links that carry, much less than the others; an all-reduce below what was asked for."""
    for row in rows:
        others = [other["tflops"] for other in rows if other is not row]
        if others and row["tflops"] < config.slow_share * (most := statistics.median(others)):
            problem = f"computes at {row['tflops']:.3g} TFLOP/s a rank, the other hosts at {most:.3g}"
            remedy = (
                "look for other jobs (top, nvidia-smi), heat and power limits (nvidia-smi -q -d PERFORMANCE) there, "
            )
            yield Finding(row["host"], problem, remedy + "or leave it out: every step waits for it")
    for first, second, rate in rates["links"]:
        others = [link[2] for link in rates["links"] if link[:2] != [first, second]]
        if len(others) > 1 and rate < config.slow_share * (most := statistics.median(others)):
            problem = f"gets {rate:.3g} GB/s from {host_of(rows, first)}, between other hosts it is {most:.3g}"
            yield Finding(host_of(rows, second), problem, "look at its cable, port and interface (ethtool, ibstat)")
    rate = rates["all_reduce_gb_s"]
    if rate is not None and rate < config.all_reduce_gb_s:
        problem = f"all-reduce at {rate:.3g} GB/s, {config.all_reduce_gb_s:g} wanted"
        remedy = "see with NCCL_DEBUG=INFO which network is taken; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another"
        yield Finding("all hosts", problem, remedy)


def host_of(rows: Sequence[Row], rank: int) -> str:
    """Ranks are counted along the hosts' slots."""
    for row in rows:
        if rank < row["slots"]:
            return row["host"]
        rank -= row["slots"]
    raise IndexError(f"there is no rank {rank}")
