"""The diagonal scan on TPU: channels on lanes, tokens on sublanes, one chunk of tokens after the other.

Eight tokens at a time, a register for each 128 channels, go through three steps of doubling. Backward makes the states
of its chunk again in VMEM, from the state before it, then walks from the other end. The formulas are those of `xla.py`.
Complex numbers are pairs of arrays, real ones tuples of one.

What bounds it is memory: by the compiler's schedule for v5e the arithmetic takes half of the time that a, x and h
need to come and go.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.diagonal_scan.xla import CHUNK

type Parts = tuple[jax.Array, ...]  # Real, or real and imaginary.

GROUP = 8  # Tokens in a register.
MAX_BLOCK_W = 1024  # Channels in a block: eight registers that do not wait for one another.


def unsupported(a, x):
    """Returns why these arguments need another implementation, or None."""
    for name, dtype in (("a", a.dtype), ("x", x.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return f"{name} in {dtype}"
    return None


def forward(keep, reverse, a, x, state_BW, marks_BT):
    """Returns (h, state) and what is kept: the state before each chunk of `CHUNK` tokens."""
    del keep
    B, T, W = x.shape
    block = _Blocks(x, reverse)
    h, states, last = block.call(
        functools.partial(_forward_kernel, reverse),
        "diagonal_scan_forward",
        block.marks(marks_BT),
        [
            block.decays(a),
            (x, block.tokens),
            (state_BW[:, None], block.row),
        ],
        [((B, T, W), x.dtype, block.tokens), ((block.C, B, 1, W), None, block.border), ((B, 1, W), None, block.row)],
    )
    return (h, last[:, 0]), (states[:, :, 0],)


def backward(reverse, residuals, cotangents):
    """Returns the gradients of a, x and state."""
    a, x, _, marks_BT, states_CBW = residuals
    dh, dlast_BW = cotangents
    B, T, W = x.shape
    constant = a.ndim == 1
    block = _Blocks(x, not reverse)
    da, dx, dstate = block.call(
        functools.partial(_backward_kernel, reverse, constant),
        "diagonal_scan_backward",
        block.marks(marks_BT),
        [
            *(block.decays(a), (x, block.tokens), (dh, block.tokens)),
            *((states_CBW[:, :, None], block.border), (dlast_BW[:, None], block.row)),
        ],
        [
            ((B, GROUP, W), None, block.group) if constant else ((B, T, W), a.dtype, block.tokens),
            *(((B, T, W), x.dtype, block.tokens), ((B, 1, W), None, block.row)),
        ],
        scratch_rows=CHUNK,
    )
    return jnp.sum(da, axis=(0, 1)).astype(a.dtype) if constant else da, dx, dstate[:, 0]


class _Blocks:
    """The grid, rows by blocks of channels by chunks in the order of the walk, and what of an array each step sees."""

    def __init__(self, x, reverse):
        B, T, W = x.shape
        self.C, self.is_complex = pl.cdiv(T, CHUNK), jnp.iscomplexobj(x)
        # As few blocks as there can be, of multiples of 128 channels that fill the last one, too.
        self.W = min(W, 128 * pl.cdiv(W, 128 * pl.cdiv(W, MAX_BLOCK_W)))
        self.grid = B, pl.cdiv(W, self.W), self.C
        at = lambda c: self.C - 1 - c if reverse else c
        self.tokens = pl.BlockSpec((None, CHUNK, self.W), lambda b, w, c: (b, at(c), w))
        self.border = pl.BlockSpec((None, None, 1, self.W), lambda b, w, c: (at(c), b, 0, w))
        self.row = pl.BlockSpec((None, 1, self.W), lambda b, w, c: (b, 0, w))
        self.group = pl.BlockSpec((None, GROUP, self.W), lambda b, w, c: (b, 0, w))
        self.marks_spec = pl.BlockSpec((None, 1, CHUNK), lambda b, w, c: (b, 0, at(c)))

    def decays(self, a):
        return (a, self.tokens) if a.ndim > 1 else (a[None], pl.BlockSpec((1, self.W), lambda b, w, c: (0, w)))

    def marks(self, marks_BT):
        """Padding follows the last token, whatever the blocks of x hold there."""
        return jnp.pad(marks_BT, ((0, 0), (0, -marks_BT.shape[1] % CHUNK)))[:, None].astype(jnp.float32)

    def call(self, kernel, name, marks_B1T, ins, outs, scratch_rows=0):
        """Runs the kernel on `ins`, pairs of an array and its blocks; `outs` are shapes, dtypes and blocks.

        No dtype is that of states, float32 or complex64.
        """
        count = 2 if self.is_complex else 1
        parts = lambda x: (x.real, x.imag) if self.is_complex else (x,)
        dtype = lambda dtype: jnp.float32 if self.is_complex or dtype is None else dtype
        outputs = pl.pallas_call(
            kernel,
            name=name,
            grid=self.grid,
            in_specs=(self.marks_spec, *((spec,) * count for _, spec in ins)),
            out_specs=tuple((spec,) * count for *_, spec in outs),
            out_shape=tuple((jax.ShapeDtypeStruct(shape, dtype(kind)),) * count for shape, kind, _ in outs),
            scratch_shapes=(
                pltpu.VMEM((CHUNK, 128), jnp.float32),
                (pltpu.VMEM((1, self.W), jnp.float32),) * count,
                *((pltpu.VMEM((rows, self.W), jnp.float32),) * count for rows in (scratch_rows,) if rows),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(marks_B1T, *(parts(x) for x, _ in ins))
        return tuple(jax.lax.complex(*x) if self.is_complex else x[0] for x in outputs)


def _forward_kernel(reverse, marks_1L, a, x, state, h, states, last, marks_L1, carry):
    _begin(marks_1L, marks_L1, state, carry)
    _store(states, slice(None), _load(carry))

    def group(rows, carried):
        mark_81 = marks_L1[rows, :1]
        keep, write = _effect(mark_81, _load(a, rows), _load(x, rows))
        after, _, carried = _walk(keep, write, carried, reverse)
        _store(h, rows, _where(mark_81 > 0, after))
        return carried

    _end(_groups(group, _load(carry), reverse), carry, last)


def _backward_kernel(reverse, constant, marks_1L, a, x, dh, states, dlast, da, dx, dstate, marks_L1, carry, before):
    _begin(marks_1L, marks_L1, dlast, carry)
    if constant:

        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref in da:
                ref[...] = jnp.zeros_like(ref)

    def again(rows, carried):
        keep, write = _effect(marks_L1[rows, :1], _load(a, rows), _load(x, rows))
        _, parts, carried = _walk(keep, write, carried, reverse)
        _store(before, rows, parts)
        return carried

    _groups(again, _load(states), reverse)

    def group(rows, carried):
        mark_81 = marks_L1[rows, :1]
        keep, d = _effect(mark_81, _load(a, rows), _load(dh, rows))
        _, u, carried = _walk(keep, _multiply(keep, d), carried, not reverse)
        d = _add(u, d)
        _store(dx, rows, _where(mark_81 > 0, d))
        d = _where(mark_81 == 1, _multiply(d, _load(before, rows)))
        _store(da, slice(None) if constant else rows, _add(d, _load(da)) if constant else d)
        return carried

    _end(_groups(group, _load(carry), not reverse), carry, dstate)


def _begin(marks_1L, marks_L1, state, carry):
    marks_L1[...] = jnp.broadcast_to(marks_1L[...], (marks_L1.shape[1], CHUNK)).T

    @pl.when(pl.program_id(2) == 0)
    def _():
        _store(carry, slice(None), _load(state))


def _end(carried, carry, last):
    _store(carry, slice(None), carried)
    _store(last, slice(None), carried)


def _groups(group, carried, reverse):
    """Calls `carried = group(rows, carried)` for each eight rows of the chunk."""

    def step(i, carried):
        start = (CHUNK // GROUP - 1 - i if reverse else i) * GROUP
        return group(pl.ds(pl.multiple_of(start, GROUP), GROUP), carried)

    return jax.lax.fori_loop(0, CHUNK // GROUP, step, carried, unroll=2)


def _effect(mark_81, a: Parts, x: Parts) -> tuple[Parts, Parts]:
    """Returns what each token leaves of the state and what it adds: padding all and nothing, a first token nothing."""
    rest = jnp.where(mark_81 == 0, 1.0, 0.0), 0.0
    keep = tuple(jnp.where(mark_81 == 1, part, other) for part, other in zip(a, rest, strict=False))
    return keep, _where(mark_81 > 0, x)


def _walk(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts, Parts]:
    """Returns the states after and before each of eight tokens, and that after all of them."""
    row = jax.lax.broadcasted_iota(jnp.int32, (GROUP, x[0].shape[1]), 0)
    is_first = row == (GROUP - 1 if reverse else 0)
    shift = lambda parts, s: tuple(pltpu.roll(part, GROUP - s if reverse else s, axis=0) for part in parts)
    # The state becomes part of what the first token adds. With nothing else to come to it, its decay is 0 from here on,
    # and so is every product of decays that would reach around the end of the eight.
    x = _add(x, _multiply(_where(is_first, a), state))
    a = _where(~is_first, a)
    x = _add(x, _multiply(a, shift(x, 1)))
    a = _multiply(a, shift(a, 1))
    x = _add(x, _multiply(a, shift(x, 2)))
    a = _multiply(a, shift(a, 2))
    x = _add(x, _multiply(a, shift(x, 4)))
    before = tuple(jnp.where(is_first, old, new) for old, new in zip(state, shift(x, 1), strict=True))
    return x, before, tuple(part[:1] if reverse else part[-1:] for part in x)


def _multiply(a: Parts, b: Parts) -> Parts:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _add(a: Parts, b: Parts) -> Parts:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _where(condition, parts: Parts) -> Parts:
    return tuple(jnp.where(condition, part, 0) for part in parts)


def _load(refs, rows=slice(None)) -> Parts:
    """Reads rows of arrays in float32; all there is of arrays that are the same for all tokens."""
    return tuple(ref[slice(None) if ref.shape[0] == 1 else rows, :].astype(jnp.float32) for ref in refs)


def _store(refs, rows, parts: Parts) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[rows, :] = part.astype(ref.dtype)
