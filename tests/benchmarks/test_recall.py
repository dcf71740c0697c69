"""Recall: what is asked, and that attention learns to answer it."""

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


def test_attention_recalls_one_pair(tmp_path):
    cfg = Recall(length=32, num_pairs=(1,), num_steps=100, only=("attention",), output=tmp_path)
    # What a model says that has learned nothing is right once in 32 times.
    assert main(cfg)["attention"].shape == (1, 1)
    saved = json.loads((tmp_path / "recall.json").read_text())
    assert saved["accuracy_by_pairs"]["attention"][0][0] > 0.9
    assert (tmp_path / "recall.png").stat().st_size > 0
