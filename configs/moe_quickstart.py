"""The quickstart with experts: as much work for a token, twice the weights.

1.81 M parameters, of which a token uses 0.93 M: a shared network of width 128, and four experts of sixteen,
each 64 wide, in place of one network of width 384.
"""

import dataclasses

import quickstart

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig


def config(bias_rate: float | None = 1e-3) -> TrainConfig:
    base = quickstart.config()
    router = TopKConfig(top_k=4, scores="sigmoid", bias_rate=bias_rate)
    ffn = MoEConfig(router=router, num_experts=16, d_ff=64, shared=MLPConfig(d_ff=128))
    blocks = {letter: dataclasses.replace(block, ffn=ffn) for letter, block in base.model.blocks.items()}
    return dataclasses.replace(base, model=dataclasses.replace(base.model, blocks=blocks))
