"""The TPU kernels with one decay per key channel, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_attention
from pallas_kernels.common.heads import Heads
from tests.kernels import recurrent


def arguments(T, K, N, H, P, *, dtype=jnp.float32, bonus=False, B=2):
    args = {name: x.astype(dtype) for name, x in recurrent.qkv(T, K, N, H, P, B).items()}
    args["g"] = recurrent.log_decays((B, T, N, H)).at[:, ::13, 0].set(-np.inf).at[:, :, :, 1].set(-30)
    if bonus:
        args["bonus"] = jax.random.normal(jax.random.key(5), (N, H))
    return args | {"state": recurrent.state(N, H, P, B)}


def compare(args, ids):
    op = functools.partial(linear_attention, segment_ids=ids)
    want = recurrent.run(functools.partial(op, impl="ref"), args)
    with pltpu.force_tpu_interpret_mode(recurrent.interpreter(args["v"].shape[2])):
        return recurrent.run(functools.partial(op, impl="tpu"), args), want


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "bonus", "packed"),
    [
        (200, 1, 1, 64, 64, False, True),
        (131, 1, 2, 64, 64, True, True),  # two heads share keys
        (131, 1, 1, 8, 8, True, True),
        (2, 1, 3, 5, 130, True, False),  # widths to be filled up
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, bonus, packed):
    args = arguments(T, K, N, H, P, bonus=bonus)
    recurrent.check(*compare(args, jnp.asarray(recurrent.documents(T)) if packed else None))


def test_bfloat16():
    """Within 1e-2 and 2e-2: operands of products are rounded to 8 bits, gradients go through two such products."""
    got, want = compare(arguments(140, 2, 2, 64, 64, dtype=jnp.bfloat16), jnp.asarray(recurrent.documents(140)))
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: 1e-2 if name in ("o", "state") else 2e-2 for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def test_several_steps_share_a_key_head():
    """Nine value heads of one key head take three steps of three, each with its part of the gradients of q and k."""
    recurrent.check(*compare(arguments(20, 1, 9, 8, 8, B=1), None))


def test_eight_heads():
    recurrent.check(*compare(arguments(20, 8, 8, 8, 8, B=1), None))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_heads", [2, 4, 16])
def test_heads_are_read_and_written_in_place(num_heads, dtype):
    x_BTNH = jax.random.normal(jax.random.key(0), (2, 41, num_heads, 64)).astype(dtype)
    size = min(num_heads, 8)
    heads = Heads(x_BTNH.shape, size, 16)

    def reverse(x_ref, o_ref):
        for n in range(0, size, 2):
            heads.write(o_ref, n, [heads.read(x_ref, size - 1 - n), heads.read(x_ref, size - 2 - n)])

    spec = heads.spec(lambda c: c)
    with pltpu.force_tpu_interpret_mode(recurrent.ANY):
        reverse = pl.pallas_call(
            reverse, grid=(2, num_heads // size, 3), in_specs=[spec], out_specs=spec, out_shape=heads.shape(dtype)
        )
        got = heads.from_kernel(jax.jit(reverse)(heads.to_kernel(x_BTNH)))
    want = x_BTNH.reshape(2, 41, -1, size, 64)[:, :, :, ::-1].reshape(x_BTNH.shape)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_causality_to_the_bit():
    args = arguments(140, 1, 1, 64, 64, bonus=True, B=1)
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        op = jax.jit(functools.partial(linear_attention, impl="tpu"))
        before, _ = op(**args)
        for t in (0, 20, 63, 64, 127, 128):
            later = {name: x.at[:, t + 1 :].set(-3 + 0.5 * x[:, t + 1 :]) for name, x in args.items() if name in "qkvg"}
            after, _ = op(**(args | later))
            np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
            assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_padding_may_hold_anything():
    ids = recurrent.documents(20)
    args = arguments(20, 1, 1, 8, 8)
    is_padding = jnp.asarray(ids == 0)[..., None, None]
    dirty = args | {name: jnp.where(is_padding, np.nan, args[name]) for name in ("v", "g")}
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        op = jax.jit(functools.partial(linear_attention, segment_ids=jnp.asarray(ids), impl="tpu"))
        for clean, got in zip(op(**args), op(**dirty), strict=True):
            assert np.all(np.isfinite(got))
            np.testing.assert_array_equal(clean, got)


def test_unsupported():
    args = arguments(3, 1, 1, 257, 4)
    with pytest.raises(ValueError, match="heads wider than 256"):
        linear_attention(**args, impl="tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear_attention(**arguments(3, 1, 1, 4, 4, dtype=jnp.float16), impl="tpu")
