"""Experts against every expert on every token, for any load; and what devices of the expert axis send each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import exchange as exchange_module
from efficient_lm.ffns.exchange import exchange
from efficient_lm.ffns.experts import Experts
from efficient_lm.sharding import make_mesh, shard

B, T, D, E, K = 8, 6, 16, 8, 3


def choices(load: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    different = np.argsort(rng.random((B, T, E)), axis=-1)[..., :K]
    return {
        "random": different,
        "one expert": np.full((B, T, K), 5),
        "empty experts": np.where(different < 3, 7, different % 2),
        "none": np.full((B, T, K), E),
        "some none": np.where(rng.random((B, T, K)) < 0.5, E, different),
    }[load].astype(np.int32)


def sorted_form(experts, x, ids, weights):
    return experts.chosen(x, ids, weights)[0]


def dense_form(experts, x_BTD, ids_BTK, weights_BTK):
    """The definition: all experts on all tokens, most of it for nothing."""
    up_EDF, gate_EDF, down_EFD = experts.up_proj[...], experts.gate_proj[...], experts.down_proj[...]
    every = lambda w_EDF: jnp.einsum("BTD,EDF->BTEF", x_BTD, w_EDF)
    y_BTED = jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(every(gate_EDF)) * every(up_EDF), down_EFD)
    weights_BTE = jnp.sum(jnp.where(ids_BTK[..., None] == jnp.arange(E), weights_BTK[..., None], 0.0), axis=2)
    return jnp.einsum("BTED,BTE->BTD", y_BTED, weights_BTE)


def run(form, load):
    """Returns the outputs, and the gradients of the weights, the inputs and the experts' shares."""
    build = lambda: Experts(d_model=D, d_ff=12, num_experts=E, activation="swiglu", share=K / E, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, weights, dy = (shard(jnp.asarray(normal(B, T, width)), "BT.") for width in (D, K, D))
    ids = shard(jnp.asarray(choices(load)), "BT.")

    @jax.jit
    def outputs(experts, x, weights, ids, dy):
        y, pull = jax.vjp(lambda experts, x, weights: form(experts, x, ids, weights), experts, x, weights)
        return y, pull(dy)

    return jax.device_get(outputs(jax.jit(build)(), x, weights, ids, dy))


def assert_close(got, want, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        error = np.sqrt(np.mean((a - b) ** 2))
        assert error <= tolerance * max(np.sqrt(np.mean(b**2)), 1e-3), f"{error:.1e}"


@pytest.mark.parametrize("load", ["random", "one expert", "empty experts", "none", "some none"])
def test_dropless_equals_dense(load):
    assert_close(run(sorted_form, load), run(dense_form, load))


@pytest.mark.parametrize("load", ["random", "one expert", "some none"])
def test_on_devices_of_their_own(load):
    want = run(dense_form, load)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        assert_close(run(sorted_form, load), want)


def test_without_room_the_last_stay_away():
    """With room for as many rows as each device sends, and all rows for one device, those of the first one get in."""
    build = lambda: Experts(
        d_model=D, d_ff=12, num_experts=E, activation="swiglu", share=K / E, room=1.0, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.normal(size=(B, T, width)), jnp.float32) for width in (D, K))
    ids = jnp.asarray(choices("one expert"))
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        run = jax.jit(lambda experts, *args: experts.chosen(*args))
        y, aux = jax.device_get(run(jax.jit(build)(), *(shard(a, "BT.") for a in (x, ids, weights))))
    np.testing.assert_allclose(aux["dropped"], 0.75, rtol=1e-6)
    want = np.asarray(jax.jit(dense_form)(jax.jit(build)(), x, ids, weights))
    # Each of eight devices has a row of the batch; the first of the expert axis are rows 0 and 4.
    np.testing.assert_allclose(y[::4], want[::4], atol=1e-5)
    assert not np.any(np.delete(y, [0, 4], axis=0))


def emulated_ragged_all_to_all(x, output, from_Q, send_Q, to_Q, receive_P, *, axis_name):
    """What `jax.lax.ragged_all_to_all` documents, by gathering everything: a CPU has no such collective."""
    me, num_rows = jax.lax.axis_index(axis_name), output.shape[0]
    x_PRD, from_PQ, send_PQ, to_PQ = (jax.lax.all_gather(a, axis_name) for a in (x, from_Q, send_Q, to_Q))
    for p in range(x_PRD.shape[0]):
        row_M = jnp.arange(num_rows) - to_PQ[p, me]
        is_there_M = (row_M >= 0) & (row_M < receive_P[p])
        output = jnp.where(is_there_M[:, None], x_PRD[p].at[from_PQ[p, me] + row_M].get(mode="clip"), output)
        # Both sides have to say the same.
        output = jnp.where(send_PQ[p, me] == receive_P[p], output, jnp.nan)
    return output


@pytest.mark.parametrize("load", ["random", "one expert"])
def test_ragged_form_agrees(load, monkeypatch):
    """The form of accelerators, around a collective that is put together from others."""
    want = run(dense_form, load)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr(exchange_module, "_padded", exchange_module._ragged)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        assert_close(run(sorted_form, load), want)


def test_exchange():
    """Device p sends p + q rows to device q, from the end of its own to their front; the gradient comes back."""
    P, num_rows = 8, 90
    sizes_PQ = np.add.outer(np.arange(P), np.arange(P)).astype(np.int32)
    from_PQ = (num_rows - np.cumsum(sizes_PQ, axis=1)).astype(np.int32)
    to_PQ = (np.cumsum(sizes_PQ, axis=0) - sizes_PQ).astype(np.int32)
    rows = np.arange(P * num_rows, dtype=np.float32)[:, None]
    with jax.set_mesh(make_mesh({"expert": P})):
        spec = jax.P("expert")
        move = lambda x: exchange(
            "expert", num_rows, x, jnp.asarray(sizes_PQ), jnp.asarray(from_PQ), jnp.asarray(to_PQ)
        )
        moved = jax.shard_map(move, in_specs=spec, out_specs=spec, check_vma=False)
        got, pull = jax.vjp(jax.jit(moved), jax.reshard(rows, spec))
        (back,) = pull(got)
    want, sent = np.zeros((P, num_rows)), np.zeros((P, num_rows))
    for p in range(P):
        for q in range(P):
            taken = slice(from_PQ[p, q], from_PQ[p, q] + sizes_PQ[p, q])
            want[q, to_PQ[p, q] : to_PQ[p, q] + sizes_PQ[p, q]] = rows.reshape(P, num_rows)[p, taken]
            sent[p, taken] = rows.reshape(P, num_rows)[p, taken]
    np.testing.assert_array_equal(np.asarray(got).reshape(P, num_rows), want)
    np.testing.assert_array_equal(np.asarray(back).reshape(P, num_rows), sent)
