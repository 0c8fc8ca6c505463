"""``python -m cluster faults``: tests on your machine that a run recovers from kills with the same result.

    python -m cluster faults --kills 20 -- pretrain --config c.yaml
    python -m cluster faults --launcher slurm --kills 20 --nodes 2 -- pretrain --config c.yaml

It runs the command without kills, then again in another run directory. In the second run it kills (SIGKILL)
at random points: one rank, all ranks, a node's SLURM step daemon, or a rank that is writing a checkpoint. It can also
stop a rank (SIGSTOP), which the run must detect (run.engine.hang_minutes), or send the job the notice that comes before
a time limit. SLURM requeues the job; on one machine the same command starts again. At the end, the loss of every step
and every tensor of the last checkpoint, with the optimizer state, must be the same to the last bit. ``report.json`` and
``report.md`` give the number of kills of each kind and the time that a kill costs.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorclip.cluster.commands import FaultsConfig
from priorclip.cluster.faults.compare_runs import compare_runs
from priorclip.cluster.faults.kills import Kill, Trial, plan_kills
from priorclip.cluster.faults.restarts import on_slurm, on_this_machine
from priorclip.cluster.faults.run_processes import RunProcesses
from priorclip.cluster.launch.command_line import MODULE
from priorclip.common.output import get_logger, say
from priorclip.training.monitoring.read_metrics import last_record

logger = get_logger(__name__)

POLL_SECONDS = 0.003  # a small checkpoint is written in some ten milliseconds


def inject_faults(config: FaultsConfig, run: Sequence[str]) -> int:
    """Runs the trial. Returns 0 if the run recovered from all kills with the same result, otherwise 1.

    Raises:
        ValueError: the request is invalid. Nothing was started.
    """
    if not MODULE.fullmatch(run[0]):
        raise ValueError(f"'{run[0]}' is not the name of a module: write pretrain, or finetune and its sub-command")
    if "daemon" in config.kinds and config.launcher != "slurm":
        raise ValueError("--kinds daemon kills a step daemon of SLURM: pass --launcher slurm")
    if config.kills < 1:
        raise ValueError(f"--kills {config.kills}: at least one is needed")
    folder = Path(config.folder).absolute()
    if (folder / "whole").exists() or (folder / "shot").exists():
        raise ValueError(f"{folder} already holds a trial: pass another --folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("the run without kills, in %s", folder / "whole")
    whole_seconds = execute(config, run, Trial(folder / "whole", [], random.Random()))
    last_step = (last_record(folder / "whole") or {"step": 0})["step"]
    trial = Trial(folder / "shot", plan_kills(config, last_step), random.Random(config.seed))
    logger.info("the run with %d kills in %d steps, in %s", config.kills, last_step, trial.folder)
    killed_seconds = execute(config, run, trial)
    differences = compare_runs(folder / "whole", trial.folder)
    report = {
        "command": list(run),
        "launcher": config.launcher,
        "steps": last_step,
        "wanted": config.kills,
        "kills": len(trial.kills),
        "by_kind": {kind: sum(kill.kind == kind for kill in trial.kills) for kind in config.kinds},
        "seconds_whole": round(whole_seconds, 1),
        "seconds_shot": round(killed_seconds, 1),
        "seconds_lost_a_kill": round((killed_seconds - whole_seconds) / max(1, len(trial.kills)), 1),
        "same": not differences,
        "differences": differences,
        "each": [kill.record() for kill in trial.kills],
    }
    text = format_faults(report, trial.kills)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(text)
    say(text)
    return 0 if not differences and len(trial.kills) == config.kills else 1


def execute(config: FaultsConfig, run: Sequence[str], trial: Trial) -> float:
    """Runs the command with the kills of the trial until it has finished. Returns the seconds that it took."""
    words = [*run, "--run.dir", str(trial.folder), "--run.log_every", "1", "--run.progress", "false"]
    processes = RunProcesses(str(trial.folder))
    start = time.time()
    restarted = on_slurm if config.launcher == "slurm" else on_this_machine
    for _ in restarted(config, words, trial.folder):
        trial.update(processes)
        time.sleep(POLL_SECONDS)
    return time.time() - start


def format_faults(report: dict[str, Any], kills: list[Kill]) -> str:
    """The report as Markdown."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["by_kind"].items())
    verdict = (
        "The loss of every step and every tensor of the last checkpoint are the same to the last bit."
        if report["same"]
        else "NOT THE SAME: " + "; ".join(report["differences"][:5])
    )
    left = report["wanted"] - report["kills"]
    missing = [f"THE RUN ENDED BEFORE {left} MORE KILLS: use more steps or fewer kills."] if left else []
    lines = [
        f"# {report['kills']} kills survived ({kinds})",
        "",
        f"`{' '.join(report['command'])}`, {report['steps']} steps, launcher {report['launcher']}.",
        f"{report['seconds_whole']} s without kills, {report['seconds_shot']} s with kills:"
        f" a kill costs {report['seconds_lost_a_kill']} s.",
        verdict,
        *missing,
        "",
        *(f"* {kill.text()}" for kill in kills),
    ]
    return "\n".join(lines) + "\n"
