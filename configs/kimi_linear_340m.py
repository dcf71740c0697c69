"""Three layers of Kimi Delta Attention to one of attention without positions: Kimi Linear (arXiv 2510.26692) at 340 M.

345 M parameters: 312 M in 24 layers of width 1024, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all. Heads
of 128 and the 3:1 ratio are the paper's; its attention compresses keys and values (MLA), this one shares them among
heads, and its MLPs are mixtures of experts.
"""

import dataclasses

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, KimiDeltaAttentionConfig
from efficient_lm.model import BlockConfig


def config() -> TrainConfig:
    base = gated_deltanet_340m.config(mixer=KimiDeltaAttentionConfig(num_heads=8))
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=128, rotary=None)
    blocks = base.model.blocks | {"A": BlockConfig(mixer=attention, ffn=MLPConfig(d_ff=2816))}
    model = dataclasses.replace(base.model, blocks=blocks, pattern="M M M A", num_periods=6)
    return dataclasses.replace(base, model=model)
