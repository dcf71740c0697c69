"""The ops against numbers from independent programs (tests/golden/make says which)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
OPS = [
    "linear_attention",
    "delta_rule",
    "generalized_delta_rule",
    "diagonal_scan",
    "selective_scan",
    "short_conv",
    "attention",
    "linear_cross_entropy",
]
CASES = [(op, path.stem) for op in OPS for path in sorted(GOLDEN.glob(f"{op}*.npz"))]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[case for _, case in CASES])
def test_definition_in_float64(op: str, case: str):
    # The tolerance is rounding in float64, and would show any other definition.
    with jax.enable_x64(True):
        check(op, case, jnp.float64, impl="ref", tolerance=1e-10, gradient_tolerance=1e-10)


@pytest.mark.parametrize(("op", "case"), CASES, ids=[case for _, case in CASES])
def test_default_implementation_in_float32(op: str, case: str):
    check(op, case, jnp.float32, impl=None, tolerance=2e-5, gradient_tolerance=1e-4)


def check(op: str, case: str, dtype: type, *, impl: str | None, tolerance: float, gradient_tolerance: float) -> None:
    file = np.load(GOLDEN / f"{case}.npz")
    settings = json.loads(str(file["meta"]))["settings"]
    group = lambda name: {key.removeprefix(f"{name}."): file[key] for key in file.files if key.startswith(f"{name}.")}
    want, want_grads = group("out"), group("grad")
    inputs = {key: jnp.asarray(x) for key, x in group("in").items() if key not in want_grads}
    in_dtype = lambda x: jnp.asarray(x, jnp.promote_types(dtype, jnp.complex64) if np.iscomplexobj(x) else dtype)
    floats = {key: in_dtype(x) for key, x in group("in").items() if key in want_grads}
    cotangents = {key: in_dtype(x) for key, x in group("cotangent").items()}

    def run(floats):
        outputs = getattr(kernels, op)(**floats, **inputs, **settings, impl=impl)
        return dict(zip(want, outputs, strict=True))

    @jax.jit
    def run_and_pull_back(floats, cotangents):
        got, vjp = jax.vjp(run, floats)
        return got, vjp({key: x.astype(got[key].dtype) for key, x in cotangents.items()})[0]

    got, got_grads = run_and_pull_back(floats, cotangents)
    if op == "attention" and "segment_ids" in inputs:
        # What the softmax of a padded query sums to is our own convention, not the reference's.
        got["lse"] = jnp.where((inputs["segment_ids"] > 0)[:, None], got["lse"], 0)
    errors = {key: relative_error(got[key], x) / tolerance for key, x in want.items()}
    errors |= {f"d{key}": relative_error(got_grads[key], x) / gradient_tolerance for key, x in want_grads.items()}
    assert all(error < 1 for error in errors.values()), f"errors as multiples of what is tolerated: {errors}"


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    assert got.shape == want.shape
    error = np.asarray(got, want.dtype) - want
    return float(np.linalg.norm(error) / np.linalg.norm(want))
