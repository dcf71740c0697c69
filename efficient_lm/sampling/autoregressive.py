"""One token after the other: prompts of different lengths in, batches of continuations out."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.model import LanguageModel, ModelState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token always."""
    top_k: int | None = None
    """Only this many of the likeliest tokens."""
    top_p: float | None = None
    """Only the likeliest tokens that together have this probability (https://arxiv.org/abs/1904.09751)."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens} must not be negative")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids of prompts of different lengths, padded on the left."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token; begin with the tokenizer's bos_id")
    length = max(len(prompt) for prompt in prompts)
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    segment_ids_BT = np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = prompt
        segment_ids_BT[row, length - len(prompt) :] = 1
    return tokens_BT, segment_ids_BT


def choose(logits: Float[Array, "B V"], key: jax.Array, cfg: SamplingConfig) -> Int[Array, "B"]:
    """Draws one token per row."""
    if cfg.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits_BV = logits / cfg.temperature
    if cfg.top_k is not None:
        kept_BK, _ = jax.lax.top_k(logits_BV, min(cfg.top_k, logits.shape[-1]))
        logits_BV = jnp.where(logits_BV < kept_BK[:, -1:], -jnp.inf, logits_BV)
    if cfg.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those likelier than it fall short of top_p; the likeliest always does.
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        smallest_B1 = jnp.min(jnp.where(before_BV < cfg.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="max_len")
def _prefill(
    model: LanguageModel, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], max_len: int
) -> tuple[Float[Array, "B V"], ModelState]:
    state = model.init_state(tokens.shape[0], max_len)
    x_BTD, state, _ = model.hidden(tokens, state, segment_ids=segment_ids)
    assert state is not None
    return model.logits(x_BTD[:, -1:])[:, 0], state


@functools.partial(jax.jit, static_argnames=("cfg", "num_tokens"), donate_argnames="state")
def _decode(
    model: LanguageModel,
    logits: Float[Array, "B V"],
    state: ModelState,
    done: Bool[Array, "B"],
    stop: Int[Array, "Z"],
    key: jax.Array,
    cfg: SamplingConfig,
    num_tokens: int,
) -> tuple[Float[Array, "B V"], ModelState, Bool[Array, "B"], Int[Array, "B T"]]:
    def one(carry, key):
        logits_BV, state, done_B = carry
        tokens_B = jnp.where(done_B, -1, choose(logits_BV, key, cfg))
        done_B = done_B | jnp.any(tokens_B[:, None] == stop, axis=-1)
        logits_BTV, new_state = model(jnp.maximum(tokens_B, 0)[:, None], state)
        assert new_state is not None
        return (logits_BTV[:, 0], new_state, done_B), tokens_B

    (logits_BV, new_state, done_B), tokens_TB = jax.lax.scan(
        one, (logits, state, done), jax.random.split(key, num_tokens)
    )
    return logits_BV, new_state, done_B, tokens_TB.T


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    cfg: SamplingConfig,
    *,
    stop_tokens: Sequence[int] = (),
    tokens_at_once: int = 16,
) -> Iterator[np.ndarray]:
    """Yields `[B, <= tokens_at_once]` new tokens at a time, as they are made.

    The model's meta tokens, if it has any, come before every prompt. A row ends with the first of `stop_tokens`, which
    is included; -1 follows it. Ends when all rows have, or after `cfg.max_tokens`.
    """
    tokens_BT, _ = pad_prompts(prompts)
    if tokens_BT.max() >= model.cfg.vocab_size:
        raise ValueError(f"a prompt has token {tokens_BT.max()}, the model knows 0..{model.cfg.vocab_size - 1}")
    tokens_BT, segment_ids_BT = pad_prompts([[*model.cfg.meta_ids, *prompt] for prompt in prompts])
    # Whole chunks only: one program serves all of them, and the last one may write past max_tokens.
    num_chunks = -(-cfg.max_tokens // tokens_at_once)
    max_len = tokens_BT.shape[1] + num_chunks * tokens_at_once
    logits_BV, state = _prefill(model, tokens_BT, segment_ids_BT, max_len)
    done_B, stop = jnp.zeros(len(prompts), bool), jnp.asarray(stop_tokens, jnp.int32)
    for chunk in range(num_chunks):
        logits_BV, state, done_B, new_BT = _decode(
            model, logits_BV, state, done_B, stop, jax.random.fold_in(key, chunk), cfg, tokens_at_once
        )
        yield np.asarray(new_BT)[:, : cfg.max_tokens - chunk * tokens_at_once]
        if bool(done_B.all()):
            return
