"""``python -m cluster check|launch|sbatch|faults|plan|simulate [options] [-- MODULE options of the run]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from priorclip.cluster.commands import CheckConfig, FaultsConfig, LaunchConfig, PlanConfig, SbatchConfig, SimulateConfig
from priorclip.common.command_line import run_command
from priorclip.common.masking import deny_other_writers, masked_command
from priorclip.common.options import parse_command
from priorclip.common.output import get_logger, say, set_up_logging

logger = get_logger(__name__)

COMMANDS = {
    "check": CheckConfig,
    "launch": LaunchConfig,
    "sbatch": SbatchConfig,
    "faults": FaultsConfig,
    "plan": PlanConfig,
    "simulate": SimulateConfig,
}
DESCRIPTION = "Start runs on one machine, the hosts of a hostfile or SLURM. Write the run after --."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: that of the run for ``launch``, 2 for an invalid request."""
    set_up_logging("%(message)s")
    deny_other_writers()
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    own, run = words[:split], words[split + 1 :]
    command, config = parse_command(COMMANDS, own, prog="cluster", description=DESCRIPTION)
    return run_command(f"cluster {command}", lambda: execute(command, config, own, run))


def execute(command: str, config: Any, own: Sequence[str], run: Sequence[str]) -> int:
    """Runs one command and returns its exit code. ``own`` are its words, ``run`` those of the run after ``--``."""
    if command == "check":
        from priorclip.cluster.check.check_hosts import check_hosts

        return check_hosts(config)
    if command == "plan":
        from priorclip.cluster.plan.plan_run import plan

        say(plan(config))
        return 0
    if command == "simulate":
        from priorclip.cluster.plan.scaling import simulate

        say(simulate(config))
        return 0
    warn_of_secrets(run)
    if not run:
        example = f"python -m cluster {' '.join(own)} -- pretrain --config FILE.yaml"
        raise ValueError(f"the command of the run is missing: {example}")
    if command == "launch":
        from priorclip.cluster.launch.start_run import launch

        return launch(config, run)
    if command == "faults":
        from priorclip.cluster.faults.inject_faults import inject_faults

        return inject_faults(config, run)
    from priorclip.cluster.launch.sbatch import submit

    return submit(config, run)


def warn_of_secrets(run: Sequence[str]) -> None:
    """Logs a warning if an option of the run looks like a secret."""
    if masked_command(run) != " ".join(run):
        logger.warning(
            "an option of the run looks like a secret, and every user of its hosts can read it in the list of"
            " processes: put it into the environment instead"
        )


if __name__ == "__main__":
    sys.exit(main())
