"""The report of the study: what came out, with the noise of seeds, beside what the paper has."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from efficient_lm.console import count
from efficient_lm.study import plots
from efficient_lm.study.cells import CLAIMS, DECODED, PLACES, RATIOS, RECALLED, Budget, Cell
from efficient_lm.study.documents import PAIRS
from efficient_lm.study.measure import LENGTHS, Costs

type Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """What was measured, by cell; seeds are in front."""

    loss: dict[str, np.ndarray]
    by_position: dict[str, np.ndarray]
    recall: dict[str, np.ndarray]
    needle: dict[str, np.ndarray]
    milliseconds: dict[str, list[float]]
    """For a token of a batch, at each context."""
    noise: float
    """Standard deviation of a cell's loss about what is usual for the cell and for the seed."""

    def difference(self, better: str, worse: str) -> tuple[float, float]:
        """Returns the mean difference of two losses, and two standard errors of it."""
        difference = self.loss[better] - self.loss[worse]
        return float(difference.mean()), 2 * self.noise * math.sqrt(2 / len(difference))


def gather(cells: tuple[Cell, ...], lines: list[Line]) -> Results:
    def of(task: str, value: str) -> dict[str, Any]:
        by_cell = {c.name: [x[value] for x in lines if x["cell"] == c.name and x["task"] == task] for c in cells}
        return {name: np.array(values) for name, values in by_cell.items() if values}

    loss = of("text", "loss")
    table = np.stack(list(loss.values()))
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return Results(
        loss=loss,
        by_position=of("text", "by_position"),
        recall=of("recall", "recall"),
        needle=of("recall", "needle"),
        milliseconds={name: (1e3 * seconds).tolist() for name, seconds in of("decode", "seconds_per_token").items()},
        noise=math.sqrt(np.square(rest).sum() / freedom) if freedom else math.inf,
    )


def write_report(
    folder: pathlib.Path, budget: Budget, cells: tuple[Cell, ...], costs: dict[str, Costs], lines: list[Line]
) -> pathlib.Path:
    """Writes report.md and its plots from the lines of results.jsonl; returns it."""
    first, *lines = lines
    results = gather(cells, lines)
    figures = {
        "ratios": plots.ratios(results.loss, results.noise, [c for c in cells if c in RATIOS + PLACES]),
        "intra": plots.all_cells(results.loss, results.noise),
        "positions": plots.positions({n: x for n, x in results.by_position.items() if n in DECODED}, budget.seq_len),
        "recall": plots.answers(results.recall, results.needle, PAIRS, [int(x * budget.seq_len) for x in LENGTHS]),
        "decoding": plots.decoding(results.milliseconds, costs, budget.contexts),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100)
    parts = [
        _introduction(budget, cells, costs, first, lines),
        "## What the paper says, and what came out\n\n" + _claims(cells, results),
        "## All models\n\n![loss of ratios and places](ratios.png)\n\n![loss of all models](intra.png)\n\n"
        + _losses(cells, costs, results),
        "## Beyond the training length\n\n![loss by position](positions.png)\n\n" + _positions(budget, results),
        "## Recall and needle\n\n![recall and needle](recall.png)\n\n" + _answers(budget, results),
        "## Cache and decoding\n\n![cache and decoding](decoding.png)\n\n" + _decoding(budget, costs, results),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _introduction(
    budget: Budget, cells: tuple[Cell, ...], costs: dict[str, Costs], first: Line, lines: list[Line]
) -> str:
    sizes = [float(costs[cell.name].parameters) for cell in cells]
    tokens = float(budget.num_steps * budget.batch_size * budget.seq_len)
    seconds = {task: sum(x["seconds"] for x in lines if x["task"] == task) for task in ("text", "recall", "decode")}
    minutes = ", ".join(f"{name} {s / 60:.1f}" for name, s in seconds.items())
    loads = [line["load"] for line in lines]
    recalled = sum(cell.name in RECALLED for cell in cells)
    return f"""# Attention and Mamba-2, mixed

After *Hybrid Architectures for Language Models* (https://arxiv.org/abs/2510.04800), whose models have 1 B parameters
and 60 B tokens. Here are {len(cells)} models of 13 blocks, {budget.d_model} wide, with {count(min(sizes))} to
{count(max(sizes))} parameters. Each sees {count(tokens)} tokens of text in rows of {budget.seq_len}, from
{budget.num_seeds} seeds; {recalled} of them are trained once more, on recall and needles.

{sum(seconds.values()) / 60:.1f} minutes in all ({minutes}), compiling included, on {first["machine"]}, load
{min(loads):.1f} to {max(loads):.1f}; {first["date"]}, JAX {first["versions"]["jax"]}."""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    line = lambda values: "| " + " | ".join(values) + " |"
    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])


