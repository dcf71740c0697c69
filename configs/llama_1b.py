"""Llama at 1 B, the baseline of the hybrids of its size (arXiv 2510.04800, table 8).

1.24 B parameters: 0.97 B in 16 blocks, 0.26 B in the tied embedding of 128 k tokens; 2 M tokens a step, 60 B in all.
Meshes: data=256 on v5e:16x16, data=8 on h100:8 with --grad-accumulation 8.
"""

import llama_350m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import AttentionConfig


def config() -> TrainConfig:
    mixer = AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=64, rotary=llama_350m.ROTARY)
    return llama_350m.config(mixer, d_model=2048, d_ff=8192, num_layers=16, learning_rate=6e-4)
