"""The picture of a run: loss against steps, and how it falls along a document."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from efficient_lm.metrics import read_metrics
from efficient_lm.run_folder import RunFolder


def plot_run(folder: RunFolder, baselines: dict[str, float]) -> Path:
    """Draws `loss.png` from the metrics of a run; `baselines` are bits per byte to compare with, by name."""
    lines = read_metrics(folder.metrics)
    training = [line for line in lines if "bits_per_byte" in line]
    held_out = [line for line in lines if "held_out_bits_per_byte" in line]

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _curve(left, training, "bits_per_byte", color="C0", alpha=0.5, linewidth=1, label="training")
    _curve(left, held_out, "held_out_bits_per_byte", color="C0", marker="o", label="held out")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        left.axhline(value, color="0.4", linestyle=style, label=f"{name}: {value:.3f}")
    if held_out:
        last = held_out[-1]
        left.annotate(
            f"{last['held_out_bits_per_byte']:.3f}",
            (last["step"], last["held_out_bits_per_byte"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="right",
        )
        by_position = last["held_out_loss_by_position"]
        right.plot([2**i for i in range(len(by_position))], by_position, marker="o")
    values = [line["bits_per_byte"] for line in training[len(training) // 20 :]]
    if values:
        # The first steps would squeeze all that follows into a corner.
        left.set_ylim(min([*values, *baselines.values()]) * 0.9, max(values) * 1.05)
    left.set(xlabel="step", ylabel="bits per byte", title="Loss")
    left.legend()
    right.set(xlabel="position in the document (tokens)", ylabel="nats per token", title="Held out, by position")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = folder.plots / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _curve(axes: Any, lines: list[dict[str, Any]], name: str, **style: Any) -> None:
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], **style)
