"""``cluster faults`` on a SLURM of two nodes: kills, real requeues, and the same result at the end."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

from loopback_slurm import Slurm
from toy_launches import BASE, PYTHON, execute

from priorclip.cluster.faults.run_processes import RunProcesses
from priorclip.cluster.launch.sbatch import TEMPLATES

KINDS = ("write", "daemon", "stop", "notice")
STEPS = 24
RUN = (*BASE, "--run.epochs", "4", "--run.engine.hang_minutes", "0.1", "--run.checkpoint.every", "2",
       "--late", "data", "--dropout", "0.2", "--draws", "true")  # fmt: skip


def give_early_notice(slurm: Slurm, folder: Path) -> None:
    """Sends the notice to the job of the run in ``folder`` while its two ranks import torch."""
    processes, deadline = RunProcesses(str(folder)), time.time() + 120
    while len(processes.ranks()) < 2 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(0.7)
    job = processes.job()
    assert job
    slurm.ask("scancel", "--signal=USR1", job)


def test_killed_run_has_the_result_of_an_undisturbed_run(slurm: Slurm, tmp_path: Path) -> None:
    """`cluster sbatch --retries` requeues the job. It has two ranks, one on each node."""
    folder, template = tmp_path / "trial", tmp_path / "run.sbatch"
    template.write_text(TEMPLATES["srun"].read_text().replace("--wait=45", "--wait=5"))
    faults = ("faults", "--launcher", "slurm", "--nodes", "2", "--nproc", "1", "--kills", str(len(KINDS)),
              "--kinds", f"[{','.join(KINDS)}]", "--folder", str(folder), "--template", str(template))  # fmt: skip
    early = threading.Thread(target=give_early_notice, args=(slurm, folder / "whole"))
    early.start()  # even so, the result of the undisturbed run must be the same
    done = execute([PYTHON, "-m", "cluster", *faults, "--", "tests.toy", *RUN], slurm.environment)
    early.join()
    assert done.returncode == 0, done.stdout
    report = json.loads((folder / "report.json").read_text())
    assert report["by_kind"] == dict.fromkeys(KINDS, 1)
    assert report["differences"] == []
    assert "4 kills survived" in (folder / "report.md").read_text()
    logs = {re.sub(r"-\d+(?=[.-])", "", path.name, count=1): path.read_text() for path in (folder / "logs").iterdir()}
    whole, killed = (
        {f"faults-{name}{end}" for end in (".log", "-0-node0.log", "-1-node1.log")} for name in ("whole", "shot")
    )
    assert set(logs) == whole | killed | {"faults-shot.failures"}, "an early notice is no failure"
    assert len(logs["faults-shot.failures"].splitlines()) == len(KINDS) - 1, "a notice is no failure"
    assert logs["faults-whole.log"].count("goes back into the queue") == 1, "because the notice came while it started"
    output = "".join(logs[name] for name in sorted(killed))
    assert output.count("goes back into the queue") == len(KINDS)
    assert re.search(rf"stopped at step \d+ of {STEPS}: run the same command again", output)
    hang = re.search(r"rank (\d) on node\1 \(process \d+\) hangs: no sign of life for 6 s. It is killed(.*\n)+", output)
    assert hang, output
    assert "State:\tT (stopped)" in hang[0]
    assert "toy_run.py" in hang[0].split("last at:")[1], "its Python stack"
