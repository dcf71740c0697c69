"""The plots of the study."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from efficient_lm.study.cells import Cell
from efficient_lm.study.measure import NUM_BINS, Costs

MARKERS = "os^vDP"


def ratios(loss: dict[str, np.ndarray], noise: float, cells: Sequence[Cell]) -> Figure:
    """Loss by ratio and place, beside the paper's."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [cell.name for cell in cells]
    means = [loss[name].mean() for name in names]
    left.errorbar(range(len(names)), means, 2 * noise / math.sqrt(len(loss[names[0]])), fmt="o", capsize=4)
    for i, name in enumerate(names):
        left.plot([i] * len(loss[name]), loss[name], ".", color="0.6", zorder=0)
    left.set(title="Here: mean, two standard errors, seeds", ylabel="nats per token")
    for i, (size, marker) in enumerate((("1 B", "o"), ("350 M", "s"))):
        known = [(j, cell.paper[i]) for j, cell in enumerate(cells) if len(cell.paper) > i]
        if known:
            right.plot(*zip(*known, strict=True), marker, label=size)
    right.set(title="The paper", ylabel="nats per token")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.grid(alpha=0.3)
    return figure


def all_cells(loss: dict[str, np.ndarray], noise: float) -> Figure:
    """Loss of every model, the best on top."""
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(loss)), layout="constrained")
    axes = figure.subplots()
    names = sorted(loss, key=lambda name: -loss[name].mean())
    for i, name in enumerate(names):
        axes.plot(loss[name], [i] * len(loss[name]), ".", color="0.6")
        axes.errorbar(loss[name].mean(), i, xerr=2 * noise / math.sqrt(len(loss[name])), fmt="o", color="C0", capsize=4)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="nats per token: mean, two standard errors, seeds")
    axes.grid(alpha=0.3)
    return figure


def positions(by_position: dict[str, np.ndarray], seq_len: int) -> Figure:
    """Loss along rows of twice the training length."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at = (np.arange(NUM_BINS) + 0.5) * 2 * seq_len / NUM_BINS
    for (name, values), marker in zip(by_position.items(), MARKERS, strict=False):
        axes.plot(at, values.mean(axis=0), marker=marker, markersize=4, label=name)
    axes.axvline(seq_len, color="0.4", linestyle="--", label="training length")
    axes.set(xlabel="position (tokens)", ylabel="nats per token", title="Held-out text, mean of seeds")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def answers(
    recall: dict[str, np.ndarray], needle: dict[str, np.ndarray], pairs: Sequence[int], lengths: Sequence[int]
) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, measured, at in ((left, recall, pairs), (right, needle, lengths)):
        for (name, values), marker in zip(measured.items(), MARKERS, strict=False):
            (line,) = axes.plot(at, values.mean(axis=0), marker=marker, label=name)
            axes.fill_between(at, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
        axes.set_xticks(at)
        axes.grid(alpha=0.3)
    left.plot(pairs, [1 / n for n in pairs], ":", color="0.4", label="any value of the row")
    left.set(xlabel="pairs", ylabel="right answers", ylim=(0, 1.03), title="Recall: mean, worst and best seed")
    right.axvline(lengths[1], color="0.4", linestyle="--", label="training length")
    right.set(xlabel="tokens", ylim=(0, 1.03), title="Needle in a text")
    left.legend(fontsize="small")
    return figure


def decoding(milliseconds: dict[str, list[float]], costs: dict[str, Costs], contexts: Sequence[int]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, times), marker in zip(milliseconds.items(), MARKERS, strict=False):
        left.plot(contexts, np.array(costs[name].state_bytes) / 2**20, marker=marker, label=name)
        right.plot(contexts, times, marker=marker, label=name)
    left.set(ylabel="MiB", title="Cache of one sequence")
    right.set(ylabel="ms", title="Decoding: a token of a batch of 4")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in the cache")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    return figure
