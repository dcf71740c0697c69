"""Dimension letters are the logical axes; one table maps them to the mesh.

B batch         T query positions     S key positions    C chunks   L positions in a chunk
D model width   F feed-forward width  V vocabulary       E experts
N heads         K key/value heads     G = N / K          H key width of a head   P value width of a head

A name that ends in letters says what its dimensions are: `q_BTNH`. Everything here is the identity outside a mesh.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

# The devices that share the experts have rows of the batch of their own, too.
MESH_AXES = {
    "B": ("data", "expert"),
    "T": ("context",),
    "D": ("data",),
    "V": ("model",),
    "F": ("model",),
    "N": ("model",),
    "K": ("model",),
    "E": ("expert",),
}

NAMES = {"B": "rows", "T": "tokens", "D": "channels", "V": "tokens of the vocabulary", "F": "feed-forward channels"}
NAMES |= {"N": "heads", "K": "key/value heads", "E": "experts"}


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh in explicit mode, e.g. `make_mesh({"data": -1, "model": 2})`; -1 takes the devices that are left.

    Several slices of TPUs lie along `data`, all other axes within a slice: between slices the network is slow.

    Raises:
      ValueError: an axis that no letter maps to, sizes that do not multiply to the number of devices, or `data` that
        the slices cannot share.
    """
    devices = jax.devices() if devices is None else devices
    sizes, num_slices = mesh_sizes(axes, len(devices)), len({slice_of(device) for device in devices})
    if sizes.get("data", 1) % num_slices:
        raise ValueError(
            f"mesh {dict(axes)} on {num_slices} slices: they lie along data, whose size has to be a multiple of "
            f"{num_slices}"
        )
    inside = [size // num_slices if axis == "data" else size for axis, size in sizes.items()]
    between = [num_slices if axis == "data" else 1 for axis in sizes]
    # As jax.make_mesh, which refuses a mesh of 8 x 8 on a torus of 4 x 4 x 4.
    if num_slices == 1:
        placed = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def slice_of(device: Any) -> int:
    """Returns which slice a TPU is part of; what is not connected in slices is in one."""
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def mesh_sizes(axes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Returns the sizes of the axes of a mesh, with a number for -1.

    Raises:
      ValueError: an axis that no letter maps to, or sizes that do not multiply to the number of devices.
    """
    known = sorted({axis for axes in MESH_AXES.values() for axis in axes})
    for name in axes:
        if name not in known:
            raise ValueError(f"mesh axis {name!r} is unknown; the axes are {', '.join(known)}")
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if min(sizes.values(), default=1) < 1 or math.prod(sizes.values()) != num_devices:
        raise ValueError(f"mesh {dict(axes)} does not use {num_devices} devices; set e.g. --mesh data -1 to take all")
    return sizes


def spec(dims: str) -> PartitionSpec:
    """Returns the partition of an array whose dimensions are `dims`; a mesh axis goes to its first letter."""
    free = set(jax.sharding.get_abstract_mesh().axis_names)
    partition = []
    for dim in dims:
        axes = tuple(axis for axis in MESH_AXES.get(dim, ()) if axis in free)
        partition.append(axes[0] if len(axes) == 1 else axes or None)
        free.difference_update(axes)
    return PartitionSpec(*partition)


def shard(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out as its letters say.

    Raises:
      ValueError: a dimension cannot be divided among the devices of its mesh axes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    check_divisible(x.shape, dims)
    return jax.sharding.reshard(x, spec(dims))


def check_divisible(shape: Sequence[int], dims: str) -> None:
    """Raises ValueError if a dimension cannot be divided among the devices of its mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    for dim, size, axes in zip(dims, shape, spec(dims), strict=False):
        among = {axis: sizes[axis] for axis in ([axes] if isinstance(axes, str) else axes or [])}
        if size % math.prod(among.values()):
            mesh = " x ".join(f"{axis}={number}" for axis, number in among.items())
            raise ValueError(
                f"{size} {NAMES[dim]} ({dim} of {dims}) cannot be divided among {mesh} devices; the size of the axis "
                f"has to be a divisor of {size}"
            )


def einsum(eqn: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays whose output, and gradients, are sharded as their letters say."""
    return _einsum(eqn, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(eqn, x, w):
    # Sums run over letters in alphabetical order; where memory has another one, both arrays would be transposed.
    names = {ord(letter): chr(ord("a") + i) for i, letter in enumerate(dict.fromkeys(filter(str.isalpha, eqn)))}
    out_sharding = None if jax.sharding.get_abstract_mesh().empty else spec(eqn.split("->")[1])
    with jax.named_scope(eqn):
        return jnp.einsum(eqn.translate(names), x, w, out_sharding=out_sharding)


def _einsum_forward(eqn, x, w):
    return _einsum(eqn, x, w), (x, w)


def _einsum_backward(eqn, residuals, dy):
    # JAX's own gradient of w comes out transposed, which on a CPU costs a copy of dy and the fast matmul.
    (x, w), (ins, y_dims) = residuals, eqn.split("->")
    x_dims, w_dims = ins.split(",")
    return _einsum(f"{y_dims},{w_dims}->{x_dims}", dy, w), _einsum(f"{x_dims},{y_dims}->{w_dims}", x, dy)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def per_shard(fn: Callable[..., Any], ins: str, outs: str, *, split_tokens: bool = False) -> Callable[..., Any]:
    """Runs `fn` on each device's own batch and heads, e.g. `per_shard(op, "BTNH,BTN", "BTNP,BNHP")`.

    Tokens are whole, unless `split_tokens` says that `fn` works on a part of them: token by token, or by the ops of
    context.py, which know of the others. An argument that is None stays None.
    """

    def call(*xs):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(*xs)
        in_dims, out_dims = _local(ins, split_tokens), _local(outs, split_tokens)
        xs = [None if x is None else shard(x, dims) for x, dims in zip(xs, in_dims, strict=True)]
        # check_vma=False: Pallas calls do not say along which mesh axes their outputs vary.
        run = jax.shard_map(
            fn,
            in_specs=tuple(map(spec, in_dims)),
            out_specs=tuple(map(spec, out_dims)) if len(out_dims) > 1 else spec(out_dims[0]),
            check_vma=False,
        )
        out = run(*xs)
        if "context" not in mesh.axis_names or split_tokens:
            return out
        parts = [out] if len(out_dims) == 1 else out
        parts = [shard(x, dims) for x, dims in zip(parts, outs.split(","), strict=True)]
        return parts[0] if len(out_dims) == 1 else tuple(parts)

    return call


def _local(arrays: str, split_tokens: bool) -> list[str]:
    """Returns the letters of each array as `spec` takes them: keys lie as their tokens do, whole tokens nowhere."""
    return (arrays.replace("S", "T") if split_tokens else arrays.replace("T", "t")).split(",")


@contextlib.contextmanager
def undivided(tree: Any) -> Iterator[Any]:
    """Yields the tree on a mesh whose axes no letter maps to: what is computed with it, all devices compute alike.

    So one prompt of any length goes through a model whose weights lie in parts; they stay where they are.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        yield tree
        return
    rename = lambda axes: tuple(f"idle_{axis}" for axis in ([axes] if isinstance(axes, str) else axes or []))
    idle = Mesh(mesh.devices, rename(mesh.axis_names), axis_types=mesh.axis_types)
    with jax.set_mesh(idle):
        place = lambda x: jax.device_put(x, NamedSharding(idle, PartitionSpec(*map(rename, x.sharding.spec))))
        yield jax.tree.map(place, tree)


def sharding(dims: str) -> Sharding:
    """Returns where an array of the host goes whose dimensions are `dims`; the first device outside a mesh."""
    mesh = jax.sharding.get_mesh()
    return SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, spec(dims))


def local_rows(num_rows: int) -> list[int]:
    """Returns which rows of an array with letters B... lie on devices of this process, in order."""
    indices = sharding("B").addressable_devices_indices_map((num_rows,)).values()
    return sorted({row for index in indices if index is not None for row in range(num_rows)[index[0]]})


def assemble(x: np.ndarray, dims: str, rows: Sequence[int], num_rows: int) -> jax.Array:
    """Returns an array of `num_rows` rows over the devices of all processes; `x` has those `rows` that are local."""

    def part(index):
        first, stop, _ = index[0].indices(num_rows)
        start = rows.index(first)
        return x[start : start + stop - first, *index[1:]]

    return jax.make_array_from_callback((num_rows, *x.shape[1:]), sharding(dims), part)
