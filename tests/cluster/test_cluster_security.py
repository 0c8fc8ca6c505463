"""No secret is written, others cannot write files, ranks listen on one network only, and names inject no commands."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from network_hosts import Host, Network
from toy_launches import ToyRun, toy_arguments

from priorclip.cluster.commands import LaunchConfig, SbatchConfig
from priorclip.cluster.launch.command_line import deepspeed_command
from priorclip.cluster.launch.hostfile import read_hostfile
from priorclip.cluster.launch.sbatch import render_script
from priorclip.common.masking import masked, masked_command, masked_values
from priorclip.common.output import SafeFormatter
from priorclip.common.ports import TORCH_PORT
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

SECRETS = ("hunter2isnotgood", "9f86d081884c7d65", "AKIAIOSFODNN7EXAMPLE")
NOTE = f"https://me:{SECRETS[0]}@host/a.tar?X-Amz-Signature={SECRETS[1]}&part=1 {SECRETS[2]}"


@dataclass(frozen=True)
class Launch:
    """A run over pdsh that stopped at a checkpoint, and the (address, port) pairs on which it listened."""

    run: ToyRun
    node0: Host
    listened: set[tuple[str, int]]


@pytest.fixture(scope="module")
def launch(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A run with umask 000, in a directory whose name needs quoting for a remote shell, pdsh and DeepSpeed."""
    folder = tmp_path_factory.mktemp("security") / "it's {a,b} $HOME `id` 50%n"
    words = toy_arguments(folder, "--kill_at", "6", "--hub_token", SECRETS[0], "--note", NOTE)
    done: list[subprocess.CompletedProcess[str]] = []
    command = ["launch", "--", "tests.toy_run", *words]
    thread = threading.Thread(target=lambda: done.append(network.cluster(*command)))
    listened: set[tuple[str, int]] = set()
    before_run = listening(network.hosts[0])  # SLURM's daemon of the host, if another test has started one
    old_umask = os.umask(0)
    try:
        thread.start()
        while thread.is_alive():
            listened |= listening(network.hosts[0]) - before_run
            time.sleep(0.05)
    finally:
        os.umask(old_umask)
    return Launch(ToyRun(folder, done[0].returncode, done[0].stdout), network.hosts[0], listened)


