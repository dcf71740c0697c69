"""A hybrid so small that a step takes milliseconds, on the text files of the folder TEXT, packed and accumulated."""

import os

from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.config import EvaluationConfig, LoggingConfig, TrainConfig
from efficient_lm.data import DataConfig, TextConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import CosineConfig, MuonConfig
from efficient_lm.sampling import SamplingConfig


def config() -> TrainConfig:
    ffn = MLPConfig(d_ff=16)
    return TrainConfig(
        model=ModelConfig(
            vocab_size=258,
            d_model=16,
            blocks={
                "M": BlockConfig(mixer=GatedDeltaNetConfig(num_heads=2, key_dim=8, value_dim=8), ffn=ffn),
                "A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=ffn),
            },
            pattern="M A",
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        data=DataConfig(sources=(TextConfig(path=os.environ["TEXT"]),), validation_fraction=0.2),
        optimizer=MuonConfig(learning_rate=5e-3, schedule=CosineConfig(warmup_steps=2)),
        batch_size=4,
        grad_accumulation=2,
        seq_len=32,
        num_steps=60,
        evaluation=EvaluationConfig(every=1000, sampling=SamplingConfig(max_tokens=8), prompt="a"),
        checkpoint=CheckpointConfig(save_every=4),
        logging=LoggingConfig(every=5, tensorboard=False),
    )
