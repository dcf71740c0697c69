"""The hybrid study: a kill loses at most what was being measured, and the report has its plots."""

import dataclasses
import json
import re

import numpy as np
import pytest

from efficient_lm.data import DataConfig, TextConfig
from efficient_lm.study import documents
from efficient_lm.study.cells import BUDGETS, CLAIMS, cells
from efficient_lm.study.documents import NUM_KEYS, Text
from efficient_lm.study.hybrid import study

TEXT = Text(np.arange(500) % 7, np.arange(500) % 7, vocab_size=300)


def test_claims_are_about_cells():
    names = [cell.name for cell in cells(BUDGETS["medium"])]
    assert len(set(names)) == len(names)
    assert {name for _, *pair in CLAIMS for name in pair} <= set(names)


def test_all_stacks_have_13_blocks():
    for cell in cells(BUDGETS["medium"]):
        prefix, pattern, num_periods, tail = cell.stack
        assert len(prefix.split()) + num_periods * len(pattern.split()) + len(tail.split()) == 13


def test_recall_asks_for_what_was_said():
    rows_BT = documents.recall(np.random.default_rng(0), TEXT, np.array([1, 4, 8]), 33)
    assert rows_BT.shape == (3, 34)
    for row, n in zip(rows_BT, (1, 4, 8), strict=True):
        value_of = dict(zip(row[: 2 * n : 2].tolist(), row[1 : 2 * n : 2].tolist(), strict=True))
        assert len(value_of) == n
        known = np.flatnonzero(documents.answers(n, 33))
        assert len(known) == 17 - n
        assert all(value_of[row[i]] == row[i + 1] for i in known)
        assert set(row.tolist()) <= set(range(TEXT.mark + 1, TEXT.mark + 1 + 2 * NUM_KEYS))


def test_needles_have_one_value_in_a_row():
    rng = np.random.default_rng(0)
    text_BT = documents.windows(rng, TEXT.training, 3, 20)
    rows_BT = documents.needles(rng, TEXT, text_BT, np.array([[0, 18], [4, 18], [16, 18]]))
    for row, places in zip(rows_BT, ([0, 18], [4, 18], [16, 18]), strict=True):
        assert np.flatnonzero(row == TEXT.mark).tolist() == places
        assert len(set(row[np.array(places) + 1].tolist())) == 1
    assert (rows_BT != text_BT).sum() == 12


def measured(lines: list[str]) -> list[dict]:
    """Returns what does not depend on the time of day."""
    circumstances = ("load", "seconds", "seconds_per_token", "date")
    return [{name: x for name, x in json.loads(line).items() if name not in circumstances} for line in lines]


def test_goes_on_after_a_kill(tmp_path):
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(rng.choice(list("abcdefgh \n"), 4000)))
    data = DataConfig(sources=(TextConfig(path=str(tmp_path / "text")),), validation_fraction=0.2)
    budget = dataclasses.replace(
        BUDGETS["small"], d_model=16, vocab_size=262, batch_size=4, seq_len=32, num_steps=3, num_seeds=2, contexts=(32,)
    )
    two = [cell for cell in cells(budget) if cell.name in ("1:0", "0:1")]
    run = lambda: study(budget, tuple(two), tmp_path / "study", data)

    report = run()
    text, results = report.read_text(), tmp_path / "study" / "results.jsonl"
    plots = re.findall(r"\((\w+\.png)\)", text)
    assert len(plots) == 5
    assert all((report.parent / plot).stat().st_size > 0 for plot in plots)
    assert "1:0" in text

    whole = results.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * (2 * 2 + 1)
    run()
    assert results.read_text() == whole
    assert report.read_text() == text

    results.write_text("".join(lines[:-3]) + lines[-3][:20])
    run()
    measured = lambda lines: [
        {k: v for k, v in json.loads(line).items() if "second" not in k and k != "load"} for line in lines
    ]
    assert measured(results.read_text().splitlines()) == measured(lines)

    with pytest.raises(ValueError, match="other settings"):
        study(dataclasses.replace(budget, num_steps=4), tuple(two), tmp_path / "study", data)
