"""Gated DeltaNet at 340 M, with the proportions of its paper (arXiv 2412.06464): keys of 3/4 the model's width.

347 M parameters: 314 M in 21 layers of width 1024, 33 M in the tied embedding of 32 k tokens. 15 B tokens in all.
"""

from efficient_lm.config import TrainConfig
from efficient_lm.data import DataConfig, FileConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import GatedDeltaNetConfig, MixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, CosineConfig


def config(
    mixer: MixerConfig = GatedDeltaNetConfig(num_heads=6, key_dim=128, value_dim=256), num_layers: int = 21
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=32_000,
            d_model=1024,
            blocks={"M": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=2816))},
            pattern="M",
            num_periods=num_layers,
        ),
        data=DataConfig(tokenizer=FileConfig(path="tokenizer.json")),
        optimizer=AdamWConfig(learning_rate=1e-3, schedule=CosineConfig(warmup_steps=1_000, final=0.1)),
        mesh={"data": -1},
        batch_size=256,
        seq_len=2048,
        num_steps=28_600,
    )
