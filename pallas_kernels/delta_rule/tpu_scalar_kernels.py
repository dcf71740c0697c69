"""The TPU kernels with one decay per head and token; `tpu_scalar.py` says how they divide the work.

Written in terms of D, the prediction errors `v_i - (decayed state before i)^T k_i`, of which token i writes beta_i D_i:
beta then stands beside written tokens only, and each kernel has those along the axis where a vector costs least.

    (I + C beta) D = V - reads (K S) = X      C: decayed scores of k and k, strictly lower; M = (I + C beta)^-1
    O  = A beta D + reads (Q S)               A: decayed scores of q and k, lower
    S' = keep S + K^T (writes beta D)

Forward, pairs are [reader, written]. Backward, they are [written, reader], and what a token reads is computed
transposed: products then are of the kinds that the matrix unit takes, but for one transposition of M and those of q, k
and their gradients. With dS' and dS the gradients of the states after and before the chunk:

    Z  = A^T dO + writes (K dS')              the gradient of beta D
    dX = M^T (beta Z) = dV
    dS = keep dS' + Q^T (reads dO) - K^T (reads dX)
    E  = (D dO^T) A^T - (D dX^T) C^T          entry by entry; its sum over readers is a part of beta's gradient

Heads go side by side, phase by phase: while the products of one are under way, those of others are issued.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import triangular, walk
from pallas_kernels.common.accurate import rest_of_product
from pallas_kernels.common.doubling import dot
from pallas_kernels.common.gates import Gates, column
from pallas_kernels.common.head_blocks import Blocks
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, widen_lanes


class Rule(walk.Rule):
    def system(self, kk: list[jax.Array], factors_LL: jax.Array, apart_LL: jax.Array) -> list[jax.Array]:
        """Returns k k^T times factors for pairs that are two tokens, 0 for others; and its rest, as `with_rest` does.

        The errors of a system are those of what it gives, ten times over where keys are alike.
        """
        parts = [kk_LL * factors_LL for kk_LL in kk]
        if self.exact:
            parts[1] += rest_of_product(kk[0], factors_LL)
        return [jnp.where(apart_LL, part_LL, 0) for part_LL in parts]

    def solve(self, inverse_LL: jax.Array, x_LP: jax.Array, system: list[jax.Array], sides: str = "nn") -> jax.Array:
        """Returns d of (I + A) d = x."""
        d_LP = self.product(inverse_LL, x_LP)
        if self.exact:  # the inverse has errors of its own, which this corrects
            a_LL, rest_LL = system
            found_LP = x_LP - d_LP - self.accurate(a_LL, d_LP, sides, jnp.abs(d_LP))
            found_LP -= self.product(rest_LL, d_LP, sides)
            d_LP += self.product(inverse_LL, found_LP)
        return d_LP


def forward(rule: Rule, blocks: Blocks, *refs):
    documents_1L, gates_ref, q_ref, k_ref, v_ref, start_NHP, o_ref, last_NHP, *kept, S_NHP = refs

    @pl.when(pl.program_id(2) == 0)
    def _first():
        S_NHP[...] = start_NHP[...]

    if kept:
        kept[0][...] = S_NHP[...].astype(kept[0].dtype)
    *logs, beta_NL = (gates_ref[x] for x in range(gates_ref.shape[0]))
    gates, product = Gates(logs, documents_1L[...]), rule.product
    limit_LL, apart_LL = gates.limit(readers_first=True)
    # 1. Scores, and what the state holds.
    qk_LL, kk, q_reads, k_reads, written, systems = {}, {}, {}, {}, {}, []
    for key, heads in (pair for unit in blocks.units for pair in unit):
        q_LH, k_LH = blocks.keys.read(q_ref, key), gates.clear(blocks.keys.read(k_ref, key))
        k_HL, both = k_LH.T, rule.rounded(jnp.concatenate([q_LH, k_LH]))
        scores = product(both, k_HL)
        of_keys = rule.with_rest(k_LH, k_LH) if rule.exact else [scores[CHUNK:]]
        for n in heads:
            qk_LL[n], kk[n], written[n] = scores[:CHUNK], of_keys, k_HL
            reads = product(both, S_NHP[n])
            q_reads[n], k_reads[n] = reads[:CHUNK], reads[CHUNK:]
    # 2. The systems.
    for n in range(blocks.size):
        pairs_LL = gates.pairs_LL(n, limit_LL, readers_first=True) * beta_NL[n : n + 1]
        systems.append(rule.system(kk[n], pairs_LL, apart_LL))
        qk_LL[n] = rule.rounded(qk_LL[n] * pairs_LL)
    # 3. Their inverses.
    inverses = [rule.rounded(x_LL) for x_LL in triangular.inverses([a_LL for a_LL, *_ in systems], rule.exact)]
    # 4. What tokens write, what they read, and the state after them.
    for unit in blocks.units:
        o = []
        for n in (n for _, heads in unit for n in heads):
            if kept:
                kept[1][n] = inverses[n]
            reads_LP = gates.reads_LX(n, blocks.P)
            x_LP = gates.clear(blocks.values.read(v_ref, n)) - reads_LP * k_reads[n]
            d_LP = rule.rounded(rule.solve(inverses[n], x_LP, systems[n]))
            o.append(rule.scale * gates.clear(product(qk_LL[n], d_LP) + reads_LP * q_reads[n]))
            writes_1L = gates.writes[n : n + 1] * beta_NL[n : n + 1]
            S_NHP[n] = gates.keep[n : n + 1] * S_NHP[n] + product(written[n] * writes_1L, d_LP)
        blocks.values.write(o_ref, unit[0][1][0], o)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _last():
        last_NHP[...] = S_NHP[...]


def backward(rule: Rule, blocks: Blocks, *refs):
    documents_1L, gates_ref, q_ref, k_ref, v_ref, do_ref, states_NHP, inverse_NLL, dlast_NHP, *outputs, dS_NHP = refs
    dq_ref, dk_ref, dv_ref, dgates_ref, dstart_NHP = outputs

    @pl.when(pl.program_id(2) == 0)
    def _first():
        dS_NHP[...] = dlast_NHP[...]

    *logs, beta_NL = (gates_ref[x] for x in range(gates_ref.shape[0]))
    gates, beta_LN = Gates(logs, documents_1L[...]), beta_NL.T
    product, rounded = rule.product, rule.rounded
    limit_LL, apart_LL = gates.limit(readers_first=False)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    reader, token = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0), lane
    columns_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    for unit in blocks.units:
        dq, dk, dv = [], [], []
        for key, heads in unit:
            q_LH, k_LH = (gates.clear(blocks.keys.read(ref, key)) for ref in (q_ref, k_ref))
            q_LH = rule.scale * q_LH
            q_HL, k_HL = q_LH.T, k_LH.T
            q, k, kT = rounded(q_LH), rounded(k_LH), rounded(k_HL)
            qkT_LL, kk = rule.accurate(k, rounded(q_HL), "nn"), rule.with_rest(k, k)
            dqT_HL, dkT_HL, dk_LH = jnp.zeros_like(q_HL), jnp.zeros_like(k_HL), jnp.zeros_like(k_LH)
            for n in heads:
                v_LP, do_LP = (gates.clear(blocks.values.read(ref, n)) for ref in (v_ref, do_ref))
                do, S, dS_HP, inverse_LL = rounded(do_LP), rounded(states_NHP[n]), dS_NHP[n], inverse_NLL[n]
                dS = rounded(dS_HP)
                beta_LL = column(beta_LN, n)
                reads_1L, keep_11 = gates.reads[n : n + 1], gates.keep[n : n + 1]
                # 1. What the forward pass knew.
                pairs_LL = gates.pairs_LL(n, limit_LL, readers_first=False)
                a_LL, c_LL = qkT_LL * pairs_LL, jnp.where(apart_LL, kk[0] * pairs_LL, 0)
                x_LP = v_LP - gates.reads_LX(n, blocks.P) * product(k, S)
                system = rule.system(kk, pairs_LL * beta_LL, apart_LL)
                d_LP = rule.solve(inverse_LL, x_LP, system, "tn")
                d = rounded(d_LP)
                # 2. Through what tokens write, and the system.
                put_LP = gates.writes_LX(n, blocks.P) * rule.accurate(k, dS)
                z_LP = product(a_LL, do) + put_LP
                dd_LP = widen_lanes(beta_LL, blocks.P) * z_LP
                dx_LP = rule.solve(inverse_LL.T, dd_LP, system)
                dx = rounded(dx_LP)
                dbeta_L1 = jnp.sum(d_LP * (z_LP - product(c_LL, dx)), axis=1, keepdims=True)
                # 3. Within the chunk.
                da_LL, dc_LL = rule.accurate(d, do, "nt"), -rule.accurate(d, dx, "nt")
                e_LL = da_LL * a_LL + dc_LL * c_LL
                pairs_LL *= beta_LL
                dqk, dkk = rounded(da_LL * pairs_LL), rounded(jnp.where(apart_LL, dc_LL * pairs_LL, 0))
                # 4. Through the states at the chunk's borders.
                dread_q_HL, dread_k_HL = reads_1L * rule.accurate(S, do, "nt"), -reads_1L * rule.accurate(S, dx, "nt")
                writes_LH = gates.writes_LX(n, blocks.H) * widen_lanes(beta_LL, blocks.H)
                dqT_HL += product(kT, dqk) + dread_q_HL
                dkT_HL += product(kT, dkk) + dread_k_HL
                dk_LH += product(dqk, q) + product(dkk, k) + writes_LH * product(d, dS, "nt")
                dS_NHP[n] = keep_11 * dS_HP + product(q_HL * reads_1L, do) - product(k_HL * reads_1L, dx)
                dv.append(dx_LP)
                # 5. The decays, and beta.
                rows_1L = jnp.sum(q_HL * dread_q_HL + k_HL * dread_k_HL, axis=0, keepdims=True)
                whole_1L = keep_11 * jnp.sum(states_NHP[n].astype(jnp.float32) * dS_HP, keepdims=True)
                if rule.exact:  # the pairs that span a token, as in `common/decays.py`
                    later_LL = rule.accurate(beta_LL * e_LL, jnp.where(reader >= token, 1.0, 0.0))
                    whole_1L += jnp.sum(jnp.where(reader < token, later_LL, 0), axis=0, keepdims=True)
                    e_LL = jnp.zeros_like(e_LL)
                else:
                    rows_1L += jnp.sum(beta_LL * e_LL, axis=0, keepdims=True)
                e_L1, put_L1 = (jnp.sum(x, axis=1, keepdims=True) for x in (e_LL, d_LP * put_LP))
                for place, column_L1 in enumerate((e_L1, put_L1, dbeta_L1)):
                    columns_LL = jnp.where(lane == place * TILE + n, column_L1, columns_LL)
                dgates_ref[0, n : n + 1] = rows_1L
                dgates_ref[1, n : n + 1] = jnp.broadcast_to(whole_1L, (1, CHUNK))
            dq.append(rule.scale * dqT_HL.T)
            dk.append(dk_LH + dkT_HL.T)
        (key, heads), *_ = unit
        blocks.dkeys.write(dq_ref, key, dq)
        blocks.dkeys.write(dk_ref, key, dk)
        blocks.values.write(dv_ref, heads[0], dv)
    e_NL, put_NL, dbeta_NL = columns_LL.T[: 3 * TILE].reshape(3, TILE, CHUNK)
    later_NL = dgates_ref[0] - beta_NL * e_NL
    dg_NL = dot(later_NL, jnp.where(reader >= token, 1.0, 0.0), "nn", exact=True) + dgates_ref[1]
    dg_NL += dot(beta_NL * put_NL, jnp.where(reader < token, 1.0, 0.0), "nn", exact=True)
    dgates_ref[0] = jnp.where(documents_1L[...] >= 0, dg_NL, 0)
    dgates_ref[1] = dbeta_NL

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _last():
        dstart_NHP[...] = dS_NHP[...]
