"""The TPU kernels of the generalized delta rule; `tpu.py` says what they compute."""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import triangular, walk
from pallas_kernels.common.doubling import (
    FIRST,
    SECOND,
    Pairs,
    add,
    beside,
    fill,
    halves,
    join,
    stack,
    take,
)
from pallas_kernels.common.walk import CHUNK, Tokens, finish, start

# Of a register.
_ROWS = 8


class Rule(walk.Rule):
    def read(self, scores: jax.Array, rest: jax.Array, written: jax.Array, sides: str) -> jax.Array:
        """Returns what is read of b u and k v together: both are large and cancel, all but a hundredth."""
        return self.accurate(scores, written, sides, jnp.abs(written)) + self.product(rest, written, sides)


def _quarters(x: jax.Array) -> list[jax.Array]:
    """Returns the products of two with two: of the first with both, then of the second."""
    return [part for half in halves(x) for part in jnp.split(half, 2, axis=1)]


# A level's product with two factors at once. They have rows in blocks of one `half`: the first keeps its place and, if
# blocks fill registers, the second is moved to the blocks of the other half, where nothing else would be.


def _pair(m: int, half: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns both factors, from the rows that `take` takes."""
    if m < _ROWS:
        return stack(x, y)
    return join([x, y] if half == FIRST else [y, x], m)


def _unpair(m: int, half: int, scores: jax.Array) -> list[jax.Array]:
    """Returns the products with each of the two, given that with their `_pair`."""
    if m < _ROWS:
        return jnp.split(scores, 2, axis=1)
    return [scores, pltpu.roll(scores, CHUNK - m if half == FIRST else m, 1)]


def _pair_columns(m: int, half: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns what to multiply a `_pair` by, for the sum of x times the first and y times the second."""
    if m < _ROWS:
        return beside(x, y)
    return x + pltpu.roll(y, m if half == FIRST else CHUNK - m, 1)


def _row_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _up(x_LX: jax.Array) -> jax.Array:
    """Moves each token's row to the token before it; the last row is zero."""
    return jnp.where(_row(x_LX) < CHUNK - 1, pltpu.roll(x_LX, CHUNK - 1, 0), 0)


def _down(x_LX: jax.Array, first: jax.Array | float = 0.0) -> jax.Array:
    """Moves each token's row to the token after it; the first row is that of `first`."""
    return jnp.where(_row(x_LX) > 0, pltpu.roll(x_LX, 1, 0), first)


def _row(x_LX: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_LX.shape, 0)


def _keys(rule, blocks, tokens, key, q_ref, k_ref, a_ref, b_ref):
    """Returns q, k, a and b of a key head. At the start of a document there is nothing to be read."""
    q_LH, k_LH, b_LH = (tokens.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref, b_ref))
    return rule.scale * q_LH, k_LH, tokens.clear_starts(blocks.keys.read(a_ref, key)), b_LH


