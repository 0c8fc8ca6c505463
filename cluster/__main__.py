"""``python -m cluster check|launch|sbatch|faults|plan|simulate [options] [-- MODULE options of the run]``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from priorclip.cluster.commands import CheckConfig, FaultsConfig, LaunchConfig, PlanConfig, SbatchConfig, SimulateConfig
from priorclip.common.command_line import run_command
from priorclip.common.masking import MaskedFormatter, masked_command, shut_out_others
from priorclip.common.options import parse_command

logger = logging.getLogger(__name__)

COMMANDS = {
    "check": CheckConfig,
    "launch": LaunchConfig,
    "sbatch": SbatchConfig,
    "faults": FaultsConfig,
    "plan": PlanConfig,
    "simulate": SimulateConfig,
}
DESCRIPTION = "Start runs on one machine, the hosts of a hostfile or SLURM. What stands after -- is the run."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: the run's own for ``launch``, 2 for a request that makes no sense."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskedFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    shut_out_others()
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

        print(plan(config))
        return 0
    if command == "simulate":
        from priorclip.cluster.plan.scaling import simulate

        print(simulate(config))
        return 0
    warn_of_secrets(run)
    if not run:
        example = f"python -m cluster {' '.join(own)} -- pretrain --config FILE.yaml"
        raise ValueError(f"what to run is missing: {example}")
    if command == "launch":
        from priorclip.cluster.launch.start_run import launch

        return launch(config, run)
    if command == "faults":
        from priorclip.cluster.faults.inject_faults import inject_faults

        return inject_faults(config, run)
    from priorclip.cluster.launch.sbatch import submit

    return submit(config, run)


def warn_of_secrets(run: Sequence[str]) -> None:
    if masked_command(run) != " ".join(run):
        logger.warning(
            "the options of the run hold what looks like a secret, and every user of its hosts can read them in the"
            " list of processes: put it into the environment instead"
        )


if __name__ == "__main__":
    sys.exit(main())
