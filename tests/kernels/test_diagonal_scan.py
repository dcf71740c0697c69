import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import diagonal_scan
from pallas_kernels.diagonal_scan import tpu, xla
from tests.kernels import recurrent


def arguments(T, width, *, dtype=jnp.float32, per_token=True, state=True, B=2):
    """Decays are 0 here, 1 there, and anything in between."""
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape, dtype)
    shape = (B, T, *width) if per_token else width
    modulus = jnp.clip(1.4 * jax.random.uniform(jax.random.key(1), shape) - 0.1, 0, 1)
    phase = draw(2, shape)
    a = modulus * phase / jnp.abs(phase) if jnp.iscomplexobj(phase) else modulus
    return {"a": a, "x": draw(3, (B, T, *width))} | ({"state": draw(4, (B, *width))} if state else {})


def documents(T):
    return recurrent.documents(T) if T > 2 else np.ones((2, T), np.int32)


def parts(results: dict) -> dict:
    """Complex numbers as pairs of real ones."""
    return {name: np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for name, x in results.items()}


def run(impl, args, ids=None, reverse=False):
    ids = None if ids is None else jnp.asarray(ids)
    op = functools.partial(diagonal_scan, segment_ids=ids, reverse=reverse, impl=impl)
    return parts(recurrent.run(op, args))


IN_TURN, AT_ONCE = ("cpu",), ()
CASES = [
    # T, width, dtype, a per token, packed, state, reverse, platforms on which chunks are walked in turn
    (0, (3,), jnp.float32, True, False, True, False, IN_TURN),
    (1, (3,), jnp.complex64, False, True, True, True, IN_TURN),
    (3, (2, 3), jnp.float32, True, True, False, False, AT_ONCE),
    (3, (), jnp.complex64, True, False, True, True, IN_TURN),
    (67, (5,), jnp.float32, True, False, False, True, IN_TURN),
    (67, (2, 3), jnp.complex64, False, True, True, False, AT_ONCE),
    (200, (5,), jnp.float32, True, True, True, False, IN_TURN),
    (200, (5,), jnp.float32, True, True, True, True, AT_ONCE),
    (200, (5,), jnp.float32, False, True, True, True, IN_TURN),
    (200, (2, 3), jnp.complex64, True, True, True, True, IN_TURN),
    (200, (2, 3), jnp.complex64, True, True, True, False, AT_ONCE),
    (200, (3,), jnp.complex64, False, False, False, False, AT_ONCE),
]


@pytest.mark.parametrize(("T", "width", "dtype", "per_token", "packed", "state", "reverse", "in_turn"), CASES)
def test_agrees_with_the_definition(T, width, dtype, per_token, packed, state, reverse, in_turn, monkeypatch):
    monkeypatch.setattr(xla, "IN_TURN", in_turn)
    ids = documents(T) if packed else None
    args = arguments(T, width, dtype=dtype, per_token=per_token, state=state)
    got, want = (run(impl, args, ids, reverse) for impl in ("xla", "ref"))
    recurrent.check(got, want)
    if packed:
        for name in ("o", "dx", "da")[: 3 if per_token else 2]:
            assert not np.any(
                np.moveaxis(got[name], 0, -1)[ids == 0] if dtype == jnp.complex64 else got[name][ids == 0]
            )