def forward(rule, blocks, flags_1L, *refs):
    *keys, v_ref, g_ref, S_NHP, o_ref, last_NHP = refs[:9]
    *kept, S_NPH = refs[9:]
    start(S_NPH, S_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product
    systems, waiting = [], []
    # 1. All that can be known before a system is solved, of all heads: inverses are long chains of short products, and
    # take no longer for many than for one.
    for key, heads in (pair for unit in blocks.units for pair in unit):
        q_LH, k_LH, a_LH, b_LH = _keys(rule, blocks, tokens, key, *keys)
        up_LH = _up(a_LH)
        own = [_row_sum(x_LH * y_LH) for x_LH in (q_LH, up_LH) for y_LH in (b_LH, k_LH)]
        for n in heads:
            v_LP = tokens.clear(blocks.values.read(v_ref, n))
            decays, S_PH = tokens.decays(blocks.decays.read(g_ref, n)), S_NPH[n]
            # The products of q and of a with b and with k; of those with a, what float32 does not hold.
            found = [{} for _ in range(6 if rule.exact else 4)]
            for m, d_LH in decays.levels.items():
                to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
                readers = stack(*(take(x_LH, m, SECOND) * to for x_LH in (q_LH, up_LH)))
                written = _pair(m, FIRST, *(take(x_LH, m, FIRST) * of for x_LH in (b_LH, k_LH)))
                parts = [halves(scores) for scores in rule.with_rest(readers, written)]
                for i, scores in enumerate((*parts[0], *(rest for _, rest in parts[1:]))):
                    found[2 * i][m], found[2 * i + 1][m] = _unpair(m, FIRST, scores)
            qb_LL, qk_LL, ub_LL, uk_LL, *rest = (
                pairs.gather(x, of_own, SECOND) for x, of_own in itertools.zip_longest(found, own)
            )
            of_v, up_v = halves(product(stack(qk_LL, uk_LL), v_LP, "nn"))
            reads = stack(q_LH * decays.reads, a_LH * _down(decays.reads, 1.0))
            read_LP, held_LP = halves(product(reads, S_PH, "nt"))
            systems.append(-_down(ub_LL))
            of_up = [beside(ub_LL, uk_LL), beside(*rest)] if rule.exact else []
            puts = b_LH * decays.writes, k_LH * decays.writes
            sums = held_LP, held_LP + _down(up_v), read_LP + of_v
            waiting.append((n, v_LP, of_up, *sums, qb_LL, stack(*puts), decays.keep_1H))
    # 2. What is read in truth; with it all else.
    o, inverses = [], triangular.inverses(systems, rule.exact)
    for inverse_LL, (n, v_LP, of_up, held_LP, x_LP, o_LP, qb_LL, puts, keep_1H) in zip(inverses, waiting, strict=True):
        S_PH, u_LP = S_NPH[n], product(inverse_LL, x_LP, "nn")
        if rule.exact:
            read_LP = held_LP + _down(rule.read(*of_up, stack(u_LP, v_LP), "nn"))
            u_LP += product(inverse_LL, read_LP - u_LP, "nn")
        if kept:
            states_NPH, inverses_NLL = kept
            states_NPH[n], inverses_NLL[n] = S_PH.astype(states_NPH.dtype), inverse_LL.astype(inverses_NLL.dtype)
        o.append(tokens.clear(o_LP + product(qb_LL, u_LP, "nn")))
        S_NPH[n] = keep_1H * S_PH + product(stack(u_LP, v_LP), puts, "tn")
    blocks.values.write(o_ref, 0, o)
    finish(S_NPH, last_NHP)


def backward(rule, blocks, *refs):
    flags_1L, *keys, v_ref, g_ref, do_ref, states_NPH, inverses_NLL, dlast_NHP = refs[:11]
    *dkeys, dv_ref, dg_ref, dS_NHP, dS_NPH = refs[11:]
    start(dS_NPH, dlast_NHP)
    tokens, pairs, product = Tokens(rule, flags_1L[...]), Pairs(CHUNK), rule.product

    def head(q_LH, k_LH, a_LH, b_LH, n):
        v_LP, do_LP = (tokens.clear(blocks.values.read(ref, n)) for ref in (v_ref, do_ref))
        inverse_LL, decays = inverses_NLL[n].astype(jnp.float32), tokens.decays(blocks.decays.read(g_ref, n))
        S_PH, dS_PH = states_NPH[n].astype(jnp.float32), dS_NPH[n]
        up_LH, reads_a_LH = _up(a_LH), _down(decays.reads, 1.0)
        reads = stack(q_LH * decays.reads, a_LH * reads_a_LH)
        puts = stack(b_LH * decays.writes, k_LH * decays.writes)
        # 1. What the forward pass knew. Rows of scores are what is read, columns the readers.
        levels, found = {}, [{} for _ in range(8 if rule.exact else 4)]
        for m, d_LH in decays.levels.items():
            to, of = take(d_LH, m, SECOND), take(d_LH, m, FIRST)
            written = [take(x_LH, m, FIRST) * of for x_LH in (b_LH, k_LH)]
            readers = _pair(m, SECOND, *(take(x_LH, m, SECOND) * to for x_LH in (q_LH, up_LH)))
            levels[m] = to, of, readers, _pair(m, FIRST, *written)
            parts = [halves(scores) for scores in rule.with_rest(stack(*written), readers)]
            for i, scores in enumerate(half for part in parts for half in part):
                found[2 * i][m], found[2 * i + 1][m] = _unpair(m, SECOND, scores)
        own = [_row_sum(x_LH * y_LH) for x_LH, y_LH in ((q_LH, b_LH), (q_LH, k_LH), (up_LH, k_LH))]
        bq_LL, kq_LL, ku_LL = (pairs.gather(found[i], of_own, FIRST) for i, of_own in zip((0, 2, 3), own, strict=True))
        held_LP = product(a_LH * reads_a_LH, S_PH, "nt")
        u_LP = product(inverse_LL, held_LP + _down(product(ku_LL, v_LP, "tn")), "nn")
        of_up = []
        if rule.exact:  # as in the forward pass
            bu_LL = pairs.gather(found[1], _row_sum(up_LH * b_LH), FIRST)
            bu_rest, ku_rest = (pairs.gather(found[i], None, FIRST) for i in (5, 7))
            read_LP = held_LP + _down(rule.read(stack(bu_LL, ku_LL), stack(bu_rest, ku_rest), stack(u_LP, v_LP), "tn"))
            u_LP += product(inverse_LL, read_LP - u_LP, "nn")
            of_up = [bu_LL, bu_rest]
        # 2. The gradients of what is read and, through the triangular system, of what it is made of.
        from_b, from_k = halves(product(puts, dS_PH, "nt"))
        du_LP = product(bq_LL, do_LP, "nn") + from_b
        dx_LP = product(inverse_LL, du_LP, "tn")
        if rule.exact:
            dx_LP += product(inverse_LL, du_LP - dx_LP + rule.read(*of_up, _up(dx_LP), "nn"), "tn")
        dup_LP = _up(dx_LP)
        dreads, written_LP = stack(do_LP, dup_LP), stack(u_LP, v_LP)
        dv_LP = from_k + product(beside(kq_LL, ku_LL), dreads, "nn")
        # 3. Through the states: what the chunk reads, what it leaves, what it keeps.
        dq_far, da_LH = halves(product(stack(do_LP, dx_LP), S_PH, "nn"))
        dq_far, da_LH = decays.reads * dq_far, reads_a_LH * da_LH
        dup_far = _up(da_LH)
        dput_b, dput_k = (decays.writes * d_LH for d_LH in halves(product(written_LP, dS_PH, "nn")))
        dg_LH = decays.keep_1H * jnp.sum(S_PH * dS_PH, axis=0, keepdims=True)
        dg_LH += product(pairs.earlier(), b_LH * dput_b + k_LH * dput_k, "nn")
        if rule.exact:
            dg_LH += product(pairs.later(CHUNK), q_LH * dq_far + up_LH * dup_far, "nn")
        dS_NPH[n] = decays.keep_1H * dS_PH + product(stack(do_LP, dx_LP), reads, "tn")
        # 4. Within the chunk.
        dqb_LL, dqk_LL, dub_LL, duk_LL = _quarters(rule.accurate(dreads, written_LP, "nt"))
        dbq_LL, dkq_LL, dbu_LL, dku_LL = (x_LL.T for x_LL in (dqb_LL, dqk_LL, dub_LL, duk_LL))
        near = [jnp.zeros_like(q_LH) for _ in range(4)]
        far = [dq_far, dup_far, *(jnp.zeros_like(q_LH) for _ in range(2))]
        for m, (to, of, readers, written) in levels.items():
            of_scores = [
                _pair_columns(m, FIRST, *(pairs.pick(d_LL, m, SECOND) for d_LL in of_reader))
                for of_reader in ((dqb_LL, dqk_LL), (dub_LL, duk_LL))
            ]
            dq, dup = (to * d for d in halves(product(stack(*of_scores), written, "nn")))
            of_scores = [
                _pair_columns(m, SECOND, *(pairs.pick(d_LL, m, FIRST) for d_LL in of_written))
                for of_written in ((dbq_LL, dbu_LL), (dkq_LL, dku_LL))
            ]
            db, dk = (of * d for d in halves(product(stack(*of_scores), readers, "nn")))
            if rule.exact:  # without differences, as in `common/decays.py`
                rows = take(q_LH, m, SECOND) * dq + take(up_LH, m, SECOND) * dup
                columns = take(b_LH, m, FIRST) * db + take(k_LH, m, FIRST) * dk
                dg_LH += product(pairs.spans(m), fill(rows, m, SECOND) + fill(columns, m, FIRST), "nn")
            sums = near if m < _ROWS else far
            for i, (d, half) in enumerate(((dq, SECOND), (dup, SECOND), (db, FIRST), (dk, FIRST))):
                sums[i] = add(sums[i], d, m, half)
        for reach, (dq, dup, db, dk) in () if rule.exact else ((_ROWS, near), (CHUNK, far)):
            rows_LH = q_LH * dq + up_LH * dup - b_LH * db - k_LH * dk
            dg_LH += product(pairs.later(reach), rows_LH, "nn")
        # 5. Together, with what tokens read of themselves and a of the token before it.
        dq_LH, dup_LH, db_LH, dk_LH = (x + y for x, y in zip(near, far, strict=True))
        qb, qk, ub, uk = (_row_sum(d_LP * y_LP) for d_LP in (do_LP, dup_LP) for y_LP in (u_LP, v_LP))
        dq_LH += qb * b_LH + qk * k_LH
        dup_LH += ub * b_LH + uk * k_LH
        db_LH += dput_b + qb * q_LH + ub * up_LH
        dk_LH += dput_k + qk * q_LH + uk * up_LH
        da_LH = tokens.clear_starts(_down(dup_LH, da_LH))
        return rule.scale * dq_LH, dk_LH, da_LH, db_LH, tokens.clear(dv_LP), tokens.clear_starts(dg_LH)

    for unit in blocks.units:
        of_keys, dv, dg = [], [], []
        for key, heads in unit:
            of_key = _keys(rule, blocks, tokens, key, *keys)
            *dkeys_G, dv_G, dg_G = zip(*[head(*of_key, n) for n in heads], strict=True)
            of_keys.append([sum(d_G) for d_G in dkeys_G])
            dv, dg = [*dv, *dv_G], [*dg, *dg_G]
        (key, heads), *_ = unit
        for ref, d in zip(dkeys, zip(*of_keys, strict=True), strict=True):
            blocks.dkeys.write(ref, key, list(d))
        blocks.values.write(dv_ref, heads[0], dv)
        blocks.decays.write(dg_ref, heads[0], dg)
    finish(dS_NPH, dS_NHP)
