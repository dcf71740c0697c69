"""The TPU kernels of the delta rule with one decay per token, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule
from tests.kernels import recurrent

# bfloat16 has 8 bits: products of two rounded numbers, and sums of few of them, are off by up to half a percent.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 2e-2


def arguments(T, K, N, H, P, *, dtype=jnp.float32, decay="token", B=2):
    """Unit keys of correlation about 0.9, so that what is written is mostly corrected; beta up to 2."""
    args = recurrent.qkv(T, K, N, H, P, B)
    args["k"] += 3 * jax.random.normal(jax.random.key(6), (K, H))
    args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: x.astype(dtype) for name, x in args.items()}
    args["beta"] = 2 * jax.random.uniform(jax.random.key(7), (B, T, N))
    if decay != "none":
        args["g"] = recurrent.log_decays((B, T, N))
    if decay == "closed":  # decays to nothing, of one token, of all, beside decays of almost 1
        args["g"] = (1e-3 * args["g"]).at[0, ::7].set(-jnp.inf).at[0, 1::7].set(-30).at[1, :, 1].set(-1000)
    return args | {"state": recurrent.state(N, H, P, B)}


def compare(args, packed):
    B, T, N, _ = args["v"].shape
    ids = jnp.asarray(recurrent.documents(T))[:B] if packed else None
    op = functools.partial(delta_rule, segment_ids=ids)
    want = recurrent.run(functools.partial(op, impl="ref"), args)
    with pltpu.force_tpu_interpret_mode(recurrent.interpreter(N)):
        return recurrent.run(functools.partial(op, impl="tpu"), args), want


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "packed", "decay"),
    [
        (2, 1, 1, 128, 128, False, "token"),
        (200, 1, 1, 64, 64, True, "token"),
        (131, 1, 3, 5, 130, True, "token"),  # widths to be filled up, an odd number of systems
        (140, 1, 2, 8, 8, False, "closed"),
        (70, 1, 1, 256, 256, True, "none"),
        (300, 2, 4, 8, 128, True, "token"),
        (65, 1, 9, 8, 8, True, "token"),  # three steps with parts of the gradients of one key head
        (130, 2, 2, 128, 128, True, "token"),  # in place
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, packed, decay):
    recurrent.check(*compare(arguments(T, K, N, H, P, decay=decay, B=1 if N > 4 else 2), packed))


@pytest.mark.parametrize(("K", "N"), [(1, 3), (8, 8)])
def test_bfloat16(K, N):
    got, want = compare(arguments(140, K, N, 128, 128, dtype=jnp.bfloat16, B=1), packed=True)
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: VALUE_TOLERANCE if name in ("o", "state") else GRADIENT_TOLERANCE for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def test_causality_to_the_bit():
    args = arguments(150, 1, 2, 8, 8, decay="closed")
    op = jax.jit(functools.partial(delta_rule, impl="tpu"))
    with pltpu.force_tpu_interpret_mode(recurrent.ANY):
        before, _ = op(**args)
        for t in (0, 20, 63, 127, 128, 140):
            other = args | {name: x.at[:, t + 1 :].multiply(0.7) for name, x in args.items() if name != "state"}
            after, _ = op(**other)
            np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
            assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_padding_may_hold_anything():
    """NaN at padding reaches no output and no gradient."""
    args, ids = arguments(140, 1, 2, 8, 8), jnp.asarray(recurrent.documents(140))
    is_pad = ids == 0
    broken = {
        name: x if name == "state" else jnp.where(is_pad.reshape(2, 140, *[1] * (x.ndim - 2)), jnp.nan, x)
        for name, x in args.items()
    }
    op = functools.partial(delta_rule, segment_ids=ids, impl="tpu")
    with pltpu.force_tpu_interpret_mode(recurrent.ANY):
        want, got = (recurrent.run(op, x) for x in (args, broken))
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_what_is_not_supported():
    args = arguments(3, 1, 1, 300, 4)
    with pytest.raises(ValueError, match="wider than 256"):
        delta_rule(**args, impl="tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        delta_rule(**args | {"q": args["q"].astype(jnp.float16)}, impl="tpu")