@pytest.mark.parametrize(
    ("T", "width", "dtype", "per_token", "packed", "reverse"),
    [
        (3, (), jnp.complex64, True, True, False),
        (150, (150,), jnp.float32, True, True, False),
        (150, (2, 3), jnp.float32, False, True, True),
        (130, (3,), jnp.complex64, False, False, False),
        (130, (5,), jnp.complex64, True, True, True),
        (130, (5,), jnp.bfloat16, True, True, False),
    ],
)
def test_tpu_kernel_interpreted(T, width, dtype, per_token, packed, reverse, monkeypatch):
    monkeypatch.setattr(tpu, "MAX_BLOCK_W", 128)  # the second block of 150 channels is cut
    ids = documents(T) if packed else None
    args = arguments(T, width, dtype=dtype, per_token=per_token)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = run("tpu", args, ids, reverse)
    want = run("ref", args, ids, reverse)
    if dtype == jnp.bfloat16:
        # Both compute in float32 and round once: within half a unit in the last place of 8 bits.
        assert all(recurrent.error(got[name], want[name]) < 4e-3 for name in want)
    else:
        recurrent.check(got, want)


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_in_closed_form(impl):
    """Two documents with a hole between their tokens, written out."""
    args = arguments(7, (), B=1)
    a, x, s = (np.asarray(args[name], np.float64)[0] for name in ("a", "x", "state"))
    ids = jnp.array([[0, 1, 0, 1, 2, 2, 0]])
    h1 = a[1] * s + x[1]
    h3 = a[3] * h1 + x[3]
    h5 = a[5] * x[4] + x[5]
    h, last = diagonal_scan(**args, segment_ids=ids, impl=impl)
    np.testing.assert_allclose(h[0], [0, h1, 0, h3, x[4], h5, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last[0], h5, rtol=1e-6)
    h5 = a[5] * s + x[5]
    h4 = a[4] * h5 + x[4]
    h1 = a[1] * x[3] + x[1]
    h, last = diagonal_scan(**args, segment_ids=ids, reverse=True, impl=impl)
    np.testing.assert_allclose(h[0], [0, h1, 0, x[3], h4, h5, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last[0], h1, rtol=1e-6)


def test_reverse_is_the_mirror():
    args, ids = arguments(100, (4,)), documents(100)
    flip = lambda x: jnp.flip(x, axis=1)
    mirrored = jnp.where(ids > 0, ids.max(axis=1, keepdims=True) + 1 - ids, 0)
    for impl in ("ref", "xla"):
        h, last = diagonal_scan(**args, segment_ids=jnp.asarray(ids), reverse=True, impl=impl)
        want, want_last = diagonal_scan(
            flip(args["a"]), flip(args["x"]), state=args["state"], segment_ids=flip(mirrored), impl=impl
        )
        np.testing.assert_array_equal(h, flip(want))
        np.testing.assert_array_equal(last, want_last)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_separate(reverse):
    ids = np.zeros((1, 75), np.int32)
    for i, start in enumerate((1, 26, 50)):
        ids[0, start : start + 23] = i + 1
    args = arguments(75, (5, 2), state=False, B=1)
    scan = functools.partial(diagonal_scan, reverse=reverse)

    def gradients(op, args):
        loss = lambda args: (lambda o: (jnp.sin(o).sum(), o))(op(**args)[0])
        (_, o), d = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
        return {"o": o} | d

    got = recurrent.separate(gradients(functools.partial(scan, segment_ids=jnp.asarray(ids), impl="xla"), args), ids)
    want = gradients(functools.partial(scan, impl="ref"), recurrent.separate(args, ids))
    recurrent.check(got, want)


@pytest.mark.parametrize("in_turn", [IN_TURN, AT_ONCE])
def test_causality_to_the_bit(in_turn, monkeypatch):
    monkeypatch.setattr(xla, "IN_TURN", in_turn)
    args = arguments(200, (5,))
    op = jax.jit(functools.partial(diagonal_scan, impl="xla"))
    before, _ = op(**args)
    for t in (0, 20, 63, 64, 127):
        other = {name: x if name == "state" else x.at[:, t + 1 :].multiply(-0.5) for name, x in args.items()}
        after, _ = op(**other)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_all_decays_at_an_end():
    """Nothing is kept, then all: sums of 150 numbers, then of the same ones that are subtracted again."""
    args = arguments(150, (3,))
    for a in (0.0, 1.0, -1.0):
        args["a"] = jnp.full_like(args["a"], a)
        recurrent.check(run("xla", args), run("ref", args))


def test_real_with_complex():
    """The gradient of what was real is real."""
    args = arguments(40, (3,), dtype=jnp.complex64)
    for name in ("a", "x"):
        mixed = args | {name: args[name].real}
        got, want = run("xla", mixed), run("ref", mixed)
        recurrent.check(got, want)
        assert got[f"d{name}"].shape == mixed[name].shape


def test_bfloat16():
    args = arguments(67, (5,))
    half = {name: x.astype(jnp.bfloat16) for name, x in args.items()}
    got, want = (recurrent.run(functools.partial(diagonal_scan, impl=impl), half) for impl in ("xla", "ref"))
    assert got["o"].dtype == jnp.bfloat16
    assert got["state"].dtype == np.float32
    # Both compute in float32 and round once: within half a unit in the last place of 8 bits.
    assert all(recurrent.error(got[name], want[name]) < 4e-3 for name in want)


def test_errors():
    args = arguments(3, (4,))
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        diagonal_scan(**args, impl="cuda")
    jaxtyping.config.update("jaxtyping_disable", True)  # users without run-time types get a sentence, too
    try:
        with pytest.raises(ValueError, match="must have the shape of x"):
            diagonal_scan(args["a"][:, :2], args["x"])
        with pytest.raises(ValueError, match="state has shape"):
            diagonal_scan(args["a"], args["x"], state=jnp.zeros((2, 3)))
        with pytest.raises(ValueError, match="segment_ids has shape"):
            diagonal_scan(args["a"], args["x"], segment_ids=jnp.ones((2, 4), jnp.int32))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
