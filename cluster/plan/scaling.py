"""``python -m cluster simulate``: weak- and strong-scaling curves, from the model of a step in step_time.py.

python -m cluster simulate --preset priorclip-b32 --gpu H100 --zero 2 --output scaling.png
python -m cluster simulate --images_per_second 900 --preset priorclip-b32      # measured, of one GPU
python -m cluster simulate --bench runs/gpu/gpu.json --preset priorclip-b32    # the same, as benchmarks.gpu wrote it
"""

from __future__ import annotations

import json
from dataclasses import asdict

from priorclip.cluster.commands import SimulateConfig
from priorclip.cluster.plan.gpu_rates import bench_rate, images_from_peak, loss_flops
from priorclip.cluster.plan.memory import BYTES, PERSISTENT
from priorclip.cluster.plan.model_table import ModelTable, load_table
from priorclip.cluster.plan.network import Network
from priorclip.cluster.plan.step_time import PARTS, StepTime, Work, step_time


def simulate(config: SimulateConfig) -> str:
    """Returns weak- and strong-scaling curves as text or JSON, and writes the plot if --output is given."""
    table = load_table(config.preset, config.precision, config.table)
    rate = rate_of_a_gpu(table, config)
    work = Work(
        seconds_a_sample=1 / rate, trained=table.trained, frozen=table.frozen, width=table.width,
        loss_flops=loss_flops(table, config), bytes_a_parameter=BYTES[config.precision], zero=int(config.zero),
        persistent=len(table.persistent(PERSISTENT)), overlap=config.overlap,
        stragglers=config.stragglers, loader_rate=config.loader_rate,
    )  # fmt: skip
    ranks = [1 << power for power in range(config.gpus.bit_length())]
    weak = weak_scaling(work, config.network, ranks, config.batch)
    strong = strong_scaling(work, config.network, ranks, config.global_batch)
    if config.output:
        plot(weak, strong, f"{config.preset}, ZeRO-{config.zero}", config.output)
    if config.json:
        return json.dumps({"work": asdict(work), "weak": [as_dict(step) for step in weak],
                           "strong": [as_dict(step) for step in strong]}, indent=2)  # fmt: skip
    return (
        f"weak scaling, {config.batch} pairs a GPU, ms a step\n\n{format_steps(weak)}\n\n"
        f"strong scaling, {config.global_batch:,} pairs a step, ms a step\n\n{format_steps(strong)}"
    )


def rate_of_a_gpu(table: ModelTable, config: SimulateConfig) -> float:
    """Images a second of one GPU: measured, given, or from FLOPs, peak and MFU."""
    if config.bench is not None:
        return bench_rate(config.bench, config.preset, config.precision)[0]
    return config.images_per_second or images_from_peak(table, config)


def weak_scaling(work: Work, network: Network, ranks: list[int], batch: float) -> list[StepTime]:
    """Steps with the same batch on every rank."""
    return [step_time(work, network, count, batch) for count in ranks]


def strong_scaling(work: Work, network: Network, ranks: list[int], global_batch: int) -> list[StepTime]:
    """Steps with the same global batch. Leaves out numbers of ranks that are larger than the batch."""
    return [step_time(work, network, count, global_batch / count) for count in ranks if count <= global_batch]


def efficiency(steps: list[StepTime]) -> list[float]:
    """Images a second of a rank, as a share of the value at the smallest number of ranks."""
    first = steps[0].images_per_second / steps[0].ranks
    return [step.images_per_second / step.ranks / first for step in steps]


def format_steps(steps: list[StepTime]) -> str:
    """The steps as a Markdown table."""
    lines = ["| GPUs | batch a GPU | step, ms | images/s | efficiency | " + " | ".join(PARTS) + " |",
             "|---:" * (5 + len(PARTS)) + "|"]  # fmt: skip
    for step, share in zip(steps, efficiency(steps), strict=True):
        parts = " | ".join(f"{1e3 * getattr(step, name):.1f}" for name in PARTS)
        lines.append(
            f"| {step.ranks} | {step.batch:g} | {1e3 * step.seconds:.1f} | {step.images_per_second:,.0f} |"
            f" {share:.0%} | {parts} |"
        )
    return "\n".join(lines)


def as_dict(step: StepTime) -> dict[str, float]:
    return {**asdict(step), "seconds": step.seconds, "images_per_second": step.images_per_second}


def plot(weak: list[StepTime], strong: list[StepTime], title: str, path: str) -> None:
    """Draws images a second over GPUs for both curves and the ideal, and the shares of the parts of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, shares) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ranks = [step.ranks for step in weak]
    one = weak[0].images_per_second / weak[0].ranks
    speed.plot(ranks, [one * count for count in ranks], "--", color="grey", label="ideal")
    speed.plot(ranks, [step.images_per_second for step in weak], "o-", label=f"weak: {weak[0].batch:g} a GPU")
    global_batch = round(strong[0].ranks * strong[0].batch)
    speed.plot([step.ranks for step in strong], [step.images_per_second for step in strong], "s-",
               label=f"strong: {global_batch:,} in total")  # fmt: skip
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s", title=title)
    speed.set_xscale("log", base=2)
    speed.set_xticks(ranks, [str(count) for count in ranks])
    speed.legend()
    parts = [[getattr(step, name) / step.seconds for step in weak] for name in PARTS]
    shares.stackplot(range(len(ranks)), parts, labels=PARTS)
    shares.set_xticks(range(len(ranks)), [str(count) for count in ranks])
    shares.set(xlabel="GPUs", ylabel="share of a step", title="weak scaling", ylim=(0, 1))
    shares.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
