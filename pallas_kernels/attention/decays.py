"""Forget gates in `attention`: by how much the tokens between a key and a query lower the score.

The sum of the log-decays g of the tokens after key j up to query i is c[i] - c[j], with c the sums from the first token
on. So that differences lose nothing where a decay of -30 stands beside one of -0.01, each g is cut in a multiple of
1/64, whose sums are exact, and a small rest, whose sums are small.
"""

import jax
import jax.numpy as jnp

# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


def cumulative(g, sides):
    """Returns c for the queries `[B T N 2]` and the keys `[B S N 2]`, in two parts."""
    g_BSN = jnp.maximum(g, _MIN_LOG)
    coarse_BSN = jnp.ceil(g_BSN * 64) / 64
    pairs = [_sums(part_BSN, sides) for part_BSN in (coarse_BSN, g_BSN - coarse_BSN)]
    return tuple(jnp.stack(parts, axis=-1) for parts in zip(*pairs, strict=True))


def gradient(rows_BTN, columns_BSN, sides):
    """Returns that of g, from the gradients of each query's scores, summed over the keys, and the other way round."""
    zeros_BSN = jax.ShapeDtypeStruct(columns_BSN.shape, columns_BSN.dtype)
    (dg_BSN,) = jax.linear_transpose(lambda g_BSN: _sums(g_BSN, sides), zeros_BSN)((rows_BTN, -columns_BSN))
    return dg_BSN


def between(queries_BKGL2, keys_BKGS2):
    """Returns `[B K G L S]`, the sums of the tokens between: at most 0 however they round, 0 for later keys."""
    difference = lambda part: queries_BKGL2[..., :, None, part] - keys_BKGS2[..., None, :, part]
    return jnp.minimum(difference(0) + difference(1), 0)


def _sums(g_BSN, sides):
    """Returns the sums of g over all tokens up to each query, and up to each key."""
    queries, keys = sides
    is_real_BS = keys.ids > 0
    c_BSN = jnp.cumsum(jnp.where(is_real_BS[..., None], g_BSN, 0), axis=1)
    # How many slots come up to a query's place: with the decay of padding being 0, later padding does not count.
    places_BS = jax.lax.cummax(jnp.where(is_real_BS, keys.places, -1), axis=1)
    slots_BT = jax.vmap(lambda places_S, places_T: jnp.searchsorted(places_S, places_T, side="right"))(
        places_BS, queries.places
    )
    starts_BSN = jnp.pad(c_BSN, ((0, 0), (1, 0), (0, 0)))
    return jnp.take_along_axis(starts_BSN, slots_BT[..., None], axis=1), c_BSN
