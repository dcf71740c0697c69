"""What must hold for every feed-forward network, whatever it computes: one function per promise of `ffns/base.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.ffns import FFN, FFNConfig
from efficient_lm.sharding import make_mesh, shard

D_MODEL, T = 16, 12
# Two documents a row, with padding before, between and after them.
PACKED = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]], np.int32)

call = jax.jit(lambda ffn, x, segment_ids=None: ffn(x, segment_ids=segment_ids, tokens=tokens(x)))


def build(cfg: FFNConfig) -> FFN:
    return cfg.build(D_MODEL, rngs=nnx.Rngs(0))


def inputs(batch_size: int = 2, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch_size, T, D_MODEL))


def tokens(x_BTD):
    """Returns numbers that the inputs might have been embedded from."""
    return jnp.argmax(x_BTD, axis=-1)


def loss(ffn, x_BTD, dy_BTD, ids_BT):
    """Returns a number that depends on every output at real tokens, and on every loss that the network reports."""
    y_BTD, aux = ffn(x_BTD, segment_ids=ids_BT, tokens=tokens(x_BTD))
    total = jnp.sum(jnp.where((ids_BT > 0)[..., None], y_BTD * dy_BTD, 0.0))
    return total + sum(value for name, value in aux.items() if name.endswith("_loss")), (y_BTD, aux)


gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_close(got, want, tolerance, what):
    """Compares trees leaf by leaf, by the error's root mean square relative to the wanted values'."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-6)
        name = f"{what} {jax.tree_util.keystr(path, simple=True, separator='/')}"
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def each_token_by_itself(cfg: FFNConfig) -> None:
    """What comes out for a token depends on it alone: not on its row, its document, or what comes after it."""
    ffn, x_BTD = build(cfg), inputs()
    y_BTD, _ = call(ffn, x_BTD)
    alone_BTD, _ = call(ffn, x_BTD.reshape(-1, 1, D_MODEL))
    assert_close(alone_BTD.reshape(x_BTD.shape), y_BTD, 1e-5, "one by one")
    grad_BTD = jax.jit(jax.grad(lambda x: call(ffn, x)[0][:, 6].sum()))(x_BTD)
    assert np.all(np.any(grad_BTD[:, 6] != 0, axis=-1)), "an output does not depend on its token"
    assert not np.any(np.delete(grad_BTD, 6, axis=1)), "an output depends on another token"


def padding_changes_nothing(cfg: FFNConfig) -> None:
    """Tokens in the place of padding change no output, no measurement, no gradient; and get none."""
    ffn, x_BTD, dy_BTD, ids_BT = build(cfg), inputs(), inputs(seed=2), jnp.asarray(PACKED)
    is_real = PACKED[..., None] > 0
    run = lambda x_BTD: gradients(ffn, x_BTD, dy_BTD, ids_BT)
    (want_loss, (want_BTD, want_aux)), want_grads = run(x_BTD)
    (got_loss, (got_BTD, got_aux)), got_grads = run(jnp.where(is_real, x_BTD, 3.0 * x_BTD + 1.0))
    assert_close(got_BTD * is_real, want_BTD * is_real, 1e-6, "output")
    assert_close((got_loss, got_aux), (want_loss, want_aux), 1e-6, "reported")
    assert_close(got_grads, want_grads, 1e-5, "gradient of")
    assert not np.any(got_grads[1] * ~is_real), "padding has a gradient"


def counts_every_token_once(cfg: FFNConfig) -> None:
    """What is reported about packed rows is what would be reported about their tokens without the padding."""
    ffn, x_BTD = build(cfg), inputs()
    _, got = call(ffn, x_BTD, jnp.asarray(PACKED))
    _, want = call(ffn, x_BTD[PACKED > 0].reshape(2, -1, D_MODEL))
    assert_close(got, want, 1e-5, "reported")


def sharded_equals_single(cfg: FFNConfig) -> None:
    """Eight devices give the loss, the reports and the gradients of one, however the mesh has its axes."""

    def run(batch_dims):
        ffn = jax.jit(lambda: build(cfg))()
        data = (inputs(8), inputs(8, seed=2), jnp.asarray(np.tile(PACKED, (4, 1))))
        data = [shard(x, dims) for x, dims in zip(data, batch_dims, strict=True)]
        (_, (y_BTD, aux)), grads = gradients(ffn, *data)
        return jax.device_get((y_BTD * (data[2] > 0)[..., None], aux, grads))

    single = run(("", "", ""))
    for mesh in ({"data": 2, "expert": 4}, {"data": 2, "model": 2, "expert": 2}, {"data": 4, "model": 2}):
        with jax.set_mesh(make_mesh(mesh)):
            assert_close(run(("BTD", "BTD", "BT")), single, 1e-5, f"sharded {mesh}")


def bfloat16_is_close(cfg: FFNConfig) -> None:
    """Half the bits give nearly the same outputs: what decides between experts is computed in float32."""
    ffn, x_BTD = build(cfg), inputs().astype(jnp.bfloat16)
    y_BTD, _ = call(ffn, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16, f"bfloat16 in, {y_BTD.dtype} out"
    # bfloat16 has 8 bits: each of the few roundings in a row is off by up to 2**-9 of its value.
    assert_close(y_BTD, call(ffn, x_BTD.astype(jnp.float32))[0], 0.02, "bfloat16")


def extremes_are_finite(cfg: FFNConfig) -> None:
    """No tokens, padding alone, and inputs that saturate every gate give finite values and gradients."""
    ffn = build(cfg)
    assert call(ffn, inputs()[:, :0])[0].shape == (2, 0, D_MODEL)
    for scale, ids_BT in ((0.0, PACKED), (1e-4, PACKED), (300.0, PACKED), (1.0, np.zeros_like(PACKED))):
        result = gradients(ffn, scale * inputs(), inputs(seed=2), jnp.asarray(ids_BT))
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            assert np.all(np.isfinite(leaf)), f"inputs of size {scale}: {jax.tree_util.keystr(path)} is not finite"


PROMISES = (
    each_token_by_itself,
    padding_changes_nothing,
    counts_every_token_once,
    sharded_equals_single,
    bfloat16_is_close,
    extremes_are_finite,
)
