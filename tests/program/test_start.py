"""A run that begins with the weights of another, and goes on from its own after that."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from efficient_lm.data import BytesConfig, TrainBPEConfig
from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.sample import load_run
from efficient_lm.starting import check_start, starting_model

pytestmark = pytest.mark.slow


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_begins_with_other_weights(program, monkeypatch):
    code, output = program.finish("--num-steps", "30")
    assert code == 0, output
    first, second = program.runs / "run", program.runs / "second"
    start = ["--start-from", str(first), "--num-steps", "30"]
    process = program.start(*start, run="second")
    assert process.stdout is not None
    for line in process.stdout:
        if "step 10/" in line:
            break
    process.kill()
    process.communicate()
    code, output = program.finish(*start, run="second")
    assert code == 0, output
    assert "going on from step" in output
    assert losses(second)[0] < losses(first)[0] - 0.5, "it began anew"

    monkeypatch.setenv("TEXT", str(program.text))
    cfg = dataclasses.replace(tiny.config(), start_from=str(first))
    blocks = dict(cfg.model.blocks)
    experts = MoEConfig(router=TopKConfig(top_k=2), num_experts=4, d_ff=16)
    blocks["A"] = dataclasses.replace(blocks["A"], ffn=experts)
    mixture = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, blocks=blocks))
    dense, tokenizer, _ = load_run(first)
    check_start(mixture)
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 258)
    logits = jax.jit(lambda model: model(tokens)[0])
    got, want = logits(starting_model(mixture, tokenizer)), logits(dense)
    np.testing.assert_allclose(got, want, atol=1e-5)

    wider = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, d_model=32))
    with pytest.raises(ValueError, match=r"embedding is float32\[258,16\], not float32\[258,32\]"):
        check_start(wider)
    (second / "empty").mkdir()
    (second / "empty" / "config.json").write_text((first / "config.json").read_text())
    with pytest.raises(ValueError, match="no checkpoint"):
        check_start(dataclasses.replace(cfg, start_from=str(second / "empty")))
    other = TrainBPEConfig(vocab_size=270)
    assert isinstance(cfg.data.tokenizer, BytesConfig)
    data = dataclasses.replace(cfg.data, tokenizer=other).build(
        run_dir=program.runs / "third", batch_size=4, seq_len=32, seed=0
    )
    with pytest.raises(ValueError, match="a tokenizer of 258 tokens that is not this run's, of"):
        starting_model(cfg, data.tokenizer)
