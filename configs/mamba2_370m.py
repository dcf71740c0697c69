"""Mamba-2 at 370 M, with the dimensions of the released model (arXiv 2405.21060): 48 layers of width 1024, no MLPs.

368 M parameters: 317 M in the layers, 51 M in the tied embedding of 50 k tokens. 15 B tokens in all.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import Mamba2Config
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = gated_deltanet_340m.config()
    mixer = Mamba2Config(num_heads=32, key_dim=128, value_dim=64)
    model = dataclasses.replace(
        base.model, vocab_size=50_280, blocks={"M": BlockConfig(mixer=mixer, ffn=None)}, num_periods=48
    )
    return dataclasses.replace(base, model=model)
