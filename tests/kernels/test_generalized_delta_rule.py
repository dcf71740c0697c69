import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import delta_rule, generalized_delta_rule, linear_attention
from tests.kernels import recurrent


def arguments(T, K, N, H, P, decay, state=False):
    """RWKV-7's: b is -a times rates up to 2, for unit keys of correlation about 0.9, so that most is corrected."""
    args = recurrent.qkv(T, K, N, H, P)
    args["k"] += 3 * jax.random.normal(jax.random.key(6), (K, H))[None, None]
    args["a"] = -args["k"] / jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args["b"] = -args["a"] * 2 * jax.random.uniform(jax.random.key(7), args["k"].shape)
    args["k"] = args["k"] / 3
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
        recurrent.run(functools.partial(generalized_delta_rule, segment_ids=ids, impl=impl), args)
        for impl in ("xla", "ref")
    )
    recurrent.check(got, want)
    if packed:
        for name in ("o", "dq", "dk", "dv", "da", "db"):
            assert not np.any(got[name][np.asarray(ids) == 0])


def test_the_definition_in_closed_form():
    """Two tokens written out: a reads the state before the decay, q the one after the writes."""
    args = arguments(2, 1, 1, 4, 3, "channel", state=True)
    q, k, v, a, b, g = (np.asarray(args[x], np.float64)[0, :, 0] for x in ("q", "k", "v", "a", "b", "g"))
    S, want = np.asarray(args["state"], np.float64)[0, 0], []
    for t in range(2):
        S = np.exp(g[t])[:, None] * S + np.outer(b[t], S.T @ a[t]) + np.outer(k[t], v[t])
        want.append(0.7 * S.T @ q[t])
    for impl in ("ref", "xla"):
        o, state = jax.jit(functools.partial(generalized_delta_rule, scale=0.7, impl=impl))(**args)
        np.testing.assert_allclose(o[0, :, 0], np.stack(want), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[0, 0], S, rtol=1e-5, atol=1e-6)


def gla(q, k, v, g):
    zeros = jnp.zeros_like(k)
    return dict(q=q, k=k, v=v, a=zeros, b=zeros, g=g)


def delta(q, k, v, beta, g=None):
    """With g: the state is read after the decay, which is to read it before with decayed keys."""
    scaled = beta[..., None] * k
    decay = 1 if g is None else jnp.exp(g if g.ndim == 4 else g[..., None])
    return dict(q=q, k=scaled, v=v, a=decay * k, b=-scaled) | ({} if g is None else {"g": g})


@pytest.mark.parametrize("impl", ["ref", "xla"])
@pytest.mark.parametrize(
    ("special", "translate", "decay"),
    [
        (linear_attention, gla, "channel"),
        (delta_rule, delta, "none"),
        (delta_rule, delta, "token"),
        (delta_rule, delta, "channel"),
    ],
    ids=["GLA", "DeltaNet", "GatedDeltaNet", "KDA"],
)
def test_contains_the_others(special, translate, decay, impl):
    """Values, states and gradients of what is a special case of it, in float64: only rounding is left."""
    with jax.enable_x64(True):
        N, T = 2, 40
        args = recurrent.qkv(T, N, N, 5, 3)
        args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
        if special is delta_rule:
            args["beta"] = 2 * jax.random.uniform(jax.random.key(7), (2, T, N))
        if decay != "none":
            args["g"] = recurrent.log_decays((2, T, N) if decay == "token" else (2, T, N, 5))
        options = {"state": recurrent.state(N, 5, 3), "segment_ids": jnp.asarray(recurrent.documents(T))}
        got = recurrent.run(lambda **args: generalized_delta_rule(**translate(**args), **options, impl=impl), args)
        want = recurrent.run(functools.partial(special, **options, impl="ref"), args)
    assert got["o"].dtype == np.float64
    assert {name: recurrent.error(got[name], want[name]) < 1e-10 for name in want} == dict.fromkeys(want, True)


