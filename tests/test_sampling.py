"""Sampling: batches of prompts of different lengths continue as each would alone, by the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.sampling import SamplingConfig, generate
from efficient_lm.sampling.autoregressive import choose

FFN = MLPConfig(d_ff=16)
HYBRID = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={
        "M": BlockConfig(mixer=GatedDeltaNetConfig(num_heads=2, key_dim=8, value_dim=8), ffn=FFN),
        "A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8, window_size=7), ffn=FFN),
    },
    pattern="M A",
    num_periods=2,
    dtype="float32",
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: HYBRID.build(rngs=nnx.Rngs(0)))()


def run(model, cfg, prompts=PROMPTS, **rest):
    return np.concatenate(list(generate(model, prompts, jax.random.key(0), cfg, **rest)), axis=1)


def test_greedy_continues_as_the_full_forward_pass_says(model):
    new = run(model, SamplingConfig(max_tokens=10, temperature=0.0), tokens_at_once=4)
    assert new.shape == (3, 10)
    # Rows padded on the right: what is to come cannot change the logits before it.
    full = jax.jit(lambda tokens: model(tokens)[0])
    rows = np.zeros((3, 16), np.int32)
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, new, strict=True)):
        rows[row, : len(prompt) + 10] = [*prompt, *continuation]
    logits = np.asarray(full(rows))
    for row, prompt in enumerate(PROMPTS):
        want = logits[row, len(prompt) - 1 : len(prompt) + 9].argmax(-1)
        assert new[row].tolist() == want.tolist()


def test_logits_of_decoding_are_those_of_the_full_pass(model):
    tokens = jax.random.randint(jax.random.key(3), (2, 11), 0, 32)
    step = jax.jit(lambda tokens, state: model(tokens, state))
    state, parts = model.init_state(2, 11), []
    for start, stop in [(0, 6), *((t, t + 1) for t in range(6, 11))]:
        logits, state = step(tokens[:, start:stop], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), model(tokens)[0], atol=1e-4)


def test_stop_tokens_end_a_row(model):
    cfg = SamplingConfig(max_tokens=12, temperature=0.0)
    free = run(model, cfg)
    stop = int(free[0, 3])
    new = run(model, cfg, stop_tokens=[stop])
    end = free[0].tolist().index(stop)
    assert new[0].tolist()[: end + 1] == free[0].tolist()[: end + 1]
    assert set(new[0].tolist()[end + 1 :]) <= {-1}


def test_a_key_gives_the_same_sample_again(model):
    cfg = SamplingConfig(max_tokens=8, temperature=1.0)
    assert run(model, cfg).tolist() == run(model, cfg).tolist()


def test_choices_follow_temperature_top_k_and_top_p():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities))[None], (4000, 1))

    def frequencies(**settings):
        tokens = choose(logits, jax.random.key(0), SamplingConfig(**settings))
        return np.bincount(tokens, minlength=4) / 4000

    # Four standard deviations of 4000 draws.
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=4 * 0.5 / 4000**0.5)
    close(frequencies(), probabilities)
    close(frequencies(top_k=2), [0.625, 0.375, 0, 0])
    close(frequencies(top_p=0.79), [0.625, 0.375, 0, 0])
    close(frequencies(top_p=0.01), [1, 0, 0, 0])
    close(frequencies(temperature=0.5), probabilities**2 / np.sum(probabilities**2))
    assert frequencies(temperature=0.0)[0] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": -1.0}, "temperature=-1"), ({"top_k": 0}, "top_k=0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_bad_prompts(model):
    with pytest.raises(ValueError, match="at least one token"):
        run(model, SamplingConfig(), prompts=[[]])
    with pytest.raises(ValueError, match=r"token 32.*0\.\.31"):
        run(model, SamplingConfig(), prompts=[[32]])
