"""The TPU kernels with one decay per head and token, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_attention
from tests.kernels import recurrent

# bfloat16 has 8 bits: products of two rounded numbers, and sums of few of them, are off by up to half a percent.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 2e-2


@pytest.fixture(autouse=True)
def interpreted():
    """Memory that no one wrote to is NaN; reading what another step of the grid writes is an error."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def compare(T, K, N, H, P, *, dtype=jnp.float32, decay="token", bonus=False, packed=False, state=False):
    args = {name: x.astype(dtype) for name, x in recurrent.qkv(T, K, N, H, P).items()}
    if decay != "none":
        args["g"] = recurrent.log_decays((2, T, N)) if decay == "token" else -jnp.linspace(0.01, 1, N)
    if bonus:
        args["bonus"] = jax.random.normal(jax.random.key(5), (N, H))
    if state:
        args["state"] = recurrent.state(N, H, P)
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    op = functools.partial(linear_attention, segment_ids=ids)
    return tuple(recurrent.run(functools.partial(op, impl=impl), args) for impl in ("tpu", "ref"))


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "options"),
    [
        (2, 1, 1, 128, 128, {"decay": "head", "state": True}),
        (200, 1, 2, 128, 64, {"packed": True, "state": True}),
        (300, 2, 2, 64, 128, {"packed": True, "bonus": True, "state": True}),
        (130, 1, 3, 5, 6, {"decay": "none", "bonus": True}),
        (70, 1, 1, 256, 256, {"packed": True}),
        (256, 8, 8, 128, 128, {"packed": True, "state": True}),
        (65, 1, 16, 8, 8, {"packed": True}),
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, options):
    recurrent.check(*compare(T, K, N, H, P, **options))


@pytest.mark.parametrize(("K", "N"), [(2, 4), (8, 8)])
def test_bfloat16(K, N):
    got, want = compare(140, K, N, 128, 128, dtype=jnp.bfloat16, packed=True, state=True)
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: VALUE_TOLERANCE if name in ("o", "state") else GRADIENT_TOLERANCE for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}
