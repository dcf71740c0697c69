"""Sequences cut into chunks of L tokens: chunks in front, so that a scan walks them, and a matrix per head."""

import jax
import jax.numpy as jnp


def length(num_tokens: int, longest: int) -> int:
    """Returns the length of chunks: `longest`, or the power of two that holds a shorter sequence."""
    return min(longest, 1 << (num_tokens - 1).bit_length())


def split(x_BTN: jax.Array, num_key_heads: int, length: int, dtype: jnp.dtype) -> jax.Array:
    """Turns `BTN...` into `CBKGL...`, the last chunk filled up with zeros; value heads in groups by key head."""
    B, T, N, *rest = x_BTN.shape
    x_BTN = jnp.pad(x_BTN, ((0, 0), (0, -T % length), *[(0, 0)] * (1 + len(rest))))
    x_BCLKG = x_BTN.reshape(B, -1, length, num_key_heads, N // num_key_heads, *rest)
    return jnp.moveaxis(x_BCLKG, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).astype(dtype)


def join(x_CBKGL: jax.Array, num_tokens: int, dtype: jnp.dtype) -> jax.Array:
    """Turns `CBKGL...` back into `BTN...`."""
    C, B, K, G, L, *rest = x_CBKGL.shape
    x_BCLKG = jnp.moveaxis(x_CBKGL, (1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
    return x_BCLKG.reshape(B, C * L, K * G, *rest)[:, :num_tokens].astype(dtype)


class Segments:
    """The documents of a chunk: who may read whom, and which tokens belong with the states at its borders.

    The given state belongs to the row's first document, the state after a chunk to that of the chunk's last token.
    `ids_BT` never decreases along a row (`documents.fill_padding`).
    """

    def __init__(self, ids_BT: jax.Array, length: int):
        B, T = ids_BT.shape
        ids_BT = jnp.pad(ids_BT, ((0, 0), (0, -T % length)), mode="edge")
        ids_CBL = jnp.moveaxis(ids_BT.reshape(B, -1, length), 1, 0)
        after_CB1 = ids_CBL[:, :, -1:]
        before_CB1 = jnp.concatenate([ids_CBL[:1, :, :1], after_CB1[:-1]])
        # One document with each other token, with the state before, with the state after the chunk.
        self.same_CB111LL = (ids_CBL[..., :, None] == ids_CBL[..., None, :])[:, :, None, None, None]
        self.reads_CB11L1 = (ids_CBL == before_CB1)[:, :, None, None, :, None]
        self.writes_CB11L1 = (ids_CBL == after_CB1)[:, :, None, None, :, None]
        self.through_CB1111 = (before_CB1 == after_CB1)[:, :, None, None, :, None]


def scan_states(
    keep_CBKGX1: jax.Array, writes_CBKGHP: jax.Array, state_BKGHP: jax.Array, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Walks `S = keep * S + write` over the chunks; returns S as it comes to each chunk, and the last one."""

    def step(S_BKGHP, chunk):
        keep_BKGX1, write_BKGHP = chunk
        return keep_BKGX1 * S_BKGHP + write_BKGHP, S_BKGHP

    last_BKGHP, states_CBKGHP = jax.lax.scan(step, state_BKGHP, (keep_CBKGX1, writes_CBKGHP), reverse=reverse)
    return states_CBKGHP, last_BKGHP
