"""Kimi Linear: three layers of Kimi Delta Attention to one of MLA without positions, 8 experts of 256 (48B-A3B).

49.1 B parameters, of which a token uses 3.5 B, embedding and head included (arXiv 2510.26692). The first layer's
network is dense. `config("test")` is the same design, tiny. Data, steps and optimizer: gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import KimiDeltaAttentionConfig, MLAConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, H, E, k, periods = (2304, 1024, 163_840, 32, 128, 256, 8, 5) if size == "published" else (
        64, 32, 256, 4, 16, 16, 4, 1)  # fmt: skip
    kda = KimiDeltaAttentionConfig(num_heads=N, key_dim=H, value_dim=H)
    # Keys have a part that all heads share, as if it were rotated; it is not.
    nope = RotaryConfig(fraction=0.0)
    mla = MLAConfig(num_heads=N, latent_dim=4 * H, key_dim=H, rotary_dim=H // 2, value_dim=H, rotary=nope)
    router = TopKConfig(top_k=k, scores="sigmoid", scale=2.446, bias_rate=1e-3)
    ffn = MoEConfig(router=router, num_experts=E, d_ff=F, shared=MLPConfig(d_ff=F))
    blocks = {"F": BlockConfig(mixer=kda, ffn=MLPConfig(d_ff=9 * F))}
    blocks |= {"K": BlockConfig(mixer=kda, ffn=ffn), "A": BlockConfig(mixer=mla, ffn=ffn)}
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks=blocks,
        prefix="F K K A",
        pattern="K K K A",
        num_periods=periods,
        tail="K K A",
        tied_embeddings=False,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, mesh={"data": -1, "expert": min(E, 16)})
