"""The figures of the GPU benchmark as Markdown, and their place in a page of docs/.

text = page_of(found)                      # what gpu.json holds
put_into_page(Path("docs/gpu.md"), text)   # between BEGIN and END; what else the page says stays
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from priorclip.common.files import write_text

BEGIN, END = "<!-- figures of benchmarks.gpu -->", "<!-- end of the figures -->"
GB = 1e9
NO_GPU = (
    "**No GPU was available when these figures were written, so there are none of a GPU yet.** What follows was"
    " measured on a CPU with tiny sizes. It is an example of the form, and none of its"
    " figures says anything about a GPU."
)
TITLES = {
    "models": "Models",
    "kernels": "Kernels",
    "zero": "ZeRO stages and offload on one device",
    "grad_cache": "Gradient caching",
    "losses": "Losses",
    "loader": "Loader",
}


def page_of(found: dict[str, Any]) -> str:
    """Returns the page of a measurement."""
    machine = found["machine"]
    peak = f"peak {machine['peak_tflops']:g} TFLOP/s" if machine["peak_tflops"] else "peak unknown, so no MFU"
    installed = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    missing = [name for name, value in found["versions"].items() if value is None]
    lines = [] if machine["cuda"] else [NO_GPU, ""]
    lines += [
        f"{machine['device']}, {machine['memory_bytes'] / GB:.0f} GB, {machine['cores']} cores, {peak}."
        f" {found['date']}, commit {found['commit'] or 'unknown'}, {found['seconds']:.0f} s.",
        "",
        f"{installed}" + (f", CUDA {machine['cuda']}" if machine["cuda"] else "")
        + (f"; not installed: {', '.join(missing)}" if missing else "") + ".",
        "",
        f"    {found['command']}",
    ]  # fmt: skip
    for section, title in TITLES.items():
        if section not in found:
            continue
        lines += ["", f"### {title}", ""]
        lines += TABLES[section](found) if found[section] else ["Nothing was measured."]
    lines += ["", "### Not measured", ""]
    lines += [
        f"- {each['section']}: {each['case']}: {'failed: ' if each['failed'] else ''}{each['reason']}"
        for each in found["not_measured"]
    ] or ["Everything that was asked for was measured."]
    return "\n".join(lines) + "\n"


def put_into_page(path: Path, text: str) -> None:
    """Replaces the figures of a page, or writes a page of figures only if there is none.

    Raises ValueError if the page has no place for figures.
    """
    block = f"{BEGIN}\n{text}{END}"
    if not path.exists():
        write_text(path, f"# Measured on one GPU\n\n{block}\n")
        return
    whole = path.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"--page {path}: it has no lines '{BEGIN}' and '{END}', between which the figures go")
    write_text(path, before + block + after)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a Markdown table; the first column is text."""
    return ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]  # fmt: skip


def models(found: dict[str, Any]) -> list[str]:
    columns = ["preset, mode", "batch", "images/s", "MFU", "peak GB", "open_clip", "images/s", "MFU", "peak GB",
               "ours / open_clip"]  # fmt: skip
    rows = []
    for row in found["models"]:
        peer = row["peer"]
        theirs = ["-"] * 5 if peer is None else [peer["name"], *speed(peer), f"{row['ratio']:.2f}"]
        rows.append([f"{row['preset']}, {row['mode']}", str(row["batch"]), *speed(row), *theirs])
    notes = sorted({f"No comparison for {row['preset']}, {row['mode']}: {row['peer_missing']}."
                    for row in found["models"] if row["peer_missing"]})  # fmt: skip
    if any(row["peer"] and row["peer"]["name"] == "tiny" for row in found["models"]):
        notes.append("open_clip's `tiny` has other towers than priorclip-tiny: that ratio shows only that both run.")
    first = found["models"][0]
    return [
        f"A step of training in {first['precision']}: forward, losses, backward, AdamW with float32 weights; ours by"
        f" DeepSpeed with ZeRO {first['zero']}. Median of {len(first['seconds'])} repeats in turn.",
        "",
        *table(columns, rows),
        *(["", *notes] if notes else []),
    ]


def speed(row: dict[str, Any]) -> list[str]:
    return [f"{row['images_per_second']:,.0f}", "-" if row["mfu"] is None else f"{row['mfu']:.1%}", gigabytes(row)]


