"""RWKV-7 at 340 M: 24 layers of width 1024 with 16 heads of 64, ranks as in its paper (arXiv 2503.14456).

349 M parameters: 316 M in the layers, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all. The MLPs are the
paper's channel mixing without its token shift. The first layer leaves its values to all others.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import RWKV7Config
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    cfg = gated_deltanet_340m.config()
    first, ffn = RWKV7Config(num_heads=16), MLPConfig(d_ff=4096, activation="squared_relu")
    blocks = {
        "F": BlockConfig(mixer=first, ffn=ffn),
        "R": BlockConfig(mixer=dataclasses.replace(first, value_rank=32), ffn=ffn),
    }
    model = dataclasses.replace(cfg.model, blocks=blocks, prefix="F", pattern="R", num_periods=23)
    return dataclasses.replace(cfg, model=model)
