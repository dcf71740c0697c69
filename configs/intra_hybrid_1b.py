"""Attention and Mamba-2 side by side in two layers of thirteen, Mamba-2 in the others: the block of arXiv 2510.04800.

1.25 B parameters, of which 0.26 B are the tied embedding: each mixer has a norm and a projection of its own, and the
second is subtracted from the first. `config("test")` is the same design, tiny. The rest is llama_350m's.
"""

import dataclasses
from typing import Literal

import llama_350m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config, ParallelMixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import Llama3Scaling, RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, H, S = (2048, 8192, 128_256, 16, 72, 128) if size == "published" else (64, 96, 256, 4, 18, 16)
    rotary = RotaryConfig(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))
    # Half the heads, of queries and keys a little wider than half; values are as wide as in a layer of attention alone.
    attention = AttentionConfig(num_heads=N, num_kv_heads=N // 4, head_dim=H, value_dim=D // N, rotary=rotary)
    half = Mamba2Config(num_heads=N, key_dim=S, value_dim=2 * H)
    hybrid = ParallelMixerConfig(first=attention, second=half)
    whole = Mamba2Config(num_heads=2 * D // S, key_dim=S, value_dim=S)
    ffn = MLPConfig(d_ff=F)
    blocks = {"M": BlockConfig(mixer=whole, ffn=ffn), "H": BlockConfig(mixer=hybrid, ffn=ffn)}
    # Scattered, not in the first layer.
    model = ModelConfig(
        vocab_size=V, d_model=D, blocks=blocks, prefix="M M M M H M M M H M M M M", pattern="", num_periods=0
    )
    return dataclasses.replace(llama_350m.config(), model=model)
