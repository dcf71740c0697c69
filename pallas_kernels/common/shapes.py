"""What the shapes of an op's arguments must agree on, said to the user in one sentence."""

from collections.abc import Mapping

import jax


def check_shapes(op: str, arrays: Mapping[str, tuple[jax.Array | None, tuple[int, ...]]]) -> None:
    """Raises ValueError unless each array that is given has the shape beside it."""
    for name, (array, shape) in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{op}: {name} has shape {array.shape}, it must be {shape}")


def check_heads(op: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError unless q and k are BTKH, v is BTNP, and N is a multiple of K."""
    if q.shape != k.shape or q.ndim != 4 or v.ndim != 4 or q.shape[:2] != v.shape[:2]:
        raise ValueError(f"{op}: q {q.shape} and k {k.shape} must be [B T K H] alike, v {v.shape} must be [B T N P]")
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: v has {v.shape[2]} heads, which must be a multiple of the {k.shape[2]} heads of k")
