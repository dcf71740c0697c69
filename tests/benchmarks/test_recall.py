"""Recall: what is asked, and that attention learns to answer in a few seconds."""

import json

import numpy as np

from benchmarks.recall import NUM_KEYS, Recall, main, pairs


def test_questions():
    batch = pairs(np.random.default_rng(0), np.array([2, 4, 16, 16]), 64)
    for tokens, targets, n in zip(batch.tokens, batch.targets, (2, 4, 16, 16), strict=True):
        values = dict(zip(tokens[: 2 * n : 2].tolist(), tokens[1 : 2 * n : 2].tolist(), strict=True))
        assert len(values) == n
        assert all(1 <= key <= NUM_KEYS < value <= 2 * NUM_KEYS for key, value in values.items())
        (asked,) = np.nonzero(targets)
        assert asked.min() >= 2 * n
        assert dict(zip(tokens[asked].tolist(), targets[asked].tolist(), strict=True)) == values
        assert np.count_nonzero(tokens) == 3 * n


def test_attention_recalls_what_a_window_cannot_see(tmp_path):
    cfg = Recall(
        length=48, num_pairs=(4, 8), num_steps=120, only=("attention", "sliding window of 16"), output=tmp_path
    )
    accuracies = main(cfg)
    assert accuracies["attention"].min() > 0.95
    assert accuracies["sliding window of 16"][0, 1] < 0.7
    saved = json.loads((tmp_path / "recall.json").read_text())
    assert [np.shape(values) for values in saved["accuracy_by_pairs"].values()] == [(1, 2)] * 2
    assert (tmp_path / "recall.png").stat().st_size > 0
