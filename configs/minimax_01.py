"""MiniMax-Text-01: seven layers of lightning attention to one of softmax, two experts of 32 (arXiv 2501.08313).

456 B parameters, of which a token uses 46 B beside embedding and head; norms are of the residual stream (DeepNorm).
Published heads forget less the deeper their layer is, down to not at all; here, always half as fast as the first's.
`config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, LightningConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, K, H, E, periods = (6144, 9216, 200_064, 64, 8, 128, 32, 10) if size == "published" else (
        64, 48, 256, 4, 2, 16, 4, 1)  # fmt: skip
    rotary = RotaryConfig(theta=1e7, fraction=0.5)
    linear = LightningConfig(num_heads=N, key_dim=H, value_dim=H, slope_scale=0.5)
    attention = AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rotary=rotary)
    ffn = MoEConfig(router=TopKConfig(top_k=2, balance_loss=1e-3), num_experts=E, d_ff=F)
    alpha = (16 * periods) ** 0.25  # 3.5566: DeepNorm's, of 80 layers.
    block = lambda mixer: BlockConfig(mixer=mixer, ffn=ffn, post_norm=True, skip_scales=(alpha, alpha))
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"L": block(linear), "A": block(attention)},
        pattern="L L L L L L L A",
        num_periods=periods,
        tied_embeddings=False,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, mesh={"data": -1, "expert": min(E, 16)})
