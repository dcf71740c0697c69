"""A 1 M-parameter hybrid of Gated DeltaNet and attention on Python source: minutes on a laptop's CPU."""

from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.config import EvaluationConfig, TrainConfig
from efficient_lm.data import DataConfig, TrainBPEConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import MuonConfig, TrapezoidConfig


def config() -> TrainConfig:
    ffn = MLPConfig(d_ff=384)
    mixer = GatedDeltaNetConfig(num_heads=4, key_dim=32, value_dim=32)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
    return TrainConfig(
        model=ModelConfig(
            vocab_size=2048,
            d_model=128,
            blocks={"M": BlockConfig(mixer=mixer, ffn=ffn), "A": BlockConfig(mixer=attention, ffn=ffn)},
            pattern="M M A",
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        data=DataConfig(tokenizer=TrainBPEConfig(vocab_size=2048)),
        optimizer=MuonConfig(learning_rate=1e-2, schedule=TrapezoidConfig(warmup_steps=20, decay_steps=480)),
        batch_size=8,
        seq_len=256,
        num_steps=1200,
        evaluation=EvaluationConfig(every=400, max_batches=16),
        checkpoint=CheckpointConfig(save_every=100),
    )
