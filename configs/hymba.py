"""Hymba-1.5B: attention and Mamba side by side in 32 layers, behind 128 meta tokens (arXiv 2411.13676).

1.55 B parameters. The first, middle and last layer see all, the others 1024 tokens and the meta tokens. Sizes and
rotation are verified, in copies of its published configuration and code: they make its 1.52 B where neighbouring layers
share keys and values, as these do not. The mean of two mixers is a sum here: scales can hold the half. Its code has
windows of 1025 (training) and 1024 (decoding): here, 1024. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, MambaConfig, ParallelMixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, K, W, M, half = (1600, 5504, 32_001, 25, 5, 1024, 128, 15)
    if size == "test":
        D, F, V, N, K, W, M, half = (64, 96, 256, 4, 2, 16, 4, 2)
    H = D // N
    rotary = RotaryConfig(theta=10_000 * 7 ** (H / (H - 2)))  # Stretched from 2048 tokens to 8192 ("ntk").
    full = AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, value_dim=2 * H, rotary=rotary)
    window = dataclasses.replace(full, window_size=W, sink_tokens=M)
    mamba = MambaConfig(d_inner=2 * D, dt_rank=D // 16, inner_norms=True)
    both = {"second": mamba, "scale": "vector", "fusion": "add", "joint_projection": True}
    mixers = {"F": ParallelMixerConfig(first=full, **both), "W": ParallelMixerConfig(first=window, **both)}
    blocks = {letter: BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=F)) for letter, mixer in mixers.items()}
    walk = {"prefix": " ".join("F" + "W" * (half - 1) + "F"), "pattern": "W", "num_periods": half, "tail": "F"}
    model = ModelConfig(vocab_size=V, d_model=D, blocks=blocks, **walk, meta_tokens=M)
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
