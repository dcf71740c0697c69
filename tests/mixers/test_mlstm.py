"""The recurrence of the mLSTM by itself, and what keeps its exponential gates from overflowing."""

import pathlib

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.mixers import MLSTMConfig
from efficient_lm.mixers.mlstm import mlstm


class OpenGates(MLSTMConfig):
    """Input gates far above one, which they are not when training starts."""

    def build(self, d_model, *, rngs):
        mixer = super().build(d_model, rngs=rngs)
        mixer.input_bias[...] = jnp.full_like(mixer.input_bias[...], 5.0)
        for proj in (mixer.input_proj, mixer.forget_proj):
            proj.kernel[...] *= 6.0
        return mixer


PROMISES = (
    contract.cut_packed,
    contract.future_does_not_leak,
    contract.packed_equals_separate,
    contract.bfloat16_is_close,
    contract.extremes_are_finite,
)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise_with_open_gates(promise):
    promise(OpenGates(num_heads=2, key_dim=8, value_dim=16, gate_soft_cap=None))


def definition(q_TH, k_TH, v_TP, i_T, log_f_T):
    """One head's recurrence with nothing to stabilize it, in float64."""
    S_HP, n_H = np.zeros((q_TH.shape[1], v_TP.shape[1])), np.zeros(q_TH.shape[1])
    for q_H, k_H, v_P, keep, write in zip(q_TH, k_TH, v_TP, np.exp(log_f_T), np.exp(i_T), strict=True):
        S_HP, n_H = keep * S_HP + write * np.outer(k_H, v_P), keep * n_H + write * k_H
        yield S_HP.T @ q_H / max(abs(n_H @ q_H), 1)


T = 3000
t_T = np.arange(T)
GATES = {
    # One memory that fades over thousands of tokens, m with it, while now and then another joins it.
    "fading": lambda rng: (
        np.select([t_T == 5, t_T % 500 == 0], [20.0, 19 - 0.0013 * t_T], -8.0),
        np.full(T, -0.0013),
    ),
    "open": lambda rng: (rng.normal(size=T) * 20, -np.abs(rng.normal(size=T)) * 0.1),
    "shut": lambda rng: (rng.normal(size=T) - 20, -np.abs(rng.normal(size=T)) * 0.01),
    "forgetful": lambda rng: (rng.normal(size=T) * 20, -np.abs(rng.normal(size=T)) * 30),
}


@pytest.mark.parametrize("gates", GATES)
def test_stabilized_equals_definition(gates):
    rng, H, P = np.random.default_rng(0), 4, 3
    q_TH, k_TH, v_TP = (rng.normal(size=(T, width)).astype(np.float32) for width in (H, H, P))
    i_T, log_f_T = (x.astype(np.float32) for x in GATES[gates](rng))
    # Keys and queries that agree, so that the sum of weights does not vanish by chance.
    q_TH, k_TH = np.abs(q_TH), np.abs(k_TH)
    want_TP = np.stack(list(definition(*(x.astype(np.float64) for x in (q_TH * H**-0.5, k_TH, v_TP, i_T, log_f_T)))))
    B1N = lambda x: jnp.asarray(x)[None, :, None]
    o_BTNP, _, m_BN = jax.jit(mlstm)(*map(B1N, (q_TH, k_TH, v_TP, i_T, log_f_T)), None, None, None)
    assert np.all(m_BN >= 0)
    error = np.sqrt(np.mean((o_BTNP[0, :, 0] - want_TP) ** 2) / np.mean(want_TP**2))
    assert error < 1e-5


def test_cell_equals_transformers():
    file = np.load(pathlib.Path(__file__).parent.parent / "golden" / "mlstm_cell.npz")
    part = lambda kind, names: {name: file[f"{kind}.{name}"] for name in names}
    want, want_grads = part("out", "oSn"), part("grad", "qkvifSn")

    @jax.jit
    def run(inputs, cotangents):
        def cell(q, k, v, i, f, S, n):
            S = jnp.concatenate([S, n[..., None]], axis=-1)
            o, S, m = mlstm(q, k, v, i, jax.nn.log_sigmoid(f), S, jnp.float32(file["in.m"]), None)
            S = S * jnp.exp(m)[..., None, None]
            return {"o": o, "S": S[..., :-1], "n": S[..., -1]}

        outputs, vjp = jax.vjp(lambda inputs: cell(**inputs), inputs)
        return outputs, vjp(cotangents)[0]

    outputs, grads = run(part("in", want_grads), part("cotangent", want))
    contract.assert_close(outputs, want, 1e-5, "output")
    contract.assert_close(grads, want_grads, 1e-5, "gradient of")
