"""Jamba: one layer of attention to seven of Mamba, experts in every second layer (arXiv 2403.19887), as published.

51.6 B parameters, of which a token uses 12 B. Dimensions are those of Jamba-v0.1; attention has no positions.
`config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, MambaConfig
from efficient_lm.model import BlockConfig, ModelConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, H, E, periods = (4096, 14336, 65_536, 128, 16, 4) if size == "published" else (64, 96, 256, 16, 4, 1)
    mamba = MambaConfig(d_inner=2 * D, dt_rank=D // 16, inner_norms=True)
    attention = AttentionConfig(num_heads=D // H, num_kv_heads=D // H // 4, head_dim=H, rotary=None)
    mlp = MLPConfig(d_ff=F)
    experts = MoEConfig(router=TopKConfig(top_k=2, renormalize=False, balance_loss=1e-3), num_experts=E, d_ff=F)
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={
            "M": BlockConfig(mixer=mamba, ffn=mlp),
            "E": BlockConfig(mixer=mamba, ffn=experts),
            "A": BlockConfig(mixer=attention, ffn=mlp),
        },
        pattern="M E M E A E M E",
        num_periods=periods,
        tied_embeddings=False,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, mesh={"data": -1, "expert": min(E, 16)})
