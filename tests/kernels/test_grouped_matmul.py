import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import tpu, xla

# float32 sums of at most 48 products, in another order; gradients of w add up as many as a group has rows.
VALUE_TOLERANCE, GRAD_TOLERANCE = 2e-6, 2e-5


# Rows, and how they are divided: evenly or not, all in one group, empty groups at both ends, rows after the last group.
DIVISIONS = {
    "none": (0, [0, 0, 0]),
    "one row": (1, [0, 1, 0]),
    "uneven": (67, [5, 0, 33, 29]),
    "one group": (67, [0, 0, 67, 0]),
    "rows left": (131, [0, 40, 3, 0, 64, 0]),
    "all rows left": (20, [0, 0]),
    "tiles": (512, [256, 128, 128]),
    "one matrix": (40, [37]),
}


def rms_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30) if want.size else 0.0


def make(num_rows, group_sizes, D=24, F=48, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return normal(num_rows, D), normal(len(group_sizes), D, F), np.array(group_sizes, np.int32), normal(num_rows, F)


@functools.partial(jax.jit, static_argnames="impl")
def run(x, w, group_sizes, dy, *, impl):
    """Returns y, and the gradients of x and w."""
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, impl=impl), x, w)
    return y, *pull(dy)


def assert_same(got, want, values=VALUE_TOLERANCE, grads=GRAD_TOLERANCE):
    for g, w, tolerance in zip(got, want, (values, grads, grads), strict=True):
        assert rms_error(g, w) < tolerance


@pytest.mark.parametrize("division", DIVISIONS)
def test_agrees_with_ref(division):
    args = make(*DIVISIONS[division])
    assert_same(run(*args, impl="xla"), run(*args, impl="ref"))


def test_small_tiles(monkeypatch):
    """Several tiles in a group, the last one not full and reaching into the next group."""
    monkeypatch.setattr(xla, "MAX_TILE", 8)
    args = make(150, [17, 0, 40, 16, 51], D=20)
    assert_same(run(*args, impl="xla"), run(*args, impl="ref"))


@pytest.mark.parametrize("division", [name for name in DIVISIONS if name != "none"])
def test_tpu_agrees_with_ref(division, monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    args = make(*DIVISIONS[division])
    assert_same(run(*args, impl="tpu"), run(*args, impl="ref"))


def test_tpu_in_several_tiles(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    monkeypatch.setattr(tpu, "MAX_BYTES", 4 * 128)
    args = make(300, [0, 130, 0, 145], D=200, F=264)
    assert_same(run(*args, impl="tpu"), run(*args, impl="ref"), values=5e-6)


def test_ref_is_a_matmul_per_group():
    x, w, group_sizes, dy = make(*DIVISIONS["rows left"])
    y, dx, dw = run(x, w, group_sizes, dy, impl="ref")
    ends = np.cumsum(group_sizes)
    want_y, want_dx, want_dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for e, (size, end) in enumerate(zip(group_sizes, ends, strict=True)):
        rows = slice(end - size, end)
        want_y[rows], want_dx[rows], want_dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    assert_same((y, dx, dw), (want_y, want_dx, want_dw))
    assert not np.any(y[ends[-1] :])


@pytest.mark.parametrize("impl", ["xla", "tpu"])
def test_rows_left_may_be_anything(impl, monkeypatch):
    """What stands after the last group is read by nobody: not even NaNs come through."""
    monkeypatch.setattr(tpu, "INTERPRET", True)
    x, w, group_sizes, dy = make(*DIVISIONS["rows left"])
    want, total = run(x, w, group_sizes, dy, impl="ref"), np.sum(group_sizes)
    x, dy = x.copy(), dy.copy()  # JAX may still be reading the others.
    x[total:], dy[total:] = np.nan, np.nan
    assert_same(run(x, w, group_sizes, dy, impl=impl), want)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
def test_bfloat16(impl, monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    x, w, group_sizes, dy = make(*DIVISIONS["uneven"])
    half = [a.astype(jnp.bfloat16) for a in (x, w)]
    got = run(*half, group_sizes, dy.astype(jnp.bfloat16), impl=impl)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    want = run(*(a.astype(np.float32) for a in half), group_sizes, dy, impl="ref")
    assert_same(got, want, values=1e-2, grads=1e-2)


def test_flops_follow_the_rows():
    """Nothing is multiplied with the matrices of other groups, as `jax.lax.ragged_dot` does on a CPU."""
    x, w, group_sizes, _ = make(512, [8] * 64)
    cost = lambda fn: jax.jit(fn).lower(x, w, group_sizes).compile().cost_analysis()["flops"]
    assert cost(jax.lax.ragged_dot) > 60 * 2 * x.size * w.shape[2]
    assert cost(lambda *args: grouped_matmul(*args, impl="xla")) < 2 * 2 * x.size * w.shape[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, sizes: grouped_matmul(x, w[:, 1:], sizes), "w is .E D F."),
        (lambda x, w, sizes: grouped_matmul(x, w, sizes[1:]), "group_sizes is"),
        (lambda x, w, sizes: grouped_matmul(x, w, sizes, impl="gpu"), "no implementation 'gpu'"),
        (lambda x, w, sizes: grouped_matmul(x.astype(jnp.float16), w, sizes, impl="tpu"), "does not support x float16"),
    ],
)
def test_refuses(change, message):
    x, w, sizes, _ = (jnp.asarray(a) for a in make(4, [1, 2]))
    # Where a type checker is on, it may speak first.
    with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
        change(x, w, sizes)
