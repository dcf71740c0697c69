"""What the tests of recurrent ops share: rows of documents, errors, values and gradients in one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.heads import TILE

# How kernels are interpreted. Memory that no one wrote to is NaN; reading what another step of the grid writes is an
# error.
TPU = pltpu.InterpretParams(detect_races=True)
# The interpreter of TPUs cannot see memory in another shape or type, which is how heads that lie in place are told
# apart. That of Pallas can.
ANY = True


def interpreter(num_heads: int) -> pltpu.InterpretParams | bool:
    """Returns the strictest one for kernels with so many value heads."""
    return ANY if num_heads in (2, 4) or num_heads % TILE == 0 else TPU


def documents(T: int) -> np.ndarray:
    """Two packed rows: padding on the left, in the middle (within a document and between two) and on the right."""
    ids = np.zeros((2, T), np.int32)
    ids[0] = 1 + np.arange(T) // 9
    ids[0, T // 2 : T // 2 + 5] = 0
    ids[1, 2:] = 1 + np.arange(T - 2) // 70
    ids[1, 5:8] = 0
    ids[1, T - T // 8 :] = 0
    return ids


def error(got, want) -> float:
    """Relative root mean square; absolute where the wanted values are all zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.size == 0:
        return 0.0
    size = np.sqrt(np.mean(want**2))
    return float(np.sqrt(np.mean((got - want) ** 2)) / (size if size > 0 else 1))


def check(got: dict, want: dict) -> None:
    """Outputs within 2e-5 (float32, sums of 200 terms), gradients within 1e-4 (two such passes)."""
    errors = {name: error(got[name], want[name]) for name in want}
    limits = {name: 2e-5 if name in ("o", "state") else 1e-4 for name in want}
    assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}


def run(op, arguments: dict) -> dict:
    """Returns o, state and the gradients of the arguments, with random cotangents on both outputs."""
    return jax.tree.map(np.asarray, _values_and_gradients(op, arguments))


@functools.partial(jax.jit, static_argnums=0)
def _values_and_gradients(op, arguments):
    (o, state), vjp = jax.vjp(lambda arguments: op(**arguments), arguments)
    do, dstate = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in ((90, o), (91, state)))
    return {"o": o, "state": state} | {f"d{name}": d for name, d in vjp((do, dstate))[0].items()}


def log_decays(shape: tuple[int, ...]) -> jax.Array:
    """Log-decays from 0 to -30, most of them small."""
    return -30 * jax.random.uniform(jax.random.key(4), shape) ** 6


def qkv(T: int, K: int, N: int, H: int, P: int, B: int = 2) -> dict:
    shapes = {"q": (B, T, K, H), "k": (B, T, K, H), "v": (B, T, N, P)}
    return {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}


def state(N: int, H: int, P: int, B: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(3), (B, N, H, P))


def separate(arguments: dict, ids: np.ndarray) -> dict:
    """Makes a row of each document of a packed row, all of one length; whatever is not BT... is left as it is."""
    T = ids.shape[1]
    rows = [np.flatnonzero(ids[0] == i) for i in range(1, ids.max() + 1)]
    return {
        name: jnp.stack([x[0, row] for row in rows]) if x.ndim > 2 and x.shape[1] == T else x
        for name, x in arguments.items()
    }
