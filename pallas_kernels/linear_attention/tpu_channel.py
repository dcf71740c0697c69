"""Linear attention with one decay per key channel, on TPU: GLA, https://arxiv.org/abs/2312.06635, RWKV-6, HGRN2.

The mathematics is that of `xla.py`, in chunks of 128 tokens, with the decays of `common/doubling.py`. States are walked
turned around, `S_PH`: decays are then rows, which multiply without being turned. The backward pass runs `states`, which
walks the row again and leaves the state before each chunk in HBM, then `backward`, from the last chunk to the first.

The gradient of g is as in `common/decays.py`, the sum over pairs of tokens a difference of rows and columns, which
cancels outside of the blocks in which they meet. Rounded products would leave something there, more than what strong
decays let through; so close pairs are summed over blocks of 8 tokens only.

Cycles per token and head, by the compiler's schedule, for 8 heads of H = P = 128 in bfloat16, beside the floors: what
passes between HBM and the kernel, and the products of matrices.

                  v5e: schedule  HBM  products      v6e: schedule  HBM  products
    forward                 3.6  2.9       3.0                3.8  1.7       1.0
    states                  1.5  2.4       0.4                1.4  1.4       0.1
    backward                9.7  5.7       6.8                9.6  3.3       3.1

Forward, vector arithmetic and, on v5e, stores fill three quarters of their slots. Backward the stores are what fills up
on v5e: of the some fifty matrices that a head keeps alive, registers hold four, and the rest moves to VMEM and back.
What did not help, being 0 to 15 % slower backward: two heads taken by turns; one head made to wait for another;
levels made one by one as they are used; dO V^T turned around rather than made twice; dg summed in three sizes of block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import walk
from pallas_kernels.common.doubling import FIRST, SECOND, Pairs, add, fill, take
from pallas_kernels.common.head_blocks import Blocks, as_float32, cut, flags, widen
from pallas_kernels.common.walk import CHUNK, PARAMS, Tokens, finish, is_exact, start


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state). segment_ids are the user's: 0 is padding, where v and g may be anything."""
    rule, blocks = _Rule(scale, is_exact(q, k, v), before), Blocks(q, v, CHUNK)
    spec, state_BNHP = blocks.specs(), widen(state, 2, 3)
    o, last_BNHP = pl.pallas_call(
        functools.partial(_forward_kernel, rule, blocks),
        name="linear_attention_channel",
        grid=blocks.grid,
        in_specs=[spec.flags, spec.keys, spec.keys, spec.values, spec.decays, spec.state],
        out_specs=[spec.values, spec.state],
        out_shape=[blocks.values.shape(v.dtype), as_float32(state_BNHP)],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(flags(segment_ids, CHUNK), *blocks.pack(q, k, v, g), state_BNHP)
    return blocks.values.from_kernel(o)[..., : v.shape[3]], cut(last_BNHP, state)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, state, segment_ids = inputs
    do, dlast = cotangents
    rule, blocks = _Rule(scale, is_exact(q, k, v), before), Blocks(q, v, CHUNK)
    state_BNHP, flags_B1T, packed = widen(state, 2, 3), flags(segment_ids, CHUNK), blocks.pack(q, k, v, g)
    scratch = [pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)]
    spec = blocks.specs()
    states = pl.pallas_call(
        functools.partial(_states_kernel, rule, blocks),
        name="linear_attention_channel_states",
        grid=blocks.grid,
        in_specs=[spec.flags, spec.keys, spec.values, spec.decays, spec.state],
        out_specs=spec.states,
        out_shape=blocks.kept(rule.exact)[0],
        scratch_shapes=scratch,
        compiler_params=PARAMS,
    )(flags_B1T, *packed[1:], state_BNHP)
    spec = blocks.specs(backwards=True)
    dq, dk, dv, dg, dstate_BNHP = pl.pallas_call(
        functools.partial(_backward_kernel, rule, blocks),
        name="linear_attention_channel_backward",
        grid=blocks.grid,
        in_specs=[
            *[spec.flags, spec.keys, spec.keys, spec.values, spec.decays],
            *[spec.values, spec.states, spec.state],
        ],
        out_specs=[spec.dkeys, spec.dkeys, spec.values, spec.decays, spec.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k)],
            blocks.values.shape(v.dtype),
            blocks.decays.shape(jnp.float32),
            as_float32(state_BNHP),
        ],
        scratch_shapes=scratch,
        compiler_params=PARAMS,
    )(flags_B1T, *packed, blocks.values.to_kernel(widen(do, 3)), states, widen(dlast, 2, 3))
    return (
        blocks.key_gradient(dq, q),
        blocks.key_gradient(dk, k),
        blocks.values.from_kernel(dv)[..., : v.shape[3]],
        blocks.decays.from_kernel(dg)[..., : g.shape[3]],
        cut(dstate_BNHP, state),
    )


