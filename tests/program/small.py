"""One block of attention: it compiles fast, and on a CPU eight devices wait for one another at each collective."""

import os

from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.config import EvaluationConfig, LoggingConfig, TrainConfig
from efficient_lm.data import DataConfig, TextConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, CosineConfig
from efficient_lm.sampling import SamplingConfig


def config() -> TrainConfig:
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=MLPConfig(d_ff=16))
    return TrainConfig(
        model=ModelConfig(
            vocab_size=258,
            d_model=16,
            blocks={"A": block},
            pattern="A",
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        data=DataConfig(sources=(TextConfig(path=os.environ["TEXT"]),), validation_fraction=0.2),
        optimizer=AdamWConfig(learning_rate=2e-3, schedule=CosineConfig(warmup_steps=2)),
        batch_size=8,
        seq_len=32,
        num_steps=120,
        evaluation=EvaluationConfig(every=1000, sampling=SamplingConfig(max_tokens=8), prompt="a"),
        checkpoint=CheckpointConfig(save_every=1000),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
