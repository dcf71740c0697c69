"""Golden layer: the attention of transformers' Llama, with grouped heads and the rotary scaling of Llama 3."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import LlamaConfig
from transformers import masking_utils as masks
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Wavelengths of the four frequencies: 6, 27, 115, 494. The scaling keeps the first, blends the second, and
    # divides the others.
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 337.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}


def config() -> LlamaConfig:
    return LlamaConfig(**SETTINGS, attn_implementation="eager")


def attend(apply, x):
    rotary = LlamaRotaryEmbedding(config=config())
    mask = masks.eager_mask(B, T, T, dtype=x.dtype)
    return apply(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=mask)[0]


def main() -> None:
    module_case(
        "layer_llama_attention",
        lambda: LlamaAttention(config(), layer_idx=0),
        attend,
        draw(generator("layer_llama_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 LlamaAttention",
    )


if __name__ == "__main__":
    main()