def _claims(cells: tuple[Cell, ...], results: Results) -> str:
    papers, rows = {cell.name: cell.paper for cell in cells}, []
    for text, better, worse in CLAIMS:
        if better in papers and worse in papers:
            theirs = [f"{a - b:+.3f}" for a, b in zip(papers[better], papers[worse], strict=False)]
            ours, error = results.difference(better, worse)
            verdict = "within noise" if abs(ours) <= error else "reproduced" if ours < 0 else "**the opposite**"
            rows.append((text, f"{better} - {worse}", ", ".join(theirs), f"{ours:+.3f} ± {error:.3f}", verdict))
    head = ("the paper finds", "difference of losses", "paper, 1 B and 350 M", "here", "")
    return (
        _table(head, rows)
        + f"""

Nats per token of held-out text. ±: two standard errors of a mean over seeds. They come from how far losses lie from
what is usual for their model and their seed, {results.noise:.4f} over all models. Models of one seed read the same
batches. A difference within ± is no evidence for anything."""
    )


def _losses(cells: tuple[Cell, ...], costs: dict[str, Costs], results: Results) -> str:
    rows = [
        (
            cell.name,
            _stack(cell),
            f"{count(float(costs[cell.name].parameters))} ({count(float(costs[cell.name].active_parameters))})",
            f"{costs[cell.name].training_flops:.3g}",
            f"{results.loss[cell.name].mean():.3f}",
            " ".join(f"{loss:.3f}" for loss in results.loss[cell.name]),
            ", ".join(f"{x:.3f}" for x in cell.paper),
        )
        for cell in cells
    ]
    head = ("model", "blocks", "parameters (active)", "FLOPs", "loss", "of each seed", "paper, 1 B and 350 M")
    return "A: attention. M: Mamba-2. H: both in one block. FLOPs: of training, all of it.\n\n" + _table(head, rows)


def _stack(cell: Cell) -> str:
    prefix, pattern, num_periods, tail = (
        part if isinstance(part, int) else part.replace(" ", "") for part in cell.stack
    )
    return f"{prefix} {num_periods}x{pattern} {tail}".strip()


def _positions(budget: Budget, results: Results) -> str:
    rows = []
    for name in (name for name in results.by_position if name in DECODED):
        within, beyond = np.split(results.by_position[name], 2, axis=1)
        last, after = within[:, -4:].mean(axis=1), beyond[:, -4:].mean(axis=1)
        rows.append(
            (
                name,
                f"{last.mean():.3f}",
                f"{after.mean():.3f}",
                f"{(after - last).mean():+.3f} ± {_error(after - last):.3f}",
            )
        )
    T = budget.seq_len
    head = ("model", f"tokens {T // 2} to {T}", f"tokens {3 * T // 2} to {2 * T}", "difference")
    return (
        _table(head, rows)
        + """

The paper shows this as a figure only: attention gets worse past the training length, Mamba-2 and hybrids do not, up
to three times it. ±: two standard errors over seeds. All models read the same windows."""
    )


def _error(values: np.ndarray) -> float:
    return 2 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _answers(budget: Budget, results: Results) -> str:
    cell = lambda values: [f"{m:.0%} ± {s:.0%}" for m, s in zip(values.mean(axis=0), values.std(axis=0), strict=True)]
    recall = [(name, *cell(values)) for name, values in results.recall.items()]
    needle = [(name, *cell(values)) for name, values in results.needle.items()]
    lengths = [f"{int(x * budget.seq_len)} tokens" for x in LENGTHS]
    return (
        _table(("recall", *(f"{n} pairs" for n in PAIRS)), recall)
        + "\n\n"
        + _table(("needle", *lengths), needle)
        + f"""

Shares of right answers; ±: standard deviation over seeds. Rows are of {budget.seq_len} tokens in training. Who says
one of the values that stand there is right once in as many times as there are pairs. A needle stands anywhere in its
text. The paper has needles as a figure only: attention finds none past the training length, Mamba-2 loses them with
distance, hybrids find them up to one and a half times the training length. It has no synthetic recall."""
    )


# At 1 B and 8 k tokens: MiB of cache in bfloat16, tokens per second at 2 k, 8 k and 32 k (H200, batch 4).
PAPER_DECODING = {
    "1:0": (256, 373, 115, 30),
    "1:1": (119, 669, 241, 68),
    "1:5": (43, 969, 595, 213),
    "1:12": (28, 969, 754, 355),
    "0:1": (13, 2528, 2738, 2917),
}


def _decoding(budget: Budget, costs: dict[str, Costs], results: Results) -> str:
    rows = []
    for name, times in results.milliseconds.items():
        cache = [count(float(x)) for x in costs[name].state_bytes]
        theirs = PAPER_DECODING[name]
        rows.append(
            (
                name,
                " ".join(cache),
                " ".join(f"{4000 / ms:.0f}" for ms in times),
                str(theirs[0]),
                " ".join(map(str, theirs[1:])),
            )
        )
    contexts = ", ".join(count(float(context)) for context in budget.contexts)
    head = ("model", "cache, bytes", "tokens/s", "paper: MiB at 8 k", "paper: tokens/s at 2 k, 8 k, 32 k")
    return (
        f"At {contexts} tokens in the cache; batch 4, float32.\n\n"
        + _table(head, rows)
        + """

The paper's are models of 1 B on an H200. Its sizes follow from the cost model, cell by cell (tests/test_costs.py)."""
    )
