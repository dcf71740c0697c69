"""The leaves of a pytree by path, what each of them is, and fingerprints of their bits."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

type Tree = Any  # A pytree of arrays, or of what stands for them (jax.ShapeDtypeStruct).


class ForeignLeaves(ValueError):
    """Leaves that are not those of this tree: other paths, shapes or dtypes."""


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by path, e.g. `model/periods/0/mixer/q_proj/kernel`.

    Paths are made of what users named: attributes, keys, positions. A Variable's inside does not show.

    Raises:
      ValueError: two leaves have the same path, or one is no array of JAX.
    """
    leaves: dict[str, Any] = {}
    is_variable = lambda x: isinstance(x, nnx.Variable)
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_variable):
        for tail, leaf in jax.tree.leaves_with_path(node):
            # The first key inside a Variable is Flax's own name of its value.
            keys = (*path, *tail[1:]) if is_variable(node) else path
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            if name in leaves:
                raise ValueError(f"two leaves are called {name!r}; is there a key with a slash?")
            if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
                raise ValueError(f"{name} is a {type(leaf).__name__}; make it a jax.Array")
            leaves[name] = leaf
    return leaves


def unflatten(like: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Returns `like` with its leaves replaced by those of `leaves`.

    Raises:
      ForeignLeaves: `leaves` are not those of `like`.
    """
    own = flatten(like)
    check_same(describe(leaves), describe(own))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in own])


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns shape and dtype of each leaf in a line, e.g. `bfloat16[4,64]`, `key<fry>[]`."""
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves.items()}


def check_same(got: Mapping[str, str], want: Mapping[str, str], *, what: str = "the given leaves") -> None:
    """Compares two descriptions.

    Raises:
      ForeignLeaves: says which leaves are missing, unknown or different.
    """
    faults = [f"{path} is {got[path]}, not {want[path]}" for path in want if path in got and got[path] != want[path]]
    faults += [f"{path} {want[path]} is missing" for path in want if path not in got]
    faults += [f"{path} {got[path]} is unknown here" for path in got if path not in want]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ForeignLeaves(f"{what} do not fit this model: {'; '.join(faults[:8])}{more}")


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@jax.jit
def fingerprint(x: jax.Array) -> jax.Array:
    """Returns 32 bits that depend on every bit of `x` and on where it stands, not on how `x` is sharded.

    A sum of hashes of (position, value): integers, so any order of summation gives the same. The hash maps values
    one to one, so that a single changed element always shows; other damage goes unseen once in 2^32.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    elif jnp.issubdtype(x.dtype, jnp.floating):
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    else:
        words = x.astype(jnp.uint32)
    # The row-major position, modulo 2^32, from one iota per dimension: each device computes its own part.
    position = jnp.zeros_like(words)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    # The hash is lowbias32, https://github.com/skeeto/hash-prospector.
    words ^= position * jnp.uint32(0x9E3779B1)
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


@jax.jit
def _fingerprint_all(xs: list[jax.Array]) -> list[jax.Array]:
    return [fingerprint(x) for x in xs]


def fingerprints(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
    """Returns the fingerprint of each array, without waiting for it; reads all arrays once, on their devices.

    Arrays that live on the same devices share a call. Not for typed keys: pass their data.
    """
    groups = collections.defaultdict(list)
    for path, x in arrays.items():
        groups[frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None].append(path)
    out = {}
    for paths in groups.values():
        out |= zip(paths, _fingerprint_all([arrays[path] for path in paths]), strict=True)
    return out


def to_hex(values: Mapping[str, jax.Array]) -> dict[str, str]:
    """Waits for fingerprints and returns them in hexadecimal."""
    return {path: f"{int(value):08x}" for path, value in jax.device_get(dict(values)).items()}
