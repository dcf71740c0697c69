"""LoLCATs of Llama at 350 M: `linearize` makes it out of a run of `llama_350m.py` (arXiv 2410.10254).

0.55 B parameters, 2.8 M of them in feature maps. Window, factor and features are those of the published models: 64
tokens, 0.1, and 64 rows for each head.
"""

import llama_350m

from efficient_lm.config import TrainConfig
from efficient_lm.mixers import LoLCATsConfig


def config() -> TrainConfig:
    mixer = LoLCATsConfig(
        num_heads=24,
        num_kv_heads=8,
        head_dim=64,
        feature_dim=64,
        window_size=64,
        window_factor=0.1,
        rotary=llama_350m.ROTARY,
    )
    return llama_350m.config(mixer=mixer)
