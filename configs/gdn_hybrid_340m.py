"""Five layers of Gated DeltaNet to one of softmax attention, at 340 M: the 1:5 ratio of arXiv 2510.04800.

379 M parameters: 346 M in 24 layers of width 1024, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = gated_deltanet_340m.config()
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=128, qk_norm=True)
    blocks = base.model.blocks | {"A": BlockConfig(mixer=attention, ffn=MLPConfig(d_ff=2816))}
    # Attention stands in the middle of its period: the paper finds the first place the worst.
    model = dataclasses.replace(base.model, blocks=blocks, pattern="M M M A M M", num_periods=4)
    return dataclasses.replace(base, model=model)
