"""RecurrentGemma at 2 B (arXiv 2404.07839), which is Griffin (arXiv 2402.19427): RG-LRU twice, then local attention.

2.68 B parameters. Attention sees 2048 tokens, with one head of keys and values, half of which is rotated.
`config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, RGLRUConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, V, N, W, periods = (2560, 256_000, 10, 2048, 8) if size == "published" else (64, 256, 4, 16, 1)
    rotary = RotaryConfig(fraction=0.5)
    options = {"num_kv_heads": 1, "rotary": rotary, "window_size": W, "output_bias": True}
    attention = AttentionConfig(num_heads=N, head_dim=D // N, **options)
    ffn = MLPConfig(d_ff=3 * D, activation="geglu", bias=True)
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={
            "R": BlockConfig(mixer=RGLRUConfig(width=D, num_heads=N), ffn=ffn),
            "A": BlockConfig(mixer=attention, ffn=ffn),
        },
        pattern="R R A",
        num_periods=periods,
        tail="R R",
        embedding_scale=D**0.5,
        logits_soft_cap=30.0,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
