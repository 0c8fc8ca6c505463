"""Runs every command of docs/cluster.md on real hosts, SLURM, sshd, pdsh and MPI: the result is always the same.

The test changes only paths, the number of GPUs of a host, and host names in the commands of the page.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from loopback_slurm import Slurm
from network_hosts import Network, start, wait_for_end
from small_pretraining import EPOCHS, GLOBAL_BATCH, IMAGES, SmallPretraining
from toy_launches import PYTHON, ROOT

PAGE = ROOT / "docs" / "cluster.md"
BLOCK = re.compile(r"^```bash(?P<hosts>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
CONFIG = "pretrain/configs/rs5m-b32.yaml"
COMMANDS = [(found["hosts"].strip(), found["text"].strip()) for found in BLOCK.finditer(PAGE.read_text())]
RUNS = [text for _, text in COMMANDS if CONFIG in text and "--dry-run" not in text]
OTHERS = [text for _, text in COMMANDS if text not in RUNS]
STEPS = EPOCHS * IMAGES // GLOBAL_BATCH


@dataclass(frozen=True)
class Finished:
    """A finished command of the page: its run directory, exit code and output."""

    folder: Path
    code: int
    output: str

    def trace(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm of each step."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        trained = [record for record in records if "train/loss" in record]
        return {record["step"]: (record["train/loss"], record["train/grad_norm"]) for record in trained}


@dataclass(frozen=True)
class PageRunner:
    """Runs commands of the page."""

    network: Network
    slurm: Slurm
    pretraining: SmallPretraining
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        # Open MPI refuses root without these variables; only tests run as root.
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**self.network.variables, **self.slurm.environment, **root}

    def run(self, hosts: str, text: str) -> Finished:
        place = self.folder / str(len(list(self.folder.iterdir())))
        place.mkdir()
        logs = place / "logs"
        config = self.pretraining.config(place / "config.yaml", place / "run")
        for old, new in (
            (CONFIG, str(config)),
            ("cluster.hosts", str(self.network.hostfile)),
            ("data/rs5m", str(self.pretraining.shards)),
            ("runs/logs", str(logs)),
            ("-n 16 python", f"-n 2 {PYTHON}"),  # root's remote shell finds another python first
        ):
            text = text.replace(old, new)
        text = re.sub(r"(--\S+-per-node|--nproc) 8", r"\1 1", text)
        if "cluster check" in text:  # the hosts share the cores and disk of this busy machine
            text += " --slow-share 0.1 --free-gb 0.5"
        shell = ["bash", "-euo", "pipefail", "-c", text]
        if hosts == "every host":
            processes = [start(host.enter(*shell), self.variables) for host in self.network.hosts]
        else:
            processes = [start(shell, self.variables)]
        results = [wait_for_end(process) for process in processes]
        code = max(result.returncode for result in results)
        output = "".join(result.stdout for result in results)
        submitted = re.search(r"Submitted batch job (\d+)", output)
        if submitted:
            fields, output = self.slurm.wait(submitted[1], logs)
            code = 0 if fields["JobState"] == "COMPLETED" else 1
        return Finished(place / "run", code, output)


@pytest.fixture(scope="module")
def page(
    network: Network, slurm: Slurm, small_pretraining: SmallPretraining, tmp_path_factory: pytest.TempPathFactory
) -> PageRunner:
    return PageRunner(network, slurm, small_pretraining, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def on_this_machine(page: PageRunner) -> Finished:
    """Two ranks of one machine, the reference for all other commands."""
    (command,) = [text for text in RUNS if text.startswith("python -m cluster launch -- ")]
    finished = page.run("", command)
    assert finished.code == 0, finished.output
    assert list(finished.trace()) == list(range(1, STEPS + 1))
    return finished


def test_page_has_every_launch_path() -> None:
    hosts = "--hostfile cluster.hosts"
    prefixes = ("python -m pretrain", "cluster launch -- ", f"cluster launch {hosts} -- ", f"deepspeed {hosts}",
              f"cluster launch {hosts} --launcher openmpi", f"mpirun {hosts}", "torchrun --nnodes 2",
              "cluster launch --launcher node", "cluster sbatch --nodes 2", "cluster sbatch --launcher node",
              f"--ntasks-per-node 8 python -m cluster launch {hosts} --launcher slurm",
              )  # fmt: skip
    for prefix in prefixes:
        assert any(prefix in text for text in RUNS), prefix


@pytest.mark.parametrize("command", [text for text in RUNS if not text.startswith("python -m cluster launch -- ")])
def test_run_is_the_same_to_the_last_bit(command: str, page: PageRunner, on_this_machine: Finished) -> None:
    (hosts,) = [hosts for hosts, text in COMMANDS if text == command]
    finished = page.run(hosts, command)
    assert finished.code == 0, finished.output
    if command.startswith("python -m pretrain"):  # one rank sums in another order
        for step, figures in on_this_machine.trace().items():
            assert finished.trace()[step] == pytest.approx(figures, rel=1e-5)
        return
    assert finished.trace() == on_this_machine.trace(), finished.output
    weights, expected = (each.folder / "export" / "model.safetensors" for each in (finished, on_this_machine))
    assert weights.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_of_the_page(command: str, page: PageRunner) -> None:
    finished = page.run("", command)
    assert finished.code == 0, finished.output
