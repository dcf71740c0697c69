"""Blocks and selectors against loops over single documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import selectors
from efficient_lm.blocks import full_blocks, own_block_ids
from efficient_lm.rotary import document_positions

L, K, G, H = 4, 2, 3, 5
# Documents of 3, 21, 8 and 1 tokens, then one of 30 with padding in it; one of 47 alone; nothing but padding.
IDS = np.array(
    [
        [0] * 2 + [1] * 3 + [2] * 9 + [0] * 3 + [2] * 12 + [3] * 8 + [4] + [0] * 9,
        [1] * 14 + [0] * 3 + [1] * 16 + [2] * 2 + [0] * 12,
        [1] * 47,
        [0] * 47,
    ],
    np.int32,
)
B, T = IDS.shape
IDS_BT = jnp.asarray(IDS)
POSITIONS, _ = document_positions(IDS_BT)
BLOCKS = full_blocks(IDS_BT, POSITIONS, L)
BEFORE = BLOCKS.before(IDS_BT, POSITIONS)


def documents():
    """Yields the row, the id and the row's positions of each document."""
    for b in range(B):
        for d in range(1, IDS[b].max() + 1):
            yield b, d, np.nonzero(IDS[b] == d)[0]


def expected(choose):
    """Returns, for each token and head, the set of blocks that `choose(b, at, n, t, k)` says, as ids of the row.

    `at` are the places of the document's tokens, n those of the full blocks before the token, t that of the token.
    """
    want, first = [[[set() for _ in range(K)] for _ in range(T)] for _ in range(B)], [0] * B
    for b, _, at in documents():
        for i, t in enumerate(at):
            for k in range(K):
                want[b][t][k] = {first[b] + c for c in choose(b, at, i // L, t, k)}
        first[b] += len(at) // L
    return want


def assert_chosen(ids_BTKJ, choose):
    ids_BTKJ = np.broadcast_to(ids_BTKJ, (B, T, K, ids_BTKJ.shape[3]))
    got = [[[set(ids[ids >= 0].tolist()) for ids in token] for token in row] for row in ids_BTKJ]
    assert got == expected(choose)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def best(scores, count):
    return set(np.argsort(-np.asarray(scores))[:count].tolist())


Q, KEYS = draw(B, T, K * G, H), draw(B, T, K, H, seed=1)
Q_BTNH, BLOCK_KEYS = jnp.asarray(Q), BLOCKS.take(jnp.asarray(KEYS))


def of_blocks(b, at, n, k):
    """Returns the keys `[n L H]` of the first n blocks of a document."""
    return KEYS[b, at[: n * L], k].reshape(n, L, H)


def test_full_blocks():
    got = [
        {(int(d), int(n), tuple(tokens)) for d, n, tokens in zip(*row, strict=True) if d > 0}
        for row in zip(BLOCKS.documents, BLOCKS.numbers, np.asarray(BLOCKS.tokens).tolist(), strict=True)
    ]
    want = [set() for _ in range(B)]
    for b, d, at in documents():
        want[b] |= {(d, n, tuple(at[n * L : (n + 1) * L].tolist())) for n in range(len(at) // L)}
    assert got == want
    assert all(np.all(np.diff(row) >= 0) for row in np.asarray(own_block_ids(IDS_BT, POSITIONS, L))[2:])
    # Keys only move to the left: attention to them in the row's order hides none.
    slots_CL = np.arange(BLOCKS.documents.shape[1] * L).reshape(-1, L)
    assert np.all((np.asarray(BLOCKS.tokens) >= slots_CL) | (np.asarray(BLOCKS.documents) == 0)[..., None])


def test_own_block_ids():
    ids_BT = np.asarray(own_block_ids(IDS_BT, POSITIONS, L))
    same_BTT = (ids_BT[:, :, None] == ids_BT[:, None]) & (ids_BT > 0)[:, None]
    want_BTT = np.zeros_like(same_BTT)
    for b, _, at in documents():
        for start in range(0, len(at), L):
            want_BTT[b][np.ix_(at[start : start + L], at[start : start + L])] = True
    assert np.array_equal(same_BTT, want_BTT)


@pytest.mark.parametrize("size", [1, 46, 47, 48])
def test_blocks_of_any_size(size):
    blocks = full_blocks(IDS_BT, POSITIONS, size)
    want = [sum(np.sum(IDS[b] == d) // size for d in range(1, IDS[b].max() + 1)) for b in range(B)]
    assert np.sum(np.asarray(blocks.documents) > 0, axis=1).tolist() == want
    assert full_blocks(IDS_BT[:, :0], POSITIONS[:, :0], size).tokens.shape == (B, 0, size)


@pytest.mark.parametrize(("size", "stride"), [(4, 2), (6, 2), (3, 1), (2, 2)])
def test_blocks_that_overlap(size, stride):
    """Each is where it has to be, and a larger block has the shares of those in it, once for each stride in common."""
    small, large_size = full_blocks(IDS_BT, POSITIONS, size, stride), 6
    large = full_blocks(IDS_BT, POSITIONS, large_size)
    want = [[] for _ in range(B)]
    for b, d, at in documents():
        starts = range(0, len(at) - size + 1, stride)
        want[b] += [(d, n, at[start : start + size].tolist()) for n, start in enumerate(starts)]
    for b in range(B):
        n = np.count_nonzero(small.documents[b])
        got = zip(*(np.asarray(a[b, :n]).tolist() for a in (small.documents, small.numbers, small.tokens)), strict=True)
        assert list(got) == want[b]

    shares_BTKX = draw(B, 2, K, small.documents.shape[1])
    want_BTKC = np.zeros((B, 2, K, large.documents.shape[1]))
    for b in range(B):
        for c, at in enumerate(np.asarray(large.tokens[b])):
            for x, (_, _, tokens) in enumerate(want[b]):
                want_BTKC[b, :, :, c] += len(set(at.tolist()) & set(tokens)) // stride * shares_BTKX[b, :, :, x]
    got_BTKC = selectors.in_larger_blocks(jnp.asarray(shares_BTKX), small, large, stride)
    np.testing.assert_allclose(got_BTKC, want_BTKC, atol=1e-5)


def test_moba():
    def choose(b, at, n, t, k):
        return best(of_blocks(b, at, n, k).mean(1) @ Q[b, t, k * G], 2)

    ids_BTNJ = selectors.moba(Q_BTNH, jnp.mean(BLOCK_KEYS, axis=2), BEFORE, 2)
    assert_chosen(ids_BTNJ[:, :, ::G], choose)


def test_quest():
    def choose(b, at, n, t, k):
        keys_nLH, q_H = of_blocks(b, at, n, k), Q[b, t, k * G]
        bounds_n = np.maximum(q_H * keys_nLH.min(1), q_H * keys_nLH.max(1)).sum(1)
        assert np.all(bounds_n[:, None] >= keys_nLH @ q_H - 1e-5)
        return best(bounds_n, 2)

    ids_BTNJ = selectors.quest(Q_BTNH, jnp.min(BLOCK_KEYS, axis=2), jnp.max(BLOCK_KEYS, axis=2), BEFORE, 2)
    assert_chosen(ids_BTNJ[:, :, ::G], choose)


def test_native_sparse():
    """The heads of a group choose together, the first block and the one before are there, the rest is by shares."""
    scale, means_BCKH = 0.7, jnp.mean(BLOCK_KEYS, axis=2)

    def shares(b, at, n, t, k):
        scores_nG = scale * of_blocks(b, at, n, k).mean(1) @ Q[b, t, k * G : (k + 1) * G].T
        return np.exp(scores_nG) / np.exp(scores_nG).sum(0), np.log(np.exp(scores_nG).sum(0))

    lse_BTN = np.full((B, T, K * G), -np.inf, np.float32)
    for b, _, at in documents():
        for i, t in enumerate(at[L:], L):
            lse_BTN[b, t] = np.concatenate([shares(b, at, i // L, t, k)[1] for k in range(K)])

    def choose(b, at, n, t, k):
        if n == 0:
            return set()
        shares_n = shares(b, at, n, t, k)[0].sum(1)
        shares_n[[0, n - 1]] = np.inf
        return best(shares_n, 4)

    own_BT1 = POSITIONS[..., None] // L
    is_fixed = (BLOCKS.numbers[:, None] == 0) | (BLOCKS.numbers[:, None] == own_BT1 - 1)
    shares_BTKC = selectors.compressed_shares(Q_BTNH, means_BCKH, jnp.asarray(lse_BTN), BEFORE, scale=scale)
    assert_chosen(selectors.native_sparse(shares_BTKC, BEFORE, is_fixed, 4), choose)


def test_patterns():
    """A window, every third, the first: StreamingLLM's sinks are the last and a window."""
    own_BT = POSITIONS // L
    window, strided, first = selectors.window(own_BT, 2), selectors.strided(own_BT, 3, 5), selectors.first(own_BT, 1)
    in_row = lambda *patterns: selectors.in_row(BLOCKS, IDS_BT, own_BT, *patterns)
    assert_chosen(in_row(window), lambda b, at, n, t, k: range(max(n - 2, 0), n))
    assert_chosen(in_row(strided), lambda b, at, n, t, k: range(n - 3, -1, -3))
    assert_chosen(in_row(first, window), lambda b, at, n, t, k: {*range(min(n, 1)), *range(max(n - 2, 0), n)})


def test_random_blocks():
    own_BT = jnp.asarray([np.tile(np.arange(9), 1000)])
    draw = lambda own_BT, seed: np.asarray(selectors.random(own_BT, 3, num_blocks=9, seed=seed))
    ids_9J = draw(own_BT, 0)[0, :9]
    assert np.array_equal(draw(own_BT, 0)[0], np.tile(ids_9J, (1000, 1)))  # All tokens of a block have the same.
    for own, ids_J in enumerate(ids_9J):
        there = ids_J[ids_J >= 0]
        assert len(set(there.tolist())) == len(there) == min(own, 3)
        assert np.all(there < own)
    # Longer rows choose alike, and each block is as likely as any other.
    assert np.array_equal(np.asarray(selectors.random(own_BT, 3, num_blocks=99, seed=0))[0, :9], ids_9J)
    far_1T = jnp.arange(64, 1064)[None]
    ids_TJ = np.asarray(selectors.random(far_1T, 3, num_blocks=1064, seed=0))[0]
    counts = np.bincount((8 * ids_TJ // np.asarray(far_1T)[0, :, None]).ravel(), minlength=8)
    # 3000 draws fall into eighths: 375 each, with a standard deviation of 18.
    assert counts.shape == (8,)
    assert np.all(abs(counts - 375) < 80)
    assert not np.array_equal(draw(own_BT, 1)[0, :9], ids_9J)


def test_a_few_tokens_at_a_time():
    means_BCKH = jnp.mean(BLOCK_KEYS, axis=2)
    want = selectors.moba(Q_BTNH, means_BCKH, BEFORE, 2)
    few = lambda q, before: selectors.moba(q, means_BCKH, before, 2)
    run = jax.jit(lambda q, before: selectors.a_few_tokens_at_a_time(few, q, before, batch_size=10))
    assert np.array_equal(run(Q_BTNH, BEFORE), want)
    assert run(Q_BTNH[:, :0], BEFORE[:, :0]).shape == (B, 0, K * G, 2)
