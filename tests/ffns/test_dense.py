"""Routers of which no library has a layer, against plain dense definitions: every expert on every token."""

import jax
import jax.numpy as jnp
import numpy as np
import promises
import pytest
from test_ffns import TINY

from efficient_lm import buffers

E, D = 8, promises.D_MODEL


def every_expert(ffn, x):
    """Returns what each expert makes of each token."""
    up, gate, down = ffn.experts.up_proj[...], ffn.experts.gate_proj[...], ffn.experts.down_proj[...]
    hidden = jax.nn.silu(jnp.einsum("...d,edf->...ef", x, gate)) * jnp.einsum("...d,edf->...ef", x, up)
    return jnp.einsum("...ef,efd->...ed", hidden, down)


def weighted(ffn, x, weights_BTE):
    return jnp.einsum("bte,bted->btd", weights_BTE, every_expert(ffn, x))


def largest(scores, number):
    """Returns which entries are among so many largest of the last dimension."""
    return jnp.sum(scores[..., None, :] > scores[..., :, None], axis=-1) < number


def top_p(ffn, x, is_real):
    probabilities = jax.nn.softmax(x @ ffn.router.proj.kernel[...])
    likelier = jnp.sum(
        jnp.where(probabilities[..., None, :] > probabilities[..., :, None], probabilities[..., None, :], 0.0), axis=-1
    )
    taken = (likelier < 0.6) & largest(probabilities, 5)
    return weighted(ffn, x, jnp.where(taken, probabilities, 0.0))


def relu(ffn, x, is_real):
    scores = jax.nn.relu(x @ ffn.router.proj.kernel[...])
    return weighted(ffn, x, jnp.where(largest(scores, 6), scores, 0.0))


def expert_choice(ffn, x, is_real):
    scores = jax.nn.softmax(x @ ffn.router.proj.kernel[...])
    by_expert = jnp.where(is_real[..., None], scores, 0.0).swapaxes(1, 2)
    taken = largest(by_expert, 2 * x.shape[1] // E).swapaxes(1, 2) & is_real[..., None]
    return weighted(ffn, x, jnp.where(taken, scores, 0.0))


def soft(ffn, x, is_real):
    unit = lambda a, axis: a / jnp.sqrt(jnp.sum(a**2, axis=axis, keepdims=True) + 1e-6)
    kernel = ffn.router.scale[...] * unit(ffn.router.kernel[...], 0).reshape(D, -1)
    logits = unit(x, -1) @ kernel
    into_slots = jax.nn.softmax(jnp.where(is_real[..., None], logits, -jnp.inf), axis=1)
    slots = jnp.einsum("bts,btd->bsd", into_slots, x)
    of_slot = jnp.repeat(jnp.arange(E), kernel.shape[1] // E)
    outputs = jnp.take_along_axis(every_expert(ffn, slots), of_slot[None, :, None, None], axis=2)[:, :, 0]
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits, axis=-1), outputs)


def zero_computation(ffn, x, is_real):
    router = ffn.router
    scores = jax.nn.softmax(x @ router.proj.kernel[...])
    weights = jnp.where(largest(scores, 3), scores, 0.0)
    mix = jax.nn.softmax(jnp.einsum("btd,djz->btjz", x, router.mix_proj.kernel[...]))
    constant = mix[..., :1] * x[:, :, None] + mix[..., 1:] * router.vectors[...]
    copies = jnp.sum(weights[..., E + 1 : E + 3], axis=-1, keepdims=True) * x
    return weighted(ffn, x, weights[..., :E]) + copies + jnp.einsum("btj,btjd->btd", weights[..., E + 3 :], constant)


def hashed(ffn, x, is_real):
    """Of eight experts, the first hash picks one of the first four, the second one of the others."""
    weights = np.zeros((D, E), np.float32)
    for token in range(D):
        for k in range(2):
            bits = token + (2 * 3 + k) * 0x9E3779B9
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                bits = (bits % 2**32 ^ bits % 2**32 >> shift) * factor
            weights[token, 4 * k + bits // 2 % 4] = 1.0
    return weighted(ffn, x, jnp.asarray(weights)[promises.tokens(x)])


DENSE = {
    "top-p": top_p,
    "ReLU": relu,
    "hash": hashed,
    "expert choice": expert_choice,
    "soft": soft,
    "MoE++": zero_computation,
}


@pytest.mark.parametrize("name", DENSE)
def test_equals_dense(name):
    ffn, ids_BT = promises.build(TINY[name]), jnp.asarray(promises.PACKED)
    is_real_BT1 = (ids_BT > 0)[..., None]

    def gradients(layer):
        @jax.jit
        def run(ffn, x_BTD, dy_BTD):
            y_BTD, pull = jax.vjp(layer, ffn, x_BTD)
            grads, dx_BTD = pull(dy_BTD)
            return y_BTD * is_real_BT1, buffers.split(grads)[0], dx_BTD

        return run(ffn, promises.inputs(), promises.inputs(seed=2) * is_real_BT1)

    got = gradients(lambda ffn, x: promises.call(ffn, x, ids_BT)[0])
    want = gradients(lambda ffn, x: DENSE[name](ffn, x, ids_BT > 0))
    # Sums in another order, in float32.
    promises.assert_close(got, want, 1e-5, name)
