"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, ten experts of 512, as published (80B-A3B).

79.7 B parameters, of which a token uses 3.9 B, embedding and head included. The published model predicts further tokens
too; this one does not. `config("test")` is the same design, tiny. Data, steps and optimizer: gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, H, E, k, periods = (2048, 512, 151_936, 128, 512, 10, 12) if size == "published" else (
        64, 32, 256, 16, 16, 4, 1)  # fmt: skip
    linear = GatedDeltaNetConfig(num_heads=2 * D // H, num_key_heads=D // H, key_dim=H, value_dim=H)
    rotary = RotaryConfig(theta=1e7, fraction=0.25)
    attention = AttentionConfig(
        num_heads=D // H, num_kv_heads=2, head_dim=2 * H, rotary=rotary, qk_norm=True, output_gate=True
    )
    router = TopKConfig(top_k=k, balance_loss=1e-3)
    ffn = MoEConfig(router=router, num_experts=E, d_ff=F, shared=MLPConfig(d_ff=F), shared_gate=True)
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"M": BlockConfig(mixer=linear, ffn=ffn), "A": BlockConfig(mixer=attention, ffn=ffn)},
        pattern="M M M A",
        num_periods=periods,
        tied_embeddings=False,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, mesh={"data": -1, "expert": min(E, 16)})
