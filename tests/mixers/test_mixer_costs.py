"""What mixers say they cost, against the states and the programs that they make. A mixer without a cost fails here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import D_MODEL, T
from flax import nnx
from test_contract import TINY

from efficient_lm.costs import block_costs, model_costs, share, state_bytes, variables
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import (
    CompressionConfig,
    ForgettingAttentionConfig,
    GatedDeltaProductConfig,
    NativeSparseAttentionConfig,
    S4DConfig,
)
from efficient_lm.model import BlockConfig, ModelConfig

each_mixer = pytest.mark.parametrize("cfg", TINY, ids=lambda cfg: type(cfg).__name__.removesuffix("Config"))


def model(mixer, **fields) -> ModelConfig:
    block = BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=24))
    return ModelConfig(vocab_size=40, d_model=D_MODEL, blocks={"M": block}, pattern="M", num_periods=3, **fields)


def nbytes(tree) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def shapes(cfg):
    """Returns the mixer with shapes in the place of its weights."""
    return jax.eval_shape(lambda: cfg.build(D_MODEL, rngs=nnx.Rngs(0)))


@each_mixer
def test_states_have_these_bytes(cfg):
    mixer = shapes(cfg)
    state = mixer.init_state(2, T, jnp.bfloat16)
    want = nbytes(state)
    assert state_bytes(mixer, model(cfg), T, batch_size=2) == want
    assert block_costs(model(cfg), context=T, batch_size=2)["M"].state_bytes == want
    step = lambda mixer, x, state: mixer(x, state)[1]
    after = jax.eval_shape(step, mixer, jax.ShapeDtypeStruct((2, T, D_MODEL), jnp.bfloat16), state)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(after)) == want


@each_mixer
def test_models_have_these_parameters(cfg):
    whole = jax.eval_shape(lambda: model(cfg).build(rngs=nnx.Rngs(0)))
    costs = model_costs(model(cfg), context=T)
    assert costs.parameters == sum(x.size for x in jax.tree.leaves(whole))
    assert costs.active_parameters == sum(math.prod(v.shape) * share(v) for v in variables(whole))


# What XLA counts of one token is up to a third more: work on single channels. Of these it is far more.
MORE = {
    ForgettingAttentionConfig: 4.0,  # All tokens of the cache have their decays summed up at each step.
    GatedDeltaProductConfig: 2.0,  # The steps of a token are taken as tokens of a chunk.
    NativeSparseAttentionConfig: 1.6,  # Scores of blocks are made twice: to attend to these, and to choose.
    S4DConfig: 2.5,  # The filter is made from its parameters at each step.
}


@each_mixer
def test_operations_are_those_of_a_step(cfg):
    """The last of some tokens, decoded: what XLA counts is what is said, and little more."""
    mixer, context = shapes(cfg), 64
    state = jax.eval_shape(lambda: mixer.init_state(1, context))
    step = jax.jit(lambda mixer, x, state: mixer(x, state))
    token = jax.ShapeDtypeStruct((1, 1, D_MODEL), jnp.float32)
    counted = step.lower(mixer, token, state).cost_analysis()
    multiplied = [v for v in variables(mixer) if v.get_metadata().get("contracted")]
    products = 2.0 * sum(math.prod(v.shape) * share(v) for v in multiplied)
    total = lambda length: length * mixer.flops_per_token(length)
    said = products + total(context) - total(context - 1)
    # A loop's operations are counted once: MesaNet's, 0.03 of all.
    assert 0.96 < counted["flops"] / said < MORE.get(type(cfg), 4 / 3)


def test_a_block_is_compressed_once():
    """Not once for each of its tokens: of a hidden channel, 3 layers pay forward, and twice that backward."""
    K, H, L, stride = 2, 6, 4, 2

    def flops(d_hidden):
        compression = CompressionConfig(block_size=L, stride=stride, d_hidden=d_hidden)
        heads = {"num_heads": 8, "num_kv_heads": K, "head_dim": H}
        cfg = NativeSparseAttentionConfig(**heads, block_size=8, num_blocks=3, compression=compression)
        return model_costs(model(cfg), context=64).training_flops

    of_keys_and_values = 2 * K * (L * H + H) / stride
    assert flops(11) - flops(10) == 3 * 3 * 2 * of_keys_and_values
