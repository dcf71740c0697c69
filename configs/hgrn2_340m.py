"""HGRN2 at 340 M: heads that expand by 128, as in its paper (arXiv 2404.07904), in 24 layers of width 1024.

341 M parameters: 308 M in the layers, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all. Every layer may
forget all that it holds; the paper bounds this from below, the more the deeper the layer.
"""

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import HGRN2Config


def config() -> TrainConfig:
    return gated_deltanet_340m.config(mixer=HGRN2Config(num_heads=8, key_dim=128, value_dim=128), num_layers=24)
