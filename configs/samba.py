"""Samba at 421 M (arXiv 2406.07522): Mamba and attention to 2048 tokens take turns, each before an MLP.

471 M parameters: 373 M in twelve layers of width 1536, the others in embedding and head. Dimensions are those of its
published configuration. `config("test")` is the same design, tiny. The rest: gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, MambaConfig
from efficient_lm.model import BlockConfig, ModelConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, W, periods = (1536, 4096, 32_000, 12, 2048, 6) if size == "published" else (64, 96, 256, 4, 16, 1)
    mamba = MambaConfig(d_inner=2 * D, dt_rank=D // 16)
    attention = AttentionConfig(num_heads=N, head_dim=D // N, window_size=W)
    block = lambda mixer: BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=F))
    blocks = {"M": block(mamba), "A": block(attention)}
    model = ModelConfig(
        vocab_size=V, d_model=D, blocks=blocks, pattern="M A", num_periods=periods, tied_embeddings=False
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
