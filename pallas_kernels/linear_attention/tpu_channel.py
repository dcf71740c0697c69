"""Linear attention with one decay per key channel, on TPU: GLA, https://arxiv.org/abs/2312.06635, RWKV-6, HGRN2."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import doubling
from pallas_kernels.common.documents import fill_padding
from pallas_kernels.common.doubling import FIRST, SECOND, Decays, Pairs, dot
from pallas_kernels.common.heads import TILE, Heads

CHUNK = 128
# exp2(-200) is 0 in float32: closed gates (-inf, too) and the starts of documents stop here.
_CLOSED = -200.0
_LOG2_E = 1.4426950408889634
_REAL, _STARTS = 1, 2


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    del g
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (q, k, v)):
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads wider than 256, and here are keys of {q.shape[-1]} and values of {v.shape[-1]}"
    return None


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state). segment_ids are the user's: 0 is padding, where v and g may be anything."""
    plan, args = _prepare(scale, before, q, k, v, g, segment_ids)
    B, T, N, P = v.shape
    state_BNHP = _widen(state, 2, 3)
    H, P = state_BNHP.shape[2:]
    spec = plan.specs(lambda c: c)
    o, last_BNHP = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=plan.grid,
        in_specs=[*spec.inputs, spec.state],
        out_specs=[spec.values, spec.state],
        out_shape=[plan.values.shape((B, T, N, P), v.dtype), jax.ShapeDtypeStruct(state_BNHP.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((plan.size, P, H), jnp.float32)],
        compiler_params=_PARAMS,
        name="linear_attention_channel",
    )(*args, state_BNHP)
    return plan.values.from_kernel(o)[..., : v.shape[-1]], last_BNHP[:, :, : state.shape[2], : state.shape[3]]


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, state, segment_ids = inputs
    do, dlast = cotangents
    plan, args = _prepare(scale, before, q, k, v, g, segment_ids)
    B, T, N, _ = v.shape
    state_BNHP, dlast_BNHP = _widen(state, 2, 3), _widen(dlast, 2, 3)
    H, P = state_BNHP.shape[2:]
    do = plan.values.to_kernel(_widen(do, 3))
    spec = plan.specs(lambda c: c)
    states = pl.pallas_call(
        functools.partial(_states_kernel, plan),
        grid=plan.grid,
        in_specs=[spec.flags, spec.keys, spec.values, spec.decays, spec.state],
        out_specs=spec.states,
        out_shape=jax.ShapeDtypeStruct((B, plan.grid[2], N, P, H), jnp.float32 if plan.exact else jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((plan.size, P, H), jnp.float32)],
        compiler_params=_PARAMS,
        name="linear_attention_channel_states",
    )(args[0], *args[2:], state_BNHP)
    spec = plan.specs(lambda c: plan.grid[2] - 1 - c)
    # Where several steps share a key head, each gives its own part of the gradient.
    partial = lambda x: plan.dkeys.shape((B, T, plan.num_dkeys, H), x.dtype if plan.share == 1 else jnp.float32)
    dq, dk, dv, dg, dstate_BNHP = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        grid=plan.grid,
        in_specs=[*spec.inputs, spec.values, spec.states, spec.state],
        out_specs=[spec.dkeys, spec.dkeys, spec.values, spec.decays, spec.state],
        out_shape=[
            partial(q),
            partial(k),
            plan.values.shape((B, T, N, P), v.dtype),
            plan.values.shape((B, T, N, H), jnp.float32),
            jax.ShapeDtypeStruct(state_BNHP.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((plan.size, P, H), jnp.float32)],
        compiler_params=_PARAMS,
        name="linear_attention_channel_backward",
    )(*args, do, states, dlast_BNHP)

    def join(d, x):
        d_BTKsH = plan.dkeys.from_kernel(d).reshape(B, T, -1, plan.share, H)
        d_BTKH = d_BTKsH[:, :, :, 0] if plan.share == 1 else jnp.sum(d_BTKsH, axis=3)
        return d_BTKH[..., : x.shape[-1]].astype(x.dtype)

    return (
        join(dq, q),
        join(dk, k),
        plan.values.from_kernel(dv)[..., : v.shape[-1]],
        plan.values.from_kernel(dg)[..., : g.shape[-1]],
        dstate_BNHP[:, :, : state.shape[2], : state.shape[3]],
    )


# Large kernels keep many registers' worth of values in VMEM.
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 1024 * 1024
)


