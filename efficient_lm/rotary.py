"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the positions it turns by."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.sharding import per_shard
from pallas_kernels.common.documents import fill_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Stretches the slow rotations to contexts longer than the model was trained on, as Llama 3.1 does."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_len: int = 8192

    def __call__(self, frequencies: Float[Array, "R"], theta: float) -> Float[Array, "R"]:
        del theta
        # How often each rotation turned within the original context decides: often is kept, seldom is stretched.
        turns = self.original_max_len * frequencies / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        keep = jnp.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Stretches the slow rotations, and sharpens the softmax that they become softer by (arXiv 2309.00071)."""

    factor: float
    """Contexts become this many times as long."""
    original_max_len: int
    fast_turns: float = 32.0
    """Rotations that turn at least so often within the original context are kept."""
    slow_turns: float = 1.0
    """Rotations that turn at most so often are stretched by the whole factor."""
    round_borders: bool = True
    """Where the stretching begins and ends is rounded to a whole pair of channels; gpt-oss does not."""
    amplitude: float | None = None
    """Rotated channels are multiplied by it; None: 0.1 * log(factor) + 1, as in the paper. DeepSeek's models have 1."""

    def __call__(self, frequencies: Float[Array, "R"], theta: float) -> Float[Array, "R"]:
        R = frequencies.shape[0]
        pair = lambda turns: R * math.log(self.original_max_len / (2 * math.pi * turns)) / math.log(theta)
        first, last = pair(self.fast_turns), pair(self.slow_turns)
        if self.round_borders:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * R - 1)
        keep = 1 - jnp.clip((jnp.arange(R) - first) / max(last - first, 1e-3), 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    theta: float = 10_000.0
    """Base of the wavelengths."""
    fraction: float = 1.0
    """Share of each head's width that is rotated; the rest carries no position."""
    scaling: Llama3Scaling | YarnScaling | None = None


def rotate(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], cfg: RotaryConfig) -> Float[Array, "B T N H"]:
    """Turns pairs (i, i + R/2) of the first R = fraction * H channels by angles that grow with the position."""
    R = int(x.shape[-1] * cfg.fraction)
    frequencies = cfg.theta ** (-jnp.arange(0, R, 2, dtype=jnp.float32) / R)
    if cfg.scaling is not None:
        frequencies = cfg.scaling(frequencies, cfg.theta)
    angles_BT1R = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    cos_BT1R, sin_BT1R = jnp.cos(angles_BT1R), jnp.sin(angles_BT1R)
    if isinstance(cfg.scaling, YarnScaling):
        amplitude = 0.1 * math.log(cfg.scaling.factor) + 1 if cfg.scaling.amplitude is None else cfg.scaling.amplitude
        cos_BT1R, sin_BT1R = amplitude * cos_BT1R, amplitude * sin_BT1R
    left, right = jnp.split(x[..., :R].astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_BT1R - right * sin_BT1R, right * cos_BT1R + left * sin_BT1R)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., R:]], axis=-1)


def document_positions(
    segment_ids: Int[Array, "B T"], past: Int[Array, "B"] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Returns each token's position in its document, and the length so far of each row's last document.

    `past` counts the tokens that came before of the row's first document. Padding is not counted.
    """
    past_B = jnp.zeros(segment_ids.shape[:1], jnp.int32) if past is None else past
    return per_shard(_positions, "BT,B", "BT,B", split_tokens=True)(segment_ids, past_B)


def _positions(segment_ids, past_B):
    if context.num_parts() == 1:
        return _positions_in_part(segment_ids, past_B)
    _, own_B = _positions_in_part(segment_ids, jnp.zeros_like(past_B))
    past_B, length_B = context.hand_on(own_B, jnp.ones_like(own_B), segment_ids, past_B)
    return _positions_in_part(segment_ids, past_B)[0], length_B


def _positions_in_part(segment_ids, past_B):
    if segment_ids.shape[1] == 0:
        return segment_ids, past_B
    ids_BT = fill_padding(segment_ids)
    is_first_BT = ids_BT == ids_BT[:, :1]
    starts_BT = jnp.diff(ids_BT, axis=1, prepend=ids_BT[:, :1]) != 0
    count_BT = jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32)
    # Tokens before the current document: fixed where it starts, and carried on.
    before_BT = jax.lax.cummax(jnp.where(starts_BT, count_BT - 1, 0), axis=1)
    length_BT = count_BT - before_BT + jnp.where(is_first_BT, past_B[:, None], 0)
    return jnp.maximum(length_BT - 1, 0), length_BT[:, -1]
