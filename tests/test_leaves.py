import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_lm.leaves import ForeignLeaves, fingerprint, fingerprints, flatten, to_hex, unflatten


class Block(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(4, 6, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (8, 4)))
        self.periods = nnx.List([Block(rngs), Block(rngs)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    model: Any
    opt: Any
    step: jax.Array
    key: jax.Array


def make_state():
    model = Model(nnx.Rngs(0))
    return State(model, optax.adamw(1e-3).init(model), jnp.int32(3), jax.random.key(1))


def test_paths_are_what_users_named():
    paths = list(flatten(make_state()))
    assert "model/periods/1/proj/kernel" in paths
    assert "opt/0/mu/periods/1/proj/kernel" in paths
    assert {"model/embed", "opt/0/count", "step", "key"} <= set(paths)
    assert not [path for path in paths if "value" in path]


def test_paths_of_a_model_and_of_its_shapes_agree():
    assert list(flatten(make_state())) == list(flatten(jax.eval_shape(make_state)))


def test_unflatten_puts_leaves_back():
    state = make_state()
    doubled = {path: x if path == "key" else 2 * x for path, x in flatten(state).items()}
    got = unflatten(state, doubled)
    assert type(got.model.periods[1].proj.kernel) is nnx.Param
    np.testing.assert_array_equal(got.model.periods[1].proj.kernel[...], 2 * state.model.periods[1].proj.kernel[...])


def test_unflatten_says_what_differs():
    like = {"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(1)}
    with pytest.raises(
        ForeignLeaves, match=r"a is float32\[4\], not float32\[3\]; c float32\[1\] is missing; d .* unkn"
    ):
        unflatten(like, {"a": jnp.zeros(4), "b": jnp.zeros(2), "d": jnp.zeros(1)})
    with pytest.raises(ForeignLeaves, match=r"a is bfloat16\[3\], not float32\[3\]"):
        unflatten(like, like | {"a": jnp.zeros(3, jnp.bfloat16)})


def test_flatten_refuses_what_it_cannot_name():
    with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
        flatten({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})
    with pytest.raises(ValueError, match="lr is a float"):
        flatten({"lr": 0.1})


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "bool", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_sees_every_bit(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 7)) > 0 if dtype == "bool" else np.arange(35).reshape(5, 7))
    x = x.astype(jnp.dtype(dtype))
    clean = int(fingerprint(jnp.asarray(x)))
    for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
        damaged = bytearray(x.tobytes())
        damaged[17 * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
        assert int(fingerprint(jnp.asarray(np.frombuffer(bytes(damaged), x.dtype).reshape(5, 7)))) != clean, bit


def test_fingerprint_sees_where_values_stand():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    swapped_rows, swapped, negated = x.copy(), x.copy(), x.copy()
    swapped_rows[[3, 9]] = x[[9, 3]]
    swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
    negated[4:6] *= -1  # An even number of top bits: what a plain sum cannot see.
    variants = [x, swapped_rows, swapped, negated, x.T, np.roll(x, 1, axis=0), np.zeros_like(x), -np.zeros_like(x)]
    assert len({int(fingerprint(jnp.asarray(v))) for v in variants}) == len(variants)
    assert int(fingerprint(jnp.zeros((2, 3)))) != int(fingerprint(jnp.zeros((2, 4))))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_fingerprint_does_not_depend_on_the_mesh(axis_type):
    x = jax.random.normal(jax.random.key(0), (16, 24), jnp.bfloat16)
    prints = [fingerprints({"x": x}), fingerprints({"x": np.asarray(x)})]
    for shape in [(4, 2), (1, 2)]:
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(axis_type,) * 2, devices=devices)
        for spec in [("a", "b"), ("b", "a"), (None, ("a", "b")), ()]:
            sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            prints.append(fingerprints({"x": sharded, "alone": jnp.zeros(3)}))
    assert len({to_hex(p)["x"] for p in prints}) == 1


def test_fingerprint_of_64_bits():
    with jax.enable_x64(True):
        x = jnp.arange(6.0, dtype=jnp.float64)
        assert int(fingerprint(x)) != int(fingerprint(x.at[2].add(1e-15)))
