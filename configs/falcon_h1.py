"""Falcon-H1 at 0.5 B: attention and Mamba-2 side by side in every layer (arXiv 2507.22448), as published.

521 M parameters. The published model multiplies activations by constants, which weights absorb: those of embeddings and
logits are here, the others are not. `config("test")` is the same design, tiny. The rest: gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config, ParallelMixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, V, N, H, M, S, layers = (1024, 32_784, 8, 64, 24, 128, 36) if size == "published" else (64, 256, 4, 16, 8, 8, 2)
    attention = AttentionConfig(num_heads=N, num_kv_heads=2, head_dim=H, rotary=RotaryConfig(theta=1e11))
    mamba = Mamba2Config(num_heads=M, key_dim=S, value_dim=H, norm=False)
    mixer = ParallelMixerConfig(first=attention, second=mamba, norm=None, fusion="add")
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"H": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=2 * D))},
        pattern="H",
        num_periods=layers,
        tied_embeddings=False,
        embedding_scale=32**0.5,
        logits_scale=0.0390625,
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
