"""The report of ``cluster check`` as text: a table with one line a host, the measured speed, and the findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from priorclip.cluster.check.rules import Finding, Row
from priorclip.cluster.commands import CheckConfig

COLUMNS = ("host", "slots", "python", "torch", "deepspeed", "cuda", "nccl", "code", "accelerator", "count", "free_gb",
           "shm_gb", "skew_s", "shards", "tflops")  # fmt: skip


def format_report(
    rows: Sequence[Row], rates: dict[str, Any] | None, findings: Sequence[Finding], config: CheckConfig
) -> str:
    """Returns the table, the measured speed and the findings with their remedies."""
    parts = [format_table(rows)]
    if rates and rates["all_reduce_gb_s"] is not None:
        parts.append(f"all-reduce over {len(rates['ranks'])} ranks: {rates['all_reduce_gb_s']:.3g} GB/s bus bandwidth")
    if rates is None and config.measure and findings:
        parts.append("the speed of the hosts was not measured: first solve the problems below")
    parts += [f"{finding.host}: {finding.problem}\n    {finding.remedy}" for finding in findings]
    parts.append(f"{len(findings)} found" if findings else "nothing found that would stop a run")
    return "\n\n".join(parts)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line a host."""
    cells = [COLUMNS, *(tuple(format_cell(row, name) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def format_cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name == "code":
        return str(row["commit"] or "-")
    if name == "shards":
        return f"{value['count']}" + (f" ({value['wrong']} wrong)" if value["wrong"] else "")
    return f"{value:.3g}" if name == "tflops" else str(value)