def test_contains_rwkv7():
    """The paper's transition, written as a matrix, S (Diag(w) - kk (rate * kk)^T) + v k^T, values first."""
    rng = np.random.default_rng(0)
    T, H, P = 20, 5, 3
    r, k, kk = rng.normal(size=(3, T, H))
    kk /= np.linalg.norm(kk, axis=1, keepdims=True)
    rate, w, v = rng.uniform(size=(T, H)), rng.uniform(0.55, 1, (T, H)), rng.normal(size=(T, P))
    S, want = np.zeros((P, H)), []
    for t in range(T):
        S = S @ (np.diag(w[t]) - np.outer(kk[t], rate[t] * kk[t])) + np.outer(v[t], k[t])
        want.append(S @ r[t])
    with jax.enable_x64(True):
        args = [jnp.asarray(x)[None, :, None] for x in (r, k, v, -kk, rate * kk, np.log(w))]
        o, state = generalized_delta_rule(*args, scale=1.0, impl="ref")
    np.testing.assert_allclose(o[0, :, 0], want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state[0, 0], S.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", [0.0, -30.0])
def test_long_and_strong(gate):
    """4096 nearly parallel keys, each corrected 1.9 times; decays of almost 1 beside none, or beside closed gates.

    Against float64 it is as accurate as on short rows, in values and gradients, and no worse at the end of the row than
    at its start.
    """
    args = {name: x[:1] for name, x in arguments(4096, 1, 1, 8, 6, "channel", state=True).items()}
    args["g"] = jnp.where(jnp.arange(8) % 2 == 0, gate, 1e-3 * args["g"])
    args["a"], args["b"] = jnp.exp(args["g"]) * args["a"], -1.9 * args["a"]
    args = jax.tree.map(np.asarray, args)

    def in_float64(**args):
        wide = {name: x.astype(jnp.float64) for name, x in args.items()}
        return tuple(x.astype(jnp.float32) for x in generalized_delta_rule(**wide, impl="ref"))

    got = recurrent.run(functools.partial(generalized_delta_rule, impl="xla"), args)
    with jax.enable_x64(True):
        want = recurrent.run(in_float64, args)
    recurrent.check(got, want)
    first, last = (recurrent.error(got["o"][0, part], want["o"][0, part]) for part in np.split(np.arange(4096), 8)[::7])
    assert last < 2 * first


def test_packed_equals_separate():
    ids = np.zeros((1, 75), np.int32)
    for i, start in enumerate((1, 26, 50)):
        ids[0, start : start + 23] = i + 1
    args = {name: x[:1] for name, x in arguments(75, 1, 2, 8, 6, "channel").items()}

    def values_and_gradients(op, args):
        def loss(args):
            o, state = op(**args)
            return jnp.sin(o).sum() + jnp.cos(state[-1]).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
        return {"o": o} | {f"d{name}": d for name, d in gradients.items()}

    op = functools.partial(generalized_delta_rule, segment_ids=jnp.asarray(ids), impl="xla")
    got = values_and_gradients(op, args)
    want = values_and_gradients(functools.partial(generalized_delta_rule, impl="ref"), recurrent.separate(args, ids))
    recurrent.check(recurrent.separate(got, ids), want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_closed_gates(decay):
    """Decays to nothing, of one token, of all, beside decays of almost 1."""
    args = arguments(40, 1, 2, 8, 6, decay, state=True)
    args["g"] = (1e-3 * args["g"]).at[0, ::7].set(-np.inf).at[1, :, 1].set(-1000)
    got, want = (recurrent.run(functools.partial(generalized_delta_rule, impl=impl), args) for impl in ("xla", "ref"))
    recurrent.check(got, want)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_causality_to_the_bit(decay):
    args = arguments(100, 1, 2, 8, 6, decay, state=True)
    op = jax.jit(functools.partial(generalized_delta_rule, impl="xla"))
    before, _ = op(**args)
    for t in (0, 20, 63, 64, 77):
        other = args | {name: x.at[:, t + 1 :].multiply(0.7) for name, x in args.items() if name != "state"}
        after, _ = op(**other)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_errors():
    args = arguments(3, 2, 4, 4, 3, "token")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        generalized_delta_rule(**args, impl="cuda")
    with pytest.raises(ValueError, match="multiple of the 2 heads"):
        generalized_delta_rule(**args | {"v": args["v"][:, :, :3], "g": None})
    jaxtyping.config.update("jaxtyping_disable", True)  # users without run-time types get a sentence, too
    try:
        with pytest.raises(ValueError, match="b has shape"):
            generalized_delta_rule(**args | {"b": args["b"][:, :, :1]})
        with pytest.raises(ValueError, match="g has shape"):
            generalized_delta_rule(**args | {"g": jnp.zeros((2, 3, 2))})
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
