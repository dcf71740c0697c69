"""Hash layers in a model: its tokens reach every layer, however these are walked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.depths import MixtureOfDepthsConfig
from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import HashConfig
from efficient_lm.mixers import GLAConfig
from efficient_lm.model import BlockConfig, ModelConfig

GLA = GLAConfig(num_heads=2, key_dim=8, value_dim=8)
MOE = MoEConfig(router=HashConfig(), num_experts=4, d_ff=8)
DEPTHS = MixtureOfDepthsConfig(mixer=GLA, ffn=MOE, share=0.5, capacity_factor=2.0)
MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={"M": BlockConfig(mixer=GLA, ffn=MOE), "D": DEPTHS},
    prefix="M",
    pattern="M D",
    num_periods=2,
    dtype="float32",
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 32)


def test_a_model_in_parts():
    """Scanned and recomputed layers, and some that see some of the tokens: in parts what they are at once."""
    model = jax.jit(lambda: MODEL.build(rngs=nnx.Rngs(0)))()
    run = jax.jit(lambda model, tokens, state=None: model(tokens, state))
    want_BTV, _ = run(model, TOKENS)
    state, parts = model.init_state(2, 13), []
    for part in (TOKENS[:, :9], *jnp.split(TOKENS[:, 9:], 4, axis=1)):
        logits_BTV, state = run(model, part, state)
        parts.append(logits_BTV)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want_BTV, atol=1e-5)
    grads = jax.jit(jax.grad(lambda model: jnp.sum(jnp.square(model(TOKENS)[0]))))(model)
    assert all(np.any(x != 0) for x in jax.tree.leaves(grads.prefix[0].ffn))


def test_needs_tokens():
    with pytest.raises(ValueError, match="needs the tokens' numbers"):
        jax.eval_shape(MOE.build(16, rngs=nnx.Rngs(0)), jnp.zeros((1, 3, 16)))


def test_hashes_that_do_not_share():
    with pytest.raises(ValueError, match="num_hashes=3 does not divide 4, the number of experts"):
        dataclasses.replace(MOE, router=HashConfig(num_hashes=3)).build(16, rngs=nnx.Rngs(0))
