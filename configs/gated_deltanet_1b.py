"""Gated DeltaNet at 1.3 B, with the proportions of its paper (arXiv 2412.06464): keys of 3/4 the model's width.

1.32 B parameters: 1.26 B in 21 layers of width 2048, 0.07 B in the tied embedding of 32 k tokens. 100 B tokens in all,
as in the paper, with its learning rate. Meshes: data=128 or data=32,model=4 on v5e:8x16.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import GatedDeltaNetConfig
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = gated_deltanet_340m.config()
    mixer = GatedDeltaNetConfig(num_heads=12, key_dim=128, value_dim=256)
    blocks = {"M": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=5632))}
    optimizer = dataclasses.replace(base.optimizer, learning_rate=4e-4)
    model = dataclasses.replace(base.model, d_model=2048, blocks=blocks)
    return dataclasses.replace(base, model=model, optimizer=optimizer, batch_size=128, seq_len=4096, num_steps=190_000)
