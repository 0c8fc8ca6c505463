"""A power law through the levels of a study, with its uncertainty over seeds and its prediction for ten times more.

    python -m experiments fit runs/sweeps/scaling-images/scaling-images.json        # scaling-images.fit.json, .md, .png

    error(n) = a n^-b              error: what recall lacks of 100 %, n: the level, such as the number of images
    log error = log a - b log n    a straight line, fitted by least squares to all runs

With ``--floor true`` the error has a part that no amount removes: error(n) = c + a n^-b, with a and c not negative.
That needs more levels, and says more about levels beyond the last.

The band is a bootstrap: it draws seeds with replacement, each with its runs at all levels, and fits again. It tells how
much the fit depends on the seeds, not whether a power law is right, and with few seeds it is a little narrow. So look
at the points first.

Source of the form: Cherti et al. 2023, Reproducible scaling laws for contrastive language-image learning
(arXiv 2212.07143), for the error of zero-shot retrieval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import write_text
from priorclip.experiments.commands import FitConfig
from priorclip.experiments.sweep_table import plus_minus

MORE = 10  # times the last level, for which a prediction is made
TAIL = 2.5  # percent on each side of the band
Array = NDArray[np.float64]
Runs = Mapping[int, Mapping[float, float]]  # seed -> level -> figure in percent


class PowerLaw(NamedTuple):
    """error(n) = floor + scale n^-exponent, all in percent."""

    scale: float
    exponent: float
    floor: float = 0.0

    def figure(self, level: Array | float) -> Array:
        """Returns what is left of 100 %."""
        return 100 - self.floor - self.scale * np.asarray(level, dtype=np.float64) ** -self.exponent


def fit_power_law(levels: Sequence[float], figures: Sequence[float], floor: bool = False) -> PowerLaw:
    """Fits by least squares: of the logarithm of the error, or with a floor of the error itself.

    Args:
        levels: n of each run, above 0
        figures: percent, below 100
        floor: whether a part of the error stays for any n
    Raises:
        ValueError: there are fewer levels than the law has parameters, or values without a logarithm
    """
    n, error = np.asarray(levels, dtype=np.float64), 100 - np.asarray(figures, dtype=np.float64)
    needed = 3 if floor else 2
    if len(set(n.tolist())) < needed:
        raise ValueError(f"a power law {'with a floor ' * floor}needs {needed} levels, not {sorted(set(n.tolist()))}")
    if n.min() <= 0 or error.min() <= 0:
        raise ValueError("a power law needs levels above 0 and figures below 100 percent")
    return fit_with_floor(n, error) if floor else fit_line(n, error)


def fit_line(n: Array, error: Array) -> PowerLaw:
    slope, height = np.polyfit(np.log(n), np.log(error), 1)
    return PowerLaw(float(np.exp(height)), float(-slope))


def fit_with_floor(n: Array, error: Array) -> PowerLaw:
    """For each exponent the best scale and floor are a non-negative least squares problem; the best exponent wins."""
    from scipy.optimize import minimize_scalar, nnls

    unit = np.exp(np.log(n).mean())  # so that both columns are of order 1

    def solved(exponent: float) -> tuple[Array, float]:
        return nnls(np.stack([(n / unit) ** -exponent, np.ones_like(n)], axis=1), error)

    grid = np.linspace(0.01, 4, 200)
    best = grid[int(np.argmin([solved(exponent)[1] for exponent in grid]))]
    near = (max(1e-3, best - 0.05), best + 0.05)
    exponent = float(minimize_scalar(lambda b: solved(b)[1], bounds=near, method="bounded", options={"xatol": 1e-9}).x)
    (scale, constant), _ = solved(exponent)
    return PowerLaw(float(scale * unit**exponent), exponent, float(constant))


def fit_seeds(runs: Runs, drawn: Sequence[int], floor: bool) -> PowerLaw:
    """Fits the runs of some seeds, of which one may be drawn several times."""
    pairs = [pair for seed in drawn for pair in runs[seed].items()]
    return fit_power_law([level for level, _ in pairs], [figure for _, figure in pairs], floor)


def fit_row(runs: Runs, resamples: int, seed: int, floor: bool) -> dict[str, Any]:
    """Returns the law of a row, its band over seeds, and the prediction for MORE times the last level.

    With one seed there is no band.

    Args:
        runs: at least the levels that the law needs
        resamples: draws of the bootstrap
        seed: of the draws
        floor: see `fit_power_law`
    """
    seeds = sorted(runs)
    law = fit_seeds(runs, seeds, floor)
    levels = np.array(sorted({level for each in runs.values() for level in each}))
    curve = np.geomspace(levels[0], MORE * levels[-1], 100)
    found: dict[str, Any] = {
        "law": law._asdict(),
        "seeds": len(seeds),
        "residual": float(np.sqrt(np.mean([(f - law.figure(n)) ** 2 for r in runs.values() for n, f in r.items()]))),
        "prediction": {"level": float(MORE * levels[-1]), "mean": float(law.figure(MORE * levels[-1]))},
        "curve": {"levels": curve.tolist(), "figure": law.figure(curve).tolist()},
    }
    laws = draw_laws(runs, resamples, seed, floor) if len(seeds) > 1 else []
    if laws:
        bounds = [TAIL, 100 - TAIL]
        found["exponent_interval"] = np.percentile([each.exponent for each in laws], bounds).tolist()
        ends = [float(each.figure(MORE * levels[-1])) for each in laws]
        found["prediction"]["interval"] = np.percentile(ends, bounds).tolist()
        band = np.percentile([each.figure(curve) for each in laws], bounds, axis=0)
        found["curve"] |= {"low": band[0].tolist(), "high": band[1].tolist()}
    return found


def draw_laws(runs: Runs, resamples: int, seed: int, floor: bool) -> list[PowerLaw]:
    """Returns the laws of resampled seeds. A draw whose seeds have too few levels is drawn again."""
    rng, seeds, laws = np.random.default_rng(seed), sorted(runs), []
    needed = 3 if floor else 2
    for _ in range(20 * resamples):
        drawn = [seeds[place] for place in rng.integers(0, len(seeds), len(seeds))]
        if len({level for each in drawn for level in runs[each]}) >= needed:
            laws.append(fit_seeds(runs, drawn, floor))
        if len(laws) == resamples:
            break
    return laws


def fit_study(config: FitConfig) -> dict[str, Any]:
    """Fits each row of a study, writes NAME.fit.json, .md and .png, and returns the content of the JSON.

    Raises:
        ValueError: the file is no table of a study, or has too few levels; the message names it
    """
    path = Path(config.file)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        runs = {row: by_seed(levels) for row, levels in table["rows"].items()}
        labels, axis, figure = table["labels"], table["axis"], table["figure"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the table of a study, such as runs/sweeps/STUDY/STUDY.json ({error!r})"
        ) from error
    if not runs:
        raise ValueError(f"{path} has no finished run: run the study first")
    try:
        fits = {row: fit_row(each, config.bootstrap, config.seed, config.floor) for row, each in runs.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    report = {
        "study": table["study"],
        "axis": axis,
        "figure": figure,
        "labels": labels,
        "floor": config.floor,
        "rows": fits,
    }
    stem = Path(config.output) if config.output else path.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text(stem.with_name(f"{stem.name}.fit.json"), json.dumps(report, indent=2) + "\n")
    write_text(stem.with_name(f"{stem.name}.fit.md"), fit_table(report) + "\n")
    draw_fit(report, runs, stem.with_name(f"{stem.name}.fit.png"))
    return report


def by_seed(levels: Mapping[str, Any]) -> dict[int, dict[float, float]]:
    """Returns the runs of a row of a study's table: seed -> level -> figure."""
    found: dict[int, dict[float, float]] = {}
    for level, value in levels.items():
        if level != "change":
            for seed, figure in value["runs"].items():
                found.setdefault(int(seed), {})[float(level)] = float(figure)
    return found


