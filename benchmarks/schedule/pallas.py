"""The Pallas kernels of a traced program: their grids, and how much they move between HBM and VMEM."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    grid: tuple[int, ...]
    calls: int
    """How often the program runs it: scans multiply."""
    hbm_bytes: float
    """Of one call. Blocks are fetched when their index changes; those chosen by data, at every step."""
    hbm_bytes_by_data: float
    """What of it is chosen by data."""
    copies_by_hand: bool
    """Whether it moves more than its blocks."""


def find_kernels(jaxpr: Any, calls: int = 1) -> Iterator[Kernel]:
    """Yields the kernels below `jaxpr` in the order in which they are traced."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield _describe(eqn, calls)
            continue
        inner = calls * eqn.params["length"] if eqn.primitive.name == "scan" else calls
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield from find_kernels(part, inner)


def _describe(eqn: Any, calls: int) -> Kernel:
    name, mapping = eqn.params["name"] or "", eqn.params["grid_mapping"]
    grid = tuple(mapping.grid)
    if not all(isinstance(size, int) for size in grid):
        raise ValueError(f"kernel {name!r} has a grid known only at run time: {grid}")
    hbm_bytes = by_data = 0
    copies_by_hand = False
    for block in mapping.block_mappings:
        space = str(block.transformed_block_aval).lower()
        if "any" in space or "hbm" in space:
            copies_by_hand = True
            continue
        sizes = [getattr(size, "block_size", size) for size in block.block_shape]
        block_bytes = math.prod(size for size in sizes if isinstance(size, int)) * block.array_aval.dtype.itemsize
        index_map = _index_map(block.index_map_jaxpr, len(grid))
        if index_map is None:
            by_data += block_bytes * math.prod(grid)
        hbm_bytes += block_bytes * (math.prod(grid) if index_map is None else _count_fetches(index_map, grid))
    return Kernel(name, grid, calls, hbm_bytes, by_data, copies_by_hand)


def _index_map(closed: Any, num_indices: int) -> Callable[..., Any] | None:
    """Returns the map from the grid to a block, or None if it reads data that was fetched before."""
    jaxpr = closed.jaxpr
    live, eqns = set(map(id, jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if any(id(var) in live for var in eqn.outvars):
            eqns.insert(0, eqn)
            live |= set(map(id, eqn.invars))
    if any(id(var) in live for var in jaxpr.invars[num_indices:]):
        return None
    unnamed = jaxpr.debug_info.with_unknown_names()
    alone = jaxpr.replace(eqns=eqns, invars=jaxpr.invars[:num_indices], effects=set(), debug_info=unnamed)
    return jaxpr_as_fun(closed.replace(jaxpr=alone))


def _count_fetches(index_map: Callable[..., Any], grid: tuple[int, ...]) -> int:
    """How often the index of a block changes as the grid is walked, the first fetch included."""
    if not grid:
        return 1
    points = np.indices(grid, np.int32).reshape(len(grid), -1)
    as_list = lambda *point: [jnp.asarray(index) for index in index_map(*point)]
    with jax.default_device(jax.devices("cpu")[0]):
        indices = np.stack([np.broadcast_to(index, points.shape[1]) for index in jax.vmap(as_list)(*points)])
    return 1 + int((np.diff(indices, axis=1) != 0).any(axis=0).sum())
