"""Granite-4.0-H-Tiny: four layers of attention among 36 of Mamba-2, six experts of 64 and a shared one, as published.

6.94 B parameters, of which a token uses 1.5 B. Attention has no positions; embeddings, residuals and logits are scaled.
`config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, H, P, E, k, periods = (1536, 512, 100_352, 128, 64, 64, 6, 3) if size == "published" else (
        64, 32, 256, 16, 16, 8, 2, 1)  # fmt: skip
    mamba = Mamba2Config(num_heads=2 * D // P, key_dim=H, value_dim=P)
    attention = AttentionConfig(num_heads=D // H, num_kv_heads=D // H // 3 or 1, head_dim=H, rotary=None)
    router = TopKConfig(top_k=k, balance_loss=1e-3)
    ffn = MoEConfig(router=router, num_experts=E, d_ff=F, shared=MLPConfig(d_ff=2 * F))
    block = lambda mixer: BlockConfig(mixer=mixer, ffn=ffn, branch_scale=0.22)
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"M": block(mamba), "A": block(attention)},
        prefix="M M M M M A",
        pattern="M M M M M M M M M A",
        num_periods=periods,
        tail="M M M M",
        embedding_scale=12.0,
        logits_scale=1 / 6,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, mesh={"data": -1, "expert": min(E, 16)})