def kernels(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for row in found["kernels"]:
        attention = ", ".join(f"{name} ({count:g} calls)" for name, count in row["attention"].items()) or "none"
        waits = row["synchronisations_note"] or f"{row['synchronisations']} a step" + "".join(
            f"; {place} ({count})" for place, count in row["places"].items()
        )
        lines += [
            *([""] if lines else []),
            f"**{row['preset']}**, batch {row['batch']}: {milliseconds(row['step_seconds'])} a step, of which kernels"
            f" take {row['busy']:.0%}. Attention: {attention}. Waits of the processor for the device: {waits}.",
            "",
            *table(["kernel", "calls a step", "ms a step", "share"],
                   [[f"`{shortened(each['name'])}`", f"{each['calls']:g}", f"{1e3 * each['seconds']:.2f}",
                     f"{each['share']:.1%}"] for each in row["kernels"]]),
        ]  # fmt: skip
    return lines


def engines(name: str, label: str) -> Callable[[dict[str, Any]], list[str]]:
    def lines(found: dict[str, Any]) -> list[str]:
        columns = [
            label,
            "batch",
            *(["micro batch"] if name == "grad_cache" else []),
            "ms a step",
            "images/s",
            "peak GB",
        ]
        rows = []
        for row in found[name]:
            first = str(row["zero"]) if name == "zero" else row["preset"]
            micro = [str(row["micro_batch"])] if name == "grad_cache" else []
            rows.append([first, f"{row['batch']:,}", *micro, f"{1e3 * statistics.median(row['seconds']):.1f}",
                         f"{row['images_per_second']:,.0f}", gigabytes(row)])  # fmt: skip
        return [f"{found[name][0]['preset']}.", "", *table(columns, rows)]

    return lines


def losses(found: dict[str, Any]) -> list[str]:
    columns = ["loss", "pairs", "matmul", "ms", "peak GB", "time / ClipLoss", "bf16: error of loss", "of gradient",
               "fp32: error of loss", "of gradient"]  # fmt: skip
    rows = []
    for row in found["losses"]:
        for name, loss in row["losses"].items():
            errors = [f"{loss[dtype][kind]:.1e}" for dtype in ("bf16", "fp32")
                      for kind in ("loss_error", "gradient_error")]  # fmt: skip
            rows.append([name, f"{row['size']:,}", row["matmul"], f"{1e3 * statistics.median(loss['seconds']):.2f}",
                         gigabytes(loss), f"{loss['ratio']:.2f}" if "ratio" in loss else "-", *errors])  # fmt: skip
    missing = found["losses"][0]["peer_missing"]
    return [
        f"Forward and backward over features of {found['losses'][0]['width']} numbers in"
        f" {found['losses'][0]['features']}; errors against the same loss in float64.",
        "",
        *table(columns, rows),
        *(["", f"No comparison: {missing}."] if missing else []),
    ]


def loader(found: dict[str, Any]) -> list[str]:
    lines = []
    for row in found["loader"]:
        peer = f", open_clip's {row['open_clip_per_core']:,.0f}" if "open_clip_per_core" in row else ""
        lines.append(f"One core loads {row['ours_per_core']:,.0f} images/s from JPEGs of {row['side']} pixels,"
                     f" cut to {row['image_size']}{peer}.")  # fmt: skip
    rate = found["loader"][0]["ours_per_core"]
    rows = [[f"{row['preset']}, {row['mode']}", f"{row['images_per_second']:,.0f}",
             str(math.ceil(row["images_per_second"] / rate))] for row in found.get("models", ())]  # fmt: skip
    needs = ["", *table(["preset, mode", "images/s of the step", "cores that it needs"], rows)] if rows else []
    return lines + needs


def summary_of(section: str, row: dict[str, Any]) -> str:
    """Returns the figures of a case in a few words, for the terminal."""
    if section == "kernels":
        return f"{milliseconds(row['step_seconds'])} a step, kernels {row['busy']:.0%} of it"
    if section == "losses":
        times = (f"{name} {milliseconds(statistics.median(each['seconds']))}" for name, each in row["losses"].items())
        return ", ".join(times)
    if section == "loader":
        return f"{row['ours_per_core']:,.0f} images/s a core"
    ratio = f", {row['ratio']:.2f} times open_clip's" if row.get("ratio") else ""
    return f"{row['images_per_second']:,.0f} images/s{ratio}, peak {gigabytes(row)} GB"


def gigabytes(row: dict[str, Any]) -> str:
    size = row["peak_bytes"] / GB
    return f"{size:.1f}" if size >= 10 else f"{size:.3f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def shortened(name: str, most: int = 60) -> str:
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= most else f"{name[: most - 3]}..."


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "models": models,
    "kernels": kernels,
    "zero": engines("zero", "ZeRO"),
    "grad_cache": engines("grad_cache", "preset"),
    "losses": losses,
    "loader": loader,
}
