"""A transformer that several layers call: what it costs, and what its calls have in common."""

import dataclasses

import jax
import pytest
from flax import nnx

from efficient_lm.costs import model_costs, num_parameters
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.transformer_call import TransformerCallConfig

CALL = TransformerCallConfig(
    name="shared",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=MLPConfig(d_ff=24),
    adapter_rank=3,
    adapted=("attention.q_proj", "ffn.up_proj"),
)
MIXER = Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=8)
MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={"M": BlockConfig(mixer=MIXER, ffn=None), "S": BlockConfig(mixer=MIXER, ffn=None, call=CALL)},
    pattern="M S",
    num_periods=2,
    dtype="float32",
)


def test_costs_are_those_of_the_model():
    model = jax.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0)).init_state(2, 9))
    costs = model_costs(MODEL, context=9, batch_size=2)
    assert costs.parameters == num_parameters(model)
    assert costs.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # Each call multiplies with all weights of the transformer.
    alone = dataclasses.replace(MODEL, blocks={**MODEL.blocks, "S": MODEL.blocks["M"]})
    matrices = sum(x.size for x in jax.tree.leaves(model.called) if x.ndim > 1)
    extra = costs.training_flops - model_costs(alone, context=9).training_flops
    assert extra > 2 * 6 * matrices


def test_calls_of_one_name_are_alike():
    other = dataclasses.replace(MODEL.blocks["S"], call=dataclasses.replace(CALL, adapter_rank=4))
    with pytest.raises(ValueError, match="calls of 'shared' differ"):
        dataclasses.replace(MODEL, blocks={**MODEL.blocks, "T": other})
