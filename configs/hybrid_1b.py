"""Five layers of Mamba-2 to one of softmax attention, at 1 B: the paper's balance (arXiv 2510.04800, tables 3 and 8).

1.22 B parameters: 0.96 B in 13 blocks, 0.26 B in the tied embedding of 128 k tokens; 2 M tokens a step, 60 B in all.
Meshes: data=256 on v5e:16x16, data=512 on v5p:8x8x8 with --batch-size 512.
"""

import dataclasses

import llama_1b
import mamba2_1b

from efficient_lm.config import TrainConfig


def config() -> TrainConfig:
    base = llama_1b.config()
    blocks = mamba2_1b.config().model.blocks | base.model.blocks
    # Attention stands in the middle of its period: the paper finds the first place the worst.
    model = dataclasses.replace(base.model, blocks=blocks, pattern="M M M A M M", num_periods=2, tail="M")
    return dataclasses.replace(base, model=model)
