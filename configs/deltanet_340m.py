"""DeltaNet at 340 M: heads of 128, as in its paper (arXiv 2406.06484), in 24 layers of width 1024.

342 M parameters: 309 M in the layers, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all, as in the paper.
With --model.blocks.M.mixer.beta-max 2 it can track states (arXiv 2411.12537).
"""

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import DeltaNetConfig


def config() -> TrainConfig:
    mixer = DeltaNetConfig(num_heads=8, key_dim=128, value_dim=128)
    return gated_deltanet_340m.config(mixer=mixer, num_layers=24)
