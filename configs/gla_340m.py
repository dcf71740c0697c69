"""Gated linear attention at 340 M, as in its paper (arXiv 2312.06635): 24 layers of width 1024, 4 heads.

342 M parameters: 309 M in the layers, 33 M in the tied embedding of 32 k tokens. The paper trains 15 B tokens.
"""

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import GLAConfig


def config() -> TrainConfig:
    return gated_deltanet_340m.config(mixer=GLAConfig(num_heads=4, key_dim=128, value_dim=256), num_layers=24)
