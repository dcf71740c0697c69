"""Golden layer: the sliding window of transformers' Mistral."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import MistralConfig
from transformers import masking_utils as masks
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "rope_parameters": {"rope_type": "default", "rope_theta": 337.0},
}


def config() -> MistralConfig:
    return MistralConfig(**SETTINGS, attn_implementation="eager")


def attend(apply, x):
    rotary = MistralRotaryEmbedding(config=config())
    window = masks.sliding_window_causal_mask_function(SETTINGS["sliding_window"])
    mask = masks.eager_mask(B, T, T, mask_function=window, dtype=x.dtype)
    return apply(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=mask)[0]


def main() -> None:
    module_case(
        "layer_mistral_attention",
        lambda: MistralAttention(config(), layer_idx=0),
        attend,
        draw(generator("layer_mistral_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 MistralAttention",
    )


if __name__ == "__main__":
    main()
