"""The TPU kernels of the delta rule with one decay per key channel; `tpu_channel.py` says what they compute."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import triangular, walk
from pallas_kernels.common.accurate import accurate
from pallas_kernels.common.doubling import FIRST, SECOND, Pairs, add, beside, dot, fill, halves, join, stack, take
from pallas_kernels.common.head_blocks import REAL
from pallas_kernels.common.walk import CHUNK, Tokens, finish, start


class Rule(walk.Rule):
    def scores(self, q: jax.Array, k: jax.Array, w: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Returns q w^T and k w^T. If it is `exact`, the latter and what float32 does not hold of it.

        Errors of k w^T are those of what is written, ten times over where keys are alike.
        """
        if self.exact:
            return self.product(q, w, "nt"), self.with_rest(k, w)
        of_q, of_k = halves(self.product(stack(q, k), w, "nt"))
        return of_q, [of_k]

    def inverses(self, systems: list[list[jax.Array]]) -> list[jax.Array]:
        """Returns `(I + A)^-1` of strictly lower A, or of sums of two."""
        found = triangular.inverses([a_LL for a_LL, *_ in systems], self.exact)
        return [_correct(*pair) for pair in zip(systems, found, strict=True)] if self.exact else found


def _correct(system: list[jax.Array], inverse_LL: jax.Array) -> jax.Array:
    """Returns the inverse without most of its error, by a step of Newton's method."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    product = functools.partial(dot, sides="nn", exact=True)
    a_LL, rest_LL = system
    # No number of an inverse is much larger than 1.
    found_LL = accurate(product, a_LL, inverse_LL, axes=(1, 0), y_sizes=jnp.ones_like(inverse_LL))
    found_LL = jnp.where(row == lane, 1.0, 0.0) - inverse_LL - found_LL
    return inverse_LL + product(inverse_LL, found_LL - product(rest_LL, inverse_LL))


def _columns(flags_1L, rows_8L):
    """Returns a column per head, zero for what is not real, of rows of numbers per token."""
    return jnp.where(flags_1L[...] & REAL > 0, rows_8L[...], 0).T


def forward(rule, blocks, flags_1L, q_ref, k_ref, v_ref, g_ref, beta_8L, S_NHP, o_ref, last_NHP, *rest):
    *kept, S_NPH = rest  # the states before chunks and the inverses, or nothing
    start(S_NPH, S_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product
    beta_L8, systems, waiting = _columns(flags_1L, beta_8L), [], []
    # 1. All that can be known before a system is solved, of all heads: inverses are long chains of short products, and
    # take no longer for many than for one.
    for key, heads in (pair for unit in blocks.units for pair in unit):
        q_LH, k_LH = (tokens.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref))
        q_LH = rule.scale * q_LH
        for n in heads:
            w_LH, decays, S_PH = beta_L8[:, n : n + 1] * k_LH, tokens.decays(blocks.decays.read(g_ref, n)), S_NPH[n]
            if kept:
                kept[0][n] = S_PH.astype(kept[0].dtype)
            qw, kw = {}, []
            for m, d_LH in decays.levels.items():
                to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
                q, k = (take(x_LH, m, SECOND) * to for x_LH in (q_LH, k_LH))
                qw[m], of_k = rule.scores(q, k, fill(take(w_LH, m, FIRST) * of, m, FIRST))
                kw.append(of_k)
            parts = (dict(zip(decays.levels, part, strict=True)) for part in zip(*kw, strict=True))
            systems.append([pairs.gather(part, None, SECOND) for part in parts])
            scores_LL = pairs.gather(qw, jnp.sum(q_LH * w_LH, axis=1, keepdims=True), SECOND)
            read_LP, held_LP = halves(product(stack(q_LH * decays.reads, k_LH * decays.reads), S_PH, "nt"))
            x_LP = tokens.clear(blocks.values.read(v_ref, n)) - held_LP
            waiting.append((n, x_LP, scores_LL, read_LP, w_LH * decays.writes, decays.keep_1H))
    # 2. The errors; with them all else.
    o, inverses = [], rule.inverses(systems)
    for inverse_LL, (n, x_LP, scores_LL, read_LP, put_LH, keep_1H) in zip(inverses, waiting, strict=True):
        if kept:
            kept[1][n] = inverse_LL.astype(kept[1].dtype)
        # What cancels in u and, in the backward pass, in dv does so in these sums.
        u_LP = rule.accurate(inverse_LL, x_LP, "nn", jnp.abs(x_LP))
        o.append(tokens.clear(read_LP + product(scores_LL, u_LP, "nn")))
        S_NPH[n] = keep_1H * S_NPH[n] + product(u_LP, put_LH, "tn")
    blocks.values.write(o_ref, 0, o)
    finish(S_NPH, last_NHP)


def backward(rule, blocks, *refs):
    flags_1L, q_ref, k_ref, v_ref, g_ref, beta_8L, do_ref, states_NPH, inverses_NLL, dlast_NHP, *outputs, dS_NPH = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbeta_8L, dS_NHP = outputs
    start(dS_NPH, dlast_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product
    beta_L8 = _columns(flags_1L, beta_8L)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)

    def head(q_LH, k_LH, n):
        v_LP, do_LP = (tokens.clear(blocks.values.read(ref, n)) for ref in (v_ref, do_ref))
        beta_L1, inverse_LL = beta_L8[:, n : n + 1], inverses_NLL[n].astype(jnp.float32)
        decays = tokens.decays(blocks.decays.read(g_ref, n))
        S_PH, dS_PH = states_NPH[n].astype(jnp.float32), dS_NPH[n]
        w_LH = beta_L1 * k_LH
        reads_q_LH, reads_k_LH = q_LH * decays.reads, k_LH * decays.reads
        # 1. What the forward pass knew. Rows of scoresT are what is read, columns the readers.
        x_LP = v_LP - product(reads_k_LH, S_PH, "nt")
        u_LP = rule.accurate(inverse_LL, x_LP, "nn", jnp.abs(x_LP))
        levels, found = {}, {}
        for m, d_LH in decays.levels.items():
            to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
            w = take(w_LH, m, FIRST) * of
            q, k = (fill(take(x_LH, m, SECOND) * to, m, SECOND) for x_LH in (q_LH, k_LH))
            levels[m] = to, of, q, k, fill(w, m, FIRST)
            found[m] = product(w, q, "nt")
        scoresT_LL = pairs.gather(found, jnp.sum(q_LH * w_LH, axis=1, keepdims=True), FIRST)
        # 2. The gradients of the errors and, through the triangular system, of v; what k reads has that of -v.
        du_LP = product(scoresT_LL, do_LP, "nn") + product(w_LH * decays.writes, dS_PH, "nt")
        dv_LP = rule.accurate(inverse_LL, du_LP, "tn", jnp.abs(du_LP))
        dreads = stack(do_LP, -dv_LP)
        # 3. Through the states: what the chunk reads, what it leaves, what it keeps.
        dq_far, dk_far = (decays.reads * d_LH for d_LH in halves(product(dreads, S_PH, "nn")))
        dput_LH = decays.writes * product(u_LP, dS_PH, "nn")
        dg_LH = decays.keep_1H * jnp.sum(S_PH * dS_PH, axis=0, keepdims=True)
        dg_LH += product(pairs.earlier(), w_LH * dput_LH, "nn")
        if rule.exact:
            dg_LH += product(pairs.later(CHUNK), q_LH * dq_far + k_LH * dk_far, "nn")
        dS_NPH[n] = decays.keep_1H * dS_PH + product(dreads, stack(reads_q_LH, reads_k_LH), "tn")
        # 4. Within the chunk. As in linear attention, what close tokens add to dg is summed by itself.
        dqw_LL, dkw_LL = halves(product(dreads, u_LP, "nt"))
        dqwT_LL, dkwT_LL = dqw_LL.T, dkw_LL.T
        dq_near, dk_near, dw_near, dw_far = (jnp.zeros_like(k_LH) for _ in range(4))
        for m, (to, of, q, k, w) in levels.items():
            of_scores = stack(pairs.pick(dqw_LL, m, SECOND), pairs.pick(dkw_LL, m, SECOND))
            dq, dk = (to * d for d in halves(product(of_scores, w, "nn")))
            of_q, of_k = (pairs.pick(x_LL, m, FIRST) for x_LL in (dqwT_LL, dkwT_LL))
            if m < 8:
                dw = of * product(beside(of_q, of_k), stack(q, k), "nn")
                dq_near, dk_near = add(dq_near, dq, m, SECOND), add(dk_near, dk, m, SECOND)
                dw_near = add(dw_near, dw, m, FIRST)
            else:  # readers are in second blocks: those of k move to the first ones, and one product takes both
                of_scores = of_q + pltpu.roll(of_k, CHUNK - m, 1)
                dw = of * product(of_scores, join([take(k, m, SECOND), take(q, m, SECOND)], m), "nn")
                dq_far, dk_far = add(dq_far, dq, m, SECOND), add(dk_far, dk, m, SECOND)
                dw_far = add(dw_far, dw, m, FIRST)
            if rule.exact:  # without differences, as in `common/decays.py`
                rows = take(q_LH, m, SECOND) * dq + take(k_LH, m, SECOND) * dk
                columns = take(w_LH, m, FIRST) * dw
                dg_LH += product(pairs.spans(m), fill(rows, m, SECOND) + fill(columns, m, FIRST), "nn")
        if not rule.exact:
            dg_LH += product(pairs.later(8), q_LH * dq_near + k_LH * dk_near - w_LH * dw_near, "nn")
            dg_LH += product(pairs.later(CHUNK), q_LH * dq_far + k_LH * dk_far - w_LH * dw_far, "nn")
        # 5. Together.
        own_L1 = jnp.sum(do_LP * u_LP, axis=1, keepdims=True)
        dq_LH = dq_near + dq_far + own_L1 * w_LH
        dw_LH = dw_near + dw_far + dput_LH + own_L1 * q_LH
        dk_LH, dbeta_L1 = dk_near + dk_far + beta_L1 * dw_LH, jnp.sum(dw_LH * k_LH, axis=1, keepdims=True)
        if rule.exact:
            # That of what is written, beta u, is dv / beta: exact for large beta, where dw is a sum that may cancel.
            large_L1 = jnp.sum(dv_LP * u_LP, axis=1, keepdims=True) / jnp.maximum(beta_L1, 0.5)
            dbeta_L1 = jnp.where(beta_L1 > 0.5, large_L1, dbeta_L1)
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
