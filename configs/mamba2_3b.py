"""Mamba-2 at 3 B, every mixer followed by an MLP (arXiv 2510.04800, table 8).

3.20 B parameters: 2.81 B in 21 blocks, 0.39 B in the tied embedding of 128 k tokens; 2 M tokens a step, 60 B in all.
Mesh: data=64 on v5p:4x4x4. Its one key head lies whole on every device, so there is no axis `model`.
"""

import dataclasses

import llama_3b

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import Mamba2Config
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = llama_3b.config()
    mixer, ffn = Mamba2Config(num_heads=32, key_dim=256, value_dim=192), base.model.blocks["A"].ffn
    blocks = {"M": BlockConfig(mixer=mixer, ffn=ffn)}
    return dataclasses.replace(base, model=dataclasses.replace(base.model, blocks=blocks, pattern="M", num_periods=21))
