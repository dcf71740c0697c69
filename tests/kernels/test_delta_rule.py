import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import delta_rule
from tests.kernels import recurrent


def arguments(T, K, N, H, P, decay, state=False):
    """Unit keys of correlation about 0.9, so that what is written is mostly corrected; beta up to 2."""
    args = recurrent.qkv(T, K, N, H, P)
    args["k"] += 3 * jax.random.normal(jax.random.key(6), (K, H))[None, None]
    args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args["beta"] = 2 * jax.random.uniform(jax.random.key(7), (2, T, N))
    if decay != "none":
        args["g"] = recurrent.log_decays((2, T, N) if decay == "token" else (2, T, N, H))
    return args | ({"state": recurrent.state(N, H, P)} if state else {})


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "decay", "packed", "state"),
    [
        (0, 1, 2, 4, 3, "token", False, True),
        (1, 2, 4, 4, 3, "channel", True, True),
        (3, 2, 2, 4, 3, "token", False, False),
        (67, 1, 2, 8, 6, "none", False, False),
        (67, 2, 2, 5, 8, "channel", False, True),
        (200, 2, 4, 8, 6, "token", True, True),
        (200, 1, 2, 8, 6, "channel", True, True),
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, decay, packed, state):
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    args = arguments(T, K, N, H, P, decay, state)
    got, want = (
        recurrent.run(functools.partial(delta_rule, segment_ids=ids, impl=impl), args) for impl in ("xla", "ref")
    )
    recurrent.check(got, want)
    if packed:
        for name in ("o", "dq", "dk", "dv", "dbeta"):
            assert not np.any(got[name][np.asarray(ids) == 0])


def test_the_definition_in_closed_form():
    """Two tokens written out: decay, then the correction of what is held for the key."""
    args = arguments(2, 1, 1, 4, 3, "channel", state=True)
    q, k, v, g = (np.asarray(args[x], np.float64)[0, :, 0] for x in ("q", "k", "v", "g"))
    beta, S = np.asarray(args["beta"], np.float64)[0, :, 0], np.asarray(args["state"], np.float64)[0, 0]
    want = []
    for t in range(2):
        S = np.exp(g[t])[:, None] * S
        S = S + beta[t] * np.outer(k[t], v[t] - S.T @ k[t])
        want.append(0.7 * S.T @ q[t])
    for impl in ("ref", "xla"):
        o, state = jax.jit(functools.partial(delta_rule, scale=0.7, impl=impl))(**args)
        np.testing.assert_allclose(o[0, :, 0], np.stack(want), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[0, 0], S, rtol=1e-5, atol=1e-6)


def test_packed_equals_separate():
    ids = np.zeros((1, 75), np.int32)
    for i, start in enumerate((1, 26, 50)):
        ids[0, start : start + 23] = i + 1
    args = {name: x[:1] for name, x in arguments(75, 1, 2, 8, 6, "token").items()}

    def values_and_gradients(op, args):
        def loss(args):
            o, state = op(**args)
            return jnp.sin(o).sum() + jnp.cos(state[-1]).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
        return {"o": o} | {f"d{name}": d for name, d in gradients.items()}

    got = values_and_gradients(functools.partial(delta_rule, segment_ids=jnp.asarray(ids), impl="xla"), args)
    want = values_and_gradients(functools.partial(delta_rule, impl="ref"), recurrent.separate(args, ids))
    recurrent.check(recurrent.separate(got, ids), want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_closed_gates(decay):
    """Decays to nothing, of one token, of all, beside decays of almost 1."""
    args = arguments(40, 1, 2, 8, 6, decay, state=True)
    args["g"] = (1e-3 * args["g"]).at[0, ::7].set(-np.inf).at[1, :, 1].set(-1000)
    got, want = (recurrent.run(functools.partial(delta_rule, impl=impl), args) for impl in ("xla", "ref"))
    recurrent.check(got, want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_causality_to_the_bit(decay):
    args = arguments(100, 1, 2, 8, 6, decay, state=True)
    op = jax.jit(functools.partial(delta_rule, impl="xla"))
    before, _ = op(**args)
    for t in (0, 20, 63, 64, 77):
        other = args | {name: x.at[:, t + 1 :].multiply(0.7) for name, x in args.items() if name != "state"}
        after, _ = op(**other)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_errors():
    args = arguments(3, 2, 4, 4, 3, "token")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        delta_rule(**args, impl="cuda")
    with pytest.raises(ValueError, match="multiple of the 2 heads"):
        delta_rule(args["q"], args["k"], args["v"][:, :, :3], args["beta"][:, :, :3])
    jaxtyping.config.update("jaxtyping_disable", True)  # users without run-time types get a sentence, too
    try:
        with pytest.raises(ValueError, match="beta has shape"):
            delta_rule(**args | {"beta": jnp.zeros((2, 3, 2))})
        with pytest.raises(ValueError, match="g has shape"):
            delta_rule(**args | {"g": jnp.zeros((2, 3, 2))})
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
