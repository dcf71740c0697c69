"""Floating-point operations of training, from the model itself, and what devices can do at most."""

import math

import jax
from flax import nnx

from efficient_lm.model import LanguageModel

# Dense bfloat16 operations per second of one device, by the kind that JAX reports, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def training_flops_per_token(model: LanguageModel, seq_len: int) -> float:
    """Returns the operations of one token forward and backward, in rows of `seq_len` tokens of one document.

    Products with weights count 2 operations per weight, what mixers do beside them as they say; the backward pass
    costs twice the forward pass. What is computed again to save memory does not count.
    """
    weights = active_weights(model)
    mixing = sum(block.mixer.flops_per_token(seq_len) for block in [*model.prefix, *model.tail])
    mixing += model.cfg.num_periods * sum(block.mixer.flops_per_token(seq_len) for block in model.periods)
    mixing += sum(called.calls * called.attention.flops_per_token(seq_len) for called in model.called.values())
    return 3.0 * (2.0 * weights + mixing)


def active_weights(model: LanguageModel) -> float:
    """Returns how many weights a token is multiplied with; of experts, those of its own."""
    weights = 0.0
    for variable in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        metadata = variable.get_metadata()
        if metadata.get("contracted"):
            weights += math.prod(variable.shape) * metadata.get("share", 1.0)
    if model.head is None:  # The tied embedding is the head's matrix too.
        weights += math.prod(model.embedding.shape)
    return weights


def peak_flops() -> float | None:
    """Returns what all devices together can do per second; None where it is not known, as on a CPU."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
