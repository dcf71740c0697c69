"""What must hold for every mixer, whatever it computes: one function per promise of `mixers/base.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from efficient_lm.mixers import Mixer, MixerConfig
from efficient_lm.sharding import make_mesh, shard

D_MODEL, B, T = 32, 4, 12
# Documents side by side, with padding before, between and after them; all of one length, so that they make a batch.
PACKED = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]] * 2, np.int32)
IS_REAL = PACKED[..., None] > 0

# What takes the time is compiling: promises share programs, so all calls are of few shapes.
call = jax.jit(lambda mixer, x, state=None, segment_ids=None: mixer(x, state, segment_ids=segment_ids))


@jax.jit
def differentiate(mixer, x_BTD, dy_BTD, segment_ids=None):
    """Returns the outputs, and the gradients of the mixer and x given those of the outputs."""

    def loss(mixer, x_BTD):
        y_BTD, _ = mixer(x_BTD, segment_ids=segment_ids)
        return jnp.sum(y_BTD * dy_BTD), y_BTD

    grads, y_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(mixer, x_BTD)
    return y_BTD, grads


def build(cfg: MixerConfig) -> Mixer:
    return cfg.build(D_MODEL, rngs=nnx.Rngs(0))


built = functools.cache(build)


def inputs(seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, D_MODEL))


def assert_close(got, want, tolerance, what):
    """Compares trees leaf by leaf, by the error's root mean square relative to the wanted values'."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-6) if a.size else 0.0
        name = f"{what} {jax.tree_util.keystr(path, simple=True, separator='/')}"
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def cut_anywhere(cfg: MixerConfig) -> None:
    """Prefill, chunked prefill and decoding give what one pass gives."""
    mixer, x_BTD = built(cfg), inputs()
    whole_BTD, none = call(mixer, x_BTD)
    assert none is None, "without a state the mixer must not return one"
    for lengths in ((6, 0, 6), (0, 6, *[1] * 6), [1] * T):
        state, parts, start = mixer.init_state(B, T), [], 0
        for length in lengths:
            y_BTD, state = call(mixer, x_BTD[:, start : start + length], state)
            parts.append(y_BTD)
            start += length
        assert_close(jnp.concatenate(parts, axis=1), whole_BTD, 1e-5, f"in parts of {lengths}")


def cut_packed(cfg: MixerConfig) -> None:
    """Rows are cut inside documents; the state belongs to the one that goes on."""
    mixer, x_BTD = built(cfg), inputs()
    whole_BTD, _ = call(mixer, x_BTD, None, PACKED)
    state, parts = mixer.init_state(B, T), []
    for part in (slice(0, 3), slice(3, 9), slice(9, T)):
        y_BTD, state = call(mixer, x_BTD[:, part], state, PACKED[:, part])
        parts.append(y_BTD)
    assert_close(jnp.concatenate(parts, axis=1) * IS_REAL, whole_BTD * IS_REAL, 1e-5, "packed, cut")


def future_does_not_leak(cfg: MixerConfig) -> None:
    """Outputs do not depend on later tokens, to the bit; and do on all earlier ones."""
    mixer, x_BTD, t = built(cfg), inputs(), 6
    changed_BTD = x_BTD.at[:, t + 1 :].multiply(-3.0)
    y_BTD, other_BTD = call(mixer, x_BTD)[0], call(mixer, changed_BTD)[0]
    assert np.array_equal(y_BTD[:, : t + 1], other_BTD[:, : t + 1]), "later tokens changed earlier outputs"
    only_t_BTD = jnp.zeros_like(x_BTD).at[:, t].set(1)
    _, (_, grad_BTD) = differentiate(mixer, x_BTD, only_t_BTD, np.ones((B, T), np.int32))
    assert not np.any(grad_BTD[:, t + 1 :]), "an output has a gradient with respect to later tokens"
    assert np.all(np.any(grad_BTD[:, : t + 1], axis=-1)), "an output does not see all earlier tokens"


def packed_equals_separate(cfg: MixerConfig) -> None:
    """Documents in one row, with padding about them, give the values and gradients of rows of their own."""
    mixer, x_BTD, dy_BTD = built(cfg), inputs(), inputs(seed=2)
    y_BTD, (dmixer, dx_BTD) = differentiate(mixer, x_BTD, dy_BTD * IS_REAL, PACKED)
    of_documents = tuple(index.reshape(-1, 5) for index in np.nonzero(PACKED))
    want, (want_dmixer, want_dx) = differentiate(mixer, x_BTD[of_documents], dy_BTD[of_documents])
    assert_close(y_BTD[of_documents], want, 1e-5, "packed")
    assert_close((dmixer, dx_BTD[of_documents]), (want_dmixer, want_dx), 1e-4, "packed, gradient of")
    assert not np.any(dx_BTD * ~IS_REAL), "padding has a gradient"


def sharded_equals_single(cfg: MixerConfig) -> None:
    """Eight devices that split rows, heads and tokens, documents too, give the outputs and gradients of one."""
    args = built(cfg), inputs(), inputs(seed=2) * IS_REAL, jnp.asarray(PACKED)
    single = differentiate(*args)
    mesh = make_mesh({"data": 2, "model": 2, "context": 2})
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: cfg.build(D_MODEL, rngs=nnx.Rngs(0)))
        layout = jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), shapes)
        data = [shard(x, dims) for x, dims in zip(args[1:], ("BTD", "BTD", "BT"), strict=True)]
        sharded = jax.device_get(differentiate(jax.device_put(args[0], layout), *data))
    assert_close(sharded, single, 1e-5, "sharded")


def bfloat16_is_close(cfg: MixerConfig) -> None:
    """Half the bits give nearly the same outputs: decays and states stay in float32."""
    mixer, x_BTD = built(cfg), inputs().astype(jnp.bfloat16)
    y_BTD, state = call(mixer, x_BTD, mixer.init_state(B, T, jnp.bfloat16))
    assert y_BTD.dtype == jnp.bfloat16, f"bfloat16 in, {y_BTD.dtype} out"
    # bfloat16 has 8 bits: each of the few roundings in a row is off by up to 2**-9 of its value.
    assert_close(y_BTD, call(mixer, x_BTD.astype(jnp.float32))[0], 0.03, "bfloat16")
    again_BTD, _ = call(mixer, x_BTD, state) if not hasattr(state, "length") else (y_BTD, None)
    assert np.all(np.isfinite(again_BTD.astype(jnp.float32)))


def extremes_are_finite(cfg: MixerConfig) -> None:
    """Inputs that saturate every gate give finite values and gradients."""
    mixer = built(cfg)
    for scale in (0.0, 1e-4, 300.0):
        x_BTD = scale * inputs()
        y_BTD, grads = differentiate(mixer, x_BTD, call(mixer, x_BTD)[0], np.ones((B, T), np.int32))
        for path, leaf in jax.tree_util.tree_leaves_with_path((y_BTD, grads)):
            assert np.all(np.isfinite(leaf)), f"inputs of size {scale}: {jax.tree_util.keystr(path)}"


PROMISES = (
    cut_anywhere,
    cut_packed,
    future_does_not_leak,
    packed_equals_separate,
    sharded_equals_single,
    bfloat16_is_close,
    extremes_are_finite,
)
