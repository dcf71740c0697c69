"""Mamba-2 at 1 B, every mixer followed by an MLP (arXiv 2510.04800, table 8).

1.25 B parameters: 0.99 B in 13 blocks, 0.26 B in the tied embedding of 128 k tokens; 2 M tokens a step, 60 B in all.
Mesh: data=256 on v5e:16x16. Its one key head lies whole on every device, so there is no axis `model`.
"""

import dataclasses

import llama_1b

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import Mamba2Config
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = llama_1b.config()
    mixer, ffn = Mamba2Config(num_heads=32, key_dim=128, value_dim=128), base.model.blocks["A"].ffn
    blocks = {"M": BlockConfig(mixer=mixer, ffn=ffn)}
    return dataclasses.replace(base, model=dataclasses.replace(base.model, blocks=blocks, pattern="M", num_periods=13))
