import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan import tpu, xla
from tests.kernels import recurrent


def arguments(T, D, H, skip=False, state=False, B=2):
    """Steps from 0 on; decays of a step from 1 down to exp(-30) and beyond."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    dt = 3 * jax.random.uniform(jax.random.key(1), (B, T, D)) ** 6
    args = {"x": normal(0, B, T, D), "dt": dt.at[:, ::5].set(0), "A": -jnp.exp(2 * normal(2, D, H))}
    args |= {"B": normal(3, B, T, H), "C": normal(4, B, T, H)}
    return args | ({"D": normal(5, D)} if skip else {}) | ({"state": normal(6, B, D, H)} if state else {})


def run(impl, args, ids=None):
    return recurrent.run(functools.partial(selective_scan, segment_ids=ids, impl=impl), args)


IN_TURN, AT_ONCE = ("cpu",), ()


@pytest.mark.parametrize(
    # Platforms on which all of a token is done before the next one are last.
    ("T", "D", "H", "skip", "packed", "state", "in_turn"),
    [
        (0, 3, 4, True, False, True, IN_TURN),
        (1, 3, 4, True, True, True, IN_TURN),
        (3, 5, 4, False, False, False, AT_ONCE),
        (67, 6, 5, True, True, False, IN_TURN),
        (128, 6, 5, False, False, True, IN_TURN),
        (200, 6, 16, False, True, True, IN_TURN),
        (200, 6, 16, True, True, True, AT_ONCE),
    ],
)
def test_agrees_with_the_definition(T, D, H, skip, packed, state, in_turn, monkeypatch):
    monkeypatch.setattr(xla, "IN_TURN", in_turn)
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    args = arguments(T, D, H, skip, state)
    got, want = (run(impl, args, ids) for impl in ("xla", "ref"))
    recurrent.check(got, want)
    if ids is not None:
        for name in ("o", "dx", "ddt", "dB", "dC"):
            assert not np.any(got[name][np.asarray(ids) == 0])


def run_interpreted(args, ids=None):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return run("tpu", args, ids)


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks in a block, and fewer lines to interpret."""
    monkeypatch.setattr(tpu, "CHUNK", 16)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("T", "D", "H", "skip", "packed", "state"),
    [(1, 3, 4, True, True, True), (3, 5, 20, True, False, False), (67, 6, 5, False, True, True)],
)
def test_tpu_agrees_with_the_definition(T, D, H, skip, packed, state):
    ids = jnp.asarray(recurrent.documents(T)) if packed else None
    args = arguments(T, D, H, skip, state)
    got, want = run_interpreted(args, ids), run("ref", args, ids)
    recurrent.check(got, want)
    if ids is not None:
        for name in ("o", "dx", "ddt", "dB", "dC"):
            assert not np.any(got[name][np.asarray(ids) == 0])


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("max_rows", [16, 32])
def test_tpu_in_several_blocks(monkeypatch, max_rows):
    """Blocks of tokens, and blocks of channels or several tiles in one; operands in bfloat16; steps that forget all."""
    monkeypatch.setattr(tpu, "MAX_ROWS", max_rows)
    ids = jnp.asarray(recurrent.documents(200))[:1]
    args = arguments(200, 150, 16, skip=True, state=True, B=1)
    args |= {name: args[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    args["dt"] = args["dt"].at[0, ::7].set(1e5)
    got, want = run_interpreted(args, ids), run("ref", args, ids)
    check_bfloat16(got, want)


def test_the_definition_in_closed_form():
    args = {name: np.asarray(a, np.float64) for name, a in arguments(2, 3, 4, skip=True, state=True, B=1).items()}
    h, y = args["state"][0], []
    for t in range(2):
        x, dt = args["x"][0, t], args["dt"][0, t]
        h = np.exp(dt[:, None] * args["A"]) * h + np.outer(dt * x, args["B"][0, t])
        y.append(h @ args["C"][0, t] + args["D"] * x)
    for impl in ("ref", "xla"):
        got_y, got_h = jax.jit(functools.partial(selective_scan, impl=impl))(
            **{name: jnp.asarray(a, jnp.float32) for name, a in args.items()}
        )
        np.testing.assert_allclose(got_y[0], np.stack(y), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got_h[0], h, rtol=1e-5, atol=1e-6)


def test_packed_equals_separate():
    ids = np.zeros((1, 75), np.int32)
    for i, start in enumerate((1, 26, 50)):
        ids[0, start : start + 23] = i + 1
    args = arguments(75, 6, 4, B=1)

    def loss(ids, args):
        y, state = selective_scan(**args, segment_ids=ids, impl="xla")
        return jnp.sin(y).sum() + jnp.cos(state[-1]).sum(), y

    def gradients(ids, args):
        grads, y = jax.jit(jax.grad(functools.partial(loss, ids), has_aux=True))(args)
        return {"o": y} | grads

    got = recurrent.separate(gradients(jnp.asarray(ids), args), ids)
    recurrent.check(got, gradients(None, recurrent.separate(args, ids)))


@pytest.mark.parametrize("step", [0.0, 1e-3, 100.0, 1e5])
def test_extreme_steps(step):
    """Nothing moves; everything is kept; everything is forgotten at once, beside channels that keep all."""
    args = arguments(70, 4, 5, state=True)
    args["dt"] = jnp.full_like(args["dt"], step).at[0, ::7].set(0)
    args["A"] = args["A"].at[0].set(-1e-6)
    ids = jnp.asarray(recurrent.documents(70))
    recurrent.check(run("xla", args, ids), run("ref", args, ids))


def test_padding_is_not_read():
    ids = jnp.asarray(recurrent.documents(67))
    args = arguments(67, 4, 5, skip=True, state=True)
    noisy = {
        name: jnp.where(ids[..., None] > 0, a, jnp.nan) if name in ("x", "dt", "B", "C") else a
        for name, a in args.items()
    }
    got, want = run("xla", noisy, ids), run("xla", args, ids)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_causality_to_the_bit():
    args = arguments(200, 4, 5, state=True)
    op = jax.jit(functools.partial(selective_scan, impl="xla"))
    before, _ = op(**args)
    for t in (0, 63, 127, 128, 150):
        other = {name: a.at[:, t + 1 :].multiply(2) if name in ("x", "dt", "B", "C") else a for name, a in args.items()}
        after, _ = op(**other)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def check_bfloat16(got, want):
    assert got["o"].dtype == jnp.bfloat16
    assert got["state"].dtype == jnp.float32
    for name in want:
        # Outputs, gradients and operands of matmuls are rounded to 8 bits.
        assert recurrent.error(got[name], want[name]) < (1e-2 if name in ("o", "state") else 2e-2), name


def test_bfloat16():
    args = arguments(67, 6, 5, skip=True, state=True)
    half = {name: a.astype(jnp.bfloat16) if name in ("x", "B", "C") else a for name, a in args.items()}
    check_bfloat16(run("xla", half), run("ref", half))


def test_states_of_all_tokens_are_never_in_memory():
    args = arguments(1024, 32, 16, B=1)

    def loss(args):
        y, state = selective_scan(**args, impl="xla")
        return jnp.sum(y * y) + jnp.sum(state)

    stats = jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < 1024 * 32 * 16 * 4 / 2  # Half of them.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": jnp.ones((5, 3))}, "A has shape"),
        ({"B": jnp.ones((2, 4, 4))}, "B has shape"),
        ({"state": jnp.ones((2, 5, 3))}, "state has shape"),
        ({"segment_ids": jnp.ones((2, 3), jnp.int32)}, "segment_ids has shape"),
        ({"impl": "gpu"}, "no implementation 'gpu'"),
    ],
)
def test_refuses(change, message):
    # Where a type checker is on, it may speak first.
    with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
        selective_scan(**arguments(4, 3, 5) | change)
