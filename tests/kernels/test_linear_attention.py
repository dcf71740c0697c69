import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import linear_attention
from tests.kernels import recurrent


def arguments(T, K, N, H, P, decay, bonus=False, state=False):
    args = recurrent.qkv(T, K, N, H, P)
    if decay == "head":
        args["g"] = -jnp.linspace(0.01, 1, N)
    elif decay != "none":
        args["g"] = recurrent.log_decays((2, T, N) if decay == "token" else (2, T, N, H))
    if bonus:
        args["bonus"] = jax.random.normal(jax.random.key(5), (N, H))
    return args | ({"state": recurrent.state(N, H, P)} if state else {})


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "decay", "bonus", "packed", "state"),
    [
        (0, 1, 2, 4, 3, "token", False, False, True),
        (1, 2, 4, 4, 3, "channel", True, True, True),
        (3, 2, 2, 4, 3, "channel", False, False, False),
        (67, 1, 2, 8, 6, "none", True, False, True),
        (67, 2, 2, 5, 8, "channel", True, True, False),
        (200, 2, 4, 8, 6, "token", False, True, True),
        (200, 2, 2, 8, 8, "head", True, True, True),
        (200, 1, 2, 8, 6, "channel", False, True, True),
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, decay, bonus, packed, state):
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    args = arguments(T, K, N, H, P, decay, bonus, state)
    got, want = (
        recurrent.run(functools.partial(linear_attention, segment_ids=ids, impl=impl), args) for impl in ("xla", "ref")
    )
    recurrent.check(got, want)
    if packed:
        for name in ("o", "dq", "dk", "dv"):
            assert not np.any(got[name][np.asarray(ids) == 0])


def test_the_definition_in_closed_form():
    """RWKV's read before the write, written out for two tokens."""
    args = recurrent.qkv(2, 1, 1, 4, 3, B=1) | {"state": recurrent.state(1, 4, 3, B=1)}
    args |= {"g": recurrent.log_decays((1, 2, 1, 4)), "bonus": jax.random.normal(jax.random.key(5), (1, 4))}
    q, k, v, S, g, u = (np.asarray(args[x], np.float64) for x in ("q", "k", "v", "state", "g", "bonus"))
    q, k, v, S, g, u = q[0, :, 0], k[0, :, 0], v[0, :, 0], S[0, 0], g[0, :, 0], u[0]
    want = [(S + np.outer(u * k[0], v[0])).T @ q[0]]
    S = np.exp(g[0])[:, None] * S + np.outer(k[0], v[0])
    want.append((S + np.outer(u * k[1], v[1])).T @ q[1])
    S = np.exp(g[1])[:, None] * S + np.outer(k[1], v[1])
    for impl in ("ref", "xla"):
        o, state = jax.jit(functools.partial(linear_attention, scale=0.7, impl=impl))(**args)
        np.testing.assert_allclose(o[0, :, 0], 0.7 * np.stack(want), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[0, 0], S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_packed_equals_separate(decay):
    ids = np.zeros((1, 75), np.int32)
    for i, start in enumerate((1, 26, 50)):
        ids[0, start : start + 23] = i + 1
    args = arguments(75, 1, 2, 8, 6, decay, bonus=True)
    args = {name: x[:1] if x.ndim > 2 else x for name, x in args.items()}

    def packed(segment_ids, **args):
        o, state = linear_attention(**args, segment_ids=segment_ids, impl="xla")
        return o, jnp.sin(o).sum() + jnp.cos(state).sum()

    def gradients(op, args):
        (_, o), d = jax.jit(jax.value_and_grad(lambda args: op(**args)[::-1], has_aux=True))(args)
        return {"o": o} | d

    got = gradients(functools.partial(packed, jnp.asarray(ids)), args)

    def apart(**args):
        o, state = linear_attention(**args, impl="ref")
        return o, jnp.sin(o).sum() + jnp.cos(state[-1]).sum()

    want = gradients(apart, recurrent.separate(args, ids))
    got = recurrent.separate(got, ids)
    recurrent.check(jax.tree.map(np.asarray, got), want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_closed_gates(decay):
    """Decays to nothing, of one token, of all, beside decays of almost 1."""
    args = arguments(40, 1, 2, 8, 6, decay, state=True)
    args["g"] = (1e-3 * args["g"]).at[0, ::7].set(-np.inf).at[1, :, 1].set(-1000)
    got, want = (recurrent.run(functools.partial(linear_attention, impl=impl), args) for impl in ("xla", "ref"))
    recurrent.check(got, want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_causality_to_the_bit(decay):
    args = arguments(100, 1, 2, 8, 6, decay, state=True)
    op = jax.jit(functools.partial(linear_attention, impl="xla"))
    before, _ = op(**args)
    for t in (0, 20, 63, 64, 77):
        other = {
            name: x.at[:, t + 1 :].set(-3 + 0.5 * x[:, t + 1 :]) if name != "state" else x for name, x in args.items()
        }
        after, _ = op(**other)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_bfloat16():
    args = arguments(67, 1, 2, 8, 6, "token")
    half = {name: x.astype(jnp.bfloat16) if name != "g" else x for name, x in args.items()}
    got, want = (recurrent.run(functools.partial(linear_attention, impl=impl), half) for impl in ("xla", "ref"))
    assert got["o"].dtype == jnp.bfloat16
    assert got["state"].dtype == np.float32
    # Both compute in float32 and round once: within half a unit in the last place of 8 bits.
    assert all(recurrent.error(got[name], want[name]) < 4e-3 for name in want)


def test_errors():
    args = recurrent.qkv(3, 2, 4, 4, 3)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        linear_attention(**args, impl="cuda")
    with pytest.raises(ValueError, match="multiple of the 2 heads"):
        linear_attention(args["q"], args["k"], args["v"][:, :, :3])
    jaxtyping.config.update("jaxtyping_disable", True)  # users without run-time types get a sentence, too
    try:
        with pytest.raises(ValueError, match="state has shape"):
            linear_attention(**args, state=jnp.zeros((2, 4, 3, 4)))
        with pytest.raises(ValueError, match="g has shape"):
            linear_attention(**args, g=jnp.zeros((2, 3, 2)))
        with pytest.raises(ValueError, match=r"must be \[B T K H\] alike"):
            linear_attention(args["q"], args["k"][:, :2], args["v"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
