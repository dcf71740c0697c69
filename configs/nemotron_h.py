"""Nemotron-H at 8 B: four layers of attention among 24 of Mamba-2 and 24 MLPs (arXiv 2504.03624), as published.

8.10 B parameters. The published pattern is M-M-M-M*- (M-M-M-M-M*-) x 3 M-M-M-M-M-: X is "M-", Y is "M", A is "*-".
`config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, P, K, H = (4096, 21_504, 131_072, 128, 64, 8, 128) if size == "published" else (
        64, 96, 256, 8, 16, 2, 16)  # fmt: skip
    mamba = Mamba2Config(num_heads=N, num_groups=K, key_dim=H, value_dim=P)
    attention = AttentionConfig(num_heads=D // H, num_kv_heads=K, head_dim=H, rotary=None)
    ffn = MLPConfig(d_ff=F, activation="squared_relu")
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={
            "X": BlockConfig(mixer=mamba, ffn=ffn),
            "Y": BlockConfig(mixer=mamba, ffn=None),
            "A": BlockConfig(mixer=attention, ffn=ffn),
        },
        prefix="X X X Y A",
        pattern="X X X X Y A",
        num_periods=3,
        tail="X X X X X",
        tied_embeddings=False,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
