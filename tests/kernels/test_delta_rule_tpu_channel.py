"""The TPU kernels of the delta rule with one decay per key channel, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule
from tests.kernels import recurrent


def arguments(T, K, N, H, P, *, dtype=jnp.float32, B=2):
    """Unit keys of correlation 0.9, so that what is written is mostly corrected; beta up to 2; closed gates."""
    args = recurrent.qkv(T, K, N, H, P, B)
    args["k"] += 3 * jax.random.normal(jax.random.key(6), (K, H))
    args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: x.astype(dtype) for name, x in args.items()}
    args["beta"] = 2 * jax.random.uniform(jax.random.key(7), (B, T, N))
    args["g"] = recurrent.log_decays((B, T, N, H)).at[:, ::13, 0].set(-np.inf).at[:, :, :, 1].set(-30)
    return args | {"state": recurrent.state(N, H, P, B)}


def compare(args, ids):
    op = functools.partial(delta_rule, segment_ids=ids)
    want = recurrent.run(functools.partial(op, impl="ref"), args)
    with pltpu.force_tpu_interpret_mode(recurrent.interpreter(args["v"].shape[2])):
        return recurrent.run(functools.partial(op, impl="tpu"), args), want


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "packed"),
    [
        (200, 1, 1, 64, 64, True),
        (131, 1, 2, 64, 64, True),  # two heads share keys
        (2, 1, 3, 5, 130, True),  # widths to be filled up
        (5, 1, 1, 256, 128, False),
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, packed):
    recurrent.check(*compare(arguments(T, K, N, H, P), jnp.asarray(recurrent.documents(T)) if packed else None))


@pytest.mark.parametrize(("K", "N"), [(1, 2), (4, 4)])
def test_bfloat16(K, N):
    """Within 1e-2 and 2e-2: operands of products are rounded to 8 bits, gradients go through two such products."""
    args = arguments(140, K, N, 64, 64, dtype=jnp.bfloat16, B=1)
    got, want = compare(args, jnp.asarray(recurrent.documents(140))[:1])
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: 1e-2 if name in ("o", "state") else 2e-2 for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def test_several_steps_share_a_key_head():
    """Nine value heads of one key head take three steps of three, each with its part of the gradients of q and k."""
    recurrent.check(*compare(arguments(20, 1, 9, 8, 8, B=1), None))


def test_causality_to_the_bit():
    args = arguments(140, 1, 1, 64, 64, B=1)
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        op = jax.jit(functools.partial(delta_rule, impl="tpu"))
        before, _ = op(**args)
        for t in (0, 20, 63, 64, 127, 128):
            later = {name: x.at[:, t + 1 :].multiply(0.7) for name, x in args.items() if name != "state"}
            after, _ = op(**(args | later))
            np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
            assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_padding_may_hold_anything():
    ids = recurrent.documents(20)
    args = arguments(20, 1, 1, 8, 8)
    is_padding = lambda x: jnp.asarray(ids == 0).reshape(2, 20, *[1] * (x.ndim - 2))
    dirty = {name: jnp.where(is_padding(x), np.nan, x) for name, x in args.items() if name != "state"}
    op = functools.partial(delta_rule, segment_ids=jnp.asarray(ids), impl="tpu")
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        clean, got = (recurrent.run(op, x) for x in (args, args | dirty))
    for name in clean:
        assert np.all(np.isfinite(got[name]))
        np.testing.assert_array_equal(clean[name], got[name])


def test_unsupported():
    with pytest.raises(ValueError, match="heads wider than 256"):
        delta_rule(**arguments(3, 1, 1, 257, 4), impl="tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        delta_rule(**arguments(3, 1, 1, 4, 4, dtype=jnp.float16), impl="tpu")
