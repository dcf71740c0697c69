"""The TPU kernels of the delta rule with one decay per key channel; `tpu_channel.py` says what they compute."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import triangular
from pallas_kernels.common.doubling import FIRST, SECOND, Pairs, add, dot, fill, take
from pallas_kernels.common.head_blocks import REAL
from pallas_kernels.common.walk import CHUNK, Tokens, finish, start


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the kernels compute; products of float32 are `exact`."""

    scale: float
    exact: bool

    def product(self, x: jax.Array, y: jax.Array, sides: str) -> jax.Array:
        return dot(x, y, sides, self.exact)


def _stack(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, axis=0)


def _beside(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, axis=1)


def _cut(x: jax.Array) -> list[jax.Array]:
    """Undoes `_stack` of two."""
    return jnp.split(x, 2, axis=0)


def _columns(flags_1L, rows_8L):
    """Returns a column per head, zero for what is not real, of rows of numbers per token."""
    return jnp.where(flags_1L[...] & REAL > 0, rows_8L[...], 0).T


def forward(rule, blocks, flags_1L, q_ref, k_ref, v_ref, g_ref, beta_8L, S_NHP, o_ref, last_NHP, *rest):
    states_NPH, inverses_NLL, S_NPH = rest
    start(S_NPH, S_NHP)
    tokens, pairs, strict, product = Tokens(flags_1L[...]), Pairs(CHUNK, False), Pairs(CHUNK, True), rule.product
    beta_L8, systems, waiting = _columns(flags_1L, beta_8L), [], []
    # 1. All that can be known before a system is solved, of all heads: inverses are long chains of short products, and
    # take no longer for many than for one.
    for key, heads in (pair for unit in blocks.units for pair in unit):
        q_LH, k_LH = (tokens.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref))
        q_LH = rule.scale * q_LH
        for n in heads:
            decays, beta_L1, S_PH = tokens.decays(blocks.decays.read(g_ref, n)), beta_L8[:, n : n + 1], S_NPH[n]
            states_NPH[n] = S_PH.astype(states_NPH.dtype)
            # What tokens read of each other, and what those that write do.
            qk, bkk, bk_LH = {}, {}, beta_L1 * k_LH
            for m, d_LH in decays.levels.items():
                to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
                readers = _stack(take(q_LH, m, SECOND) * to, take(bk_LH, m, SECOND) * to)
                qk[m], bkk[m] = _cut(product(readers, fill(take(k_LH, m, FIRST) * of, m, FIRST), "nt"))
            systems.append(strict.gather(bkk, None, SECOND))
            scores_LL = pairs.gather(qk, jnp.sum(q_LH * k_LH, axis=1, keepdims=True), SECOND)
            # What the state holds for them.
            read_LP, held_LP = _cut(product(_stack(q_LH * decays.reads, k_LH * decays.reads), S_PH, "nt"))
            x_LP = beta_L1 * (tokens.clear(blocks.values.read(v_ref, n)) - held_LP)
            waiting.append((n, x_LP, scores_LL, read_LP, k_LH * decays.writes, decays.keep_1H))
    # 2. What tokens write in truth; with it all else.
    o = []
    for inverse_LL, (n, x_LP, scores_LL, read_LP, put_LH, keep_1H) in zip(
        triangular.inverses(systems, rule.exact), waiting, strict=True
    ):
        inverses_NLL[n] = inverse_LL.astype(inverses_NLL.dtype)
        u_LP = product(inverse_LL, x_LP, "nn")
        o.append(tokens.clear(read_LP + product(scores_LL, u_LP, "nn")))
        S_NPH[n] = keep_1H * S_NPH[n] + product(u_LP, put_LH, "tn")
    blocks.values.write(o_ref, 0, o)
    finish(S_NPH, last_NHP)


