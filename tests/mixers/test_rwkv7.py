"""RWKV-7's first layer leaves its values to all others, however the layers are walked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import RWKV7Config
from efficient_lm.model import BlockConfig, ModelConfig

FIRST = RWKV7Config(num_heads=2, key_dim=8, value_dim=8, decay_rank=4, rate_rank=4, gate_rank=4)
FFN = MLPConfig(d_ff=16, activation="squared_relu")
SCANNED = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={
        "F": BlockConfig(mixer=FIRST, ffn=FFN),
        "R": BlockConfig(mixer=dataclasses.replace(FIRST, value_rank=3), ffn=FFN),
    },
    prefix="F",
    pattern="R R",
    num_periods=2,
    tail="R",
    dtype="float32",
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 32)


def logits_and_grads(cfg):
    @jax.jit
    def run(model):
        loss = lambda model: (jnp.sum(jnp.sin(logits := model(TOKENS)[0])), logits)
        return jax.grad(loss, has_aux=True)(model)

    grads, logits = run(jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))())
    first = grads.prefix[0].mixer.v_proj.kernel[...]
    return np.asarray(logits), np.asarray(first)


def test_scanned_equals_unrolled():
    """Values, and what reaches the first layer's values, in the scan, after it, and with anything computed again."""
    want = logits_and_grads(SCANNED)
    for changes in ({"num_periods": 0, "tail": "R R R R R"}, {"remat": "nothing"}):
        for got, expected in zip(logits_and_grads(dataclasses.replace(SCANNED, **changes)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_decoding():
    model = jax.jit(lambda: SCANNED.build(rngs=nnx.Rngs(0)))()
    run = jax.jit(lambda model, tokens, state=None: model(tokens, state))
    whole_BTV, _ = run(model, TOKENS)
    state, pieces = model.init_state(2, 13), []
    for piece in (TOKENS[:, :7], *jnp.split(TOKENS[:, 7:], 6, axis=1)):
        logits_BTV, state = run(model, piece, state)
        pieces.append(logits_BTV)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole_BTV, rtol=1e-4, atol=1e-5)


def test_layers_see_the_first_ones_values():
    """Where all is taken from the first layer, a later layer's own values change nothing."""
    model = SCANNED.build(rngs=nnx.Rngs(0))
    tail = model.tail[0].mixer
    tail.first_share.bias[...] = jnp.full_like(tail.first_share.bias[...], 1e4)
    before_BTV, _ = model(TOKENS)
    tail.v_proj.kernel[...] *= 3
    np.testing.assert_allclose(model(TOKENS)[0], before_BTV, rtol=1e-5, atol=1e-6)
    model.prefix[0].mixer.v_proj.kernel[...] *= 3
    assert np.max(np.abs(model(TOKENS)[0] - before_BTV)) > 0.01


def test_no_first_layer():
    model = dataclasses.replace(SCANNED, prefix="").build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="into the prefix"):
        model(TOKENS)
