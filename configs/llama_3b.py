"""Llama at 3 B, the baseline of the hybrids of its size (arXiv 2510.04800, table 8).

3.17 B parameters: 2.78 B in 28 blocks, 0.39 B in the tied embedding of 128 k tokens; 2 M tokens a step, 60 B in all.
Meshes: data=64 on v5p:4x4x4, data=8 on h100:8 with --grad-accumulation 16.
"""

import llama_350m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import AttentionConfig


def config() -> TrainConfig:
    mixer = AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=96, rotary=llama_350m.ROTARY)
    return llama_350m.config(mixer, d_model=3072, d_ff=8192, num_layers=28, learning_rate=3e-4)