def backward(rule, blocks, *refs):
    flags_1L, q_ref, k_ref, v_ref, g_ref, beta_8L, do_ref, states_NPH, inverses_NLL, dlast_NHP, *outputs, dS_NPH = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbeta_8L, dS_NHP = outputs
    start(dS_NPH, dlast_NHP)
    tokens, pairs, product = Tokens(flags_1L[...]), Pairs(CHUNK, False), rule.product
    beta_L8 = _columns(flags_1L, beta_8L)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)

    def head(q_LH, k_LH, n):
        v_LP, do_LP = (tokens.clear(blocks.values.read(ref, n)) for ref in (v_ref, do_ref))
        beta_L1, inverse_LL = beta_L8[:, n : n + 1], inverses_NLL[n].astype(jnp.float32)
        decays = tokens.decays(blocks.decays.read(g_ref, n))
        S_PH, dS_PH = states_NPH[n].astype(jnp.float32), dS_NPH[n]
        bk_LH, put_LH = beta_L1 * k_LH, k_LH * decays.writes
        read_q_LH, read_k_LH = q_LH * decays.reads, k_LH * decays.reads
        # 1. What the forward pass knew. Rows of scoresT are what is read, columns the readers.
        delta_LP = v_LP - product(read_k_LH, S_PH, "nt")
        u_LP = product(inverse_LL, beta_L1 * delta_LP, "nn")
        levels, found = {}, {}
        for m, d_LH in decays.levels.items():
            to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
            k = take(k_LH, m, FIRST) * of
            q, bk = (fill(take(x_LH, m, SECOND) * to, m, SECOND) for x_LH in (q_LH, bk_LH))
            levels[m] = to, of, q, bk, fill(k, m, FIRST)
            found[m] = product(k, q, "nt")
        scoresT_LL = pairs.gather(found, jnp.sum(q_LH * k_LH, axis=1, keepdims=True), FIRST)
        # 2. The gradients of what tokens write, and through the triangular system that of v.
        du_LP = product(scoresT_LL, do_LP, "nn") + product(put_LH, dS_PH, "nt")
        dx_LP = product(inverse_LL, du_LP, "tn")
        dv_LP = beta_L1 * dx_LP
        # 3. Through the states: what the chunk reads, what it leaves, what it keeps.
        dreads = _stack(do_LP, -dv_LP)
        dread_q_LH, dread_k_LH = (decays.reads * d_LH for d_LH in _cut(product(dreads, S_PH, "nn")))
        dput_LH = decays.writes * product(u_LP, dS_PH, "nn")
        dg_LH = decays.keep_1H * jnp.sum(S_PH * dS_PH, axis=0, keepdims=True)
        dg_LH += product(pairs.earlier(), k_LH * dput_LH, "nn")
        dS_NPH[n] = decays.keep_1H * dS_PH + product(dreads, _stack(read_q_LH, read_k_LH), "tn")
        # 4. Within the chunk: of q with k, and of beta k with k.
        dreads = _stack(do_LP, -dx_LP)
        dqk_LL, dbkk_LL = _cut(product(dreads, u_LP, "nt"))
        dqkT_LL, dbkkT_LL = jnp.split(product(u_LP, dreads, "nt"), 2, axis=1)
        zero_LH = jnp.zeros_like(k_LH)
        dq_near, dq_far, dbk_near, dbk_far, dk_near, dk_far = zero_LH, zero_LH, zero_LH, zero_LH, zero_LH, zero_LH
        for m, (to, of, q, bk, k) in levels.items():
            dreaders = _stack(pairs.pick(dqk_LL, m, SECOND), pairs.pick(dbkk_LL, m, SECOND))
            dq, dbk = (to * d for d in _cut(product(dreaders, k, "nn")))
            dread = _beside(pairs.pick(dqkT_LL, m, FIRST), pairs.pick(dbkkT_LL, m, FIRST))
            dk = of * product(dread, _stack(q, bk), "nn")
            if m < 8:
                dq_near, dbk_near = add(dq_near, dq, m, SECOND), add(dbk_near, dbk, m, SECOND)
                dk_near = add(dk_near, dk, m, FIRST)
            else:
                dq_far, dbk_far = add(dq_far, dq, m, SECOND), add(dbk_far, dbk, m, SECOND)
                dk_far = add(dk_far, dk, m, FIRST)
        near_LH = q_LH * dq_near + bk_LH * dbk_near - k_LH * dk_near
        far_LH = q_LH * (dq_far + dread_q_LH) + bk_LH * dbk_far + k_LH * (dread_k_LH - dk_far)
        dg_LH += product(pairs.later(8), near_LH, "nn") + product(pairs.later(CHUNK), far_LH, "nn")
        # 5. Together.
        dbk_LH, own_L1 = dbk_near + dbk_far, jnp.sum(do_LP * u_LP, axis=1, keepdims=True)
        dq_LH = dq_near + dq_far + dread_q_LH + own_L1 * k_LH
        dk_LH = dk_near + dk_far + dput_LH + dread_k_LH + own_L1 * q_LH + beta_L1 * dbk_LH
        dbeta_L1 = jnp.sum(dx_LP * delta_LP, axis=1, keepdims=True) + jnp.sum(dbk_LH * k_LH, axis=1, keepdims=True)
        return rule.scale * dq_LH, dk_LH, tokens.clear(dv_LP), tokens.clear_starts(dg_LH), dbeta_L1

    dbeta_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    for unit in blocks.units:
        dq, dk, dv, dg = [], [], [], []
        for key, heads in unit:
            q_LH, k_LH = (tokens.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref))
            of_heads = [head(rule.scale * q_LH, k_LH, n) for n in heads]
            dq_G, dk_G, dv_G, dg_G, dbeta_G = zip(*of_heads, strict=True)
            dq, dk, dv, dg = [*dq, sum(dq_G)], [*dk, sum(dk_G)], [*dv, *dv_G], [*dg, *dg_G]
            for n, dbeta_L1 in zip(heads, dbeta_G, strict=True):
                dbeta_LL = jnp.where(lane == n, dbeta_L1, dbeta_LL)
        (key, heads), *_ = unit
        blocks.dkeys.write(dq_ref, key, dq)
        blocks.dkeys.write(dk_ref, key, dk)
        blocks.values.write(dv_ref, heads[0], dv)
        blocks.decays.write(dg_ref, heads[0], dg)
    dbeta_8L[...] = jnp.where(flags_1L[...] & REAL > 0, dbeta_LL.T[:8], 0)
    finish(dS_NPH, dS_NHP)
