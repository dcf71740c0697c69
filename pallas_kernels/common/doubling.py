"""Decays per key channel in a chunk of one head, inside of TPU kernels: what `decays.ChannelDecay` is for XLA.

Pairs of tokens j < i are taken by block doubling: blocks of m = 1, 2, 4 .. L / 2 tokens, two by two, and between two a
border, over which d(j, i] = d(j, border] d(border, i]. A level is one product of matrices, of which only the entries
are wanted whose i lies in a second block and whose j in the first block before it. Borders lie in the past of the row
that is read: later tokens change no bit of it. Logs are summed along with the blocks: no difference is ever taken, and
nothing is lost where a decay of -30 stands beside one of -0.01.

Eight tokens are the rows of a register. Blocks of fewer find their neighbours by turning registers, and their levels
take all rows of both sides; larger ones name theirs, and take only the rows that are wanted.

Logs are to base 2, of which the hardware takes powers, unless products are exact: log2(e) * -30 rounded is off by 2e-6.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_ROWS = 8
FIRST, SECOND = 0, 1


def dot(x: jax.Array, y: jax.Array, sides: str, exact: bool) -> jax.Array:
    """Returns x y ("nn"), x y^T ("nt") or x^T y ("tn") in float32; operands are rounded to bfloat16 unless `exact`."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[sides]
    if not exact:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _split(x_LX: jax.Array, m: int) -> list[jax.Array]:
    x_n2mX = x_LX.reshape(-1, 2, m, x_LX.shape[-1])
    return [x_n2mX[:, half].reshape(-1, x_LX.shape[-1]) for half in (FIRST, SECOND)]


def join(halves: list[jax.Array], m: int) -> jax.Array:
    """Puts the rows of each first and each second block of m tokens, at least 8, back in order."""
    X = halves[0].shape[-1]
    return jnp.stack([x.reshape(-1, m, X) for x in halves], axis=1).reshape(-1, X)


def take(x_LX: jax.Array, m: int, half: int) -> jax.Array:
    """Returns the rows of each first or each second block of m tokens; all of them if m < 8."""
    return x_LX if m < _ROWS else _split(x_LX, m)[half]


def fill(rows: jax.Array, m: int, half: int) -> jax.Array:
    """Undoes `take`, with zeros for the other rows."""
    if m < _ROWS:
        return rows
    return join([rows, jnp.zeros_like(rows)][:: 1 if half == FIRST else -1], m)


def add(x_LX: jax.Array, rows: jax.Array, m: int, half: int) -> jax.Array:
    """Adds to the rows that `take` takes."""
    if m < _ROWS:
        return x_LX + rows
    halves = _split(x_LX, m)
    halves[half] += rows
    return join(halves, m)


def stack(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, axis=0)


def beside(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, axis=1)


def halves(x: jax.Array) -> list[jax.Array]:
    """Undoes `stack` of two."""
    return jnp.split(x, 2, axis=0)


