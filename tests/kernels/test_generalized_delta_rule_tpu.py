"""The TPU kernels of the generalized delta rule, interpreted on a CPU, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import generalized_delta_rule
from tests.kernels import recurrent


def arguments(T, K, N, H, P, *, decay="channel", dtype=jnp.float32, B=2):
    """As in RWKV-7, b is -a times rates up to 2, for unit keys of correlation about 0.9; gates open and closed."""
    args = recurrent.qkv(T, K, N, H, P, B)
    a = args["k"] + 3 * jax.random.normal(jax.random.key(6), (K, H))
    args["a"] = -a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    args["b"] = -args["a"] * 2 * jax.random.uniform(jax.random.key(7), a.shape)
    args = {name: x.astype(dtype) for name, x in args.items()}
    if decay == "token":
        args["g"] = recurrent.log_decays((B, T, N)).at[:, ::13, 0].set(-np.inf)
    else:
        args["g"] = recurrent.log_decays((B, T, N, H)).at[:, ::13, 0].set(-np.inf).at[:, :, :, 1].set(-30)
    return args | {"state": recurrent.state(N, H, P, B)}


def compare(args, ids):
    op = functools.partial(generalized_delta_rule, segment_ids=ids)
    want = recurrent.run(functools.partial(op, impl="ref"), args)
    with pltpu.force_tpu_interpret_mode(recurrent.interpreter(args["v"].shape[2])):
        return recurrent.run(functools.partial(op, impl="tpu"), args), want


@pytest.mark.parametrize(
    ("T", "K", "N", "H", "P", "decay", "packed"),
    [
        (200, 1, 1, 64, 64, "channel", True),
        (131, 1, 2, 64, 64, "token", True),  # two heads share keys
        (131, 1, 1, 8, 8, "channel", True),
        (2, 1, 3, 5, 130, "channel", True),  # widths to be filled up
        (5, 1, 1, 256, 128, "channel", False),
    ],
)
def test_agrees_with_the_definition(T, K, N, H, P, decay, packed):
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    recurrent.check(*compare(arguments(T, K, N, H, P, decay=decay), ids))


def test_bfloat16():
    """Within 1e-2 and 2e-2: operands of products are rounded to 8 bits, gradients go through two such products."""
    got, want = compare(arguments(140, 2, 2, 64, 64, dtype=jnp.bfloat16), jnp.asarray(recurrent.documents(140)))
    assert got["o"].dtype == got["da"].dtype == jnp.bfloat16
    errors = {name: recurrent.error(got[name], want[name]) for name in want}
    limits = {name: 1e-2 if name in ("o", "state") else 2e-2 for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def test_several_steps_share_a_key_head():
    """Nine value heads of one key head take three steps of three, each with its part of the keys' gradients."""
    recurrent.check(*compare(arguments(20, 1, 9, 8, 8, B=1), None))


def test_heads_in_place():
    recurrent.check(*compare(arguments(20, 4, 4, 8, 8, B=1), None))


def test_causality_to_the_bit():
    args = arguments(140, 1, 1, 64, 64, B=1)
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        op = jax.jit(functools.partial(generalized_delta_rule, impl="tpu"))
        before, _ = op(**args)
        for t in (0, 20, 63, 64, 127, 128):
            later = {name: x.at[:, t + 1 :].multiply(0.7) for name, x in args.items() if name != "state"}
            after, _ = op(**(args | later))
            np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
            assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


@pytest.mark.parametrize("impl", ["tpu", "xla"])
def test_padding_may_hold_anything(impl):
    ids = recurrent.documents(20)
    args = arguments(20, 1, 1, 8, 8)
    is_padding = lambda x: jnp.asarray(ids == 0).reshape(2, 20, *[1] * (x.ndim - 2))
    dirty = {name: jnp.where(is_padding(x), np.nan, x) for name, x in args.items() if name != "state"}
    op = functools.partial(generalized_delta_rule, segment_ids=jnp.asarray(ids), impl=impl)
    with pltpu.force_tpu_interpret_mode(recurrent.TPU):
        clean, got = (recurrent.run(op, x) for x in (args, args | dirty))
    for name in clean:
        assert np.all(np.isfinite(got[name]))
        np.testing.assert_array_equal(clean[name], got[name])


def test_unsupported():
    with pytest.raises(ValueError, match="heads wider than 256"):
        generalized_delta_rule(**arguments(3, 1, 1, 257, 4), impl="tpu")
    with pytest.raises(ValueError, match="both wider than 128"):  # they would not fit into VMEM
        generalized_delta_rule(**arguments(3, 1, 1, 130, 130), impl="tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        generalized_delta_rule(**arguments(3, 1, 1, 4, 4, dtype=jnp.float16), impl="tpu")
