"""``python -m model COMMAND``: see each command's --help."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from priorclip.common.command_line import run_command
from priorclip.common.options import parse_command
from priorclip.model.commands import COMMANDS, BenchConfig, ConvertConfig, ExportConfig, SummaryConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 2 wrong options or input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    run: dict[str, Callable[[Any], None]] = {
        "convert": run_convert,
        "export": run_export,
        "summary": run_summary,
        "bench": run_bench,
    }
    name, config = parse_command(COMMANDS, argv, prog="model", description="Convert, export and measure models.")
    return run_command(f"model {name}", lambda: run[name](config))


def run_convert(config: ConvertConfig) -> None:
    from priorclip.model.convert import convert

    converted = convert(config)
    size = sum(tensor.numel() for tensor in converted.state.values()) / 1e6
    print(f"{config.output}: {converted.config.kind}, {size:.1f} M values")
    for note in converted.notes:
        print(f"  {note}")
    print(f"  keys of {config.input} that were not used: {len(converted.unused)}")
    for name in converted.unused:
        print(f"    {name}")


def run_export(config: ExportConfig) -> None:
    from priorclip.model.export.formats import export

    print(export(config))


def run_summary(config: SummaryConfig) -> None:
    from priorclip.model.cost.summary import summary_report

    print(summary_report(config))


def run_bench(config: BenchConfig) -> None:
    from priorclip.model.cost.step_bench import bench_report

    print(bench_report(config))


if __name__ == "__main__":
    sys.exit(main())