@dataclasses.dataclass(frozen=True)
class _Specs:
    flags: pl.BlockSpec
    keys: pl.BlockSpec
    dkeys: pl.BlockSpec
    values: pl.BlockSpec
    decays: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec

    @property
    def inputs(self):
        return self.flags, self.keys, self.keys, self.values, self.decays


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One step of the kernels takes `size` value heads and a chunk; `share` steps share a key head."""

    scale: float
    before: bool
    exact: bool
    grid: tuple[int, int, int]
    widths: tuple[int, int]
    size: int
    group: int
    keys: Heads
    dkeys: Heads
    num_dkeys: int
    values: Heads

    @property
    def share(self):
        return max(1, self.group // self.size)

    @property
    def unit_keys(self) -> int:
        """How many key heads are taken at once: tiles of bfloat16 are written two heads at a time."""
        return 2 if self.group == 1 and self.size % 2 == 0 else 1

    def readers(self, key: int) -> range:
        """Returns the value heads, counted from the unit's first, of a key head counted likewise."""
        heads = min(self.group, self.size)
        return range(key * heads, (key + 1) * heads)

    def each(self, unit) -> None:
        """Calls `unit(key, n)` with the first key and the first value head of each unit of the step."""
        heads = self.unit_keys * min(self.group, self.size)
        for u in range(self.size // heads):
            unit(u * self.unit_keys, u * heads)

    def specs(self, chunk):
        H, P = self.widths
        return _Specs(
            pl.BlockSpec((None, 1, CHUNK), lambda b, n, c: (b, 0, chunk(c))),
            self.keys.spec(H, chunk),
            self.dkeys.spec(H, chunk),
            self.values.spec(P, chunk),
            self.values.spec(H, chunk),
            pl.BlockSpec((None, self.size, H, P), lambda b, n, c: (b, n, 0, 0)),
            pl.BlockSpec((None, None, self.size, P, H), lambda b, n, c: (b, chunk(c), n, 0, 0)),
        )


def _prepare(scale, before, q, k, v, g, segment_ids):
    """Returns the plan and the arguments that all kernels share."""
    B, T, N, P = v.shape
    K = q.shape[2]
    G, size = N // K, _heads_per_step(K, N // K)
    share = max(1, G // size)
    plan = _Plan(
        scale=scale,
        before=before,
        exact=any(x.dtype == jnp.float32 for x in (q, k, v)),
        grid=(B, N // size, pl.cdiv(T, CHUNK)),
        widths=(_width(q.shape[-1]), _width(P)),
        size=size,
        group=G,
        keys=Heads(K, max(1, size // G), CHUNK, share),
        dkeys=Heads(K * share, max(1, size // G), CHUNK),
        num_dkeys=K * share,
        values=Heads(N, size, CHUNK),
    )
    ids_BT = fill_padding(segment_ids)
    starts_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    flags_BT = jnp.where(segment_ids > 0, _REAL, 0) | jnp.where(starts_BT, _STARTS, 0)
    flags_B1T = jnp.pad(flags_BT, ((0, 0), (0, -T % CHUNK)))[:, None]
    keys = [plan.keys.to_kernel(_widen(x, 3)) for x in (q, k)]
    return plan, [flags_B1T, *keys, *[plan.values.to_kernel(_widen(x, 3)) for x in (v, g)]]


def _heads_per_step(K: int, G: int) -> int:
    """Returns how many value heads a step takes: whole key heads, or a part of one."""
    if (K * G) % TILE == 0 and (TILE % G == 0 or G % TILE == 0):
        return TILE
    if G > TILE:
        return next(size for size in range(TILE, 0, -1) if G % size == 0)
    return next(G * keys for keys in range(TILE // G, 0, -1) if K % keys == 0)


def _width(size: int) -> int:
    return 64 if size <= 64 else size + -size % 128


def _widen(x: jax.Array, *axes: int) -> jax.Array:
    """Fills axes up with zeros to a width that the kernels take."""
    widths = [(0, _width(size) - size if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


class _Tokens:
    """Which tokens of the chunk are real and which start a document. What is not real, or beyond T, may be anything."""

    def __init__(self, flags_1L: jax.Array):
        flags_LL = jnp.broadcast_to(flags_1L, (CHUNK, CHUNK)).astype(jnp.float32).T.astype(jnp.int32)
        starts_LL = flags_LL & _STARTS > 0
        self._real_LL = jnp.where(flags_LL & _REAL > 0, -1, 0)
        self._goes_on_LL = jnp.where(starts_LL, 0, self._real_LL)
        self._most_LL = jnp.where(starts_LL, _CLOSED, 0.0)

    def clear(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros, NaN or not, for what is not real."""
        return _and(x_LX, self._real_LL)

    def clear_starts(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros for what is not real and for the starts of documents."""
        return _and(x_LX, self._goes_on_LL)

    def decays(self, g_LH: jax.Array, before: bool) -> Decays:
        most_LH = _as_wide(self._most_LL, g_LH.shape[1])
        logs_LH = jnp.minimum(jnp.maximum(self.clear(g_LH) * _LOG2_E, _CLOSED), most_LH)
        return Decays(logs_LH, most_LH if before else logs_LH)


def _as_wide(same_LL: jax.Array, width: int) -> jax.Array:
    """Returns `LX` of an array whose lanes are all the same."""
    return same_LL[:, :width] if width <= CHUNK else jnp.concatenate([same_LL] * (width // CHUNK), axis=1)


def _and(x_LX: jax.Array, bits_LL: jax.Array) -> jax.Array:
    bits_LX = jax.lax.bitcast_convert_type(x_LX, jnp.int32) & _as_wide(bits_LL, x_LX.shape[1])
    return jax.lax.bitcast_convert_type(bits_LX, jnp.float32)


def _forward_kernel(plan, flags_1L, q_ref, k_ref, v_ref, g_ref, S_NHP, o_ref, last_NHP, S_NPH):
    _start(S_NPH, S_NHP)
    tokens, pairs = _Tokens(flags_1L[...]), Pairs(CHUNK, plan.before)
    product = functools.partial(dot, exact=plan.exact)

    def head(q_LH, k_LH, n):
        v_LP = tokens.clear(plan.values.read(v_ref, n))
        decays = tokens.decays(plan.values.read(g_ref, n), plan.before)
        scores_LL = _scores(pairs, decays, q_LH, k_LH, SECOND, product)
        S_PH = S_NPH[n]
        o_LP = product(scores_LL, v_LP, "nn") + product(q_LH * decays.reads, S_PH, "nt")
        S_NPH[n] = decays.keep_1H * S_PH + product(v_LP, k_LH * decays.writes, "tn")
        return tokens.clear(o_LP)

    @plan.each
    def _(key, n):
        o = []
        for j in range(plan.unit_keys):
            q_LH = plan.scale * plan.keys.read(q_ref, key + j)
            k_LH = tokens.clear(plan.keys.read(k_ref, key + j))
            o += [head(q_LH, k_LH, n + i) for i in plan.readers(j)]
        plan.values.write(o_ref, n, o)

    _finish(plan, S_NPH, last_NHP)


def _states_kernel(plan, flags_1L, k_ref, v_ref, g_ref, S_NHP, states_NPH, S_NPH):
    _start(S_NPH, S_NHP)
    tokens = _Tokens(flags_1L[...])

    @plan.each
    def _(key, n):
        for j in range(plan.unit_keys):
            k_LH = tokens.clear(plan.keys.read(k_ref, key + j))
            for i in plan.readers(j):
                v_LP = tokens.clear(plan.values.read(v_ref, n + i))
                decays = tokens.decays(plan.values.read(g_ref, n + i), plan.before)
                S_PH = S_NPH[n + i]
                states_NPH[n + i] = S_PH.astype(states_NPH.dtype)
                S_NPH[n + i] = decays.keep_1H * S_PH + dot(v_LP, k_LH * decays.writes, "tn", plan.exact)


def _backward_kernel(plan, *refs):
    flags_1L, q_ref, k_ref, v_ref, g_ref, do_ref, states_NPH, dlast_NHP, *outputs, dS_NPH = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dS_NHP = outputs
    _start(dS_NPH, dlast_NHP)
    tokens, pairs = _Tokens(flags_1L[...]), Pairs(CHUNK, plan.before)
    product = functools.partial(dot, exact=plan.exact)

    def head(q_LH, k_LH, n):
        v_LP, do_LP = (tokens.clear(plan.values.read(ref, n)) for ref in (v_ref, do_ref))
        decays = tokens.decays(plan.values.read(g_ref, n), plan.before)
        S_PH, dS_PH = states_NPH[n].astype(jnp.float32), dS_NPH[n]
        # Within the chunk; keys are the rows of what ends in T.
        scoresT_LL = _scores(pairs, decays, q_LH, k_LH, FIRST, product)
        d_LL, dT_LL = product(do_LP, v_LP, "nt"), product(v_LP, do_LP, "nt")
        # Through the states.
        dread_LH = decays.reads * product(do_LP, S_PH, "nn")
        dput_LH = decays.writes * product(v_LP, dS_PH, "nn")
        dg_LH = decays.keep_1H * jnp.sum(S_PH * dS_PH, axis=0, keepdims=True)
        dg_LH += product(pairs.earlier(), k_LH * dput_LH, "nn")
        sums = []
        for m, d_LH in decays.levels.items():
            to, of = doubling.take(d_LH, m, SECOND), doubling.take(d_LH, m, FIRST)
            q, k = doubling.take(q_LH, m, SECOND) * to, doubling.take(k_LH, m, FIRST) * of
            dq = to * product(pairs.pick(d_LL, m, SECOND), doubling.fill(k, m, FIRST), "nn")
            dk = of * product(pairs.pick(dT_LL, m, FIRST), doubling.fill(q, m, SECOND), "nn")
            if m in (1, 8, 32):
                level_dq_LH, level_dk_LH = doubling.fill(dq, m, SECOND), doubling.fill(dk, m, FIRST)
            else:
                level_dq_LH, level_dk_LH = doubling.add(level_dq_LH, dq, m, SECOND), doubling.add(level_dk_LH, dk, m, FIRST)
            if m in (4, 16, 64):
                if m == 64:
                    level_dq_LH = level_dq_LH + dread_LH
                dg_LH += product(pairs.later(2 * m), q_LH * level_dq_LH - k_LH * level_dk_LH, "nn")
                sums.append((level_dq_LH, level_dk_LH))
        dq_LH, dk_LH = (x + y + z for x, y, z in zip(*sums, strict=True))
        dk_LH += dput_LH
        dv_LP = product(scoresT_LL, do_LP, "nn") + product(k_LH * decays.writes, dS_PH, "nt")
        if plan.before:
            dg_LH -= q_LH * dq_LH
        else:
            own_L1 = jnp.sum(do_LP * v_LP, axis=1, keepdims=True)
            dq_LH, dk_LH = dq_LH + own_L1 * k_LH, dk_LH + own_L1 * q_LH
        dS_NPH[n] = decays.keep_1H * dS_PH + product(do_LP, q_LH * decays.reads, "tn")
        return plan.scale * dq_LH, dk_LH, tokens.clear(dv_LP), tokens.clear_starts(dg_LH)

    @plan.each
    def _(key, n):
        dq, dk, dv, dg = [], [], [], []
        for j in range(plan.unit_keys):
            q_LH, k_LH = (tokens.clear(plan.keys.read(ref, key + j)) for ref in (q_ref, k_ref))
            of_heads = [head(plan.scale * q_LH, k_LH, n + i) for i in plan.readers(j)]
            dq_G, dk_G, dv_G, dg_G = zip(*of_heads, strict=True)
            dq, dk, dv, dg = [*dq, sum(dq_G)], [*dk, sum(dk_G)], [*dv, *dv_G], [*dg, *dg_G]
        for heads, ref, start, d in (
            (plan.dkeys, dq_ref, key, dq),
            (plan.dkeys, dk_ref, key, dk),
            (plan.values, dv_ref, n, dv),
            (plan.values, dg_ref, n, dg),
        ):
            heads.write(ref, start, d)

    _finish(plan, dS_NPH, dS_NHP)


def _start(S_NPH, S_NHP):
    """States are walked turned around: a decay per key is a row then, and rows multiply without being turned."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for n in range(S_NPH.shape[0]):
            S_NPH[n] = S_NHP[n].T


def _finish(plan, S_NPH, S_NHP):
    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        for n in range(S_NPH.shape[0]):
            S_NHP[n] = S_NPH[n].T


def _scores(pairs, decays, q_LH, k_LH, rows, product):
    found = {}
    for m, d_LH in decays.levels.items():
        q = doubling.take(q_LH, m, SECOND) * doubling.take(d_LH, m, SECOND)
        k = doubling.take(k_LH, m, FIRST) * doubling.take(d_LH, m, FIRST)
        if rows == SECOND:
            found[m] = product(q, doubling.fill(k, m, FIRST), "nt")
        else:
            found[m] = product(k, doubling.fill(q, m, SECOND), "nt")
    return pairs.gather(found, jnp.sum(q_LH * k_LH, axis=1, keepdims=True), rows)
