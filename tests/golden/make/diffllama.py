"""Golden layer: the differential attention of transformers' DiffLlama."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import DiffLlamaConfig
from transformers import masking_utils as masks
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 337.0},
    "layer": 3,
}


def config() -> DiffLlamaConfig:
    settings = {key: value for key, value in SETTINGS.items() if key != "layer"}
    return DiffLlamaConfig(**settings, attn_implementation="eager")


def attend(apply, x):
    rotary = DiffLlamaRotaryEmbedding(config=config())
    mask = masks.eager_mask(B, T, T, dtype=x.dtype)
    return apply(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=mask)[0]


def main() -> None:
    module_case(
        "layer_diffllama_attention",
        lambda: DiffLlamaAttention(config(), layer_idx=SETTINGS["layer"]),
        attend,
        draw(generator("layer_diffllama_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 DiffLlamaAttention",
    )


if __name__ == "__main__":
    main()
