"""Llama at 350 M: softmax attention throughout, the baseline of the others (arXiv 2510.04800, table 8).

0.55 B parameters: 0.35 B in the blocks, 0.20 B in the embedding of 128 k tokens, which is the head too. Dimensions,
learning rate, schedule and the documents that see one another are the paper's: 2 M tokens a step, 60 B in all.
"""

from efficient_lm.config import TrainConfig
from efficient_lm.data import DataConfig, FileConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, MixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, TrapezoidConfig
from efficient_lm.rotary import Llama3Scaling, RotaryConfig

ROTARY = RotaryConfig(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))


def config(
    mixer: MixerConfig = AttentionConfig(num_heads=24, num_kv_heads=8, head_dim=64, rotary=ROTARY),
    d_model: int = 1536,
    d_ff: int = 4096,
    num_layers: int = 14,
    learning_rate: float = 3e-3,
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=128_256,
            d_model=d_model,
            blocks={"A": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=d_ff))},
            pattern="A",
            num_periods=num_layers,
        ),
        data=DataConfig(tokenizer=FileConfig(path="tokenizer.json"), document_mask=False),
        optimizer=AdamWConfig(
            learning_rate=learning_rate, schedule=TrapezoidConfig(warmup_steps=7_500, decay_steps=6_000)
        ),
        mesh={"data": -1},
        batch_size=256,
        seq_len=8192,
        num_steps=30_000,
    )