class Decays:
    """The decays of one chunk and head, float32 `LH` and never above 1.

    levels[m]: to the border from within first, from the border to within second blocks of m tokens. reads: from the
    start of the chunk. writes: to its end. keep_1H: over all of it.
    """

    def __init__(self, logs_LH: jax.Array, own_LH: jax.Array, exact: bool):
        """`own`: what stands in the log of a token's reads for the token itself; its log-decay, or 0 before it.

        Logs are natural ones if `exact`, and to base 2 otherwise.
        """
        exp = jnp.exp if exact else jnp.exp2
        L, H = logs_LH.shape
        tiles = (L // _ROWS, _ROWS, H)
        row = jax.lax.broadcasted_iota(jnp.int32, tiles, 1)
        is_second = lambda m: (row & m) != 0
        own, whole = own_LH.reshape(tiles), logs_LH.reshape(tiles)
        self.levels = {}
        # Of a token's block: the log of all of it. Of the token: that from the block's start to it and that from it to
        # the block's end; `this` is the one that crosses the border of the level, `other` is the other one.
        m = 1
        this, other = jnp.where(is_second(1), own, 0), jnp.where(is_second(1), 0, own)
        while m < _ROWS:
            self.levels[m] = exp(this.reshape(L, H))
            neighbour = jnp.where(is_second(m), pltpu.roll(whole, m, 1), pltpu.roll(whole, _ROWS - m, 1))
            this, whole = this + neighbour, whole + neighbour
            m *= 2
            if m < _ROWS:
                stays = is_second(m // 2) == is_second(m)
                this, other = jnp.where(stays, this, other), jnp.where(stays, other, this)
        head, tail = jnp.where(is_second(m // 2), this, other), jnp.where(is_second(m // 2), other, this)
        while m < L:
            blocks = (L // (2 * m), 2, m // _ROWS, _ROWS, H)
            head, tail = head.reshape(blocks), tail.reshape(blocks)
            whole = whole.reshape(L // (2 * m), 2, 1, _ROWS, H)
            self.levels[m] = exp(jnp.stack([tail[:, FIRST], head[:, SECOND]], axis=1).reshape(L, H))
            head = jnp.stack([head[:, FIRST], head[:, SECOND] + whole[:, FIRST]], axis=1)
            tail = jnp.stack([tail[:, FIRST] + whole[:, SECOND], tail[:, SECOND]], axis=1)
            whole = whole[:, FIRST] + whole[:, SECOND]
            m *= 2
        self.reads = exp(head.reshape(L, H))
        self.writes = exp(tail.reshape(L, H))
        self.keep_1H = exp(whole.reshape(_ROWS, H)[:1])


class Pairs:
    """Which level the tokens of a pair meet at; the same for all heads."""

    def __init__(self, length: int):
        i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
        self.apart_LL, self._later_LL = i ^ j, i <= j
        self._lower_LL = {SECOND: jnp.where(i > j, i ^ j, 0), FIRST: jnp.where(i < j, i ^ j, 0)}

    def gather(self, found: dict[int, jax.Array], own_L1: jax.Array | None, rows: int) -> jax.Array:
        """Returns the scores `LL` from the products of all levels and those of tokens with themselves, 0 if not given.

        rows: SECOND if rows are readers, FIRST if columns are.
        """
        scores_LL = found[1]
        for m, scores in list(found.items())[1:]:
            if m < _ROWS:
                scores_LL = jnp.where(self.apart_LL < m, scores_LL, scores)
            else:
                halves = _split(scores_LL, m)
                halves[rows] = jnp.where(take(self.apart_LL, m, rows) < m, halves[rows], scores)
                scores_LL = join(halves, m)
        scores_LL = jnp.where(self._lower_LL[rows] > 0, scores_LL, 0)
        return scores_LL if own_L1 is None else jnp.where(self.apart_LL == 0, own_L1, scores_LL)

    def pick(self, scores_LL: jax.Array, m: int, rows: int) -> jax.Array:
        """Returns what of the scores belongs to level m, in the rows that `take` takes."""
        apart = take(self._lower_LL[rows], m, rows)
        return jnp.where(apart & -m == m, take(scores_LL, m, rows), 0)

    def later(self, reach: int) -> jax.Array:
        """Returns the matrix that sums over a token and those after it in its block of `reach`."""
        return jnp.where(self._later_LL & (self.apart_LL < reach), 1.0, 0.0)

    def spans(self, m: int) -> jax.Array:
        """Returns the matrix that sums what level m's pairs add to the logs of decays: for those that a token spans.

        It multiplies the gradients of the logarithms of what second blocks read, and of what is read of first blocks.
        """
        row, column = (jax.lax.broadcasted_iota(jnp.int32, self.apart_LL.shape, axis) for axis in (0, 1))
        reaches_LL = jnp.where(column & m > 0, column - row, row - column - 1) >= 0
        return jnp.where(reaches_LL & (self.apart_LL < m), 1.0, 0.0)

    def earlier(self) -> jax.Array:
        """Returns the matrix that sums over the tokens before one."""
        return jnp.where(self._lower_LL[SECOND] > 0, 1.0, 0.0)
