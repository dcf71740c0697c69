"""A softmax model that becomes a linear one keeps its weights, and in its windows what it computes."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import MLPConfig
from efficient_lm.leaves import ForeignLeaves, flatten
from efficient_lm.linearization import linearize
from efficient_lm.mixers import AttentionConfig, LigerConfig, LoLCATsConfig
from efficient_lm.model import BlockConfig, ModelConfig

HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 32)


def model(linear, **attention) -> ModelConfig:
    """Two layers, of which the second becomes `linear`."""
    mixers = {"A": AttentionConfig(**HEADS), "L": linear or AttentionConfig(**HEADS | attention)}
    blocks = {letter: BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=24)) for letter, mixer in mixers.items()}
    return ModelConfig(vocab_size=32, d_model=16, blocks=blocks, pattern="A L", num_periods=1, dtype="float32")


def build(cfg):
    return jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()


softmax = functools.cache(lambda: build(model(None)))


def lolcats(window_size):
    return model(LoLCATsConfig(**HEADS, feature_dim=4, window_size=window_size))


def logits_of(model):
    return np.asarray(jax.jit(lambda model: model(TOKENS)[0])(model))


def relative_error(got, want):
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


def test_within_its_window_it_computes_what_softmax_attention_did():
    linear = lambda window_size: linearize(flatten(softmax()), lolcats(window_size), jax.random.key(1))
    want, got = logits_of(softmax()), logits_of(linear(5))
    assert relative_error(logits_of(linear(13)), want) < 1e-6
    # The first tokens see no more than their window.
    assert relative_error(got[:, :5], want[:, :5]) < 1e-6
    assert relative_error(got[:, 5:], want[:, 5:]) > 1e-3


def test_liger_has_no_weights_of_its_own():
    before = flatten(softmax())
    after = flatten(linearize(before, model(LigerConfig(**HEADS)), jax.random.key(1)))
    assert set(after) == set(before)
    assert all(np.array_equal(after[path], before[path]) for path in before)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (model(None, output_gate=True), lolcats(5), "mixer/gate_proj/kernel .* is unknown here"),
        (model(None), model(LigerConfig(num_heads=4, head_dim=8)), r"mixer/k_proj/kernel is .*, not "),
    ],
)
def test_says_what_does_not_fit(before, after, message):
    with pytest.raises(ForeignLeaves, match=message):
        linearize(flatten(build(before)), after, jax.random.key(1))
