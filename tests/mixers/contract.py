"""What must hold for every mixer, whatever it computes: one function per promise of `mixers/base.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.mixers import Mixer, MixerConfig
from efficient_lm.sharding import make_mesh, shard

D_MODEL, T = 32, 12
# Documents side by side, with padding before, between and after them; all of one length, so that they make a batch.
PACKED = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]], np.int32)
# The same documents, each with the padding behind it, the first with that before it.
WITHOUT_PADDING = np.maximum.accumulate(np.maximum(PACKED, 1), axis=1)

call = jax.jit(lambda mixer, x, state=None, segment_ids=None: mixer(x, state, segment_ids=segment_ids))


def build(cfg: MixerConfig) -> Mixer:
    return cfg.build(D_MODEL, rngs=nnx.Rngs(0))


def inputs(batch_size: int = 2, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch_size, T, D_MODEL))


def assert_close(got, want, tolerance, what):
    """Compares trees leaf by leaf, by the error's root mean square relative to the wanted values'."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-6) if a.size else 0.0
        name = f"{what} {jax.tree_util.keystr(path, simple=True, separator='/')}"
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def cut_anywhere(cfg: MixerConfig) -> None:
    """Prefill, chunked prefill and decoding give what one pass gives."""
    mixer, x_BTD = build(cfg), inputs()
    whole_BTD, none = call(mixer, x_BTD)
    assert none is None, "without a state the mixer must not return one"
    for cut in (0, 1, 6):
        state = mixer.init_state(2, T)
        left_BTD, state = call(mixer, x_BTD[:, :cut], state)
        right_BTD, state = call(mixer, x_BTD[:, cut:], state)
        assert_close(jnp.concatenate([left_BTD, right_BTD], axis=1), whole_BTD, 1e-5, f"cut at {cut}")
    state, steps = mixer.init_state(2, T), []
    for t in range(T):
        y_BTD, state = call(mixer, x_BTD[:, t : t + 1], state)
        steps.append(y_BTD)
    assert_close(jnp.concatenate(steps, axis=1), whole_BTD, 1e-5, "one by one")


def cut_packed(cfg: MixerConfig) -> None:
    """A row is cut inside a document, and at padding; the state belongs to the document that goes on."""
    mixer, x_BTD = build(cfg), inputs()
    whole_BTD, _ = call(mixer, x_BTD, None, PACKED)
    for cut in (3, 9):
        state = mixer.init_state(2, T)
        left_BTD, state = call(mixer, x_BTD[:, :cut], state, PACKED[:, :cut])
        right_BTD, state = call(mixer, x_BTD[:, cut:], state, PACKED[:, cut:])
        got_BTD = jnp.concatenate([left_BTD, right_BTD], axis=1)
        is_real = PACKED[..., None] > 0
        assert_close(got_BTD * is_real, whole_BTD * is_real, 1e-5, f"packed, cut at {cut}")


def future_does_not_leak(cfg: MixerConfig) -> None:
    """Outputs do not depend on later tokens, to the bit; and do on all earlier ones."""
    mixer, x_BTD, t = build(cfg), inputs(), 6
    changed_BTD = x_BTD.at[:, t + 1 :].multiply(-3.0)
    y_BTD, other_BTD = call(mixer, x_BTD)[0], call(mixer, changed_BTD)[0]
    assert np.array_equal(y_BTD[:, : t + 1], other_BTD[:, : t + 1]), "later tokens changed earlier outputs"
    grad_BTD = jax.jit(jax.grad(lambda x: mixer(x)[0][:, t].sum()))(x_BTD)
    assert not np.any(grad_BTD[:, t + 1 :]), "an output has a gradient with respect to later tokens"
    assert np.all(np.any(grad_BTD[:, : t + 1], axis=-1)), "an output does not see all earlier tokens"


def packed_equals_separate(cfg: MixerConfig) -> None:
    """Documents in one row, with padding about them, give the values and gradients of rows of their own."""
    mixer, x_BTD, dy_BTD = build(cfg), inputs(), inputs(seed=2)

    def packed(mixer, x_BTD):
        y_BTD, _ = mixer(x_BTD, segment_ids=jnp.asarray(PACKED))
        return jnp.sum(y_BTD * dy_BTD * (PACKED[..., None] > 0)), y_BTD

    rows, columns = np.nonzero(PACKED)
    rows, columns = rows.reshape(-1, 5), columns.reshape(-1, 5)

    def separate(mixer, x_BTD):
        y_BTD, _ = mixer(x_BTD[rows, columns])
        total = jnp.sum(y_BTD * dy_BTD[rows, columns])
        return total, jnp.zeros_like(x_BTD).at[rows, columns].set(y_BTD)

    run = lambda fn: jax.jit(jax.grad(fn, argnums=(0, 1), has_aux=True))(mixer, x_BTD)
    (grads, y_BTD), (want_grads, want_BTD) = run(packed), run(separate)
    is_real = PACKED[..., None] > 0
    assert_close(y_BTD * is_real, want_BTD, 1e-5, "packed")
    assert_close(grads, want_grads, 1e-4, "packed, gradient of")
    assert not np.any(grads[1] * ~is_real), "padding has a gradient"


def sharded_equals_single(cfg: MixerConfig) -> None:
    """Eight devices, data and model parallel, give the loss and gradients of one."""

    def run(batch_dims):
        def loss(mixer, x_BTD, dy_BTD, ids_BT):
            y_BTD, _ = mixer(x_BTD, segment_ids=ids_BT)
            return jnp.sum(y_BTD * dy_BTD)

        mixer = jax.jit(lambda: build(cfg))()
        data = (inputs(4), inputs(4, seed=2), jnp.asarray(np.tile(WITHOUT_PADDING, (2, 1))))
        data = [shard(x, dims) for x, dims in zip(data, batch_dims, strict=True)]
        return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(mixer, *data))

    single = run(("", "", ""))
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        sharded = run(("BTD", "BTD", "BT"))
    assert_close(sharded, single, 1e-5, "sharded")


def bfloat16_is_close(cfg: MixerConfig) -> None:
    """Half the bits give nearly the same outputs: decays and states stay in float32."""
    mixer, x_BTD = build(cfg), inputs().astype(jnp.bfloat16)
    y_BTD, state = call(mixer, x_BTD, mixer.init_state(2, T, jnp.bfloat16))
    assert y_BTD.dtype == jnp.bfloat16, f"bfloat16 in, {y_BTD.dtype} out"
    # bfloat16 has 8 bits: each of the few roundings in a row is off by up to 2**-9 of its value.
    assert_close(y_BTD, call(mixer, x_BTD.astype(jnp.float32))[0], 0.03, "bfloat16")
    again_BTD, _ = call(mixer, x_BTD, state) if not hasattr(state, "length") else (y_BTD, None)
    assert np.all(np.isfinite(again_BTD.astype(jnp.float32)))


def extremes_are_finite(cfg: MixerConfig) -> None:
    """Inputs that saturate every gate give finite values and gradients."""
    mixer = build(cfg)
    gradient = jax.jit(jax.grad(lambda mixer, x_BTD: jnp.sum(jnp.square(mixer(x_BTD)[0])), argnums=(0, 1)))
    for scale in (0.0, 1e-4, 300.0):
        grads = gradient(mixer, scale * inputs())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            assert np.all(np.isfinite(leaf)), f"inputs of size {scale}: gradient of {jax.tree_util.keystr(path)}"


PROMISES = (
    cut_anywhere,
    cut_packed,
    future_does_not_leak,
    packed_equals_separate,
    sharded_equals_single,
    bfloat16_is_close,
    extremes_are_finite,
)
