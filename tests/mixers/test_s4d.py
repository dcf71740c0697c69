import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.mixers import S4DConfig, s4d


def test_channels_a_few_at_a_time(monkeypatch):
    mixer = S4DConfig(state_size=4).build(12, rngs=nnx.Rngs(0))
    x_BTD, dy_BTD = jax.random.normal(jax.random.key(1), (2, 2, 20, 12))
    ids_BT = jnp.asarray([[1] * 8 + [2] * 12, [0] * 3 + [1] * 17])
    start = jax.tree.map(lambda h: h + 0.5, mixer.init_state(2, 20))

    def run(mixer, x_BTD):
        y_BTD, state = mixer(x_BTD, start, segment_ids=ids_BT)
        return jnp.sum(y_BTD * dy_BTD) + jnp.sum(jnp.abs(state.h) ** 2), y_BTD

    def values_and_gradients():
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(mixer, x_BTD)

    want = values_and_gradients()
    monkeypatch.setattr(s4d, "NUM_OSCILLATORS", 13)  # three channels, four times
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), values_and_gradients(), want)
