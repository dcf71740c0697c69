"""A dense model that becomes a mixture of experts computes what it did."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig, TopPConfig
from efficient_lm.leaves import ForeignLeaves, flatten
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.upcycling import upcycle

ATTENTION, MAMBA = AttentionConfig(num_heads=2, head_dim=8), Mamba2Config(num_heads=2, key_dim=8, value_dim=8)
ROUTER = TopKConfig(top_k=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 32)


def model(attention_ffn, mamba_ffn) -> ModelConfig:
    blocks = {"A": BlockConfig(mixer=ATTENTION, ffn=attention_ffn), "M": BlockConfig(mixer=MAMBA, ffn=mamba_ffn)}
    return ModelConfig(
        vocab_size=32, d_model=16, blocks=blocks, prefix="A", pattern="M A", num_periods=2, tail="M", dtype="float32"
    )


def moe(router=ROUTER, **fields) -> MoEConfig:
    return MoEConfig(**{"router": router, "num_experts": 4, "d_ff": 24} | fields)


@functools.cache
def dense():
    return jax.jit(lambda: model(MLPConfig(d_ff=24), MLPConfig(d_ff=24)).build(rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(
    "router",
    [ROUTER, TopKConfig(top_k=3, scores="sigmoid", bias_rate=1e-3, balance_loss=0.1)],
    ids=["softmax", "sigmoid and bias"],
)
def test_computes_what_the_dense_model_did(router):
    """Every second network is replaced, inside the periods and outside of them."""
    before = dense()
    after = upcycle(flatten(before), model(moe(router), MLPConfig(d_ff=24)), jax.random.key(1))
    logits = jax.jit(lambda model: model(TOKENS)[0])
    got, want = np.asarray(logits(after)), np.asarray(logits(before))
    # The same sums, weighted with numbers that sum to one.
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 1e-6
    assert jnp.any(after.periods[1].ffn.router.proj.kernel[...])


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        (moe(TopKConfig(top_k=2, renormalize=False)), "weights that sum to one"),
        (moe(TopKConfig(top_k=2, scale=2.5)), "weights that sum to one"),
        (moe(TopPConfig(top_p=0.5, max_experts=2, expected_experts=1.5)), "weights that sum to one"),
        (moe(shared=MLPConfig(d_ff=8)), "no network beside them"),
        (moe(TopKConfig(top_k=2, capacity_factor=1.0)), "dropped"),
        (moe(d_ff=12), r"periods/1/ffn/experts/up_proj is float32\[2,16,24\], not float32\[2,4,16,12\]"),
        (moe(activation="gelu"), "gate_proj/kernel .* is unknown here"),
    ],
)
def test_says_what_does_not_fit(ffn, message):
    with pytest.raises((ValueError, ForeignLeaves), match=message):
        upcycle(flatten(dense()), model(ffn, MLPConfig(d_ff=24)), jax.random.key(1))
