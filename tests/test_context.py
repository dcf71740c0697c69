"""Sequences in parts on several devices: the same loss and gradients as on one, and little to send."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.data import Batch
from efficient_lm.hlo import Program, collectives
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig, HGRNConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.sampling import SamplingConfig, generate
from efficient_lm.sharding import make_mesh, sharding, undivided

T, PATTERN = 64, "M D H W"
MIXERS = {
    "M": Mamba2Config(num_heads=2, num_groups=2, key_dim=8, value_dim=8),
    "D": GatedDeltaNetConfig(num_heads=2, key_dim=8, value_dim=8),
    "H": HGRNConfig(width=16),
    "A": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "W": AttentionConfig(num_heads=2, head_dim=8, window_size=12, sink_tokens=2),
}


def model_config(pattern):
    blocks = {letter: BlockConfig(mixer=mixer, ffn=None) for letter, mixer in MIXERS.items()}
    return ModelConfig(
        vocab_size=32, d_model=16, blocks=blocks, pattern=pattern, num_periods=1, dtype="float32", remat="nothing"
    )


def batch():
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 32, (2, T), dtype=np.int32) for _ in range(2))
    # One document over all parts but the last tokens; several that end inside of parts, on borders, and in padding.
    ids = np.ones((2, T), np.int32)
    ids[0, 60:] = 2
    ids[1] = np.repeat([0, 1, 2, 0, 3, 4, 0], [3, 21, 8, 9, 7, 6, 10])
    return Batch(tokens, targets, ids)


def loss_and_gradients(cfg):
    objective = NextTokenConfig().build()
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(params=jax.random.key(0))))()
    put = jax.tree.map(lambda x: jax.device_put(x, sharding("BT")), batch())
    step = jax.jit(jax.value_and_grad(lambda model, batch: objective(model, batch)[0]))
    loss, grads = step(model, put)
    return jax.device_get((loss, jax.tree.leaves(grads)))


def test_equals_one_device():
    loss, grads = loss_and_gradients(model_config(PATTERN))
    with jax.set_mesh(make_mesh({"model": 2, "context": 4})):
        loss_in_parts, grads_in_parts = loss_and_gradients(model_config(PATTERN))
    np.testing.assert_allclose(loss_in_parts, loss, rtol=1e-5)
    # Those of decay rates are sums over tokens that nearly cancel: 1.4e-5 apart when added in another order.
    for one, parts in zip(grads, grads_in_parts, strict=True):
        assert np.linalg.norm(parts - one) <= 1e-4 * np.linalg.norm(one)


def test_sends_states_not_tokens():
    """What a recurrent mixer sends, forward and backward, does not grow with the number of tokens."""
    mesh = make_mesh({"context": 8})
    with jax.set_mesh(mesh):
        mixer = jax.eval_shape(lambda: MIXERS["M"].build(16, rngs=nnx.Rngs(0)))

        def sent(num_tokens):
            x = jax.ShapeDtypeStruct((1, num_tokens, 16), jnp.float32, sharding=sharding("BTD"))
            grad = jax.jit(jax.grad(lambda mixer, x: jnp.sum(mixer(x)[0] ** 2), argnums=(0, 1)))
            program = Program(grad.lower(mixer, x).compile().as_text() or "")
            return sum(collective.bytes for collective in collectives(program, mesh.shape))

        assert 0 < sent(1024) == sent(8192)


def test_samples_one_prompt():
    """Neither its row nor its tokens can be divided among devices; what comes is what one device says."""
    make = jax.jit(lambda: model_config("M A").build(rngs=nnx.Rngs(params=jax.random.key(0))))
    sample = lambda model: next(
        generate(model, [[1, 2, 3]], jax.random.key(0), SamplingConfig(max_tokens=3, temperature=0.0), tokens_at_once=3)
    )
    one = sample(make())
    with jax.set_mesh(make_mesh({"data": 2, "model": 2, "context": 2})), undivided(make()) as model:
        np.testing.assert_array_equal(sample(model), one)
