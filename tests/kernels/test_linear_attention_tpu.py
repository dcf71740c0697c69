"""The TPU kernels with one decay per head and token, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_attention
from tests.kernels import recurrent

# bfloat16 has 8 bits: products of two rounded numbers, and sums of few of them, are off by up to half a percent.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 2e-2


def compare(T, K, N, H, P, *, dtype=jnp.float32, decay="token", bonus=False, packed=False, state=False, B=2):
    args = {name: x.astype(dtype) for name, x in recurrent.qkv(T, K, N, H, P, B).items()}
    if decay in ("token", "weak"):  # strong ones leave nothing of a state after 128 tokens
        args["g"] = (1 if decay == "token" else 1e-3) * recurrent.log_decays((B, T, N))
    if decay == "head":
        args["g"] = -jnp.linspace(0.01, 1, N)
    if decay == "closed":  # decays to nothing, of one token, of all, beside decays of almost 1
        args["g"] = (1e-3 * recurrent.log_decays((B, T, N))).at[0, ::7].set(-jnp.inf).at[1, :, 1].set(-1000)
    if bonus:
        args["bonus"] = jax.random.normal(jax.random.key(5), (N, H))
    if state:
        args["state"] = recurrent.state(N, H, P, B)
    op = functools.partial(linear_attention, segment_ids=jnp.asarray(recurrent.documents(T))[:B] if packed else None)
    want = recurrent.run(functools.partial(op, impl="ref"), args)
    with pltpu.force_tpu_interpret_mode(recurrent.interpreter(N)):
        return recurrent.run(functools.partial(op, impl="tpu"), args), want


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "options"),
    [
        (2, 1, 1, 128, 128, {"decay": "head", "state": True}),
        (200, 1, 3, 128, 64, {"decay": "weak", "packed": True, "state": True}),
        (300, 3, 3, 64, 128, {"decay": "weak", "bonus": True, "state": True}),
        (300, 2, 2, 8, 8, {"packed": True, "bonus": True, "state": True}),
        (70, 1, 3, 5, 6, {"decay": "none"}),
        (140, 1, 2, 8, 8, {"decay": "closed", "state": True}),
        (70, 1, 1, 256, 256, {"packed": True, "B": 1}),
        (65, 1, 9, 8, 8, {"packed": True, "B": 1}),  # three steps with parts of the gradients of one key head
        (40, 4, 4, 128, 128, {"packed": True, "state": True, "B": 1}),  # in place
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, options):
    recurrent.check(*compare(T, K, N, H, P, **options))


@pytest.mark.parametrize(("K", "N"), [(1, 2), (8, 8)])
def test_bfloat16(K, N):
    got, want = compare(140, K, N, 128, 128, dtype=jnp.bfloat16, packed=True, state=True, B=1)
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: VALUE_TOLERANCE if name in ("o", "state") else GRADIENT_TOLERANCE for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def test_padding_may_hold_anything():
    """NaN at padding reaches no output and no gradient."""
    ids = jnp.asarray(recurrent.documents(140))
    args = recurrent.qkv(140, 1, 1, 8, 8) | {"g": recurrent.log_decays((2, 140, 1))}
    broken = {name: jnp.where((ids == 0).reshape(2, 140, *[1] * (x.ndim - 2)), jnp.nan, x) for name, x in args.items()}
    op = functools.partial(linear_attention, segment_ids=ids, impl="tpu")
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        want, got = (recurrent.run(op, x) for x in (args, broken))
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_what_is_not_supported():
    q, k, v = recurrent.qkv(3, 1, 1, 300, 4).values()
    with pytest.raises(ValueError, match="wider than 256"):
        linear_attention(q, k, v, impl="tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear_attention(q[..., :8], k[..., :8], v.astype(jnp.float16), impl="tpu")
