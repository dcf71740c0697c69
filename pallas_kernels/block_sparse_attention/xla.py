"""`block_sparse_attention` by gathering the chosen blocks of some queries at a time, forward and backward."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.selection import Tokens, of_softmax, sees, tokens

# Keys that are gathered at a time, of all rows and heads together: memory that does not grow with the sequence.
CHOSEN_KEYS = 2**16


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns `(o, lse)` and the residuals."""
    T, N = q.shape[1:3]
    blocks = _Blocks(options, k, v, segment_ids)

    def step(chunk):
        q_BUKRH, ids_BUKJ, queries = chunk
        k_BUKXH, v_BUKXP, keys = blocks.gather(ids_BUKJ)
        scores_BUKRX = _scores(options, q_BUKRH, k_BUKXH, queries, keys)
        max_BUKR1 = jnp.max(scores_BUKRX, axis=-1, keepdims=True)
        # The finite maximum of a query that sees nothing makes its exponentials 0.
        p_BUKRX = jnp.exp(scores_BUKRX - jnp.where(max_BUKR1 == -jnp.inf, 0, max_BUKR1))
        sum_BUKR1 = jnp.sum(p_BUKRX, axis=-1, keepdims=True)
        o_BUKRP = _einsum("BUKRX,BUKXP->BUKRP", p_BUKRX.astype(v.dtype), v_BUKXP)
        return o_BUKRP / jnp.where(sum_BUKR1 > 0, sum_BUKR1, 1), (max_BUKR1 + jnp.log(sum_BUKR1))[..., 0]

    chunks = _Chunks(options, block_ids)
    o_CBUKRP, lse_CBUKR = jax.lax.map(step, chunks.queries(q, segment_ids))
    o = chunks.undo(o_CBUKRP, T, N).astype(v.dtype)
    lse = jnp.moveaxis(chunks.undo(lse_CBUKR, T, N), 1, 2)
    return (o, lse), (q, k, v, block_ids, segment_ids, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k and v. The softmax is computed again, from its denominator."""
    q, k, v, block_ids, segment_ids, o, lse = residuals
    do, dlse = cotangents
    T, N = q.shape[1:3]
    shift_BTN, lse_BTN = of_softmax(o, lse, do, dlse)
    blocks = _Blocks(options, k, v, segment_ids)

    def step(grads, chunk):
        (q_BUKRH, ids_BUKJ, queries), (do_BUKRP, shift_BUKR, lse_BUKR) = chunk
        k_BUKXH, v_BUKXP, keys = blocks.gather(ids_BUKJ)
        scores_BUKRX = _scores(options, q_BUKRH, k_BUKXH, queries, keys)
        p_BUKRX = jnp.exp(scores_BUKRX - lse_BUKR[..., None])
        dp_BUKRX = _einsum("BUKRP,BUKXP->BUKRX", do_BUKRP, v_BUKXP)
        ds_BUKRX = (options.scale * p_BUKRX * (dp_BUKRX - shift_BUKR[..., None])).astype(q.dtype)
        dq_BUKRH = _einsum("BUKRX,BUKXH->BUKRH", ds_BUKRX, k_BUKXH)
        dk_BUKXH = _einsum("BUKRX,BUKRH->BUKXH", ds_BUKRX, q_BUKRH)
        dv_BUKXP = _einsum("BUKRX,BUKRP->BUKXP", p_BUKRX.astype(v.dtype), do_BUKRP)
        return blocks.add(grads, ids_BUKJ, dk_BUKXH, dv_BUKXP), dq_BUKRH

    chunks = _Chunks(options, block_ids)
    of_queries = [chunks.rows(a) for a in (do, shift_BTN, lse_BTN)]
    grads, dq_CBUKRH = jax.lax.scan(step, blocks.zeros(lse.dtype), (chunks.queries(q, segment_ids), of_queries))
    dq = chunks.undo(dq_CBUKRH, T, N).astype(q.dtype)
    dk, dv = (blocks.undo(grad, like) for grad, like in zip(grads, (k, v), strict=True))
    return dq, dk, dv


class _Blocks:
    """The keys, their values and places, as `[B K C L ...]`: C blocks of L keys."""

    def __init__(self, options, k, v, segment_ids):
        self._size, self._num_keys = options.block_size, k.shape[1]
        self._k, self._v = (jnp.moveaxis(self._cut(a), 3, 1) for a in (k, v))
        # What fills up the last block is padding.
        self._tokens = Tokens(*(self._cut(a) for a in tokens(segment_ids)))

    def _cut(self, a_BS):
        B, S = a_BS.shape[:2]
        a_BS = jnp.pad(a_BS, ((0, 0), (0, -S % self._size), *((0, 0) for _ in a_BS.shape[2:])))
        return a_BS.reshape(B, -1, self._size, *a_BS.shape[2:])

    def gather(self, ids_BUKJ):
        """Returns the chosen keys, `[B U K X H]` with X = J L, their values, and what decides who sees them."""
        B, U, K, J = ids_BUKJ.shape
        row, head = self._rows_and_heads(ids_BUKJ)
        join = lambda a: a.reshape(B, U, K, J * self._size, *a.shape[5:])
        ids, places = (a[row, ids_BUKJ] for a in self._tokens)
        keys = Tokens(join(jnp.where(ids_BUKJ[..., None] >= 0, ids, 0)), join(places))
        return join(self._k[row, head, ids_BUKJ]), join(self._v[row, head, ids_BUKJ]), keys

    def _rows_and_heads(self, ids_BUKJ):
        B, _, K, _ = ids_BUKJ.shape
        return jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None]

    def zeros(self, dtype):
        return tuple(jnp.zeros(a.shape, dtype) for a in (self._k, self._v))

    def add(self, grads, ids_BUKJ, *grads_BUKX):
        """Adds the gradients of gathered blocks to those of all."""
        split = lambda a: a.reshape(*ids_BUKJ.shape, self._size, a.shape[-1])
        # An id of -1 stands for the last block here, and adds zeros.
        place = *self._rows_and_heads(ids_BUKJ), ids_BUKJ
        return tuple(a.at[place].add(split(grad)) for a, grad in zip(grads, grads_BUKX, strict=True))

    def undo(self, a_BKCL, like):
        B, K, C, L, X = a_BKCL.shape
        return jnp.moveaxis(a_BKCL.reshape(B, K, C * L, X), 1, 2)[:, : self._num_keys].astype(like.dtype)


class _Chunks:
    """Queries in chunks `[C B U ...]`: U groups that share ids, of M queries each."""

    def __init__(self, options, block_ids):
        B, num_groups, K, J = block_ids.shape
        self._U = min(num_groups, max(1, CHOSEN_KEYS // (B * K * J * options.block_size)))
        self._M, self._K, self._block_ids = options.query_block, K, block_ids

    def queries(self, q, segment_ids):
        """Returns q, ids, and what decides what queries see. What fills up the last chunk is padding."""
        of_queries = (a[:, a.shape[1] - q.shape[1] :] for a in tokens(segment_ids))
        return self.rows(q), self._cut(self._block_ids, self._U), Tokens(*(self._groups(a) for a in of_queries))

    def rows(self, a_BTN):
        """Returns `[C B U K R ...]`: the rows that attend to the same keys are M queries times G heads."""
        a_CBUMKG = self._groups(a_BTN.reshape(*a_BTN.shape[:2], self._K, -1, *a_BTN.shape[3:]))
        a_CBUKMG = jnp.moveaxis(a_CBUMKG, 4, 3)
        return a_CBUKMG.reshape(*a_CBUKMG.shape[:4], -1, *a_BTN.shape[3:])

    def undo(self, a_CBUKR, T, N):
        """Returns `[B T N ...]`."""
        a_CBUKMG = a_CBUKR.reshape(*a_CBUKR.shape[:4], self._M, N // self._K, *a_CBUKR.shape[5:])
        a_BCUMKG = jnp.moveaxis(a_CBUKMG, (1, 4), (0, 3))
        return a_BCUMKG.reshape(a_BCUMKG.shape[0], -1, N, *a_CBUKR.shape[5:])[:, :T]

    def _groups(self, a_BT):
        a_CBL = self._cut(a_BT, self._U * self._M)
        return a_CBL.reshape(*a_CBL.shape[:2], self._U, self._M, *a_BT.shape[2:])

    def _cut(self, a_BT, size):
        a_BT = jnp.pad(a_BT, ((0, 0), (0, -a_BT.shape[1] % size), *((0, 0) for _ in a_BT.shape[2:])))
        return jnp.moveaxis(a_BT.reshape(a_BT.shape[0], -1, size, *a_BT.shape[2:]), 1, 0)


def _scores(options, q_BUKRH, k_BUKXH, queries, keys):
    """Returns scores, -inf where a query does not see a key."""
    seen_BUKMX = sees(options, Tokens(*(a[:, :, None] for a in queries)), keys)
    G = q_BUKRH.shape[3] // seen_BUKMX.shape[3]
    scores_BUKRX = options.scale * _einsum("BUKRH,BUKXH->BUKRX", q_BUKRH, k_BUKXH)
    return jnp.where(jnp.repeat(seen_BUKMX, G, axis=3), scores_BUKRX, -jnp.inf)


def _einsum(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(jnp.float32, a.dtype))
