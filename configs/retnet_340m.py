"""RetNet at 340 M: heads of 256 for keys and 512 for values, as in its paper (arXiv 2307.08621): 24 layers, width 1024.

347 M parameters: 315 M in the layers, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all. As in the paper,
two thirds of a layer's weights are the mixer's, and the MLP is about half as wide as beside other mixers.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import RetNetConfig
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = gated_deltanet_340m.config(num_layers=24)
    block = BlockConfig(mixer=RetNetConfig(num_heads=4, key_dim=256, value_dim=512), ffn=MLPConfig(d_ff=1536))
    return dataclasses.replace(base, model=dataclasses.replace(base.model, blocks={"M": block}))
