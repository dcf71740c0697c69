"""What the delta rule is for, in a few seconds of training."""

import json

from benchmarks.state_tracking import StateTracking, main


def test_negative_eigenvalues_learn_parity(tmp_path):
    cfg = StateTracking(longest=96, num_steps=100, num_seeds=1, output=tmp_path)
    at_length = {name: values[0, cfg.length - 8 : cfg.length].mean() for name, values in main(cfg).items()}
    assert at_length["DeltaNet, beta up to 2"] > 0.95
    # Chance is 0.5; eight lengths of 512 sequences each are off by 0.01.
    assert at_length["DeltaNet, beta up to 1"] < 0.6
    assert at_length["Mamba-2"] < 0.6
    saved = json.loads((tmp_path / "state_tracking.json").read_text())
    assert [len(x[0]) for x in saved["accuracy_by_length"].values()] == [cfg.longest] * 3
    assert (tmp_path / "state_tracking.png").stat().st_size > 0
