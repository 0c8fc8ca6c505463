"""``python -m model COMMAND``: see each command's --help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from priorclip.common.command_line import run_command
from priorclip.common.options import parse_command
from priorclip.common.output import quiet, say, set_up_logging
from priorclip.model.commands import (
    COMMANDS,
    BenchConfig,
    ConvertConfig,
    ExportConfig,
    FetchConfig,
    PushConfig,
    SummaryConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 2 wrong options or input."""
    set_up_logging("%(levelname)s %(message)s")
    quiet("httpx", "timm", "transformers")
    run: dict[str, Callable[[Any], None]] = {
        "convert": run_convert,
        "export": run_export,
        "push": run_push,
        "fetch": run_fetch,
        "summary": run_summary,
        "bench": run_bench,
    }
    name, config = parse_command(COMMANDS, argv, prog="model", description="Convert, export and measure models.")
    return run_command(f"model {name}", lambda: run[name](config))


def run_convert(config: ConvertConfig) -> None:
    from priorclip.model.convert import convert

    converted = convert(config)
    size = sum(tensor.numel() for tensor in converted.state.values()) / 1e6
    say(f"{config.output}: {converted.config.kind}, {size:.1f} M values")
    for note in converted.notes:
        say(f"  {note}")
    say(f"  keys of {config.input} that were not used: {len(converted.unused)}")
    for name in converted.unused:
        say(f"    {name}")


def run_export(config: ExportConfig) -> None:
    from priorclip.model.export.formats import export

    say(export(config))


def run_push(config: PushConfig) -> None:
    from priorclip.model.export.push import push

    say(push(config))


def run_fetch(config: FetchConfig) -> None:
    from priorclip.model.fetch import fetch

    for line in fetch(config):
        say(line)


def run_summary(config: SummaryConfig) -> None:
    from priorclip.model.cost.summary import summary_report

    say(summary_report(config))


def run_bench(config: BenchConfig) -> None:
    from priorclip.model.cost.step_bench import bench_report

    say(bench_report(config))


if __name__ == "__main__":
    sys.exit(main())
