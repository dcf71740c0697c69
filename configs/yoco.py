"""YOCO-3B: a self-decoder of gated retention, then a cross-decoder that reads one cache (arXiv 2405.05254).

3.45 B parameters: 2.83 B in 26 layers and the keys between them, the others in embedding and head. Sizes and optimizer
are those of its table 7; the schedule is for 5 T tokens, of which it took 1.6 T. Untied embeddings, their scale, the
rotation and the temperature of decays are those of its code. `config("test")` is the same design, tiny.
"""

import dataclasses
from typing import Literal

import gated_deltanet_340m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import CrossAttentionConfig, KeyValuesConfig, RetNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, TrapezoidConfig
from efficient_lm.rotary import RotaryConfig


def config(size: Literal["published", "test"] = "published") -> TrainConfig:
    D, F, V, N, K, layers = (3072, 8192, 100_288, 24, 8, 13) if size == "published" else (64, 96, 256, 4, 2, 2)
    H, ffn = D // N, MLPConfig(d_ff=F)
    rotary = RotaryConfig(theta=10_000 ** (H / (H - 2)))  # Its slowest rotation is 1 / 10 000 exactly.
    retention = RetNetConfig(num_heads=N, key_dim=H, value_dim=H, rotary=rotary, decay_temperature=16.0)
    keys = KeyValuesConfig(num_kv_heads=K, head_dim=H, rotary=rotary)
    mixers = {"R": retention, "C": CrossAttentionConfig(num_heads=N, keys=keys)}
    blocks = {letter: BlockConfig(mixer=mixer, ffn=ffn) for letter, mixer in mixers.items()}
    blocks["K"] = BlockConfig(mixer=keys, ffn=None)
    prefix, options = " ".join("R" * layers + "K"), {"tied_embeddings": False, "embedding_scale": D**0.5}
    model = ModelConfig(
        vocab_size=V, d_model=D, blocks=blocks, prefix=prefix, pattern="C", num_periods=layers, **options
    )
    schedule = TrapezoidConfig(warmup_steps=1000, decay_steps=1_191_000, final=0.04)
    optimizer = AdamWConfig(learning_rate=3.2e-4, schedule=schedule)
    run = {"batch_size": 1024, "seq_len": 4096, "num_steps": 1_192_000}
    return dataclasses.replace(gated_deltanet_340m.config(), model=model, optimizer=optimizer, **run)