@dataclasses.dataclass(frozen=True)
class _Rule(walk.Rule):
    before: bool
    """Tokens read before they decay and write."""

    def own(self, q_LH: jax.Array, k_LH: jax.Array) -> jax.Array | None:
        """Returns the scores of tokens with themselves, if they read what they write."""
        return None if self.before else jnp.sum(q_LH * k_LH, axis=1, keepdims=True)


def _forward_kernel(rule, blocks, flags_1L, q_ref, k_ref, v_ref, g_ref, S_NHP, o_ref, last_NHP, S_NPH):
    start(S_NPH, S_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product

    def head(q_LH, k_LH, n):
        v_LP = tokens.clear(blocks.values.read(v_ref, n))
        decays = tokens.decays(blocks.decays.read(g_ref, n), rule.before)
        found = {}
        for m, d_LH in decays.levels.items():
            q, k = (take(x_LH, m, half) * take(d_LH, m, half) for x_LH, half in ((q_LH, SECOND), (k_LH, FIRST)))
            found[m] = product(q, fill(k, m, FIRST), "nt")
        scores_LL = pairs.gather(found, rule.own(q_LH, k_LH), SECOND)
        S_PH = S_NPH[n]
        o_LP = product(scores_LL, v_LP, "nn") + product(q_LH * decays.reads, S_PH, "nt")
        S_NPH[n] = decays.keep_1H * S_PH + product(v_LP, k_LH * decays.writes, "tn")
        return tokens.clear(o_LP)

    for unit in blocks.units:
        o = []
        for key, heads in unit:
            q_LH = rule.scale * blocks.keys.read(q_ref, key)
            k_LH = tokens.clear(blocks.keys.read(k_ref, key))
            o += [head(q_LH, k_LH, n) for n in heads]
        blocks.values.write(o_ref, unit[0][1][0], o)
    finish(S_NPH, last_NHP)


def _states_kernel(rule, blocks, flags_1L, k_ref, v_ref, g_ref, S_NHP, states_NPH, S_NPH):
    start(S_NPH, S_NHP)
    tokens = Tokens(rule, flags_1L[...])
    for unit in blocks.units:
        for key, heads in unit:
            k_LH = tokens.clear(blocks.keys.read(k_ref, key))
            for n in heads:
                v_LP = tokens.clear(blocks.values.read(v_ref, n))
                decays = tokens.decays(blocks.decays.read(g_ref, n), rule.before)
                S_PH = S_NPH[n]
                states_NPH[n] = S_PH.astype(states_NPH.dtype)
                S_NPH[n] = decays.keep_1H * S_PH + rule.product(v_LP, k_LH * decays.writes, "tn")


def _backward_kernel(rule, blocks, *refs):
    flags_1L, q_ref, k_ref, v_ref, g_ref, do_ref, states_NPH, dlast_NHP, *outputs, dS_NPH = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dS_NHP = outputs
    start(dS_NPH, dlast_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product

    def head(q_LH, k_LH, n):
        v_LP, do_LP = (tokens.clear(blocks.values.read(ref, n)) for ref in (v_ref, do_ref))
        decays = tokens.decays(blocks.decays.read(g_ref, n), rule.before)
        S_PH, dS_PH = states_NPH[n].astype(jnp.float32), dS_NPH[n]
        # 1. Through the states: what the chunk reads, what it leaves, what it keeps.
        dread_LH = decays.reads * product(do_LP, S_PH, "nn")
        dput_LH = decays.writes * product(v_LP, dS_PH, "nn")
        dg_LH = decays.keep_1H * jnp.sum(S_PH * dS_PH, axis=0, keepdims=True)
        dg_LH += product(pairs.earlier(), k_LH * dput_LH, "nn")
        # 2. Within the chunk. Rows of scores are readers, those of their transpose what is read.
        dscores_LL, dscoresT_LL = product(do_LP, v_LP, "nt"), product(v_LP, do_LP, "nt")
        found, dq_near_LH, dq_far_LH = {}, jnp.zeros_like(q_LH), dread_LH
        dk_near_LH, dk_far_LH = jnp.zeros_like(k_LH), jnp.zeros_like(k_LH)
        for m, d_LH in decays.levels.items():
            to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
            q, k = fill(take(q_LH, m, SECOND) * to, m, SECOND), fill(take(k_LH, m, FIRST) * of, m, FIRST)
            found[m] = product(take(k, m, FIRST), q, "nt")
            dq = to * product(pairs.pick(dscores_LL, m, SECOND), k, "nn")
            dk = of * product(pairs.pick(dscoresT_LL, m, FIRST), q, "nn")
            if m < 8:
                dq_near_LH, dk_near_LH = add(dq_near_LH, dq, m, SECOND), add(dk_near_LH, dk, m, FIRST)
            else:
                dq_far_LH, dk_far_LH = add(dq_far_LH, dq, m, SECOND), add(dk_far_LH, dk, m, FIRST)
        dg_LH += product(pairs.later(8), q_LH * dq_near_LH - k_LH * dk_near_LH, "nn")
        dg_LH += product(pairs.later(CHUNK), q_LH * dq_far_LH - k_LH * dk_far_LH, "nn")
        dq_LH, dk_LH = dq_near_LH + dq_far_LH, dk_near_LH + dk_far_LH + dput_LH
        if rule.before:
            dg_LH -= q_LH * dq_LH
        else:
            own_L1 = jnp.sum(do_LP * v_LP, axis=1, keepdims=True)
            dq_LH, dk_LH = dq_LH + own_L1 * k_LH, dk_LH + own_L1 * q_LH
        scoresT_LL = pairs.gather(found, rule.own(q_LH, k_LH), FIRST)
        dv_LP = product(scoresT_LL, do_LP, "nn") + product(k_LH * decays.writes, dS_PH, "nt")
        dS_NPH[n] = decays.keep_1H * dS_PH + product(do_LP, q_LH * decays.reads, "tn")
        return rule.scale * dq_LH, dk_LH, tokens.clear(dv_LP), tokens.clear_starts(dg_LH)

    for unit in blocks.units:
        dq, dk, dv, dg = [], [], [], []
        for key, heads in unit:
            q_LH, k_LH = (tokens.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref))
            of_heads = [head(rule.scale * q_LH, k_LH, n) for n in heads]
            dq_G, dk_G, dv_G, dg_G = zip(*of_heads, strict=True)
            dq, dk, dv, dg = [*dq, sum(dq_G)], [*dk, sum(dk_G)], [*dv, *dv_G], [*dg, *dg_G]
        (key, heads), *_ = unit
        blocks.dkeys.write(dq_ref, key, dq)
        blocks.dkeys.write(dk_ref, key, dk)
        blocks.values.write(dv_ref, heads[0], dv)
        blocks.decays.write(dg_ref, heads[0], dg)
    finish(dS_NPH, dS_NHP)
