"""Zamba2 at 2.7 B: 54 layers of Mamba-2, nine of which call one of two shared transformers (arXiv 2411.15242).

2.67 B parameters. Calls read the embeddings beside the activations, and adapt the MLP's weights by matrices of rank
128. `config("test")` is the same design, tiny. Data, steps and optimizer are those of gated_deltanet_340m.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.transformer_call import TransformerCallConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, V, N, P, R = (2560, 32_000, 32, 64, 128) if size == "published" else (64, 256, 4, 16, 8)
    mamba = Mamba2Config(num_heads=2 * D // P, key_dim=64, value_dim=P)
    attention = AttentionConfig(num_heads=N, head_dim=2 * D // N, rotary=None)
    options = {"attention": attention, "ffn": MLPConfig(d_ff=4 * D, activation="geglu"), "adapter_rank": R}
    calls = {name: TransformerCallConfig(name=name, **options) for name in "PQ"}
    model = ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"M": BlockConfig(mixer=mamba, ffn=None)}
        | {name: BlockConfig(mixer=mamba, ffn=None, call=call) for name, call in calls.items()},
        prefix="M M M M M M P",
        pattern="M M M M M Q M M M M M P",
        num_periods=3,
        tail="M M M M Q M M M P M M",
    )
    return dataclasses.replace(gated_deltanet_340m.config(), model=model)