def fit_table(report: Mapping[str, Any]) -> str:
    """Returns the fits as a Markdown table."""
    last = next(iter(report["rows"].values()))["prediction"]["level"]
    lines = [
        f"| {report['axis']} | exponent b | floor, % | residual, points | {report['figure']} at {last:g} | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row, fit in report["rows"].items():
        bounds = fit.get("exponent_interval")
        exponent = f"{fit['law']['exponent']:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
        floor = f"{fit['law']['floor']:.1f}" if report["floor"] else ""
        ahead = plus_minus({**fit["prediction"], "count": 1})
        lines.append(
            f"| {report['labels'][row]} | {exponent} | {floor} | {fit['residual']:.2f} | {ahead} | {fit['seeds']} |"
        )
    return "\n".join(lines)


def draw_fit(report: Mapping[str, Any], runs: Mapping[str, Runs], path: Path) -> None:
    """Draws each run as a point, the law with its band, and a line where the measured levels end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, (row, fit) in enumerate(report["rows"].items()):
        colour, curve = f"C{place}", fit["curve"]
        points = [point for each in runs[row].values() for point in each.items()]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colour, alpha=0.7)
        axes.plot(curve["levels"], curve["figure"], color=colour, linewidth=1.4, label=report["labels"][row])
        if "low" in curve:
            axes.fill_between(curve["levels"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    last = max(level for each in runs.values() for levels in each.values() for level in levels)
    axes.axvline(last, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("measured", (last, 0.02), xycoords=("data", "axes fraction"), ha="right", xytext=(-4, 0),
                  textcoords="offset points", color="0.4")  # fmt: skip
    axes.annotate("predicted", (last, 0.02), xycoords=("data", "axes fraction"), ha="left", xytext=(4, 0),
                  textcoords="offset points", color="0.4")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(report["axis"])
    axes.set_ylabel(f"{report['figure']}, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
