"""RWKV-6 at 340 M: 16 heads of 64, ranks as in its paper (arXiv 2404.05892), in 21 layers of width 1024.

334 M parameters: 302 M in the layers, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all. The MLPs are those
of the other models of this size, not the paper's channel mixing.
"""

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import RWKV6Config


def config() -> TrainConfig:
    return gated_deltanet_340m.config(mixer=RWKV6Config(num_heads=16), num_layers=21)
