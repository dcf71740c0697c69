"""The TPU kernels with one decay per head and token; `tpu_scalar.py` says how they divide the work.

What lies along lanes and what along sublanes decides what a kernel costs. Forward, pairs are [reader, written]: a
reader's log is needed as a column, which takes one transposition for all heads and a broadcast over lanes for each.
Backward, pairs are [written, reader] and dq is computed transposed: but for one transposition of q, k and dq per key
head, all products are of the kinds that the matrix unit takes, and sums over what a token reads run over sublanes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import walk
from pallas_kernels.common.gates import Gates
from pallas_kernels.common.head_blocks import Blocks
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK


@dataclasses.dataclass(frozen=True)
class Rule(walk.Rule):
    before: bool
    """Tokens read before they decay and write."""

    def gates(self, logs_ref, documents_ref, chunk: slice) -> Gates:
        logs = [logs_ref[x, :, chunk] for x in range(logs_ref.shape[0])]
        num_parts = len(logs) // (1 + self.before)
        return Gates(logs[:num_parts], documents_ref[:, chunk], logs[num_parts:] or None)


def chunks(length: int) -> list[slice]:
    """Returns the chunks of a grid step."""
    return [slice(start, start + CHUNK) for start in range(0, length, CHUNK)]


def _advance(rule, blocks, gates, chunk, k_ref, v_ref, old_NHP, new_NHP):
    """Stores the states after a chunk."""
    for key, heads in (pair for unit in blocks.units for pair in unit):
        k_HL = gates.clear(blocks.keys.read(k_ref, key, chunk)).T
        for n in heads:
            v_LP = gates.clear(blocks.values.read(v_ref, n, chunk))
            new_NHP[n] = gates.keep[n : n + 1] * old_NHP[n] + rule.product(k_HL * gates.writes[n : n + 1], v_LP)


def forward(rule: Rule, blocks: Blocks, documents_ref, logs_ref, q_ref, k_ref, v_ref, start_NHP, o_ref, S_NHP):
    @pl.when(pl.program_id(2) == 0)
    def _first_step():
        S_NHP[...] = start_NHP[...]

    product, rounded = rule.product, rule.rounded
    for chunk in chunks(blocks.length):
        gates = rule.gates(logs_ref, documents_ref, chunk)
        limit_LL, _ = gates.limit(readers_first=True)
        # First the products that need no decay: they keep the matrix units busy while the decays are made.
        k_HL, scores_LL, reads_LP = {}, {}, {}
        for key, heads in (pair for unit in blocks.units for pair in unit):
            q_LH = rounded(blocks.keys.read(q_ref, key, chunk))
            k_HL[key] = gates.clear(blocks.keys.read(k_ref, key, chunk)).T
            scores_LL[key] = product(q_LH, k_HL[key])
            reads_LP |= {n: product(q_LH, S_NHP[n]) for n in heads}
        for unit in blocks.units:
            o = []
            for key, n in ((key, n) for key, heads in unit for n in heads):
                v_LP = rounded(gates.clear(blocks.values.read(v_ref, n, chunk)))
                decayed_LL = scores_LL[key] * gates.pairs_LL(n, limit_LL, readers_first=True)
                o_LP = product(decayed_LL, v_LP) + gates.reads_LX(n, blocks.P) * reads_LP[n]
                o.append(gates.clear(rule.scale * o_LP))
                S_NHP[n] = gates.keep[n : n + 1] * S_NHP[n] + product(k_HL[key] * gates.writes[n : n + 1], v_LP)
            blocks.values.write(o_ref, unit[0][1][0], o, chunk)


def states(rule: Rule, blocks: Blocks, documents_ref, logs_ref, k_ref, v_ref, start_NHP, states_NHP, S_NHP):
    @pl.when(pl.program_id(2) == 0)
    def _first_step():
        S_NHP[...] = start_NHP[...]

    states_NHP[...] = S_NHP[...]
    for chunk in chunks(blocks.length):
        gates = rule.gates(logs_ref, documents_ref, chunk)
        _advance(rule, blocks, gates, chunk, k_ref, v_ref, S_NHP, S_NHP)


def backward(rule: Rule, blocks: Blocks, *refs):
    documents_ref, logs_ref, q_ref, k_ref, v_ref, do_ref, states_NHP, dlast_NHP, *outputs, dS_NHP, between_CNHP = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dstart_NHP = outputs

    @pl.when(pl.program_id(2) == 0)
    def _first_step():
        dS_NHP[...] = dlast_NHP[...]

    steps = chunks(blocks.length)
    befores = [states_NHP, *(between_CNHP.at[c] for c in range(len(steps) - 1))]
    for chunk, old_NHP, new_NHP in zip(steps, befores, befores[1:], strict=False):
        gates = rule.gates(logs_ref, documents_ref, chunk)
        _advance(rule, blocks, gates, chunk, k_ref, v_ref, old_NHP, new_NHP)
    for chunk, S_NHP in reversed(list(zip(steps, befores, strict=True))):
        gates = rule.gates(logs_ref, documents_ref, chunk)
        inputs = q_ref, k_ref, v_ref, do_ref
        dg_ref[:, chunk] = _backward_chunk(rule, blocks, gates, chunk, inputs, S_NHP, dS_NHP, dq_ref, dk_ref, dv_ref)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _last_step():
        dstart_NHP[...] = dS_NHP[...]


def _backward_chunk(rule, blocks, gates, chunk, inputs, S_NHP, dS_NHP, dq_ref, dk_ref, dv_ref):
    """Stores the gradients of q, k, v and of the state before the chunk; returns that of g, `[8, L]`."""
    q_ref, k_ref, v_ref, do_ref = inputs
    product, rounded = rule.product, rule.rounded
    limit_LL, decayed_LL = gates.limit(readers_first=False)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    head = jax.lax.broadcasted_iota(jnp.int32, (TILE, CHUNK), 0)
    columns_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    rows_NL = whole_NL = jnp.zeros((TILE, CHUNK), jnp.float32)
    for unit in blocks.units:
        dq, dk, dv = [], [], []
        for key, heads in unit:
            q_LH, k_LH = (gates.clear(blocks.keys.read(ref, key, chunk)) for ref in (q_ref, k_ref))
            q_LH = rule.scale * q_LH
            q_HL, q, k, kT = q_LH.T, rounded(q_LH), rounded(k_LH), rounded(k_LH.T)
            scores_LL = product(k, q_HL)
            dq_HL, dk_LH = jnp.zeros_like(q_HL), jnp.zeros_like(k_LH)
            for n in heads:
                v_LP, do_LP = (gates.clear(blocks.values.read(ref, n, chunk)) for ref in (v_ref, do_ref))
                v, do, dS_HP = rounded(v_LP), rounded(do_LP), dS_NHP[n]
                reads_1L, keep_11, dS = gates.reads[n : n + 1], gates.keep[n : n + 1], rounded(dS_HP)
                # 1. Within the chunk.
                pairs_LL = gates.pairs_LL(n, limit_LL, readers_first=False)
                dpairs_LL = product(v, do, "nt") * pairs_LL
                dlog_LL = jnp.where(decayed_LL, dpairs_LL * scores_LL, 0)
                dpairs = rounded(dpairs_LL)
                # 2. Through the states at the chunk's borders.
                dread_HL = reads_1L * product(S_NHP[n], do, "nt")
                put_LP = gates.writes_LX(n, blocks.P) * product(k, dS)
                dq_HL += product(kT, dpairs) + dread_HL
                dk_LH += product(dpairs, q) + gates.writes_LX(n, blocks.H) * product(v, dS, "nt")
                dv.append(product(scores_LL * pairs_LL, do) + put_LP)
                dS_NHP[n] = keep_11 * dS_HP + product(q_HL * reads_1L, do)
                # 3. The decays.
                rows_1L = jnp.sum(dlog_LL, axis=0, keepdims=True) + jnp.sum(q_HL * dread_HL, axis=0, keepdims=True)
                rows_NL = jnp.where(head == n, rows_1L, rows_NL)
                whole_NL = jnp.where(head == n, keep_11 * jnp.sum(S_NHP[n] * dS_HP, keepdims=True), whole_NL)
                for place, x_LX in enumerate((dlog_LL, v_LP * put_LP)):
                    columns_LL = jnp.where(lane == place * TILE + n, jnp.sum(x_LX, axis=1, keepdims=True), columns_LL)
            dq.append(rule.scale * dq_HL.T)
            dk.append(dk_LH)
        (key, heads), *_ = unit
        blocks.dkeys.write(dq_ref, key, dq, chunk)
        blocks.dkeys.write(dk_ref, key, dk, chunk)
        blocks.values.write(dv_ref, heads[0], dv, chunk)
    columns_XL = columns_LL.T
    return gates.gradient(rows_NL, columns_XL[:TILE], columns_XL[TILE : 2 * TILE], whole_NL)