def listening(host: Host) -> set[tuple[str, int]]:
    """(address, port) pairs on which programs of the host listen, except its sshd."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{host.pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            packed, _, port = local.partition(":")
            words = [bytes.fromhex(packed[place : place + 8])[::-1] for place in range(0, len(packed), 8)]
            if state == "0A" and int(port, 16) != 22:
                found.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return found


def test_run_over_pdsh_stops_at_a_checkpoint(launch: Launch) -> None:
    assert launch.run.ended == REQUEUE_EXIT_CODE, launch.run.output
    assert [path.name for path in launch.run.folder.parent.iterdir()] == [launch.run.folder.name]
    assert list(launch.run.records("train/loss")) == list(range(1, 8))


def test_no_secret_is_written_or_printed(launch: Launch) -> None:
    files = [path for path in launch.run.folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in files}
    for secret in SECRETS:
        assert secret not in launch.run.output
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert "https://***@host/a.tar?X-Amz-Signature=***&part=1" in (launch.run.folder / "config.yaml").read_text()
    assert "note: https://***@host" in launch.run.output, "the rank's own log line"
    assert "put it into the environment" in launch.run.output, "a secret in an option causes a warning"


def test_no_file_can_be_written_by_others(launch: Launch) -> None:
    for path in (launch.run.folder, *launch.run.folder.rglob("*")):
        assert not path.stat().st_mode & 0o002, path


def test_ranks_listen_only_on_the_network_of_the_cluster(launch: Launch) -> None:
    assert (launch.node0.address, TORCH_PORT) in launch.listened
    assert {address for address, _ in launch.listened} <= {launch.node0.address, "127.0.0.1"}
    assert launch.node0.public not in {address for address, _ in launch.listened}


SECRET = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP0123456789/+_", min_size=12, max_size=40)
PLACES = (
    "https://user:{}@host/x", "s3://b/k?X-Amz-Signature={}&a=1", "https://host/x?token={}", "--run.hub_token {}",
    "['--hub_token', '{}', '--x']",
    "--api-key={}", "HF_TOKEN={}", "aws_secret_access_key: '{}'", '{{"password": "{}"}}', "Authorization: Bearer {}",
    "db_password = {}", "access_token={}",
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(secret=SECRET, place=st.sampled_from(PLACES), around=st.text("abc =:\n\"'", max_size=8))
def test_secret_is_masked_everywhere(secret: str, place: str, around: str) -> None:
    # A slash ends the part of a URL that can hold a password.
    assume("/" not in secret or "user:" not in place)
    assume(not secret.isdigit())
    text = masked(f"{around} {place.format(secret)} {around}")
    assert secret not in text
    assert masked(text) == text
    if place.startswith("--"):
        assert secret not in masked_command(place.format(secret).split(" "))


@pytest.mark.parametrize(
    "text",
    ["tokenizer: data/tokenizer", "instruction_token: true", "max_tokens: 77", "pooling: token", "s3://rs5m/a.tar",
     "ssh://git@host/x", "--data.shards {pub11,rs3}-train-{0000..0031}.tar", "lr: 0.001", "http://host:8080/x?page=2",
     "keys: [a, b]", "hub/laion/CLIP-ViT-B-32"],
)  # fmt: skip
def test_text_without_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_values_are_masked_by_their_names() -> None:
    values = {"s3": {"secret_access_key": "abc", "region": "eu"}, "urls": [NOTE], "tokens": 77, "token": ""}
    shown = masked_values(values)
    assert shown["s3"] == {"secret_access_key": "***", "region": "eu"}
    assert (shown["tokens"], shown["token"]) == (77, "")
    assert not any(secret in str(shown) for secret in SECRETS)


def test_traceback_in_a_log_is_masked() -> None:
    try:
        raise OSError(f"cannot read {NOTE}")
    except OSError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "x", 1, "fails: %s", (error,), (OSError, error, error.__traceback__)
        )
    text = SafeFormatter("%(message)s").format(record)
    assert "Traceback" in text
    assert not any(secret in text for secret in SECRETS)


NASTY = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        ["$(touch {})", "`touch {}`", "; touch {} #", "\ntouch {}\n", "a\n#SBATCH --wrap=touch {}", "&& touch {}",
         "-oProxyCommand=touch {}", "x|touch {}", "'; touch {}; '", '"; touch {}; "', ">{}", "node0;touch {}",
         "node0$(touch {})", "node0\n", "node0 ", "node0"],
    ),
)  # fmt: skip
OPTIONS = ("job_name", "partition", "account", "qos", "time", "logs", "container", "python")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NASTY)
def test_hostfile_and_addresses_accept_only_names(name: str, tmp_path: Path) -> None:
    """Accepted names are plain: no shell, ssh or pdsh can read them as something else."""
    path = tmp_path / "hosts"
    path.write_text(f"{name} slots=2\n")
    try:
        hosts = list(read_hostfile(path))
    except (ValueError, UnicodeError):
        hosts = []
    for address in (name, *hosts):
        try:
            config = LaunchConfig(launcher="node", nodes=1, node_rank=0, master_addr=address, master_port=1)
            command = deepspeed_command(config, ["pretrain"], {"DS_ACCELERATOR": "cpu"})
        except ValueError:
            assert address not in hosts
            continue
        assert re.fullmatch(r"[A-Za-z0-9_][\w.@-]*", address, re.ASCII), address
        assert f"--master_addr={address}" in command


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NASTY, option=st.sampled_from(OPTIONS))
def test_names_in_a_batch_script_run_no_command(name: str, option: str, tmp_path: Path) -> None:
    """A real bash runs the rendered script. srun and scontrol do nothing."""
    trap = tmp_path / "touched"
    assume("\0" not in name)
    try:
        script = render_script(
            SbatchConfig(**{option: name.replace("{}", str(trap))}), ["pretrain", name.replace("{}", str(trap))]
        )
        script.encode()
    except (ValueError, UnicodeError):
        return
    # sbatch reads only to the first command.
    for line in script.partition("\nset -uo")[0].splitlines():
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=[\w.+,@%:/={}-]+)?|#(?!SBATCH).*|", line), line
    harmless = "srun() { :; }\nscontrol() { :; }\n" + script
    subprocess.run(["bash", "-c", harmless], capture_output=True, cwd=tmp_path, check=False)
    assert not trap.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"hosts"}
