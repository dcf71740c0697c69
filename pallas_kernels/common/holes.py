"""Rows with padding before a token, for implementations that can only have it at the end."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def has_holes(ids_BT: jax.Array) -> jax.Array:
    """Returns whether there is padding before a token in any row."""
    return jnp.any((ids_BT[:, :-1] == 0) & (ids_BT[:, 1:] > 0))


def hole_moves(ids_BT: jax.Array | None) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns the functions of `moves`, which do nothing where padding is at the end already: almost always."""
    if ids_BT is None or ids_BT.shape[1] < 2:
        return lambda a: a, lambda a: a
    cond = functools.partial(jax.lax.cond, has_holes(ids_BT))
    close = lambda a: cond(lambda a: moves(ids_BT)[0](a), lambda a: a, a)
    reopen = lambda a: cond(lambda a: moves(ids_BT)[1](a), lambda a: a, a)
    return close, reopen


def moves(ids_BT: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns two functions of `[B T ...]`: one moves the padding of each row to its end, the other moves it back."""
    order_BT = jnp.argsort(ids_BT == 0, axis=1, stable=True)
    return lambda a: _take(a, order_BT), lambda a: _take(a, jnp.argsort(order_BT, axis=1))


def _take(a, index_BT):
    return jnp.take_along_axis(a, index_BT.reshape(index_BT.shape + (1,) * (a.ndim - 2)), axis=1)
