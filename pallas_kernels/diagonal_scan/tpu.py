"""The diagonal scan on TPU: channels on lanes, tokens on sublanes, one chunk of tokens after the other.

Eight tokens at a time, a register of each 128 channels: three steps of doubling combine the maps of the tokens before,
and the state that came to the eight is added last, so that only one product and one sum wait for the eight before.
Backward makes the states of its chunk again in VMEM, then walks from the other end; see `xla.py` for the formulas, and
for the residuals, which are the same. Complex numbers are pairs of arrays; real ones are tuples of one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.diagonal_scan.xla import CHUNK

type Parts = tuple[jax.Array, ...]  # real, or real and imaginary

GROUP = 8  # sublanes
PAIR = 16  # rows of a bfloat16 tile
LANES = 512


def unsupported(a, x):
    """Returns why these arguments need another implementation, or None."""
    for name, dtype in (("a", a.dtype), ("x", x.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return f"{name} in {dtype}"
    return None


def forward(reverse, a, x, marks_BT, state_BW):
    """Returns (h, state) and residuals, as `xla.forward`."""
    call = _Call(reverse, x, a.ndim == 1)
    h, states, last = call(
        _forward_kernel,
        name="diagonal_scan_forward",
        ins=[call.marks(marks_BT), call.decays(a), call.tokens(x), call.states(state_BW[:, None])],
        outs=[call.tokens_out(x.dtype), call.borders_out(), call.states_out()],
    )
    return (call.whole(h), call.whole(last)[:, 0]), (a, x, marks_BT, call.whole(states)[:, :, 0])


def backward(reverse, residuals, cotangents):
    """Returns the gradients of a, x and state."""
    a, x, marks_BT, states_CBW = residuals
    dh, dlast_BW = cotangents
    call = _Call(not reverse, x, a.ndim == 1)
    da, dx, dstate = call(
        _backward_kernel,
        name="diagonal_scan_backward",
        ins=[
            *(call.marks(marks_BT), call.decays(a), call.tokens(x), call.tokens(dh)),
            *(call.borders(states_CBW[:, :, None]), call.states(dlast_BW[:, None])),
        ],
        outs=[call.states_out() if a.ndim == 1 else call.tokens_out(a.dtype), call.tokens_out(x.dtype), call.states_out()],
        keeps_states=True,
    )
    da = call.whole(da)
    return jnp.sum(da, axis=(0, 1)).astype(a.dtype) if a.ndim == 1 else da, call.whole(dx), call.whole(dstate)[:, 0]


class _Call:
    """A grid over rows, blocks of channels, and chunks in the order in which they are walked."""

    def __init__(self, reverse, x, constant):
        self.reverse, self.constant = reverse, constant
        self.shape, self.is_complex = x.shape, jnp.iscomplexobj(x)
        self.num_chunks = -(-x.shape[1] // CHUNK)
        self.width = min(x.shape[2], LANES)
        at = lambda c: self.num_chunks - 1 - c if reverse else c
        W = self.width
        self._token_spec = pl.BlockSpec((None, CHUNK, W), lambda b, w, c: (b, at(c), w))
        self._state_spec = pl.BlockSpec((None, 1, W), lambda b, w, c: (b, 0, w))
        self._border_spec = pl.BlockSpec((None, None, 1, W), lambda b, w, c: (at(c), b, 0, w))
        self._decay_spec = pl.BlockSpec((1, W), lambda b, w, c: (0, w))
        self._mark_spec = pl.BlockSpec((None, 1, CHUNK), lambda b, w, c: (b, 0, at(c)))

    def _parts(self, x) -> Parts:
        return (x.real, x.imag) if self.is_complex else (x,)

    def _in(self, x, spec):
        parts = self._parts(x)
        return parts, (spec,) * len(parts)

    def marks(self, marks_BT):
        """Beyond the last token there is padding."""
        T = marks_BT.shape[1]
        return jnp.pad(marks_BT, ((0, 0), (0, -T % CHUNK)))[:, None].astype(jnp.float32), self._mark_spec

    def decays(self, a):
        return self._in(a[None], self._decay_spec) if self.constant else self._in(a, self._token_spec)

    def tokens(self, x_BTW):
        return self._in(x_BTW, self._token_spec)

    def states(self, state_B1W):
        return self._in(state_B1W, self._state_spec)

    def borders(self, states_CB1W):
        return self._in(states_CB1W, self._border_spec)

    def _out(self, shape, dtype, spec):
        dtype = jnp.float32 if self.is_complex else dtype
        count = 2 if self.is_complex else 1
        return (jax.ShapeDtypeStruct(shape, dtype),) * count, (spec,) * count

    def tokens_out(self, dtype):
        return self._out(self.shape, dtype, self._token_spec)

    def states_out(self):
        return self._out((self.shape[0], 1, self.shape[2]), jnp.float32, self._state_spec)

    def borders_out(self):
        return self._out((self.num_chunks, self.shape[0], 1, self.shape[2]), jnp.float32, self._border_spec)

    def whole(self, parts: Parts) -> jax.Array:
        return jax.lax.complex(*parts) if self.is_complex else parts[0]

    def __call__(self, kernel, *, name, ins, outs, keeps_states=False):
        count, W = 2 if self.is_complex else 1, self.width
        args, in_specs = zip(*ins, strict=True)
        out_shape, out_specs = zip(*outs, strict=True)
        scratch = [pltpu.VMEM((CHUNK, 128), jnp.float32), (pltpu.VMEM((1, W), jnp.float32),) * count]
        if keeps_states:
            scratch.append((pltpu.VMEM((CHUNK, W), jnp.float32),) * count)
        return pl.pallas_call(
            functools.partial(kernel, self.reverse),
            name=name,
            grid=(self.shape[0], pl.cdiv(self.shape[2], W), self.num_chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(*args)


def _forward_kernel(reverse, marks_1L, a, x, state, h, states, last, marks_L1, carry):
    _begin(marks_1L, marks_L1, state, carry)
    _store(states, slice(None), _load(carry, slice(None)))

    def group(rows, carried):
        mark_81 = marks_L1[rows, :1]
        keep, write = _effect(mark_81, _load(a, rows), _load(x, rows))
        after, _, carried = _walk(keep, write, carried, reverse)
        _store(h, rows, tuple(jnp.where(mark_81 > 0, part, 0) for part in after))
        return carried

    _end(_groups(reverse, group, _load(carry, slice(None))), carry, last)


def _backward_kernel(reverse, marks_1L, a, x, dh, states, dlast, da, dx, dstate, marks_L1, carry, before):
    _begin(marks_1L, marks_L1, dlast, carry)

    def again(rows, carried):
        keep, write = _effect(marks_L1[rows, :1], _load(a, rows), _load(x, rows))
        _, parts, carried = _walk(keep, write, carried, not reverse)
        _store(before, rows, parts)
        return carried

    _groups(not reverse, again, _load(states, slice(None)))

    def group(rows, carried):
        mark_81 = marks_L1[rows, :1]
        keep, d = _effect(mark_81, _load(a, rows), _load(dh, rows))
        _, u, carried = _walk(keep, _multiply(keep, d), carried, reverse)
        d = _add(u, d)
        _store(dx, rows, tuple(jnp.where(mark_81 > 0, part, 0) for part in d))
        d = tuple(jnp.where(mark_81 == 1, part, 0) for part in _multiply(d, _load(before, rows)))
        _store(da, rows, d)
        return carried

    _end(_groups(reverse, group, _load(carry, slice(None))), carry, dstate)


def _begin(marks_1L, marks_L1, state, carry):
    marks_L1[...] = jnp.broadcast_to(marks_1L[...], (128, CHUNK)).T

    @pl.when(pl.program_id(2) == 0)
    def _():
        _store(carry, slice(None), _load(state, slice(None)))


def _end(carried, carry, last):
    _store(carry, slice(None), carried)
    _store(last, slice(None), carried)


def _groups(reverse, group, carried):
    """Calls `carried = group(rows, carried)` for all rows of the chunk, eight by eight."""

    def pair(i, carried):
        i = CHUNK // GROUP - 1 - i if reverse else i
        return group(pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP), carried)

    return jax.lax.fori_loop(0, CHUNK // GROUP, pair, carried, unroll=2)


def _effect(mark_81, a: Parts, x: Parts) -> tuple[Parts, Parts]:
    """Returns what each token leaves of the state, and what it adds: by its mark, or by a and x."""
    one = jnp.where(mark_81 == 0, 1.0, 0.0)
    keep = tuple(jnp.where(mark_81 == 1, part, 0.0 if i else one) for i, part in enumerate(a))
    return keep, tuple(jnp.where(mark_81 > 0, part, 0) for part in x)


def _walk(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts, Parts]:
    """Returns the states after and before each of eight tokens, and that after all."""
    W = x[0].shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (GROUP, W), 0)
    shift = lambda parts, s: tuple(pltpu.roll(part, GROUP - s if reverse else s, axis=0) for part in parts)
    for s in (1, 2, 4):
        has_before = row < GROUP - s if reverse else row >= s
        x = _add(x, _multiply(tuple(jnp.where(has_before, part, 0) for part in a), shift(x, s)))
        a = tuple(jnp.where(has_before, new, old) for new, old in zip(_multiply(a, shift(a, s)), a, strict=True))
    after = _add(x, _multiply(a, state))
    last = tuple(part[:1] if reverse else part[-1:] for part in after)
    is_first = row == (GROUP - 1 if reverse else 0)
    before = tuple(jnp.where(is_first, old, new) for old, new in zip(state, shift(after, 1), strict=True))
    return after, before, last


def _multiply(a: Parts, b: Parts) -> Parts:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _add(a: Parts, b: Parts) -> Parts:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _load(refs, rows) -> Parts:
    return tuple((ref[...] if ref.shape[0] == 1 else ref[rows, :]).astype(jnp.float32) for ref in refs)


def _store(refs, rows, parts: Parts) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[rows, :] = part.astype(ref.dtype)
